// Single elements as float32: any dtype, any shape of 4-bit weight, dropout. The vocabulary of the
// general kernels; the fast ones decode in bulk.
#pragma once

#include "cuda/ptx.cuh"

namespace lk::cuda {

__device__ __forceinline__ float load_one(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f32:
      return static_cast<const float*>(p)[i];
    case DType::bf16:
      return ptx::widen<Bf16>(static_cast<const uint16_t*>(p)[i]);
    default:
      return ptx::widen<F16>(static_cast<const uint16_t*>(p)[i]);
  }
}

__device__ __forceinline__ void store_one(void* p, DType t, int64_t i, float v) {
  switch (t) {
    case DType::f32:
      static_cast<float*>(p)[i] = v;
      return;
    case DType::bf16:
      static_cast<uint16_t*>(p)[i] = ptx::narrow<Bf16>(v);
      return;
    default:
      static_cast<uint16_t*>(p)[i] = ptx::narrow<F16>(v);
  }
}

// Product and sum are rounded separately, as the stored scales were.
__device__ __forceinline__ float block_scale(const Weight4& w, int64_t block) {
  block += w.first_block;
  if (w.absmax) return w.absmax[block];
  return __fadd_rn(
      __fmul_rn(w.nested_code[w.absmax_u8[block]], w.nested_absmax[block >> kNestedShift]),
      *w.nested_offset);
}

// Element i of the flat weight.
__device__ __forceinline__ float weight_one(const Weight4& w, int64_t i) {
  i += w.first;
  const int nibble = w.packed[i >> 1] >> (i & 1 ? 0 : 4) & 15;
  return __fmul_rn(w.code[nibble], block_scale(w, i >> w.block_shift));
}

// -- dropout --------------------------------------------------------------------------------------

struct Words4 {
  uint32_t word[4];
};

// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, SC11) of the counter (k4, row low, row high, 0).
__device__ __forceinline__ Words4 philox(uint64_t seed, int64_t row, uint32_t k4) {
  uint32_t c0 = k4, c1 = static_cast<uint32_t>(row),
           c2 = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32), c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint32_t n0 = __umulhi(c2, 0xCD9E8D57u) ^ c1 ^ k0;
    const uint32_t n2 = __umulhi(c0, 0xD2511F53u) ^ c3 ^ k1;
    c1 = c2 * 0xCD9E8D57u;
    c3 = c0 * 0xD2511F53u;
    c0 = n0;
    c2 = n2;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return {{c0, c1, c2, c3}};
}

// Whether element (row, k) is kept. A run of four k shares one philox(): see drop_four.
__device__ __forceinline__ bool is_kept(const Dropout& d, int64_t row, int64_t k) {
  if (d.threshold == 0) return true;
  const Words4 w = philox(*d.seed, row, static_cast<uint32_t>(k >> 2));
  // Chosen by comparison: an array indexed at run time would live in local memory.
  const uint32_t low = k & 1 ? w.word[1] : w.word[0], high = k & 1 ? w.word[3] : w.word[2];
  return (k & 2 ? high : low) >= d.threshold;
}

// v[0..4) are columns k.. of a row, k % 4 == 0: dropped ones become zero; kept ones stay, their
// scale is applied to the sum.
__device__ __forceinline__ void drop_four(const Dropout& d, int64_t row, int64_t k, float (&v)[4]) {
  if (d.threshold == 0) return;
  const Words4 w = philox(*d.seed, row, static_cast<uint32_t>(k >> 2));
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (w.word[i] < d.threshold) v[i] = 0.0f;
}

}  // namespace lk::cuda
