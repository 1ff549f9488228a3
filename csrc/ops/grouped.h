// The operators of stacked experts, once for every backend. Included by operators.h.
#pragma once

namespace lk {

template <class Backend>
struct GroupedOperators {
  static Tensor grouped_linear_4bit(Tensor x, LK_WEIGHT_PARAMS, Tensor offsets, bool transposed,
                                    MaybeTensor bias) {
    return std::get<0>(forward(x, {packed, absmax, code, nested_absmax, nested_code, nested_offset},
                               N, K, blocksize, offsets, transposed, nullptr, nullptr, 0.0, bias));
  }

  static std::tuple<Tensor, Tensor> grouped_lora_linear_4bit(Tensor x, LK_WEIGHT_PARAMS,
                                                             Tensor offsets, bool transposed,
                                                             Tensor A, Tensor B, double scaling,
                                                             MaybeTensor bias) {
    return forward(x, {packed, absmax, code, nested_absmax, nested_code, nested_offset}, N, K,
                   blocksize, offsets, transposed, &A, &B, scaling, bias);
  }

  // dx, dA, dB; one that is not needed is empty.
  static std::tuple<Tensor, Tensor, Tensor> grouped_lora_linear_4bit_backward(
      Tensor dy_in, Tensor x_in, Tensor s_in, LK_WEIGHT_PARAMS, Tensor offsets, bool transposed,
      Tensor A, Tensor B, double scaling, bool need_dx, bool need_dA, bool need_dB) {
    const Backend backend(dy_in);
    const Unpack in(dy_in);
    const Tensor dy = in.rows_of("dy", dy_in), x = in.rows_of("x", x_in),
                 s = torch::stable::contiguous(s_in);
    const int64_t M = dy.size(0);
    GroupedBackwardArgs a;
    a.experts = experts_of(in, LK_WEIGHT, offsets, transposed, M);
    const Shape of = shape_of(a.experts);
    a.dy = in.matrix("dy", dy, M, of.N);
    a.x = in.matrix("x", x, M, of.K);
    a.rank = rank_of(in, A, B, a.experts.count, of);
    a.scaling = static_cast<float>(scaling);
    const int64_t E = a.experts.count, R = a.rank;
    MaybeTensor kept_A, kept_At, kept_B;
    a.A = factor(backend, "A", A, a.experts, false, kept_A);
    a.B = factor(backend, "B", B, a.experts, false, kept_B);
    if (Backend::kTransposesFactors && transposed && need_dx)
      a.At = factor(backend, "A", A, a.experts, true, kept_At);
    a.s = in.template data<float>("s", s, ScalarType::Float, checked_product("s", M, R));
    const Tensor ds = empty(dy, {M, R}, ScalarType::Float);
    a.ds = static_cast<float*>(ds.mutable_data_ptr());
    Tensor dx = need_dx ? empty(dy, {M, of.K}) : empty(dy, {0});
    Tensor dA = need_dA ? empty(A, {E, R, of.K}) : empty(A, {0});
    Tensor dB = need_dB ? empty(B, {E, of.N, R}) : empty(B, {0});
    if (need_dx) a.dx = output(dx, M, of.K);
    if (need_dA) a.dA = output(dA, E * R, of.K);
    if (need_dB) a.dB = output(dB, E * of.N, R);
    backend.grouped_backward(a, dy, dx);
    return {dx, dA, dB};
  }

 private:
  // N and K of an expert.
  struct Shape {
    int64_t N, K;
  };

  static Shape shape_of(const Experts& x) {
    const int64_t rows = x.base.N / x.count;
    return x.transposed ? Shape{x.base.K, rows} : Shape{rows, x.base.K};
  }

  static Experts experts_of(const Unpack& in, const Weight4& base, const Tensor& offsets,
                            bool transposed, int64_t M) {
    Experts x;
    x.base = base;
    x.count = offsets.numel();
    STD_TORCH_CHECK(offsets.dim() == 1 && x.count > 0 && x.count <= INT32_MAX,
                    "offsets: expected shape [E] with E > 0, got ", offsets.dim(),
                    " dimensions of ", x.count, " elements");
    STD_TORCH_CHECK(base.N % x.count == 0, "N: expected a multiple of the ", x.count,
                    " experts, got ", base.N);
    STD_TORCH_CHECK(M <= INT32_MAX, "x: expected fewer than 2^31 rows, got ", M);
    x.offsets = in.template data<int32_t>("offsets", offsets, ScalarType::Int, x.count);
    x.transposed = transposed;
    if constexpr (Backend::kReadsOffsets) Unpack::check_offsets(x, M);
    return x;
  }

  // The rank of the adapters A and B, whose shapes and devices are checked.
  static int64_t rank_of(const Unpack& in, const Tensor& a, const Tensor& b, int64_t experts,
                         const Shape& of) {
    STD_TORCH_CHECK(a.dim() == 3 && a.size(0) == experts && a.size(2) == of.K,
                    "A: expected shape [E, R, K]");
    const int64_t rank = checked_size("A", a.size(1));
    STD_TORCH_CHECK(b.dim() == 3 && b.size(0) == experts && b.size(1) == of.N && b.size(2) == rank,
                    "B: expected shape [E, N, R]");
    in.check_device("A", a);
    in.check_device("B", b);
    return rank;
  }

  // The factor `t` of all experts, or each expert's matrix of it transposed; `kept` has it, or a
  // copy of it.
  static Matrix factor(const Backend& backend, const char* name, const Tensor& t, const Experts& x,
                       bool flip, MaybeTensor& kept) {
    const DType dtype = dtype_of(name, t);
    kept = backend.factor(t, x, flip);
    const int64_t rows = kept->size(0) * kept->size(1), cols = kept->size(2);
    return {kept->const_data_ptr(), dtype, rows, cols, cols};
  }

  struct WeightTensors {
    Tensor packed, absmax, code;
    MaybeTensor nested_absmax, nested_code, nested_offset;
  };

  // y and S; without adapters S is empty.
  static std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const WeightTensors& w, int64_t N,
                                            int64_t K, int64_t blocksize, const Tensor& offsets,
                                            bool transposed, const Tensor* A, const Tensor* B,
                                            double scaling, const MaybeTensor& bias_in) {
    const Backend backend(x_in);
    const Unpack in(x_in);
    const Tensor x = in.rows_of("x", x_in);
    const int64_t M = x.size(0);
    GroupedArgs a;
    a.experts = experts_of(in,
                           in.weight4(w.packed, w.absmax, w.code, w.nested_absmax, w.nested_code,
                                      w.nested_offset, N, K, blocksize),
                           offsets, transposed, M);
    const Shape of = shape_of(a.experts);
    const int64_t E = a.experts.count;
    a.x = in.matrix("x", x, M, of.K);
    MaybeTensor kept_A, kept_B;
    const bool flips = A && Backend::kTransposesFactors && transposed;
    if (A) {
      a.rank = rank_of(in, *A, *B, E, of);
      a.scaling = static_cast<float>(scaling);
      a.A = factor(backend, "A", *A, a.experts, false, kept_A);
      (flips ? a.Bt : a.B) = factor(backend, "B", *B, a.experts, flips, kept_B);
    }
    MaybeTensor bias;
    if (bias_in) {
      bias = torch::stable::contiguous(*bias_in);
      STD_TORCH_CHECK(bias->dim() == 2 && bias->size(0) == E && bias->size(1) == of.N,
                      "bias: expected shape [E, N] = [", E, ", ", of.N, "]");
      in.check_device("bias", *bias);
      a.bias = {bias->const_data_ptr(), dtype_of("bias", *bias)};
    }
    Tensor y = empty(x, {M, of.N}), s = empty(x, {M, a.rank}, ScalarType::Float), ds = s;
    a.y = output(y, M, of.N);
    a.s = static_cast<float*>(s.mutable_data_ptr());
    if (flips) {
      ds = empty(x, {M, a.rank}, ScalarType::Float);
      a.ds = static_cast<float*>(ds.mutable_data_ptr());
    }
    backend.grouped(a, x, y);
    return {y, s};
  }
};

}  // namespace lk
