#include "cuda/kernels/mma.cuh"

#include <algorithm>

#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

// The tile, and how the depth is split: decided from the sizes alone.
struct SplitChoice {
  int rows = 0;  // of a tile
  int split_k = 1, split_steps = 0, steps = 0;
  int64_t partial_pitch = 0;
};

// How many row tiles a problem counts as, for the choice of split_k: the next power of two up to 8.
// The bits of a row depend on split_k, so they change at 16, 64, 128, 256 and 512 rows only.
int64_t counted_row_tiles(int64_t rows, int tile_rows) {
  int64_t count = 1;
  while (count < 8 && count * tile_rows < rows) count *= 2;
  return count;
}

// Weighs blocks to fill the device against what each costs beside its steps: filling the pipeline,
// and its sums on the way to memory and back. Costs are in steps.
int choose_split_k(int64_t tiles, int steps, int tile_rows, int multiprocessors) {
  constexpr int kMostSplits = 16, kFewestSteps = 4;
  const int64_t fixed = tile_rows < 128 ? 4 : 6;
  int best = 1;
  int64_t best_cost = INT64_MAX;
  for (int split_k = 1; split_k <= kMostSplits; ++split_k) {
    const int64_t split_steps = ceil_div(steps, split_k);
    if (split_k > 1 && (split_steps < kFewestSteps || (split_k - 1) * split_steps >= steps))
      continue;
    // Two blocks that share a multiprocessor take less than twice the time of one. Those of 128
    // rows run one after the other.
    const int64_t blocks = ceil_div(tiles * split_k, std::max(multiprocessors, 1));
    const int64_t shared = tile_rows < 128 ? std::max<int64_t>(2 * blocks, 3) : 2 * blocks;
    const int64_t cost = shared * (split_steps + fixed);
    if (cost < best_cost) best = split_k, best_cost = cost;
  }
  return best;
}

SplitChoice choose(int64_t rows, int64_t outputs, int64_t depth, bool base, int device) {
  SplitChoice p;
  if (!base) {  // bound by the output's bytes
    p.rows = 64;
    return p;
  }
  p.rows = rows <= 16 ? 16 : rows <= 64 ? 64 : 128;
  p.steps = static_cast<int>(ceil_div(depth, kMmaDepth));
  const int64_t tiles = counted_row_tiles(rows, p.rows) * ceil_div(outputs, kMmaOutputs);
  p.split_k = choose_split_k(tiles, p.steps, p.rows, device_info(device).multiprocessors);
  p.split_steps = static_cast<int>(ceil_div(p.steps, p.split_k));
  p.partial_pitch = ceil_div(outputs, 4) * 4;
  return p;
}

int64_t workspace(const SplitChoice& p, int64_t rows) {
  return p.split_k == 1 ? 0 : p.split_k * rows * p.partial_pitch * int64_t{sizeof(float)};
}

template <class T, bool backward, int rows>
cudaError_t start(const char* name, const Launch& on, const MmaArgs& args, int64_t tiles) {
  using Kind = MmaKind<T, backward, rows>;
  const int bytes = args.w.packed ? Kind::shared_bytes : Kind::epilogue_bytes;
  const Shape shape{dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(args.split_k)),
                    dim3(kMmaThreads), static_cast<size_t>(bytes)};
  if (tiles > INT32_MAX)
    return failed(cudaErrorInvalidConfiguration, name, shape, on.device, "more than 2^31 tiles");
  return launch(name, on, shape, mma_product<Kind>, args);
}

template <class T, bool backward>
cudaError_t start(const char* name, const Launch& on, const MmaArgs& args, int rows,
                  int64_t tiles) {
  if (rows == 16) return start<T, backward, 16>(name, on, args, tiles);
  if (rows == 64) return start<T, backward, 64>(name, on, args, tiles);
  return start<T, backward, 128>(name, on, args, tiles);
}

template <bool backward>
cudaError_t run(const char* name, MmaArgs args, const Launch& on) {
  const SplitChoice p =
      choose(args.out.rows, args.out.cols, args.in.cols, args.w.packed != nullptr, on.device);
  args.split_k = p.split_k;
  args.split_steps = p.split_steps;
  args.steps = p.steps;
  args.partial_pitch = p.partial_pitch;
  if (p.split_k > 1) args.partial = static_cast<float*>(on.workspace);
  const int64_t tiles = ceil_div(args.out.rows, p.rows) * ceil_div(args.out.cols, kMmaOutputs);
  if (tiles == 0) return cudaSuccess;
  LK_TRY(args.in.dtype == DType::bf16 ? (start<Bf16, backward>(name, on, args, p.rows, tiles))
                                      : (start<F16, backward>(name, on, args, p.rows, tiles)));
  if (p.split_k == 1) return cudaSuccess;
  const int64_t vectors = args.out.rows * p.partial_pitch / 4;
  Shape shape{dim3(static_cast<unsigned>(ceil_div(vectors, kMmaThreads))), dim3(kMmaThreads)};
  shape.overlaps_previous = true;
  return launch("add_split_k", on, shape, add_split_k, args);
}

bool takes(const Matrix& in, const Base& base, const MutMatrix& out) {
  if (in.dtype == DType::f32 || out.dtype != in.dtype || base.dense) return false;
  if (!base.quantized) return true;
  const Weight4& w = *base.quantized;
  return w.N > 0 && w.K > 0 && blocks_fit_rows(w) && is_aligned(w.packed, 16) &&
         is_aligned(in.data, 16) && in.stride % 8 == 0;
}

MmaAdapter adapter(const float* s, const Matrix& factor, int64_t rank) {
  MmaAdapter a;
  if (rank == 0) return a;
  a.s = s;
  a.factor = factor.data;
  a.dtype = factor.dtype;
  a.rank = static_cast<int>(rank);
  return a;
}

}  // namespace

bool mma_takes(const LinearArgs& a) { return takes(a.x, a.base, a.y); }

int64_t mma_workspace(const LinearArgs& a, int device) {
  return workspace(choose(a.x.rows, a.y.cols, a.x.cols, a.base.quantized, device), a.x.rows);
}

cudaError_t mma_linear(const LinearArgs& a, const EpilogueOperand& addend, const Launch& on) {
  MmaArgs args;
  args.in = a.x;
  if (a.base.quantized) args.w = *a.base.quantized;
  if (a.lora.A.data) {
    args.adapter = adapter(a.s, a.lora.B, a.lora.A.rows);
    args.adapter.rank_stride = 1;
    args.adapter.output_stride = a.lora.B.stride;
    args.adapter.scaling = a.lora.scaling;
  }
  args.addend = addend;
  args.bias = a.bias;
  args.out = a.y;
  return run<false>("mma_product (y)", args, on);
}

bool mma_takes(const BackwardArgs& a) { return takes(a.dy, a.base, a.dx); }

int64_t mma_workspace(const BackwardArgs& a, int device) {
  return workspace(choose(a.dy.rows, a.dx.cols, a.dy.cols, a.base.quantized, device), a.dy.rows);
}

cudaError_t mma_dx(const BackwardArgs& a, const EpilogueOperand& addend, const Launch& on) {
  MmaArgs args;
  args.in = a.dy;
  if (a.base.quantized) args.w = *a.base.quantized;
  if (a.lora.A.data) {
    args.adapter = adapter(a.ds, a.lora.A, a.lora.A.rows);
    args.adapter.rank_stride = a.lora.A.stride;
    args.adapter.output_stride = 1;
    args.adapter.mask = a.lora.dropout;
  }
  args.addend = addend;
  args.out = a.dx;
  return run<true>("mma_product (dx)", args, on);
}

}  // namespace lk::cuda
