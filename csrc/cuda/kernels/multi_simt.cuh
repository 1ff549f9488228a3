// Shrink and gradients of many adapters in one batch (see multi_tile.cuh) in float32 arithmetic:
// any dtype and shape.
#pragma once

#include "cuda/kernels/multi_tile.cuh"
#include "cuda/kernels/simt_tile.cuh"

namespace lk::cuda {

// Rows numbers[i] of a matrix, columns from column0, under dropout without its scale.
struct ListedOperand {
  const Matrix& m;
  const int32_t* numbers;
  int64_t column0;
  bool transposed;
  Dropout dropout;

  __device__ float at(int64_t r, int64_t c) const {
    const int64_t row = numbers[transposed ? c : r], column = column0 + (transposed ? r : c);
    return is_kept(dropout, row, column) ? load_one(m.data, m.dtype, row * m.stride + column)
                                         : 0.0f;
  }
};

// (c, r): column column0 + c of rank rank0 + r.
struct PagedOperand {
  const Matrix& m;
  const MultiTile& tile;
  int64_t column0;
  static constexpr bool transposed = true;

  __device__ float at(int64_t c, int64_t r) const {
    return load_one(m.data, m.dtype, tile.page_row(static_cast<int>(r)) * m.cols + column0 + c);
  }
};

template <class A, class B>
struct ProductOf {
  A a;
  B b;
  int64_t depth;
};

// A block: tile x plane x 64 rows x 64 ranks.
__global__ void __launch_bounds__(kSimtThreads, 3)
    multi_shrink_simt(ShrinkArgs args, int row_blocks, int rank_blocks) {
  ptx::start_next_kernel();
  const unsigned in_tile = static_cast<unsigned>(row_blocks * rank_blocks);
  const unsigned planes = static_cast<unsigned>(args.planes.count);
  const int64_t j0 = static_cast<int>(blockIdx.x % in_tile) % rank_blocks * kSimtTile;
  const int64_t i0 = static_cast<int>(blockIdx.x % in_tile) / rank_blocks * kSimtTile;
  const int plane = static_cast<int>(blockIdx.x / in_tile % planes);
  const MultiTile tile(args.plan, args.pages, blockIdx.x / in_tile / planes);
  if (i0 >= tile.rows || j0 >= tile.rank) return;
  const int32_t* numbers = args.plan.rows + tile.first;
  const int64_t column0 = int64_t{plane} * args.planes.width;
  const Dropout dropout = args.dropped ? dropout_of(args.pages, tile.slot) : Dropout{};
  const ProductOf<ListedOperand, PagedOperand> product{
      {args.act, numbers, column0, false, dropout},
      {args.factor, tile, column0},
      min64(args.planes.width, args.act.cols - column0)};
  float sum[4][4] = {};
  accumulate(product, i0, j0, tile.rows, tile.rank, sum);
  const int64_t ti = i0 + threadIdx.x / 16 * 4, tj = j0 + threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (ti + i < tile.rows && tj + j < tile.rank)
        args.planes.at(plane, (tj + j) / kMultiPass, numbers[ti + i])[(tj + j) % kMultiPass] =
            sum[i][j];
}

// A block: slot x 64 ranks x 64 columns of one of the two jobs.
__global__ void __launch_bounds__(kSimtThreads, 3)
    multi_gradients_simt(GradientArgs args, int rank_blocks) {
  ptx::start_next_kernel();
  const unsigned ranks = static_cast<unsigned>(rank_blocks);
  const unsigned strips0 = static_cast<unsigned>(args.job[0].strips);
  const unsigned strips = strips0 + static_cast<unsigned>(args.job[1].strips);
  const unsigned strip = blockIdx.x / ranks % strips, index = blockIdx.x / ranks / strips;
  const GradientJob& job = args.job[strip < strips0 ? 0 : 1];
  const int64_t i0 = blockIdx.x % ranks * kSimtTile;
  const int64_t j0 = int64_t{strip < strips0 ? strip : strip - strips0} * kSimtTile;
  const MultiTile tile(args.plan, args.pages, index);
  if (i0 >= tile.rank) return ptx::wait_for_previous_kernel();
  const int64_t grad_row = args.grad_rows[tile.slot];
  const int rows = grad_row < 0 ? 0 : tile.rows_of_slot(args.plan, index);
  if (rows == 0) return ptx::wait_for_previous_kernel();
  const int32_t* numbers = args.plan.rows + tile.first;
  const Dropout dropout = job.dropped ? dropout_of(args.pages, tile.slot) : Dropout{};
  const Matrix coefficients{job.coefficients, DType::f32, 0, args.s_stride, args.s_stride};
  const ProductOf<ListedOperand, ListedOperand> product{
      {coefficients, numbers, 0, true, Dropout{}}, {job.act, numbers, 0, false, dropout}, rows};
  ptx::wait_for_previous_kernel();
  float sum[4][4] = {};
  accumulate(product, i0, j0, tile.rank, job.act.cols, sum);
  const float scale = args.scale(job, tile.slot);
  const int64_t ti = i0 + threadIdx.x / 16 * 4, tj = j0 + threadIdx.x % 16 * 4;
#pragma unroll
  for (int i = 0; i < 4; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (ti + i < tile.rank && tj + j < job.act.cols)
        job.out[(grad_row + ti + i) * job.act.cols + tj + j] = scale * sum[i][j];
}

}  // namespace lk::cuda
