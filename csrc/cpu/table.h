// One table of kernels per instruction set, and the choice among them.
#pragma once

#include "common/params.h"

namespace lk {

// What multiplies by the frozen base: gemv.inl, small.inl, gemm.inl, tiles.inl. `any`: whatever is
// fastest; `invariant`: of small and panels, which sum in one order, whatever is faster.
enum class Kernel : int { any, few, small, panels, tiles, invariant };

// Numbers of rows for which each is fastest, as measured: few up to .few, small up to .small, tiles
// from .tiles, panels between. none: 0, 0, INT64_MAX.
struct Crossovers {
  int64_t few, small, tiles;
};

struct KernelTable {
  const char* isa;
  const char* int8;  // what LinearArgs::int8 runs on, a CPU feature beyond `isa`; null: nothing
  Crossovers forward, dx;
  void (*quantize)(const QuantizeArgs&, const Parallel&);
  void (*double_quantize)(const DoubleQuantizeArgs&, const Parallel&);
  void (*dequantize)(const DequantizeArgs&, const Parallel&);
  void (*linear)(const LinearArgs&, const Parallel&);
  void (*linear_backward)(const BackwardArgs&, const Parallel&);
  void (*multi)(const MultiArgs&, const Parallel&);
  void (*multi_backward)(const MultiBackwardArgs&, const Parallel&);
};

extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table;
extern const KernelTable kAvx512Table;
extern const KernelTable kAmxTable;
#endif

// What was asked for in place of the fastest one; where it cannot run, panels do.
Kernel asked_kernel();

// Scratch of the calling thread, at least `bytes` long, 64-byte aligned, kept between calls. Slots
// are independent.
enum class Slot : int { panel, rows, scales, operand, accumulator, shared, count };
void* scratch(Slot slot, size_t bytes);

}  // namespace lk
