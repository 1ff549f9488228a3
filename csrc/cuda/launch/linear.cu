// The linear operators for the C interface: which family runs, and in which order the parts run.
#include <algorithm>

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
  const bool tile = tile_takes(a);
  if (rows.rows > (tile ? kMatmulRows : kMatmulRowsGeneral)) return Family::matmul;
  return tile ? Family::tile : Family::simt;
}

Family family(const LinearArgs& a) {
  if (a.base.quantized && a.x.rows > 0 && decode_takes(a)) return Family::decode;
  return family_of(a, a.x);
}
Family family(const BackwardArgs& a) {
  // Without dx there is no product with the base.
  return a.dx.data ? family_of(a, a.dy) : Family::simt;
}

}  // namespace

cudaError_t linear(const LinearArgs& a, const Addend& addend, const Launch& on) {
  if (a.x.rows == 0) return cudaSuccess;
  if (a.base.quantized && decode_takes(a)) return decode_linear(a, addend, on);
  if (a.lora.A.data) LK_TRY(lora_takes(a) ? lora_shrink(a, on) : simt_shrink(a, on));
  return tile_takes(a) ? tile_linear(a, addend, on) : simt_linear(a, addend, on);
}

cudaError_t linear_backward(const BackwardArgs& a, const Addend& addend, const Launch& on) {
  const bool adapter = a.lora.A.data != nullptr, some = adapter || a.dbias.data;
  if (some && lora_takes(a)) {
    LK_TRY(lora_gradients(a, on));
  } else {
    if (adapter && (a.dx.data || a.dA.data)) LK_TRY(simt_ds(a, on));
    LK_TRY(simt_adapter_gradients(a, on));
    if (a.dbias.data) LK_TRY(bias_gradient(a, on));
  }
  if (!a.dx.data || a.dx.rows == 0) return cudaSuccess;
  return tile_takes(a) ? tile_dx(a, addend, on) : simt_dx(a, addend, on);
}

}  // namespace lk::cuda

using namespace lk;

Plan lk_cuda_plan_linear(const LinearArgs* args, int device) {
  LinearArgs a = *args;
  const Family family = cuda::family(a);
  const bool has_rest = a.lora.A.data || a.bias.data;
  if (family == Family::decode) return {family, has_rest, cuda::decode_workspace(a, device)};
  if (family == Family::matmul) a.base = {};
  return {family, has_rest,
          std::max(cuda::lora_takes(a) ? cuda::lora_workspace(a, device) : 0,
                   cuda::tile_takes(a) ? cuda::tile_workspace(a, device) : 0)};
}

int lk_cuda_linear(const LinearArgs* args, const Launch* on) {
  return cuda::linear(*args, {}, *on);
}

Plan lk_cuda_plan_linear_backward(const BackwardArgs* args, int device) {
  BackwardArgs a = *args;
  const Family family = cuda::family(a);
  if (family == Family::matmul) a.base = {};
  return {family, a.lora.A.data != nullptr,
          std::max(cuda::lora_takes(a) ? cuda::lora_workspace(a, device) : 0,
                   cuda::tile_takes(a) ? cuda::tile_workspace(a, device) : 0)};
}

int lk_cuda_linear_backward(const BackwardArgs* args, const Launch* on) {
  return cuda::linear_backward(*args, {}, *on);
}
