// The operators with many adapters in one batch: the products of sgmv.inl, and linear.inl for the
// base.

void multi(const MultiArgs& a, const Parallel& pool) {
  const int64_t M = a.x.rows;
  if (M == 0) return;
  for (int64_t i = 0; i < M * a.s_stride; ++i) a.s[i] = 0.0f;
  shrink(a.plan, a.pages, a.x, true, a.pages.A, false, a.s, a.s_stride, pool,
         [](int64_t) { return true; });
  const Matrix s{a.s, DType::f32, M, a.plan.max_rank, a.s_stride};
  const Expansion delta{a.plan, a.pages, s, a.pages.B, false};
  if (a.base) {
    LinearArgs base;
    base.x = a.x;
    base.base.quantized = a.base;
    base.bias = a.bias;
    base.y = a.y;
    base.arithmetic = a.arithmetic;
    return linear(base, &delta, pool);
  }
  delta.all(pool, [&](const Segment& of, int64_t m, int64_t j0, int64_t columns, const float* c) {
    add_to_row(a.y.data, a.y.dtype, m * a.y.stride + j0, of.scaling, c, columns);
  });
}

// -- gradients ------------------------------------------------------------------------------------

// How many rows the slot has whose first tile is t; 0 where t is not the first, or padding.
inline int64_t rows_of_slot(const BatchPlan& plan, int64_t t) {
  const int32_t slot = plan.tiles[t].slot;
  int64_t rows = plan.tiles[t].rows;
  if (rows == 0 || (t > 0 && plan.tiles[t - 1].slot == slot)) return 0;
  while (++t < plan.tile_count && plan.tiles[t].slot == slot) rows += plan.tiles[t].rows;
  return rows;
}

// G[r, j] = scale Σ_i C[i, r] act[i, j] over the rows of one slot, columns [j0, j0 + kStripWidth).
inline void gradient_strip(const Segment& of, const Matrix& C, const Matrix& act,
                           const Dropout& dropout, float scale, int64_t j0, float* G) {
  const int64_t columns = min64(kStripWidth, act.cols - j0);
  float* c =
      static_cast<float*>(scratch(Buffer::accumulator, of.rank * kStripWidth * sizeof(float)));
  for (int64_t k = 0; k < of.rank * kStripWidth; k += kLanes) store(c + k, zero());
  accumulate<false>(Operand<true>{C, nullptr, of.rows}, Dropped{act, dropout, of.rows}, 0, of.rank,
                    j0, columns, of.count, c);
  store_strip({G, DType::f32, of.rank, act.cols, act.cols}, 0, of.rank, j0, columns, c, scale);
}

// Computes dA and dB of slots that want them and have rows; the rest is zero.
inline void multi_gradients(const MultiBackwardArgs& a, const Parallel& pool) {
  const int64_t M = a.dy.rows, N = a.dy.cols, K = a.x.cols;
  const Matrix s{a.s, DType::f32, M, a.plan.max_rank, a.s_stride},
      ds{a.ds, DType::f32, M, a.plan.max_rank, a.s_stride};
  const int64_t strips_A = ceil_div(K, kStripWidth), strips_B = ceil_div(N, kStripWidth);
  const auto load_of = [&](int64_t t) -> Load {
    const int64_t rows = rows_of_slot(a.plan, t);
    const int64_t slot = rows > 0 ? a.plan.tiles[t].slot : 0;
    if (rows == 0 || a.grad_rows[slot] < 0 || a.pages.ranks[slot] == 0) return {0, 0};
    return {strips_A + strips_B, rows * (kStreamCost + a.pages.ranks[slot])};
  };
  uint8_t* owned = static_cast<uint8_t*>(scratch(Buffer::shared, static_cast<size_t>(a.grad_rank)));
  for (int64_t r = 0; r < a.grad_rank; ++r) owned[r] = 0;
  for (int64_t t = 0; t < a.plan.tile_count; ++t)
    if (load_of(t).units > 0) {
      const int64_t slot = a.plan.tiles[t].slot;
      for (int64_t r = 0; r < a.pages.ranks[slot]; ++r) owned[a.grad_rows[slot] + r] = 1;
    }
  parallel(pool, a.grad_rank, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      if (owned[r]) continue;
      for (int64_t k = 0; k < K; ++k) a.dA[r * K + k] = 0.0f;
      for (int64_t n = 0; n < N; ++n) a.dB[r * N + n] = 0.0f;
    }
  });
  for_units(a.plan, pool, load_of, [&](int64_t t, int64_t begin, int64_t end) {
    Segment of(a.plan, a.pages, t);
    of.count = rows_of_slot(a.plan, t);
    const int64_t first = a.grad_rows[of.slot];
    for (int64_t u = begin; u < end; ++u) {
      if (u < strips_A)
        gradient_strip(of, ds, a.x, of.dropout, 1.0f, u * kStripWidth, a.dA + first * K);
      else
        gradient_strip(of, s, a.dy, {}, of.scaling, (u - strips_A) * kStripWidth, a.dB + first * N);
    }
  });
}

void multi_backward(const MultiBackwardArgs& a, const Parallel& pool) {
  const int64_t M = a.dy.rows;
  shrink(a.plan, a.pages, a.dy, false, a.pages.B, true, a.ds, a.s_stride, pool,
         [&](int64_t slot) { return a.dx.data || a.grad_rows[slot] >= 0; });
  const Matrix ds{a.ds, DType::f32, M, a.plan.max_rank, a.s_stride};
  const Expansion expansion{a.plan, a.pages, ds, a.pages.A, true};
  if (a.base && (a.dx.data || a.dbias.data)) {
    BackwardArgs base;
    base.dy = a.dy;
    base.base.quantized = a.base;
    base.dx = a.dx;
    base.dbias = a.dbias;
    base.arithmetic = a.arithmetic;
    linear_backward(base, &expansion, pool);
  } else if (a.dx.data) {
    const float zeros[kStripWidth] = {};
    for (int64_t m = 0; m < M; ++m)
      for (int64_t k = 0; k < a.dx.cols && !expansion.has_adapter(m); k += kStripWidth)
        store_row(a.dx.data, a.dx.dtype, m * a.dx.stride + k, zeros,
                  min64(kStripWidth, a.dx.cols - k));
    expansion.all(pool, [&](const Segment& of, int64_t m, int64_t j0, int64_t columns, float* c) {
      apply_dropout(of.dropout, m, j0, columns, c);
      store_row(a.dx.data, a.dx.dtype, m * a.dx.stride + j0, c, columns);
    });
  }
  if (a.grad_rank > 0) multi_gradients(a, pool);
}
