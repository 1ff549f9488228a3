// One table of kernels per instruction set, and the choice among them.
#pragma once

#include "common/params.h"

namespace lk {

// What multiplies by the frozen base. `any` is whatever is fastest; `invariant` is the faster one
// of skinny and gemm, which sum in one order.
enum class Kernel : int { any, gemv, skinny, gemm, amx, invariant };
// Their names, in the order of the enumeration; those from kFirstKernel to kLastKernel are kernels.
constexpr const char* kKernelNames[] = {"", "gemv", "skinny", "gemm", "amx", "invariant"};
constexpr int kFirstKernel = static_cast<int>(Kernel::gemv);
constexpr int kLastKernel = static_cast<int>(Kernel::amx);

// The numbers of rows for which each kernel is the fastest one, as measured (amx_pairs.inl: as
// counted): gemv up to .gemv, skinny up to .skinny, amx from .amx on, and gemm between. A kernel
// that does not exist has 0, 0 or INT64_MAX.
struct Crossovers {
  int64_t gemv, skinny, amx;
};

struct KernelTable {
  const char* isa;
  // What Arithmetic::int8 runs on, CPU features beyond `isa`, the better one first; null: nothing.
  const char* int8[2];
  bool pairs;  // whether there are kernels for Arithmetic::bf16; without them it is exact
  Crossovers forward, dx, forward_pairs, dx_pairs;  // the latter two of Arithmetic::bf16
  void (*quantize)(const QuantizeArgs&, const Parallel&);
  void (*double_quantize)(const DoubleQuantizeArgs&, const Parallel&);
  void (*dequantize)(const DequantizeArgs&, const Parallel&);
  void (*linear)(const LinearArgs&, const Parallel&);
  void (*linear_backward)(const BackwardArgs&, const Parallel&);
  void (*multi)(const MultiArgs&, const Parallel&);
  void (*multi_backward)(const MultiBackwardArgs&, const Parallel&);
  void (*grouped)(const GroupedArgs&, const Parallel&);
  void (*grouped_backward)(const GroupedBackwardArgs&, const Parallel&);
};

// The kernel that was asked for in place of the fastest one; where it cannot run, gemm does.
Kernel asked_kernel();

// Whether this CPU has a feature that a table names.
bool has_feature(const char* name);

// Scratch memory of the calling thread, at least `bytes` long, 64-byte aligned, kept between calls.
// Buffers are independent of each other.
enum class Buffer : int { panel, rows, scales, operand, accumulator, shared, shares, count };
void* scratch(Buffer which, size_t bytes);

}  // namespace lk
