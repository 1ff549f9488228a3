// The functions of cuda/ptx.cuh on the emulator: same names, same fragments, checked alignment.
#pragma once

#include "common/half.h"
#include "cuda/emulator/emulator.h"

namespace lk::cuda::ptx {

// -- memory ---------------------------------------------------------------------------------------

inline unsigned char* shared_memory() { return emulator::current->shared; }

inline void check_aligned(const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes != 0) emulator::fail("misaligned address");
}

template <class Vector>
Vector load(const void* p) {
  check_aligned(p, sizeof(Vector));
  return *static_cast<const Vector*>(p);
}
template <class Vector>
Vector load_const(const void* p) {
  return load<Vector>(p);
}
inline uint4 load_once(const void* p) { return load<uint4>(p); }
inline void prefetch(const void*) {}
template <class Vector>
void store(void* p, Vector v) {
  check_aligned(p, sizeof(Vector));
  *static_cast<Vector*>(p) = v;
}

inline void copy_async(void* dst, const void* src, bool valid = true) {
  emulator::copy_async(dst, src, 16, valid ? 16 : 0);
}
inline void copy_async_part(void* dst, const void* src, int valid) {
  emulator::copy_async(dst, src, 16, valid);
}
inline void copy_async_once(void* dst, const void* src, bool valid = true) {
  copy_async(dst, src, valid);
}
inline void copy_async_commit() { emulator::copy_async_commit(); }
template <int groups_left>
void copy_async_wait() {
  emulator::copy_async_wait(groups_left);
}

// -- between kernels and lanes --------------------------------------------------------------------

inline void wait_for_previous_kernel() {}  // kernels run one after another
inline void start_next_kernel() {}

inline unsigned lane() { return static_cast<unsigned>(emulator::current->lane); }
inline void barrier(int id, int threads) { emulator::barrier(id, threads); }

struct Shuffle {
  float value;
  int lane;
};
inline float shuffle(float v, int lane) {
  const Shuffle in{v, lane & 31};
  float out = 0.0f;
  emulator::collective(
      "shuffle",
      [](const void* const* from, void* const* to) {
        for (int i = 0; i < 32; ++i) {
          const int source = static_cast<const Shuffle*>(from[i])->lane;
          *static_cast<float*>(to[i]) = static_cast<const Shuffle*>(from[source])->value;
        }
      },
      &in, &out);
  return out;
}
inline float shuffle_xor(float v, int mask) { return shuffle(v, emulator::current->lane ^ mask); }

// -- bytes and numbers ----------------------------------------------------------------------------

inline uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t d = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t s = selector >> (4 * i) & 15;
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (s & 7))) & 0xff;
    if (s & 8) byte = byte & 0x80 ? 0xff : 0;  // replicates the sign
    d |= byte << (8 * i);
  }
  return d;
}

template <class T>
uint16_t narrow(float v) {
  return T::dtype == DType::bf16 ? bf16_from_float(v) : f16_from_float(v);
}
template <class T>
float widen(uint16_t v) {
  return T::dtype == DType::bf16 ? float_from_bf16(v) : float_from_f16(v);
}
template <class T>
uint32_t pack(float low, float high) {
  return narrow<T>(low) | uint32_t{narrow<T>(high)} << 16;
}

inline float round_tf32(float v) {
  const uint32_t u = bits_of(v);
  if ((u & 0x7f800000u) == 0x7f800000u) return v;
  return float_of((u + 0x1000u) & ~0x1fffu);
}

// -- matrices -------------------------------------------------------------------------------------

struct Fragments {
  uint32_t d[4];
};

inline void load_matrices(uint32_t (&d)[4], const void* row) {
  check_aligned(row, 16);
  emulator::collective(
      "ldmatrix",
      [](const void* const* rows, void* const* to) {
        for (int lane = 0; lane < 32; ++lane)
          for (int j = 0; j < 4; ++j)
            static_cast<uint32_t*>(to[lane])[j] =
                static_cast<const uint32_t*>(rows[8 * j + lane / 4])[lane % 4];
      },
      row, d);
}
inline void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
  check_aligned(row, 16);
  emulator::collective(
      "ldmatrix.trans",
      [](const void* const* rows, void* const* to) {
        for (int lane = 0; lane < 32; ++lane)
          for (int j = 0; j < 4; ++j) {
            const int column = lane / 4, pair = lane % 4;
            const auto element = [&](int r) {
              return uint32_t{static_cast<const uint16_t*>(rows[8 * j + r])[column]};
            };
            static_cast<uint32_t*>(to[lane])[j] = element(2 * pair) | element(2 * pair + 1) << 16;
          }
      },
      row, d);
}

// Operands of one lane of a matrix instruction, and where its sums are.
struct MmaOperands {
  const void *a, *b;
};

// c[16][8] += a[16][depth] b[depth][8], in float32, in the order of the depth.
template <int depth>
void multiply(const float (*a)[depth], const float (*b)[8], float (*c)[8]) {
  for (int i = 0; i < 16; ++i)
    for (int p = 0; p < depth; ++p)
      for (int j = 0; j < 8; ++j) c[i][j] += a[i][p] * b[p][j];
}

inline void gather_sums(void* const* to, float (*c)[8]) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2] = static_cast<const float*>(to[lane])[i];
}
inline void scatter_sums(const float (*c)[8], void* const* to) {
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < 4; ++i)
      static_cast<float*>(to[lane])[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
}

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  const MmaOperands in{a, b};
  emulator::collective(
      "mma.m16n8k16",
      [](const void* const* from, void* const* to) {
        float A[16][16], B[16][8], C[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          const auto& operands = *static_cast<const MmaOperands*>(from[lane]);
          const uint32_t* la = static_cast<const uint32_t*>(operands.a);
          const uint32_t* lb = static_cast<const uint32_t*>(operands.b);
          for (int half = 0; half < 2; ++half) {
            const int shift = 16 * half;
            const auto value = [&](uint32_t pair) {
              return widen<T>(static_cast<uint16_t>(pair >> shift));
            };
            for (int i = 0; i < 4; ++i)
              A[g + 8 * (i % 2)][2 * t + 8 * (i / 2) + half] = value(la[i]);
            for (int i = 0; i < 2; ++i) B[2 * t + 8 * i + half][g] = value(lb[i]);
          }
        }
        gather_sums(to, C);
        multiply<16>(A, B, C);
        scatter_sums(C, to);
      },
      &in, c);
}

inline void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  const MmaOperands in{a, b};
  emulator::collective(
      "mma.m16n8k8.tf32",
      [](const void* const* from, void* const* to) {
        float A[16][8], B[8][8], C[16][8];
        for (int lane = 0; lane < 32; ++lane) {
          const int g = lane / 4, t = lane % 4;
          const auto& operands = *static_cast<const MmaOperands*>(from[lane]);
          // The hardware ignores the bits that tf32 does not have.
          const auto value = [](const void* p, int i) {
            return float_of(bits_of(static_cast<const float*>(p)[i]) & ~0x1fffu);
          };
          for (int i = 0; i < 4; ++i) A[g + 8 * (i % 2)][t + 4 * (i / 2)] = value(operands.a, i);
          for (int i = 0; i < 2; ++i) B[t + 4 * i][g] = value(operands.b, i);
        }
        gather_sums(to, C);
        multiply<8>(A, B, C);
        scatter_sums(C, to);
      },
      &in, c);
}

}  // namespace lk::cuda::ptx
