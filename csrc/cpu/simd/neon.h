// Advanced SIMD (NEON) vocabulary of aarch64: eight lanes in two registers. The names are explained
// in scalar.h. The 32 registers of four lanes hold as much as the 16 of AVX2, so the tiles have the
// same sizes.
#pragma once

constexpr int kLanes = 8;
constexpr int kMicroRows = 6;
constexpr int kMicroVectors = 2;
constexpr int kDotRows = 3;
constexpr int kDotRanks = 4;
constexpr int kSkinnyRows = 8;
constexpr int kMaxSkinny = 8;
constexpr int kSkinnyWide = 0;
constexpr int kLookupRows = 1;

struct vf {
  float32x4_t low, high;
};
struct vi {
  uint32x4_t low, high;
};
struct Lut {
  uint8x16x4_t entries;  // the bytes of the table as they lie
  uint8x16_t plane[4];   // byte b of entries 0..15
};

inline vf set1(float v) { return {vdupq_n_f32(v), vdupq_n_f32(v)}; }
inline vi set1i(uint32_t v) { return {vdupq_n_u32(v), vdupq_n_u32(v)}; }
inline vf zero() { return set1(0.0f); }
inline vf load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline void store(float* p, vf v) {
  vst1q_f32(p, v.low);
  vst1q_f32(p + 4, v.high);
}
inline vi loadi(const void* p) {
  const uint8_t* bytes = static_cast<const uint8_t*>(p);
  return {vreinterpretq_u32_u8(vld1q_u8(bytes)), vreinterpretq_u32_u8(vld1q_u8(bytes + 16))};
}
inline void storei(uint32_t* p, vi v) {
  vst1q_u32(p, v.low);
  vst1q_u32(p + 4, v.high);
}
inline vi loadi_partial(const void* p, int count) {
  uint32_t lane[kLanes] = {};
  __builtin_memcpy(lane, p, 4 * static_cast<size_t>(count));
  return loadi(lane);
}
inline vi load_u8(const uint8_t* p) {
  const uint16x8_t words = vmovl_u8(vld1_u8(p));
  return {vmovl_u16(vget_low_u16(words)), vmovl_high_u16(words)};
}
inline vf as_float(vi v) { return {vreinterpretq_f32_u32(v.low), vreinterpretq_f32_u32(v.high)}; }
inline vi as_bits(vf v) { return {vreinterpretq_u32_f32(v.low), vreinterpretq_u32_f32(v.high)}; }
inline vf add(vf a, vf b) { return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)}; }
inline vf mul(vf a, vf b) { return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)}; }
inline vf fma(vf a, vf b, vf c) {
  return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
}
inline void in_register(vf& v) { __asm__("" : "+w"(v.low), "+w"(v.high)); }
inline float hsum(vf v) { return vaddvq_f32(vaddq_f32(v.low, v.high)); }
// The operators, for S = 0 as well, which the intrinsics refuse.
template <int S>
inline vi shr(vi v) {
  return {v.low >> S, v.high >> S};
}
template <int S>
inline vi shl(vi v) {
  return {v.low << S, v.high << S};
}
inline vi andi(vi a, vi b) { return {vandq_u32(a.low, b.low), vandq_u32(a.high, b.high)}; }
inline vi abs_bits(vf v) { return andi(as_bits(v), set1i(0x7fffffffu)); }
inline vi maxi(vi a, vi b) { return {vmaxq_u32(a.low, b.low), vmaxq_u32(a.high, b.high)}; }
inline uint32_t hmax(vi v) { return vmaxvq_u32(vmaxq_u32(v.low, v.high)); }
inline vi addi(vi a, vi b) { return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)}; }
// All bits of a lane where x > t.
inline vi greater(vf x, vf t) { return {vcgtq_f32(x.low, t.low), vcgtq_f32(x.high, t.high)}; }
inline vi add_if_greater(vi idx, vf x, vf t, uint32_t step) {
  return addi(idx, andi(greater(x, t), set1i(step)));
}
inline int count_greater(vf x, vf t) {
  const vi all = greater(x, t);
  return -static_cast<int>(vaddvq_u32(vaddq_u32(all.low, all.high)));
}
inline void even_odd(vf a, vf b, vf& even, vf& odd) {
  even = {vuzp1q_f32(a.low, a.high), vuzp1q_f32(b.low, b.high)};
  odd = {vuzp2q_f32(a.low, a.high), vuzp2q_f32(b.low, b.high)};
}
inline void store_bytes(void* p, vi v) {
  const uint16x8_t words = vuzp1q_u16(vreinterpretq_u16_u32(v.low), vreinterpretq_u16_u32(v.high));
  vst1_u8(static_cast<uint8_t*>(p), vmovn_u16(words));
}

inline Lut make_lut(const float* code) {
  Lut lut;
  uint8_t bytes[64];
  __builtin_memcpy(bytes, code, sizeof bytes);
  for (int i = 0; i < 4; ++i) lut.entries.val[i] = vld1q_u8(bytes + 16 * i);
  const uint8x16x4_t planes = vld4q_u8(bytes);
  for (int b = 0; b < 4; ++b) lut.plane[b] = planes.val[b];
  return lut;
}
// The places of the bytes of dwords, in a table of bytes.
inline uint8x16_t bytes_of(uint32x4_t index) {
  return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100u), index, vdupq_n_u32(0x04040404u)));
}
inline vf lut16(const Lut& lut, vi index) {
  const vi low_bits = andi(index, set1i(15));
  return {vreinterpretq_f32_u8(vqtbl4q_u8(lut.entries, bytes_of(low_bits.low))),
          vreinterpretq_f32_u8(vqtbl4q_u8(lut.entries, bytes_of(low_bits.high)))};
}
inline vf lut8(const Lut& lut, vi index) {
  const uint8x16x2_t entries = {{lut.entries.val[0], lut.entries.val[1]}};
  return {vreinterpretq_f32_u8(vqtbl2q_u8(entries, bytes_of(index.low))),
          vreinterpretq_f32_u8(vqtbl2q_u8(entries, bytes_of(index.high)))};
}
inline vf lut_nibbles(const Lut& lut, const uint8_t* p) {
  uint32_t bytes;
  __builtin_memcpy(&bytes, p, 4);
  const uint8x8_t packed = vreinterpret_u8_u32(vdup_n_u32(bytes));
  const uint8x16_t index =
      vcombine_u8(vzip1_u8(vshr_n_u8(packed, 4), vand_u8(packed, vdup_n_u8(15))), vdup_n_u8(0));
  const uint8x16_t low =
                       vzip1q_u8(vqtbl1q_u8(lut.plane[0], index), vqtbl1q_u8(lut.plane[1], index)),
                   high =
                       vzip1q_u8(vqtbl1q_u8(lut.plane[2], index), vqtbl1q_u8(lut.plane[3], index));
  const uint16x8_t a = vreinterpretq_u16_u8(low), b = vreinterpretq_u16_u8(high);
  return {vreinterpretq_f32_u16(vzip1q_u16(a, b)), vreinterpretq_f32_u16(vzip2q_u16(a, b))};
}
struct HalfLut {
  uint8x16_t low, high;  // bytes of the entries
};
inline HalfLut make_half_lut(const uint16_t* entries) {
  const uint8x16_t first = vreinterpretq_u8_u16(vld1q_u16(entries)),
                   second = vreinterpretq_u8_u16(vld1q_u16(entries + 8));
  return {vuzp1q_u8(first, second), vuzp2q_u8(first, second)};
}
inline void lut_halves(const HalfLut& table, const uint8_t* p, uint16_t* dst) {
  const uint8x16_t bytes = vld1q_u8(p);
  const uint8x16_t first = vshrq_n_u8(bytes, 4), second = vandq_u8(bytes, vdupq_n_u8(15));
  // The four bytes of each packed byte's two weights, one after the other.
  vst4q_u8(reinterpret_cast<uint8_t*>(dst),
           {{vqtbl1q_u8(table.low, first), vqtbl1q_u8(table.high, first),
             vqtbl1q_u8(table.low, second), vqtbl1q_u8(table.high, second)}});
}
// Byte by byte: four lookups give the bytes of 16 weights, which two rounds of transposing inside
// each dword put together.
struct NibbleWeights {
  vf weights[8];

  NibbleWeights() = default;
  __attribute__((always_inline)) NibbleWeights(const Lut& lut, vi packed) {
    for (int nibble = 0; nibble < 2; ++nibble) {
      float32x4_t low[4], high[4];
      look_up(lut, vreinterpretq_u8_u32(packed.low), nibble, low);
      look_up(lut, vreinterpretq_u8_u32(packed.high), nibble, high);
      for (int b = 0; b < 4; ++b) weights[2 * b + nibble] = {low[b], high[b]};
    }
  }
  // Lane j of of_byte[b] is the weight of the high (nibble 0) or the low half of byte b of dword j.
  __attribute__((always_inline)) static void look_up(const Lut& lut, uint8x16_t packed, int nibble,
                                                     float32x4_t (&of_byte)[4]) {
    const uint8x16_t index = nibble == 0 ? vshrq_n_u8(packed, 4) : vandq_u8(packed, vdupq_n_u8(15));
    const uint8x16_t b0 = vqtbl1q_u8(lut.plane[0], index), b1 = vqtbl1q_u8(lut.plane[1], index),
                     b2 = vqtbl1q_u8(lut.plane[2], index), b3 = vqtbl1q_u8(lut.plane[3], index);
    const uint16x8_t even01 = vreinterpretq_u16_u8(vtrn1q_u8(b0, b1)),
                     odd01 = vreinterpretq_u16_u8(vtrn2q_u8(b0, b1)),
                     even23 = vreinterpretq_u16_u8(vtrn1q_u8(b2, b3)),
                     odd23 = vreinterpretq_u16_u8(vtrn2q_u8(b2, b3));
    of_byte[0] = vreinterpretq_f32_u16(vtrn1q_u16(even01, even23));
    of_byte[1] = vreinterpretq_f32_u16(vtrn1q_u16(odd01, odd23));
    of_byte[2] = vreinterpretq_f32_u16(vtrn2q_u16(even01, even23));
    of_byte[3] = vreinterpretq_f32_u16(vtrn2q_u16(odd01, odd23));
  }
  template <int S>
  vf weight(const Lut&) const {
    return weights[S];
  }
};
inline vf gather(const float* table, vi index) {
  uint32_t at[kLanes];
  float value[kLanes];
  storei(at, index);
  for (int i = 0; i < kLanes; ++i) value[i] = table[at[i]];
  return load(value);
}
inline vi permute(vi v, vi index) {
  const uint8x16x2_t bytes = {{vreinterpretq_u8_u32(v.low), vreinterpretq_u8_u32(v.high)}};
  return {vreinterpretq_u32_u8(vqtbl2q_u8(bytes, bytes_of(index.low))),
          vreinterpretq_u32_u8(vqtbl2q_u8(bytes, bytes_of(index.high)))};
}
inline vf permute(vf v, vi index) { return as_float(permute(as_bits(v), index)); }

inline vf load_bf16(const uint16_t* p) {
  const uint16x8_t h = vld1q_u16(p), none = vdupq_n_u16(0);
  return {vreinterpretq_f32_u16(vzip1q_u16(none, h)), vreinterpretq_f32_u16(vzip2q_u16(none, h))};
}
inline void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
  const vi pairs = loadi(p);
  even = as_float(shl<16>(pairs));
  odd = as_float(andi(pairs, set1i(0xffff0000u)));
}
inline uint16x4_t round_to_bf16(float32x4_t v) {
  const uint32x4_t u = vreinterpretq_u32_f32(v), odd = (u >> 16) & vdupq_n_u32(1);
  const uint32x4_t rounded = u + (odd + vdupq_n_u32(0x7fff)), quiet = u | vdupq_n_u32(0x400000);
  return vshrn_n_u32(vbslq_u32(vceqq_f32(v, v), rounded, quiet), 16);
}
inline void store_bf16(uint16_t* p, vf v) {
  vst1q_u16(p, vcombine_u16(round_to_bf16(v.low), round_to_bf16(v.high)));
}
inline vf load_f16(const uint16_t* p) {
  const float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(p));
  return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
inline void store_f16(uint16_t* p, vf v) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcvt_high_f16_f32(vcvt_f16_f32(v.low), v.high)));
}

// Four rows of four lanes.
inline void transpose4(float32x4_t& a, float32x4_t& b, float32x4_t& c, float32x4_t& d) {
  const float64x2_t ab = vreinterpretq_f64_f32(vtrn1q_f32(a, b)),
                    ab_odd = vreinterpretq_f64_f32(vtrn2q_f32(a, b)),
                    cd = vreinterpretq_f64_f32(vtrn1q_f32(c, d)),
                    cd_odd = vreinterpretq_f64_f32(vtrn2q_f32(c, d));
  a = vreinterpretq_f32_f64(vzip1q_f64(ab, cd));
  b = vreinterpretq_f32_f64(vzip1q_f64(ab_odd, cd_odd));
  c = vreinterpretq_f32_f64(vzip2q_f64(ab, cd));
  d = vreinterpretq_f32_f64(vzip2q_f64(ab_odd, cd_odd));
}
inline void transpose(vf* r) {
  for (int i = 0; i < 8; i += 4) {
    transpose4(r[i].low, r[i + 1].low, r[i + 2].low, r[i + 3].low);
    transpose4(r[i].high, r[i + 1].high, r[i + 2].high, r[i + 3].high);
  }
  for (int i = 0; i < 4; ++i) {  // the upper right quarter and the lower left one change places
    const float32x4_t t = r[i].high;
    r[i].high = r[i + 4].low;
    r[i + 4].low = t;
  }
}

// -- int8 (explained in avx512.h) -----------------------------------------------------------------

#define LK_INT8
constexpr const char* kInt8 = "neon_dotprod";
constexpr int kByteZero = 0;

// Written out, for the compiler to use the instruction nowhere else. The assembler takes it for a
// later architecture alone, and .arch stays in force: it names what any unit of NEON needs.
inline uint32x4_t dot4(uint32x4_t sum, uint32x4_t a, uint32x4_t b) {
  __asm__(".arch armv8.2-a+dotprod+bf16\n\tsdot %0.4s, %1.16b, %2.16b"
          : "+w"(sum)
          : "w"(a), "w"(b));
  return sum;
}
inline vi dot4(vi sum, vi u, vi s) {
  return {dot4(sum.low, u.low, s.low), dot4(sum.high, u.high, s.high)};
}
inline vi dot4(vi sum, vi u, const uint32_t& s) { return dot4(sum, u, set1i(s)); }
inline vf to_float(vi v) {
  return {vcvtq_f32_s32(vreinterpretq_s32_u32(v.low)),
          vcvtq_f32_s32(vreinterpretq_s32_u32(v.high))};
}
inline vi to_int(vf v) {
  return {vreinterpretq_u32_s32(vcvtnq_s32_f32(v.low)),
          vreinterpretq_u32_s32(vcvtnq_s32_f32(v.high))};
}
inline vi make_byte_lut(const uint8_t* table) {
  const uint32x4_t bytes = vreinterpretq_u32_u8(vld1q_u8(table));
  return {bytes, bytes};
}
inline uint32x4_t lut_bytes(uint32x4_t lut, uint32x4_t index) {
  return vreinterpretq_u32_u8(vqtbl1q_u8(vreinterpretq_u8_u32(lut), vreinterpretq_u8_u32(index)));
}
inline vi lut_bytes(vi lut, vi index) {
  return {lut_bytes(lut.low, index.low), lut_bytes(lut.high, index.high)};
}
