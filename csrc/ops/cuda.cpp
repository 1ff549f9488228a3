// The operators on CUDA tensors: launchers of liblowrank_cuda.so, opened at the first call. The
// same code drives the emulator's library on CPU tensors (namespace lowrank_kernels_emulated;
// tests).
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <unistd.h>

#include <cstdlib>
#include <string>

#include "cuda/api.h"
#include "ops/operators.h"

namespace lk {
namespace {

// -- the libraries --------------------------------------------------------------------------------

struct Library {
  std::string error;  // why it could not be opened; empty: it could
  const CudaTable* table = nullptr;

  explicit Library(const std::string& path) {
    if (access(path.c_str(), R_OK) != 0) {
      error = "it was built without CUDA, there is no file '" + path + "'";
      return;
    }
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
    if (!handle) {
      const char* reason = dlerror();
      error = reason ? reason : "unknown";
      return;
    }
    const auto get = reinterpret_cast<decltype(&lk_cuda_kernels)>(dlsym(handle, "lk_cuda_kernels"));
    if (get && get()->size == sizeof(CudaTable))
      table = get();
    else
      error = path + " is of another version";
  }
};

// liblowrank_cuda.so in the folder of this library.
std::string beside_this_library() {
  Dl_info info;
  if (!dladdr(reinterpret_cast<void*>(&beside_this_library), &info)) return {};
  const std::string path = info.dli_fname;
  return path.substr(0, path.find_last_of('/') + 1) + "liblowrank_cuda.so";
}

const CudaTable& gpu_kernels() {
  static const Library library(beside_this_library());
  STD_TORCH_CHECK(library.error.empty(), "lowrank_kernels has no CUDA kernels: ", library.error,
                  "; build: LOWRANK_BUILD_CUDA=1 pip install -e . --no-build-isolation");
  return *library.table;
}

const CudaTable& emulator_kernels() {
  const char* path = std::getenv("LOWRANK_EMULATOR");
  static const Library library(path ? path : "");
  STD_TORCH_CHECK(library.error.empty(), "the CUDA emulator cannot be opened: ", library.error,
                  "; build: make emulator, and set LOWRANK_EMULATOR to the library");
  return *library.table;
}

// -- what torch has no stable C++ for -------------------------------------------------------------

// A function of a library that torch has already loaded.
template <class Function>
Function torch_function(const char* library, const char* name) {
  void* handle = dlopen(library, RTLD_LAZY | RTLD_NOLOAD);
  void* function = handle ? dlsym(handle, name) : nullptr;
  STD_TORCH_CHECK(function, name, ": this version of torch does not have it in ", library);
  return reinterpret_cast<Function>(function);
}

void* current_stream(int device) {
  using Get = AOTITorchError (*)(int32_t, void**);
  static const Get get =
      torch_function<Get>("libtorch_cuda.so", "aoti_torch_get_current_cuda_stream");
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}

// Operators with an output argument refuse tensors that require gradients; ours are registered
// below autograd and have nothing to record.
struct NoGrad {
  const bool before = aoti_torch_grad_mode_is_enabled();
  NoGrad() { aoti_torch_grad_mode_set_enabled(false); }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before); }
};

// out = beta out + a b, one rounding; beta 0 ignores what out holds.
void add_product(Tensor& out, const Tensor& a, const Tensor& b, float beta) {
  const NoGrad no_grad;
  using Addmm = AOTITorchError (*)(AtenTensorHandle, AtenTensorHandle, AtenTensorHandle,
                                   AtenTensorHandle, float, float);
  static const Addmm addmm = torch_function<Addmm>("libtorch_cpu.so", "aoti_torch_addmm_out");
  STABLE_TORCH_ERROR_CODE_CHECK(addmm(out.get(), out.get(), a.get(), b.get(), beta, 1.0f));
}

// -- the backend ----------------------------------------------------------------------------------

// A dequantized piece of the weight, which the dense product then finds in the second-level cache.
constexpr int64_t kPieceBytes = 32 << 20;

template <bool emulated>
class Cuda {
 public:
  explicit Cuda(const Tensor& first)
      : kernels_(emulated ? emulator_kernels() : gpu_kernels()), like_(first) {
    if constexpr (emulated) {
      STD_TORCH_CHECK(first.is_cpu(), "the emulator: expected CPU tensors");
    } else {
      STD_TORCH_CHECK(first.is_cuda(), "expected CUDA tensors, got one on another device");
      launch_.device = first.get_device_index();
      guard_.emplace(launch_.device);
      launch_.stream = current_stream(launch_.device);
    }
  }

  void quantize(const QuantizeArgs& a) const {
    check(kernels_.quantize(a, launch_), "quantize_4bit", a.numel, a.blocksize, 0);
  }

  void double_quantize(const DoubleQuantizeArgs& a) const {
    Tensor workspace;
    const Launch on = with_workspace(kernels_.double_quantize_workspace(a.blocks), workspace);
    check(kernels_.double_quantize(a, on), "double_quantize", a.blocks, 0, 0);
  }

  void dequantize(const DequantizeArgs& a) const {
    const Weight4& w = a.weight;
    dequantize(w, 0, 0, {a.out, a.dtype, w.N, w.K, w.K});
  }

  void linear(const LinearArgs& a, const Tensor& x, const Tensor* weight, Tensor& y) const {
    const int64_t M = a.x.rows, N = a.y.cols, K = a.x.cols;
    const LaunchPlan plan = kernels_.plan_linear(a, launch_.device);
    const Weight4* w = a.base.quantized;
    if (plan.family != Family::matmul || plan.has_rest) {
      Tensor workspace;
      const Launch on = with_workspace(plan.workspace, workspace);
      check(kernels_.linear(a, plan, on), "linear", M, N, K);
    }
    if (plan.family != Family::matmul) return;
    const float beta = plan.has_rest ? 1.0f : 0.0f;
    if (weight) return add_product(y, x, torch::stable::transpose(*weight, 0, 1), beta);
    add_forward(*w, a.x.dtype, x, y, beta);
  }

  void multi(const MultiArgs& a, const Tensor& x, Tensor& y) const {
    const LaunchPlan plan = kernels_.plan_multi(a, launch_.device);
    Tensor workspace;
    const Launch on = with_workspace(plan.workspace, workspace);
    check(kernels_.multi(a, plan, on), "multi_lora", a.x.rows, a.y.cols, a.x.cols);
    if (a.base && plan.family == Family::matmul)
      add_forward(*a.base, a.x.dtype, x, y, plan.has_rest ? 1.0f : 0.0f);
  }

  void multi_backward(const MultiBackwardArgs& a, const Tensor& dy, Tensor& dx) const {
    const LaunchPlan plan = kernels_.plan_multi_backward(a, launch_.device);
    Tensor workspace;
    const Launch on = with_workspace(plan.workspace, workspace);
    check(kernels_.multi_backward(a, plan, on), "multi_lora_backward", a.dy.rows, a.dy.cols,
          a.x.cols);
    if (a.base && plan.family == Family::matmul)
      add_backward(*a.base, a.dy.dtype, dy, dx, plan.has_rest ? 1.0f : 0.0f);
  }

  static constexpr bool kTransposesFactors = false;
  // They stay on the device; the kernels cut what leads out of x.
  static constexpr bool kReadsOffsets = false;
  Tensor factor(const Tensor& t, const Experts&, bool) const {
    return torch::stable::contiguous(t);
  }
  void grouped(const GroupedArgs& a, const Tensor&, Tensor&) const {
    check(kernels_.grouped(a, launch_), "grouped_linear", a.x.rows, a.y.cols, a.x.cols);
  }
  void grouped_backward(const GroupedBackwardArgs& a, const Tensor&, Tensor&) const {
    check(kernels_.grouped_backward(a, launch_), "grouped_linear_backward", a.dy.rows, a.dy.cols,
          a.x.cols);
  }

  void linear_backward(const BackwardArgs& a, const Tensor& dy, const Tensor* weight,
                       Tensor& dx) const {
    const int64_t M = a.dy.rows, N = a.dy.cols, K = a.dx.cols;
    const LaunchPlan plan = kernels_.plan_linear_backward(a, launch_.device);
    const Weight4* w = a.base.quantized;
    if (plan.family != Family::matmul || plan.has_rest) {
      Tensor workspace;
      const Launch on = with_workspace(plan.workspace, workspace);
      check(kernels_.linear_backward(a, plan, on), "linear_backward", M, N, K);
    }
    if (plan.family != Family::matmul) return;
    const float beta = plan.has_rest ? 1.0f : 0.0f;
    if (weight) return add_product(dx, dy, *weight, beta);
    if (w) add_backward(*w, a.dy.dtype, dy, dx, beta);
  }

  // sum += part
  void add(Tensor& sum, const Tensor& part) const {
    torch::stable::copy_(sum, torch::stable::subtract(sum, part, -1.0));
  }

  // dx of several weights where the dense library multiplies by them: one product with their rows,
  // decoded, one below the other. To it are added the adapters' terms, a sum in float32 that is
  // rounded once, as for one weight. False, and nothing done: other kernels multiply.
  template <class Parts>
  bool stacked_dx(Parts& parts, Tensor& dx) const {
    const int64_t M = dx.size(0), K = dx.size(1);
    int64_t N = 0;
    bool dense = false;
    for (const auto& part : parts) {
      N += part.a.dy.cols;
      dense = dense || dense_product(part.a, dx);
    }
    if (!dense || parts.size() == 1) return false;
    Tensor rows = empty(dx, {M, N}), sum, term;
    int64_t n = 0, terms = 0;
    for (auto& part : parts) {
      Tensor place = torch::stable::narrow(rows, 1, n, part.a.dy.cols);
      torch::stable::copy_(place, part.dy);
      n += part.a.dy.cols;
      if (part.a.dbias.data) {
        const int64_t over[] = {0};
        torch::stable::copy_(
            part.dbias,
            torch::stable::sum(part.dy, torch::headeronly::IntHeaderOnlyArrayRef(over, 1), false,
                               ScalarType::Float));
        part.a.dbias = {};
      }
      if (!has_adapter(part.a)) continue;
      Tensor& of = terms++ == 0 ? sum : term;
      of = empty(dx, {M, K}, ScalarType::Float);
      run_adapter(part.a, part.dy, of);
      if (terms > 1) add(sum, term);
    }
    if (terms > 0) torch::stable::copy_(dx, sum);
    add_stacked(parts, rows, dx, terms > 0 ? 1.0f : 0.0f);
    return true;
  }

 private:
  static const Weight4* weight_of(const BackwardArgs& a) { return a.base.quantized; }
  static const Weight4* weight_of(const MultiBackwardArgs& a) { return a.base; }
  static bool has_adapter(const BackwardArgs& a) { return a.lora.A.data; }
  static bool has_adapter(const MultiBackwardArgs&) { return true; }  // dA and dB want zeros

  // Whether a float32 dx of this weight would be a dense product.
  template <class Args>
  bool dense_product(const Args& a, const Tensor& dx) const {
    BackwardArgs b;
    b.dy = a.dy;
    b.base.quantized = weight_of(a);
    b.dx = {dx.mutable_data_ptr(), DType::f32, dx.size(0), dx.size(1), dx.size(1)};
    return kernels_.plan_linear_backward(b, launch_.device).family == Family::matmul;
  }

  // Everything but the product with the base; `dx` is float32.
  void run_adapter(BackwardArgs a, const Tensor& dy, Tensor& dx) const {
    a.base = {};
    a.dx = output(dx, dx.size(0), dx.size(1));
    linear_backward(a, dy, nullptr, dx);
  }
  void run_adapter(MultiBackwardArgs a, const Tensor& dy, Tensor& dx) const {
    a.base = nullptr;
    a.dx = output(dx, dx.size(0), dx.size(1));
    multi_backward(a, dy, dx);
  }

  // dx = beta dx + rows [W; W'; ...], by columns, so that every element is rounded once.
  template <class Parts>
  void add_stacked(const Parts& parts, const Tensor& rows, Tensor& dx, float beta) const {
    const int64_t N = rows.size(1), K = dx.size(1);
    const DType dtype = dtype_of("dy", rows);
    const int64_t columns = piece(K, N * element_size(dtype));
    Tensor dense = empty(rows, {N, columns});
    for (int64_t k = 0; k < K; k += columns) {
      const int64_t count = min64(columns, K - k);
      int64_t n = 0;
      for (const auto& part : parts) {
        const Weight4& w = *weight_of(part.a);
        Tensor place = torch::stable::narrow(dense, 0, n, w.N);
        dequantize(w, 0, k, {place.mutable_data_ptr(), dtype, w.N, count, columns});
        n += w.N;
      }
      Tensor out = torch::stable::narrow(dx, 1, k, count);
      add_product(out, rows, torch::stable::narrow(dense, 1, 0, count), beta);
    }
  }

  // y = beta y + x Wᵀ
  void add_forward(const Weight4& w, DType dtype, const Tensor& x, Tensor& y, float beta) const {
    const int64_t rows = piece(w.N, w.K * element_size(dtype));
    Tensor dense = empty(x, {rows, w.K});
    for (int64_t n = 0; n < w.N; n += rows) {
      const int64_t count = min64(rows, w.N - n);
      Tensor part = torch::stable::narrow(dense, 0, 0, count);
      Tensor out = torch::stable::narrow(y, 1, n, count);
      dequantize(w, n, 0, {dense.mutable_data_ptr(), dtype, count, w.K, w.K});
      add_product(out, x, torch::stable::transpose(part, 0, 1), beta);
    }
  }

  // dx = beta dx + dy W, by columns, so that every element is rounded once.
  void add_backward(const Weight4& w, DType dtype, const Tensor& dy, Tensor& dx, float beta) const {
    const int64_t columns = piece(w.K, w.N * element_size(dtype));
    Tensor dense = empty(dy, {w.N, columns});
    for (int64_t k = 0; k < w.K; k += columns) {
      const int64_t count = min64(columns, w.K - k);
      Tensor part = torch::stable::narrow(dense, 1, 0, count);
      Tensor out = torch::stable::narrow(dx, 1, k, count);
      dequantize(w, 0, k, {dense.mutable_data_ptr(), dtype, w.N, count, columns});
      add_product(out, dy, part, beta);
    }
  }

  // How many of `total` rows (or columns) of so many bytes make a piece, a multiple of 128.
  static int64_t piece(int64_t total, int64_t bytes) {
    const int64_t fitting = kPieceBytes / (bytes > 0 ? bytes : 1) / 128 * 128;
    return min64(total, fitting > 128 ? fitting : 128);
  }

  void dequantize(const Weight4& w, int64_t row, int64_t column, const MutMatrix& out) const {
    check(kernels_.dequantize(w, row, column, out, launch_), "dequantize_4bit", 0, out.rows,
          out.cols);
  }

  // Torch's allocator keeps memory apart by stream, so `workspace` may be dropped after the launch.
  Launch with_workspace(int64_t bytes, Tensor& workspace) const {
    Launch on = launch_;
    if (bytes > 0) {
      workspace = empty(like_, {bytes}, ScalarType::Byte);
      on.workspace = workspace.mutable_data_ptr();
    }
    return on;
  }

  void check(int error, const char* op, int64_t a, int64_t b, int64_t c) const {
    if (error == 0) return;
    STD_TORCH_CHECK(false, op, " (", a, ", ", b, ", ", c, "): ", kernels_.failure());
  }

  const CudaTable& kernels_;
  const Tensor like_;
  Launch launch_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
};

}  // namespace
}  // namespace lk

STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels, CUDA, m) { lk::implement<lk::Cuda<false>>(m); }
STABLE_TORCH_LIBRARY_IMPL(lowrank_kernels_emulated, CPU, m) { lk::implement<lk::Cuda<true>>(m); }
