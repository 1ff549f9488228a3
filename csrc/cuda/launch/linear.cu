// The linear operators: which family runs a call, decided once, and in which order its
// kernels run.
#include <algorithm>
#include <type_traits>

#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

// More rows than these go to the dense library, which finds the weight decoded. That costs 2.6
// bytes of traffic per weight, the time of about 235 rows on an H200; decoding inside the product
// costs a share of its arithmetic instead, some 40 % with mma.sync: the two are even at about 350
// rows (a model; to be measured).
constexpr int64_t kMatmulRows = 320;
// The general kernels have no tensor cores, so the dense library pays much earlier.
constexpr int64_t kMatmulRowsGeneral = 64;

template <class Args>
Family family_of(const Args& a, const Matrix& rows) {
  const bool empty = a.base.quantized && a.base.quantized->N * a.base.quantized->K == 0;
  if (rows.rows == 0 || empty) return Family::simt;
  if (a.base.dense) return a.base.dense->dtype == rows.dtype ? Family::matmul : Family::simt;
  const bool tile = mma_takes(a);
  if (rows.rows > (tile ? kMatmulRows : kMatmulRowsGeneral)) return Family::matmul;
  return tile ? Family::mma : Family::simt;
}

Family family(const LinearArgs& a) {
  if (a.base.quantized && a.x.rows > 0 && gemv_takes(a)) return Family::gemv;
  return family_of(a, a.x);
}
Family family(const BackwardArgs& a) {
  // Without dx there is no product with the base.
  return a.dx.data ? family_of(a, a.dy) : Family::simt;
}

template <class Args>
LaunchPlan plan(Args a, bool has_rest, int device) {
  LaunchPlan p;
  p.family = p.rest = family(a);
  p.has_rest = has_rest;
  if constexpr (std::is_same_v<Args, LinearArgs>)
    if (p.family == Family::gemv) {
      p.workspace = gemv_workspace(a, device);
      return p;
    }
  if (p.family == Family::matmul) {
    a.base = {};
    p.rest = mma_takes(a) ? Family::mma : Family::simt;
  }
  p.lora_on_tensor_cores = lora_takes(a);
  p.workspace = std::max(p.lora_on_tensor_cores ? lora_workspace(a, device) : 0,
                         p.rest == Family::mma ? mma_workspace(a, device) : 0);
  return p;
}

}  // namespace

cudaError_t linear(LinearArgs a, const LaunchPlan& plan, const EpilogueOperand& addend,
                   const Launch& on) {
  if (a.x.rows == 0) return cudaSuccess;
  if (plan.family == Family::gemv) return gemv_linear(a, addend, on);
  if (plan.family == Family::matmul) a.base = {};
  if (a.lora.A.data) LK_TRY(plan.lora_on_tensor_cores ? lora_shrink(a, on) : simt_shrink(a, on));
  return plan.rest == Family::mma ? mma_linear(a, addend, on) : simt_linear(a, addend, on);
}

cudaError_t linear_backward(BackwardArgs a, const LaunchPlan& plan, const EpilogueOperand& addend,
                            const Launch& on) {
  if (plan.family == Family::matmul) a.base = {};
  const bool adapter = a.lora.A.data != nullptr;
  if (plan.lora_on_tensor_cores) {
    if (adapter || a.dbias.data) LK_TRY(lora_gradients(a, on));
  } else {
    if (adapter && (a.dx.data || a.dA.data)) LK_TRY(simt_ds(a, on));
    LK_TRY(simt_adapter_gradients(a, on));
    if (a.dbias.data) LK_TRY(bias_gradient(a, on));
  }
  if (!a.dx.data || a.dx.rows == 0) return cudaSuccess;
  return plan.rest == Family::mma ? mma_dx(a, addend, on) : simt_dx(a, addend, on);
}

LaunchPlan plan_linear(const LinearArgs& a, int device) {
  return plan(a, a.lora.A.data || a.bias.data, device);
}

int linear(const LinearArgs& a, const LaunchPlan& plan, const Launch& on) {
  return linear(a, plan, {}, on);
}

LaunchPlan plan_linear_backward(const BackwardArgs& a, int device) {
  return plan(a, a.lora.A.data != nullptr, device);
}

int linear_backward(const BackwardArgs& a, const LaunchPlan& plan, const Launch& on) {
  return linear_backward(a, plan, {}, on);
}

}  // namespace lk::cuda
