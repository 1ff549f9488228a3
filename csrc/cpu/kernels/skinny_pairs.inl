// skinny.inl's product on pairs of bfloat16 numbers: lanes are outputs, weights go from the table
// to the products in registers, for few rows of x.
//
//   x       rows in tiles of equal height, each interleaved, in pairs: x[q * height + i]
//
// The sums of a block run over its pairs in the order of gemm_pairs.inl: the bits are the same.

static_assert(kMaxSkinnyPairs <= kWhole, "pieces of the output must not cut the rows");

inline int64_t pair_height(int64_t M) { return ceil_div(M, ceil_div(M, kMaxPairs)); }

// Columns [k0, k0 + count) of x, count at most kStage.
inline void interleave_pairs(const Matrix& x, int64_t k0, int64_t count, uint32_t* dst) {
  const int64_t height = pair_height(x.rows);
  alignas(64) uint16_t row[kStage];
  alignas(64) uint32_t pairs[kStage / 2];
  for (int64_t i0 = 0; i0 < x.rows; i0 += height) {
    const int64_t rows = min64(height, x.rows - i0);
    uint32_t* tile = dst + (i0 * x.cols + k0 * rows) / 2;
    for (int64_t i = 0; i < rows; ++i) {
      load_row16(row, x.data, x.dtype, (i0 + i) * x.stride + k0, count);
      for (int64_t k = 0; k < count; k += 2 * kLanes)
        storei(pairs + k / 2, pairs_of_eight(loadi(row + k)));
      for (int64_t q = 0; q < count / 2; ++q) tile[q * rows + i] = pairs[q];
    }
  }
}

// c += the products of columns [k0, k0 + depth), of groups g .. of the weight; next: where the
// codes are that come after these.
template <int Rows, int Vectors>
inline void skinny_pairs_kernel(const LaneRows& weight, const PairLut& table, int64_t g,
                                const uint32_t* codes, const uint32_t* x, int64_t k0, int64_t depth,
                                const uint8_t* next, float* c) {
  const int64_t row_bytes = weight.chunks.w.K >> 1;
  const int64_t group = min64(kDepth, int64_t{1} << weight.chunks.w.block_shift);
  for (int64_t k = 0; k < depth; k += group) {
    vf sum[Rows][Vectors];
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Vectors; ++v) sum[i][v] = zero();
    for (int64_t d = k / 8; d < min64(k + group, depth) / 8; ++d, x += 4 * Rows) {
      vi dwords[Vectors];
      for (int v = 0; v < Vectors; ++v) {
        dwords[v] = loadi(codes + (v * kStage / 8 + d) * kLanes);
        __builtin_prefetch(next + (d % kLanes + v * kLanes) * row_bytes + d / kLanes * (4 * kLanes),
                           0, 2);
      }
      for_pairs([&](auto s) {
        constexpr int S = decltype(s)::value;
        vi w[Vectors];
        for (int v = 0; v < Vectors; ++v) w[v] = pair_of<S>(table, dwords[v]);
        for (int i = 0; i < Rows; ++i)
          for (int v = 0; v < Vectors; ++v) sum[i][v] = dot2(sum[i][v], w[v], x[S * Rows + i]);
      });
    }
    for (int v = 0; v < Vectors; ++v) {
      const vf scale = load(weight.scale(g + v, k0 + k));
      for (int i = 0; i < Rows; ++i) {
        float* to = c + i * kStripWidth + v * kLanes;
        store(to, fma(sum[i][v], scale, load(to)));
      }
    }
  }
}

template <int Rows>
void skinny_pairs(const LaneRows& weight, const PairLut& table, const uint32_t* x, float* c) {
  constexpr int V = Rows <= kPairWide ? 2 : 1;
  uint32_t codes[V * kStage / 8 * kLanes];
  const Weight4& w = weight.chunks.w;
  for (int64_t g = 0; g * kLanes < weight.count; g += V)
    for (int64_t k = 0; k < w.K; k += kStage) {
      const int64_t depth = min64(kStage, w.K - k);
      const bool last = k + kStage >= w.K;
      const int64_t row = weight.n0 + (last ? g + V : g) * kLanes, column = last ? 0 : k + kStage;
      for (int v = 0; v < V; ++v)
        weight.load_codes(g + v, k, depth, codes + v * kStage / 8 * kLanes);
      skinny_pairs_kernel<Rows, V>(weight, table, g, codes, x + k / 2 * Rows, k, depth,
                                   w.packed + ((row * w.K + column) >> 1), c + g * kLanes);
    }
}

template <int Rows>
inline void skinny_pairs_of(int rows, const LaneRows& weight, const PairLut& table,
                            const uint32_t* x, float* c) {
  if constexpr (Rows > 0) {
    if (rows != Rows) return skinny_pairs_of<Rows - 1>(rows, weight, table, x, c);
    skinny_pairs<Rows>(weight, table, x, c);
  }
}

// c[i, j] += Σ_k x[i, k] weight[j, k] for M interleaved rows of x.
inline void accumulate_skinny_pairs(const uint32_t* x, int64_t M, const LaneRows& weight,
                                    const PairLut& table, float* c) {
  const int64_t height = pair_height(M);
  for (int64_t i = 0; i < M; i += height)
    skinny_pairs_of<kMaxPairs>(static_cast<int>(min64(height, M - i)), weight, table,
                               x + i * weight.chunks.w.K / 2, c + i * kStripWidth);
}
