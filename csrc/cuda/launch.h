// Starting a kernel: one function for the GPU and the emulator, which remembers what failed.
#pragma once

#include <cuda_runtime.h>

#include "cuda/api.h"

namespace lk::cuda {

struct Shape {
  dim3 blocks, threads;
  size_t shared_bytes = 0;
  // The kernel may start before the one ahead of it has completed; it calls
  // ptx::wait_for_previous_kernel() before it reads what that one wrote.
  bool overlaps_previous = false;
};

// Returns from the calling function if a launch failed.
#define LK_TRY(call) \
  if (const cudaError_t error_ = (call); error_ != cudaSuccess) return error_

// Records the failure for CudaTable::failure() and gives it back. `detail` may be empty.
cudaError_t failed(cudaError_t error, const char* kernel, const Shape& shape, int device,
                   const char* detail);

struct DeviceInfo {
  int multiprocessors = 0, major = 0, minor = 0;
  int64_t l2_bytes = 0;
};
// Asks the runtime each time; all is zero if that fails. The emulator says what an H200 would.
DeviceInfo device_info(int device);

inline bool is_aligned(const void* p, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(p) % static_cast<uintptr_t>(bytes) == 0;
}

template <class T>
struct AsIs {
  using type = T;
};

#if defined(LOWRANK_EMULATOR)

template <class... P>
cudaError_t launch(const char* name, const Launch& on, const Shape& shape, void (*kernel)(P...),
                   typename AsIs<P>::type... args) {
  auto body = [&] { kernel(args...); };
  const auto index = [](dim3 d) { return emulator::Index{d.x, d.y, d.z}; };
  const char* problem = emulator::run(
      index(shape.blocks), index(shape.threads), shape.shared_bytes,
      [](void* context) { (*static_cast<decltype(body)*>(context))(); }, &body);
  if (*problem == '\0') return cudaSuccess;
  return failed(cudaErrorLaunchFailure, name, shape, on.device, problem);
}

#else

template <class... P>
cudaError_t launch(const char* name, const Launch& on, const Shape& shape, void (*kernel)(P...),
                   typename AsIs<P>::type... args) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != on.device) error = cudaSetDevice(on.device);
  // Above 48 KiB a kernel has to ask.
  if (error == cudaSuccess && shape.shared_bytes > 48 << 10)
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(shape.shared_bytes));
  if (error == cudaSuccess) {
    cudaLaunchAttribute overlap;
    overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    overlap.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t config = {};
    config.gridDim = shape.blocks;
    config.blockDim = shape.threads;
    config.dynamicSmemBytes = shape.shared_bytes;
    config.stream = static_cast<cudaStream_t>(on.stream);
    config.attrs = &overlap;
    config.numAttrs = shape.overlaps_previous && device_info(on.device).major >= 9 ? 1 : 0;
    error = cudaLaunchKernelEx(&config, kernel, args...);
  }
  if (error == cudaSuccess) return error;
  cudaGetLastError();  // a failed launch is not left behind for the next caller
  return failed(error, name, shape, on.device, "");
}

#endif

}  // namespace lk::cuda
