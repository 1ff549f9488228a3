// Many adapters in one batch. (First version: row by row, one thread.)

struct RowAdapter {
  const Pages& pages;
  const int32_t* ids = nullptr;
  int64_t slot = 0, rank = 0;
  Dropout dropout;

  RowAdapter(const BatchPlan& plan, const Pages& p, int64_t m) : pages(p) {
    const int32_t t = plan.tile_of_row[m];
    if (t < 0) return;
    slot = plan.tiles[t].slot;
    ids = plan.page_ids + plan.tiles[t].page0;
    rank = p.ranks[slot];
    if (!p.seed || p.dropout_p[slot] == 0.0) return;
    dropout = {static_cast<uint32_t>(p.dropout_p[slot] * 4294967296.0),
               static_cast<float>(1.0 / (1.0 - p.dropout_p[slot])), p.seed};
  }
  int64_t row(int64_t r) const {
    return ids[r / pages.page_rank] * pages.page_rank + r % pages.page_rank;
  }
};

// to[r] = scale Σ_c act[c] P[r, c]
inline void skinny(const RowAdapter& u, const Matrix& P, const float* act, float scale, float* to,
                   float* row) {
  for (int64_t r = 0; r < u.rank; ++r) {
    load_row(row, P.data, P.dtype, u.row(r) * P.stride, P.cols);
    float sum[W] = {}, total = 0.0f;
    for (int64_t c = 0; c < P.cols; ++c) sum[c % W] += act[c] * row[c];
    for (int l = 0; l < W; ++l) total += sum[l];
    to[r] = total * scale;
  }
}

// to[c] += Σ_r coefficient[r] P[r, c]
inline void widen(const RowAdapter& u, const Matrix& P, const float* coefficient, float* to,
                  float* row) {
  for (int64_t r = 0; r < u.rank; ++r) {
    load_row(row, P.data, P.dtype, u.row(r) * P.stride, P.cols);
    for (int64_t c = 0; c < P.cols; ++c) to[c] += coefficient[r] * row[c];
  }
}

void multi(const MultiArgs& a, const Parallel& pool) {
  const int64_t M = a.x.rows, N = a.y.cols, K = a.x.cols;
  if (a.base) {
    LinearArgs linear_args;
    linear_args.x = a.x;
    linear_args.base.quantized = a.base;
    linear_args.bias = a.bias;
    linear_args.y = a.y;
    linear(linear_args, pool);
  }
  const int64_t width = K > N ? K : N;
  float* x = static_cast<float*>(scratch(Slot::shared, 3 * width * sizeof(float)));
  float *row = x + width, *delta = row + width;
  for (int64_t m = 0; m < M; ++m) {
    const RowAdapter u(a.plan, a.pages, m);
    float* s = a.s + m * a.s_stride;
    for (int64_t r = 0; r < a.s_stride; ++r) s[r] = 0.0f;
    if (u.rank == 0) continue;
    load_row(x, a.x.data, a.x.dtype, m * a.x.stride, K);
    apply_dropout(u.dropout, m, 0, K, x);
    skinny(u, a.pages.A, x, 1.0f, s, row);
    for (int64_t n = 0; n < N; ++n) delta[n] = 0.0f;
    widen(u, a.pages.B, s, delta, row);
    load_row(row, a.y.data, a.y.dtype, m * a.y.stride, N);
    for (int64_t n = 0; n < N; ++n) row[n] += a.pages.scalings[u.slot] * delta[n];
    store_row(a.y.data, a.y.dtype, m * a.y.stride, row, N);
  }
}

void multi_backward(const MultiBackwardArgs& a, const Parallel& pool) {
  const int64_t M = a.dy.rows, N = a.dy.cols, K = a.x.cols;
  if (a.base && a.dx.data && M > 0) {
    BackwardArgs b;
    b.dy = a.dy;
    b.base.quantized = a.base;
    b.dx = a.dx;
    linear_backward(b, pool);
  }
  if (a.dbias.data) {
    BackwardArgs b;
    b.dy = a.dy;
    b.dbias = a.dbias;
    bias_gradient(b, pool);
  }
  const int64_t width = K > N ? K : N;
  float* x = static_cast<float*>(scratch(Slot::shared, 4 * width * sizeof(float)));
  float *row = x + width, *dx = row + width, *dy = dx + width;
  for (int64_t i = 0; i < a.grad_rank * K; ++i) a.dA[i] = 0.0f;
  for (int64_t i = 0; i < a.grad_rank * N; ++i) a.dB[i] = 0.0f;
  for (int64_t m = 0; m < M; ++m) {
    const RowAdapter u(a.plan, a.pages, m);
    float* ds = a.ds + m * a.s_stride;
    load_row(dy, a.dy.data, a.dy.dtype, m * a.dy.stride, N);
    skinny(u, a.pages.B, dy, u.rank ? a.pages.scalings[u.slot] : 0.0f, ds, row);
    if (a.dx.data) {
      for (int64_t k = 0; k < K; ++k) dx[k] = 0.0f;
      widen(u, a.pages.A, ds, dx, row);
      apply_dropout(u.dropout, m, 0, K, dx);
      if (a.base) {
        load_row(row, a.dx.data, a.dx.dtype, m * a.dx.stride, K);
        for (int64_t k = 0; k < K; ++k) dx[k] += row[k];
      }
      store_row(a.dx.data, a.dx.dtype, m * a.dx.stride, dx, K);
    }
    if (u.rank == 0 || a.grad_rank == 0 || a.grad_rows[u.slot] < 0) continue;
    load_row(x, a.x.data, a.x.dtype, m * a.x.stride, K);
    apply_dropout(u.dropout, m, 0, K, x);
    for (int64_t r = 0; r < u.rank; ++r) {
      const int64_t to = a.grad_rows[u.slot] + r;
      for (int64_t k = 0; k < K; ++k) a.dA[to * K + k] += ds[r] * x[k];
      const float s = a.s[m * a.s_stride + r] * a.pages.scalings[u.slot];
      for (int64_t n = 0; n < N; ++n) a.dB[to * N + n] += s * dy[n];
    }
  }
}
