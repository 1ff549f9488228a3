// The linear operators: which kernel multiplies by the base, in which order, over which tasks.

// -- choice ---------------------------------------------------------------------------------------

#ifdef LK_DOT2
constexpr bool kHasPairs = true;
constexpr Crossovers kForwardPairs{kMaxGemv, kMaxSkinnyPairs, kAmxForwardPairs},
    kDxPairs{kMaxGemv, 0, kAmxDxPairs};
#else
constexpr bool kHasPairs = false;
constexpr Crossovers kForwardPairs{0, 0, INT64_MAX}, kDxPairs = kForwardPairs;
#endif
constexpr Crossovers kForward{kMaxGemv, kMaxSkinny, kAmxForward}, kDx{kMaxGemv, 0, kAmxDx};

// Whether the base is a 4-bit weight whose blocks fit its rows: then a vector of packed bytes has
// scales of its own.
inline bool has_whole_blocks(const Base& base) {
  return base.quantized && blocks_fit_rows(*base.quantized) && base.quantized->K > 0;
}

inline Kernel kernel_for(const Crossovers& at, const Base& base, int64_t M) {
  const Kernel asked = asked_kernel();
  const bool any = asked == Kernel::any, whole = has_whole_blocks(base);
  if (whole && M <= at.gemv && (any || asked == Kernel::gemv)) return Kernel::gemv;
  if (kHasAmx && ((any && M >= at.amx) || asked == Kernel::amx)) return Kernel::amx;
  if (whole && M <= at.skinny && (any || asked == Kernel::skinny || asked == Kernel::invariant))
    return Kernel::skinny;
  return Kernel::gemm;
}

// -- adapter pieces -------------------------------------------------------------------------------

// S = dropout(x) Aᵀ, float32 [M, R].
inline void lora_shrink(const LinearArgs& a, const Parallel& pool) {
  const int64_t M = a.x.rows, K = a.x.cols, R = a.lora.A.rows;
  const MutMatrix out{a.s, DType::f32, M, R, R};
  const Operand<false> x{a.x, &a.lora.dropout};
  for_pieces(pool, M, R, [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    accumulate<true>(x, Dense{a.lora.A}, i0, rows, j0, columns, K, c);
    store_strips(out, i0, rows, j0, columns, c);
  });
}

// out[i, j] = scale * Σ_p a(i, p) source[p, j], p < depth.
template <class A, class Source>
void product(const A& a, const Source& source, int64_t depth, float scale, const MutMatrix& out,
             const Parallel& pool) {
  for_pieces(pool, out.rows, out.cols,
             [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
               accumulate<false>(a, source, i0, rows, j0, columns, depth, c);
               store_strips(out, i0, rows, j0, columns, c, scale);
             });
}

// -- forward --------------------------------------------------------------------------------------

// Computes y by pieces: base(i0, rows, j0, columns, c) adds x Wᵀ to one.
template <class Base>
void linear_pieces(const LinearArgs& a, const Expansion* many, const Parallel& pool,
                   const Base& base) {
  const auto body = [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    add_adapters(a, many, i0, rows, j0, columns, c);
    base(i0, rows, j0, columns, c);
    store_outputs(a, i0, rows, j0, columns, c);
  };
  for_pieces(pool, a.x.rows, a.y.cols, body);
}

// weight_of(j0, columns) is W, or at least these of its rows.
template <class WeightOf>
void linear_gemm(const LinearArgs& a, const Expansion* many, const Parallel& pool,
                 const WeightOf& weight_of) {
  const Operand<false> x{a.x};
  linear_pieces(a, many, pool,
                [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
                  accumulate<true>(x, weight_of(j0, columns), i0, rows, j0, columns, a.x.cols, c);
                });
}

template <class Source>
void linear_amx(const LinearArgs& a, const Expansion* many, const Parallel& pool,
                const Source& weight) {
  const Operand<false> x{a.x};
  linear_pieces(a, many, pool,
                [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
                  accumulate_amx<true>(x, weight, i0, rows, j0, columns, a.x.cols, c);
                });
}

// The product with a weight whose blocks fit its rows, by skinny.inl or by gemm.inl.
inline void linear_whole_blocks(const LinearArgs& a, const Expansion* many, const Parallel& pool,
                                bool skinny) {
  const int64_t M = a.x.rows, K = a.x.cols;
  const Chunks chunks(*a.base.quantized);
  const Lut lut = make_lut(a.base.quantized->code);
  const auto weight_of = [&](int64_t j0, int64_t columns) {
    return LaneRows(chunks, lut, j0, columns);
  };
  if (!skinny) return linear_gemm(a, many, pool, weight_of);
  float* x = static_cast<float*>(scratch(Buffer::shared, M * K * sizeof(float)));
  prepare(pool, ceil_div(K, kStage), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * kStage; k < min64(K, end * kStage); k += kStage)
      interleave(a.x, k, min64(kStage, K - k), x);
  });
  linear_pieces(a, many, pool, [&](int64_t, int64_t, int64_t j0, int64_t columns, float* c) {
    for_strips(M, columns, c, [&](int64_t j, int64_t width, float* strip) {
      accumulate_skinny(x, M, weight_of(j0 + j, width), strip);
    });
  });
}

#ifdef LK_DOT2
// The product with a weight whose blocks fit its rows, on pairs of bfloat16 numbers.
inline void linear_pairs(const LinearArgs& a, const Expansion* many, const Parallel& pool) {
  const Kernel kernel = kernel_for(kForwardPairs, a.base, a.x.rows);
  if (kernel == Kernel::gemv) return linear_gemv_pairs(a, many, pool);
  const int64_t M = a.x.rows, K = a.x.cols;
  const Chunks chunks(*a.base.quantized);
  const Lut lut = make_lut(a.base.quantized->code);
  const PairLut table = make_pair_lut(a.base.quantized->code);
  if (kernel != Kernel::skinny)
    return linear_pieces(a, many, pool,
                         [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
                           const LaneRows weight(chunks, lut, j0, columns);
                           const LanePairs pairs{weight, table};
                           if (kernel == Kernel::amx)
                             accumulate_pairs_amx(a.x, pairs, i0, rows, j0, columns, K, c);
                           else
                             accumulate_pairs(a.x, pairs, i0, rows, j0, columns, K, c);
                         });
  uint32_t* x = static_cast<uint32_t*>(
      scratch(Buffer::shared, static_cast<size_t>(M * K / 2) * sizeof(uint32_t)));
  prepare(pool, ceil_div(K, kStage), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * kStage; k < min64(K, end * kStage); k += kStage)
      interleave_pairs(a.x, k, min64(kStage, K - k), x);
  });
  linear_pieces(a, many, pool, [&](int64_t, int64_t, int64_t j0, int64_t columns, float* c) {
    for_strips(M, columns, c, [&](int64_t j, int64_t width, float* strip) {
      accumulate_skinny_pairs(x, M, LaneRows(chunks, lut, j0 + j, width), table, strip);
    });
  });
}
#endif

// y with the adapter of a, whose S is there, or those of `many`, or none.
inline void linear_outputs(const LinearArgs& a, const Expansion* many, const Parallel& pool) {
#ifdef LK_INT8
  if (a.arithmetic == Arithmetic::int8)
    return amx_int8_takes(a.x.rows) ? linear_int8_amx(a, many, pool) : linear_int8(a, many, pool);
#endif
#ifdef LK_DOT2
  if (a.arithmetic == Arithmetic::bf16 && has_whole_blocks(a.base))
    return linear_pairs(a, many, pool);
#endif
  const Kernel kernel = kernel_for(kForward, a.base, a.x.rows);
  if (kernel == Kernel::gemv) return linear_gemv(a, many, pool);
  if (a.base.dense) {
    const Dense weight{*a.base.dense};
    if (kernel == Kernel::amx) return linear_amx(a, many, pool, weight);
    return linear_gemm(a, many, pool, [&](int64_t, int64_t) { return weight; });
  }
  const Quantized weight(*a.base.quantized);
  if (kernel == Kernel::amx) return linear_amx(a, many, pool, weight);
  if (has_whole_blocks(a.base)) return linear_whole_blocks(a, many, pool, kernel == Kernel::skinny);
  linear_gemm(a, many, pool, [&](int64_t, int64_t) { return weight; });
}

inline void linear(const LinearArgs& a, const Expansion* many, const Parallel& pool) {
  if (a.x.rows == 0) return;
  if (a.lora.A.rows > 0) lora_shrink(a, pool);  // also where K is 0, for S is an output
  linear_outputs(a, many, pool);
}

// -- backward -------------------------------------------------------------------------------------

// Computes dx by pieces: base(i0, rows, j0, columns, c) adds dy W to one.
template <class Base>
void dx_pieces(const BackwardArgs& a, const Expansion* many, const Parallel& pool,
               const Base& base) {
  const int64_t M = a.dy.rows, K = a.dx.cols, R = a.lora.A.rows;
  const Operand<false> ds{Matrix{a.ds, DType::f32, M, R, R}};
  const auto body = [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    if (many) many->rows(i0, rows, j0, columns, false, c);
    if (a.lora.A.data) {
      accumulate<false>(ds, Dense{a.lora.A}, i0, rows, j0, columns, R, c);
      for_strips(rows, columns, c, [&](int64_t j, int64_t width, float* strip) {
        for (int64_t i = 0; i < rows; ++i)
          apply_dropout(a.lora.dropout, i0 + i, j0 + j, width, strip + i * kStripWidth);
      });
    }
    base(i0, rows, j0, columns, c);
    add_to_rows(a.added, rows, j0, columns, c);
    store_strips(a.dx, i0, rows, j0, columns, c);
  };
  for_pieces(pool, M, K, body);
}

// source_of(j0, columns) is W, or at least these of its columns.
template <class SourceOf>
void dx_gemm(const BackwardArgs& a, const Expansion* many, const Parallel& pool, Kernel kernel,
             const SourceOf& source_of) {
  const Operand<false> dy{a.dy};
  dx_pieces(a, many, pool, [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    const auto source = source_of(j0, columns);
    if (kernel == Kernel::amx)
      accumulate_amx<false>(dy, source, i0, rows, j0, columns, a.dy.cols, c);
    else
      accumulate<false>(dy, source, i0, rows, j0, columns, a.dy.cols, c);
  });
}

#ifdef LK_DOT2
// dx of a weight whose blocks fit its rows, on pairs of bfloat16 numbers. Few rows are multiplied
// exactly: gemv multiplies the gradient by scales, and rounding that product would be a second
// rounding.
inline void dx_pairs(const BackwardArgs& a, const Expansion* many, const Parallel& pool) {
  const Weight4& w = *a.base.quantized;
  const Kernel kernel = kernel_for(kDxPairs, a.base, a.dy.rows);
  if (kernel == Kernel::gemv) return dx_gemv(a, many, pool);
  const Lut lut = make_lut(w.code);
  dx_pieces(a, many, pool, [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    const ColumnStrip strip(w, lut, j0, columns);
    const StripPairs pairs{strip};
    if (kernel == Kernel::amx)
      accumulate_pairs_amx(a.dy, pairs, i0, rows, j0, columns, a.dy.cols, c);
    else
      accumulate_pairs(a.dy, pairs, i0, rows, j0, columns, a.dy.cols, c);
  });
}
#endif

// Computes dx; dS is in a.ds already.
inline void dx(const BackwardArgs& a, const Expansion* many, const Parallel& pool) {
#ifdef LK_DOT2
  if (a.arithmetic == Arithmetic::bf16 && has_whole_blocks(a.base)) return dx_pairs(a, many, pool);
#endif
  const Kernel kernel = kernel_for(kDx, a.base, a.dy.rows);
  if (kernel == Kernel::gemv) return dx_gemv(a, many, pool);
  if (a.base.dense)
    return dx_gemm(a, many, pool, kernel, [&](int64_t, int64_t) { return Dense{*a.base.dense}; });
  const Quantized weight(*a.base.quantized);
  if (!has_whole_blocks(a.base))
    return dx_gemm(a, many, pool, kernel, [&](int64_t, int64_t) { return weight; });
  dx_gemm(a, many, pool, kernel, [&](int64_t j0, int64_t columns) {
    return ColumnStrip(weight.w, weight.lut, j0, columns);
  });
}

// dbias[n] = Σ_m dy[m, n], float32 sums in the order of m.
inline void bias_gradient(const BackwardArgs& a, const Parallel& pool) {
  const int64_t M = a.dy.rows, N = a.dy.cols;
  parallel(pool, ceil_div(N, kStripWidth), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n0 = t * kStripWidth, columns = min64(kStripWidth, N - n0);
      float sum[kStripWidth] = {}, row[kStripWidth];
      for (int64_t m = 0; m < M; ++m) {
        load_row(row, a.dy.data, a.dy.dtype, m * a.dy.stride + n0, columns);
        for (int64_t j = 0; j < columns; ++j) sum[j] += row[j];
      }
      store_row(a.dbias.data, a.dbias.dtype, n0, sum, columns);
    }
  });
}

// dS of the adapter of a, into a.ds.
inline void lora_ds(const BackwardArgs& a, const Parallel& pool) {
  const int64_t R = a.lora.A.rows;
  const MutMatrix ds{a.ds, DType::f32, a.dy.rows, R, R};
  product(Operand<false>{a.dy}, Dense{a.lora.B}, a.dy.cols, a.lora.scaling, ds, pool);
}

// dA and dB of the adapter of a, whose dS is there.
inline void lora_gradients(const BackwardArgs& a, const Parallel& pool) {
  const int64_t M = a.dy.rows, R = a.lora.A.rows;
  if (a.dA.data)
    product(Operand<true>{Matrix{a.ds, DType::f32, M, R, R}}, Dropped{a.x, a.lora.dropout}, M, 1.0f,
            a.dA, pool);
  if (a.dB.data)
    product(Operand<true>{a.dy}, Dense{Matrix{a.s, DType::f32, M, R, R}}, M, a.lora.scaling, a.dB,
            pool);
}

// The gradients with the adapter of a, or dx with those of `many`.
inline void linear_backward(const BackwardArgs& a, const Expansion* many, const Parallel& pool) {
  if (a.lora.A.data && (a.dx.data || a.dA.data)) lora_ds(a, pool);
  if (a.dx.data && a.dy.rows > 0) dx(a, many, pool);
  lora_gradients(a, pool);
  if (a.dbias.data) bias_gradient(a, pool);
}
