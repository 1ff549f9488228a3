// The general product in float32 arithmetic: any dtype, any shape, any block size. Every output
// element is one sum in the order of the depth, so its bits depend on nothing but its operands.
//
//   out[i, j] = mask(i, j) scale Σ_p a1(i, p) b1(p, j) + Σ_p a2(i, p) b2(p, j) + addend + bias[j]
#pragma once

#include "cuda/epilogue.h"
#include "cuda/kernels/simt_tile.cuh"

namespace lk::cuda {

struct SimtArgs {
  Product first, second;
  float scale = 1.0f;  // of the first product
  Dropout mask;        // on the first product, including its scale
  EpilogueOperand addend;
  Vector bias;
  MutMatrix out;
};

// Three blocks on a multiprocessor: left to itself the compiler spills to fit five.
__global__ void __launch_bounds__(kSimtThreads, 3) simt_product(SimtArgs args) {
  const int64_t tiles_j = ceil_div(args.out.cols, kSimtTile);
  const int64_t i0 = blockIdx.x / tiles_j * kSimtTile, j0 = blockIdx.x % tiles_j * kSimtTile;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t ti = i0 + thread / 16 * 4, tj = j0 + thread % 16 * 4;
  float sum[4][4] = {};
  if (args.first.depth) {
    accumulate(args.first, i0, j0, args.out.rows, args.out.cols, sum);
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[i][j] *= args.scale;
        if (args.mask.threshold)
          sum[i][j] = is_kept(args.mask, ti + i, tj + j) ? sum[i][j] * args.mask.scale : 0.0f;
      }
  }
  accumulate(args.second, i0, j0, args.out.rows, args.out.cols, sum);
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (ti + i >= args.out.rows || tj + j >= args.out.cols) continue;
      if (const float* addend = args.addend.row(ti + i)) sum[i][j] += addend[tj + j];
      if (args.bias.data) sum[i][j] += load_one(args.bias.data, args.bias.dtype, tj + j);
      store_one(args.out.data, args.out.dtype, (ti + i) * args.out.stride + tj + j, sum[i][j]);
    }
}

// out[j] = Σ_i m[i, j] in the order of the rows; one thread per column.
__global__ void __launch_bounds__(128) column_sums(Matrix m, MutMatrix out) {
  const int64_t j = int64_t{blockIdx.x} * 128 + threadIdx.x;
  if (j >= m.cols) return;
  float sum = 0.0f;
  for (int64_t i = 0; i < m.rows; ++i) sum += load_one(m.data, m.dtype, i * m.stride + j);
  store_one(out.data, out.dtype, j, sum);
}

}  // namespace lk::cuda
