// The kernels for neon_bf16: those for neon, and 16-bit activations on pairs of bfloat16.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "common/half.h"
#include "cpu/table.h"

// The target is in force to the end of the file: templates are instantiated there.
#pragma GCC target("arch=armv8.2-a+bf16")

namespace lk {
namespace {
#include "cpu/simd/neon_bf16.h"

#include "cpu/kernels/all.inl"
}  // namespace

LK_DEFINE_KERNELS(kNeonBf16Table, "neon_bf16");
}  // namespace lk
#endif
