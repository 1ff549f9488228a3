// The operators on CPU tensors: the kernels of the best instruction set, on torch's threads.
#include "cpu/api.h"
#include "cpu/table.h"
#include "ops/operators.h"

namespace lk {
namespace {

Parallel pool() {
  return {[](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(
                0, tasks, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

struct Cpu {
  explicit Cpu(const Tensor& first) {
    STD_TORCH_CHECK(first.is_cpu(), "expected CPU tensors, got one on another device");
  }
  void quantize(const QuantizeArgs& a) const { lk_kernels()->quantize(a, pool()); }
  void double_quantize(const DoubleQuantizeArgs& a) const {
    lk_kernels()->double_quantize(a, pool());
  }
  void dequantize(const DequantizeArgs& a) const { lk_kernels()->dequantize(a, pool()); }
  void linear(const LinearArgs& a, const Tensor&, const Tensor*, Tensor&) const {
    lk_kernels()->linear(a, pool());
  }
  void linear_backward(const BackwardArgs& a, const Tensor&, const Tensor*, Tensor&) const {
    lk_kernels()->linear_backward(a, pool());
  }
  void multi(const MultiArgs& a, const Tensor&, Tensor&) const { lk_kernels()->multi(a, pool()); }
  void multi_backward(const MultiBackwardArgs& a, const Tensor&, Tensor&) const {
    lk_kernels()->multi_backward(a, pool());
  }
};

}  // namespace
}  // namespace lk

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) { lk::implement<lk::Cpu>(m); }
