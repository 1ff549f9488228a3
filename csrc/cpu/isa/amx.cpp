// The kernels for amx: those for avx512_bf16, and large products on the tile registers of AMX.
#if defined(__x86_64__)
#include <immintrin.h>

#include "common/half.h"
#include "cpu/table.h"

// GCC 12 warns of its own intrinsics' undefined vectors.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
// The target is in force to the end of the file: templates are instantiated there.
#pragma GCC target( \
    "avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c,prefer-vector-width=512,avx512vbmi,avx512bf16,amx-tile,amx-bf16,amx-int8")

namespace lk {
namespace {
#ifdef LOWRANK_EMULATED_AMX
#include "cpu/amx/emulated_tiles.h"
#endif
#include "cpu/simd/amx.h"

#include "cpu/kernels/all.inl"
}  // namespace

LK_DEFINE_KERNELS(kAmxTable, "amx");
}  // namespace lk
#endif
