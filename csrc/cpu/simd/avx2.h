// AVX2 + FMA + F16C vocabulary: eight lanes. The names are explained in scalar.h.
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

typedef __m256 vf;
typedef __m256i vi;
struct Lut {
  __m256 low, high;  // entries 0..7, 8..15
  __m256i plane[4];  // byte b of entries 0..15, in both halves
};

inline vf zero() { return _mm256_setzero_ps(); }
inline vf set1(float v) { return _mm256_set1_ps(v); }
inline vi set1i(uint32_t v) { return _mm256_set1_epi32(static_cast<int>(v)); }
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, vf v) { _mm256_storeu_ps(p, v); }
inline vi loadi(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline void storei(uint32_t* p, vi v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
inline vi loadi_partial(const void* p, int count) {
  const vi lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const vi mask = _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane);
  return _mm256_maskload_epi32(static_cast<const int*>(p), mask);
}
inline vi load_u8(const uint8_t* p) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
}
inline vf as_float(vi v) { return _mm256_castsi256_ps(v); }
inline vi as_bits(vf v) { return _mm256_castps_si256(v); }
inline vf add(vf a, vf b) { return _mm256_add_ps(a, b); }
inline vf mul(vf a, vf b) { return _mm256_mul_ps(a, b); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
inline void in_register(vf& v) { __asm__("" : "+x"(v)); }
inline float hsum(vf v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
template <int S>
inline vi shr(vi v) {
  return _mm256_srli_epi32(v, S);
}
template <int S>
inline vi shl(vi v) {
  return _mm256_slli_epi32(v, S);
}
inline vi abs_bits(vf v) {
  return _mm256_and_si256(_mm256_castps_si256(v), _mm256_set1_epi32(0x7fffffff));
}
inline vi maxi(vi a, vi b) { return _mm256_max_epi32(a, b); }
inline uint32_t hmax(vi v) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1))));
}
inline vi addi(vi a, vi b) { return _mm256_add_epi32(a, b); }
inline vi add_if_greater(vi idx, vf x, vf t, uint32_t step) {
  const vi greater = _mm256_castps_si256(_mm256_cmp_ps(x, t, _CMP_GT_OQ));
  if (step == 1) return _mm256_sub_epi32(idx, greater);
  return _mm256_add_epi32(idx, _mm256_and_si256(greater, set1i(step)));
}
inline int count_greater(vf x, vf t) {
  return __builtin_popcount(
      static_cast<unsigned>(_mm256_movemask_ps(_mm256_cmp_ps(x, t, _CMP_GT_OQ))));
}
inline void even_odd(vf a, vf b, vf& even, vf& odd) {
  // Puts the quadwords of the sorted ones in the order 0, 2, 1, 3.
  even = _mm256_shuffle_ps(a, b, 0x88);
  odd = _mm256_shuffle_ps(a, b, 0xdd);
  even = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8));
  odd = _mm256_castpd_ps(_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8));
}
inline void store_bytes(void* p, vi v) {
  const vi first = _mm256_shuffle_epi8(v, _mm256_set1_epi32(0x0c080400));
  _mm_storel_epi64(
      static_cast<__m128i*>(p),
      _mm_unpacklo_epi32(_mm256_castsi256_si128(first), _mm256_extracti128_si256(first, 1)));
}

inline Lut make_lut(const float* code) {
  Lut lut{load(code), load(code + 8), {}};
  for (int b = 0; b < 4; ++b) {
    uint8_t bytes[16];
    for (int i = 0; i < 16; ++i) {
      uint32_t bits;
      __builtin_memcpy(&bits, code + i, 4);
      bytes[i] = static_cast<uint8_t>(bits >> (8 * b));
    }
    lut.plane[b] =
        _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes)));
  }
  return lut;
}
// vpermps reads index bits 2:0; bit 3, moved to the sign, picks the half.
inline vf lut16(const Lut& lut, vi index) {
  const vf low = _mm256_permutevar8x32_ps(lut.low, index);
  const vf high = _mm256_permutevar8x32_ps(lut.high, index);
  return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(index, 28)));
}
inline vf lut8(const Lut& lut, vi index) { return _mm256_permutevar8x32_ps(lut.low, index); }
inline vf lut_nibbles(const Lut& lut, const uint8_t* p) {
  int bytes;
  __builtin_memcpy(&bytes, p, 4);
  // Lane 2j takes the high nibble of byte j, lane 2j+1 the low one.
  const vi shifts = _mm256_setr_epi32(4, 0, 12, 8, 20, 16, 28, 24);
  return lut16(lut, _mm256_srlv_epi32(_mm256_set1_epi32(bytes), shifts));
}
struct HalfLut {
  __m256i low, high;  // bytes of the entries, in both halves
};
inline HalfLut make_half_lut(const uint16_t* entries) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(entries));
  const __m256i low = _mm256_and_si256(words, _mm256_set1_epi16(0xff)),
                high = _mm256_srli_epi16(words, 8);
  // packus leaves the eight bytes of each half twice in it; quadwords 0, 2, 0, 2 are all sixteen.
  return {_mm256_permute4x64_epi64(_mm256_packus_epi16(low, low), 0x88),
          _mm256_permute4x64_epi64(_mm256_packus_epi16(high, high), 0x88)};
}
inline void lut_halves(const HalfLut& table, const uint8_t* p, uint16_t* dst) {
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)),
                mask = _mm_set1_epi8(15);
  const __m128i first = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask),
                second = _mm_and_si128(bytes, mask);
  const __m256i index =
      _mm256_set_m128i(_mm_unpackhi_epi8(first, second), _mm_unpacklo_epi8(first, second));
  const __m256i low = _mm256_shuffle_epi8(table.low, index),
                high = _mm256_shuffle_epi8(table.high, index);
  const __m256i a = _mm256_unpacklo_epi8(low, high), b = _mm256_unpackhi_epi8(low, high);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_permute2x128_si256(a, b, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + 16), _mm256_permute2x128_si256(a, b, 0x31));
}
// Byte by byte: four byte shuffles look up 32 weights, and two rounds of unpacking put their bytes
// together. Three shuffles a vector of weights, against lut16's two, two shifts and a blend. Called
// often enough for compilers not to inline it, which costs more than the lookup.
struct NibbleWeights {
  vf weights[8];

  NibbleWeights() = default;
  __attribute__((always_inline)) NibbleWeights(const Lut& lut, vi packed) {
    // Brings byte b of the four dwords of each half next to each other.
    const __m256i by_byte = _mm256_broadcastsi128_si256(
        _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    const __m256i bytes = _mm256_shuffle_epi8(packed, by_byte), mask = _mm256_set1_epi8(15);
    look_up(lut, _mm256_and_si256(_mm256_srli_epi16(bytes, 4), mask), 0);
    look_up(lut, _mm256_and_si256(bytes, mask), 1);
  }
  __attribute__((always_inline)) void look_up(const Lut& lut, __m256i index, int first) {
    const __m256i b0 = _mm256_shuffle_epi8(lut.plane[0], index),
                  b1 = _mm256_shuffle_epi8(lut.plane[1], index),
                  b2 = _mm256_shuffle_epi8(lut.plane[2], index),
                  b3 = _mm256_shuffle_epi8(lut.plane[3], index);
    const __m256i low01 = _mm256_unpacklo_epi8(b0, b1), high01 = _mm256_unpackhi_epi8(b0, b1),
                  low23 = _mm256_unpacklo_epi8(b2, b3), high23 = _mm256_unpackhi_epi8(b2, b3);
    weights[first] = as_float(_mm256_unpacklo_epi16(low01, low23));
    weights[first + 2] = as_float(_mm256_unpackhi_epi16(low01, low23));
    weights[first + 4] = as_float(_mm256_unpacklo_epi16(high01, high23));
    weights[first + 6] = as_float(_mm256_unpackhi_epi16(high01, high23));
  }
  template <int S>
  vf weight(const Lut&) const {
    return weights[S];
  }
};
inline vf gather(const float* table, vi index) { return _mm256_i32gather_ps(table, index, 4); }
inline vf permute(vf v, vi index) { return _mm256_permutevar8x32_ps(v, index); }

inline vf load_bf16(const uint16_t* p) {
  const __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16));
}
inline void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
  const vi pairs = loadi(p);
  even = as_float(shl<16>(pairs));
  odd = as_float(_mm256_and_si256(pairs, set1i(0xffff0000u)));
}
inline void store_bf16(uint16_t* p, vf v) {
  const vi u = _mm256_castps_si256(v);
  const vi odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const vi rounded =
      _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  const vi quiet = _mm256_or_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(0x40));
  const vi nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const vi result = _mm256_blendv_epi8(rounded, quiet, nan);
  const __m128i packed =
      _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), packed);
}
inline vf load_f16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline void store_f16(uint16_t* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}

inline void transpose(vf* r) {
  vf t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// -- int8 (explained in avx512.h) -----------------------------------------------------------------

#define LK_INT8
constexpr const char* kInt8 = "avx_vnni";
constexpr int kByteZero = 128;

inline vi dot4(vi sum, vi u, vi s) {
  __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(u), "x"(s));
  return sum;
}
inline vi dot4(vi sum, vi u, const uint32_t& s) { return dot4(sum, u, set1i(s)); }
inline vf to_float(vi v) { return _mm256_cvtepi32_ps(v); }
inline vi to_int(vf v) { return _mm256_cvtps_epi32(v); }
inline vi andi(vi a, vi b) { return _mm256_and_si256(a, b); }
inline vi make_byte_lut(const uint8_t* table) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
}
inline vi lut_bytes(vi lut, vi index) { return _mm256_shuffle_epi8(lut, index); }
