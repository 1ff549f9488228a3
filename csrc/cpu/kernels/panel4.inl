// Chunks of a 4-bit weight whose blocks fit its rows, and the panels of gemm.inl filled from them
// without a detour.
//
// A chunk is one vector load of packed bytes: 8W weights of one row. Dword lane j holds weights 8j
// .. 8j+7, and byte b of a dword holds weight 2b in its high nibble, so one right shift of all
// lanes brings weight 8j + s to the low nibble of lane j.

constexpr int kChunk = 8 * W;
static_assert(kDepth % kChunk == 0, "a panel holds whole chunks");

// f(s, Constant<shift of weight 8j + s>) for s = 0..7: shifts are immediates.
template <class F>
inline void for_shifts(const F& f) {
  f(0, Constant<4>{});
  f(1, Constant<0>{});
  f(2, Constant<12>{});
  f(3, Constant<8>{});
  f(4, Constant<20>{});
  f(5, Constant<16>{});
  f(6, Constant<28>{});
  f(7, Constant<24>{});
}

// Walks chunks of rows of the weight: scales per lane, packed dwords.
struct Chunks {
  const Weight4& w;
  int64_t blocks_per_row;
  vi scale_lane;  // lane j of a chunk takes the scale this many blocks after the chunk's first

  explicit Chunks(const Weight4& weight)
      : w(weight), blocks_per_row(weight.K >> weight.block_shift) {
    uint32_t lane[W];
    for (int j = 0; j < W; ++j) lane[j] = static_cast<uint32_t>(8 * j) >> w.block_shift;
    scale_lane = loadi(lane);
  }
  // Floats that the scales of chunks [begin, end) of a row may take, with room for vector loads.
  static int64_t scales_size(const Weight4& w) { return (w.K >> w.block_shift) + 2 * W; }

  int64_t first_block(int64_t k) const { return k >> w.block_shift; }
  void load_row_scales(float* dst, int64_t n, int64_t first, int64_t count) const {
    load_scales(dst, w, n * blocks_per_row + first, count);
  }
  // `scales` starts at the block `first`.
  vf scale(const float* scales, int64_t first, int64_t k) const {
    return permute(load(scales + (first_block(k) - first)), scale_lane);
  }
  // A hint only: may name a row beyond the last. Hardware prefetchers stop at pages, which rows of
  // codes soon reach.
  void prefetch(int64_t n, int64_t k) const { __builtin_prefetch(w.packed + ((n * w.K + k) >> 1)); }
  void prefetch_scales(int64_t n, int64_t first, int64_t count) const {
    const int64_t block = n * blocks_per_row + first, size = w.absmax ? 4 : 1;
    const char* p = w.absmax ? reinterpret_cast<const char*>(w.absmax)
                             : reinterpret_cast<const char*>(w.absmax_u8);
    for (int64_t byte = 0; byte < count * size; byte += 64)
      __builtin_prefetch(p + block * size + byte);
  }
  vi packed(int64_t n, int64_t k) const {
    const uint8_t* p = w.packed + ((n * w.K + k) >> 1);
    const int64_t dwords = (w.K - k) >> 3;
    return dwords >= W ? loadi(p) : loadi_partial(p, static_cast<int>(dwords));
  }
};

// The scales of stored rows j0 .. j0 + count (zero beyond), as lanes: dst[b * W + l] for block
// first + b of row j0 + l.
inline void load_lane_scales(const Chunks& chunks, int64_t j0, int64_t count, int64_t first,
                             int64_t blocks, float* dst) {
  for (int64_t l = 0; l < W; ++l)
    for (int64_t b = 0; b < blocks; ++b)
      dst[b * W + l] =
          l < count ? block_scale(chunks.w, (j0 + l) * chunks.blocks_per_row + first + b) : 0.0f;
}

// Overload of gemm.inl's: W rows of packed dwords are transposed before they are decoded, an eighth
// of the shuffles.
inline void fill_transposed(const Quantized& source, int64_t j0, int64_t columns, int64_t p0,
                            int64_t depth, float* panel) {
  const Weight4& w = source.w;
  if (!blocks_fit_rows(w)) return fill_transposed_rows(source, j0, columns, p0, depth, panel);
  const Chunks chunks(w);
  const Lut lut = source.lut;
  const int64_t first = chunks.first_block(p0),
                blocks = chunks.first_block(p0 + depth - 1) + 1 - first;
  float scales[kDepth / 32 * W];
  for (int64_t j = 0; j < columns; j += W) {
    float* dst = panel + j / kTile * (kDepth * kTile) + j % kTile;
    const int64_t count = min64(W, columns - j);
    load_lane_scales(chunks, j0 + j, count, first, blocks, scales);
    for (int64_t p = 0; p < depth; p += kChunk) {
      vf dwords[W];
      for (int64_t l = 0; l < W; ++l) {  // a missing row repeats the last one; its scale is zero
        const int64_t n = j0 + j + min64(l, count - 1);
        dwords[l] = as_float(chunks.packed(n, p0 + p));
        chunks.prefetch(n, p0 + p + kDepth);
      }
      transpose(dwords);
      const int64_t present = min64(W, (depth - p) / 8);
      for (int64_t d = 0; d < present; ++d) {
        const vi packed = as_bits(dwords[d]);
        const vf scale = load(scales + (chunks.first_block(p0 + p + 8 * d) - first) * W);
        float* out = dst + (p + 8 * d) * kTile;
        for_shifts([&](int s, auto shift) {
          store(out + s * kTile, mul(lut16(lut, shr<decltype(shift)::value>(packed)), scale));
        });
      }
    }
  }
}

// Overload of gemm.inl's: decoded straight into the panel.
inline void fill_natural(const Quantized& source, int64_t j0, int64_t columns, int64_t p0,
                         int64_t depth, float* panel) {
  const Weight4& w = source.w;
  if (!blocks_fit_rows(w)) return fill_natural_rows(source, j0, columns, p0, depth, panel);
  const Lut lut = source.lut;
  const int64_t vectors = columns / W;  // K is a multiple of 32
  for (int64_t p = 0; p < depth; ++p) {
    const int64_t i0 = (p0 + p) * w.K + j0;
    const uint8_t* packed = w.packed + (i0 >> 1);
    __builtin_prefetch(packed + 8 * (w.K >> 1));
    int64_t block = -1;
    vf scale = zero();
    for (int64_t v = 0; v < vectors; ++v) {
      if (const int64_t b = (i0 + v * W) >> w.block_shift; b != block) {
        block = b;
        scale = set1(block_scale(w, b));
      }
      float* dst = panel + v / NV * (kDepth * kTile) + p * kTile + v % NV * W;
      store(dst, mul(lut_nibbles(lut, packed + v * (W / 2)), scale));
    }
  }
}
