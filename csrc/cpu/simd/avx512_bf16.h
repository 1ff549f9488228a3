// AVX-512 vocabulary with BF16 (Zen 4 and later, Cooper Lake, Sapphire Rapids): products of pairs
// of bfloat16 numbers, for kernels/gemv_pairs.inl and gemm_pairs.inl.
#pragma once

#include "cpu/simd/avx512.h"

#define LK_DOT2

constexpr int kPairWide = 12;        // up to so many rows, a register tile of skinny_pairs.inl is
                                     // two vectors wide
constexpr int kMaxPairs = 16;        // its rows
constexpr int kMaxSkinnyPairs = 32;  // rows of x up to which it beats a packed panel

// Lane j of sum + a[2j] b[2j] + a[2j + 1] b[2j + 1], 2W bfloat16 numbers each. Subnormal numbers
// count as zero. Written out, as dot4 is.
inline vf dot2(vf sum, vi a, vi b) {
  __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
  return sum;
}
// The same with one pair b for all lanes.
inline vf dot2(vf sum, vi a, const uint32_t& b) {
  __asm__("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(a), "m"(b));
  return sum;
}

// The 16 codes rounded to bfloat16, twice: vpermw reads five bits of an index, and a nibble is
// four.
struct PairLut {
  vi entries;
};
inline PairLut make_pair_lut(const float* code) {
  uint16_t entry[32];
  for (int i = 0; i < 32; ++i) entry[i] = bf16_from_float(code[i & 15]);
  return {loadi(entry)};
}
// Of the eight weights of each packed dword (high nibble of byte 0 first), weights S and 4 + S as a
// pair, S = 0..3.
template <int S>
inline vi pair_of(const PairLut& table, vi dwords) {
  constexpr int kShift = S == 0 ? 4 : S == 1 ? 0 : S == 2 ? 12 : 8;
  return _mm512_permutexvar_epi16(kShift ? _mm512_srli_epi16(dwords, kShift) : dwords,
                                  table.entries);
}
// The same of two rows of packed dwords: weight S of each, as a pair, S = 0..7.
struct TwoRows {
  vi low, high;  // weights 0..3 and 4..7 of both rows, in the halves of each dword
};
inline TwoRows two_rows(vi first, vi second) {
  constexpr __mmask32 kOdd = 0xaaaaaaaau;
  return {_mm512_mask_mov_epi16(first, kOdd, shl<16>(second)),
          _mm512_mask_mov_epi16(shr<16>(first), kOdd, second)};
}
template <int S>
inline vi pair_of(const PairLut& table, const TwoRows& rows) {
  return pair_of<S & 3>(table, S < 4 ? rows.low : rows.high);
}

inline vi permute(vi v, vi index) { return _mm512_permutexvar_epi32(index, v); }

// Lane j: a[j] in its lower half and b[j] in its upper half, each rounded to nearest even.
inline vi round_pairs(vf a, vf b) {
  uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return _mm512_permutexvar_epi16(loadi(order), (vi)_mm512_cvtne2ps_pbh(b, a));
}
// Of each eight numbers x: the dwords (x[0], x[4]), (x[1], x[5]), (x[2], x[6]), (x[3], x[7]).
inline vi pairs_of_eight(vi x) { return _mm512_unpacklo_epi16(x, _mm512_bsrli_epi128(x, 8)); }
