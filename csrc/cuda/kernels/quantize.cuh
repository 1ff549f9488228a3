// Quantize, double-quantize and dequantize; bit for bit what the reference computes.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

constexpr int kQuantizeThreads = 256, kQuantizeWarps = kQuantizeThreads / 32;

__device__ __forceinline__ float inverse_absmax(float absmax) {
  return __fdiv_rn(1.0f, absmax > 1e-38f ? absmax : 1e-38f);
}

// The largest magnitude of the warp; compared as bits, so that a NaN or infinity wins.
__device__ __forceinline__ float largest_of_warp(float v) {
  uint32_t bits = __float_as_uint(v) & 0x7fffffffu;
#pragma unroll
  for (int mask = 16; mask; mask /= 2) {
    const uint32_t other = __float_as_uint(ptx::shuffle_xor(__uint_as_float(bits), mask));
    bits = other > bits ? other : bits;
  }
  return __uint_as_float(bits);
}
__device__ __forceinline__ float larger(float a, float b) {
  const uint32_t x = __float_as_uint(a) & 0x7fffffffu, y = __float_as_uint(b) & 0x7fffffffu;
  return __uint_as_float(x > y ? x : y);
}

// How many of `count` sorted midpoints lie below v, count a power of two minus one; NaN: none.
template <int count>
__device__ __forceinline__ int rank_of(const float* midpoints, float v) {
  int below = 0;
#pragma unroll
  for (int step = (count + 1) / 2; step; step /= 2)
    if (v > midpoints[below + step - 1]) below += step;
  return below;
}

// -- quantize -------------------------------------------------------------------------------------

struct NearestCode {
  float sorted[16];
  uint32_t nibbles[16];  // of each rank
  float midpoints[16];   // between neighbours in `sorted`; 15 of them
};

// By the first 16 threads: a code's rank is how many come before it, equal ones in their order.
__device__ inline void sort_codes(const float* code, NearestCode& nearest) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < 16) {
    int rank = 0;
    for (int j = 0; j < 16; ++j) rank += code[j] < code[i] || (code[j] == code[i] && j < i);
    nearest.sorted[rank] = code[i];
    nearest.nibbles[rank] = static_cast<uint32_t>(i);
  }
  __syncthreads();
  if (i < 15)
    nearest.midpoints[i] = __fmul_rn(__fadd_rn(nearest.sorted[i], nearest.sorted[i + 1]), 0.5f);
  __syncthreads();
}

// One warp per block of the format.
__global__ void __launch_bounds__(kQuantizeThreads) quantize_blocks(QuantizeArgs a) {
  auto& nearest = *reinterpret_cast<NearestCode*>(ptx::shared_memory());
  sort_codes(a.code, nearest);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t block = int64_t{blockIdx.x} * kQuantizeWarps + threadIdx.x / 32;
  const int64_t begin = block * a.blocksize, end = min64(begin + a.blocksize, a.numel);
  if (begin >= end) return;  // the whole warp
  float absmax = 0.0f;
  for (int64_t i = begin + lane; i < end; i += 32)
    absmax = larger(absmax, load_one(a.weight, a.dtype, i));
  absmax = largest_of_warp(absmax);
  if (lane == 0) a.absmax[block] = absmax;
  const float inverse = inverse_absmax(absmax);
  for (int64_t i = begin + 2 * lane; i < end; i += 64) {
    uint32_t nibble[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float v = i + e < end ? __fmul_rn(load_one(a.weight, a.dtype, i + e), inverse) : 0.0f;
      v = v > 1.0f ? 1.0f : v < -1.0f ? -1.0f : v;
      nibble[e] = nearest.nibbles[rank_of<15>(nearest.midpoints, v)];
    }
    a.packed[i / 2] = static_cast<uint8_t>(nibble[0] << 4 | nibble[1]);
  }
}

// -- double quantization --------------------------------------------------------------------------

constexpr int64_t kMeanSpan = 4096;

// partial[i] = the sum of the i-th span of absmax, in float64: 256 interleaved sums, then a tree.
__global__ void __launch_bounds__(kQuantizeThreads)
    partial_sums(const float* absmax, int64_t blocks, double* partial) {
  double* sums = reinterpret_cast<double*>(ptx::shared_memory());
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t begin = int64_t{blockIdx.x} * kMeanSpan, end = min64(begin + kMeanSpan, blocks);
  double sum = 0.0;
  for (int64_t i = begin + thread; i < end; i += kQuantizeThreads) sum += absmax[i];
  sums[thread] = sum;
  __syncthreads();
  for (int step = kQuantizeThreads / 2; step; step /= 2) {
    if (thread < step) sums[thread] += sums[thread + step];
    __syncthreads();
  }
  if (thread == 0) partial[blockIdx.x] = sums[0];
}

// offset = the mean, from the partial sums in their order.
__global__ void __launch_bounds__(32)
    mean_of(const double* partial, int64_t spans, int64_t blocks, float* offset) {
  if (threadIdx.x != 0) return;
  double sum = 0.0;
  for (int64_t i = 0; i < spans; ++i) sum += partial[i];
  *offset = blocks ? static_cast<float>(sum / static_cast<double>(blocks)) : 0.0f;
}

// One warp per 256 scales: absmax - offset to the nearest of the 256 sorted codes.
__global__ void __launch_bounds__(kQuantizeThreads) double_quantize_blocks(DoubleQuantizeArgs a) {
  float* midpoints = reinterpret_cast<float*>(ptx::shared_memory());
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  if (thread < 255)
    midpoints[thread] =
        __fmul_rn(__fadd_rn(a.nested_code[thread], a.nested_code[thread + 1]), 0.5f);
  __syncthreads();
  const int64_t block = int64_t{blockIdx.x} * kQuantizeWarps + thread / 32;
  const int64_t begin = block * kNestedBlock, end = min64(begin + kNestedBlock, a.blocks);
  if (begin >= end) return;
  const float offset = *a.offset;
  float absmax = 0.0f;
  for (int64_t i = begin + lane; i < end; i += 32)
    absmax = larger(absmax, __fsub_rn(a.absmax[i], offset));
  absmax = largest_of_warp(absmax);
  if (lane == 0) a.nested_absmax[block] = absmax;
  const float inverse = inverse_absmax(absmax);
  for (int64_t i = begin + lane; i < end; i += 32)
    a.quantized[i] = static_cast<uint8_t>(
        rank_of<255>(midpoints, __fmul_rn(__fsub_rn(a.absmax[i], offset), inverse)));
}

// -- dequantize -----------------------------------------------------------------------------------

// Any rectangle of any weight, an element at a time.
__global__ void __launch_bounds__(kQuantizeThreads)
    dequantize_elements(Weight4 w, int64_t row, int64_t column, MutMatrix out) {
  const int64_t i = int64_t{blockIdx.x} * kQuantizeThreads + threadIdx.x;
  if (i >= out.rows * out.cols) return;
  const int64_t r = i / out.cols, c = i % out.cols;
  store_one(out.data, out.dtype, r * out.stride + c, weight_one(w, (row + r) * w.K + column + c));
}

constexpr int kRunLength = 32;  // elements that one thread decodes: 16 packed bytes, one scale

// Rectangles whose rows are whole runs of 32 elements, 16-byte aligned in memory. One thread per
// run; the table of pairs answers a byte with two decoded values.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    dequantize_runs(Weight4 w, int64_t row, int64_t column, MutMatrix out) {
  const int thread = static_cast<int>(threadIdx.x);
  float* code = reinterpret_cast<float*>(ptx::shared_memory());
  if (thread < 16) code[thread] = w.code[thread];
  __syncthreads();
  const int64_t runs = out.cols / kRunLength;
  const int64_t i = int64_t{blockIdx.x} * kQuantizeThreads + thread;
  if (i >= out.rows * runs) return;
  const int64_t r = i / runs, c = i % runs * kRunLength;
  const int64_t element = (row + r) * w.K + column + c;
  const uint4 packed = ptx::load_once(w.packed + element / 2);
  const float scale = block_scale(w, element >> w.block_shift);
  const uint32_t words[4] = {packed.x, packed.y, packed.z, packed.w};
  uint16_t* dst = static_cast<uint16_t*>(out.data) + r * out.stride + c;
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    uint32_t pair[4];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      const uint32_t byte = words[q] >> (8 * b) & 0xff;
      pair[b] = ptx::pack<T>(__fmul_rn(code[byte >> 4], scale), __fmul_rn(code[byte & 15], scale));
    }
    ptx::store(dst + 8 * q, make_uint4(pair[0], pair[1], pair[2], pair[3]));
  }
}

}  // namespace lk::cuda
