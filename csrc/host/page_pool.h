// Keeps which pages of the adapters' memory belong to which adapter (see Pages in common/params.h).
// It knows numbers only; the memory is its owner's. Thread-safe. Errors: std::invalid_argument for
// an argument that no state of the pool would make right or that names a slot without an adapter,
// std::runtime_error for what the pool refuses as it stands; either leaves the pool unchanged.
#pragma once

#include <cstdint>
#include <mutex>
#include <vector>

namespace lk {

class PagePool {
  struct Slot;

 public:
  struct Loaded {
    int32_t slot;
    std::vector<int32_t> pages;
  };

  explicit PagePool(int64_t num_pages);  // pages 0 .. num_pages-1

  int64_t num_pages() const { return num_pages_; }

  // Gives pages to a new adapter, in the lowest slot never used or the last one freed. Adjacent
  // ones are the smallest run of free pages that is long enough, in ascending order.
  Loaded load(int64_t pages, bool adjacent = false);
  // Takes its pages back. Refused while it is pinned.
  void evict(int64_t slot);
  // Keeps adapters from eviction until they are unpinned as often. All of them, or none when one is
  // not loaded. With generations: nor when one is another load than that of its generation.
  void pin(const std::vector<int64_t>& slots, const std::vector<uint64_t>* generations = nullptr);
  void unpin(const std::vector<int64_t>& slots);

  // The pool as it stands, locked: for questions whose answers must agree. Must not outlive the
  // statements that ask, and the thread must not call the pool meanwhile.
  class Reader {
   public:
    explicit Reader(const PagePool& pool) : lock_(pool.mutex_), pool_(pool) {}

    int64_t free_pages() const { return static_cast<int64_t>(pool_.free_pages_.size()); }
    std::vector<int32_t> loaded_slots() const;  // ascending
    bool loaded(int64_t slot) const { return pool_.find(slot) != nullptr; }
    // These ask about a loaded slot. Every load has a generation of its own, so that what was made
    // for an adapter can tell when the slot has become another's.
    uint64_t generation(int64_t slot) const;
    const std::vector<int32_t>& pages(int64_t slot) const;
    int64_t pins(int64_t slot) const;

   private:
    std::lock_guard<std::mutex> lock_;
    const PagePool& pool_;
  };

 private:
  struct Slot {
    std::vector<int32_t> pages;  // none: not loaded
    uint64_t generation = 0;
    int64_t pins = 0;
  };

  std::vector<int32_t> free_run(size_t pages) const;  // empty: there is none
  const Slot* find(int64_t slot) const;               // null: not loaded
  const Slot& at(const char* argument, int64_t slot) const;
  Slot& at(const char* argument, int64_t slot);

  const int64_t num_pages_;
  mutable std::mutex mutex_;
  std::vector<int32_t> free_pages_, free_slots_;  // stacks
  std::vector<Slot> slots_;                       // those ever used
  uint64_t generation_ = 0;                       // of the last load
};

}  // namespace lk
