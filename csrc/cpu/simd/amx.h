// AVX-512 vocabulary, and tile registers: kernels/tiles.inl.
#pragma once

#include "cpu/simd/avx512.h"

#define LK_TILES
