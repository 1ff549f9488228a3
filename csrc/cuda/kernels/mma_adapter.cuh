// The adapter's share of a tile, mask(i, j) scaling Σ_r s(i, r) factor(r, j), on tensor cores but
// as accurate as in float32: an operand is the sum of two tf32 numbers, of whose four products the
// smallest is left out.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

struct MmaAdapter {
  const float* s = nullptr;  // [M, rank]; null: no adapter
  const void* factor = nullptr;
  DType dtype = DType::f32;
  int rank = 0;
  int64_t rank_stride = 0, output_stride = 0;  // of the factor
  float scaling = 1.0f;
  Dropout mask;  // on the product, at (row, output), including its scale

  __device__ float coefficient(int64_t row, int r) const {
    return ptx::load_const<float>(s + row * rank + r) * scaling;
  }
  __device__ int64_t factor_row(int r) const { return r * rank_stride; }
  __device__ int64_t mask_row(int64_t row) const { return row; }
};

// v = high + low. With an infinity or NaN only `high` has it: in the mixed products `finite` takes
// its place, where a zero times an infinity would make a NaN that float32 does not have.
struct Split {
  float high, finite, low;
};
__device__ __forceinline__ Split split(float v) {
  const float high = ptx::round_tf32(v);
  const bool is_finite = (__float_as_uint(high) & 0x7f800000u) != 0x7f800000u;
  return {high, is_finite ? high : 0.0f, is_finite ? ptx::round_tf32(v - high) : 0.0f};
}

// v[2 j + i] = element first + j j_stride + i i_stride of a matrix or vector of any dtype, zero
// where it is not inside(j, i). Unlike one load_one() after the other, all loads are under way
// together.
template <int n, class Inside>
__device__ __forceinline__ void load_pairs(const void* data, DType dtype, int64_t first,
                                           int64_t j_stride, int64_t i_stride, Inside inside,
                                           float (&v)[2 * n]) {
  if (dtype == DType::f32) {
    const float* p = static_cast<const float*>(data) + first;
#pragma unroll
    for (int e = 0; e < 2 * n; ++e)
      v[e] = inside(e / 2, e % 2) ? ptx::load_const<float>(p + e / 2 * j_stride + e % 2 * i_stride)
                                  : 0.0f;
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(data) + first;
  uint16_t bits[2 * n];
#pragma unroll
  for (int e = 0; e < 2 * n; ++e)
    bits[e] = inside(e / 2, e % 2)
                  ? ptx::load_const<uint16_t>(p + e / 2 * j_stride + e % 2 * i_stride)
                  : uint16_t{0};
#pragma unroll
  for (int e = 0; e < 2 * n; ++e)
    v[e] = dtype == DType::bf16 ? ptx::widen<Bf16>(bits[e]) : ptx::widen<F16>(bits[e]);
}

// Tells as bits which of a lane's four elements of a fragment of sums that begins at (row, output)
// are kept. Four outputs share one philox, hence two lanes do: the even one computes it for the
// upper row, the odd one for the lower.
template <class Adapter>
__device__ __forceinline__ uint32_t kept_of_fragment(const Adapter& a, uint64_t seed, int64_t row,
                                                     int64_t output) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const Dropout& d = a.mask;
  const bool odd = t % 2;
  const Words4 w = philox(seed, a.mask_row(row + g + (odd ? 8 : 0)),
                          static_cast<uint32_t>((output + 2 * t) >> 2));
  uint32_t kept = 0;  // of the row computed here, four outputs
#pragma unroll
  for (int i = 0; i < 4; ++i)
    if (w.word[i] >= d.threshold) kept |= 1u << i;
  const uint32_t other = __float_as_uint(ptx::shuffle_xor(__uint_as_float(kept), 1));
  return odd ? other >> 2 | (kept & 12) : (kept & 3) | (other & 3) << 2;
}

// First all bits, then all sums, so that the code has one philox, not one for every fragment.
template <class Adapter, int m, int n>
__device__ __forceinline__ void drop(const Adapter& a, int64_t row, int64_t output,
                                     float (&sum)[m][n][4]) {
  const uint64_t seed = *a.mask.seed;
  uint64_t kept = 0;
#pragma unroll 1
  for (int f = 0; f < m * n; ++f)
    kept |= uint64_t{kept_of_fragment(a, seed, row + f / n * 16, output + f % n * 8)} << (4 * f);
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e)
        sum[i][j][e] = kept >> (4 * (i * n + j) + e) & 1 ? sum[i][j][e] * a.mask.scale : 0.0f;
}

// The share of add_adapter for fragments i0.. i0 + m0 of rows, j0 and the next of outputs.
template <int m0, class Adapter, int m, int n>
__device__ __forceinline__ void add_fragments(const Adapter& a, int64_t row, int64_t rows,
                                              int64_t output, int64_t outputs, int i0, int j0,
                                              float (&sum)[m][n][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const int rows_left = static_cast<int>(min64(rows - row, 16 * m)) - g;
  const int outputs_left = static_cast<int>(min64(outputs - output, 8 * n)) - g;
#pragma unroll 1
  for (int r = t; r - t < a.rank; r += 8) {
    float factor[4];  // B fragments: (r or r + 4, output + 8 j + g)
    load_pairs<2>(
        a.factor, a.dtype, a.factor_row(r) + (output + 8 * j0 + g) * a.output_stride,
        8 * a.output_stride, 4 * a.rank_stride,
        [&](int j, int i) { return 8 * (j0 + j) < outputs_left && r + 4 * i < a.rank; }, factor);
    Split b[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) b[e] = split(factor[e]);
#pragma unroll
    for (int i = i0; i < i0 + m0; ++i) {
      float high[4], finite[4], low[4];  // A fragment: (g or g + 8, r or r + 4)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int down = e % 2 * 8, right = e / 2 * 4;
        const bool inside = 16 * i + down < rows_left && r + right < a.rank;
        const Split v = split(inside ? a.coefficient(row + 16 * i + g + down, r + right) : 0.0f);
        high[e] = v.high;
        finite[e] = v.finite;
        low[e] = v.low;
      }
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        float (&c)[4] = sum[i][j0 + j];
        ptx::mma_tf32(c, low, {b[2 * j].finite, b[2 * j + 1].finite});
        ptx::mma_tf32(c, finite, {b[2 * j].low, b[2 * j + 1].low});
        ptx::mma_tf32(c, high, {b[2 * j].high, b[2 * j + 1].high});
      }
    }
  }
}

// sum = the adapter's product for 16 m rows from `row` and 8 n outputs from `output`, one warp.
// Zeros stand beyond the rank, the rows and the outputs. The rank is gone through once for every 2
// x 2 fragments: the splits of more operands would not fit into registers.
template <bool has_mask, class Adapter, int m, int n>
__device__ __forceinline__ void add_adapter(const Adapter& a, int64_t row, int64_t rows,
                                            int64_t output, int64_t outputs,
                                            float (&sum)[m][n][4]) {
  constexpr int m0 = m < 2 ? m : 2;
#pragma unroll
  for (int i = 0; i < m; i += m0)
#pragma unroll
    for (int j = 0; j < n; j += 2) add_fragments<m0>(a, row, rows, output, outputs, i, j, sum);
  if constexpr (has_mask) {
    if (a.mask.threshold) drop(a, row, output, sum);
  }
}

}  // namespace lk::cuda
