// One table of kernels per instruction set, and the choice among them.
#pragma once

#include "common/params.h"

namespace lk {

struct KernelTable {
  const char* isa;
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
#endif

// Scratch of the calling thread, at least `bytes` long, 64-byte aligned, kept between calls. Slots
// are independent.
enum class Slot : int { panel, rows, scales, operand, accumulator, shared, count };
void* scratch(Slot slot, size_t bytes);

}  // namespace lk
