// The self-test of stacked experts.
#pragma once

#include <vector>

#include "cpu/selftest_problem.h"

namespace lk {
namespace {

// Rows of x cut into those of four experts: the second has none, the last has most of them, and
// some belong to no expert.
struct Cut {
  static constexpr int64_t kCount = 4;
  int32_t offsets[kCount];

  explicit Cut(int64_t M) {
    const int32_t rows = static_cast<int32_t>(M);
    offsets[0] = offsets[1] = (rows + 1) / 4;
    offsets[2] = offsets[1] + rows / 8;
    offsets[3] = rows - rows / 7;
  }
  int64_t begin(int64_t e) const { return e ? offsets[e - 1] : 0; }
  // -1: none.
  int64_t of_row(int64_t m) const {
    for (int64_t e = 0; e < kCount; ++e)
      if (m < offsets[e]) return e;
    return -1;
  }
};

// The operands and results of both directions. `size` rows of the stack are an expert's, [N, K], or
// where it is transposed [K, N].
struct Grouped {
  const Case c;
  const bool transposed;
  const int64_t E = Cut::kCount, M, N, K, R;
  const Cut cut;
  Problem p;
  Values x, dy, A, B, At, Bt, bias, y, s, scaled, ds, dx, dA, dB;

  static Case stack_of(Case c) {
    c.N *= Cut::kCount;
    return c;
  }
  Grouped(const Case& problem, bool is_transposed)
      : c(problem),
        transposed(is_transposed),
        M(c.M),
        N(transposed ? c.K : c.N),
        K(transposed ? c.N : c.K),
        R(c.R),
        cut(M),
        p(stack_of(c)),
        x(p.normal(c.x, M * K)),
        dy(p.normal(c.x, M * N)),
        A(p.normal(c.adapter, E * R * K)),
        B(p.normal(c.adapter, E * N * R)),
        At(c.adapter, E * R * K),
        Bt(c.adapter, E * N * R),
        bias(p.normal(DType::f32, E * N)),
        y(c.x, M * N),
        s(DType::f32, M * R),
        scaled(DType::f32, M * R),
        ds(DType::f32, M * R),
        dx(c.x, M * K),
        dA(c.adapter, E * R * K),
        dB(c.adapter, E * N * R) {
    flip(A, At, R, K);
    flip(B, Bt, N, R);
  }

  // Each expert's rows x cols of `from`, transposed.
  void flip(const Values& from, Values& to, int64_t rows, int64_t cols) const {
    for (int64_t e = 0; e < E; ++e)
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < cols; ++j)
          to.set((e * cols + j) * rows + i,
                 static_cast<float>(from.get((e * rows + i) * cols + j)));
  }
  double weight(int64_t e, int64_t n, int64_t k) const {
    return transposed ? p.weight(e * K + k, n) : p.weight(e * N + n, k);
  }

  Experts experts() const { return {p.w, E, cut.offsets, transposed}; }
  void forward() {
    GroupedArgs a;
    a.x = {x.data(), c.x, M, K, K};
    a.experts = experts();
    a.A = {A.data(), c.adapter, E * R, K, K};
    a.B = {B.data(), c.adapter, E * N, R, R};
    if (transposed) a.Bt = {Bt.data(), c.adapter, E * R, N, N};
    a.rank = R;
    a.scaling = 0.5f;
    a.bias = {bias.data(), DType::f32};
    a.y = {y.data(), c.x, M, N, N};
    a.s = s.f32.data();
    a.ds = scaled.f32.data();
    a.arithmetic = c.arithmetic;
    lk_kernels()->grouped(a, kPool);
  }
  void backward() {
    GroupedBackwardArgs a;
    a.dy = {dy.data(), c.x, M, N, N};
    a.x = {x.data(), c.x, M, K, K};
    a.experts = experts();
    a.A = {A.data(), c.adapter, E * R, K, K};
    if (transposed) a.At = {At.data(), c.adapter, E * K, R, R};
    a.B = {B.data(), c.adapter, E * N, R, R};
    a.rank = R;
    a.scaling = 0.5f;
    a.s = s.f32.data();
    a.ds = ds.f32.data();
    a.dx = {dx.data(), c.x, M, K, K};
    a.dA = {dA.data(), c.adapter, E * R, K, K};
    a.dB = {dB.data(), c.adapter, E * N, R, R};
    a.arithmetic = c.arithmetic;
    lk_kernels()->grouped_backward(a, kPool);
  }
};

void check_grouped(const Case& c, bool transposed) {
  Grouped g(c, transposed);
  const int64_t N = g.N, K = g.K, R = g.R;
  g.forward();
  g.backward();
  expect_all(c, "grouped s", g.s, g.M, R, [&](Sum& sum, int64_t m, int64_t r) {
    const int64_t e = g.cut.of_row(m);
    for (int64_t k = 0; e >= 0 && k < K; ++k)
      sum.add(g.x.get(m * K + k) * g.A.get((e * R + r) * K + k));
  });
  expect_all(c, "grouped y", g.y, g.M, N, [&](Sum& sum, int64_t m, int64_t n) {
    const int64_t e = g.cut.of_row(m);
    if (e < 0) return;
    sum.add(g.bias.get(e * N + n));
    for (int64_t k = 0; k < K; ++k) sum.add_base(g.x.get(m * K + k) * g.weight(e, n, k));
    for (int64_t r = 0; r < R; ++r)
      sum.add(0.5 * g.s.get(m * R + r) * g.B.get((e * N + n) * R + r));
  });
  const int64_t owned = g.cut.offsets[Cut::kCount - 1];
  expect_all(c, "grouped ds", g.ds, owned, R, [&](Sum& sum, int64_t m, int64_t r) {
    const int64_t e = g.cut.of_row(m);
    for (int64_t n = 0; n < N; ++n)
      sum.add(0.5 * g.dy.get(m * N + n) * g.B.get((e * N + n) * R + r));
  });
  expect_all(c, "grouped dx", g.dx, g.M, K, [&](Sum& sum, int64_t m, int64_t k) {
    const int64_t e = g.cut.of_row(m);
    for (int64_t n = 0; e >= 0 && n < N; ++n) sum.add_base(g.dy.get(m * N + n) * g.weight(e, n, k));
    for (int64_t r = 0; e >= 0 && r < R; ++r)
      sum.add(g.ds.get(m * R + r) * g.A.get((e * R + r) * K + k));
  });
  expect_all(c, "grouped dA", g.dA, g.E * R, K, [&](Sum& sum, int64_t row, int64_t k) {
    const int64_t e = row / R;
    for (int64_t m = g.cut.begin(e); m < g.cut.offsets[e]; ++m)
      sum.add(g.ds.get(m * R + row % R) * g.x.get(m * K + k));
  });
  expect_all(c, "grouped dB", g.dB, g.E * N, R, [&](Sum& sum, int64_t row, int64_t r) {
    const int64_t e = row / N;
    for (int64_t m = g.cut.begin(e); m < g.cut.offsets[e]; ++m)
      sum.add(0.5 * g.dy.get(m * N + row % N) * g.s.get(m * R + r));
  });
}

}  // namespace
}  // namespace lk
