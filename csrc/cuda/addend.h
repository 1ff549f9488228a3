// What the linear kernels add to their result before it is rounded.
#pragma once

#include "common/params.h"

namespace lk::cuda {

// float32 [M, stride], rows 16-byte aligned; only rows with tile_of_row[m] >= 0 are there.
struct Addend {
  float* data = nullptr;  // null: none
  int64_t stride = 0;
  const int32_t* tile_of_row = nullptr;

  // Of the row, or null if nothing is added to it.
  LK_ANYWHERE const float* row(int64_t m) const {
    return data && tile_of_row[m] >= 0 ? data + m * stride : nullptr;
  }
};

}  // namespace lk::cuda
