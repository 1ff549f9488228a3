#include "cuda/kernels/gemv.cuh"

#include "cuda/kernels/gemv_shrink.cuh"
#include "cuda/launchers.h"

namespace lk::cuda {
namespace {

// Columns are cut for several blocks only if each still has so many chunks: adding the partial sums
// is one more kernel, about as long as a block needs for these.
constexpr int64_t kChunksPerSplit = 16;

// split_k follows from the weight and the device, not from the rows: it decides the order of
// additions.
int64_t split_k_of(const Weight4& w, int device) {
  const int64_t blocks = ceil_div(w.N, 16 * kGemvGroups);
  const int64_t idle = device_info(device).multiprocessors / blocks;
  const int64_t split_k = min64(idle, ceil_div(w.K, kGemvChunk) / kChunksPerSplit);
  return split_k > 1 ? split_k : 1;
}

template <class T, int token_tiles, int row_tiles>
cudaError_t product(const GemvArgs& args, int64_t split_k, bool overlaps, const Launch& on) {
  const int64_t blocks = ceil_div(args.w.N, GemvTile<token_tiles, row_tiles>::rows);
  const Shape shape{dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(split_k)),
                    dim3(kGemvThreads), kGemvShared, overlaps};
  return launch("gemv_product", on, shape, gemv_product<T, token_tiles, row_tiles>, args);
}

// Tall tiles read x half as often, but must still occupy the device.
template <class T, int token_tiles>
cudaError_t few_tokens(const GemvArgs& args, int64_t split_k, bool overlaps, const Launch& on) {
  const int64_t blocks = ceil_div(args.w.N, GemvTile<token_tiles, 2>::rows) * split_k;
  return blocks >= device_info(on.device).multiprocessors
             ? product<T, token_tiles, 2>(args, split_k, overlaps, on)
             : product<T, token_tiles, 1>(args, split_k, overlaps, on);
}

template <class T>
cudaError_t product(const GemvArgs& args, int64_t split_k, bool overlaps, const Launch& on) {
  if (args.x.rows <= 8) return few_tokens<T, 1>(args, split_k, overlaps, on);
  if (args.x.rows <= 16) return few_tokens<T, 2>(args, split_k, overlaps, on);
  if (args.x.rows <= 32) return product<T, 4, 2>(args, split_k, overlaps, on);
  return product<T, 8, 2>(args, split_k, overlaps, on);
}

cudaError_t shrink(const LinearArgs& a, const Launch& on) {
  const Matrix& A = a.lora.A;
  const bool vectors = A.stride % 4 == 0 && is_aligned(A.data, 4 * element_size(A.dtype));
  const Shape shape{dim3(static_cast<unsigned>(ceil_div(A.rows, kShrinkRanks)),
                         static_cast<unsigned>(ceil_div(a.x.rows, kShrinkTokens))),
                    dim3(kShrinkThreads), kShrinkShared};
  return launch("gemv_shrink", on, shape, gemv_shrink, a.x, A, a.lora.dropout, vectors, a.s);
}

}  // namespace

bool gemv_takes(const LinearArgs& a) {
  if (!a.base.quantized) return false;
  // The kernel holds the bytes between rows of x in 32 bits.
  if (a.x.stride < 0 || a.x.stride > INT32_MAX) return false;
  const Weight4& w = *a.base.quantized;
  return a.x.dtype != DType::f32 && a.x.rows >= 1 && a.x.rows <= kMaxGemvRows && w.N > 0 &&
         w.K > 0 && w.K <= INT32_MAX && w.K % kGemvBlock == 0 && w.block_shift >= 6 &&
         blocks_fit_rows(w) && is_aligned(w.packed, 16) && is_aligned(a.x.data, 16) &&
         a.x.stride % 8 == 0 && ceil_div(w.N, 16 * kGemvGroups) <= INT32_MAX;
}

int64_t gemv_workspace(const LinearArgs& a, int device) {
  const int64_t split_k = split_k_of(*a.base.quantized, device);
  return split_k > 1 ? split_k * a.x.rows * a.base.quantized->N * 4 : 0;
}

cudaError_t gemv_linear(const LinearArgs& a, const EpilogueOperand& addend, const Launch& on) {
  GemvArgs args;
  args.x = a.x;
  args.w = *a.base.quantized;
  args.addend = addend;
  args.bias = a.bias;
  args.y = a.y;
  const bool adapter = a.lora.A.data && a.lora.A.rows > 0;
  if (adapter) {
    args.B = a.lora.B;
    args.s = a.s;
    args.scaling = a.lora.scaling;
    LK_TRY(shrink(a, on));
  }
  const int64_t split_k = split_k_of(args.w, on.device);
  if (split_k > 1) args.partial = static_cast<float*>(on.workspace);
  const int64_t chunks = ceil_div(args.w.K, kGemvChunk), slices = split_k * kGemvSlices;
  args.slice_chunks = static_cast<int>(chunks / slices);
  args.longer_slices = static_cast<int>(chunks % slices);
  const bool overlaps = adapter || addend.data;
  LK_TRY(a.x.dtype == DType::bf16 ? product<Bf16>(args, split_k, overlaps, on)
                                  : product<F16>(args, split_k, overlaps, on));
  if (split_k == 1) return cudaSuccess;
  const Shape shape{dim3(static_cast<unsigned>(ceil_div(args.w.N, kFinishRows))),
                    dim3(kGemvThreads), kFinishShared, true};
  return launch("gemv_finish", on, shape, gemv_finish, args, static_cast<int>(split_k));
}

}  // namespace lk::cuda
