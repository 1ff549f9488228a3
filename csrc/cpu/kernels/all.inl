// The algorithms, once. A unit of isa/ includes a vocabulary and then this file, all in an
// anonymous namespace: no symbol compiled for one instruction set may be shared with another. No
// STL and no threads in here either.

template <int V>
struct Constant {
  static constexpr int value = V;
};

#include "cpu/kernels/philox.inl"
#include "cpu/kernels/rows.inl"
#include "cpu/kernels/gemm.inl"
#include "cpu/kernels/panel4.inl"
#include "cpu/kernels/small.inl"
#ifdef LK_TILES  // of simd/amx.h
#include "cpu/kernels/parts.inl"
#include "cpu/kernels/tiles.inl"
#else
#include "cpu/kernels/no_tiles.inl"
#endif
#include "cpu/kernels/multi_products.inl"
#include "cpu/kernels/outputs.inl"
#include "cpu/kernels/gemv.inl"
#include "cpu/kernels/quantize.inl"
#ifdef LK_INT8
#include "cpu/kernels/int8.inl"
#endif
#include "cpu/kernels/linear.inl"
#include "cpu/kernels/multi.inl"

#define LK_KERNEL_TABLE(name)                                                  \
  {name,       kInt8,  kForward,        kDx,   quantize,      double_quantize, \
   dequantize, linear, linear_backward, multi, multi_backward}
