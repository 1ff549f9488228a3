// Many adapters in one batch: which kernels run, and the memory between them.
#include <algorithm>

#include "cuda/kernels/multi.cuh"
#include "cuda/kernels/multi_expand.cuh"
#include "cuda/kernels/multi_simt.cuh"
#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

constexpr int64_t kMostPlanes = 16;

// Launches one after the other. All but the first may start before the one ahead has completed: the
// first reads from its beginning what others wrote.
class Sequence {
 public:
  explicit Sequence(const Launch& on) : on_(on) {}

  // Launches the kernel, unless there are no blocks. They lie along grid x, which alone has room
  // for many.
  template <class... P>
  cudaError_t run(const char* name, int64_t blocks, int threads, size_t shared_bytes,
                  void (*kernel)(P...), typename AsIs<P>::type... args) {
    if (blocks == 0) return cudaSuccess;
    const Shape shape{dim3(static_cast<unsigned>(blocks)), dim3(static_cast<unsigned>(threads)),
                      shared_bytes, started_};
    if (blocks > INT32_MAX)
      return failed(cudaErrorInvalidConfiguration, name, shape, on_.device,
                    "more than 2^31 blocks");
    started_ = true;
    return launch(name, on_, shape, kernel, args...);
  }

 private:
  const Launch& on_;
  bool started_ = false;
};

// -- the three products ---------------------------------------------------------------------------

Planes planes_for(int64_t rows, int64_t columns, const BatchPlan& plan) {
  Planes p;
  const int64_t strips = ceil_div(columns, kLoraColumns);
  const int64_t width = std::max<int64_t>(1, ceil_div(strips, kMostPlanes)) * kLoraColumns;
  p.rows = rows;
  p.passes = static_cast<int>(ceil_div(plan.max_rank, kMultiPass));
  p.count = static_cast<int>(ceil_div(columns, width));
  p.width = static_cast<int>(width);
  return p;
}

// Computes the planes of act times `factor`.
cudaError_t shrink(ShrinkArgs a, Sequence& sequence) {
  a.exact = is_exact(a.factor.dtype, a.act.dtype);
  const int64_t blocks = a.plan.tile_count * a.planes.count;
  if (lora_takes(a.act))
    return sequence.run("multi_shrink", blocks * a.planes.passes, kLoraThreads,
                        multi_shrink_bytes(a.plan.tile_rows),
                        a.act.dtype == DType::bf16 ? multi_shrink<Bf16> : multi_shrink<F16>, a);
  const int row_blocks = static_cast<int>(ceil_div(a.plan.tile_rows, kSimtTile));
  const int rank_blocks = static_cast<int>(ceil_div(a.plan.max_rank, kSimtTile));
  return sequence.run("multi_shrink_simt", blocks * row_blocks * rank_blocks, kSimtThreads,
                      kSimtShared, multi_shrink_simt, a, row_blocks, rank_blocks);
}

cudaError_t add(PlaneSumArgs a, Sequence& sequence) {
  a.blocks = ceil_div(a.planes.rows, 16) * ceil_div(a.stride, kMultiPass);
  const int64_t zeros = a.zero_count[0] + a.zero_count[1];
  return sequence.run("add_planes", a.blocks + ceil_div(zeros, kZeroFloats), kPlaneThreads, 0,
                      add_planes, a);
}

// others: rows without adapter are written as well.
template <bool backward>
cudaError_t expand(ExpandArgs a, bool others, Sequence& sequence) {
  const int64_t strips = ceil_div(a.out.cols, kExpandColumns);
  const int rows = a.plan.tile_rows <= 32 ? 16 : 64;
  a.tile_blocks = a.plan.tile_count * ceil_div(a.plan.tile_rows, rows) * strips;
  const int64_t blocks = a.tile_blocks + (others ? ceil_div(a.out.rows, 16) * strips : 0);
  return sequence.run("multi_expand", blocks, kExpandThreads, expand_bytes(rows),
                      rows == 16 ? multi_expand<16, backward> : multi_expand<64, backward>, a);
}

cudaError_t gradients(const MultiBackwardArgs& a, Sequence& sequence) {
  const bool tensor_cores = lora_takes(a.x) && lora_takes(a.dy) && a.x.dtype == a.dy.dtype;
  const int columns = tensor_cores ? kLoraColumns : kSimtTile;
  GradientArgs g;
  g.plan = a.plan;
  g.pages = a.pages;
  g.grad_rows = a.grad_rows;
  g.s_stride = a.s_stride;
  g.passes = static_cast<int>(ceil_div(a.plan.max_rank, kMultiPass));
  g.job[0] = {a.x, a.ds, true, a.dA, static_cast<int>(ceil_div(a.x.cols, columns))};
  g.job[1] = {a.dy, a.s, false, a.dB, static_cast<int>(ceil_div(a.dy.cols, columns))};
  const int64_t blocks = a.plan.tile_count * (int64_t{g.job[0].strips} + g.job[1].strips);
  if (tensor_cores)
    return sequence.run("multi_gradients", blocks * g.passes, kLoraThreads, kGradientBytes,
                        a.x.dtype == DType::bf16 ? multi_gradients<Bf16> : multi_gradients<F16>, g);
  const int rank_blocks = static_cast<int>(ceil_div(a.plan.max_rank, kSimtTile));
  return sequence.run("multi_gradients_simt", blocks * rank_blocks, kSimtThreads, kSimtShared,
                      multi_gradients_simt, g, rank_blocks);
}

// -- with the base --------------------------------------------------------------------------------

// Workspace: the addend, if there is one, then the planes, whose place the base's own scratch
// memory takes when they have been added.
struct Memory {
  int64_t addend_bytes = 0;
  EpilogueOperand addend;
  Launch base;
  Planes planes;

  Memory(int64_t rows, int64_t outputs, bool has_addend, const Planes& p, const BatchPlan& plan,
         const Launch& on)
      : base(on), planes(p) {
    const int64_t stride = ceil_div(outputs, 4) * 4;
    if (has_addend) addend_bytes = ceil_div(rows * stride * 4, 256) * 256;
    unsigned char* memory = static_cast<unsigned char*>(on.workspace);
    if (has_addend) addend = {reinterpret_cast<float*>(memory), stride, plan.tile_of_row};
    base.workspace = memory + addend_bytes;
    planes.data = reinterpret_cast<float*>(base.workspace);
  }
  int64_t bytes(int64_t base_bytes) const {
    return addend_bytes + std::max(planes.floats() * 4, base_bytes);
  }
  MutMatrix addend_of(const MutMatrix& out) const {
    return {addend.data, DType::f32, out.rows, out.cols, addend.stride};
  }
};

LinearArgs base_of(const MultiArgs& a) {
  LinearArgs b;
  b.x = a.x;
  b.base.quantized = a.base;
  b.bias = a.bias;
  b.y = a.y;
  return b;
}

BackwardArgs base_of(const MultiBackwardArgs& a) {
  BackwardArgs b;
  b.dy = a.dy;
  b.base.quantized = a.base;
  b.dx = a.dx;
  b.dbias = a.dbias;
  return b;
}

Memory memory(const MultiArgs& a, const LaunchPlan& plan, const Launch& on) {
  const bool addend = a.base && plan.family != Family::matmul && a.plan.tile_count > 0;
  return {a.x.rows, a.y.cols, addend, planes_for(a.x.rows, a.x.cols, a.plan), a.plan, on};
}
Memory memory(const MultiBackwardArgs& a, const LaunchPlan& plan, const Launch& on) {
  const bool addend = a.base && a.dx.data && plan.family != Family::matmul && a.plan.tile_count > 0;
  return {a.dy.rows, a.x.cols, addend, planes_for(a.dy.rows, a.dy.cols, a.plan), a.plan, on};
}

}  // namespace

LaunchPlan plan_multi(const MultiArgs& a, int device) {
  LaunchPlan p = a.base ? plan_linear(base_of(a), device) : LaunchPlan{};
  p.has_rest = a.plan.tile_count > 0 || a.bias.data;
  p.workspace = memory(a, p, {}).bytes(p.workspace);
  return p;
}

int multi(const MultiArgs& a, const LaunchPlan& plan, const Launch& on) {
  if (a.x.rows == 0) return cudaSuccess;
  const Memory m = memory(a, plan, on);
  const bool matmul = a.base && plan.family == Family::matmul;
  Sequence sequence(on);
  LK_TRY(shrink({a.plan, a.pages, a.x, a.pages.A, true, false, m.planes}, sequence));
  PlaneSumArgs s;
  s.plan = a.plan;
  s.pages = a.pages;
  s.planes = m.planes;
  s.out = a.s;
  s.stride = a.s_stride;
  LK_TRY(add(s, sequence));

  ExpandArgs e;
  e.plan = a.plan;
  e.pages = a.pages;
  e.factor = a.pages.B;
  e.coefficients = a.s;
  e.s_stride = a.s_stride;
  e.accumulate = !a.base;
  e.out = m.addend.data ? m.addend_of(a.y) : a.y;
  if (matmul) e.bias = a.bias;
  if (a.plan.tile_count > 0 || (matmul && plan.has_rest))
    LK_TRY(expand<false>(e, matmul, sequence));
  return a.base && !matmul ? linear(base_of(a), plan, m.addend, m.base) : cudaSuccess;
}

LaunchPlan plan_multi_backward(const MultiBackwardArgs& a, int device) {
  LaunchPlan p = a.base ? plan_linear_backward(base_of(a), device) : LaunchPlan{};
  p.has_rest = a.plan.tile_count > 0;
  p.workspace = memory(a, p, {}).bytes(p.workspace);
  return p;
}

int multi_backward(const MultiBackwardArgs& a, const LaunchPlan& plan, const Launch& on) {
  const Memory m = memory(a, plan, on);
  const bool matmul = a.base && plan.family == Family::matmul;
  const bool tiles = a.plan.tile_count > 0 && a.dy.rows > 0;
  const bool needs_ds = tiles && (a.dx.data || a.grad_rank > 0);
  Sequence sequence(on);
  PlaneSumArgs s;
  s.plan = a.plan;
  s.pages = a.pages;
  s.planes = m.planes;
  s.forward = false;
  s.out = a.ds;
  s.zeros[0] = a.dA, s.zeros[1] = a.dB;
  s.zero_count[0] = a.grad_rank * a.x.cols, s.zero_count[1] = a.grad_rank * a.dy.cols;
  if (needs_ds) {
    LK_TRY(shrink({a.plan, a.pages, a.dy, a.pages.B, false, false, m.planes}, sequence));
    s.stride = a.s_stride;
  }
  LK_TRY(add(s, sequence));
  if (tiles && a.grad_rank > 0) LK_TRY(gradients(a, sequence));

  if (a.dx.data && (!a.base || tiles)) {
    ExpandArgs e;
    e.plan = a.plan;
    e.pages = a.pages;
    e.factor = a.pages.A;
    e.coefficients = a.ds;
    e.s_stride = a.s_stride;
    e.out = m.addend.data ? m.addend_of(a.dx) : a.dx;
    LK_TRY(expand<true>(e, !m.addend.data, sequence));
  }
  if (!a.base) return cudaSuccess;
  BackwardArgs rest = base_of(a);
  if (matmul) rest.dx = {};  // the adapters' term is there already
  return linear_backward(rest, plan, m.addend, m.base);
}

}  // namespace lk::cuda
