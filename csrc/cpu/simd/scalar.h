// Portable vocabulary: four lanes in GCC vector types (SSE2 or NEON where the compiler has them).
// Every vocabulary defines the same names; the algorithms in kernels/ use nothing else.
//
//   kLanes         lanes of a vector
//   vf, vi         a vector of float32, and one of 32-bit integers
//   Lut            a table of 16 float32 entries, in a register where one holds it
//   HalfLut        a table of 16 entries of 16 bits each
//   NibbleWeights  the eight 4-bit weights of each dword of a vector, looked up one by one
#pragma once

constexpr int kLanes = 4;
constexpr int kMicroRows = 4;  // micro tile of gemm.inl: kMicroRows rows x kMicroVectors vectors
constexpr int kMicroVectors = 2;
constexpr int kDotRows = 3;  // micro tile of dot products: kDotRows rows x kDotRanks ranks
constexpr int kDotRanks = 4;
constexpr int kSkinnyRows = 4;  // rows of skinny.inl's micro tile
constexpr int kMaxSkinny = 8;   // rows of x up to which that beats a panel
constexpr int kSkinnyWide = 0;  // up to so many of its rows, it is two vectors wide
constexpr int kLookupRows = 4;  // rows of the weight whose lookups fit the registers together

typedef float vf __attribute__((vector_size(16)));
typedef uint32_t vi __attribute__((vector_size(16)));
struct Lut {
  float entry[16];
};

inline vf zero() { return vf{}; }
inline vf set1(float v) { return vf{v, v, v, v}; }
inline vi set1i(uint32_t v) { return vi{v, v, v, v}; }
inline vf load(const float* p) {
  vf v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, vf v) { __builtin_memcpy(p, &v, sizeof v); }
inline vi loadi(const void* p) {
  vi v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void storei(uint32_t* p, vi v) { __builtin_memcpy(p, &v, sizeof v); }
// Loads the first `count` dwords, the rest zero; reads nothing beyond them.
inline vi loadi_partial(const void* p, int count) {
  vi v{};
  __builtin_memcpy(&v, p, 4 * static_cast<size_t>(count));
  return v;
}
inline vi load_u8(const uint8_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
inline vf as_float(vi v) { return (vf)v; }
inline vi as_bits(vf v) { return (vi)v; }
inline vf add(vf a, vf b) { return a + b; }
inline vf mul(vf a, vf b) { return a * b; }
inline vf fma(vf a, vf b, vf c) { return a * b + c; }  // two roundings; -ffp-contract=off
// Keeps a loaded v in a register: g++ would load it again for each use.
inline void in_register(vf&) {}
inline float hsum(vf v) { return (v[0] + v[2]) + (v[1] + v[3]); }
template <int S>
inline vi shr(vi v) {
  return v >> S;
}
template <int S>
inline vi shl(vi v) {
  return v << S;
}
inline vi abs_bits(vf v) { return (vi)v & set1i(0x7fffffffu); }
inline vi maxi(vi a, vi b) {  // signed order; only used on abs_bits
  vi r;
  for (int i = 0; i < kLanes; ++i) r[i] = a[i] > b[i] ? a[i] : b[i];
  return r;
}
inline uint32_t hmax(vi v) {  // likewise
  const uint32_t a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
  return a > b ? a : b;
}
inline vi addi(vi a, vi b) { return a + b; }
// Returns idx, plus step where x > t.
inline vi add_if_greater(vi idx, vf x, vf t, uint32_t step) {
  return idx + ((vi)(x > t) & set1i(step));
}
// Counts the lanes where x > t.
inline int count_greater(vf x, vf t) {
  const vi greater = (vi)(x > t);
  return -static_cast<int>(greater[0] + greater[1] + greater[2] + greater[3]);
}
// Takes the 2 kLanes values of a and b apart, every other one.
inline void even_odd(vf a, vf b, vf& even, vf& odd) {
  even = vf{a[0], a[2], b[0], b[2]};
  odd = vf{a[1], a[3], b[1], b[3]};
}
// Stores the low byte of each lane.
inline void store_bytes(void* p, vi v) {
  for (int i = 0; i < kLanes; ++i) static_cast<uint8_t*>(p)[i] = static_cast<uint8_t>(v[i]);
}

inline Lut make_lut(const float* code) {
  Lut lut;
  __builtin_memcpy(lut.entry, code, sizeof lut.entry);
  return lut;
}
// Looks up the low four bits of each lane.
inline vf lut16(const Lut& lut, vi index) {
  return vf{lut.entry[index[0] & 15], lut.entry[index[1] & 15], lut.entry[index[2] & 15],
            lut.entry[index[3] & 15]};
}
// Looks up an index below 8.
inline vf lut8(const Lut& lut, vi index) { return lut16(lut, index); }
// Looks up kLanes consecutive nibbles, high nibble first, from kLanes / 2 bytes.
inline vf lut_nibbles(const Lut& lut, const uint8_t* p) {
  return vf{lut.entry[p[0] >> 4], lut.entry[p[0] & 15], lut.entry[p[1] >> 4], lut.entry[p[1] & 15]};
}
struct HalfLut {
  uint16_t entry[16];
};
inline HalfLut make_half_lut(const uint16_t* entries) {
  HalfLut table;
  __builtin_memcpy(table.entry, entries, sizeof table.entry);
  return table;
}
// Looks up 32 consecutive nibbles, high nibble first, from 16 bytes.
inline void lut_halves(const HalfLut& table, const uint8_t* p, uint16_t* dst) {
  for (int i = 0; i < 16; ++i) {
    dst[2 * i] = table.entry[p[i] >> 4];
    dst[2 * i + 1] = table.entry[p[i] & 15];
  }
}
// weight<S>(lut) has in lane j the table entry of nibble S of dword j; nibble 0 is the high one of
// byte 0.
struct NibbleWeights {
  vi dwords;

  NibbleWeights() = default;
  NibbleWeights(const Lut&, vi packed) : dwords(packed) {}
  template <int S>
  vf weight(const Lut& lut) const {
    return lut16(lut, shr<S % 2 ? 4 * (S - 1) : 4 * (S + 1)>(dwords));
  }
};
inline vf gather(const float* table, vi index) {
  return vf{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
inline vf permute(vf v, vi index) { return vf{v[index[0]], v[index[1]], v[index[2]], v[index[3]]}; }

inline vf load_bf16(const uint16_t* p) {
  return (vf)vi{uint32_t{p[0]} << 16, uint32_t{p[1]} << 16, uint32_t{p[2]} << 16,
                uint32_t{p[3]} << 16};
}
// Loads 2 kLanes values, every other one.
inline void load_bf16_pairs(const uint16_t* p, vf& even, vf& odd) {
  even_odd(load_bf16(p), load_bf16(p + kLanes), even, odd);
}
inline void store_bf16(uint16_t* p, vf v) {
  for (int i = 0; i < kLanes; ++i) p[i] = bf16_from_float(v[i]);
}
inline vf load_f16(const uint16_t* p) {
  return vf{float_from_f16(p[0]), float_from_f16(p[1]), float_from_f16(p[2]), float_from_f16(p[3])};
}
inline void store_f16(uint16_t* p, vf v) {
  for (int i = 0; i < kLanes; ++i) p[i] = f16_from_float(v[i]);
}

// rows[i] lane j  <->  rows[j] lane i
inline void transpose(vf* rows) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = i + 1; j < kLanes; ++j) {
      const float t = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = t;
    }
}

// The other vocabularies have int8 products as well; see avx512.h.
constexpr const char* kInt8 = nullptr;
