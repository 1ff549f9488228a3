// What the kernels for many adapters in one batch share: the adapter behind a tile of rows, and
// which rows these are. See BatchPlan and Pages in common/params.h.
//
// Three products make up everything, with A or B as P, x or dy as act, S or dS as C:
//
//   shrink     C[m, r]   = scale Σ_c act[m, c] P[r, c]        S (A), dS (B)
//   expand     out[m, c] = Σ_r C[m, r] P[r, c]                Δ (B), dx (A, then dropout's mask)
//   gradients  G[r, c]   = scale Σ_m C[m, r] act[m, c]        dA (dS, x), dB (S, dy)
//
// Blocks belong to tiles of the plan, never to pairs of rows and adapters; those of padding tiles,
// and of ranks that the tile's adapter does not have, end at once, but not before the kernel ahead
// has: who waits for this one counts on that one as well.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

struct MultiTile {
  int slot, first, rows;  // rows: plan.rows[first] .. + rows
  int rank = 0;
  int page_rank;
  const int32_t* ids;  // of its pages

  __device__ MultiTile(const BatchPlan& plan, const Pages& pages, unsigned index) {
    const lk::Tile tile = plan.tiles[index];
    slot = tile.slot;
    first = tile.row0;
    rows = tile.rows;
    page_rank = static_cast<int>(pages.page_rank);
    ids = plan.page_ids + tile.page0;
    if (rows > 0) rank = pages.ranks[slot];
  }

  // The row of A_pages and B_pages that holds rank r. Eight ranks from a multiple of 8 on are in
  // rows that follow each other.
  __device__ int64_t page_row(int r) const {
    return int64_t{ids[r / page_rank]} * page_rank + r % page_rank;
  }

  // How many rows the slot has, if this is its first tile; else none.
  __device__ int rows_of_slot(const BatchPlan& plan, unsigned index) const {
    if (index > 0 && plan.tiles[index - 1].slot == slot) return 0;
    int count = rows;
    for (int64_t i = index + 1; i < plan.tile_count; ++i) {
      const lk::Tile next = plan.tiles[i];
      if (next.slot != slot || next.rows == 0) break;
      count += next.rows;
    }
    return count;
  }
};

// Ranks of one block of shrink and gradients.
constexpr int kMultiPass = 16;

// Partial sums of shrink: plane p holds the sums over columns [p width, (p + 1) width) of all rows
// of the batch, [pass][M][16]. Planes depend on the columns alone, so that the bits of a row do not
// depend on the others.
struct Planes {
  float* data = nullptr;
  int64_t rows = 0;  // M
  int passes = 1, count = 0, width = 0;

  LK_ANYWHERE int64_t floats() const { return rows * count * passes * kMultiPass; }
  LK_ANYWHERE float* at(int64_t plane, int64_t pass, int64_t row) const {
    return data + ((plane * passes + pass) * rows + row) * kMultiPass;
  }
};

struct ShrinkArgs {
  BatchPlan plan;
  Pages pages;
  Matrix act, factor;    // factor: pages.A or pages.B
  bool dropped = false;  // act under dropout; its scale is applied to the sums
  bool exact = false;    // the factor's elements are exact in one split (see Splits)
  Planes planes;
};

// One gradient of every slot that wants it.
struct GradientJob {
  Matrix act;
  const float* coefficients = nullptr;  // C, [M, s_stride]
  bool dropped = false;                 // act under dropout; else scale is the adapter's scaling
  float* out = nullptr;                 // [grad_rank, act.cols]
  int strips = 0;                       // of the columns of act
};

struct GradientArgs {
  BatchPlan plan;
  Pages pages;
  const int32_t* grad_rows = nullptr;
  int64_t s_stride = 0;
  int passes = 1;
  GradientJob job[2];  // two, so that one launch does both

  __device__ float scale(const GradientJob& j, int slot) const {
    return j.dropped ? dropout_of(pages, slot).scale : pages.scalings[slot];
  }
};

// -- the end of shrink ----------------------------------------------------------------------------

struct PlaneSumArgs {
  BatchPlan plan;
  Pages pages;
  Planes planes;
  bool dropped = false;  // as in ShrinkArgs; else scale is the adapter's scaling
  bool forward = true;   // S; else dS
  float* out = nullptr;  // [M, stride]
  int64_t stride = 0;
  int64_t blocks = 0;
  // Blocks after those fill these with zeros: gradients of slots without rows.
  float* zeros[2] = {};
  int64_t zero_count[2] = {};
};

constexpr int kPlaneThreads = 256, kZeroFloats = 16 * kPlaneThreads;

// C from its planes in their order, zero past a row's rank. A block adds 16 rows x 16 ranks.
__global__ void __launch_bounds__(kPlaneThreads) add_planes(PlaneSumArgs a) {
  ptx::start_next_kernel();
  const int thread = static_cast<int>(threadIdx.x);
  if (blockIdx.x >= a.blocks) {
    ptx::wait_for_previous_kernel();
    int64_t i = (blockIdx.x - a.blocks) * kZeroFloats + thread;
#pragma unroll 1
    for (int n = 0; n < kZeroFloats / kPlaneThreads; ++n, i += kPlaneThreads) {
      if (i < a.zero_count[0])
        a.zeros[0][i] = 0.0f;
      else if (i - a.zero_count[0] < a.zero_count[1])
        a.zeros[1][i - a.zero_count[0]] = 0.0f;
    }
    return;
  }
  const int64_t row_blocks = ceil_div(a.planes.rows, 16), pass = blockIdx.x / row_blocks;
  const int64_t m = blockIdx.x % row_blocks * 16 + thread / 16, r = pass * kMultiPass + thread % 16;
  const bool inside = m < a.planes.rows && r < a.stride;
  const int tile = inside ? a.plan.tile_of_row[m] : -1;
  const int slot = tile >= 0 ? a.plan.tiles[tile].slot : 0;
  const bool has = tile >= 0 && r < a.pages.ranks[slot];
  ptx::wait_for_previous_kernel();
  if (!inside) return;
  float sum = 0.0f;
  if (has) {
    const float* from = a.planes.at(0, pass, m) + thread % 16;
    const int64_t step = a.planes.at(1, 0, 0) - a.planes.at(0, 0, 0);
#pragma unroll 8
    for (int plane = 0; plane < a.planes.count; ++plane)
      sum = __fadd_rn(sum, ptx::load<float>(from + plane * step));
    sum *= a.forward ? dropout_of(a.pages, slot).scale : a.pages.scalings[slot];
  }
  a.out[m * a.stride + r] = sum;
}

}  // namespace lk::cuda
