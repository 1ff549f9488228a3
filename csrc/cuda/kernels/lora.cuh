// The skinny products of an adapter: a tall matrix of activations, read once, times matrices that
// are at most 16 wide per pass.
//
//   row product      rows[m, r]    = Σ_c act[m, c] P[c, r]    S (P = Aᵀ), dS (P = B)
//   column product   columns[c, r] = Σ_m act[m, c] Q[m, r]    dB (Q = S), dAᵀ (Q = dS)
//
// act is x, under dropout or not, or dy; a column of ones beside Q gives dbias. A block owns 256
// columns of a range of rows and walks down the rows; its share of P stays in shared memory, its
// column sums stay in registers:
//
//              256 columns (strip)
//            | warp 0 | 1 | 2 | 3 |   each warp: 64 columns = 4 slices of 16
//   32 rows  |   tile in the ring |   -> row product, added over the warps    -> partial[strip]
//   32 rows  |        ...         |
//              column product, in registers until the last row                -> partial[range]
//
// A second kernel adds the partial sums in their order. The strips are the same for every number of
// rows, so the bits of a row of S and dS depend on that row alone.
//
// Partial sums are [strip or range][pass][row or column][16], float32.
//
// Everything is as accurate as float32: a 16-bit activation is exact in a matrix instruction, the
// other operand is a sum of splits that are (see Splits).
#pragma once

#include "cuda/kernels/lora_tile.cuh"

namespace lk::cuda {

struct SkinnyArgs {
  Matrix act;
  int64_t first_row = 0;  // of act, for dropout
  Dropout dropout;        // its scale is applied to the sums
  SkinnyRows p;
  SkinnyColumns q;
  float *row_partial = nullptr, *column_partial = nullptr;
  int row_passes = 0, column_passes = 0;
  // Blocks are numbered pass first: those that read the same activations run at the same time, and
  // all but one find them in the second-level cache.
  int first_pass = 0, passes = 0, strips = 0;
  int range = 0;  // rows of a block, a multiple of kLoraRows
};

// -- kernels --------------------------------------------------------------------------------------

// How many blocks are meant to run on one multiprocessor at a time.
constexpr int lora_residents(bool rows, bool columns) { return rows && columns ? 2 : 3; }

// Shared memory: | P | row sums of the warps | Q, two | ring |, without what is not needed.
constexpr size_t lora_shared_bytes(bool rows, bool columns) {
  return (rows ? kLoraPBytes + kLoraSumBytes : 0) + (columns ? 2 * kLoraQBytes : 0) +
         kLoraStages * kLoraTileBytes;
}

template <class T, bool kRowProduct, bool kColumnProduct>
__global__ void __launch_bounds__(kLoraThreads, lora_residents(kRowProduct, kColumnProduct))
    skinny_products(SkinnyArgs args) {
  float* p = reinterpret_cast<float*>(ptx::shared_memory());
  float* sums = p + (kRowProduct ? kLoraPBytes / 4 : 0);
  float* q = sums + (kRowProduct ? kLoraSumBytes / 4 : 0);
  unsigned char* ring =
      reinterpret_cast<unsigned char*>(q + (kColumnProduct ? 2 * kLoraQBytes / 4 : 0));
  const auto slot = [ring](int step) { return ring + step % kLoraStages * kLoraTileBytes; };

  const int pass = args.first_pass + static_cast<int>(blockIdx.x) % args.passes;
  const int strip = static_cast<int>(blockIdx.x) / args.passes % args.strips;
  const int range = static_cast<int>(blockIdx.x) / args.passes / args.strips;
  const int column0 = strip * kLoraColumns, r0 = pass * kLoraPass;
  const int rows = static_cast<int>(args.act.rows), cols = static_cast<int>(args.act.cols);
  const int row0 = range * args.range, end = rows - row0 < args.range ? rows : row0 + args.range;
  const int steps = (end - row0 + kLoraRows - 1) / kLoraRows;
  const Copier copier(args.act, column0, end);

  ptx::wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < kLoraStages - 1; ++s) {
    if (s < steps) copier.issue(slot(s), row0 + s * kLoraRows);
    ptx::copy_async_commit();
  }
  QueuedRows queued;
  if constexpr (kColumnProduct) queued.load(args.q, row0, end, r0);
  if constexpr (kRowProduct) stage_p(args.p, column0, cols, r0, p);
  const uint64_t seed = args.dropout.threshold ? *args.dropout.seed : 0;

  typename Tile<T>::Columns columns;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int row = row0 + step * kLoraRows;
    unsigned char* tile = slot(step);
    float* q_tile = q + step % 2 * (kLoraQBytes / 4);
    if constexpr (kColumnProduct) queued.store(q_tile);
    ptx::copy_async_wait<kLoraStages - 2>();
    if (args.dropout.threshold)
      copier.drop(
          tile, [&](int i) { return args.first_row + row + i; }, seed, args.dropout.threshold);
    __syncthreads();  // the tile is there; the one before it has been used by all
    const int ahead = step + kLoraStages - 1;
    if (ahead < steps) copier.issue(slot(ahead), row0 + ahead * kLoraRows);
    ptx::copy_async_commit();
    if constexpr (kColumnProduct) {
      if (step + 1 < steps) queued.load(args.q, row + kLoraRows, end, r0);
      Tile<T>::add_columns(columns, tile, q_tile);
    }
    if constexpr (kRowProduct) {
      {
        typename Tile<T>::Rows rows;
        Tile<T>::add_rows(rows, tile, p, args.p.exact);
        leave_rows(rows, sums);
      }
      __syncthreads();
      if (pass < args.row_passes) {
        float* to = args.row_partial +
                    ((int64_t{strip} * args.row_passes + pass) * args.act.rows + row) * kLoraPass;
        write_rows(sums, end - row,
                   [to](int i, int r, float2 v) { ptx::store(to + i * kLoraPass + r, v); });
      }
    }
  }
  ptx::start_next_kernel();
  if constexpr (kColumnProduct)
    write_columns(
        columns,
        args.column_partial +
            ((int64_t{range} * args.column_passes + pass) * args.act.cols + column0) * kLoraPass,
        cols - column0);
}

// out[i, r] = scale Σ_k partial[k][r / 16][i][r % 16], and the same without scale into
// after[i] for r = R.
struct PartialSums {
  const float* partial = nullptr;
  int count = 0, passes = 0;
  int first_pass = 0;  // those before it are not wanted
  int64_t items = 0;   // i
  int64_t R = 0;
  float scale = 1.0f;
  void *out = nullptr, *after = nullptr;  // null: not wanted
  DType out_dtype = DType::f32, after_dtype = DType::f32;
  int64_t item_stride = 0, r_stride = 0;  // of out

  LK_ANYWHERE int64_t blocks() const { return (passes - first_pass) * ceil_div(items, 16); }
};

// A block adds 16 items x 16 ranks. Two jobs, so that one launch does all that a product left.
__global__ void __launch_bounds__(256) add_partials(PartialSums first, PartialSums second) {
  ptx::wait_for_previous_kernel();
  const int64_t first_blocks = first.blocks();
  const bool is_first = blockIdx.x < first_blocks;
  const PartialSums job = is_first ? first : second;
  const int64_t block = is_first ? blockIdx.x : blockIdx.x - first_blocks;
  const int64_t per_pass = ceil_div(job.items, 16), pass = job.first_pass + block / per_pass;
  const int64_t item = block % per_pass * 16 + threadIdx.x / 16;
  const int64_t r = pass * kLoraPass + threadIdx.x % 16;
  if (item >= job.items) return;
  const bool is_out = r < job.R && job.out, is_after = r == job.R && job.after;
  if (!is_out && !is_after) return;
  const float* from = job.partial + (pass * job.items + item) * kLoraPass + threadIdx.x % 16;
  const int64_t step = job.passes * job.items * kLoraPass;
  float sum = 0.0f;
#pragma unroll 8
  for (int k = 0; k < job.count; ++k) sum += from[k * step];
  if (is_out)
    store_one(job.out, job.out_dtype, item * job.item_stride + r * job.r_stride, job.scale * sum);
  else
    store_one(job.after, job.after_dtype, item, sum);
}

}  // namespace lk::cuda
