// In place of tiles.inl where there are no tile registers.

constexpr bool kHasTiles = false;
constexpr int64_t kTilesForward = INT64_MAX, kTilesDx = INT64_MAX;

template <bool TransposedSource, class Source>
void accumulate_tiles(const Operand<false>&, const Source&, int64_t, int64_t, int64_t, int64_t,
                      int64_t, float*) {}
