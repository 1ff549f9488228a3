#include "cuda/kernels/grouped.cuh"

#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

GroupedOperand rows(const Matrix& m, bool transposed = false) {
  GroupedOperand o;
  o.of.m = m;
  o.of.transposed = transposed;
  return o;
}

// Of each expert `size` rows of m.
GroupedOperand stacked(const Matrix& m, int64_t size, bool transposed) {
  GroupedOperand o = rows(m, transposed);
  o.size = size;
  return o;
}

GroupedOperand weights(const Experts& x, bool transposed) {
  GroupedOperand o;
  o.of.w = x.base;
  o.of.transposed = transposed;
  o.size = x.base.N / x.count;
  return o;
}

GroupedProducts products(const Experts& x, int64_t M, const MutMatrix& out) {
  GroupedProducts p;
  p.offsets = x.offsets;
  p.experts = x.count;
  p.rows = M;
  p.out = out;
  return p;
}

cudaError_t run(const char* name, const GroupedProducts& p, const Launch& on) {
  const int64_t most = p.out_size ? p.experts * ceil_div(p.out_size, kSimtTile)
                                  : ceil_div(p.rows, kSimtTile) + p.experts + 1;
  const int64_t tiles = (p.rows || p.out_size ? most : 0) * ceil_div(p.out.cols, kSimtTile);
  if (tiles == 0) return cudaSuccess;
  const Shape shape{dim3(static_cast<unsigned>(tiles)), dim3(kSimtThreads), kSimtShared};
  if (tiles > INT32_MAX)
    return failed(cudaErrorInvalidConfiguration, name, shape, on.device, "more than 2^31 tiles");
  return launch(name, on, shape, grouped_product, p);
}

}  // namespace

int grouped(const GroupedArgs& a, const Launch& on) {
  const Experts& x = a.experts;
  const int64_t M = a.x.rows, N = a.y.cols, K = a.x.cols, R = a.rank;
  const Matrix s{a.s, DType::f32, M, R, R};
  if (R > 0) {
    GroupedProducts p = products(x, M, {a.s, DType::f32, M, R, R});
    p.second = {rows(a.x), stacked(a.A, R, true), K};
    LK_TRY(run("grouped_product (S)", p, on));
  }
  GroupedProducts p = products(x, M, a.y);
  if (a.A.data) p.first = {rows(s), stacked(a.B, N, true), R};
  p.scale = a.scaling;
  p.second = {rows(a.x), weights(x, !x.transposed), K};
  p.bias = a.bias;
  return run("grouped_product (y)", p, on);
}

int grouped_backward(const GroupedBackwardArgs& a, const Launch& on) {
  const Experts& x = a.experts;
  const int64_t M = a.dy.rows, N = a.dy.cols, R = a.rank;
  const Matrix ds{a.ds, DType::f32, M, R, R}, s{a.s, DType::f32, M, R, R};
  if (a.dx.data || a.dA.data) {
    GroupedProducts p = products(x, M, {a.ds, DType::f32, M, R, R});
    p.first = {rows(a.dy), stacked(a.B, N, false), N};
    p.scale = a.scaling;
    LK_TRY(run("grouped_product (dS)", p, on));
  }
  if (a.dx.data) {
    GroupedProducts p = products(x, M, a.dx);
    p.first = {rows(ds), stacked(a.A, R, false), R};
    p.second = {rows(a.dy), weights(x, x.transposed), N};
    LK_TRY(run("grouped_product (dx)", p, on));
  }
  if (a.dA.data) {
    GroupedProducts p = products(x, M, a.dA);
    p.out_size = R;
    p.second = {rows(ds, true), rows(a.x), 0};
    LK_TRY(run("grouped_product (dA)", p, on));
  }
  if (!a.dB.data) return cudaSuccess;
  GroupedProducts p = products(x, M, a.dB);
  p.out_size = N;
  p.first = {rows(a.dy, true), rows(s), 0};
  p.scale = a.scaling;
  return run("grouped_product (dB)", p, on);
}

}  // namespace lk::cuda
