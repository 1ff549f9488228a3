// c += x Wᵀ for batches too small to pay for a panel. Lanes are outputs, as in a transposed panel,
// but the weights go from the table to the products without being stored, and the sums of a micro
// tile stay in registers over a long stretch of k.
//
//   x       rows in micro tiles of equal height, each interleaved: x[k * height + i]
//   codes   packed dwords of kLanes rows of the weight at a time, transposed as in
//           dequant_panels.inl
//
// Each sum takes the products of gemm.inl in its order of k, so the bits are the same.

constexpr int64_t kStage = 512;  // k whose codes are transposed at a time
static_assert(kMaxSkinny <= kWhole, "pieces of the output must not cut the rows");

inline int64_t skinny_height(int64_t M) { return ceil_div(M, ceil_div(M, kSkinnyRows)); }

// Interleaves columns [k0, k0 + count) of x.
inline void interleave(const Matrix& x, int64_t k0, int64_t count, float* dst) {
  const int64_t height = skinny_height(x.rows);
  float row[kStage];
  for (int64_t i0 = 0; i0 < x.rows; i0 += height) {
    const int64_t rows = min64(height, x.rows - i0);
    float* micro_tile = dst + i0 * x.cols + k0 * rows;
    for (int64_t i = 0; i < rows; ++i) {
      load_row(row, x.data, x.dtype, (i0 + i) * x.stride + k0, count);
      for (int64_t k = 0; k < count; ++k) micro_tile[k * rows + i] = row[k];
    }
  }
}

// c += the products of columns [k0, k0 + depth) with the groups of the weight from g on. `next` is
// where the codes lie that come after these.
template <int Rows, int Vectors>
inline void skinny_micro_kernel(const LaneRows& weight, int64_t g, const uint32_t* codes,
                                const float* x, int64_t k0, int64_t depth, const uint8_t* next,
                                float* c) {
  vf acc[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) acc[i][v] = load(c + i * kStripWidth + v * kLanes);
  const int64_t row_bytes = weight.chunks.w.K >> 1;
  const Lut lut = weight.lut;
  for (int64_t d = 0; d < depth / 8; ++d, x += 8 * Rows) {
    NibbleWeights weights[Vectors];
    vf scale[Vectors];
    for (int v = 0; v < Vectors; ++v) {
      weights[v] = NibbleWeights(lut, loadi(codes + (v * kStage / 8 + d) * kLanes));
      scale[v] = load(weight.scale(g + v, k0 + 8 * d));
      __builtin_prefetch(next + (d % kLanes + v * kLanes) * row_bytes + d / kLanes * (4 * kLanes),
                         0, 2);
    }
    for_nibbles([&](auto s) {
      constexpr int S = decltype(s)::value;
      vf w[Vectors];
      for (int v = 0; v < Vectors; ++v) w[v] = mul(weights[v].template weight<S>(lut), scale[v]);
      for (int i = 0; i < Rows; ++i) {
        const vf value = set1(x[S * Rows + i]);
        for (int v = 0; v < Vectors; ++v) acc[i][v] = fma(value, w[v], acc[i][v]);
      }
    });
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) store(c + i * kStripWidth + v * kLanes, acc[i][v]);
}

template <int Rows>
void skinny_rows(const LaneRows& weight, const float* x, float* c) {
  constexpr int V = Rows <= kSkinnyWide ? 2 : 1;
  uint32_t codes[V * kStage / 8 * kLanes];
  const Weight4& w = weight.chunks.w;
  for (int64_t g = 0; g * kLanes < weight.count; g += V)
    for (int64_t k = 0; k < w.K; k += kStage) {
      const int64_t depth = min64(kStage, w.K - k);
      const bool last = k + kStage >= w.K;
      const int64_t row = weight.n0 + (last ? g + V : g) * kLanes, column = last ? 0 : k + kStage;
      for (int v = 0; v < V; ++v)
        weight.load_codes(g + v, k, depth, codes + v * kStage / 8 * kLanes);
      skinny_micro_kernel<Rows, V>(weight, g, codes, x + k * Rows, k, depth,
                                   w.packed + ((row * w.K + column) >> 1), c + g * kLanes);
    }
}

template <int Rows>
inline void skinny_rows_of(int rows, const LaneRows& weight, const float* x, float* c) {
  if constexpr (Rows > 0) {
    if (rows != Rows) return skinny_rows_of<Rows - 1>(rows, weight, x, c);
    skinny_rows<Rows>(weight, x, c);
  }
}

// c[i, j] += Σ_k x[i, k] weight[j, k] for M interleaved rows of x.
inline void accumulate_skinny(const float* x, int64_t M, const LaneRows& weight, float* c) {
  const int64_t height = skinny_height(M);
  for (int64_t i = 0; i < M; i += height)
    skinny_rows_of<kSkinnyRows>(static_cast<int>(min64(height, M - i)), weight,
                                x + i * weight.chunks.w.K, c + i * kStripWidth);
}
