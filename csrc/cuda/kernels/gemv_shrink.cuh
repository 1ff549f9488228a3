// S = dropout(x) Aᵀ for few rows, in float32 arithmetic; it runs while the weights of the gemv
// kernel are on their way.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

constexpr int kShrinkThreads = 512, kShrinkRanks = 4, kShrinkTokens = 4;
constexpr int kShrinkShared = kShrinkThreads / 32 * kShrinkRanks * kShrinkTokens * 4;

// Four 16-bit elements.
__device__ __forceinline__ void widen_four(uint2 u, DType t, float (&v)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint16_t h = static_cast<uint16_t>((j < 2 ? u.x : u.y) >> (16 * (j % 2)));
    v[j] = t == DType::bf16 ? ptx::widen<Bf16>(h) : ptx::widen<F16>(h);
  }
}

// Four elements from element i.
__device__ __forceinline__ void load_four(const Matrix& m, int64_t i, bool aligned, float (&v)[4]) {
  if (!aligned) {
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = load_one(m.data, m.dtype, i + j);
  } else if (m.dtype == DType::f32) {
    const float4 f = ptx::load_const<float4>(static_cast<const float*>(m.data) + i);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
  } else {
    widen_four(ptx::load_const<uint2>(static_cast<const uint16_t*>(m.data) + i), m.dtype, v);
  }
}

// S = dropout(x) Aᵀ for 4 ranks x 4 tokens per block, in float32. Threads share the columns by
// fours, two fours at a time, so that up to 4096 columns are one trip to memory.
__global__ void __launch_bounds__(kShrinkThreads)
    gemv_shrink(Matrix x, Matrix A, Dropout dropout, bool aligned, float* s) {
  ptx::start_next_kernel();
  constexpr int fours = 2, span = 4 * kShrinkThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t r0 = int64_t{blockIdx.x} * kShrinkRanks, m0 = int64_t{blockIdx.y} * kShrinkTokens;
  const int tokens = static_cast<int>(min64(kShrinkTokens, x.rows - m0));
  float sum[kShrinkTokens][kShrinkRanks] = {};
  for (int64_t k0 = 4 * thread; k0 < x.cols; k0 += fours * span) {
    float a[fours][kShrinkRanks][4] = {};
    uint2 packed_x[fours][kShrinkTokens] = {};
#pragma unroll
    for (int f = 0; f < fours; ++f) {
      const int64_t k = k0 + f * span;
      if (k >= x.cols) break;
#pragma unroll
      for (int r = 0; r < kShrinkRanks; ++r)  // ranks that do not exist repeat the last
        load_four(A, min64(r0 + r, A.rows - 1) * A.stride + k, aligned, a[f][r]);
#pragma unroll
      for (int m = 0; m < kShrinkTokens; ++m)
        if (m < tokens)
          packed_x[f][m] = ptx::load_const<uint2>(static_cast<const uint16_t*>(x.data) +
                                                  (m0 + m) * x.stride + k);
    }
#pragma unroll
    for (int f = 0; f < fours; ++f)
#pragma unroll
      for (int m = 0; m < kShrinkTokens; ++m) {
        if (m >= tokens || k0 + f * span >= x.cols) break;
        float v[4];
        widen_four(packed_x[f][m], x.dtype, v);
        drop_four(dropout, m0 + m, k0 + f * span, v);
#pragma unroll
        for (int r = 0; r < kShrinkRanks; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[m][r] = __fmaf_rn(v[j], a[f][r][j], sum[m][r]);
      }
  }

  float* const warps = reinterpret_cast<float*>(ptx::shared_memory());  // [warp][token][rank]
#pragma unroll
  for (int m = 0; m < kShrinkTokens; ++m) {
    if (m >= tokens) break;
#pragma unroll
    for (int r = 0; r < kShrinkRanks; ++r) {
#pragma unroll
      for (int other = 16; other > 0; other /= 2)
        sum[m][r] = __fadd_rn(sum[m][r], ptx::shuffle_xor(sum[m][r], other));
      if (lane == 0) warps[(warp * kShrinkTokens + m) * kShrinkRanks + r] = sum[m][r];
    }
  }
  __syncthreads();
  const int m = thread / kShrinkRanks, r = thread % kShrinkRanks;
  if (m >= tokens || r0 + r >= A.rows) return;
  float total = 0.0f;
  for (int i = 0; i < kShrinkThreads / 32; ++i)
    total = __fadd_rn(total, warps[i * kShrinkTokens * kShrinkRanks + thread]);
  s[(m0 + m) * A.rows + r0 + r] = dropout.threshold ? __fmul_rn(total, dropout.scale) : total;
}

}  // namespace lk::cuda
