// C interface of liblowrank_cpu.so: the kernels in use and how to force them. Thread-safe.
#pragma once

#define LK_API extern "C" __attribute__((visibility("default")))

namespace lk {
struct KernelTable;
}

// The instruction set whose kernels run now: forced, or the best that this CPU supports.
LK_API const char* lk_isa_active(void);
// Forces one; null or "" chooses the best again. 0: done, 1: unknown name, 2: this CPU does not
// support it.
LK_API int lk_isa_set(const char* name);
// The instruction sets this library was built with, best first.
LK_API int lk_isa_count(void);
LK_API const char* lk_isa_name(int index);
LK_API int lk_isa_supported(int index);
// Whether the operators that this thread calls round activations to int8; at first they do not.
LK_API void lk_int8_set(int on);
LK_API int lk_int8_active(void);
// Whether all activations are multiplied exactly, in the whole process; at first operands are
// rounded to bfloat16 where activations are, or torch permits it, and the kernels in use multiply
// those.
LK_API void lk_exact_set(int on);
LK_API int lk_exact_active(void);
// Whether the kernels in use multiply pairs of bfloat16 numbers.
LK_API int lk_pairs(void);
// The kernels for int8 beside the instruction set in use: their name, or null if there are none or
// this CPU cannot run them.
LK_API const char* lk_int8_kernels(void);
// The kernels that multiply by the frozen base, those for few rows first.
LK_API int lk_kernel_count(void);
LK_API const char* lk_kernel_name(int index);
// Asks for one of them in place of the fastest, or for "invariant" (table.h); null or "" for the
// fastest again. 0: done, 1: unknown name.
LK_API int lk_kernel_set(const char* name);
// Compiler and flags, one line.
LK_API const char* lk_build_info(void);
// The kernels in use; never null.
LK_API const lk::KernelTable* lk_kernels(void);
