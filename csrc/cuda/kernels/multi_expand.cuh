// Expand for many adapters in one batch (see multi_tile.cuh): Δ and its like in dx, for every dtype
// and shape, on tensor cores as accurate as in float32 (see mma_adapter.cuh). The bytes of the
// result bound it.
//
//   accumulate        out += Δ              multi_lora_
//   else              out = Δ + bias        also where a row has no adapter (zero + bias)
//   float32           the addend of a kernel for the base; rows without adapter are left out
#pragma once

#include "cuda/kernels/multi_tile.cuh"
#include "cuda/kernels/mma_adapter.cuh"

namespace lk::cuda {

constexpr int kExpandThreads = 256, kExpandColumns = 128;
constexpr int kExpandPitch = kExpandColumns + 8;  // rows of a fragment lie in different banks

constexpr size_t expand_bytes(int rows) { return rows * kExpandPitch * sizeof(float); }

struct ExpandArgs {
  BatchPlan plan;
  Pages pages;
  Matrix factor;                        // pages.B or pages.A
  const float* coefficients = nullptr;  // S or dS, [M, s_stride]
  int64_t s_stride = 0;
  Vector bias;
  bool accumulate = false;
  MutMatrix out;
  int64_t tile_blocks = 0;  // those after them are for rows without adapter
};

// Stands in place of an MmaAdapter: the rows are those of a tile.
struct ExpandAdapter {
  const ExpandArgs& args;
  const MultiTile& tile;
  const int32_t* numbers;  // of the rows
  const void* factor;
  DType dtype;
  int rank;
  int64_t rank_stride;
  static constexpr int64_t output_stride = 1;
  float scaling;
  Dropout mask;

  __device__ float coefficient(int64_t row, int r) const {
    return ptx::load<float>(args.coefficients + mask_row(row) * args.s_stride + r) * scaling;
  }
  // r and r + 4, for r % 8 < 4, are in rows rank_stride * 4 apart.
  __device__ int64_t factor_row(int r) const { return tile.page_row(r) * rank_stride; }
  __device__ int64_t mask_row(int64_t row) const {
    return ptx::load_const<int32_t>(numbers + (row < tile.rows ? row : 0));
  }
};

// out = v, or += v, for those of eight elements of a row from `column` on that are inside.
__device__ __forceinline__ void store_eight(const MutMatrix& out, int64_t row, int64_t column,
                                            bool accumulate, float (&v)[8]) {
  const int64_t at = row * out.stride + column, left = out.cols - column;
  unsigned char* p = static_cast<unsigned char*>(out.data) + at * element_size(out.dtype);
  if (left < 8 || reinterpret_cast<uintptr_t>(p) % 16 != 0) {
#pragma unroll
    for (int e = 0; e < 8; ++e)
      if (e < left)
        store_one(out.data, out.dtype, at + e,
                  accumulate ? v[e] + load_one(out.data, out.dtype, at + e) : v[e]);
    return;
  }
  if (out.dtype == DType::f32) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float4 before = accumulate ? ptx::load<float4>(p + 16 * h) : make_float4(0, 0, 0, 0);
      ptx::store(p + 16 * h, make_float4(v[4 * h] + before.x, v[4 * h + 1] + before.y,
                                         v[4 * h + 2] + before.z, v[4 * h + 3] + before.w));
    }
    return;
  }
  const bool bf16 = out.dtype == DType::bf16;
  if (accumulate) {
    const uint4 before = ptx::load<uint4>(p);
    const uint32_t word[4] = {before.x, before.y, before.z, before.w};
#pragma unroll
    for (int e = 0; e < 8; ++e) {
      const uint16_t bits = static_cast<uint16_t>(word[e / 2] >> (e % 2 * 16));
      v[e] += bf16 ? ptx::widen<Bf16>(bits) : ptx::widen<F16>(bits);
    }
  }
  uint32_t word[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    word[i] =
        bf16 ? ptx::pack<Bf16>(v[2 * i], v[2 * i + 1]) : ptx::pack<F16>(v[2 * i], v[2 * i + 1]);
  ptx::store(p, make_uint4(word[0], word[1], word[2], word[3]));
}

__device__ __forceinline__ void add_bias(const Vector& bias, int64_t column, int64_t columns,
                                         float (&v)[8]) {
#pragma unroll
  for (int e = 0; e < 8; ++e)
    if (column + e < columns) v[e] += load_one(bias.data, bias.dtype, column + e);
}

// Writes 16 rows x 128 columns of the rows without adapter.
__device__ __forceinline__ void fill_others(const ExpandArgs& a) {
  const int64_t strips = ceil_div(a.out.cols, kExpandColumns), block = blockIdx.x - a.tile_blocks;
  const int64_t row = block / strips * 16 + threadIdx.x / 16;
  const int64_t column = block % strips * kExpandColumns + threadIdx.x % 16 * 8;
  ptx::wait_for_previous_kernel();
  if (row >= a.out.rows || column >= a.out.cols || a.plan.tile_of_row[row] >= 0) return;
  float v[8] = {};
  if (a.bias.data) add_bias(a.bias, column, a.out.cols, v);
  store_eight(a.out, row, column, false, v);
}

// A block of 8 warps: `rows` rows of a tile x 128 columns; numbered columns first.
template <int rows, bool backward>
__global__ void __launch_bounds__(kExpandThreads, 2) multi_expand(ExpandArgs args) {
  ptx::start_next_kernel();
  if (blockIdx.x >= args.tile_blocks) return fill_others(args);
  constexpr int warps_m = rows / 16 < 2 ? 1 : 2, warps_n = 8 / warps_m;
  constexpr int m = rows / warps_m / 16, n = kExpandColumns / warps_n / 8;
  const unsigned strips = static_cast<unsigned>(ceil_div(args.out.cols, kExpandColumns));
  const unsigned pieces = static_cast<unsigned>(args.plan.tile_rows + rows - 1) / rows;
  const int64_t column0 = int64_t{blockIdx.x % strips} * kExpandColumns;
  const int row0 = static_cast<int>(blockIdx.x / strips % pieces) * rows;
  const MultiTile tile(args.plan, args.pages, blockIdx.x / strips / pieces);
  if (row0 >= tile.rows || (args.accumulate && tile.rank == 0))
    return ptx::wait_for_previous_kernel();
  const int32_t* numbers = args.plan.rows + tile.first;
  const ExpandAdapter adapter{args,
                              tile,
                              numbers,
                              args.factor.data,
                              args.factor.dtype,
                              tile.rank,
                              args.factor.cols,
                              backward ? 1.0f : args.pages.scalings[tile.slot],
                              backward ? dropout_of(args.pages, tile.slot) : Dropout{}};
  const int thread = static_cast<int>(threadIdx.x), warp = thread / 32, lane = thread % 32;
  const int warp_row = warp / warps_n * m * 16, warp_column = warp % warps_n * n * 8;
  float sum[m][n][4] = {};
  ptx::wait_for_previous_kernel();
  add_adapter<backward>(adapter, row0 + warp_row, tile.rows, column0 + warp_column, args.out.cols,
                        sum);

  float* shared = reinterpret_cast<float*>(ptx::shared_memory());
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int half = 0; half < 2; ++half)
        ptx::store(shared + (warp_row + 16 * i + 8 * half + lane / 4) * kExpandPitch + warp_column +
                       8 * j + 2 * (lane % 4),
                   make_float2(sum[i][j][2 * half], sum[i][j][2 * half + 1]));
  __syncthreads();
  const int column = thread % 16 * 8;
  if (column0 + column >= args.out.cols) return;
#pragma unroll 1
  for (int row = thread / 16; row < rows && row0 + row < tile.rows; row += kExpandThreads / 16) {
    const float* from = shared + row * kExpandPitch + column;
    const float4 low = ptx::load<float4>(from), high = ptx::load<float4>(from + 4);
    float v[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
    if (args.bias.data) add_bias(args.bias, column0 + column, args.out.cols, v);
    store_eight(args.out, ptx::load_const<int32_t>(numbers + row0 + row), column0 + column,
                args.accumulate, v);
  }
}

}  // namespace lk::cuda
