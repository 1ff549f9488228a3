// The kernels for neon, which every aarch64 CPU has.
#if defined(__aarch64__)
#include <arm_neon.h>

#include "common/half.h"
#include "cpu/table.h"

// The target is in force to the end of the file: templates are instantiated there.
#pragma GCC target("arch=armv8-a")

namespace lk {
namespace {
#include "cpu/simd/neon.h"

#include "cpu/kernels/all.inl"
}  // namespace

LK_DEFINE_KERNELS(kNeonTable, "neon");
}  // namespace lk
#endif
