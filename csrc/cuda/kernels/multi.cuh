// Shrink and gradients of many adapters in one batch (see multi_tile.cuh) for 16-bit activations,
// on tensor cores: the row and the column product of lora.cuh, whose rows are those of a tile or a
// slot, wherever they lie in the batch, and whose P is rows of pages.
#pragma once

#include "cuda/kernels/lora_tile.cuh"
#include "cuda/kernels/multi_tile.cuh"

namespace lk::cuda {

// P[c, r] of a tile's adapter.
struct PagedRows {
  const MultiTile& tile;
  const void* data;
  DType dtype;
  int64_t cols;
  int R;
  static constexpr int64_t c_stride = 1;

  __device__ int64_t at(int r) const { return tile.page_row(r) * cols; }
};

// Q[m, r] = C[numbers[m], r].
struct ListedRows {
  const float* data;
  const int32_t* numbers;
  int64_t stride;
  int R;
  static constexpr bool ones = false;

  __device__ const float* row(int m) const {
    return data + ptx::load_const<int32_t>(numbers + m) * stride;
  }
};

// Tiles of the ring that `rows` rows use.
constexpr int multi_stages(int rows) {
  const int steps = (rows + kLoraRows - 1) / kLoraRows;
  return steps < kLoraStages ? steps : kLoraStages;
}
// | P | row sums of the warps | ring |
constexpr size_t multi_shrink_bytes(int tile_rows) {
  return kLoraPBytes + kLoraSumBytes + multi_stages(tile_rows) * kLoraTileBytes;
}
// One slot may be all of a batch, and few blocks have to ask for what fills the memory's pipes.
constexpr int kGradientStages = 5;
// | Q, two | ring |
constexpr size_t kGradientBytes = 2 * kLoraQBytes + kGradientStages * kLoraTileBytes;
static_assert(kGradientBytes <= 99 << 10, "fits every GPU");
static_assert(kMultiPass == kLoraPass, "a pass is 16 ranks");

// A block: tile x plane x pass, numbered pass first: blocks that read the same activations run at
// the same time. It goes through the strips of its plane; from the second on it adds to what it
// wrote itself.
template <class T>
__global__ void __launch_bounds__(kLoraThreads, 3) multi_shrink(ShrinkArgs args) {
  ptx::start_next_kernel();
  float* p = reinterpret_cast<float*>(ptx::shared_memory());
  float* sums = p + kLoraPBytes / 4;
  unsigned char* ring = reinterpret_cast<unsigned char*>(sums + kLoraSumBytes / 4);
  const auto slot = [ring](int step) { return ring + step % kLoraStages * kLoraTileBytes; };

  const unsigned passes = static_cast<unsigned>(args.planes.passes);
  const unsigned planes = static_cast<unsigned>(args.planes.count);
  const int pass = static_cast<int>(blockIdx.x % passes);
  const int plane = static_cast<int>(blockIdx.x / passes % planes);
  const MultiTile tile(args.plan, args.pages, blockIdx.x / passes / planes);
  const int r0 = pass * kLoraPass;
  if (r0 >= tile.rank) return;
  const int32_t* numbers = args.plan.rows + tile.first;
  const int steps = (tile.rows + kLoraRows - 1) / kLoraRows;
  const Dropout dropout = args.dropped ? dropout_of(args.pages, tile.slot) : Dropout{};
  const uint64_t seed = dropout.threshold ? *dropout.seed : 0;
  const int columns = static_cast<int>(args.act.cols), begin = plane * args.planes.width;
  const int end = columns - begin < args.planes.width ? columns : begin + args.planes.width;
  const PagedRows paged{tile, args.factor.data, args.factor.dtype, args.factor.cols, tile.rank};

#pragma unroll 1
  for (int column0 = begin; column0 < end; column0 += kLoraColumns) {
    const Copier copier(args.act, column0, tile.rows);
#pragma unroll
    for (int s = 0; s < kLoraStages - 1; ++s) {
      if (s < steps) copier.issue(slot(s), numbers, s * kLoraRows);
      ptx::copy_async_commit();
    }
    stage_p(paged, column0, columns, r0, p);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
      const int row0 = step * kLoraRows;
      const auto number = [=](int i) {
        return int64_t{ptx::load_const<int32_t>(numbers + min64(row0 + i, tile.rows - 1))};
      };
      ptx::copy_async_wait<kLoraStages - 2>();
      if (dropout.threshold) copier.drop(slot(step), number, seed, dropout.threshold);
      __syncthreads();  // the tile is there; the one before it has been used by all
      const int ahead = step + kLoraStages - 1;
      if (ahead < steps) copier.issue(slot(ahead), numbers, ahead * kLoraRows);
      ptx::copy_async_commit();
      {
        typename Tile<T>::Rows rows;
        Tile<T>::add_rows(rows, slot(step), p, args.exact);
        leave_rows(rows, sums);
      }
      __syncthreads();  // P and the tile have been used by all: the next strip may come
      write_rows(sums, tile.rows - row0, [&](int i, int r, float2 v) {
        float* to = args.planes.at(plane, pass, number(i)) + r;
        if (column0 > begin) {
          const float2 before = ptx::load<float2>(to);
          v = make_float2(before.x + v.x, before.y + v.y);
        }
        ptx::store(to, v);
      });
    }
  }
}

// A block: slot x 256 columns of one of the two jobs x pass, numbered pass first. It goes through
// all rows of the slot in their order. The slot is that of a tile; only its first tile counts.
template <class T>
__global__ void __launch_bounds__(kLoraThreads, 2) multi_gradients(GradientArgs args) {
  ptx::start_next_kernel();
  float* q = reinterpret_cast<float*>(ptx::shared_memory());
  unsigned char* ring = reinterpret_cast<unsigned char*>(q + 2 * kLoraQBytes / 4);
  const auto slot = [ring](int step) { return ring + step % kGradientStages * kLoraTileBytes; };

  const unsigned passes = static_cast<unsigned>(args.passes);
  const unsigned strips0 = static_cast<unsigned>(args.job[0].strips);
  const unsigned strips = strips0 + static_cast<unsigned>(args.job[1].strips);
  const unsigned strip = blockIdx.x / passes % strips, index = blockIdx.x / passes / strips;
  const GradientJob& job = args.job[strip < strips0 ? 0 : 1];
  const int column0 = static_cast<int>(strip < strips0 ? strip : strip - strips0) * kLoraColumns;
  const int r0 = static_cast<int>(blockIdx.x % passes) * kLoraPass;
  const MultiTile tile(args.plan, args.pages, index);
  if (r0 >= tile.rank) return ptx::wait_for_previous_kernel();
  const int64_t grad_row = args.grad_rows[tile.slot];
  const int rows = grad_row < 0 ? 0 : tile.rows_of_slot(args.plan, index);
  if (rows == 0) return ptx::wait_for_previous_kernel();
  const int32_t* numbers = args.plan.rows + tile.first;
  const int steps = (rows + kLoraRows - 1) / kLoraRows;
  const Dropout dropout = job.dropped ? dropout_of(args.pages, tile.slot) : Dropout{};
  const uint64_t seed = dropout.threshold ? *dropout.seed : 0;
  const ListedRows coefficients{job.coefficients, numbers, args.s_stride, tile.rank};
  const Copier copier(job.act, column0, rows);

#pragma unroll
  for (int s = 0; s < kGradientStages - 1; ++s) {
    if (s < steps) copier.issue(slot(s), numbers, s * kLoraRows);
    ptx::copy_async_commit();
  }
  ptx::wait_for_previous_kernel();  // C; the gradients' zeros
  QueuedRows queued;
  queued.load(coefficients, 0, rows, r0);
  typename Tile<T>::Columns columns;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int row0 = step * kLoraRows;
    float* q_tile = q + step % 2 * (kLoraQBytes / 4);
    queued.store(q_tile);
    ptx::copy_async_wait<kGradientStages - 2>();
    if (dropout.threshold)
      copier.drop(
          slot(step),
          [=](int i) {
            return int64_t{ptx::load_const<int32_t>(numbers + min64(row0 + i, rows - 1))};
          },
          seed, dropout.threshold);
    __syncthreads();  // the tile is there; the one before it has been used by all
    const int ahead = step + kGradientStages - 1;
    if (ahead < steps) copier.issue(slot(ahead), numbers, ahead * kLoraRows);
    ptx::copy_async_commit();
    if (step + 1 < steps) queued.load(coefficients, row0 + kLoraRows, rows, r0);
    Tile<T>::add_columns(columns, slot(step), q_tile);
  }

  const float scale = args.scale(job, tile.slot);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t cols = job.act.cols;
#pragma unroll
  for (int s = 0; s < kLoraSlices; ++s)
#pragma unroll
    for (int r8 = 0; r8 < kFragmentTiles; ++r8)
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t c = column0 + (warp * kLoraSlices + s) * 16 + i / 2 * 8 + lane / 4;
        const int r = r0 + r8 * 8 + 2 * (lane % 4) + i % 2;
        if (c < cols && r < tile.rank)
          job.out[(grad_row + r) * cols + c] = scale * columns[s][r8].at(i);
      }
}

}  // namespace lk::cuda
