// The table of the library, and what is not a kernel: errors, the device, how it was built.
#include <cstdio>

#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

thread_local char failure[512];

}  // namespace

cudaError_t failed(cudaError_t error, const char* kernel, const Shape& shape, int device,
                   const char* detail) {
  const DeviceInfo info = device_info(device);
  char hint[160] = "";
  if (error == cudaErrorNoKernelImageForDevice) {
    // An H100 has instructions of its own (9.0a), which code for 9.0 leaves aside.
    const char* variant = info.major == 9 && info.minor == 0 ? "a" : "";
    std::snprintf(hint, sizeof hint,
                  "; the library has code for %s: rebuild with TORCH_CUDA_ARCH_LIST=\"%d.%d%s\" "
                  "LOWRANK_BUILD_CUDA=1",
                  lk_cuda_architectures(), info.major, info.minor, variant);
  }
  std::snprintf(failure, sizeof failure,
                "%s in %s, grid (%u, %u, %u), block (%u, %u, %u), %zu bytes of shared memory, "
                "device %d of capability %d.%d%s%s%s",
                cudaGetErrorName(error), kernel, shape.blocks.x, shape.blocks.y, shape.blocks.z,
                shape.threads.x, shape.threads.y, shape.threads.z, shape.shared_bytes, device,
                info.major, info.minor, *detail ? ": " : "", detail, hint);
  return error;
}

DeviceInfo device_info([[maybe_unused]] int device) {
#if defined(LOWRANK_EMULATOR)
  return {132, 9, 0, 50 << 20};
#else
  const auto get = [device](cudaDeviceAttr attribute) {
    int value = 0;
    return cudaDeviceGetAttribute(&value, attribute, device) == cudaSuccess ? value : 0;
  };
  return {get(cudaDevAttrMultiProcessorCount), get(cudaDevAttrComputeCapabilityMajor),
          get(cudaDevAttrComputeCapabilityMinor), get(cudaDevAttrL2CacheSize)};
#endif
}

}  // namespace lk::cuda

const lk::CudaTable* lk_cuda_kernels(void) {
  using namespace lk::cuda;
  static const lk::CudaTable table = {sizeof(lk::CudaTable),
                                      quantize,
                                      double_quantize_workspace,
                                      double_quantize,
                                      dequantize,
                                      plan_linear,
                                      linear,
                                      plan_linear_backward,
                                      linear_backward,
                                      plan_multi,
                                      multi,
                                      plan_multi_backward,
                                      multi_backward,
                                      grouped,
                                      grouped_backward,
                                      [] { return static_cast<const char*>(failure); }};
  return &table;
}

const char* lk_cuda_architectures(void) {
#if defined(LOWRANK_EMULATOR)
  return "emulator";
#else
  return LOWRANK_CUDA_ARCHITECTURES;
#endif
}

#define LK_TEXT(x) #x
#define LK_VALUE(x) LK_TEXT(x)

const char* lk_cuda_build_info(void) {
#if defined(LOWRANK_EMULATOR)
  return "liblowrank_cuda on the emulator, g++ " __VERSION__;
#else
  return "liblowrank_cuda, nvcc " LK_VALUE(__CUDACC_VER_MAJOR__) "." LK_VALUE(
      __CUDACC_VER_MINOR__) " for " LOWRANK_CUDA_ARCHITECTURES;
#endif
}
