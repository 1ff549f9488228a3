// The kernels for avx2.
#if defined(__x86_64__)
#include <immintrin.h>

#include "common/half.h"
#include "cpu/table.h"

// The target is in force to the end of the file: templates are instantiated there.
#pragma GCC target("avx2,fma,f16c")

namespace lk {
namespace {
#include "cpu/simd/avx2.h"

#include "cpu/kernels/all.inl"
}  // namespace

LK_DEFINE_KERNELS(kAvx2Table, "avx2");
}  // namespace lk
#endif
