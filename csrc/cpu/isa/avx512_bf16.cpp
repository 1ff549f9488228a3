// The kernels for avx512_bf16: those for avx512, and 16-bit activations on pairs of bfloat16.
#if defined(__x86_64__)
#include <immintrin.h>

#include "common/half.h"
#include "cpu/table.h"

// GCC 12 warns of its own intrinsics' undefined vectors.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
// In force to the end of the file: templates are instantiated there.
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512,avx512bf16")

namespace lk {
namespace {
#include "cpu/simd/avx512_bf16.h"

#include "cpu/kernels/all.inl"
}  // namespace

LK_DEFINE_KERNELS(kAvx512Bf16Table, "avx512_bf16");
}  // namespace lk
#endif
