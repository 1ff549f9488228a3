// A product of 16-bit activations with float32 operands on tensor cores, as accurate as in float32.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

// 16 x 16 activations as the first operand of matrix instructions, and a fragment of P or Q as the
// second, in splits that are exact there and add up to the float32 value:
//
//   bfloat16   three bfloat16 splits of 8 bits each: all 24 bits
//   float16    two tf32 splits of 11 bits and a sign: at most 2^-23 of the value is lost (three
//              bfloat16 splits would need five instructions, as a float16 is two bfloat16)
//
// The first split has sums of its own: where it meets an infinity the others make NaN, and are
// dropped (see Sum).
//
// Whether an adapter's element has so few bits that its first split is all of it.
constexpr bool is_exact(DType adapter, DType act) {
  return adapter == act || (adapter == DType::bf16 && act == DType::f16);
}

template <class T>
struct Activations;
template <class T>
struct Splits;

struct Sum {
  float first[4] = {}, others[4] = {};

  __device__ float at(int i) const {
    const bool finite = (__float_as_uint(first[i]) & 0x7f800000u) != 0x7f800000u;
    return finite ? first[i] + others[i] : first[i];
  }
};

template <>
struct Activations<Bf16> {
  uint32_t a[4];

  __device__ explicit Activations(const uint32_t (&pairs)[4])
      : a{pairs[0], pairs[1], pairs[2], pairs[3]} {}
};

template <>
struct Splits<Bf16> {
  uint32_t split[3][2];

  __device__ void set(const float4& v) {
    float rest[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int p = 0; p < 3; ++p) {
      // The upper halves: rounded towards zero, so that no split overflows.
      split[p][0] = ptx::permute(__float_as_uint(rest[0]), __float_as_uint(rest[1]), 0x7632);
      split[p][1] = ptx::permute(__float_as_uint(rest[2]), __float_as_uint(rest[3]), 0x7632);
#pragma unroll
      for (int i = 0; i < 4; ++i)
        rest[i] -= __uint_as_float(__float_as_uint(rest[i]) & 0xffff0000u);
    }
  }
};

__device__ __forceinline__ void multiply(Sum& sum, const Activations<Bf16>& a,
                                         const Splits<Bf16>& b, bool exact) {
  ptx::mma<Bf16>(sum.first, a.a, b.split[0]);
  if (exact) return;
  ptx::mma<Bf16>(sum.others, a.a, b.split[1]);
  ptx::mma<Bf16>(sum.others, a.a, b.split[2]);
}

template <>
struct Activations<F16> {
  float a[2][4];

  __device__ explicit Activations(const uint32_t (&pairs)[4]) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t pair = pairs[2 * h + i];
        a[h][i] = ptx::widen<F16>(static_cast<uint16_t>(pair));
        a[h][i + 2] = ptx::widen<F16>(static_cast<uint16_t>(pair >> 16));
      }
  }
};

template <>
struct Splits<F16> {
  float split[2][2][2];

  __device__ void set(const float4& v) {
    const float value[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float first = ptx::round_tf32(value[i]);
      split[0][i / 2][i % 2] = first;
      split[1][i / 2][i % 2] = ptx::round_tf32(value[i] - first);
    }
  }
};

__device__ __forceinline__ void multiply(Sum& sum, const Activations<F16>& a, const Splits<F16>& b,
                                         bool exact) {
#pragma unroll
  for (int h = 0; h < 2; ++h) ptx::mma_tf32(sum.first, a.a[h], b.split[0][h]);
  if (exact) return;
#pragma unroll
  for (int h = 0; h < 2; ++h) ptx::mma_tf32(sum.others, a.a[h], b.split[1][h]);
}

}  // namespace lk::cuda
