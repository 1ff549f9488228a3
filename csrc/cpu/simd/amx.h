// The AVX-512 vocabulary with BF16, which every CPU with AMX has, and a mark that there are the
// tile registers of AMX, which the code in cpu/amx uses directly.
#pragma once

#include "cpu/simd/avx512_bf16.h"

#define LK_AMX
