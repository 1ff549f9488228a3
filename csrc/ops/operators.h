// The operators, once for every backend; the order of arguments is that of schema.py.
//
// A Backend is made for each call from its first tensor, checks where that is, and runs the plain
// structs: quantize, double_quantize, dequantize, linear, linear_backward, multi, multi_backward,
// grouped, grouped_backward.
// The linear ones get the tensors behind the struct too (the dense weight may be null), for a
// backend that hands part of the work back to torch.
#pragma once

#include "ops/arguments.h"

namespace lk {

#define LK_WEIGHT_PARAMS                                                                         \
  Tensor packed, Tensor absmax, Tensor code, MaybeTensor nested_absmax, MaybeTensor nested_code, \
      MaybeTensor nested_offset, int64_t N, int64_t K, int64_t blocksize
#define LK_WEIGHT \
  in.weight4(packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize)

#define LK_PLAN_PARAMS                                                               \
  Tensor tiles, Tensor page_ids, Tensor tile_of_row, Tensor rows, int64_t tile_rows, \
      int64_t max_rank
#define LK_PAGES_PARAMS \
  Tensor A_pages, Tensor B_pages, Tensor ranks, Tensor scalings, Tensor dropout_p, MaybeTensor seed

template <class Backend>
struct Operators {
  static std::tuple<Tensor, Tensor> quantize_4bit(Tensor weight, Tensor code, int64_t blocksize) {
    const Backend backend(weight);
    const Unpack in(weight);
    weight = torch::stable::contiguous(weight);
    shift_of(blocksize);
    const int64_t numel = weight.numel();
    Tensor packed = empty(weight, {ceil_div(numel, 2), 1}, ScalarType::Byte);
    Tensor absmax = empty(weight, {ceil_div(numel, blocksize)}, ScalarType::Float);
    backend.quantize({weight.const_data_ptr(), dtype_of("weight", weight), numel, blocksize,
                      in.data<float>("code", code, ScalarType::Float, 16),
                      static_cast<uint8_t*>(packed.mutable_data_ptr()),
                      static_cast<float*>(absmax.mutable_data_ptr())});
    return {packed, absmax};
  }

  static std::tuple<Tensor, Tensor, Tensor> double_quantize(Tensor absmax, Tensor nested_code) {
    const Backend backend(absmax);
    const Unpack in(absmax);
    const int64_t blocks = absmax.numel();
    Tensor quantized = empty(absmax, {blocks}, ScalarType::Byte);
    Tensor nested_absmax = empty(absmax, {ceil_div(blocks, kNestedBlock)});
    Tensor offset = empty(absmax, {});
    backend.double_quantize({in.data<float>("absmax", absmax, ScalarType::Float, blocks), blocks,
                             in.data<float>("nested_code", nested_code, ScalarType::Float, 256),
                             static_cast<uint8_t*>(quantized.mutable_data_ptr()),
                             static_cast<float*>(nested_absmax.mutable_data_ptr()),
                             static_cast<float*>(offset.mutable_data_ptr())});
    return {quantized, nested_absmax, offset};
  }

  static Tensor dequantize_4bit(LK_WEIGHT_PARAMS, ScalarType dtype) {
    const Backend backend(packed);
    const Unpack in(packed);
    const Weight4 w = LK_WEIGHT;
    Tensor out = empty(code, {N, K}, dtype);
    backend.dequantize({w, dtype_of("dtype", out), out.mutable_data_ptr()});
    return out;
  }

  static Tensor linear_4bit(Tensor x, LK_WEIGHT_PARAMS, MaybeTensor bias) {
    const Backend backend(x);
    const Unpack in(x);
    const Weight4 w = LK_WEIGHT;
    return std::get<0>(forward(backend, in, x, {&w, nullptr}, nullptr, nullptr, N, K, bias));
  }

  static Tensor linear_4bit_dx(Tensor dy_in, LK_WEIGHT_PARAMS) {
    const Backend backend(dy_in);
    const Unpack in(dy_in);
    const Weight4 w = LK_WEIGHT;
    const Tensor dy = in.rows_of("dy", dy_in);
    const int64_t M = dy.size(0);
    Tensor dx = empty(dy, {M, K});
    BackwardArgs a;
    a.dy = in.matrix("dy", dy, M, N);
    a.base.quantized = &w;
    a.dx = output(dx, M, K);
    backend.linear_backward(a, dy, nullptr, dx);
    return dx;
  }

  static std::tuple<Tensor, Tensor> lora_linear_4bit(Tensor x, LK_WEIGHT_PARAMS, Tensor A, Tensor B,
                                                     double scaling, MaybeTensor bias,
                                                     double dropout_p, MaybeTensor seed) {
    const Backend backend(x);
    const Unpack in(x);
    const Weight4 w = LK_WEIGHT;
    const Adapter adapter(in, A, B, scaling, dropout_p, seed, N, K);
    return forward(backend, in, x, {&w, nullptr}, nullptr, &adapter, N, K, bias);
  }

  static std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight_in, Tensor A, Tensor B,
                                                double scaling, MaybeTensor bias, double dropout_p,
                                                MaybeTensor seed) {
    const Backend backend(x);
    const Unpack in(x);
    const Tensor weight = in.rows_of("weight", weight_in);
    const int64_t N = weight.size(0), K = weight.size(1);
    const Matrix dense = in.matrix("weight", weight, N, K);
    const Adapter adapter(in, A, B, scaling, dropout_p, seed, N, K);
    return forward(backend, in, x, {nullptr, &dense}, &weight, &adapter, N, K, bias);
  }

  using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Gradients lora_linear_4bit_backward(Tensor dy, Tensor x, Tensor s, LK_WEIGHT_PARAMS,
                                             Tensor A, Tensor B, double scaling, MaybeTensor bias,
                                             double dropout_p, MaybeTensor seed, bool need_dx,
                                             bool need_dA, bool need_dB, bool need_dbias) {
    const Backend backend(dy);
    const Unpack in(dy);
    const Weight4 w = LK_WEIGHT;
    const Adapter adapter(in, A, B, scaling, dropout_p, seed, N, K);
    return backward(backend, in, dy, x, s, {&w, nullptr}, nullptr, adapter, bias, N, K, need_dx,
                    need_dA, need_dB, need_dbias);
  }

  static Gradients lora_linear_backward(Tensor dy, Tensor x, Tensor s, Tensor weight_in, Tensor A,
                                        Tensor B, double scaling, MaybeTensor bias,
                                        double dropout_p, MaybeTensor seed, bool need_dx,
                                        bool need_dA, bool need_dB, bool need_dbias) {
    const Backend backend(dy);
    const Unpack in(dy);
    const Tensor weight = in.rows_of("weight", weight_in);
    const int64_t N = weight.size(0), K = weight.size(1);
    const Matrix dense = in.matrix("weight", weight, N, K);
    const Adapter adapter(in, A, B, scaling, dropout_p, seed, N, K);
    return backward(backend, in, dy, x, s, {nullptr, &dense}, &weight, adapter, bias, N, K, need_dx,
                    need_dA, need_dB, need_dbias);
  }

  static Tensor multi_lora_(Tensor y_in, Tensor x, LK_PLAN_PARAMS, LK_PAGES_PARAMS) {
    const Backend backend(x);
    const Unpack in(x);
    STD_TORCH_CHECK(x.dim() == 2 && y_in.dim() == 2, "x, y: expected matrices");
    STD_TORCH_CHECK(y_in.scalar_type() == x.scalar_type(), "y: expected the dtype of x");
    Tensor y = in.rows_of("y", y_in);
    const int64_t M = x.size(0), N = y.size(1), K = x.size(1);
    MultiArgs a;
    a.plan = in.plan(tiles, page_ids, tile_of_row, rows, tile_rows, max_rank, M);
    a.pages = in.pages(A_pages, B_pages, ranks, scalings, dropout_p, seed, N, K);
    const Matrix out = in.matrix("y", y, M, N);
    a.y = {y.mutable_data_ptr(), out.dtype, M, N, out.stride};
    const Tensor s = multi_forward(backend, in, x, a, y);
    if (y.get() != y_in.get()) torch::stable::copy_(y_in, y);
    return s;
  }

  static std::tuple<Tensor, Tensor> multi_lora_linear_4bit(Tensor x, LK_WEIGHT_PARAMS,
                                                           LK_PLAN_PARAMS, LK_PAGES_PARAMS,
                                                           MaybeTensor bias_in) {
    const Backend backend(x);
    const Unpack in(x);
    STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix");
    const Weight4 w = LK_WEIGHT;
    const int64_t M = x.size(0);
    Tensor y = empty(x, {M, N});
    MultiArgs a;
    a.base = &w;
    a.plan = in.plan(tiles, page_ids, tile_of_row, rows, tile_rows, max_rank, M);
    a.pages = in.pages(A_pages, B_pages, ranks, scalings, dropout_p, seed, N, K);
    const Bias bias(in, bias_in, N);
    a.bias = bias.vector;
    a.y = output(y, M, N);
    return {y, multi_forward(backend, in, x, a, y)};
  }

  static std::tuple<Tensor, Tensor, Tensor> multi_lora_backward(Tensor dy, Tensor x, Tensor s,
                                                                LK_PLAN_PARAMS, LK_PAGES_PARAMS,
                                                                Tensor grad_rows, int64_t grad_rank,
                                                                bool need_dx) {
    const Backend backend(dy);
    const Unpack in(dy);
    STD_TORCH_CHECK(dy.dim() == 2 && x.dim() == 2, "dy, x: expected matrices");
    MultiBackwardArgs a;
    a.plan = in.plan(tiles, page_ids, tile_of_row, rows, tile_rows, max_rank, dy.size(0));
    a.pages = in.pages(A_pages, B_pages, ranks, scalings, dropout_p, seed, dy.size(1), x.size(1));
    const Gradients g = multi_gradients(backend, in, dy, x, s, a, std::nullopt, grad_rows,
                                        grad_rank, need_dx, false);
    return {std::get<0>(g), std::get<1>(g), std::get<2>(g)};
  }

  static Gradients multi_lora_linear_4bit_backward(Tensor dy, Tensor x, Tensor s, LK_WEIGHT_PARAMS,
                                                   LK_PLAN_PARAMS, LK_PAGES_PARAMS,
                                                   MaybeTensor bias, Tensor grad_rows,
                                                   int64_t grad_rank, bool need_dx,
                                                   bool need_dbias) {
    const Backend backend(dy);
    const Unpack in(dy);
    STD_TORCH_CHECK(dy.dim() == 2 && x.dim() == 2, "dy, x: expected matrices");
    const Weight4 w = LK_WEIGHT;
    MultiBackwardArgs a;
    a.base = &w;
    a.plan = in.plan(tiles, page_ids, tile_of_row, rows, tile_rows, max_rank, dy.size(0));
    a.pages = in.pages(A_pages, B_pages, ranks, scalings, dropout_p, seed, N, K);
    return multi_gradients(backend, in, dy, x, s, a, bias, grad_rows, grad_rank, need_dx,
                           need_dbias);
  }

 protected:
  static int64_t s_width(const BatchPlan& plan) {
    return ceil_div(plan.max_rank, kRankStep) * kRankStep;
  }

  // S; y is in `a` already.
  static Tensor multi_forward(const Backend& backend, const Unpack& in, const Tensor& x_in,
                              MultiArgs& a, Tensor& y) {
    const Tensor x = in.rows_of("x", x_in);
    const int64_t M = x.size(0);
    a.x = in.matrix("x", x, M, a.pages.A.cols);
    in.check_indices(a.plan, a.pages, M);
    a.s_stride = s_width(a.plan);
    Tensor s = empty(x, {M, a.s_stride}, ScalarType::Float);
    a.s = static_cast<float*>(s.mutable_data_ptr());
    backend.multi(a, x, y);
    return s;
  }

  // The arguments of a backward but for dx, and the tensors behind them: inputs, and outputs, of
  // which those that are not needed are empty.
  template <class Args>
  struct Backward {
    Tensor dy, ds;
    MaybeTensor x, s;
    Tensor dA, dB, dbias;
    Args a;
  };

  static Backward<MultiBackwardArgs> multi_backward_of(const Unpack& in, const Tensor& dy_in,
                                                       const Tensor& x_in, const Tensor& s_in,
                                                       const MultiBackwardArgs& begun,
                                                       const MaybeTensor& bias,
                                                       const Tensor& grad_rows, int64_t grad_rank,
                                                       bool need_dbias) {
    const Tensor dy = in.rows_of("dy", dy_in), x = in.rows_of("x", x_in),
                 s = torch::stable::contiguous(s_in);
    MultiBackwardArgs a = begun;
    const int64_t M = dy.size(0), N = a.pages.B.cols, K = a.pages.A.cols;
    if (bias) in.vector("bias", *bias, N);
    STD_TORCH_CHECK(grad_rank >= 0 && grad_rank <= INT32_MAX, "grad_rank: expected 0..2^31-1, got ",
                    grad_rank);
    in.check_indices(a.plan, a.pages, M);
    a.dy = in.matrix("dy", dy, M, N);
    a.x = in.matrix("x", x, M, K);
    a.s_stride = s_width(a.plan);
    a.s = in.template data<float>("s", s, ScalarType::Float, checked_product("s", M, a.s_stride));
    a.grad_rows = in.template data<int32_t>("grad_rows", grad_rows, ScalarType::Int, a.pages.slots);
    in.check_grad_rows(a.grad_rows, a.pages, grad_rank);
    a.grad_rank = grad_rank;
    const Tensor dA = empty(dy, {grad_rank, K}, ScalarType::Float),
                 dB = empty(dy, {grad_rank, N}, ScalarType::Float),
                 dbias = empty(bias ? *bias : dy, {need_dbias ? N : 0}),
                 ds = empty(dy, {M, a.s_stride}, ScalarType::Float);
    a.ds = static_cast<float*>(ds.mutable_data_ptr());
    a.dA = static_cast<float*>(dA.mutable_data_ptr());
    a.dB = static_cast<float*>(dB.mutable_data_ptr());
    if (need_dbias) a.dbias = output(dbias, 1, N);
    return {dy, ds, x, s, dA, dB, dbias, a};
  }

  // dx, dA, dB, dbias; one that is not needed is empty.
  static Gradients multi_gradients(const Backend& backend, const Unpack& in, const Tensor& dy,
                                   const Tensor& x, const Tensor& s, const MultiBackwardArgs& a,
                                   const MaybeTensor& bias, const Tensor& grad_rows,
                                   int64_t grad_rank, bool need_dx, bool need_dbias) {
    auto of = multi_backward_of(in, dy, x, s, a, bias, grad_rows, grad_rank, need_dbias);
    const int64_t M = of.a.dy.rows, K = of.a.x.cols;
    Tensor dx = need_dx ? empty(of.dy, {M, K}) : empty(of.dy, {0});
    if (need_dx) of.a.dx = output(dx, M, K);
    backend.multi_backward(of.a, of.dy, dx);
    return {dx, of.dA, of.dB, of.dbias};
  }

  // y and S of either base; without an adapter S is empty.
  static std::tuple<Tensor, Tensor> forward(const Backend& backend, const Unpack& in,
                                            const Tensor& x_in, const Base& base,
                                            const Tensor* dense, const Adapter* adapter, int64_t N,
                                            int64_t K, const MaybeTensor& bias_in) {
    const Tensor x = in.rows_of("x", x_in);
    const int64_t M = x.size(0), R = adapter ? adapter->lora.A.rows : 0;
    Tensor y = empty(x, {M, N}), s = empty(x, {M, R}, ScalarType::Float);
    LinearArgs a;
    a.x = in.matrix("x", x, M, K);
    a.base = base;
    if (adapter) a.lora = adapter->lora;
    const Bias bias(in, bias_in, N);
    a.bias = bias.vector;
    a.y = output(y, M, N);
    a.s = static_cast<float*>(s.mutable_data_ptr());
    backend.linear(a, x, dense, y);
    return {y, s};
  }

  // Without an adapter x and S are not needed.
  static Backward<BackwardArgs> backward_of(const Unpack& in, const Tensor& dy_in,
                                            const MaybeTensor& x, const MaybeTensor& s,
                                            const Base& base, const Adapter* adapter,
                                            const MaybeTensor& bias, int64_t N, int64_t K,
                                            bool need_dA, bool need_dB, bool need_dbias) {
    Backward<BackwardArgs> of;
    of.dy = in.rows_of("dy", dy_in);
    const int64_t M = of.dy.size(0), R = adapter ? adapter->lora.A.rows : 0;
    if (bias) in.vector("bias", *bias, N);
    need_dA = need_dA && adapter, need_dB = need_dB && adapter;
    const Tensor& like_A = adapter ? adapter->A : of.dy;
    const Tensor& like_B = adapter ? adapter->B : of.dy;
    of.dA = need_dA ? empty(like_A, {R, K}) : empty(like_A, {0});
    of.dB = need_dB ? empty(like_B, {N, R}) : empty(like_B, {0});
    of.dbias = empty(bias ? *bias : of.dy, {need_dbias ? N : 0});
    of.ds = empty(of.dy, {M, R}, ScalarType::Float);
    of.a.dy = in.matrix("dy", of.dy, M, N);
    of.a.base = base;
    if (adapter) {
      STD_TORCH_CHECK(x && s, "x, s: expected tensors where there is an adapter, got None");
      of.x = in.rows_of("x", *x);
      of.s = torch::stable::contiguous(*s);
      of.a.x = in.matrix("x", *of.x, M, K);
      of.a.lora = adapter->lora;
      of.a.s = in.template data<float>("s", *of.s, ScalarType::Float, checked_product("s", M, R));
    }
    of.a.ds = static_cast<float*>(of.ds.mutable_data_ptr());
    if (need_dA) of.a.dA = output(of.dA, R, K);
    if (need_dB) of.a.dB = output(of.dB, N, R);
    if (need_dbias) of.a.dbias = output(of.dbias, 1, N);
    return of;
  }

  // dx, dA, dB, dbias; one that is not needed is empty.
  static Gradients backward(const Backend& backend, const Unpack& in, const Tensor& dy,
                            const Tensor& x, const Tensor& s, const Base& base, const Tensor* dense,
                            const Adapter& adapter, const MaybeTensor& bias, int64_t N, int64_t K,
                            bool need_dx, bool need_dA, bool need_dB, bool need_dbias) {
    auto of = backward_of(in, dy, x, s, base, &adapter, bias, N, K, need_dA, need_dB, need_dbias);
    const int64_t M = of.a.dy.rows;
    Tensor dx = need_dx ? empty(of.dy, {M, K}) : empty(of.dy, {0});
    if (need_dx) of.a.dx = output(dx, M, K);
    backend.linear_backward(of.a, of.dy, dense, dx);
    return {dx, of.dA, of.dB, of.dbias};
  }
};

#undef LK_PAGES_PARAMS

}  // namespace lk

#include "ops/grouped.h"
#include "ops/groups.h"

namespace lk {

#undef LK_WEIGHT
#undef LK_WEIGHT_PARAMS

#undef LK_PLAN_PARAMS

// Registers all of them; `library` is the argument of STABLE_TORCH_LIBRARY_IMPL.
template <class Backend, class Library>
void implement(Library& library) {
  using Ops = Operators<Backend>;
  library.impl("quantize_4bit", TORCH_BOX(&Ops::quantize_4bit));
  library.impl("double_quantize", TORCH_BOX(&Ops::double_quantize));
  library.impl("dequantize_4bit", TORCH_BOX(&Ops::dequantize_4bit));
  library.impl("linear_4bit", TORCH_BOX(&Ops::linear_4bit));
  library.impl("linear_4bit_dx", TORCH_BOX(&Ops::linear_4bit_dx));
  library.impl("lora_linear_4bit", TORCH_BOX(&Ops::lora_linear_4bit));
  library.impl("lora_linear_4bit_backward", TORCH_BOX(&Ops::lora_linear_4bit_backward));
  library.impl("lora_linear", TORCH_BOX(&Ops::lora_linear));
  library.impl("lora_linear_backward", TORCH_BOX(&Ops::lora_linear_backward));
  library.impl("multi_lora_", TORCH_BOX(&Ops::multi_lora_));
  library.impl("multi_lora_backward", TORCH_BOX(&Ops::multi_lora_backward));
  library.impl("multi_lora_linear_4bit", TORCH_BOX(&Ops::multi_lora_linear_4bit));
  library.impl("multi_lora_linear_4bit_backward", TORCH_BOX(&Ops::multi_lora_linear_4bit_backward));
  using Grouped = GroupedOperators<Backend>;
  library.impl("grouped_linear_4bit", TORCH_BOX(&Grouped::grouped_linear_4bit));
  library.impl("grouped_lora_linear_4bit", TORCH_BOX(&Grouped::grouped_lora_linear_4bit));
  library.impl("grouped_lora_linear_4bit_backward",
               TORCH_BOX(&Grouped::grouped_lora_linear_4bit_backward));
  using Groups = GroupOperators<Backend>;
  library.impl("lora_linear_4bit_group", TORCH_BOX(&Groups::lora_linear_4bit_group));
  library.impl("lora_linear_4bit_group_backward",
               TORCH_BOX(&Groups::lora_linear_4bit_group_backward));
  library.impl("multi_lora_linear_4bit_group", TORCH_BOX(&Groups::multi_lora_linear_4bit_group));
  library.impl("multi_lora_linear_4bit_group_backward",
               TORCH_BOX(&Groups::multi_lora_linear_4bit_group_backward));
}

}  // namespace lk
