// The skinny products of adapters: how the activations are divided among blocks, and which partial
// sums come from where.
#include "cuda/kernels/lora.cuh"

#include <algorithm>

#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

constexpr int64_t kMaxRank = 256, kMaxColumns = 1 << 30;
// Partial row sums of one launch: they are read back at once, so they should stay in the
// second-level cache.
constexpr int64_t kRowPartialBytes = 32 << 20;

bool takes_rank(const Lora& lora) { return 1 <= lora.A.rows && lora.A.rows <= kMaxRank; }

// How activations [rows, cols] are divided, in chunks of rows, each a launch. It does not depend on
// which products are wanted, so that a gradient has the same bits whichever others are computed
// beside it.
struct Division {
  int64_t rows = 0, cols = 0;
  int passes = 1, strips = 1;
  int64_t chunk = kLoraRows;  // rows of a launch, but for the last
  int64_t range = kLoraRows;  // rows of a block

  Division(const Matrix& act, int64_t R, int residents, int device)
      : rows(act.rows), cols(act.cols) {
    passes = static_cast<int>(std::max<int64_t>(1, ceil_div(R, kLoraPass)));
    strips = static_cast<int>(ceil_div(cols, kLoraColumns));
    const int64_t row_bytes = int64_t{strips} * passes * kLoraPass * 4;
    const int64_t fitting = std::max<int64_t>(kRowPartialBytes / row_bytes / kLoraRows, 1);
    chunk = std::max<int64_t>(min64(rows, fitting * kLoraRows), 1);
    range = range_for(device_info(device).multiprocessors * residents);
  }

  int64_t launches() const { return ceil_div(rows, chunk); }
  int64_t rows_of(int64_t launch) const { return min64(chunk, rows - launch * chunk); }
  int64_t ranges_of(int64_t launch) const { return ceil_div(rows_of(launch), range); }
  int64_t ranges() const {
    const int64_t n = launches();
    return n ? (n - 1) * ranges_of(0) + ranges_of(n - 1) : 0;
  }
  int64_t row_partial_bytes() const { return int64_t{strips} * passes * chunk * kLoraPass * 4; }
  int64_t column_partial_bytes(int column_passes) const {
    return ranges() * column_passes * cols * kLoraPass * 4;
  }

 private:
  // The number of ranges for which the busiest multiprocessor has the least to do; a block costs
  // about two tiles more than it has.
  int64_t range_for(int slots) const {
    const int64_t tiles = ceil_div(chunk, kLoraRows);
    int64_t best = tiles, least = INT64_MAX;
    for (int64_t ranges = 1; ranges <= min64(tiles, 4 * std::max(slots, 1)); ++ranges) {
      const int64_t length = ceil_div(tiles, ranges);
      const int64_t blocks = ceil_div(tiles, length) * strips * passes;
      const int64_t cost = ceil_div(blocks, std::max(slots, 1)) * (length + 2);
      if (cost < least) least = cost, best = length;
    }
    return best * kLoraRows;
  }
};

template <class T>
cudaError_t start(const SkinnyArgs& args, bool rows, bool columns, int64_t blocks,
                  const Launch& on) {
  const Shape shape{dim3(static_cast<unsigned>(blocks)), dim3(kLoraThreads),
                    lora_shared_bytes(rows, columns), true};
  if (rows && columns)
    return launch("skinny_products (rows, columns)", on, shape, skinny_products<T, true, true>,
                  args);
  if (rows)
    return launch("skinny_products (rows)", on, shape, skinny_products<T, true, false>, args);
  return launch("skinny_products (columns)", on, shape, skinny_products<T, false, true>, args);
}

cudaError_t add(const PartialSums& first, const PartialSums& second, const Launch& on) {
  const int64_t blocks = first.blocks() + second.blocks();
  if (blocks == 0) return cudaSuccess;
  const Shape shape{dim3(static_cast<unsigned>(blocks)), dim3(256), 0, true};
  return launch("add_partials", on, shape, add_partials, first, second);
}

// One read of the activations.
struct Products {
  Matrix act;
  Dropout dropout;
  int64_t R = 0;
  int residents = lora_residents(true, true);  // of blocks, when all of it is wanted
  // The row product with p into rows[m, R], times row_scale; null: not wanted.
  SkinnyRows p;
  float* rows = nullptr;
  float row_scale = 1.0f;
  // The column product with q; where its sums go, but for what the division says.
  bool column_product = false;
  SkinnyColumns q;
  PartialSums columns;

  int column_passes() const { return static_cast<int>(ceil_div(R + (q.ones ? 1 : 0), kLoraPass)); }
};

int64_t workspace(const Products& w, int device) {
  const Division d(w.act, w.R, w.residents, device);
  return (w.rows ? d.row_partial_bytes() : 0) +
         (w.column_product ? d.column_partial_bytes(w.column_passes()) : 0);
}

cudaError_t run(const Products& w, const Launch& on) {
  const Division d(w.act, w.R, w.residents, on.device);
  float* row_partial = static_cast<float*>(on.workspace);
  float* column_partial = row_partial + (w.rows ? d.row_partial_bytes() / 4 : 0);
  const int column_passes = w.column_passes();

  PartialSums columns;
  if (w.column_product) {
    columns = w.columns;
    columns.partial = column_partial;
    columns.count = static_cast<int>(d.ranges());
    columns.passes = column_passes;
    columns.first_pass = columns.out ? 0 : static_cast<int>(w.R / kLoraPass);
    columns.items = w.act.cols;
    columns.R = w.R;
  }
  if (d.launches() == 0) return add({}, columns, on);

  int64_t ranges_before = 0;
  for (int64_t i = 0; i < d.launches(); ++i) {
    const int64_t row0 = i * d.chunk, rows = d.rows_of(i), ranges = d.ranges_of(i);
    SkinnyArgs args;
    args.act = w.act;
    args.act.data = static_cast<const uint16_t*>(w.act.data) + row0 * w.act.stride;
    args.act.rows = rows;
    args.first_row = row0;
    args.dropout = w.dropout;
    args.p = w.p;
    args.q = w.q;
    if (w.q.data) args.q.data = w.q.data + row0 * w.R;
    args.row_partial = row_partial;
    args.column_partial = column_partial + ranges_before * column_passes * w.act.cols * kLoraPass;
    args.row_passes = d.passes;
    args.column_passes = column_passes;
    args.first_pass = w.rows ? 0 : columns.first_pass;
    args.passes =
        std::max(w.rows ? d.passes : 0, w.column_product ? column_passes : 0) - args.first_pass;
    args.strips = d.strips;
    args.range = static_cast<int>(d.range);
    const bool is_bf16 = w.act.dtype == DType::bf16;
    LK_TRY((is_bf16 ? start<Bf16> : start<F16>)(args, w.rows != nullptr, w.column_product,
                                                ranges * d.strips * args.passes, on));
    ranges_before += ranges;

    PartialSums sums;
    if (w.rows) {
      sums.partial = row_partial;
      sums.count = d.strips;
      sums.passes = d.passes;
      sums.items = rows;
      sums.R = w.R;
      sums.scale = w.row_scale;
      sums.out = w.rows + row0 * w.R;
      sums.item_stride = w.R;
      sums.r_stride = 1;
    }
    const bool last = i + 1 == d.launches();
    LK_TRY(add(sums, last ? columns : PartialSums{}, on));
  }
  return cudaSuccess;
}

// A[r, c] or, transposed, B[c, r].
SkinnyRows adapter(const Matrix& m, bool transposed, DType act) {
  SkinnyRows p;
  p.data = m.data;
  p.dtype = m.dtype;
  p.c_stride = transposed ? m.stride : 1;
  p.r_stride = transposed ? 1 : m.stride;
  p.R = transposed ? m.cols : m.rows;
  p.exact = is_exact(m.dtype, act);
  return p;
}

Products shrink(const LinearArgs& a) {
  Products w;
  w.act = a.x;
  w.dropout = a.lora.dropout;
  w.R = a.lora.A.rows;
  w.residents = lora_residents(true, false);
  w.p = adapter(a.lora.A, false, a.x.dtype);
  w.rows = a.s;
  w.row_scale = a.lora.dropout.threshold ? a.lora.dropout.scale : 1.0f;
  return w;
}

// What dy is read for: dS, dB, dbias.
Products from_dy(const BackwardArgs& a) {
  Products w;
  w.act = a.dy;
  if (a.lora.A.data) {
    w.R = a.lora.A.rows;
    w.p = adapter(a.lora.B, true, a.dy.dtype);
    if (a.dx.data || a.dA.data) w.rows = a.ds;
    w.row_scale = a.lora.scaling;
  }
  w.column_product = a.dB.data || a.dbias.data;
  w.q = {a.dB.data ? a.s : nullptr, static_cast<int>(w.R), a.dbias.data != nullptr};
  w.columns.scale = a.lora.scaling;
  w.columns.out = a.dB.data;
  w.columns.out_dtype = a.dB.dtype;
  w.columns.item_stride = a.dB.stride;
  w.columns.r_stride = 1;
  w.columns.after = a.dbias.data;
  w.columns.after_dtype = a.dbias.dtype;
  return w;
}

// What x is read for: dA, given dS.
Products from_x(const BackwardArgs& a) {
  Products w;
  w.act = a.x;
  w.dropout = a.lora.dropout;
  w.R = a.lora.A.rows;
  w.residents = lora_residents(false, true);
  w.column_product = true;
  w.q = {a.ds, static_cast<int>(w.R), false};
  w.columns.scale = a.lora.dropout.threshold ? a.lora.dropout.scale : 1.0f;
  w.columns.out = a.dA.data;
  w.columns.out_dtype = a.dA.dtype;
  w.columns.item_stride = 1;
  w.columns.r_stride = a.dA.stride;
  return w;
}

}  // namespace

bool lora_takes(const Matrix& act) {
  return act.dtype != DType::f32 && act.cols > 0 && act.cols <= kMaxColumns && act.cols % 8 == 0 &&
         is_aligned(act.data, 16) && (act.rows <= 1 || act.stride % 8 == 0);
}

bool lora_takes(const LinearArgs& a) {
  return a.lora.A.data && takes_rank(a.lora) && lora_takes(a.x);
}
int64_t lora_workspace(const LinearArgs& a, int device) { return workspace(shrink(a), device); }
cudaError_t lora_shrink(const LinearArgs& a, const Launch& on) { return run(shrink(a), on); }

bool lora_takes(const BackwardArgs& a) {
  if (!lora_takes(a.dy)) return false;
  return !a.lora.A.data || (takes_rank(a.lora) && lora_takes(a.x) && a.x.dtype == a.dy.dtype);
}

int64_t lora_workspace(const BackwardArgs& a, int device) {
  return std::max(workspace(from_dy(a), device), a.dA.data ? workspace(from_x(a), device) : 0);
}

cudaError_t lora_gradients(const BackwardArgs& a, const Launch& on) {
  const Products dy = from_dy(a);
  if (dy.rows || dy.column_product) LK_TRY(run(dy, on));
  return a.dA.data ? run(from_x(a), on) : cudaSuccess;
}

}  // namespace lk::cuda
