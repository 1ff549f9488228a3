// gemv.inl's products on pairs of bfloat16 numbers: half as many lookups and products for each
// weight.
//
// Forward: x is rounded to bfloat16 (16-bit activations are that already) and laid out to match the
// pairs that a lookup in a chunk of packed bytes makes, dwords of two numbers:
//
//   pairs[chunk][S][m][j] = (x[m][chunk*8W + 8j + S], x[m][chunk*8W + 8j + 4 + S])       S = 0..3

constexpr int64_t kChunkPairs = kChunk / 2;

// dst[0, n) = src[offset, offset + n) as bfloat16, rounded once.
inline void load_row16(uint16_t* dst, const void* src, DType t, int64_t offset, int64_t n) {
  if (t == DType::bf16) {
    __builtin_memcpy(dst, static_cast<const uint16_t*>(src) + offset,
                     static_cast<size_t>(n) * sizeof(uint16_t));
    return;
  }
  const float* p = static_cast<const float*>(src) + offset;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) store_bf16(dst + i, load(p + i));
  for (; i < n; ++i) dst[i] = bf16_from_float(p[i]);
}

// Row m of M as pairs; x is padded with zeros up to whole chunks.
inline void shuffle_row(uint32_t* dst, const uint16_t* x, int64_t m, int64_t M, int64_t K) {
  dst += m * kLanes;
  for (int64_t chunk = 0; chunk < K; chunk += kChunk, dst += M * kChunkPairs) {
    alignas(64) uint32_t pairs[kChunkPairs];
    for (int64_t k = 0; k < kChunk; k += 2 * kLanes)
      storei(pairs + k / 2, pairs_of_eight(loadi(x + chunk + k)));
    for (int s = 0; s < 4; ++s)
      for (int j = 0; j < kLanes; ++j) dst[s * M * kLanes + j] = pairs[4 * j + s];
  }
}

// gemv.inl's FloatProducts on pairs.
struct PairProducts {
  using Number = uint32_t;
  static constexpr int kSteps = 4, kGroup = 4;
  template <int M>
  static constexpr int kRows = M == 1   ? 8
                               : M == 2 ? 4
                               : M == 3 ? 3
                                        : 2;
  PairLut table;

  explicit PairProducts(const float* code) : table(make_pair_lut(code)) {}
  static vi decode(vi packed) { return packed; }
  static vi load_x(const uint32_t* x) { return loadi(x); }
  template <int S>
  vi weight(vi packed) const {
    return pair_of<S>(table, packed);
  }
  static vf add_product(vf sum, vi weight, vi x) { return dot2(sum, weight, x); }
};

// Calls f(Constant<S>{}) for the pairs S = 0..3 of a dword.
template <class F>
inline void for_pairs(const F& f) {
  f(Constant<0>{});
  f(Constant<1>{});
  f(Constant<2>{});
  f(Constant<3>{});
}

// Overload for 16-bit activations: linear_gemv on pairs.
inline void linear_gemv_pairs(const LinearArgs& a, const Expansion* many, const Parallel& pool) {
  const int64_t M = a.x.rows, K = a.x.cols;
  const int64_t padded = ceil_div(K, kChunk) * kChunk, size = padded / 2;
  uint32_t* x = static_cast<uint32_t*>(
      scratch(Buffer::shared, (M * (size + ScaledS::stride_of(a)) + size) * sizeof(uint32_t)));
  uint16_t* row = reinterpret_cast<uint16_t*>(x + M * size);
  for (int64_t k = K; k < padded; ++k) row[k] = 0;
  for (int64_t m = 0; m < M; ++m) {
    load_row16(row, a.x.data, a.x.dtype, m * a.x.stride, K);
    shuffle_row(x, row, m, M, K);
  }
  const ScaledS s(a, reinterpret_cast<float*>(x + (M + 1) * size));
  const PairProducts products(a.base.quantized->code);
  const GemvArgs<PairProducts> f{a, products, x, s.data, s.stride, many};
  for_gemv_rows(M, [&](auto rows) { gemv_forward<decltype(rows)::value>(f, pool); });
}
