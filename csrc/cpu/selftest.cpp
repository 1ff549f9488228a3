// Torch-free self-test of the CPU kernels: every instruction set this CPU supports, against plain
// loops in double. Buffers have exactly the size the kernels may touch, so that AddressSanitizer
// sees a read or write beyond them.
#include <algorithm>
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
};

// |actual - expected| <= (16 * 2^-24 + rounding) * magnitude + unit roundoff * |expected|
void expect(const std::string& what, const Values& actual, int64_t i, double expected,
            double magnitude, double rounding = 0) {
  ++checks;
  const double bound =
      (16 * 0x1p-24 + rounding) * magnitude + actual.unit() * std::fabs(expected) + 6e-8;
  if (std::fabs(actual.get(i) - expected) <= bound) return;
  if (++failures <= 20)
    std::printf("FAIL %s [%lld]: expected %.9g, got %.9g, bound %.3g\n", what.c_str(),
                static_cast<long long>(i), expected, actual.get(i), bound);
}

struct Problem {
  Case c;
  std::mt19937 random{7};
  std::vector<uint8_t> packed, absmax_u8;
  std::vector<float> absmax, nested_absmax, nested_code, code, dense;
  float offset = 0.0f;
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
    Values weight = normal(DType::f32, numel);
    packed.resize(static_cast<size_t>(ceil_div(numel, 2)));
    absmax.resize(static_cast<size_t>(blocks));
    lk_kernels()->quantize({weight.data(), DType::f32, numel, int64_t{1} << c.shift, code.data(),
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
    check_dequantized(weight);
  }

  void check_dequantized(const Values& weight) {
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
      const double v = weight.get(i) / absmax[block];
      for (int n = 0; n < 16; ++n)
        if (std::fabs(v - kNf4[n]) < std::fabs(v - kNf4[nibble]) - 1e-6 && ++failures <= 20)
          std::printf("FAIL quantize [%lld]\n", static_cast<long long>(i));
    }
  }
};

const uint64_t kSeed = uint64_t{2} << 32 | 1;

std::string name_of(const Case& c, const char* output) {
  char text[160];
  std::snprintf(text, sizeof text, "%s %s M=%lld N=%lld K=%lld R=%lld blocksize=%d dq=%d x=%d p=%g",
                lk_isa_active(), output, static_cast<long long>(c.M), static_cast<long long>(c.N),
                static_cast<long long>(c.K), static_cast<long long>(c.R), 1 << c.shift,
                c.double_quant, static_cast<int>(c.x), static_cast<double>(c.dropout));
  return text;
}

void check_linear(const Case& c, bool dense_base, Arithmetic arithmetic = Arithmetic::exact) {
  Problem p(c);
  const double rounding = arithmetic == Arithmetic::bf16 ? 2 * 0x1p-8 : 0;  // of both operands
  const int64_t M = c.M, N = c.N, K = c.K, R = c.R;
  Values x = p.normal(c.x, M * K), dy = p.normal(c.x, M * N), A = p.normal(c.adapter, R * K),
         B = p.normal(c.adapter, N * R), bias = p.normal(DType::f32, N), y(c.x, M * N),
         s(DType::f32, M * R), ds(DType::f32, M * R), dx(c.x, M * K), dA(c.adapter, R * K),
         dB(c.adapter, N * R), dbias(DType::f32, N);
  const Matrix weight{p.dense.data(), DType::f32, N, K, K};
  const Base base = dense_base ? Base{nullptr, &weight} : Base{&p.w, nullptr};
  Lora lora{{A.data(), c.adapter, R, K, K}, {B.data(), c.adapter, N, R, R}, 0.5f, {}};
  if (c.dropout > 0)
    lora.dropout = {static_cast<uint32_t>(static_cast<double>(c.dropout) * 4294967296.0),
                    1.0f / (1.0f - c.dropout), &kSeed};
  LinearArgs forward;
  forward.x = {x.data(), c.x, M, K, K};
  forward.base = base;
  forward.lora = lora;
  forward.bias = {bias.data(), DType::f32};
  forward.y = {y.data(), c.x, M, N, N};
  forward.s = s.f32.data();
  forward.arithmetic = arithmetic;
  lk_kernels()->linear(forward, kPool);
  BackwardArgs backward;
  backward.arithmetic = arithmetic;
  backward.dy = {dy.data(), c.x, M, N, N};
  backward.x = forward.x;
  backward.base = base;
  backward.lora = lora;
  backward.s = s.f32.data();
  backward.ds = ds.f32.data();
  backward.dx = {dx.data(), c.x, M, K, K};
  backward.dA = {dA.data(), c.adapter, R, K, K};
  backward.dB = {dB.data(), c.adapter, N, R, R};
  backward.dbias = {dbias.data(), DType::f32, 1, N, N};
  lk_kernels()->linear_backward(backward, kPool);

  const auto W = [&](int64_t n, int64_t k) {
    return static_cast<double>(p.dense[static_cast<size_t>(n * K + k)]);
  };
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = bias.get(n), magnitude = std::fabs(sum);
      for (int64_t k = 0; k < K; ++k) {
        sum += x.get(m * K + k) * W(n, k);
        magnitude += std::fabs(x.get(m * K + k) * W(n, k));
      }
      for (int64_t r = 0; r < R; ++r) {  // S itself is checked through dropout-free cases
        sum += 0.5 * s.get(m * R + r) * B.get(n * R + r);
        magnitude += std::fabs(s.get(m * R + r) * B.get(n * R + r));
      }
      expect(name_of(c, "y"), y, m * N + n, sum, magnitude, rounding);
    }
  if (c.dropout == 0)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t r = 0; r < R; ++r) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; k < K; ++k) {
          sum += x.get(m * K + k) * A.get(r * K + k);
          magnitude += std::fabs(x.get(m * K + k) * A.get(r * K + k));
        }
        expect(name_of(c, "s"), s, m * R + r, sum, magnitude);
      }
  if (c.dropout == 0)
    for (int64_t m = 0; m < M; ++m)
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0, magnitude = 0;
        for (int64_t n = 0; n < N; ++n) {
          sum += dy.get(m * N + n) * W(n, k);
          magnitude += std::fabs(dy.get(m * N + n) * W(n, k));
        }
        for (int64_t r = 0; r < R; ++r) {
          sum += ds.get(m * R + r) * A.get(r * K + k);
          magnitude += std::fabs(ds.get(m * R + r) * A.get(r * K + k));
        }
        expect(name_of(c, "dx"), dx, m * K + k, sum, magnitude, rounding);
      }
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t r = 0; r < R; ++r) {
      double sum = 0, magnitude = 0;
      for (int64_t m = 0; m < M; ++m) {
        sum += 0.5 * dy.get(m * N + n) * s.get(m * R + r);
        magnitude += std::fabs(dy.get(m * N + n) * s.get(m * R + r));
      }
      expect(name_of(c, "dB"), dB, n * R + r, sum, magnitude);
    }
    double sum = 0, magnitude = 0;
    for (int64_t m = 0; m < M; ++m) {
      sum += dy.get(m * N + n);
      magnitude += std::fabs(dy.get(m * N + n));
    }
    expect(name_of(c, "dbias"), dbias, n, sum, magnitude);
  }
  if (c.dropout == 0)
    for (int64_t r = 0; r < R; ++r)
      for (int64_t k = 0; k < K; ++k) {
        double sum = 0, magnitude = 0;
        for (int64_t m = 0; m < M; ++m) {
          sum += ds.get(m * R + r) * x.get(m * K + k);
          magnitude += std::fabs(ds.get(m * R + r) * x.get(m * K + k));
        }
        expect(name_of(c, "dA"), dA, r * K + k, sum, magnitude);
      }
}

// The product on bytes, within half a step of every activation and code; exactly: the Python tests.
void check_int8(const Case& c) {
  if (!lk_int8_kernels() || !blocks_fit_rows(Problem(c).w)) return;
  Problem p(c);
  const int64_t M = c.M, N = c.N, K = c.K, size = c.shift < 6 ? 32 : 64;
  Values x = p.normal(c.x, M * K), y(c.x, M * N);
  LinearArgs a;
  a.x = {x.data(), c.x, M, K, K};
  a.base.quantized = &p.w;
  a.y = {y.data(), c.x, M, N, N};
  a.arithmetic = Arithmetic::int8;
  lk_kernels()->linear(a, kPool);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n) {
      double sum = 0, bound = 1e-5;
      for (int64_t k = 0; k < K; ++k) {
        double largest = 0, scale = 0;
        for (int64_t i = k / size * size; i < k / size * size + size; ++i)
          largest = std::max(largest, std::fabs(x.get(m * K + i)));
        for (int64_t i = k >> c.shift << c.shift; i < ((k >> c.shift) + 1) << c.shift; ++i)
          scale = std::max(scale, std::fabs(double{p.dense[static_cast<size_t>(n * K + i)]}));
        const double value = x.get(m * K + k), weight = p.dense[static_cast<size_t>(n * K + k)];
        sum += value * weight;
        bound += largest / 253 * (std::fabs(weight) + scale / 128) + std::fabs(value) * scale / 128;
      }
      ++checks;
      if (std::fabs(y.get(m * N + n) - sum) > bound + y.unit() * std::fabs(sum) && ++failures <= 20)
        std::printf("FAIL %s\n", name_of(c, "int8 y").c_str());
    }
  if (M == 0) return;
  x.set(K - 1, NAN);
  lk_kernels()->linear(a, kPool);
  for (int64_t n = 0; n < N; ++n)
    if (!std::isnan(y.get(n))) ++failures;
}

void check_half() {
  for (uint32_t h = 0; h < 65536; ++h) {  // every 16-bit value survives a round trip
    const uint16_t u = static_cast<uint16_t>(h);
    checks += 2;
    if (!std::isnan(float_from_f16(u)) && f16_from_float(float_from_f16(u)) != u) ++failures;
    if (!std::isnan(float_from_bf16(u)) && bf16_from_float(float_from_bf16(u)) != u) ++failures;
  }
}

int run() {
  const DType f32 = DType::f32, bf16 = DType::bf16, f16 = DType::f16;
  const Case cases[] = {
      // M, N, K, R, log2 blocksize, double quant, x, A and B, dropout
      {1, 37, 192, 3, 6, true, f32, f32, 0},    {2, 5, 96, 8, 5, false, bf16, f32, 0},
      {3, 33, 320, 17, 6, true, f16, bf16, 0},  {4, 70, 256, 16, 7, true, f32, f32, 0.25f},
      {5, 67, 192, 20, 6, true, f32, bf16, 0},  {17, 131, 608, 4, 5, false, bf16, f32, 0},
      {65, 20, 512, 1, 8, true, f16, f32, 0},   {1, 19, 77, 2, 6, true, f32, f32, 0},
      {9, 17, 100, 5, 6, false, bf16, bf16, 0}, {6, 1, 1, 1, 6, true, f32, f32, 0},
      {7, 300, 33, 12, 12, false, f32, f32, 0}, {30, 40, 257, 9, 6, true, f32, f32, 0.5f},
      {0, 16, 64, 4, 6, true, f32, f32, 0},     {600, 9, 64, 40, 6, true, f32, f32, 0},
  };
  check_half();
  for (int isa = 0; isa < lk_isa_count(); ++isa) {
    if (!lk_isa_supported(isa)) {
      std::printf("skipped %s: this CPU does not support it\n", lk_isa_name(isa));
      continue;
    }
    if (lk_isa_set(lk_isa_name(isa)) != 0 || std::string(lk_isa_active()) != lk_isa_name(isa))
      return 1;
    for (const Case& c : cases) {
      check_linear(c, false);
      check_linear(c, true);
      if (lk_pairs() && c.x != f16) check_linear(c, false, Arithmetic::bf16);
      check_int8(c);
    }
    std::printf("%s: %lld checks, %d failures\n", lk_isa_name(isa), checks, failures);
  }
  if (lk_isa_set("no such instruction set") != 1) ++failures;
  std::printf("%lld passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}

}  // namespace
}  // namespace lk

int main() { return lk::run(); }
