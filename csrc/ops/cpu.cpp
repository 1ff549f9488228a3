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

// Whether x Wᵀ is computed on bytes: asked for on this thread, and possible.
bool int8(const Weight4* w) {
  if (!w || !lk_int8_active()) return false;
  STD_TORCH_CHECK(lk_int8_kernels(),
                  "int8_activations: expected a CPU with AVX512-VNNI or AVX-VNNI, "
                  "got none beside the instruction set in use, ",
                  lk_isa_active());
  STD_TORCH_CHECK(blocks_fit_rows(*w),
                  "w: expected in_features that are a multiple of the blocksize ",
                  1 << w->block_shift, " under int8_activations, got ", w->K);
  return true;
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
    LinearArgs with = a;
    with.int8 = int8(a.base.quantized);
    lk_kernels()->linear(with, pool());
  }
  void linear_backward(const BackwardArgs& a, const Tensor&, const Tensor*, Tensor&) const {
    lk_kernels()->linear_backward(a, pool());
  }
  void multi(const MultiArgs& a, const Tensor&, Tensor&) const {
    MultiArgs with = a;
    with.int8 = int8(a.base);
    lk_kernels()->multi(with, pool());
  }
  void multi_backward(const MultiBackwardArgs& a, const Tensor&, Tensor&) const {
    lk_kernels()->multi_backward(a, pool());
  }
};

}  // namespace
}  // namespace lk

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) { lk::implement<lk::Cpu>(m); }
