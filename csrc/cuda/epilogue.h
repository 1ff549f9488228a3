// The operand of an epilogue: what a linear kernel adds to its sums before it rounds them.
#pragma once

#include "common/params.h"

namespace lk::cuda {

// float32 [M, stride], rows 16-byte aligned; only rows with tile_of_row[m] >= 0 are there.
struct EpilogueOperand {
  float* data = nullptr;  // null: nothing is added
  int64_t stride = 0;
  const int32_t* tile_of_row = nullptr;

  // What is added to the row, or null if nothing is.
  LK_ANYWHERE const float* row(int64_t m) const {
    return data && tile_of_row[m] >= 0 ? data + m * stride : nullptr;
  }
};

}  // namespace lk::cuda
