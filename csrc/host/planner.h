// Makes the arrays of BatchPlan (common/params.h) from the sequences of a step, in one buffer so
// that one copy brings them to a GPU: once per step, for all modules of a model.
#pragma once

#include <cstdint>
#include <vector>

#include "host/page_pool.h"

namespace lk {

// Sizes as in BatchPlan; where each part of the buffer starts, in elements (multiples of 4, that is
// 16 bytes), and the buffer's length.
struct PlanLayout {
  int64_t M = 0, sequences = 0, row_count = 0, tile_count = 0, page_count = 0;
  int tile_rows = 0;
  int64_t tiles = 0, page_ids = 0, tile_of_row = 0, rows = 0, size = 0;
};

// What must not change from step to step because a CUDA graph holds it. 0: as the batch needs.
struct PlanLimits {
  int64_t tile_capacity = 0, page_capacity = 0;  // the parts' sizes, filled up with zeros
  int64_t tile_rows = 0;
};

class Planner {
 public:
  // Sequence i is the next tokens[i] rows of the batch, for the adapter in slots[i]; -1: for none.
  // With a capacity, rows has M elements. Throws std::invalid_argument.
  Planner(const PagePool& pool, std::vector<int64_t> slots, std::vector<int64_t> tokens,
          const PlanLimits& limits = {});

  const PlanLayout& layout() const { return layout_; }
  // The slots that have rows, ascending, and the generations of what was loaded in them.
  const std::vector<int64_t>& slots() const { return used_; }
  const std::vector<uint64_t>& generations() const { return generations_; }
  // Writes all layout().size elements.
  void write(int32_t* buffer) const;

 private:
  struct Segment {  // a slot's rows, tiles and pages
    int64_t rows = 0;
    int32_t row0 = 0, tile0 = 0, page0 = 0;
  };

  void count_rows(const PagePool::Reader& pool);
  void choose_tile_rows(int64_t wanted);
  void place_segments(const PagePool::Reader& pool);
  void lay_out(const PlanLimits& limits);
  void write_tiles(int32_t* tiles) const;
  void write_rows(int32_t* tile_of_row, int32_t* rows) const;

  const std::vector<int64_t> sequence_slots_, tokens_;
  std::vector<Segment> segments_;  // by slot, up to the last one in the batch
  std::vector<int64_t> used_;
  std::vector<uint64_t> generations_;
  std::vector<int32_t> page_ids_;
  PlanLayout layout_;
};

}  // namespace lk
