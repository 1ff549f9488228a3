#include "cuda/kernels/quantize.cuh"

#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

Shape warps(int64_t count, size_t shared_bytes) {
  return {dim3(static_cast<unsigned>(ceil_div(count, kQuantizeWarps))), dim3(kQuantizeThreads),
          shared_bytes};
}
Shape threads(int64_t count, size_t shared_bytes = 0) {
  return {dim3(static_cast<unsigned>(ceil_div(count, kQuantizeThreads))), dim3(kQuantizeThreads),
          shared_bytes};
}

template <class T>
bool is_in_runs(const Weight4& w, int64_t column, const MutMatrix& out) {
  constexpr int64_t length = kRunLength<T>;
  return w.K % length == 0 && column % length == 0 && out.cols % length == 0 &&
         out.stride % length == 0 && is_aligned(out.data, 16) && is_aligned(w.packed, length / 2) &&
         out.rows * out.cols / length <= INT32_MAX && w.N * w.K >> 5 <= UINT32_MAX;
}

template <class T>
cudaError_t dequantize_as(const Weight4& w, int64_t row, int64_t column, const MutMatrix& out,
                          const Launch& on) {
  if (!is_in_runs<T>(w, column, out))
    return launch("dequantize_elements", on, threads(out.rows * out.cols), dequantize_elements, w,
                  row, column, out);
  int64_t rows = out.rows, runs = out.cols / kRunLength<T>;
  // Whole rows one after another are one long row.
  if (out.cols == w.K && out.stride == out.cols) runs *= rows, rows = 1;
  const int64_t tasks = rows * ceil_div(runs, 32 * kRunsPerThread);
  MutMatrix rectangle = out;
  rectangle.rows = rows;
  return launch("dequantize_runs", on, warps(tasks, 16 * sizeof(float)), dequantize_runs<T>, w, row,
                column, rectangle, static_cast<uint32_t>(runs));
}

}  // namespace

int quantize(const QuantizeArgs& a, const Launch& on) {
  const int64_t blocks = ceil_div(a.numel, a.blocksize);
  if (blocks == 0) return cudaSuccess;
  return launch("quantize_blocks", on, warps(blocks, sizeof(NearestCode)), quantize_blocks, a);
}

int64_t double_quantize_workspace(int64_t blocks) {
  return ceil_div(blocks, kMeanSpan) * static_cast<int64_t>(sizeof(double));
}

int double_quantize(const DoubleQuantizeArgs& a, const Launch& on) {
  const int64_t spans = ceil_div(a.blocks, kMeanSpan);
  double* partial = static_cast<double*>(on.workspace);
  if (spans)
    LK_TRY(launch("partial_sums", on,
                  {dim3(static_cast<unsigned>(spans)), dim3(kQuantizeThreads),
                   kQuantizeThreads * sizeof(double)},
                  partial_sums, a.absmax, a.blocks, partial));
  LK_TRY(launch("mean_of", on, {dim3(1), dim3(32)}, mean_of, partial, spans, a.blocks, a.offset));
  if (a.blocks == 0) return cudaSuccess;
  return launch("double_quantize_blocks", on,
                warps(ceil_div(a.blocks, kNestedBlock), kNestedBlock * sizeof(float)),
                double_quantize_blocks, a);
}

int dequantize(const Weight4& w, int64_t row, int64_t column, const MutMatrix& out,
               const Launch& on) {
  if (out.rows * out.cols == 0) return cudaSuccess;
  switch (out.dtype) {
    case DType::f32:
      return dequantize_as<F32>(w, row, column, out, on);
    case DType::bf16:
      return dequantize_as<Bf16>(w, row, column, out, on);
    default:
      return dequantize_as<F16>(w, row, column, out, on);
  }
}

}  // namespace lk::cuda
