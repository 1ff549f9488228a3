// The kernels for scalar.

#include "common/half.h"
#include "cpu/table.h"

namespace lk {
namespace {
#include "cpu/simd/scalar.h"

#include "cpu/kernels/all.inl"
}  // namespace

const KernelTable kScalarTable = LK_KERNEL_TABLE("scalar");
}  // namespace lk
