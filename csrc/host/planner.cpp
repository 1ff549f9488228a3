#include "host/planner.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#include "common/params.h"

namespace lk {
namespace {

constexpr int64_t kMaxRows = std::numeric_limits<int32_t>::max();
constexpr int kTileRows[] = {16, 32, 64, 128};
constexpr int kTileInts = sizeof(Tile) / sizeof(int32_t);

[[noreturn]] void refuse(const std::string& argument, const std::string& expected, int64_t got) {
  throw std::invalid_argument(argument + ": expected " + expected + ", got " + std::to_string(got));
}

std::string element(const char* argument, size_t i) {
  return std::string(argument) + "[" + std::to_string(i) + "]";
}

// The size of a part that holds `needed` elements.
int64_t padded(const char* argument, int64_t capacity, int64_t needed, const char* what) {
  if (capacity < 0) refuse(argument, "0 or more", capacity);
  // Sizes that are computed from a larger one could overflow.
  if (capacity > kMaxRows) refuse(argument, "at most " + std::to_string(kMaxRows), capacity);
  if (capacity == 0) return needed;
  if (capacity < needed)
    refuse(argument, "at least the " + std::to_string(needed) + " " + what + " of this batch",
           capacity);
  return capacity;
}

}  // namespace

Planner::Planner(const PagePool& pool, std::vector<int64_t> slots, std::vector<int64_t> tokens,
                 const PlanLimits& limits)
    : sequence_slots_(std::move(slots)), tokens_(std::move(tokens)) {
  const size_t sequences = sequence_slots_.size();
  if (tokens_.size() != sequences)
    refuse("tokens", "one count per sequence (" + std::to_string(sequences) + ")",
           static_cast<int64_t>(tokens_.size()));
  layout_.sequences = static_cast<int64_t>(sequences);
  const PagePool::Reader reader(pool);
  count_rows(reader);
  choose_tile_rows(limits.tile_rows);
  place_segments(reader);
  lay_out(limits);
}

void Planner::count_rows(const PagePool::Reader& pool) {
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const int64_t slot = sequence_slots_[i], tokens = tokens_[i];
    if (tokens < 0) refuse(element("tokens", i), "0 or more", tokens);
    if (tokens > kMaxRows - layout_.M)
      refuse(element("tokens", i),
             "at most " + std::to_string(kMaxRows) + " rows in all, so " +
                 std::to_string(kMaxRows - layout_.M) + " here",
             tokens);
    layout_.M += tokens;
    if (slot == -1) continue;
    if (!pool.loaded(slot)) refuse(element("slots", i), "a loaded slot or -1", slot);
    if (slot >= static_cast<int64_t>(segments_.size()))
      segments_.resize(static_cast<size_t>(slot) + 1);
    segments_[static_cast<size_t>(slot)].rows += tokens;
  }
}

void Planner::choose_tile_rows(int64_t wanted) {
  int64_t most = 0;
  for (const Segment& segment : segments_) most = std::max(most, segment.rows);
  for (const int rows : kTileRows) {
    layout_.tile_rows = rows;
    if (wanted == rows || (wanted == 0 && rows >= most)) return;
  }
  if (wanted) refuse("tile_rows", "16, 32, 64, 128 or 0", wanted);
}

void Planner::place_segments(const PagePool::Reader& pool) {
  for (size_t slot = 0; slot < segments_.size(); ++slot) {
    Segment& segment = segments_[slot];
    if (segment.rows == 0) continue;
    segment.row0 = static_cast<int32_t>(layout_.row_count);
    segment.tile0 = static_cast<int32_t>(layout_.tile_count);
    segment.page0 = static_cast<int32_t>(page_ids_.size());
    layout_.row_count += segment.rows;
    layout_.tile_count += ceil_div(segment.rows, layout_.tile_rows);
    const int64_t number = static_cast<int64_t>(slot);
    const std::vector<int32_t>& pages = pool.pages(number);
    page_ids_.insert(page_ids_.end(), pages.begin(), pages.end());
    used_.push_back(number);
    generations_.push_back(pool.generation(number));
  }
}

void Planner::lay_out(const PlanLimits& limits) {
  PlanLayout& l = layout_;
  l.tile_count = padded("tile_capacity", limits.tile_capacity, l.tile_count, "tiles");
  l.page_count = padded("page_capacity", limits.page_capacity,
                        static_cast<int64_t>(page_ids_.size()), "pages");
  if (limits.tile_capacity || limits.page_capacity) l.row_count = l.M;
  const auto next = [&l](int64_t count) {
    const int64_t start = l.size;
    l.size += ceil_div(count, 4) * 4;
    return start;
  };
  l.tiles = next(l.tile_count * kTileInts);
  l.page_ids = next(l.page_count);
  l.tile_of_row = next(l.M);
  l.rows = next(l.row_count);
}

void Planner::write(int32_t* buffer) const {
  std::fill_n(buffer, layout_.size, 0);  // the padding; it is short, and nobody has to find it
  write_tiles(buffer + layout_.tiles);
  std::copy(page_ids_.begin(), page_ids_.end(), buffer + layout_.page_ids);
  write_rows(buffer + layout_.tile_of_row, buffer + layout_.rows);
}

void Planner::write_tiles(int32_t* tiles) const {
  for (const int64_t slot : used_) {
    const Segment& segment = segments_[static_cast<size_t>(slot)];
    for (int64_t row = 0; row < segment.rows; row += layout_.tile_rows) {
      const Tile tile{static_cast<int32_t>(slot), static_cast<int32_t>(segment.row0 + row),
                      static_cast<int32_t>(min64(layout_.tile_rows, segment.rows - row)),
                      segment.page0};
      std::memcpy(tiles, &tile, sizeof(tile));
      tiles += kTileInts;
    }
  }
}

// The counting sort's last step: each row to the next place of its slot.
void Planner::write_rows(int32_t* tile_of_row, int32_t* rows) const {
  std::vector<int32_t> done(segments_.size());
  int32_t row = 0;
  for (size_t i = 0; i < tokens_.size(); ++i) {
    const int32_t end = row + static_cast<int32_t>(tokens_[i]);
    if (sequence_slots_[i] == -1) {
      std::fill(tile_of_row + row, tile_of_row + end, -1);
      row = end;
      continue;
    }
    const size_t slot = static_cast<size_t>(sequence_slots_[i]);
    const Segment& segment = segments_[slot];
    for (; row < end; ++row) {
      const int32_t nth = done[slot]++;
      rows[segment.row0 + nth] = row;
      tile_of_row[row] = segment.tile0 + nth / layout_.tile_rows;
    }
  }
}

}  // namespace lk
