// The products of stacked experts in float32 arithmetic, tile by tile as in simt.cuh: a block finds
// the expert of its tile in the offsets, which stay on the device.
#pragma once

#include "cuda/kernels/simt_tile.cuh"

namespace lk::cuda {

// An operand of which each expert has a part: its rows of the batch, or `size` rows of a stack.
struct GroupedOperand {
  Operand of;
  int64_t size = 0;  // 0: rows of the batch

  __device__ Operand at(int64_t expert, int64_t first_row) const {
    Operand part = of;
    const int64_t begin = size ? expert * size : first_row;
    if (of.m.data)
      part.m.data =
          static_cast<const char*>(of.m.data) + begin * of.m.stride * element_size(of.m.dtype);
    else
      part.w = rows_of(of.w, begin, size);
    return part;
  }
};

struct GroupedProduct {
  GroupedOperand a, b;
  int64_t depth = 0;  // 0: none, or where it is the expert's rows
};

// out[i, j] = scale Σ_p a1(i, p) b1(p, j) + Σ_p a2(i, p) b2(p, j) + bias[j], of each expert.
struct GroupedProducts {
  const int32_t* offsets = nullptr;
  int64_t experts = 0, rows = 0;  // M
  GroupedProduct first, second;
  float scale = 1.0f;
  Vector bias;  // [E, columns]
  MutMatrix out;
  // Rows of `out` that an expert has, whose rows of the batch are the depth; 0: those rows are of
  // `out`.
  int64_t out_size = 0;
};

// Rows [begin, end) of the batch.
struct RowRange {
  int64_t begin = 0, end = 0;
};

// The rows of expert e, which begin where those of e - 1 end; of e = experts, the rows that belong
// to none. Offsets that descend or lead out of the batch are cut to what there is, so that every
// row belongs to one expert at most.
__device__ inline RowRange rows_after(const GroupedProducts& p, const RowRange& before, int64_t e) {
  const int64_t end = e < p.experts ? min64(p.offsets[e], p.rows) : p.rows;
  return {before.end, end < before.end ? before.end : end};
}

__device__ inline Product product_of(const GroupedProduct& p, int64_t e, int64_t begin,
                                     int64_t rows, bool sums_rows) {
  if (!p.a.of.m.data) return {};
  return {p.a.at(e, begin), p.b.at(e, begin), sums_rows ? rows : p.depth};
}

__global__ void __launch_bounds__(kSimtThreads, 2) grouped_product(GroupedProducts p) {
  const int64_t tiles_j = ceil_div(p.out.cols, kSimtTile);
  const int64_t j0 = blockIdx.x % tiles_j * kSimtTile;
  int64_t tile = blockIdx.x / tiles_j, e = 0;
  RowRange own;
  if (p.out_size) {
    const int64_t tiles_i = ceil_div(p.out_size, kSimtTile);
    e = tile / tiles_i;
    tile %= tiles_i;
    for (int64_t i = 0; i <= e; ++i) own = rows_after(p, own, i);
  } else {
    for (;; ++e) {
      if (e > p.experts) return;  // there are fewer tiles than blocks
      own = rows_after(p, own, e);
      const int64_t tiles = ceil_div(own.end - own.begin, kSimtTile);
      if (tile < tiles) break;
      tile -= tiles;
    }
  }
  const int64_t count = own.end - own.begin, rows = p.out_size ? p.out_size : count;
  const int64_t i0 = tile * kSimtTile, first_row = p.out_size ? e * p.out_size : own.begin;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t ti = i0 + thread / 16 * 4, tj = j0 + thread % 16 * 4;
  float sum[4][4] = {};
  const bool sums_rows = p.out_size != 0;
  if (e < p.experts) {
    const Product first = product_of(p.first, e, own.begin, count, sums_rows);
    if (first.depth) {
      accumulate(first, i0, j0, rows, p.out.cols, sum);
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[i][j] *= p.scale;
    }
    accumulate(product_of(p.second, e, own.begin, count, sums_rows), i0, j0, rows, p.out.cols, sum);
  }
  const bool biased = p.bias.data && e < p.experts;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (ti + i >= rows || tj + j >= p.out.cols) continue;
      if (biased) sum[i][j] += load_one(p.bias.data, p.bias.dtype, e * p.out.cols + tj + j);
      store_one(p.out.data, p.out.dtype, (first_row + ti + i) * p.out.stride + tj + j, sum[i][j]);
    }
}

}  // namespace lk::cuda
