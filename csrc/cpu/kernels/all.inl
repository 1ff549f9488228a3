// The algorithms, once. A unit of isa/ includes a vocabulary and then this file, all in an
// anonymous namespace: no symbol compiled for one instruction set may be shared with another. No
// STL and no threads in here either.

template <int V>
struct Constant {
  static constexpr int value = V;
};

#include "cpu/kernels/philox.inl"
#include "cpu/kernels/convert.inl"
#include "cpu/kernels/dequant.inl"
#include "cpu/kernels/gemm.inl"
#include "cpu/kernels/dequant_panels.inl"
#include "cpu/kernels/skinny.inl"
#ifdef LK_AMX  // of simd/amx.h
#include "cpu/amx/amx_split.inl"
#include "cpu/amx/amx_gemm.inl"
#else
constexpr bool kHasAmx = false;
constexpr int64_t kAmxForward = INT64_MAX, kAmxDx = INT64_MAX;
constexpr int64_t kAmxForwardPairs = INT64_MAX, kAmxDxPairs = INT64_MAX;
template <bool TransposedSource, class Source>
void accumulate_amx(const Operand<false>&, const Source&, int64_t, int64_t, int64_t, int64_t,
                    int64_t, float*) {}
template <class Source>
void accumulate_pairs_amx(const Matrix&, const Source&, int64_t, int64_t, int64_t, int64_t, int64_t,
                          float*) {}
#endif
#include "cpu/kernels/sgmv.inl"
#include "cpu/kernels/epilogue.inl"
#include "cpu/kernels/gemv.inl"
#ifdef LK_DOT2  // of simd/avx512_bf16.h
#include "cpu/kernels/gemv_pairs.inl"
#include "cpu/kernels/gemm_pairs.inl"
#include "cpu/kernels/skinny_pairs.inl"
#ifdef LK_AMX
#include "cpu/amx/amx_pairs.inl"
#endif
#endif
#include "cpu/kernels/quantize.inl"
#ifdef LK_INT8
#include "cpu/kernels/int8.inl"
#endif
#ifdef LK_AMX
#include "cpu/amx/amx_int8.inl"
#else
constexpr const char* kInt8Tiles = nullptr;
inline bool amx_int8_takes(int64_t) { return false; }
inline void linear_int8_amx(const LinearArgs&, const Expansion*, const Parallel&) {}
#endif
#include "cpu/kernels/linear.inl"
#include "cpu/kernels/multi.inl"
#include "cpu/kernels/grouped.inl"

// Defines the table of this unit, outside of the anonymous namespace. It is declared here alone and
// in the list of dispatch.cpp.
#define LK_DEFINE_KERNELS(table, name)                                                        \
  extern const KernelTable table;                                                             \
  const KernelTable table = {                                                                 \
      name,                                                                                   \
      {kInt8Tiles, kInt8},                                                                    \
      kHasPairs,                                                                              \
      kForward,                                                                               \
      kDx,                                                                                    \
      kForwardPairs,                                                                          \
      kDxPairs,                                                                               \
      quantize,                                                                               \
      double_quantize,                                                                        \
      dequantize,                                                                             \
      [](const LinearArgs& a, const Parallel& pool) { linear(a, nullptr, pool); },            \
      [](const BackwardArgs& a, const Parallel& pool) { linear_backward(a, nullptr, pool); }, \
      multi,                                                                                  \
      multi_backward,                                                                         \
      grouped,                                                                                \
      grouped_backward}
