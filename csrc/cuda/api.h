// C interface of liblowrank_cuda.so: launchers of the CUDA kernels. No torch. All are asynchronous
// on `launch->stream`, allocate nothing, never synchronise and keep no state between calls, so they
// can be captured into a CUDA graph. Pointers of the argument structs are device memory.
#pragma once

#include "common/params.h"

#define LK_CUDA_API extern "C" __attribute__((visibility("default")))

namespace lk {

// Where a launcher runs, and device scratch memory of at least the size its plan asked for
// (256-byte aligned).
struct Launch {
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
  void* workspace = nullptr;
};

// How a linear operator will run. Within one family the bits of a row depend on nothing but that
// row, the weight and the adapter.
enum class Family : int {
  simt,    // float32 arithmetic, any dtype and shape
  decode,  // few rows: weights from memory to registers, once
  tile,    // tensor cores on tiles of decoded weights
  matmul,  // dequantized in pieces for the caller's dense product; only bias and adapter run here
};
struct Plan {
  Family family = Family::simt;
  bool has_rest = true;   // matmul: there is something that the product is added to
  int64_t workspace = 0;  // bytes
};

}  // namespace lk

// Each launcher returns a cudaError_t; after a failure lk_cuda_failure() tells which kernel, grid
// and architecture, for this thread.
LK_CUDA_API int lk_cuda_quantize(const lk::QuantizeArgs* args, const lk::Launch* launch);
LK_CUDA_API int64_t lk_cuda_double_quantize_workspace(int64_t blocks);
LK_CUDA_API int lk_cuda_double_quantize(const lk::DoubleQuantizeArgs* args,
                                        const lk::Launch* launch);
// Rows [row, row + out->rows) and columns [column, column + out->cols) of the weight.
LK_CUDA_API int lk_cuda_dequantize(const lk::Weight4* weight, int64_t row, int64_t column,
                                   const lk::MutMatrix* out, const lk::Launch* launch);
// A base that is neither quantized nor dense counts as zero: what is left is adapter and bias.
LK_CUDA_API lk::Plan lk_cuda_plan_linear(const lk::LinearArgs* args, int device);
LK_CUDA_API int lk_cuda_linear(const lk::LinearArgs* args, const lk::Launch* launch);
LK_CUDA_API lk::Plan lk_cuda_plan_linear_backward(const lk::BackwardArgs* args, int device);
LK_CUDA_API int lk_cuda_linear_backward(const lk::BackwardArgs* args, const lk::Launch* launch);
// Many adapters in one batch. The arguments stay the same whatever the family is: with a base and
// Family::matmul y is bias and adapters, dx the adapters' term; the caller adds the product.
LK_CUDA_API lk::Plan lk_cuda_plan_multi(const lk::MultiArgs* args, int device);
LK_CUDA_API int lk_cuda_multi(const lk::MultiArgs* args, const lk::Launch* launch);
LK_CUDA_API lk::Plan lk_cuda_plan_multi_backward(const lk::MultiBackwardArgs* args, int device);
LK_CUDA_API int lk_cuda_multi_backward(const lk::MultiBackwardArgs* args, const lk::Launch* launch);

LK_CUDA_API const char* lk_cuda_failure(void);
// Architectures compiled in, as in TORCH_CUDA_ARCH_LIST: "8.0 9.0a 12.0+PTX".
LK_CUDA_API const char* lk_cuda_architectures(void);
LK_CUDA_API const char* lk_cuda_build_info(void);
