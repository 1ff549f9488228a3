// y = x Wᵀ by ggml, W in IQ4_NL: what bench/peer_ggml.py loads through ctypes.
//
// The weights lie in ggml's CPU_REPACK buffer, where llama.cpp puts them too: only from there does
// ggml run its interleaved kernels. Sizes are checked before ggml sees them, since it would abort.

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "ggml-alloc.h"
#include "ggml-backend.h"
#include "ggml-cpu.h"
#include "ggml.h"

namespace {

constexpr ggml_type kType = GGML_TYPE_IQ4_NL;

thread_local std::string last_error;

struct Freed {
  void operator()(ggml_backend* p) const { ggml_backend_free(p); }
  void operator()(ggml_backend_buffer* p) const { ggml_backend_buffer_free(p); }
  void operator()(ggml_context* p) const { ggml_free(p); }
};

template <typename T>
std::unique_ptr<T, Freed> owned(T* p, const char* what) {
  if (p == nullptr) throw std::runtime_error(std::string("ggml could not make ") + what);
  return std::unique_ptr<T, Freed>(p);
}

/// A context that holds descriptions of tensors, in memory of its own or in `memory`.
std::unique_ptr<ggml_context, Freed> context(size_t bytes, void* memory) {
  return owned(ggml_init({bytes, memory, /*no_alloc=*/true}), "a context");
}

ggml_backend_buffer_type_t repack_buffer_type(ggml_backend_t backend) {
  ggml_backend_dev_t device = ggml_backend_get_device(backend);
  auto extra =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(
          ggml_backend_dev_backend_reg(device), "ggml_backend_dev_get_extra_bufts"));
  if (extra != nullptr) {
    for (ggml_backend_buffer_type_t* type = extra(device); *type != nullptr; ++type) {
      if (std::strcmp(ggml_backend_buft_name(*type), "CPU_REPACK") == 0) return *type;
    }
  }
  throw std::runtime_error("ggml was built without the CPU_REPACK buffer");
}

struct Weights {
  int64_t K;
  std::unique_ptr<ggml_backend, Freed> backend;
  std::unique_ptr<ggml_context, Freed> tensors;
  std::unique_ptr<ggml_backend_buffer, Freed> buffer;
  std::vector<ggml_tensor*> copies;
  std::vector<char> graph;  // where run() describes its graph

  Weights(int64_t N, int64_t K, int count, int threads, const void* blocks)
      : K(K),
        backend(owned(ggml_backend_cpu_init(), "a CPU backend")),
        tensors(context(count * ggml_tensor_overhead(), nullptr)),
        graph(ggml_graph_overhead() + 3 * ggml_tensor_overhead()) {
    ggml_backend_cpu_set_n_threads(backend.get(), threads);
    for (int i = 0; i < count; ++i) {
      copies.push_back(ggml_new_tensor_2d(tensors.get(), kType, K, N));
    }
    buffer = owned(
        ggml_backend_alloc_ctx_tensors_from_buft(tensors.get(), repack_buffer_type(backend.get())),
        "the weights' buffer");
    for (ggml_tensor* copy : copies) {
      if (copy->extra == nullptr) {
        throw std::runtime_error("ggml has no interleaved IQ4_NL kernel for this CPU and size");
      }
      ggml_backend_tensor_set(copy, blocks, 0, ggml_nbytes(copy));  // interleaves
    }
  }

  void run(int index, const float* x, int64_t M, float* y) {
    auto described = context(graph.size(), graph.data());
    ggml_tensor* input = ggml_new_tensor_2d(described.get(), GGML_TYPE_F32, K, M);
    ggml_tensor* output = ggml_mul_mat(described.get(), copies.at(index), input);
    input->data = const_cast<float*>(x);
    output->data = y;
    ggml_cgraph* nodes = ggml_new_graph(described.get());
    ggml_build_forward_expand(nodes, output);
    if (ggml_backend_graph_compute(backend.get(), nodes) != GGML_STATUS_SUCCESS) {
      throw std::runtime_error("ggml could not compute the product");
    }
  }
};

/// Runs `body`; what it throws becomes lowrank_ggml_error() and `otherwise`.
template <typename T, typename Body>
T guarded(T otherwise, Body body) {
  try {
    return body();
  } catch (const std::exception& error) {
    last_error = error.what();
    return otherwise;
  }
}

}  // namespace

extern "C" {

const char* lowrank_ggml_error() { return last_error.c_str(); }

const char* lowrank_ggml_version() { return ggml_version(); }

/// Bytes of an IQ4_NL matrix [N, K]; 0 for sizes that the interleaved kernels do not take.
size_t lowrank_ggml_bytes(int64_t N, int64_t K) {
  if (N <= 0 || K <= 0 || N % 8 != 0 || K % ggml_blck_size(kType) != 0) return 0;
  return N * ggml_row_size(kType, K);
}

/// Quantizes `rows` rows of K floats into `blocks`; several threads may do so at a time.
void lowrank_ggml_quantize(const float* weight, int64_t rows, int64_t K, void* blocks) {
  ggml_quantize_chunk(kType, weight, blocks, 0, rows, K, nullptr);
}

/// `count` copies of the quantized matrix, for run() with `threads` threads; null: see error().
void* lowrank_ggml_create(int64_t N, int64_t K, int count, int threads, const void* blocks) {
  ggml_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
  return guarded<void*>(nullptr, [&] { return new Weights(N, K, count, threads, blocks); });
}

/// y [M, N] = x [M, K] times copy `index`, transposed; not 0: see error().
int lowrank_ggml_run(void* weights, int index, const float* x, int64_t M, float* y) {
  return guarded(1, [&] {
    static_cast<Weights*>(weights)->run(index, x, M, y);
    return 0;
  });
}

void lowrank_ggml_destroy(void* weights) { delete static_cast<Weights*>(weights); }
}
