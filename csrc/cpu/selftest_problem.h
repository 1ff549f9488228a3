// What the self-test of the CPU kernels is made of: random problems, and the bound of their
// results. Buffers have exactly the size the kernels may touch, so that AddressSanitizer sees a
// read or write beyond them.
#pragma once

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "common/half.h"
#include "cpu/api.h"
#include "cpu/table.h"

namespace lk {
namespace {

constexpr float kNf4[16] = {-1.0f,
                            -0.6961928009986877f,
                            -0.5250730514526367f,
                            -0.39491748809814453f,
                            -0.28444138169288635f,
                            -0.18477343022823334f,
                            -0.09105003625154495f,
                            0.0f,
                            0.07958029955625534f,
                            0.16093020141124725f,
                            0.24611230194568634f,
                            0.33791524171829224f,
                            0.44070982933044434f,
                            0.5626170039176941f,
                            0.7229568362236023f,
                            1.0f};

void run_on_threads(int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
  if (tasks == 0) return;
  const int64_t half = tasks / 2;
  std::thread other([=] { body(context, half, tasks); });
  if (half) body(context, 0, half);
  other.join();
}
constexpr Parallel kPool{run_on_threads, 2};
constexpr Parallel kAlone{[](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
                            body(context, 0, tasks);
                          },
                          1};

int failures = 0;
long long checks = 0;

// A float32 buffer or one of 16-bit values, of exactly n elements.
struct Values {
  DType dtype;
  std::vector<float> f32;
  std::vector<uint16_t> half;

  Values(DType t, int64_t n) : dtype(t) {
    if (t == DType::f32)
      f32.resize(static_cast<size_t>(n));
    else
      half.resize(static_cast<size_t>(n));
  }
  void* data() { return dtype == DType::f32 ? static_cast<void*>(f32.data()) : half.data(); }
  double get(int64_t i) const {
    const size_t j = static_cast<size_t>(i);
    if (dtype == DType::f32) return f32[j];
    return dtype == DType::bf16 ? float_from_bf16(half[j]) : float_from_f16(half[j]);
  }
  void set(int64_t i, float v) {
    const size_t j = static_cast<size_t>(i);
    if (dtype == DType::f32)
      f32[j] = v;
    else
      half[j] = dtype == DType::bf16 ? bf16_from_float(v) : f16_from_float(v);
  }
  double unit() const {
    return dtype == DType::f32 ? 0x1p-24 : dtype == DType::bf16 ? 0x1p-8 : 0x1p-11;
  }
};

struct Case {
  int64_t M, N, K, R;
  int shift;
  bool double_quant;
  DType x, adapter;
  float dropout;
  Arithmetic arithmetic = Arithmetic::exact;
  const char* kernel = "";
};

std::string name_of(const Case& c, const char* output) {
  char text[200];
  std::snprintf(text, sizeof text,
                "%s %s %s M=%lld N=%lld K=%lld R=%lld blocksize=%d dq=%d x=%d p=%g arithmetic=%d",
                lk_isa_active(), c.kernel, output, static_cast<long long>(c.M),
                static_cast<long long>(c.N), static_cast<long long>(c.K),
                static_cast<long long>(c.R), 1 << c.shift, c.double_quant, static_cast<int>(c.x),
                static_cast<double>(c.dropout), static_cast<int>(c.arithmetic));
  return text;
}

// What an output should be. With operands rounded to bfloat16 each product is wrong by up to two
// roundings, which are independent: the errors of a sum add up as its squares do.
struct Sum {
  double value = 0, magnitude = 0, rounded = 0;

  void add(double term) {
    value += term;
    magnitude += std::fabs(term);
  }
  void add_base(double term) {
    add(term);
    rounded += term * term;
  }
};

// |actual - expected| <= 16 * 2^-24 * magnitude + unit roundoff * |expected|, and more where
// operands are rounded
void expect(const Case& c, const char* output, const Values& actual, int64_t i, const Sum& sum) {
  ++checks;
  const bool pairs = c.arithmetic == Arithmetic::bf16 && lk_pairs();
  const double bound = 16 * 0x1p-24 * sum.magnitude + actual.unit() * std::fabs(sum.value) + 6e-8 +
                       (pairs ? 5 * 0x1p-8 * std::sqrt(sum.rounded) : 0.0);
  if (std::fabs(actual.get(i) - sum.value) <= bound) return;
  if (++failures <= 20)
    std::printf("FAIL %s [%lld]: expected %.9g, got %.9g, bound %.3g\n", name_of(c, output).c_str(),
                static_cast<long long>(i), sum.value, actual.get(i), bound);
}

// expected(sum, i, j) puts together what element [i, j] of the output should be.
template <class Expected>
void expect_all(const Case& c, const char* output, const Values& actual, int64_t rows,
                int64_t columns, const Expected& expected) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) {
      Sum sum;
      expected(sum, i, j);
      expect(c, output, actual, i * columns + j, sum);
    }
}

struct Problem {
  Case c;
  std::mt19937 random{7};
  std::vector<uint8_t> packed, absmax_u8;
  std::vector<float> absmax, nested_absmax, nested_code, code, dense;
  float offset = 0.0f;
  Values original{DType::f32, 0};
  Weight4 w;

  explicit Problem(const Case& values) : c(values), code(kNf4, kNf4 + 16) { make_weight(); }

  Values normal(DType t, int64_t n) {
    std::normal_distribution<float> distribution;
    Values v(t, n);
    for (int64_t i = 0; i < n; ++i) v.set(i, distribution(random));
    return v;
  }

  void make_weight() {
    const int64_t numel = c.N * c.K, blocks = ceil_div(numel, int64_t{1} << c.shift);
    original = normal(DType::f32, numel);
    packed.resize(static_cast<size_t>(ceil_div(numel, 2)));
    absmax.resize(static_cast<size_t>(blocks));
    lk_kernels()->quantize({original.data(), DType::f32, numel, int64_t{1} << c.shift, code.data(),
                            packed.data(), absmax.data()},
                           kPool);
    w.packed = packed.data();
    w.code = code.data();
    w.N = c.N;
    w.K = c.K;
    w.block_shift = c.shift;
    w.absmax = absmax.data();
    if (c.double_quant) {
      absmax_u8.resize(absmax.size());
      nested_absmax.resize(static_cast<size_t>(ceil_div(blocks, 256)));
      for (int i = 0; i < 256; ++i) nested_code.push_back(static_cast<float>(i - 128) / 127.5f);
      lk_kernels()->double_quantize({absmax.data(), blocks, nested_code.data(), absmax_u8.data(),
                                     nested_absmax.data(), &offset},
                                    kPool);
      w.absmax = nullptr;
      w.absmax_u8 = absmax_u8.data();
      w.nested_absmax = nested_absmax.data();
      w.nested_code = nested_code.data();
      w.nested_offset = &offset;
    }
    dense.resize(static_cast<size_t>(numel));
    lk_kernels()->dequantize({w, DType::f32, dense.data()}, kPool);
  }

  double weight(int64_t n, int64_t k) const {
    return static_cast<double>(dense[static_cast<size_t>(n * c.K + k)]);
  }

  void check_weight() {
    for (int64_t i = 0; i < c.N * c.K; ++i) {
      const size_t block = static_cast<size_t>(i >> c.shift);
      float scale = absmax[block];
      if (c.double_quant) {
        const float product = nested_code[absmax_u8[block]] * nested_absmax[block >> 8];
        scale = product + offset;
      }
      const int nibble = packed[static_cast<size_t>(i / 2)] >> (i % 2 ? 0 : 4) & 15;
      ++checks;
      if (dense[static_cast<size_t>(i)] != kNf4[nibble] * scale && ++failures <= 20)
        std::printf("FAIL dequantize [%lld]\n", static_cast<long long>(i));
      // No other code is nearer.
      const double v = original.get(i) / absmax[block];
      for (int n = 0; n < 16; ++n)
        if (std::fabs(v - kNf4[n]) < std::fabs(v - kNf4[nibble]) - 1e-6 && ++failures <= 20)
          std::printf("FAIL quantize [%lld]\n", static_cast<long long>(i));
    }
    check_halves(DType::bf16);
    check_halves(DType::f16);
  }

  // Decoded into 16 bits, numbers are those of float32 rounded once; encoded from 16 bits, they
  // become what the same numbers in float32 do.
  void check_halves(DType t) {
    const int64_t numel = c.N * c.K, size = int64_t{1} << c.shift;
    Values decoded(t, numel), rounded(t, numel), exact(DType::f32, numel);
    lk_kernels()->dequantize({w, t, decoded.data()}, kPool);
    for (int64_t i = 0; i < numel; ++i) {
      rounded.set(i, dense[static_cast<size_t>(i)]);
      exact.set(i, static_cast<float>(rounded.get(i)));
    }
    std::vector<uint8_t> bytes[2];
    std::vector<float> scales[2];
    for (int k = 0; k < 2; ++k) {
      Values& from = k == 0 ? rounded : exact;
      bytes[k].resize(packed.size());
      scales[k].resize(absmax.size());
      lk_kernels()->quantize(
          {from.data(), from.dtype, numel, size, code.data(), bytes[k].data(), scales[k].data()},
          kPool);
    }
    checks += 3;
    if (decoded.half != rounded.half && ++failures <= 20)
      std::printf("FAIL dequantize into 16 bits\n");
    if ((bytes[0] != bytes[1] || scales[0] != scales[1]) && ++failures <= 20)
      std::printf("FAIL quantize from 16 bits\n");
  }
};

}  // namespace
}  // namespace lk
