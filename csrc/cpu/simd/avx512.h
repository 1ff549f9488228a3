// AVX-512 (F, BW, DQ, VL) vocabulary: sixteen lanes. The names are explained in scalar.h.
#pragma once

constexpr int kLanes = 16;
constexpr int kMicroRows = 14;
constexpr int kMicroVectors = 2;
constexpr int kDotRows = 3;
constexpr int kDotRanks = 8;
constexpr int kSkinnyRows = 16;
constexpr int kMaxSkinny = 24;
constexpr int kSkinnyWide = 12;
constexpr int kLookupRows = 4;

typedef __m512 vf;
typedef __m512i vi;
struct Lut {
  __m512 entries;
};

inline vf zero() { return _mm512_setzero_ps(); }
inline vf set1(float v) { return _mm512_set1_ps(v); }
inline vi set1i(uint32_t v) { return _mm512_set1_epi32(static_cast<int>(v)); }
inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, vf v) { _mm512_storeu_ps(p, v); }
inline vi loadi(const void* p) { return _mm512_loadu_si512(p); }
inline void storei(uint32_t* p, vi v) { _mm512_storeu_si512(p, v); }
inline vi loadi_partial(const void* p, int count) {
  return _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1), p);
}
inline vi load_u8(const uint8_t* p) {
  return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline vf as_float(vi v) { return _mm512_castsi512_ps(v); }
inline vi as_bits(vf v) { return _mm512_castps_si512(v); }
inline vf add(vf a, vf b) { return _mm512_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
inline void in_register(vf& v) { __asm__("" : "+v"(v)); }
inline float hsum(vf v) { return _mm512_reduce_add_ps(v); }
template <int S>
inline vi shr(vi v) {
  return _mm512_srli_epi32(v, S);
}
template <int S>
inline vi shl(vi v) {
  return _mm512_slli_epi32(v, S);
}
inline vi abs_bits(vf v) {
  return _mm512_and_si512(_mm512_castps_si512(v), _mm512_set1_epi32(0x7fffffff));
}
inline vi maxi(vi a, vi b) { return _mm512_max_epi32(a, b); }
inline uint32_t hmax(vi v) { return static_cast<uint32_t>(_mm512_reduce_max_epi32(v)); }
inline vi addi(vi a, vi b) { return _mm512_add_epi32(a, b); }
inline vi add_if_greater(vi idx, vf x, vf t, uint32_t step) {
  return _mm512_mask_add_epi32(idx, _mm512_cmp_ps_mask(x, t, _CMP_GT_OQ), idx, set1i(step));
}
inline int count_greater(vf x, vf t) {
  return __builtin_popcount(_mm512_cmp_ps_mask(x, t, _CMP_GT_OQ));
}
inline void even_odd(vf a, vf b, vf& even, vf& odd) {
  const vi index = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  even = _mm512_permutex2var_ps(a, index, b);
  odd = _mm512_permutex2var_ps(a, _mm512_add_epi32(index, set1i(1)), b);
}
inline void store_bytes(void* p, vi v) {
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v));
}

inline Lut make_lut(const float* code) { return {load(code)}; }
// vpermps reads index bits 3:0 and ignores the rest, so nibbles need shifts but never masks.
inline vf lut16(const Lut& lut, vi index) { return _mm512_permutexvar_ps(index, lut.entries); }
inline vf lut8(const Lut& lut, vi index) { return lut16(lut, index); }
inline vf lut_nibbles(const Lut& lut, const uint8_t* p) {
  long long bytes;
  __builtin_memcpy(&bytes, p, 8);
  // Lane 2j takes the high nibble of byte j, lane 2j+1 the low one; even qword of dwords per four
  // bytes.
  const vi dwords = _mm512_permutexvar_epi32(
      _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1), _mm512_set1_epi64(bytes));
  const vi shifts = _mm512_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24, 4, 0, 12, 8, 20, 16, 28, 24);
  return lut16(lut, _mm512_srlv_epi32(dwords, shifts));
}
struct HalfLut {
  __m512i entries;  // twice: vpermw reads five bits of an index
};
inline HalfLut make_half_lut(const uint16_t* entries) {
  return {_mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries)))};
}
inline void lut_halves(const HalfLut& table, const uint8_t* p, uint16_t* dst) {
  const vi bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const vi index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
  _mm512_storeu_si512(dst, _mm512_permutexvar_epi16(index, table.entries));
}
struct NibbleWeights {
  vi dwords;

  NibbleWeights() = default;
  NibbleWeights(const Lut&, vi packed) : dwords(packed) {}
  template <int S>
  vf weight(const Lut& lut) const {
    return lut16(lut, shr<S % 2 ? 4 * (S - 1) : 4 * (S + 1)>(dwords));
  }
};
inline vf gather(const float* table, vi index) { return _mm512_i32gather_ps(index, table, 4); }
inline vf permute(vf v, vi index) { return _mm512_permutexvar_ps(index, v); }

inline vf load_bf16(const uint16_t* p) {
  const __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16));
}
inline void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
  const vi pairs = loadi(p);
  even = as_float(shl<16>(pairs));
  odd = as_float(_mm512_and_si512(pairs, set1i(0xffff0000u)));
}
inline void store_bf16(uint16_t* p, vf v) {
  const vi u = _mm512_castps_si512(v);
  const vi odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  const vi rounded =
      _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const vi quiet = _mm512_or_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(0x40));
  const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtepi32_epi16(_mm512_mask_blend_epi32(nan, rounded, quiet)));
}
inline vf load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline void store_f16(uint16_t* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline void transpose(vf* r) {
  vf t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16;
       i += 4) {  // r[i + q] holds, per 128-bit lane L, column 4L + q of rows i..i+3
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int q = 0; q < 4; ++q) {
    const vf a = _mm512_shuffle_f32x4(r[q], r[4 + q], 0x88);  // lanes 0, 2 of rows 0-3, 4-7
    const vf b = _mm512_shuffle_f32x4(r[q], r[4 + q], 0xdd);  // lanes 1, 3
    const vf c = _mm512_shuffle_f32x4(r[8 + q], r[12 + q], 0x88);
    const vf d = _mm512_shuffle_f32x4(r[8 + q], r[12 + q], 0xdd);
    t[q] = _mm512_shuffle_f32x4(a, c, 0x88);
    t[8 + q] = _mm512_shuffle_f32x4(a, c, 0xdd);
    t[4 + q] = _mm512_shuffle_f32x4(b, d, 0x88);
    t[12 + q] = _mm512_shuffle_f32x4(b, d, 0xdd);
  }
  for (int i = 0; i < 16; ++i) r[i] = t[i];
}

// -- int8 -----------------------------------------------------------------------------------------
// dot4 is an instruction that not every CPU of this vocabulary has: dispatch.cpp asks for kInt8.

#define LK_INT8
constexpr const char* kInt8 = "avx512_vnni";
constexpr int kByteZero = 128;  // the byte that stands for zero in the operand u of dot4

// Lane j of sum + Σ u[4j + b] s[4j + b] over its four bytes b, u unsigned, s signed. Written out:
// around the intrinsic g++ copies sums between registers and memory.
inline vi dot4(vi sum, vi u, vi s) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(u), "v"(s));
  return sum;
}
// The same with one quad s for all lanes.
inline vi dot4(vi sum, vi u, const uint32_t& s) {
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(s));
  return sum;
}
inline vf to_float(vi v) { return _mm512_cvtepi32_ps(v); }
inline vi to_int(vf v) { return _mm512_cvtps_epi32(v); }  // to nearest, ties to even
inline vi andi(vi a, vi b) { return _mm512_and_si512(a, b); }
// A table of 16 bytes, and its entries for the bytes of index, each below 16.
inline vi make_byte_lut(const uint8_t* table) {
  return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
inline vi lut_bytes(vi lut, vi index) { return _mm512_shuffle_epi8(lut, index); }
