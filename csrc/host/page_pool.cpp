#include "host/page_pool.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace lk {
namespace {

int64_t checked_num_pages(int64_t n) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (n >= 1 && n <= kMost) return n;
  throw std::invalid_argument("num_pages: expected 1.." + std::to_string(kMost) + ", got " +
                              std::to_string(n));
}

}  // namespace

PagePool::PagePool(int64_t num_pages)
    : num_pages_(checked_num_pages(num_pages)), free_pages_(static_cast<size_t>(num_pages)) {
  int32_t id = static_cast<int32_t>(num_pages);
  for (int32_t& page : free_pages_) page = --id;  // page 0 goes first
}

const PagePool::Slot* PagePool::find(int64_t slot) const {
  if (slot < 0 || slot >= static_cast<int64_t>(slots_.size())) return nullptr;
  const Slot& found = slots_[static_cast<size_t>(slot)];
  return found.pages.empty() ? nullptr : &found;
}

const PagePool::Slot& PagePool::at(const char* argument, int64_t slot) const {
  if (const Slot* found = find(slot)) return *found;
  throw std::invalid_argument(std::string(argument) + ": expected a loaded slot, got " +
                              std::to_string(slot));
}

PagePool::Slot& PagePool::at(const char* argument, int64_t slot) {
  return const_cast<Slot&>(std::as_const(*this).at(argument, slot));
}

std::vector<int32_t> PagePool::free_run(size_t pages) const {
  std::vector<int32_t> free = free_pages_;
  std::sort(free.begin(), free.end());
  size_t best = 0, shortest = free.size() + 1;
  for (size_t first = 0, next; first < free.size(); first = next) {
    for (next = first + 1; next < free.size() && free[next] == free[next - 1] + 1;) ++next;
    if (next - first < pages || next - first >= shortest) continue;
    best = first;
    shortest = next - first;
  }
  if (shortest > free.size()) return {};
  const auto begin = free.begin() + static_cast<std::ptrdiff_t>(best);
  return {begin, begin + static_cast<std::ptrdiff_t>(pages)};
}

PagePool::Loaded PagePool::load(int64_t pages, bool adjacent) {
  if (pages < 1)
    throw std::invalid_argument("pages: expected at least 1, got " + std::to_string(pages));
  std::lock_guard<std::mutex> lock(mutex_);
  const int64_t free = static_cast<int64_t>(free_pages_.size());
  if (pages > free)
    throw std::runtime_error("the page pool has " + std::to_string(free) + " free pages of " +
                             std::to_string(num_pages_) + ", " + std::to_string(pages) +
                             " were asked for");
  // What can run out of memory comes before any change.
  Loaded result{0, {free_pages_.rbegin(), free_pages_.rbegin() + pages}};
  if (adjacent) result.pages = free_run(static_cast<size_t>(pages));
  if (result.pages.empty())
    throw std::runtime_error("the page pool has no " + std::to_string(pages) +
                             " free pages side by side");
  std::vector<int32_t> own = result.pages;
  if (free_slots_.empty()) {
    slots_.emplace_back();
    result.slot = static_cast<int32_t>(slots_.size() - 1);
  } else {
    result.slot = free_slots_.back();
    free_slots_.pop_back();
  }
  if (adjacent) {
    const auto taken = [&own](int32_t page) { return page >= own.front() && page <= own.back(); };
    free_pages_.erase(std::remove_if(free_pages_.begin(), free_pages_.end(), taken),
                      free_pages_.end());
  } else {
    free_pages_.resize(static_cast<size_t>(free - pages));
  }
  Slot& slot = slots_[static_cast<size_t>(result.slot)];
  slot.pages = std::move(own);
  slot.generation = ++generation_;
  return result;
}

void PagePool::evict(int64_t slot) {
  std::lock_guard<std::mutex> lock(mutex_);
  Slot& evicted = at("slot", slot);
  if (evicted.pins)
    throw std::runtime_error("slot " + std::to_string(slot) + " is in use (pinned " +
                             std::to_string(evicted.pins) + " times), it cannot be evicted");
  free_slots_.push_back(static_cast<int32_t>(slot));
  // Backwards: the next load of as many pages gets them in the same order.
  free_pages_.insert(free_pages_.end(), evicted.pages.rbegin(), evicted.pages.rend());
  evicted.pages.clear();
}

void PagePool::pin(const std::vector<int64_t>& slots, const std::vector<uint64_t>* generations) {
  if (generations && generations->size() != slots.size())
    throw std::invalid_argument("generations: expected one per slot (" +
                                std::to_string(slots.size()) + "), got " +
                                std::to_string(generations->size()));
  std::lock_guard<std::mutex> lock(mutex_);
  for (size_t i = 0; i < slots.size(); ++i) {
    if (!generations) {
      at("slots", slots[i]);
      continue;
    }
    const Slot* slot = find(slots[i]);
    if (!slot || slot->generation != (*generations)[i])
      throw std::runtime_error(
          "slot " + std::to_string(slots[i]) + " no longer holds the adapter of generation " +
          std::to_string((*generations)[i]) + ": " +
          (slot ? "it has generation " + std::to_string(slot->generation) : "it is not loaded"));
  }
  for (const int64_t slot : slots) ++slots_[static_cast<size_t>(slot)].pins;
}

void PagePool::unpin(const std::vector<int64_t>& slots) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (const int64_t slot : slots) at("slots", slot);
  for (size_t i = 0; i < slots.size(); ++i) {
    Slot& slot = slots_[static_cast<size_t>(slots[i])];
    if (slot.pins == 0) {  // a slot may be there twice, so only counting down shows it
      while (i) ++slots_[static_cast<size_t>(slots[--i])].pins;
      throw std::invalid_argument("slots: expected slots pinned as often as they are unpinned");
    }
    --slot.pins;
  }
}

std::vector<int32_t> PagePool::Reader::loaded_slots() const {
  std::vector<int32_t> slots;
  for (size_t i = 0; i < pool_.slots_.size(); ++i)
    if (!pool_.slots_[i].pages.empty()) slots.push_back(static_cast<int32_t>(i));
  return slots;
}

uint64_t PagePool::Reader::generation(int64_t slot) const {
  return pool_.at("slot", slot).generation;
}

const std::vector<int32_t>& PagePool::Reader::pages(int64_t slot) const {
  return pool_.at("slot", slot).pages;
}

int64_t PagePool::Reader::pins(int64_t slot) const { return pool_.at("slot", slot).pins; }

}  // namespace lk
