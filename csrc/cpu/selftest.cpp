// Torch-free self-test of the CPU kernels, against plain loops in double.
//
//   selftest                   every instruction set that this CPU supports
//   selftest ISA ISA+FEATURE   these; it fails if one is missing, if the first is not the best that
//                              this CPU supports, or if products of int8 run on another FEATURE
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "cpu/api.h"
#include "cpu/selftest_grouped.h"
#include "cpu/selftest_problem.h"
#include "cpu/table.h"

namespace lk {
namespace {

const uint64_t kSeed = uint64_t{2} << 32 | 1;

void check_linear(const Case& c, bool dense_base) {
  Problem p(c);
  p.check_weight();
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
  forward.arithmetic = c.arithmetic;
  lk_kernels()->linear(forward, kPool);
  BackwardArgs backward;
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
  backward.arithmetic = c.arithmetic;
  lk_kernels()->linear_backward(backward, kPool);

  expect_all(c, "y", y, M, N, [&](Sum& sum, int64_t m, int64_t n) {
    sum.add(bias.get(n));
    for (int64_t k = 0; k < K; ++k) sum.add_base(x.get(m * K + k) * p.weight(n, k));
    // S itself is checked through dropout-free cases.
    for (int64_t r = 0; r < R; ++r) sum.add(0.5 * s.get(m * R + r) * B.get(n * R + r));
  });
  expect_all(c, "dB", dB, N, R, [&](Sum& sum, int64_t n, int64_t r) {
    for (int64_t m = 0; m < M; ++m) sum.add(0.5 * dy.get(m * N + n) * s.get(m * R + r));
  });
  expect_all(c, "dbias", dbias, 1, N, [&](Sum& sum, int64_t, int64_t n) {
    for (int64_t m = 0; m < M; ++m) sum.add(dy.get(m * N + n));
  });
  if (c.dropout > 0) return;
  expect_all(c, "s", s, M, R, [&](Sum& sum, int64_t m, int64_t r) {
    for (int64_t k = 0; k < K; ++k) sum.add(x.get(m * K + k) * A.get(r * K + k));
  });
  expect_all(c, "dx", dx, M, K, [&](Sum& sum, int64_t m, int64_t k) {
    for (int64_t n = 0; n < N; ++n) sum.add_base(dy.get(m * N + n) * p.weight(n, k));
    for (int64_t r = 0; r < R; ++r) sum.add(ds.get(m * R + r) * A.get(r * K + k));
  });
  expect_all(c, "dA", dA, R, K, [&](Sum& sum, int64_t r, int64_t k) {
    for (int64_t m = 0; m < M; ++m) sum.add(ds.get(m * R + r) * x.get(m * K + k));
  });
}

// A batch whose rows have the first, the second or no adapter; the first lies in the last pages.
struct Batch {
  int32_t ranks[2], pages[2];
  float scalings[2] = {0.5f, -2.0f};
  std::vector<int32_t> slot_of, rows, tile_of_row, page_ids, grad_rows;
  std::vector<Tile> tiles;
  BatchPlan plan;

  Batch(int64_t M, int32_t first, int32_t second, std::mt19937& random) : ranks{first, second} {
    for (int u = 0; u < 2; ++u) pages[u] = (ranks[u] + 7) / 8;
    for (int32_t i = pages[0] + pages[1]; i-- > 0;) page_ids.push_back(i);
    grad_rows = {0, ranks[0]};
    for (int64_t m = 0; m < M; ++m) slot_of.push_back(static_cast<int32_t>(random() % 3) - 1);
    tile_of_row.assign(slot_of.size(), -1);
    for (int32_t u = 0; u < 2; ++u)
      for (size_t m = 0; m < slot_of.size(); ++m) {
        if (slot_of[m] != u) continue;
        if (tiles.empty() || tiles.back().slot != u || tiles.back().rows == plan.tile_rows)
          tiles.push_back({u, static_cast<int32_t>(rows.size()), 0, u * pages[0]});
        ++tiles.back().rows;
        tile_of_row[m] = static_cast<int32_t>(tiles.size()) - 1;
        rows.push_back(static_cast<int32_t>(m));
      }
    plan.rows = rows.data();
    plan.tiles = tiles.data();
    plan.tile_of_row = tile_of_row.data();
    plan.page_ids = page_ids.data();
    plan.row_count = static_cast<int64_t>(rows.size());
    plan.tile_count = static_cast<int64_t>(tiles.size());
    plan.page_count = static_cast<int64_t>(page_ids.size());
    plan.max_rank = std::max(first, second);
  }
  int64_t width() const { return ceil_div(plan.max_rank, 8) * 8; }
  int32_t rank_of(int64_t m) const {
    const int32_t u = slot_of[static_cast<size_t>(m)];
    return u < 0 ? 0 : ranks[u];
  }
  double scaling_of(int64_t m) const {
    return static_cast<double>(scalings[slot_of[static_cast<size_t>(m)]]);
  }
  // The row of the pages that holds rank r of the adapter of a slot, or of row m.
  int64_t page_row(int32_t u, int64_t r) const {
    return page_ids[static_cast<size_t>(u * pages[0] + r / 8)] * int64_t{8} + r % 8;
  }
  int64_t row_of(int64_t m, int64_t r) const {
    return page_row(slot_of[static_cast<size_t>(m)], r);
  }
};

void check_multi(const Case& c) {
  Problem p(c);
  const int64_t M = c.M, N = c.N, K = c.K;
  Batch b(M, static_cast<int32_t>(c.R), static_cast<int32_t>(c.R % 7 + 5), p.random);
  const int64_t P = 8 * b.plan.page_count, R = b.width(), G = b.ranks[0] + b.ranks[1];
  Values x = p.normal(c.x, M * K), dy = p.normal(c.x, M * N), A = p.normal(c.adapter, P * K),
         B = p.normal(c.adapter, P * N), bias = p.normal(DType::f32, N), y(c.x, M * N),
         s(DType::f32, M * R), ds(DType::f32, M * R), dx(c.x, M * K), dA(DType::f32, G * K),
         dB(DType::f32, G * N);
  Pages pages;
  pages.A = {A.data(), c.adapter, P, K, K};
  pages.B = {B.data(), c.adapter, P, N, N};
  pages.slots = 2;
  pages.ranks = b.ranks;
  pages.scalings = b.scalings;
  MultiArgs forward;
  forward.x = {x.data(), c.x, M, K, K};
  forward.base = &p.w;
  forward.plan = b.plan;
  forward.pages = pages;
  forward.bias = {bias.data(), DType::f32};
  forward.y = {y.data(), c.x, M, N, N};
  forward.s = s.f32.data();
  forward.s_stride = R;
  forward.arithmetic = c.arithmetic;
  lk_kernels()->multi(forward, kPool);
  MultiBackwardArgs backward;
  backward.dy = {dy.data(), c.x, M, N, N};
  backward.x = forward.x;
  backward.base = &p.w;
  backward.plan = b.plan;
  backward.pages = pages;
  backward.s = s.f32.data();
  backward.ds = ds.f32.data();
  backward.s_stride = R;
  backward.dx = {dx.data(), c.x, M, K, K};
  backward.arithmetic = c.arithmetic;
  backward.grad_rows = b.grad_rows.data();
  backward.grad_rank = G;
  backward.dA = dA.f32.data();
  backward.dB = dB.f32.data();
  lk_kernels()->multi_backward(backward, kPool);

  expect_all(c, "multi s", s, M, R, [&](Sum& sum, int64_t m, int64_t r) {
    for (int64_t k = 0; r < b.rank_of(m) && k < K; ++k)
      sum.add(x.get(m * K + k) * A.get(b.row_of(m, r) * K + k));
  });
  expect_all(c, "multi y", y, M, N, [&](Sum& sum, int64_t m, int64_t n) {
    sum.add(bias.get(n));
    for (int64_t k = 0; k < K; ++k) sum.add_base(x.get(m * K + k) * p.weight(n, k));
    for (int64_t r = 0; r < b.rank_of(m); ++r)
      sum.add(b.scaling_of(m) * s.get(m * R + r) * B.get(b.row_of(m, r) * N + n));
  });
  expect_all(c, "multi ds", ds, M, R, [&](Sum& sum, int64_t m, int64_t r) {
    for (int64_t n = 0; r < b.rank_of(m) && n < N; ++n)
      sum.add(b.scaling_of(m) * dy.get(m * N + n) * B.get(b.row_of(m, r) * N + n));
  });
  expect_all(c, "multi dx", dx, M, K, [&](Sum& sum, int64_t m, int64_t k) {
    for (int64_t n = 0; n < N; ++n) sum.add_base(dy.get(m * N + n) * p.weight(n, k));
    for (int64_t r = 0; r < b.rank_of(m); ++r)
      sum.add(ds.get(m * R + r) * A.get(b.row_of(m, r) * K + k));
  });
  const auto slot_of_gradient = [&](int64_t g) { return g < b.ranks[0] ? 0 : 1; };
  expect_all(c, "multi dA", dA, G, K, [&](Sum& sum, int64_t g, int64_t k) {
    const int32_t u = slot_of_gradient(g);
    for (int64_t m = 0; m < M; ++m)
      if (b.slot_of[static_cast<size_t>(m)] == u)
        sum.add(ds.get(m * R + g - b.grad_rows[static_cast<size_t>(u)]) * x.get(m * K + k));
  });
  expect_all(c, "multi dB", dB, G, N, [&](Sum& sum, int64_t g, int64_t n) {
    const int32_t u = slot_of_gradient(g);
    for (int64_t m = 0; m < M; ++m)
      if (b.slot_of[static_cast<size_t>(m)] == u)
        sum.add(b.scaling_of(m) * s.get(m * R + g - b.grad_rows[static_cast<size_t>(u)]) *
                dy.get(m * N + n));
  });
}

// The product on bytes, within half a step of every activation and code; exactly: the Python tests.
void check_int8(const Case& c) {
  Problem p(c);
  if (!lk_int8_kernels() || !blocks_fit_rows(p.w)) return;
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

// Every number of 16 bits as it is loaded, and numbers of all kinds as they are rounded to 16 bits.
void check_conversions() {
  std::vector<uint16_t> values(65536 * 32);
  std::vector<uint8_t> packed(65536 * 16);
  std::vector<float> largest(65536);
  for (DType t : {DType::bf16, DType::f16}) {
    std::fill(values.begin(), values.end(), uint16_t{0});
    for (uint32_t h = 0; h < 65536; ++h)  // each in a block of its own, which it is the largest of
      values[32 * h + h / 7 % 32] = static_cast<uint16_t>(h);
    lk_kernels()->quantize({values.data(), t, 65536 * 32, 32, kNf4, packed.data(), largest.data()},
                           kPool);
    for (uint32_t h = 0; h < 65536; ++h) {
      const uint16_t u = static_cast<uint16_t>(h);
      const float value = std::fabs(t == DType::bf16 ? float_from_bf16(u) : float_from_f16(u));
      ++checks;
      if (bits_of(largest[h]) != bits_of(value) && !std::isnan(value) && ++failures <= 20)
        std::printf("FAIL %s loads %04x as %g\n", lk_isa_active(), h,
                    static_cast<double>(largest[h]));
      if (std::isnan(value) != std::isnan(largest[h])) ++failures;
    }
  }
  std::mt19937 random(3);
  uint8_t nibbles[16];
  for (int i = 0; i < 16; ++i) nibbles[i] = static_cast<uint8_t>(i << 4 | (15 - i));
  const float one = 1.0f;
  for (int repeat = 0; repeat < 3000; ++repeat) {
    float code[16];
    for (float& value : code) {
      uint32_t bits = static_cast<uint32_t>(random());
      const int cut = repeat % 2 ? 16 : 13;  // bits that rounding takes away: a tie, or next to one
      if (repeat % 3 > 0) bits = (bits >> cut << cut) + (1u << (cut - 1)) + random() % 3 - 1;
      if (repeat % 5 > 2) bits = (bits & 0x8fffffffu) | 0x30000000u;  // of float16's magnitude
      value = float_of(bits);
    }
    Weight4 w;
    w.packed = nibbles;
    w.absmax = &one;
    w.code = code;
    w.N = 1;
    w.K = 32;
    w.block_shift = 5;
    for (DType t : {DType::bf16, DType::f16}) {
      Values out(t, 32), expected(t, 32);
      lk_kernels()->dequantize({w, t, out.data()}, kAlone);
      for (int64_t i = 0; i < 32; ++i) {
        expected.set(i, code[i % 2 ? 15 - i / 2 : i / 2]);
        ++checks;
        const bool nan = std::isnan(expected.get(i));
        const size_t j = static_cast<size_t>(i);
        if ((nan ? !std::isnan(out.get(i)) : out.half[j] != expected.half[j]) && ++failures <= 20)
          std::printf("FAIL %s rounds %a to %04x\n", lk_isa_active(),
                      static_cast<double>(code[i % 2 ? 15 - i / 2 : i / 2]), out.half[j]);
      }
    }
  }
}

// A value in the middle of two codes takes the lower one.
void check_ties() {
  float code[16];
  for (int i = 0; i < 16; ++i) code[i] = static_cast<float>(i - 15) / 16;
  code[15] = 1.0f;
  std::vector<float> values(32, 1.0f);  // the largest magnitude: the scale is one
  for (size_t i = 0; i < 14; ++i) values[2 * i + i % 2] = (code[i] + code[i + 1]) / 2;
  uint8_t packed[16];
  float scale;
  lk_kernels()->quantize({values.data(), DType::f32, 32, 32, code, packed, &scale}, kAlone);
  for (int i = 0; i < 32; ++i) {
    const int nibble = packed[i / 2] >> (i % 2 ? 0 : 4) & 15;
    const int lower = values[static_cast<size_t>(i)] == 1.0f ? 15 : i / 2;
    ++checks;
    if (nibble != lower && ++failures <= 20)
      std::printf("FAIL %s encodes a tie as %d, not %d\n", lk_isa_active(), nibble, lower);
  }
}

// Ragged problems, by each kernel in turn; the same in every run.
std::vector<Case> random_cases() {
  std::mt19937 random(1);
  const auto up_to = [&](int64_t most) {
    return int64_t{1} + static_cast<int64_t>(random() % most);
  };
  constexpr DType kTypes[] = {DType::bf16, DType::f32, DType::f16};
  constexpr const char* kKernel[] = {"", "gemv", "", "skinny", "", "gemm", "", "invariant"};
  std::vector<Case> found;
  for (int i = 0; i < 48; ++i) {
    Case c{};
    c.shift = 5 + static_cast<int>(random() % 4);
    c.K = i % 4 == 3 ? up_to(600) : up_to(3 + (512 >> c.shift)) << c.shift;
    c.N = up_to(i % 8 == 1 ? 280 : 60);
    c.M = up_to(i % 3 == 0 ? 4 : i % 3 == 1 ? 20 : 40);
    c.R = up_to(40);
    c.double_quant = random() % 2;
    c.x = kTypes[random() % 3];
    c.adapter = kTypes[random() % 3];
    c.arithmetic = c.x != DType::f16 && random() % 4 ? Arithmetic::bf16 : Arithmetic::exact;
    c.kernel = kKernel[i % 8];
    found.push_back(c);
  }
  return found;
}

void check_all() {
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
  check_conversions();
  check_ties();
  for (const Case& c : cases) {
    check_linear(c, false);
    check_linear(c, true);
    check_int8(c);
    check_grouped(c, false);
    check_grouped(c, true);
  }
  int i = 0;
  for (const Case& c : random_cases()) {
    if (lk_kernel_set(c.kernel) != 0) ++failures;
    check_linear(c, ++i % 8 == 0);
    if (i % 2) check_multi(c);
    check_grouped(c, i % 2);
    if (i % 3 == 0) check_int8(c);
  }
  lk_kernel_set(nullptr);
}

// name: an instruction set, with the feature that its products of int8 need or without.
void check_isa(const std::string& name) {
  const size_t plus = name.find('+');
  const std::string isa = name.substr(0, plus);
  const int result = lk_isa_set(isa.c_str());
  if (result != 0 || lk_isa_active() != isa) {
    std::printf("FAIL %s: %s\n", isa.c_str(),
                result == 2 ? "this CPU does not support it" : "unknown");
    ++failures;
    return;
  }
  const char* int8 = lk_int8_kernels() ? lk_int8_kernels() : "";
  if (plus != std::string::npos && name.substr(plus + 1) != int8) {
    std::printf("FAIL %s: products of int8 run on \"%s\"\n", name.c_str(), int8);
    ++failures;
  }
  check_all();
  std::printf("%s%s%s%s: %lld checks, %d failures\n", isa.c_str(), lk_pairs() ? ", pairs" : "",
              *int8 ? ", " : "", int8, checks, failures);
}

int run(int count, char** names) {
  check_half();
  const std::string best = lk_isa_active(), first = count ? names[0] : best;
  if (first.substr(0, first.find('+')) != best) {
    std::printf("FAIL: the best instruction set is %s\n", best.c_str());
    ++failures;
  }
  for (int i = 0; i < count; ++i) check_isa(names[i]);
  for (int isa = 0; isa < lk_isa_count() && count == 0; ++isa) {
    if (lk_isa_supported(isa))
      check_isa(lk_isa_name(isa));
    else
      std::printf("skipped %s: this CPU does not support it\n", lk_isa_name(isa));
  }
  if (lk_isa_set("no such instruction set") != 1) ++failures;
  std::printf("%lld passed, %d failed\n", checks - failures, failures);
  return failures != 0;
}

}  // namespace
}  // namespace lk

int main(int argc, char** argv) { return lk::run(argc - 1, argv + 1); }
