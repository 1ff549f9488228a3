// The operators on CPU tensors: torch tensors to plain arguments, on the LibTorch stable ABI.
// User-facing checks are in Python (schema.py); here only what memory safety needs is checked
// again.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "cpu/api.h"
#include "cpu/table.h"

namespace lk {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// -- arguments ------------------------------------------------------------------------------------

Parallel pool() {
  return {[](int64_t tasks, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(
                0, tasks, 1, [=](int64_t begin, int64_t end) { body(context, begin, end); });
          },
          static_cast<int>(torch::stable::get_num_threads())};
}

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16");
  }
}

// `t` itself, or a copy with rows that lie element by element.
Tensor rows_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected a matrix, got ", t.dim(), " dimensions");
  STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor");
  const bool ok =
      (t.size(1) <= 1 || t.stride(1) == 1) && (t.size(0) <= 1 || t.stride(0) >= t.size(1));
  return ok ? t : torch::stable::contiguous(t);
}

Matrix matrix(const char* name, const Tensor& t, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == rows && t.size(1) == cols, name,
                  ": expected shape [", rows, ", ", cols, "], got ", t.dim(), " dimensions of ",
                  t.numel(), " elements");
  return {t.const_data_ptr(), dtype_of(name, t), rows, cols, rows > 1 ? t.stride(0) : cols};
}

MutMatrix output(const Tensor& t, int64_t rows, int64_t cols) {
  return {t.mutable_data_ptr(), dtype_of("output", t), rows, cols, cols};
}

Vector vector(const char* name, const Tensor& t, int64_t size) {
  STD_TORCH_CHECK(t.dim() == 1 && t.numel() == size, name, ": expected ", size, " elements, got ",
                  t.numel());
  return {t.const_data_ptr(), dtype_of(name, t)};
}

template <class T>
const T* data(const char* name, const Tensor& t, ScalarType type, int64_t numel) {
  STD_TORCH_CHECK(t.scalar_type() == type && t.numel() == numel && t.is_contiguous() && t.is_cpu(),
                  name, ": expected ", numel,
                  " contiguous elements of the schema's dtype on the CPU, got ", t.numel());
  return static_cast<const T*>(t.const_data_ptr());
}

int shift_of(int64_t blocksize) {
  STD_TORCH_CHECK(blocksize >= 32 && blocksize <= 4096 && (blocksize & (blocksize - 1)) == 0,
                  "blocksize: expected a power of two in 32..4096, got ", blocksize);
  return __builtin_ctzll(static_cast<unsigned long long>(blocksize));
}

Weight4 weight4(const Tensor& packed, const Tensor& absmax, const Tensor& code,
                const MaybeTensor& nested_absmax, const MaybeTensor& nested_code,
                const MaybeTensor& nested_offset, int64_t N, int64_t K, int64_t blocksize) {
  Weight4 w;
  w.block_shift = shift_of(blocksize);
  int64_t numel = 0;
  STD_TORCH_CHECK(N >= 0 && K >= 0 && !__builtin_mul_overflow(N, K, &numel),
                  "N, K: expected sizes, got ", N, ", ", K);
  w.N = N;
  w.K = K;
  // Exactly: a packed weight that somebody cast to a wider dtype has too many bytes.
  const int64_t item = static_cast<int64_t>(packed.element_size());
  const int64_t bytes = packed.numel() * item;
  const int64_t expected = ceil_div(ceil_div(numel, 2), item) * item;
  STD_TORCH_CHECK(packed.is_contiguous() && packed.is_cpu() && bytes == expected,
                  "packed: expected ", expected, " contiguous bytes on the CPU, got ", bytes);
  w.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  w.code = data<float>("code", code, ScalarType::Float, 16);
  const int64_t blocks = ceil_div(numel, blocksize);
  if (nested_absmax) {
    STD_TORCH_CHECK(nested_code && nested_offset,
                    "nested_code, nested_offset: expected tensors, got None");
    w.absmax_u8 = data<uint8_t>("absmax", absmax, ScalarType::Byte, blocks);
    w.nested_absmax = data<float>("nested_absmax", *nested_absmax, ScalarType::Float,
                                  ceil_div(blocks, kNestedBlock));
    w.nested_code = data<float>("nested_code", *nested_code, ScalarType::Float, 256);
    w.nested_offset = *data<float>("nested_offset", *nested_offset, ScalarType::Float, 1);
  } else {
    w.absmax = data<float>("absmax", absmax, ScalarType::Float, blocks);
  }
  return w;
}

Dropout dropout_of(double p, const MaybeTensor& seed) {
  Dropout d;
  if (p == 0.0) return d;
  STD_TORCH_CHECK(p > 0.0 && p < 1.0 && seed, "dropout_p: expected 0 <= p < 1 and a seed, got ", p);
  const uint64_t key = static_cast<uint64_t>(*data<int64_t>("seed", *seed, ScalarType::Long, 1));
  d.threshold = static_cast<uint32_t>(p * 4294967296.0);
  d.scale = static_cast<float>(1.0 / (1.0 - p));
  d.key[0] = static_cast<uint32_t>(key);
  d.key[1] = static_cast<uint32_t>(key >> 32);
  return d;
}

// The adapter's matrices and what keeps copies of them alive.
struct Adapter {
  Tensor A, B;
  Lora lora;

  Adapter(const Tensor& a, const Tensor& b, double scaling, double dropout_p,
          const MaybeTensor& seed, int64_t N, int64_t K)
      : A(rows_of("A", a)), B(rows_of("B", b)) {
    const int64_t R = A.size(0);
    lora = {matrix("A", A, R, K), matrix("B", B, N, R), static_cast<float>(scaling),
            dropout_of(dropout_p, seed)};
  }
};

Tensor empty(const Tensor& like, std::initializer_list<int64_t> size, ScalarType type) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(size), type);
}
Tensor empty(const Tensor& like, std::initializer_list<int64_t> size) {
  return empty(like, size, like.scalar_type());
}

// -- operators: the order of arguments is that of schema.py ---------------------------------------

#define LK_WEIGHT_PARAMS                                                                         \
  Tensor packed, Tensor absmax, Tensor code, MaybeTensor nested_absmax, MaybeTensor nested_code, \
      MaybeTensor nested_offset, int64_t N, int64_t K, int64_t blocksize
#define LK_WEIGHT \
  weight4(packed, absmax, code, nested_absmax, nested_code, nested_offset, N, K, blocksize)

std::tuple<Tensor, Tensor> quantize_4bit(Tensor weight, Tensor code, int64_t blocksize) {
  weight = torch::stable::contiguous(weight);
  STD_TORCH_CHECK(weight.is_cpu(), "weight: expected a CPU tensor");
  shift_of(blocksize);
  const int64_t numel = weight.numel();
  Tensor packed = empty(weight, {ceil_div(numel, 2), 1}, ScalarType::Byte);
  Tensor absmax = empty(weight, {ceil_div(numel, blocksize)}, ScalarType::Float);
  lk_kernels()->quantize({weight.const_data_ptr(), dtype_of("weight", weight), numel, blocksize,
                          data<float>("code", code, ScalarType::Float, 16),
                          static_cast<uint8_t*>(packed.mutable_data_ptr()),
                          static_cast<float*>(absmax.mutable_data_ptr())},
                         pool());
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> double_quantize(Tensor absmax, Tensor nested_code) {
  const int64_t blocks = absmax.numel();
  Tensor quantized = empty(absmax, {blocks}, ScalarType::Byte);
  Tensor nested_absmax = empty(absmax, {ceil_div(blocks, kNestedBlock)});
  Tensor offset = empty(absmax, {});
  lk_kernels()->double_quantize({data<float>("absmax", absmax, ScalarType::Float, blocks), blocks,
                                 data<float>("nested_code", nested_code, ScalarType::Float, 256),
                                 static_cast<uint8_t*>(quantized.mutable_data_ptr()),
                                 static_cast<float*>(nested_absmax.mutable_data_ptr()),
                                 static_cast<float*>(offset.mutable_data_ptr())},
                                pool());
  return {quantized, nested_absmax, offset};
}

Tensor dequantize_4bit(LK_WEIGHT_PARAMS, ScalarType dtype) {
  const Weight4 w = LK_WEIGHT;
  Tensor out = empty(code, {N, K}, dtype);
  lk_kernels()->dequantize({w, dtype_of("dtype", out), out.mutable_data_ptr()}, pool());
  return out;
}

// y and S of either base; without an adapter S is empty.
std::tuple<Tensor, Tensor> forward(const Tensor& x_in, const Base& base, const Adapter* adapter,
                                   int64_t N, int64_t K, const MaybeTensor& bias_in) {
  const Tensor x = rows_of("x", x_in);
  const int64_t M = x.size(0), R = adapter ? adapter->lora.A.rows : 0;
  Tensor y = empty(x, {M, N}), s = empty(x, {M, R}, ScalarType::Float);
  LinearArgs a;
  a.x = matrix("x", x, M, K);
  a.base = base;
  if (adapter) a.lora = adapter->lora;
  MaybeTensor bias;
  if (bias_in) {
    bias = torch::stable::contiguous(*bias_in);
    a.bias = vector("bias", *bias, N);
  }
  a.y = output(y, M, N);
  a.s = static_cast<float*>(s.mutable_data_ptr());
  lk_kernels()->linear(a, pool());
  return {y, s};
}

Tensor linear_4bit(Tensor x, LK_WEIGHT_PARAMS, MaybeTensor bias) {
  const Weight4 w = LK_WEIGHT;
  return std::get<0>(forward(x, {&w, nullptr}, nullptr, N, K, bias));
}

Tensor linear_4bit_dx(Tensor dy_in, LK_WEIGHT_PARAMS) {
  const Weight4 w = LK_WEIGHT;
  const Tensor dy = rows_of("dy", dy_in);
  const int64_t M = dy.size(0);
  Tensor dx = empty(dy, {M, K});
  BackwardArgs a;
  a.dy = matrix("dy", dy, M, N);
  a.base.quantized = &w;
  a.dx = output(dx, M, K);
  lk_kernels()->linear_backward(a, pool());
  return dx;
}

std::tuple<Tensor, Tensor> lora_linear_4bit(Tensor x, LK_WEIGHT_PARAMS, Tensor A, Tensor B,
                                            double scaling, MaybeTensor bias, double dropout_p,
                                            MaybeTensor seed) {
  const Weight4 w = LK_WEIGHT;
  const Adapter adapter(A, B, scaling, dropout_p, seed, N, K);
  return forward(x, {&w, nullptr}, &adapter, N, K, bias);
}

std::tuple<Tensor, Tensor> lora_linear(Tensor x, Tensor weight_in, Tensor A, Tensor B,
                                       double scaling, MaybeTensor bias, double dropout_p,
                                       MaybeTensor seed) {
  const Tensor weight = rows_of("weight", weight_in);
  const int64_t N = weight.size(0), K = weight.size(1);
  const Matrix dense = matrix("weight", weight, N, K);
  const Adapter adapter(A, B, scaling, dropout_p, seed, N, K);
  return forward(x, {nullptr, &dense}, &adapter, N, K, bias);
}

using Gradients = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// dx, dA, dB, dbias; one that is not needed is empty.
Gradients backward(const Tensor& dy_in, const Tensor& x_in, const Tensor& s_in, const Base& base,
                   const Adapter& adapter, const MaybeTensor& bias, int64_t N, int64_t K,
                   bool need_dx, bool need_dA, bool need_dB, bool need_dbias) {
  const Tensor dy = rows_of("dy", dy_in), x = rows_of("x", x_in),
               s = torch::stable::contiguous(s_in);
  const int64_t M = dy.size(0), R = adapter.lora.A.rows;
  const Tensor dx = need_dx ? empty(dy, {M, K}) : empty(dy, {0});
  const Tensor dA = need_dA ? empty(adapter.A, {R, K}) : empty(adapter.A, {0});
  const Tensor dB = need_dB ? empty(adapter.B, {N, R}) : empty(adapter.B, {0});
  const Tensor dbias = empty(bias ? *bias : dy, {need_dbias ? N : 0});
  const Tensor ds = empty(dy, {M, R}, ScalarType::Float);
  BackwardArgs a;
  a.dy = matrix("dy", dy, M, N);
  a.x = matrix("x", x, M, K);
  a.base = base;
  a.lora = adapter.lora;
  a.s = data<float>("s", s, ScalarType::Float, M * R);
  a.ds = static_cast<float*>(ds.mutable_data_ptr());
  if (need_dx) a.dx = output(dx, M, K);
  if (need_dA) a.dA = output(dA, R, K);
  if (need_dB) a.dB = output(dB, N, R);
  if (need_dbias) a.dbias = output(dbias, 1, N);
  lk_kernels()->linear_backward(a, pool());
  return {dx, dA, dB, dbias};
}

Gradients lora_linear_4bit_backward(Tensor dy, Tensor x, Tensor s, LK_WEIGHT_PARAMS, Tensor A,
                                    Tensor B, double scaling, MaybeTensor bias, double dropout_p,
                                    MaybeTensor seed, bool need_dx, bool need_dA, bool need_dB,
                                    bool need_dbias) {
  const Weight4 w = LK_WEIGHT;
  const Adapter adapter(A, B, scaling, dropout_p, seed, N, K);
  return backward(dy, x, s, {&w, nullptr}, adapter, bias, N, K, need_dx, need_dA, need_dB,
                  need_dbias);
}

Gradients lora_linear_backward(Tensor dy, Tensor x, Tensor s, Tensor weight_in, Tensor A, Tensor B,
                               double scaling, MaybeTensor bias, double dropout_p, MaybeTensor seed,
                               bool need_dx, bool need_dA, bool need_dB, bool need_dbias) {
  const Tensor weight = rows_of("weight", weight_in);
  const int64_t N = weight.size(0), K = weight.size(1);
  const Matrix dense = matrix("weight", weight, N, K);
  const Adapter adapter(A, B, scaling, dropout_p, seed, N, K);
  return backward(dy, x, s, {nullptr, &dense}, adapter, bias, N, K, need_dx, need_dA, need_dB,
                  need_dbias);
}

}  // namespace
}  // namespace lk

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CPU, m) {
  m.impl("quantize_4bit", TORCH_BOX(&lk::quantize_4bit));
  m.impl("double_quantize", TORCH_BOX(&lk::double_quantize));
  m.impl("dequantize_4bit", TORCH_BOX(&lk::dequantize_4bit));
  m.impl("linear_4bit", TORCH_BOX(&lk::linear_4bit));
  m.impl("linear_4bit_dx", TORCH_BOX(&lk::linear_4bit_dx));
  m.impl("lora_linear_4bit", TORCH_BOX(&lk::lora_linear_4bit));
  m.impl("lora_linear_4bit_backward", TORCH_BOX(&lk::lora_linear_4bit_backward));
  m.impl("lora_linear", TORCH_BOX(&lk::lora_linear));
  m.impl("lora_linear_backward", TORCH_BOX(&lk::lora_linear_backward));
}
