// The linear operators: which product runs, in which order, over which tasks.

// -- adapter pieces -------------------------------------------------------------------------------

// S = dropout(x) Aᵀ, float32 [M, R].
inline void lora_shrink(const LinearArgs& a, const Parallel& pool) {
  const int64_t M = a.x.rows, K = a.x.cols, R = a.lora.A.rows;
  const MutMatrix out{a.s, DType::f32, M, R, R};
  const Operand<false> x{a.x, &a.lora.dropout};
  for_tiles(pool, M, R, [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    accumulate<true>(x, Dense{a.lora.A}, i0, rows, j0, columns, K, c);
    store_tile(out, i0, rows, j0, columns, c);
  });
}

// out[i, j] = scale * Σ_p a(i, p) source[p, j], p < depth.
template <class A, class Source>
void product(const A& a, const Source& source, int64_t depth, float scale, const MutMatrix& out,
             const Parallel& pool) {
  for_tiles(pool, out.rows, out.cols,
            [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
              accumulate<false>(a, source, i0, rows, j0, columns, depth, c);
              store_tile(out, i0, rows, j0, columns, c, scale);
            });
}

// -- forward --------------------------------------------------------------------------------------

template <class Source>
void linear_panels(const LinearArgs& a, const Source& weight, const Expansion* many,
                   const Parallel& pool) {
  const int64_t M = a.x.rows, K = a.x.cols, N = a.y.cols, R = a.lora.A.rows;
  const Operand<false> x{a.x}, s{Matrix{a.s, DType::f32, M, R, R}};
  const bool tiles = M >= kTilesFrom;
  const auto begin_with = [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    for (int64_t j = 0; a.lora.A.data && j < columns; j += kWidth) {
      float* panel = c + j * rows;
      accumulate<true>(s, Dense{a.lora.B}, i0, rows, j0 + j, min64(kWidth, columns - j), R, panel);
      for (int64_t k = 0; k < rows * kWidth; k += W)
        store(panel + k, mul(load(panel + k), set1(a.lora.scaling)));
    }
    if (tiles) accumulate_tiles<true>(x, weight, i0, rows, j0, columns, K, c);
  };
  const auto body = [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    if (!tiles) accumulate<true>(x, weight, i0, rows, j0, columns, K, c);
    if (a.bias.data) {
      float bias[kWidth];
      load_row(bias, a.bias.data, a.bias.dtype, j0, columns);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) c[i * kWidth + j] += bias[j];
    }
    store_tile(a.y, i0, rows, j0, columns, c);
  };
  for_tiles_of(many, pool, M, N, tiles ? tile_panels(M) : 1, begin_with, body);
}

// With the adapter of a, or those of `many`, or none.
inline void linear_with(const LinearArgs& a, const Expansion* many, const Parallel& pool) {
  if (a.x.rows == 0) return;
  if (a.lora.A.data) lora_shrink(a, pool);
#ifdef LK_INT8
  if (a.int8) return linear_int8(a, many, pool);
#endif
  if (is_few(a.base, a.x.rows)) return linear_few(a, many, pool);
  if (a.base.quantized) return linear_panels(a, Quantized(*a.base.quantized), many, pool);
  linear_panels(a, Dense{*a.base.dense}, many, pool);
}

void linear(const LinearArgs& a, const Parallel& pool) { linear_with(a, nullptr, pool); }

// -- backward -------------------------------------------------------------------------------------

template <class Source>
void dx_panels(const BackwardArgs& a, const Source& weight, const Expansion* many,
               const Parallel& pool) {
  const int64_t M = a.dy.rows, N = a.dy.cols, K = a.dx.cols, R = a.lora.A.rows;
  const Operand<false> dy{a.dy}, ds{Matrix{a.ds, DType::f32, M, R, R}};
  const bool tiles = M >= kTilesFrom;
  const auto begin_with = [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    for (int64_t j = 0; a.lora.A.data && j < columns; j += kWidth) {
      const int64_t n = min64(kWidth, columns - j);
      float* panel = c + j * rows;
      accumulate<false>(ds, Dense{a.lora.A}, i0, rows, j0 + j, n, R, panel);
      for (int64_t i = 0; i < rows; ++i)
        apply_dropout(a.lora.dropout, i0 + i, j0 + j, n, panel + i * kWidth);
    }
    if (tiles) accumulate_tiles<false>(dy, weight, i0, rows, j0, columns, N, c);
  };
  const auto body = [&](int64_t i0, int64_t rows, int64_t j0, int64_t columns, float* c) {
    if (!tiles) accumulate<false>(dy, weight, i0, rows, j0, columns, N, c);
    store_tile(a.dx, i0, rows, j0, columns, c);
  };
  for_tiles_of(many, pool, M, K, tiles ? tile_panels(M) : 1, begin_with, body);
}

// dbias[n] = Σ_m dy[m, n], float32 sums in the order of m.
inline void bias_gradient(const BackwardArgs& a, const Parallel& pool) {
  const int64_t M = a.dy.rows, N = a.dy.cols;
  parallel(pool, ceil_div(N, kWidth), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n0 = t * kWidth, columns = min64(kWidth, N - n0);
      float sum[kWidth] = {}, row[kWidth];
      for (int64_t m = 0; m < M; ++m) {
        load_row(row, a.dy.data, a.dy.dtype, m * a.dy.stride + n0, columns);
        for (int64_t j = 0; j < columns; ++j) sum[j] += row[j];
      }
      store_row(a.dbias.data, a.dbias.dtype, n0, sum, columns);
    }
  });
}

inline void linear_backward_with(const BackwardArgs& a, const Expansion* many,
                                 const Parallel& pool) {
  const int64_t M = a.dy.rows, N = a.dy.cols, R = a.lora.A.rows;
  if (a.lora.A.data && (a.dx.data || a.dA.data)) {
    const MutMatrix ds{a.ds, DType::f32, M, R, R};
    product(Operand<false>{a.dy}, Dense{a.lora.B}, N, a.lora.scaling, ds, pool);
  }
  if (a.dx.data && M > 0) {
    if (is_few(a.base, M))
      dx_few(a, many, pool);
    else if (a.base.quantized)
      dx_panels(a, Quantized(*a.base.quantized), many, pool);
    else
      dx_panels(a, Dense{*a.base.dense}, many, pool);
  }
  if (a.dA.data)
    product(Operand<true>{Matrix{a.ds, DType::f32, M, R, R}}, Dropped{a.x, a.lora.dropout}, M, 1.0f,
            a.dA, pool);
  if (a.dB.data)
    product(Operand<true>{a.dy}, Dense{Matrix{a.s, DType::f32, M, R, R}}, M, a.lora.scaling, a.dB,
            pool);
  if (a.dbias.data) bias_gradient(a, pool);
}

void linear_backward(const BackwardArgs& a, const Parallel& pool) {
  linear_backward_with(a, nullptr, pool);
}
