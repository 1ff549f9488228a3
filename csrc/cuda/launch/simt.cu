#include "cuda/kernels/simt.cuh"

#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

Operand dense(const Matrix& m, bool transposed = false) {
  Operand o;
  o.m = m;
  o.transposed = transposed;
  return o;
}

Operand dropped(const Matrix& m, const Dropout& dropout, bool transposed = false) {
  Operand o = dense(m, transposed);
  o.dropout = dropout;
  return o;
}

// The product with the base, of which there may be none.
Product with_base(const Matrix& a, const Base& base, int64_t depth, bool transposed) {
  if (!base.quantized && !base.dense) return {};
  Product p{dense(a), {}, depth};
  if (base.quantized)
    p.b.w = *base.quantized;
  else
    p.b.m = *base.dense;
  p.b.transposed = transposed;
  return p;
}

cudaError_t run(const char* name, const SimtArgs& args, const Launch& on) {
  const int64_t tiles = ceil_div(args.out.rows, kSimtTile) * ceil_div(args.out.cols, kSimtTile);
  if (tiles == 0) return cudaSuccess;
  const Shape shape{dim3(static_cast<unsigned>(tiles)), dim3(kSimtThreads), kSimtShared};
  if (tiles > INT32_MAX)
    return failed(cudaErrorInvalidConfiguration, name, shape, on.device, "more than 2^31 tiles");
  return launch(name, on, shape, simt_product, args);
}

}  // namespace

cudaError_t simt_shrink(const LinearArgs& a, const Launch& on) {
  const int64_t M = a.x.rows, R = a.lora.A.rows;
  SimtArgs args;
  args.second = {dropped(a.x, a.lora.dropout), dense(a.lora.A, true), a.x.cols};
  args.out = {a.s, DType::f32, M, R, R};
  return run("simt_product (S)", args, on);
}

cudaError_t simt_linear(const LinearArgs& a, const EpilogueOperand& addend, const Launch& on) {
  const int64_t M = a.x.rows, R = a.lora.A.rows;
  SimtArgs args;
  if (a.lora.A.data) {
    args.first = {dense({a.s, DType::f32, M, R, R}), dense(a.lora.B, true), R};
    args.scale = a.lora.scaling;
  }
  args.second = with_base(a.x, a.base, a.x.cols, true);
  args.addend = addend;
  args.bias = a.bias;
  args.out = a.y;
  return run("simt_product (y)", args, on);
}

cudaError_t simt_ds(const BackwardArgs& a, const Launch& on) {
  const int64_t M = a.dy.rows, R = a.lora.A.rows;
  SimtArgs args;
  args.first = {dense(a.dy), dense(a.lora.B), a.dy.cols};
  args.scale = a.lora.scaling;
  args.out = {a.ds, DType::f32, M, R, R};
  return run("simt_product (dS)", args, on);
}

cudaError_t simt_dx(const BackwardArgs& a, const EpilogueOperand& addend, const Launch& on) {
  const int64_t M = a.dy.rows, R = a.lora.A.rows;
  SimtArgs args;
  if (a.lora.A.data) args.first = {dense({a.ds, DType::f32, M, R, R}), dense(a.lora.A), R};
  args.mask = a.lora.dropout;
  args.second = with_base(a.dy, a.base, a.dy.cols, false);
  args.addend = addend;
  args.out = a.dx;
  return run("simt_product (dx)", args, on);
}

cudaError_t simt_adapter_gradients(const BackwardArgs& a, const Launch& on) {
  const int64_t M = a.dy.rows, R = a.lora.A.rows;
  const Matrix ds{a.ds, DType::f32, M, R, R}, s{a.s, DType::f32, M, R, R};
  if (a.dA.data) {
    SimtArgs args;
    args.second = {dense(ds, true), dropped(a.x, a.lora.dropout), M};
    args.out = a.dA;
    LK_TRY(run("simt_product (dA)", args, on));
  }
  if (!a.dB.data) return cudaSuccess;
  SimtArgs args;
  args.first = {dense(a.dy, true), dense(s), M};
  args.scale = a.lora.scaling;
  args.out = a.dB;
  return run("simt_product (dB)", args, on);
}

cudaError_t bias_gradient(const BackwardArgs& a, const Launch& on) {
  if (a.dy.cols == 0) return cudaSuccess;
  const Shape shape{dim3(static_cast<unsigned>(ceil_div(a.dy.cols, 128))), dim3(128)};
  return launch("column_sums", on, shape, column_sums, a.dy, a.dbias);
}

}  // namespace lk::cuda
