// The tile of a product in float32 arithmetic: a block of 256 threads makes 64 x 64, each thread 4
// x 4 of it; operands pass through shared memory as float32, 16 deep.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

constexpr int kSimtTile = 64, kSimtDepth = 16, kSimtThreads = 256;
constexpr int kSimtPitch = kSimtTile + 4;  // keeps rows 16-byte aligned and off each other's banks
constexpr size_t kSimtShared = 2 * kSimtDepth * kSimtPitch * sizeof(float);

// An operand of a product, indexed (r, c): a matrix (or its transpose), under dropout or not, or a
// 4-bit weight (or its transpose).
struct Operand {
  Matrix m;
  Weight4 w;  // when m.data is null
  bool transposed = false;
  Dropout dropout;  // on m, at its own (row, column), including its scale

  __device__ float at(int64_t r, int64_t c) const {
    const int64_t row = transposed ? c : r, column = transposed ? r : c;
    if (!m.data) return weight_one(w, row * w.K + column);
    if (!is_kept(dropout, row, column)) return 0.0f;
    const float v = load_one(m.data, m.dtype, row * m.stride + column);
    return dropout.threshold ? v * dropout.scale : v;
  }
};

struct Product {
  Operand a, b;       // [rows, depth], [depth, cols]
  int64_t depth = 0;  // 0: none
};

// sum[4][4] += this thread's part of the product for the tile at (i0, j0). A Product has operands a
// and b, [rows, depth] and [depth, cols], as at(r, c), and their depth; `transposed` tells in which
// direction an operand lies in memory.
template <class Product>
__device__ inline void accumulate(const Product& p, int64_t i0, int64_t j0, int64_t rows,
                                  int64_t cols, float (&sum)[4][4]) {
  float* a_tile = reinterpret_cast<float*>(ptx::shared_memory());  // [depth][row]
  float* b_tile = a_tile + kSimtDepth * kSimtPitch;                // [depth][column]
  const int thread = static_cast<int>(threadIdx.x), tx = thread % 16, ty = thread / 16;
  for (int64_t p0 = 0; p0 < p.depth; p0 += kSimtDepth) {
    // Neighbouring threads take what lies side by side in memory.
#pragma unroll 2
    for (int e = thread; e < kSimtTile * kSimtDepth; e += kSimtThreads) {
      const int ai = p.a.transposed ? e % kSimtTile : e / kSimtDepth;
      const int ap = p.a.transposed ? e / kSimtTile : e % kSimtDepth;
      const bool a_in = i0 + ai < rows && p0 + ap < p.depth;
      a_tile[ap * kSimtPitch + ai] = a_in ? p.a.at(i0 + ai, p0 + ap) : 0.0f;
      const int bj = p.b.transposed ? e / kSimtDepth : e % kSimtTile;
      const int bp = p.b.transposed ? e % kSimtDepth : e / kSimtTile;
      const bool b_in = j0 + bj < cols && p0 + bp < p.depth;
      b_tile[bp * kSimtPitch + bj] = b_in ? p.b.at(p0 + bp, j0 + bj) : 0.0f;
    }
    __syncthreads();
    // Stops at the depth: zeros beyond it would turn infinities into NaNs.
    const int depth = static_cast<int>(min64(kSimtDepth, p.depth - p0));
    for (int q = 0; q < depth; ++q) {
      const float4 a = ptx::load<float4>(a_tile + q * kSimtPitch + 4 * ty);
      const float4 b = ptx::load<float4>(b_tile + q * kSimtPitch + 4 * tx);
      const float av[4] = {a.x, a.y, a.z, a.w}, bv[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] = __fmaf_rn(av[i], bv[j], sum[i][j]);
    }
    __syncthreads();
  }
}

}  // namespace lk::cuda
