// Every instruction that C++ has no name for, one thin function each. This is the only file with
// inline PTX; on the emulator the same names come from cuda/emulator/include/ptx_emulated.h.
//
// Fragments of a matrix instruction, per lane: g = lane / 4, t = lane % 4; 16-bit operands in
// pairs, the lower index in the lower half.
//
//   m16n8k16 (16-bit)   A 16x16   a0 (g, 2t..)   a1 (g+8, 2t..)   a2 (g, 2t+8..)   a3 (g+8, 2t+8..)
//                       B 16x8    b0 (2t.., g)   b1 (2t+8.., g)
//   m16n8k8  (tf32)     A 16x8    a0 (g, t)      a1 (g+8, t)      a2 (g, t+4)      a3 (g+8, t+4)
//                       B 8x8     b0 (t, g)      b1 (t+4, g)
//   both                C 16x8    c0 (g, 2t)     c1 (g, 2t+1)     c2 (g+8, 2t)     c3 (g+8, 2t+1)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "common/params.h"

namespace lk::cuda {

// The 16-bit types, as tags: values travel as uint16_t, or as pairs in uint32_t.
struct Bf16 {
  static constexpr DType dtype = DType::bf16;
};
struct F16 {
  static constexpr DType dtype = DType::f16;
};

}  // namespace lk::cuda

#if defined(LOWRANK_EMULATOR)
#include "ptx_emulated.h"
#else

namespace lk::cuda::ptx {

// -- memory ---------------------------------------------------------------------------------------

// The dynamic shared memory of the block, 128-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char lk_shared[];
  return lk_shared;
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// An aligned vector of memory that nobody writes during the kernel.
template <class Vector>
__device__ __forceinline__ Vector load_const(const void* p) {
  return __ldg(static_cast<const Vector*>(p));
}
// Loads such a vector when it is read once: leaves the first-level cache to others.
__device__ __forceinline__ uint4 load_once(const void* p) {
  uint4 v;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
      : "l"(p));
  return v;
}
// Asks for the line of p in the second-level cache.
__device__ __forceinline__ void prefetch(const void* p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
// An aligned vector of shared memory, or of global memory that this kernel wrote.
template <class Vector>
__device__ __forceinline__ Vector load(const void* p) {
  return *static_cast<const Vector*>(p);
}
template <class Vector>
__device__ __forceinline__ void store(void* p, Vector v) {
  *static_cast<Vector*>(p) = v;
}

// Copies 16 bytes to shared memory in the background; `valid` false writes zeros. Data of
// copy_async_once is not kept in the first-level cache and leaves the second level first.
__device__ __forceinline__ void copy_async(void* dst, const void* src, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
               "r"(valid ? 16 : 0)
               : "memory");
}
// Copies the first `valid` bytes (0..16) likewise; the others become zeros.
__device__ __forceinline__ void copy_async_part(void* dst, const void* src, int valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(dst)), "l"(src),
               "r"(valid)
               : "memory");
}
__device__ __forceinline__ void copy_async_once(void* dst, const void* src, bool valid = true) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2, policy;\n"
      "}" ::"r"(shared_address(dst)),
      "l"(src), "r"(valid ? 16 : 0)
      : "memory");
}
__device__ __forceinline__ void copy_async_commit() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// Waits until at most `groups_left` of this thread's groups are still under way.
template <int groups_left>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(groups_left) : "memory");
}

// -- between kernels and lanes --------------------------------------------------------------------

// Programmatic dependent launch (sm_90 and later): wait for the kernel before this one to complete;
// allow the kernel after this one to start.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void start_next_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// The number of the thread in its warp. Volatile, so that the compiler keeps it, and what follows
// from it, in registers and does not compute them again at every use.
__device__ __forceinline__ unsigned lane() {
  unsigned d;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(d));
  return d;
}

// A barrier of `threads` threads of the block, number 1..15 (0 is __syncthreads).
__device__ __forceinline__ void barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ float shuffle_xor(float v, int mask) {
  return __shfl_xor_sync(0xffffffffu, v, mask);
}
__device__ __forceinline__ float shuffle(float v, int lane) {
  return __shfl_sync(0xffffffffu, v, lane);
}

// -- bytes and numbers ----------------------------------------------------------------------------

// Byte i of the result is byte (selector >> 4i & 7) of the eight bytes b:a.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selector));
  return d;
}

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<Bf16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
template <>
__device__ __forceinline__ uint32_t pack<F16>(float low, float high) {
  uint32_t d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}

template <class T>
__device__ __forceinline__ float widen(uint16_t v);
template <>
__device__ __forceinline__ float widen<Bf16>(uint16_t v) {
  return __uint_as_float(static_cast<uint32_t>(v) << 16);
}
template <>
__device__ __forceinline__ float widen<F16>(uint16_t v) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(v));
  return d;
}

template <class T>
__device__ __forceinline__ uint16_t narrow(float v) {
  return static_cast<uint16_t>(pack<T>(v, v));
}

// The nearest tf32 number (11 significant bits), ties away from zero.
__device__ __forceinline__ float round_tf32(float v) {
  uint32_t d;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(d) : "f"(v));
  return __uint_as_float(d);
}

// -- matrices -------------------------------------------------------------------------------------

// Loads four 8x8 matrices of 16-bit elements; lane i gives the address of row i % 8 of matrix i / 8
// (16 bytes, aligned). Lane's part of matrix j: row lane / 4, columns 2 (lane % 4) and the next.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}
// Loads each of the four transposed: lane's part is column lane / 4, rows 2 (lane % 4) and the
// next.
__device__ __forceinline__ void load_matrices_transposed(uint32_t (&d)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(shared_address(row))
               : "memory");
}

// c += A B, float32 sums.
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ __forceinline__ void mma<Bf16>(float (&c)[4], const uint32_t (&a)[4],
                                          const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ __forceinline__ void mma<F16>(float (&c)[4], const uint32_t (&a)[4],
                                         const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
// Operands are tf32 numbers (see round_tf32).
__device__ __forceinline__ void mma_tf32(float (&c)[4], const float (&a)[4], const float (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a[0])), "r"(__float_as_uint(a[1])), "r"(__float_as_uint(a[2])),
        "r"(__float_as_uint(a[3])), "r"(__float_as_uint(b[0])), "r"(__float_as_uint(b[1])));
}

}  // namespace lk::cuda::ptx

#endif  // LOWRANK_EMULATOR
