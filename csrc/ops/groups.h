// The operators of several weights that share x, once for every backend: each weight by itself, as
// in operators.h, but for dx, whose parts are added in float32 and rounded once. Included by
// operators.h.
#pragma once

namespace lk {

template <class Backend>
struct GroupOperators : Operators<Backend> {
  using Base_ = Operators<Backend>;
  template <class Args>
  using Backward = typename Base_::template Backward<Args>;
  using Outputs = std::tuple<Tensors, Tensors>;
  using Gradients = std::tuple<Tensor, Tensors, Tensors, Tensors>;

  // No weight has a bias, or an adapter, where those lists are empty; one has none where the entry
  // is None (see arguments.h).
  static Outputs lora_linear_4bit_group(const Tensor& x_in, const Tensors& weights,
                                        const Integers& dims, const Tensors& A, const Tensors& B,
                                        const Numbers& scaling, const Tensors& bias,
                                        const Numbers& dropout_p, const Tensors& seed) {
    const Backend backend(x_in);
    const Unpack in(x_in);
    const std::vector<Weight4> w = in.weights(weights, dims);
    const auto adapters = adapters_of(in, w, A, B, scaling, dropout_p, seed);
    if (!bias.empty()) check_length("bias", bias, w.size());
    const Tensor x = in.rows_of("x", x_in);
    Tensors y, s;
    for (size_t i = 0; i < w.size(); ++i) {
      const Adapter* adapter = adapters[i] ? &*adapters[i] : nullptr;
      auto of = Base_::forward(backend, in, x, {&w[i], nullptr}, nullptr, adapter, w[i].N, w[i].K,
                               maybe(bias, i));
      y.push_back(std::get<0>(of));
      s.push_back(std::get<1>(of));
    }
    return {y, s};
  }

  // A weight whose dy is None has no part in dx, and its gradients are empty.
  static Gradients lora_linear_4bit_group_backward(
      const Tensors& dy, const MaybeTensor& x, const Tensors& s, const Tensors& weights,
      const Integers& dims, const Tensors& A, const Tensors& B, const Numbers& scaling,
      const Tensors& bias, const Numbers& dropout_p, const Tensors& seed, bool need_dx,
      const Flags& need_dA, const Flags& need_dB, const Flags& need_dbias) {
    const Tensor& first = first_of(dy);
    const Backend backend(first);
    const Unpack in(first);
    const std::vector<Weight4> w = in.weights(weights, dims);
    const auto adapters = adapters_of(in, w, A, B, scaling, dropout_p, seed);
    check_length("dy", dy, w.size());
    check_length("s", s, w.size());
    if (!bias.empty()) check_length("bias", bias, w.size());
    check_length("need_dA", need_dA, w.size());
    check_length("need_dB", need_dB, w.size());
    check_length("need_dbias", need_dbias, w.size());
    MaybeTensor rows;  // x, unpacked once
    if (x) rows = in.rows_of("x", *x);
    Sum<BackwardArgs> sum(first, w.size());
    for (size_t i = 0; i < w.size(); ++i) {
      if (!maybe(dy[i])) {
        sum.none(adapters[i] ? A[i] : first, adapters[i] ? B[i] : first,
                 maybe(bias, i).value_or(first));
        continue;
      }
      const Adapter* adapter = adapters[i] ? &*adapters[i] : nullptr;
      sum.add(Base_::backward_of(in, dy[i], rows, s[i], {&w[i], nullptr}, adapter, maybe(bias, i),
                                 w[i].N, w[i].K, need_dA[i], need_dB[i], need_dbias[i]));
    }
    return sum.run(backend, need_dx, w[0].K);
  }

  // `pages` has the five tensors of each weight: A_pages, B_pages, ranks, scalings, dropout_p.
  static Outputs multi_lora_linear_4bit_group(const Tensor& x_in, const Tensors& weights,
                                              const Integers& dims, LK_PLAN_PARAMS,
                                              const Tensors& pages, const Tensors& seed,
                                              const Tensors& bias) {
    const Backend backend(x_in);
    const Unpack in(x_in);
    const std::vector<Weight4> w = in.weights(weights, dims);
    if (!bias.empty()) check_length("bias", bias, w.size());
    const Tensor x = in.rows_of("x", x_in);
    const int64_t M = x.size(0);
    MultiArgs a;
    a.plan = in.plan(tiles, page_ids, tile_of_row, rows, tile_rows, max_rank, M);
    const std::vector<Pages> of_weight = pages_of(in, w, pages, seed);
    Tensors ys, ss;
    for (size_t i = 0; i < w.size(); ++i) {
      Tensor y = empty(x, {M, w[i].N});
      a.base = &w[i];
      a.pages = of_weight[i];
      const Bias own(in, maybe(bias, i), w[i].N);
      a.bias = own.vector;
      a.y = output(y, M, w[i].N);
      ss.push_back(Base_::multi_forward(backend, in, x, a, y));
      ys.push_back(y);
    }
    return {ys, ss};
  }

  static Gradients multi_lora_linear_4bit_group_backward(
      const Tensors& dy, const Tensor& x_in, const Tensors& s, const Tensors& weights,
      const Integers& dims, LK_PLAN_PARAMS, const Tensors& pages, const Tensors& seed,
      const Tensors& bias, const Tensors& grad_rows, const Integers& grad_rank, bool need_dx,
      const Flags& need_dbias) {
    const Tensor& first = first_of(dy);
    const Backend backend(first);
    const Unpack in(first);
    const std::vector<Weight4> w = in.weights(weights, dims);
    check_length("dy", dy, w.size());
    check_length("s", s, w.size());
    if (!bias.empty()) check_length("bias", bias, w.size());
    check_length("grad_rows", grad_rows, w.size());
    check_length("grad_rank", grad_rank, w.size());
    check_length("need_dbias", need_dbias, w.size());
    const Tensor x = in.rows_of("x", x_in);
    MultiBackwardArgs a;
    a.plan = in.plan(tiles, page_ids, tile_of_row, rows, tile_rows, max_rank, x.size(0));
    const std::vector<Pages> of_weight = pages_of(in, w, pages, seed);
    Sum<MultiBackwardArgs> sum(first, w.size());
    for (size_t i = 0; i < w.size(); ++i) {
      if (!maybe(dy[i])) {
        sum.none(first, first, maybe(bias, i).value_or(first), ScalarType::Float);
        continue;
      }
      a.base = &w[i];
      a.pages = of_weight[i];
      sum.add(Base_::multi_backward_of(in, dy[i], x, s[i], a, maybe(bias, i), grad_rows[i],
                                       grad_rank[i], need_dbias[i]));
    }
    return sum.run(backend, need_dx, w[0].K);
  }

 private:
  static const Tensor& first_of(const Tensors& dy) {
    for (const Tensor& t : dy)
      if (maybe(t)) return t;
    STD_TORCH_CHECK(false, "dy: expected a tensor for one weight at least, got none");
  }

  static std::vector<std::optional<Adapter>> adapters_of(
      const Unpack& in, const std::vector<Weight4>& w, const Tensors& A, const Tensors& B,
      const Numbers& scaling, const Numbers& dropout_p, const Tensors& seed) {
    const size_t count = A.empty() ? 0 : w.size();
    check_length("A", A, count);
    check_length("B", B, count);
    check_length("scaling", scaling, count);
    check_length("dropout_p", dropout_p, count);
    if (!seed.empty()) check_length("seed", seed, count);
    std::vector<std::optional<Adapter>> adapters(w.size());
    for (size_t i = 0; i < count; ++i) {
      STD_TORCH_CHECK(maybe(A[i]).has_value() == maybe(B[i]).has_value(),
                      "B: expected shape [0] where A has it, and nowhere else");
      if (maybe(A[i]))
        adapters[i].emplace(in, A[i], B[i], scaling[i], dropout_p[i], maybe(seed, i), w[i].N,
                            w[i].K);
    }
    return adapters;
  }

  static std::vector<Pages> pages_of(const Unpack& in, const std::vector<Weight4>& w,
                                     const Tensors& tensors, const Tensors& seed) {
    check_length("pages", tensors, 5 * w.size());
    if (!seed.empty()) check_length("seed", seed, w.size());
    std::vector<Pages> found;
    for (size_t i = 0; i < w.size(); ++i) {
      const Tensor* t = &tensors[5 * i];
      found.push_back(in.pages(t[0], t[1], t[2], t[3], t[4], maybe(seed, i), w[i].N, w[i].K));
    }
    return found;
  }

  static void run(const Backend& backend, const BackwardArgs& a, const Tensor& dy, Tensor& dx) {
    backend.linear_backward(a, dy, nullptr, dx);
  }
  static void run(const Backend& backend, const MultiBackwardArgs& a, const Tensor& dy,
                  Tensor& dx) {
    backend.multi_backward(a, dy, dx);
  }

  // The backwards of the weights that have a dy, in their order.
  template <class Args>
  class Sum {
   public:
    Sum(const Tensor& like, size_t count) : like_(like) { parts_.reserve(count); }

    void add(Backward<Args> part) {
      keep(part.dA, part.dB, part.dbias);
      parts_.push_back(std::move(part));
    }
    // A weight without a dy; gradients are like these tensors.
    void none(const Tensor& A, const Tensor& B, const Tensor& bias) {
      keep(empty(A, {0}), empty(B, {0}), empty(bias, {0}));
    }
    void none(const Tensor& A, const Tensor& B, const Tensor& bias, ScalarType type) {
      keep(empty(A, {0}, type), empty(B, {0}, type), empty(bias, {0}));
    }

    Gradients run(const Backend& backend, bool need_dx, int64_t K) {
      const int64_t M = parts_[0].a.dy.rows;
      for (const Backward<Args>& part : parts_)
        STD_TORCH_CHECK(part.dy.scalar_type() == like_.scalar_type() && part.a.dy.rows == M,
                        "dy: expected one dtype and one number of rows");
      Tensor dx = need_dx ? empty(like_, {M, K}) : empty(like_, {0});
      if (!need_dx)
        for (Backward<Args>& part : parts_) GroupOperators::run(backend, part.a, part.dy, dx);
      else if (!backend.stacked_dx(parts_, dx))
        add_parts(backend, dx);
      return {dx, dA_, dB_, dbias_};
    }

   private:
    void keep(const Tensor& dA, const Tensor& dB, const Tensor& dbias) {
      dA_.push_back(dA);
      dB_.push_back(dB);
      dbias_.push_back(dbias);
    }

    // dx = Σ dx of each, float32 sums in the order of the weights, rounded once.
    void add_parts(const Backend& backend, Tensor& dx) {
      const int64_t M = dx.size(0), K = dx.size(1);
      const bool direct = parts_.size() == 1 || dx.scalar_type() == ScalarType::Float;
      Tensor sum = direct ? dx : empty(dx, {M, K}, ScalarType::Float), part = sum;
      for (size_t i = 0; i < parts_.size(); ++i) {
        if (i == 1) part = empty(dx, {M, K}, ScalarType::Float);
        parts_[i].a.dx = output(part, M, K);
        GroupOperators::run(backend, parts_[i].a, parts_[i].dy, part);
        if (i > 0) backend.add(sum, part);
      }
      if (!direct) torch::stable::copy_(dx, sum);
    }

    Tensor like_;
    std::vector<Backward<Args>> parts_;
    Tensors dA_, dB_, dbias_;
  };
};

}  // namespace lk
