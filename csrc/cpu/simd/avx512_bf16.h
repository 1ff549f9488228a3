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
// A packed dword holds eight weights, the high nibble of byte 0 first. This looks up weights S and
// 4 + S of each dword, S = 0..3, and gives them as a pair.
template <int S>
inline vi pair_of(const PairLut& table, vi dwords) {
  constexpr int kShift = S == 0 ? 4 : S == 1 ? 0 : S == 2 ? 12 : 8;
  return _mm512_permutexvar_epi16(kShift ? _mm512_srli_epi16(dwords, kShift) : dwords,
                                  table.entries);
}

// Lane j: a[j] in its lower half and b[j] in its upper half, each rounded to nearest even.
inline vi round_pairs(vf a, vf b) {
  uint16_t order[32];
  for (int i = 0; i < 32; ++i) order[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return _mm512_permutexvar_epi16(loadi(order), (vi)_mm512_cvtne2ps_pbh(b, a));
}
// Of each eight numbers x: the dwords (x[0], x[4]), (x[1], x[5]), (x[2], x[6]), (x[3], x[7]).
inline vi pairs_of_eight(vi x) { return _mm512_unpacklo_epi16(x, _mm512_bsrli_epi128(x, 8)); }

// -- bytes that are looked up ---------------------------------------------------------------------
// vpermi2b looks 64 bytes up among 128, so a table of 256 numbers is four planes, byte b of every
// number, and 64 numbers take eight of them. vgatherdps takes several times as long on AMD. Cooper
// Lake, which has no VBMI, gathers.

#define LK_NUMBER_TABLE

struct NumberTable {
  alignas(64) uint8_t plane[4][256];
  const float* numbers;
  bool has_planes;

  // A null table is never looked up.
  explicit NumberTable(const float* table)
      : numbers(table), has_planes(table && __builtin_cpu_supports("avx512vbmi")) {
    for (int i = 0; has_planes && i < 256; i += kLanes)
      for (int b = 0; b < 4; ++b)
        _mm_store_si128(reinterpret_cast<__m128i*>(plane[b] + i),
                        _mm512_cvtepi32_epi8(_mm512_srli_epi32(loadi(table + i), 8 * b)));
  }
  // dst[i] = the number of index[i], 0 <= i < n.
  void look_up(float* dst, const uint8_t* index, int64_t n) const {
    int64_t i = 0;
    if (has_planes) {
      for (; i < n; i += 64)
        look_up_64(dst + i, index + i, static_cast<int>(n - i < 64 ? n - i : 64));
      return;
    }
    for (; i + kLanes <= n; i += kLanes) store(dst + i, gather(numbers, load_u8(index + i)));
    for (; i < n; ++i) dst[i] = numbers[index[i]];
  }

 private:
  // Byte b of 64 numbers. `upper`: which of them are in the upper half of the table.
  __attribute__((target("avx512vbmi"))) vi byte_of(int b, vi index, __mmask64 upper) const {
    const vi low = _mm512_permutex2var_epi8(loadi(plane[b]), index, loadi(plane[b] + 64));
    const vi high = _mm512_permutex2var_epi8(loadi(plane[b] + 128), index, loadi(plane[b] + 192));
    return _mm512_mask_blend_epi8(upper, low, high);
  }
  __attribute__((target("avx512vbmi"))) void look_up_64(float* dst, const uint8_t* index,
                                                        int n) const {
    // Unpacking works within quarters of a vector, four bytes of each at a time, so index 16q + 4l
    // + e of memory goes to place 16l + 4q + e.
    const vi order = _mm512_set_epi32(0x3f3e3d3c, 0x2f2e2d2c, 0x1f1e1d1c, 0x0f0e0d0c,  //
                                      0x3b3a3938, 0x2b2a2928, 0x1b1a1918, 0x0b0a0908,  //
                                      0x37363534, 0x27262524, 0x17161514, 0x07060504,  //
                                      0x33323130, 0x23222120, 0x13121110, 0x03020100);
    const __mmask64 present = n == 64 ? ~__mmask64{0} : (__mmask64{1} << n) - 1;
    const vi at = _mm512_permutexvar_epi8(order, _mm512_maskz_loadu_epi8(present, index));
    const __mmask64 upper = _mm512_movepi8_mask(at);
    const vi b0 = byte_of(0, at, upper), b1 = byte_of(1, at, upper);
    const vi b2 = byte_of(2, at, upper), b3 = byte_of(3, at, upper);
    const vi low01 = _mm512_unpacklo_epi8(b0, b1), high01 = _mm512_unpackhi_epi8(b0, b1);
    const vi low23 = _mm512_unpacklo_epi8(b2, b3), high23 = _mm512_unpackhi_epi8(b2, b3);
    const vi numbers_of[4] = {
        _mm512_unpacklo_epi16(low01, low23), _mm512_unpackhi_epi16(low01, low23),
        _mm512_unpacklo_epi16(high01, high23), _mm512_unpackhi_epi16(high01, high23)};
    for (int q = 0; q < 4; ++q)
      _mm512_mask_storeu_epi32(dst + 16 * q, static_cast<__mmask16>(present >> 16 * q),
                               numbers_of[q]);
  }
};
