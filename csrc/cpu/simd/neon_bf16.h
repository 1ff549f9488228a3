// NEON vocabulary with the BF16 extension (Armv8.6: Neoverse V1 and N2, Apple M2 and later):
// products of pairs of bfloat16 numbers. The names are explained in avx512_bf16.h.
//
// bfmmla is not used: it multiplies 2 x 4 by 4 x 2 numbers, so a register would hold the sums of
// two rows of x and two outputs, where this vocabulary's lanes are outputs of one row.
#pragma once

#include "cpu/simd/neon.h"

#define LK_DOT2
constexpr int kPairWide = 5;
constexpr int kMaxPairs = 10;
constexpr int kMaxSkinnyPairs = 16;

// Products and sums are rounded to odd, which errs by less than one unit of the last place, and
// subnormal numbers count as zero.
inline float32x4_t dot2(float32x4_t sum, uint32x4_t a, uint32x4_t b) {
  return vbfdotq_f32(sum, vreinterpretq_bf16_u32(a), vreinterpretq_bf16_u32(b));
}
inline vf dot2(vf sum, vi a, vi b) {
  return {dot2(sum.low, a.low, b.low), dot2(sum.high, a.high, b.high)};
}
inline vf dot2(vf sum, vi a, const uint32_t& b) {
  const bfloat16x4_t pair = vcreate_bf16(b);
  return {vbfdotq_lane_f32(sum.low, vreinterpretq_bf16_u32(a.low), pair, 0),
          vbfdotq_lane_f32(sum.high, vreinterpretq_bf16_u32(a.high), pair, 0)};
}

// The codes rounded to bfloat16, byte by byte.
struct PairLut {
  HalfLut bytes;
};
inline PairLut make_pair_lut(const float* code) {
  uint16_t entry[16];
  for (int i = 0; i < 16; ++i) entry[i] = bf16_from_float(code[i]);
  return {make_half_lut(entry)};
}
// A lookup of the high or the low halves of all bytes finds the weights of two S; the compiler
// makes it once for both.
template <int S>
inline uint32x4_t pair_of(const PairLut& table, uint32x4_t dwords) {
  const uint8x16_t packed = vreinterpretq_u8_u32(dwords);
  const uint8x16_t index = S % 2 == 0 ? vshrq_n_u8(packed, 4) : vandq_u8(packed, vdupq_n_u8(15));
  const uint8x16_t low = vqtbl1q_u8(table.bytes.low, index),
                   high = vqtbl1q_u8(table.bytes.high, index);
  return vreinterpretq_u32_u8(S < 2 ? vtrn1q_u8(low, high) : vtrn2q_u8(low, high));
}
template <int S>
inline vi pair_of(const PairLut& table, vi dwords) {
  return {pair_of<S>(table, dwords.low), pair_of<S>(table, dwords.high)};
}

inline uint32x4_t round_pairs(float32x4_t a, float32x4_t b) {
  const uint16x8_t first = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(a)),
                   second = vreinterpretq_u16_bf16(vcvtq_low_bf16_f32(b));
  return vreinterpretq_u32_u16(vzip1q_u16(first, second));
}
inline vi round_pairs(vf a, vf b) {
  return {round_pairs(a.low, b.low), round_pairs(a.high, b.high)};
}
inline uint32x4_t pairs_of_eight(uint32x4_t x) {
  const uint16x8_t numbers = vreinterpretq_u16_u32(x);
  return vreinterpretq_u32_u16(vzip1q_u16(numbers, vextq_u16(numbers, numbers, 4)));
}
inline vi pairs_of_eight(vi x) { return {pairs_of_eight(x.low), pairs_of_eight(x.high)}; }
