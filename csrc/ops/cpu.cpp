// The operators on CPU tensors: the kernels of the best instruction set, on torch's threads.
#include <dlfcn.h>
#include <sys/mman.h>

#include <atomic>
#include <vector>

#include "cpu/api.h"
#include "cpu/table.h"
#include "ops/operators.h"

namespace lk {
namespace {

// Threads take shares of the tasks in turn: one that has to share its core with another program, or
// waits for memory, takes fewer. Which thread does a task changes no result.
constexpr int64_t kShares = 4;  // of each thread, if all are equally fast

void run(int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  const int64_t threads = min64(tasks, static_cast<int64_t>(torch::stable::get_num_threads()));
  if (threads <= 1) {
    if (tasks > 0) body(context, 0, tasks);
    return;
  }
  const int64_t share = ceil_div(tasks, threads * kShares);
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (;;) {
      const int64_t begin = next.fetch_add(share, std::memory_order_relaxed);
      if (begin >= tasks) return;
      body(context, begin, min64(begin + share, tasks));
    }
  });
}

Parallel pool() { return {run, static_cast<int>(torch::stable::get_num_threads())}; }

// Whether x Wᵀ is computed on bytes: asked for on this thread, and possible.
bool int8(const Weight4* w) {
  if (!w || !lk_int8_active()) return false;
  STD_TORCH_CHECK(
      lk_int8_kernels(),
      "int8_activations: expected a CPU with AVX512-VNNI, AVX-VNNI or dot products of NEON, "
      "got none beside the instruction set in use, ",
      lk_isa_active());
  STD_TORCH_CHECK(blocks_fit_rows(*w),
                  "w: expected in_features that are a multiple of the blocksize ",
                  1 << w->block_shift, " under int8_activations, got ", w->K);
  return true;
}

// Whether torch.set_float32_matmul_precision("medium") is in force, or what stands for it on CPUs,
// torch.backends.mkldnn.matmul.fp32_precision = "bf16". The stable ABI has no such question, so
// torch's own function is looked up; where a version of torch has no such function, the answer is
// no.
bool medium_precision() {
  using Context = void* (*)();
  using Precision = int (*)(const void*, int, int);
  constexpr int kMkldnn = 2, kMatmul = 3,
                kBf16 = 3;  // of at::Float32Backend, Float32Op, -Precision
  static const auto found = [] {
    void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
    const auto symbol = [&](const char* name) { return torch ? dlsym(torch, name) : nullptr; };
    struct {
      Context context;
      Precision precision;
    } of{reinterpret_cast<Context>(symbol("_ZN2at13globalContextEv")),
         reinterpret_cast<Precision>(
             symbol("_ZNK2at7Context16float32PrecisionENS_14Float32BackendENS_9Float32OpE"))};
    return of;
  }();
  return found.context && found.precision &&
         found.precision(found.context(), kMkldnn, kMatmul) == kBf16;
}

// Rounded to bfloat16 are the operands of bfloat16 activations, and of float32 ones where torch
// permits it, unless somebody asked for exact products.
Arithmetic arithmetic(DType activations) {
  const bool rounded =
      lk_pairs() && !lk_exact_active() &&
      (activations == DType::bf16 || (activations == DType::f32 && medium_precision()));
  return rounded ? Arithmetic::bf16 : Arithmetic::exact;
}
Arithmetic arithmetic(const Weight4* w, DType activations) {
  return int8(w) ? Arithmetic::int8 : arithmetic(activations);
}

// Asks the system for huge pages under memory that is about to be written for the first time: see
// lowrank_kernels/huge_pages.py.
void advise_huge_pages(void* data, int64_t bytes) {
  constexpr uintptr_t kPage = uintptr_t{2} << 20;
  const uintptr_t start = reinterpret_cast<uintptr_t>(data), end = start + bytes,
                  first = (start + kPage - 1) / kPage * kPage, last = end / kPage * kPage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

// Copies the matrices of some experts. They are innermost in B as PEFT has it, so they are here.
template <class Number>
void gather(const Tensor& t, const std::vector<int64_t>& experts, bool flip, Tensor& copy) {
  const Number* from = static_cast<const Number*>(t.const_data_ptr());
  Number* to = static_cast<Number*>(copy.mutable_data_ptr());
  const int64_t P = t.size(1), Q = t.size(2), size = P * Q;
  const int64_t apart[3] = {t.stride(0), t.stride(1), t.stride(2)};
  const int64_t rows = flip ? 1 : Q, columns = flip ? P : 1;
  torch::stable::parallel_for(0, P, ceil_div(1 << 14, Q + 1), [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p)
      for (int64_t q = 0; q < Q; ++q) {
        const Number* source = from + p * apart[1] + q * apart[2];
        Number* target = to + p * rows + q * columns;
        for (const int64_t e : experts) target[e * size] = source[e * apart[0]];
      }
  });
}

struct Cpu {
  explicit Cpu(const Tensor& first) {
    STD_TORCH_CHECK(first.is_cpu(), "expected CPU tensors, got one on another device");
  }
  void quantize(const QuantizeArgs& a) const {
    advise_huge_pages(a.packed, ceil_div(a.numel, 2));
    lk_kernels()->quantize(a, pool());
  }
  void double_quantize(const DoubleQuantizeArgs& a) const {
    lk_kernels()->double_quantize(a, pool());
  }
  void dequantize(const DequantizeArgs& a) const { lk_kernels()->dequantize(a, pool()); }
  void linear(const LinearArgs& a, const Tensor&, const Tensor*, Tensor&) const {
    LinearArgs with = a;
    with.arithmetic = arithmetic(a.base.quantized, a.x.dtype);
    lk_kernels()->linear(with, pool());
  }
  void linear_backward(const BackwardArgs& a, const Tensor&, const Tensor*, Tensor&) const {
    BackwardArgs with = a;
    with.arithmetic = arithmetic(a.dy.dtype);
    lk_kernels()->linear_backward(with, pool());
  }
  void multi(const MultiArgs& a, const Tensor&, Tensor&) const {
    MultiArgs with = a;
    with.arithmetic = arithmetic(a.base, a.x.dtype);
    lk_kernels()->multi(with, pool());
  }
  void multi_backward(const MultiBackwardArgs& a, const Tensor&, Tensor&) const {
    MultiBackwardArgs with = a;
    with.arithmetic = arithmetic(a.dy.dtype);
    lk_kernels()->multi_backward(with, pool());
  }
  // The kernels of a transposed stack read the factors of its adapters the other way round.
  static constexpr bool kTransposesFactors = true;
  static constexpr bool kReadsOffsets = true;
  // A factor [E, P, Q] of the adapters of experts, or each expert's matrix transposed. Where that
  // is a copy, it has the experts that have rows; nobody reads the others.
  Tensor factor(const Tensor& t, const Experts& x, bool flip) const {
    if (!flip && t.is_contiguous()) return t;
    const int64_t E = t.size(0), P = t.size(1), Q = t.size(2);
    Tensor copy = flip ? empty(t, {E, Q, P}) : empty(t, {E, P, Q});
    std::vector<int64_t> experts;
    for (int64_t e = 0; e < E; ++e)
      if (x.offsets[e] > (e ? x.offsets[e - 1] : 0)) experts.push_back(e);
    t.element_size() == 4 ? gather<uint32_t>(t, experts, flip, copy)
                          : gather<uint16_t>(t, experts, flip, copy);
    return copy;
  }
  void grouped(const GroupedArgs& a, const Tensor&, Tensor&) const {
    GroupedArgs with = a;
    with.arithmetic = arithmetic(&a.experts.base, a.x.dtype);
    STD_TORCH_CHECK(with.arithmetic != Arithmetic::int8 || !a.experts.transposed,
                    "int8_activations: expected experts [E, N, K], got transposed ones [E, K, N], "
                    "for which there is no such product");
    lk_kernels()->grouped(with, pool());
  }
  void grouped_backward(const GroupedBackwardArgs& a, const Tensor&, Tensor&) const {
    GroupedBackwardArgs with = a;
    with.arithmetic = arithmetic(a.dy.dtype);
    lk_kernels()->grouped_backward(with, pool());
  }
  // sum += part, both float32 and without gaps.
  void add(Tensor& sum, const Tensor& part) const {
    float* to = static_cast<float*>(sum.mutable_data_ptr());
    const float* from = static_cast<const float*>(part.const_data_ptr());
    constexpr int64_t kGrain = 1 << 15;
    torch::stable::parallel_for(0, sum.numel(), kGrain, [=](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) to[i] += from[i];
    });
  }
  template <class Parts>
  bool stacked_dx(Parts&, Tensor&) const {
    return false;
  }
};

}  // namespace
}  // namespace lk

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) { lk::implement<lk::Cpu>(m); }
