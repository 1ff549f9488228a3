// The adapter's share of a tile, mask(i, j) scaling Σ_r s(i, r) factor(r, j), on tensor cores but
// as accurate as in float32: an operand is the sum of two tf32 numbers, of whose four products the
// smallest is left out.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

struct TileAdapter {
  const float* s = nullptr;  // [M, rank]; null: no adapter
  const void* factor = nullptr;
  DType dtype = DType::f32;
  int64_t rank = 0;
  int64_t rank_stride = 0, output_stride = 0;  // of the factor
  float scaling = 1.0f;
  Dropout mask;  // on the product, at (row, output), including its scale
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

// factor(r0 + t + 4 i, output + 8 j + g); zero outside.
template <int n>
__device__ __forceinline__ void load_factor(const TileAdapter& a, int64_t r0, int64_t output,
                                            int64_t outputs, float (&v)[n][2]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  int64_t at[n][2];  // -1: outside
#pragma unroll
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t r = r0 + t + 4 * i, o = output + 8 * j + g;
      at[j][i] = r < a.rank && o < outputs ? r * a.rank_stride + o * a.output_stride : -1;
    }
  // All loads of a branch are under way together.
  if (a.dtype == DType::f32) {
    const float* p = static_cast<const float*>(a.factor);
#pragma unroll
    for (int j = 0; j < n; ++j)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        v[j][i] = at[j][i] >= 0 ? ptx::load_const<float>(p + at[j][i]) : 0.0f;
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(a.factor);
  uint16_t bits[n][2];
#pragma unroll
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      bits[j][i] = at[j][i] >= 0 ? ptx::load_const<uint16_t>(p + at[j][i]) : uint16_t{0};
#pragma unroll
  for (int j = 0; j < n; ++j)
#pragma unroll
    for (int i = 0; i < 2; ++i)
      v[j][i] = a.dtype == DType::bf16 ? ptx::widen<Bf16>(bits[j][i]) : ptx::widen<F16>(bits[j][i]);
}

// s(row + 16 i + g or g + 8, r0 + t or t + 4), the order of an A fragment; zero outside.
template <int m>
__device__ __forceinline__ void load_s(const TileAdapter& a, int64_t r0, int64_t row, int64_t rows,
                                       float (&v)[m][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t at = row + 16 * i + g + e % 2 * 8, r = r0 + t + e / 2 * 4;
      const bool inside = at < rows && r < a.rank;
      v[i][e] = inside ? ptx::load_const<float>(a.s + at * a.rank + r) : 0.0f;
    }
}

// Element (row, column) and the next column, and the same 8 rows further down: what a lane has of a
// fragment of sums that begins at (row, output). Four columns share one philox, hence two lanes do:
// the even one computes it for the upper row, the odd one for the lower.
__device__ __forceinline__ void drop_fragment(const Dropout& d, uint64_t seed, int64_t row,
                                              int64_t output, float (&c)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32, g = lane / 4, t = lane % 4;
  const bool odd = t % 2;
  const Words4 w =
      philox(seed, row + g + (odd ? 8 : 0), static_cast<uint32_t>((output + 2 * t) >> 2));
  uint32_t own[2], other[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    own[i] = odd ? w.word[2 + i] : w.word[i];
    const uint32_t given = odd ? w.word[i] : w.word[2 + i];
    other[i] = __float_as_uint(ptx::shuffle_xor(__uint_as_float(given), 1));
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t upper = odd ? other[i] : own[i], lower = odd ? own[i] : other[i];
    c[i] = upper >= d.threshold ? c[i] * d.scale : 0.0f;
    c[2 + i] = lower >= d.threshold ? c[2 + i] * d.scale : 0.0f;
  }
}

// sum = the adapter's product for 16 m rows from `row` and 8 n outputs from `output`, one warp.
template <int m, int n>
__device__ __forceinline__ void add_adapter(const TileAdapter& a, int64_t row, int64_t rows,
                                            int64_t output, int64_t outputs,
                                            float (&sum)[m][n][4]) {
  for (int64_t r0 = 0; r0 < a.rank; r0 += 8) {
    float factor[n][2], s[m][4];
    load_factor(a, r0, output, outputs, factor);
    load_s(a, r0, row, rows, s);
#pragma unroll
    for (int i = 0; i < m; ++i) {
      float high[4], finite[4], low[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const Split v = split(s[i][e] * a.scaling);
        high[e] = v.high;
        finite[e] = v.finite;
        low[e] = v.low;
      }
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const Split v0 = split(factor[j][0]), v1 = split(factor[j][1]);
        ptx::mma_tf32(sum[i][j], low, {v0.finite, v1.finite});
        ptx::mma_tf32(sum[i][j], finite, {v0.low, v1.low});
        ptx::mma_tf32(sum[i][j], high, {v0.high, v1.high});
      }
    }
  }
  if (a.mask.threshold == 0) return;
  const uint64_t seed = *a.mask.seed;
#pragma unroll
  for (int i = 0; i < m; ++i)
#pragma unroll
    for (int j = 0; j < n; ++j)
      drop_fragment(a.mask, seed, row + 16 * i, output + 8 * j, sum[i][j]);
}

}  // namespace lk::cuda
