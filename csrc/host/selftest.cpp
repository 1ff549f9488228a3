// Self-test of the page pool and the planner for `make asan`: random steps, on two threads at once,
// and what must hold of every plan. The buffer of a plan has exactly the size that it says. The
// values are compared with a model in python_tests.
#include <cstdio>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "common/params.h"
#include "host/page_pool.h"
#include "host/planner.h"

namespace lk {
namespace {

int failures = 0;

void expect(bool ok, const char* what) {
  if (ok) return;
  ++failures;
  std::printf("failed: %s\n", what);
}

template <typename Error, typename Function>
void expect_refused(Function function, const char* what) {
  try {
    function();
  } catch (const Error&) {
    return;
  }
  expect(false, what);
}

int64_t below(std::mt19937& random, int64_t end) {
  return static_cast<int64_t>(random() % static_cast<uint64_t>(end));
}

// Loads, pins, unpins and evicts adapters of its own; leaves some loaded.
void random_steps(PagePool& pool, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int64_t> own;
  for (int step = 0; step < 20000; ++step) {
    if (own.empty() || random() % 2) {
      try {
        const bool adjacent = random() % 2;
        const PagePool::Loaded loaded = pool.load(1 + below(random, 4), adjacent);
        own.push_back(loaded.slot);
        for (size_t i = 1; adjacent && i < loaded.pages.size(); ++i)
          expect(loaded.pages[i] == loaded.pages[i - 1] + 1, "adjacent pages are side by side");
      } catch (const std::runtime_error&) {  // exhausted
      }
      continue;
    }
    const size_t i = static_cast<size_t>(below(random, static_cast<int64_t>(own.size())));
    pool.pin({own[i], own[i]});
    pool.unpin({own[i], own[i]});
    pool.evict(own[i]);
    own.erase(own.begin() + static_cast<std::ptrdiff_t>(i));
  }
}

void check_pool(const PagePool& pool) {
  const PagePool::Reader reader(pool);
  std::vector<int> owners(static_cast<size_t>(pool.num_pages()));
  int64_t owned = 0;
  for (const int32_t slot : reader.loaded_slots())
    for (const int32_t page : reader.pages(slot)) {
      ++owners[static_cast<size_t>(page)];
      ++owned;
    }
  for (const int count : owners) expect(count <= 1, "no page has two owners");
  expect(owned + reader.free_pages() == pool.num_pages(), "no page is lost");
}

void check_refusals() {
  PagePool pool(4);
  const int64_t slot = pool.load(3).slot;
  expect_refused<std::runtime_error>([&] { pool.load(2); }, "exhausted");
  expect_refused<std::invalid_argument>([&] { pool.load(0); }, "no pages");
  const std::vector<uint64_t> old{PagePool::Reader(pool).generation(slot)};
  pool.pin({slot}, &old);
  expect_refused<std::runtime_error>([&] { pool.evict(slot); }, "eviction while pinned");
  expect_refused<std::invalid_argument>([&] { pool.unpin({slot, slot}); }, "one pin, two unpins");
  pool.unpin({slot});
  pool.evict(slot);
  expect_refused<std::invalid_argument>([&] { pool.evict(slot); }, "double free");
  expect(pool.load(4).slot == slot, "the slot is used again");
  expect_refused<std::runtime_error>([&] { pool.pin({slot}, &old); }, "a stale generation");
}

void check_plan(const PagePool& pool, std::mt19937& random, const PlanLimits& limits) {
  std::vector<int64_t> choices = {-1}, slots, tokens, slot_of_row;
  for (const int32_t slot : PagePool::Reader(pool).loaded_slots()) choices.push_back(slot);
  for (int64_t i = below(random, 40); i > 0; --i) {
    slots.push_back(
        choices[static_cast<size_t>(below(random, static_cast<int64_t>(choices.size())))]);
    tokens.push_back(random() % 4 ? below(random, 3) : below(random, 200));
    slot_of_row.insert(slot_of_row.end(), static_cast<size_t>(tokens.back()), slots.back());
  }
  const Planner planner(pool, slots, tokens, limits);
  const PlanLayout& l = planner.layout();
  std::vector<int32_t> buffer(static_cast<size_t>(l.size), 12345);
  planner.write(buffer.data());
  const auto at = [&](int64_t start, int64_t i) { return buffer[static_cast<size_t>(start + i)]; };

  expect(l.M == static_cast<int64_t>(slot_of_row.size()), "M counts all rows");
  int64_t next = 0;
  for (int64_t t = 0; t < l.tile_count; ++t) {
    const int32_t slot = at(l.tiles, 4 * t), row0 = at(l.tiles, 4 * t + 1);
    const int32_t rows = at(l.tiles, 4 * t + 2), page0 = at(l.tiles, 4 * t + 3);
    expect(rows <= l.tile_rows, "a tile has at most tile_rows rows");
    if (rows) expect(row0 == next, "tiles follow one another");
    next += rows;
    for (int64_t i = row0; i < row0 + rows; ++i) {
      const int32_t row = at(l.rows, i);
      expect(slot_of_row[static_cast<size_t>(row)] == slot, "a tile's rows have its slot");
      expect(at(l.tile_of_row, row) == t, "a row knows its tile");
    }
    if (rows) expect(at(l.page_ids, page0) == PagePool::Reader(pool).pages(slot)[0], "its pages");
  }
  for (int64_t m = 0; m < l.M; ++m) {
    next += slot_of_row[static_cast<size_t>(m)] == -1;
    expect((at(l.tile_of_row, m) == -1) == (slot_of_row[static_cast<size_t>(m)] == -1), "base");
  }
  expect(next == l.M, "every row is in a tile or has no adapter");
}

int run() {
  check_refusals();
  PagePool pool(64);
  std::thread other([&] { random_steps(pool, 1); });
  random_steps(pool, 2);
  other.join();
  check_pool(pool);
  std::mt19937 random(3);
  for (int i = 0; i < 500; ++i) {
    check_plan(pool, random, {});
    check_plan(pool, random, {512, 64, 16});
  }
  std::printf("page pool and planner: %d failed\n", failures);
  return failures != 0;
}

}  // namespace
}  // namespace lk

int main() { return lk::run(); }
