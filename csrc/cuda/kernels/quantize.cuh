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
  float codes[16];       // in ascending order
  float midpoints[16];   // between two of them
  uint32_t nibbles[16];  // of each rank
};

// Sorts the codes with all threads of a block. Equal codes stay in their order.
__device__ inline void sort_codes(const float* code, NearestCode& nearest) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < 16) {
    int rank = 0;
    for (int j = 0; j < 16; ++j) rank += code[j] < code[i] || (code[j] == code[i] && j < i) ? 1 : 0;
    nearest.codes[rank] = code[i];
    nearest.nibbles[rank] = static_cast<uint32_t>(i);
  }
  __syncthreads();
  if (i < 15)
    nearest.midpoints[i] = __fmul_rn(__fadd_rn(nearest.codes[i], nearest.codes[i + 1]), 0.5f);
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

struct F32 {
  static constexpr DType dtype = DType::f32;
};

// What one lane decodes and stores at once: 16 bytes of output. Blocks are longer, so it has one
// scale.
template <class T>
constexpr int kRunLength = T::dtype == DType::f32 ? 4 : 8;
constexpr int kRunsPerThread = 4;  // read before the first is decoded

// The packed bytes of a run: the first in the low byte.
template <class T>
__device__ __forceinline__ uint32_t load_run(const uint8_t* packed) {
  if constexpr (kRunLength<T> == 8)
    return ptx::load_const<uint32_t>(packed);
  else
    return ptx::load_const<uint16_t>(packed);
}

// Sixteen codes are in sixteen banks, so that whatever the lanes look up, they do not collide.
template <class T>
__device__ __forceinline__ void store_run(void* dst, uint32_t packed, float scale,
                                          const float* code) {
  constexpr int count = kRunLength<T>;
  float v[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const uint32_t nibble = packed >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15;
    v[i] = __fmul_rn(code[nibble], scale);
  }
  if constexpr (count == 8)
    ptx::store(dst, make_uint4(ptx::pack<T>(v[0], v[1]), ptx::pack<T>(v[2], v[3]),
                               ptx::pack<T>(v[4], v[5]), ptx::pack<T>(v[6], v[7])));
  else
    ptx::store(dst, make_float4(v[0], v[1], v[2], v[3]));
}

// The scales of a lane's runs, of which `count` are there: all loads of one kind before the next,
// so that they wait together. `quantum` is where the first run lies, in 32 elements.
template <class T>
__device__ __forceinline__ void load_scales(const Weight4& w, uint32_t quantum, int count,
                                            float (&scale)[kRunsPerThread]) {
  constexpr int step = 32 * kRunLength<T> / 32;  // from one run of the lane to the next
  const auto block = [&](int i) { return (quantum + i * step) >> (w.block_shift - 5); };
  if (w.absmax) {
#pragma unroll
    for (int i = 0; i < kRunsPerThread; ++i)
      if (i < count) scale[i] = ptx::load_const<float>(w.absmax + block(i));
    return;
  }
  const float offset = ptx::load_const<float>(w.nested_offset);
  uint32_t index[kRunsPerThread] = {};
  float nested[kRunsPerThread] = {};
#pragma unroll
  for (int i = 0; i < kRunsPerThread; ++i)
    if (i < count) {
      index[i] = ptx::load_const<uint8_t>(w.absmax_u8 + block(i));
      nested[i] = ptx::load_const<float>(w.nested_absmax + (block(i) >> kNestedShift));
    }
#pragma unroll
  for (int i = 0; i < kRunsPerThread; ++i)
    scale[i] = ptx::load_const<float>(w.nested_code + index[i]);
#pragma unroll
  for (int i = 0; i < kRunsPerThread; ++i)
    scale[i] = __fadd_rn(__fmul_rn(scale[i], nested[i]), offset);
}

// Rectangles of rows of `runs` whole runs, aligned in memory. A warp takes a piece of one row, so
// that each of its stores is 512 bytes in one piece:
//
//   row | 32 runs | 32 runs | 32 runs | 32 runs | ...   one run of each per lane
//       |                warp 0                 | warp 1
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
    dequantize_runs(Weight4 w, int64_t row, int64_t column, MutMatrix out, uint32_t runs) {
  const uint32_t thread = threadIdx.x;
  constexpr uint32_t per_warp = 32 * kRunsPerThread;
  const uint32_t pieces = (runs + per_warp - 1) / per_warp;
  const uint32_t warp = blockIdx.x * kQuantizeWarps + thread / 32;
  const int64_t r = warp / pieces;
  const uint32_t c = warp % pieces * per_warp + thread % 32;
  // How many runs the lane has, or more.
  const int count = r < out.rows && c < runs ? static_cast<int>((runs - c + 31) / 32) : 0;

  const int64_t from = (row + r) * w.K + column + int64_t{c} * kRunLength<T>;
  uint32_t packed[kRunsPerThread] = {};
#pragma unroll
  for (int i = 0; i < kRunsPerThread; ++i)
    if (i < count) packed[i] = load_run<T>(w.packed + from / 2 + i * (32 * kRunLength<T> / 2));
  float scale[kRunsPerThread] = {};
  load_scales<T>(w, static_cast<uint32_t>(from >> 5), count, scale);
  float* code = reinterpret_cast<float*>(ptx::shared_memory());
  if (thread < 16) code[thread] = w.code[thread];
  __syncthreads();
  unsigned char* to = static_cast<unsigned char*>(out.data) +
                      (r * out.stride + int64_t{c} * kRunLength<T>)*element_size(T::dtype);
#pragma unroll
  for (int i = 0; i < kRunsPerThread; ++i)
    if (i < count) store_run<T>(to + i * 512, packed[i], scale[i], code);
}

}  // namespace lk::cuda
