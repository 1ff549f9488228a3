// The AVX-512 vocabulary, and a mark that there are the tile registers of AMX, which the code in
// cpu/amx uses directly.
#pragma once

#include "cpu/simd/avx512.h"

#define LK_AMX
