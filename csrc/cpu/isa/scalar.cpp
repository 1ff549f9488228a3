// The kernels for scalar.

#include "common/half.h"
#include "cpu/table.h"

namespace lk {
namespace {
#include "cpu/simd/scalar.h"

#include "cpu/kernels/all.inl"
}  // namespace

LK_DEFINE_KERNELS(kScalarTable, "scalar");
}  // namespace lk
