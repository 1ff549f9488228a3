// C interface of liblowrank_cuda.so: one table of launchers of the CUDA kernels. No torch. All
// launchers are asynchronous on `Launch::stream`, allocate nothing, never synchronise and keep no
// state between calls, so they can be captured into a CUDA graph. Pointers of the argument structs
// are device memory.
#pragma once

#include "common/params.h"

#define LK_CUDA_API extern "C" __attribute__((visibility("default")))

namespace lk {

// A launcher's device and stream, and device scratch memory of at least the size that its plan asks
// for (256-byte aligned).
struct Launch {
  int device = 0;
  void* stream = nullptr;  // cudaStream_t
  void* workspace = nullptr;
};

// How a linear operator will run. Within one family the bits of a row depend on nothing but that
// row, the weight and the adapter.
enum class Family : int {
  simt,    // float32 arithmetic, any dtype and shape
  gemv,    // few rows: weights from memory to registers, once
  mma,     // tensor cores on tiles of decoded weights
  matmul,  // dequantized in pieces for the caller's dense product; only bias and adapter run here
};
// What was decided about one call: made by a plan_* function from the arguments, and handed to the
// launcher with the same arguments.
struct LaunchPlan {
  Family family = Family::simt;
  // Family::matmul: the family that computes adapter and bias, to which the caller adds its
  // product.
  Family rest = Family::simt;
  bool has_rest = true;               // matmul: there is something that the product is added to
  bool lora_on_tensor_cores = false;  // the skinny products of the adapter
  int64_t workspace = 0;              // bytes
};

// Everything the library does, as KernelTable has it for the CPU. Launchers return a cudaError_t;
// after a failure failure() tells which kernel, grid and architecture, for this thread.
struct CudaTable {
  int64_t size = sizeof(CudaTable);  // of the table that the library was compiled with

  int (*quantize)(const QuantizeArgs&, const Launch&);
  int64_t (*double_quantize_workspace)(int64_t blocks);
  int (*double_quantize)(const DoubleQuantizeArgs&, const Launch&);
  // Rows [row, row + out.rows) and columns [column, column + out.cols) of the weight.
  int (*dequantize)(const Weight4&, int64_t row, int64_t column, const MutMatrix& out,
                    const Launch&);
  // Under Family::matmul these compute adapter and bias alone, and the caller adds the product.
  LaunchPlan (*plan_linear)(const LinearArgs&, int device);
  int (*linear)(const LinearArgs&, const LaunchPlan&, const Launch&);
  LaunchPlan (*plan_linear_backward)(const BackwardArgs&, int device);
  int (*linear_backward)(const BackwardArgs&, const LaunchPlan&, const Launch&);
  // Many adapters in one batch; a base and Family::matmul likewise.
  LaunchPlan (*plan_multi)(const MultiArgs&, int device);
  int (*multi)(const MultiArgs&, const LaunchPlan&, const Launch&);
  LaunchPlan (*plan_multi_backward)(const MultiBackwardArgs&, int device);
  int (*multi_backward)(const MultiBackwardArgs&, const LaunchPlan&, const Launch&);
  int (*grouped)(const GroupedArgs&, const Launch&);
  int (*grouped_backward)(const GroupedBackwardArgs&, const Launch&);

  const char* (*failure)();
};

}  // namespace lk

LK_CUDA_API const lk::CudaTable* lk_cuda_kernels(void);
// Python asks for these without torch: the architectures that were compiled in, written as in
// TORCH_CUDA_ARCH_LIST ("8.0 9.0a 12.0+PTX"), and how.
LK_CUDA_API const char* lk_cuda_architectures(void);
LK_CUDA_API const char* lk_cuda_build_info(void);
