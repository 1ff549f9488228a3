// A CUDA device played by the host: every thread of a block is a fiber, blocks run one after
// another. For tests where there is no GPU; it checks indexing, synchronisation and arithmetic, not
// speed.
//
//   barrier      a fiber that waits is not resumed before all threads of the block have arrived
//   collective   shuffles and matrix instructions: the last of the 32 lanes computes for all
//   cp.async     copies happen as late as the program allows: at the wait, not at the issue
//   memory       shared memory is a heap block of exactly the size asked for, filled with NaNs
//
// A missing barrier shows as a wrong result in at least one order of the fibers (set_order). A
// kernel that cannot go on (a barrier that not all threads reach, lanes that meet in different
// instructions) fails the launch with a message.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lk::emulator {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};

// What the running fiber sees.
struct Thread {
  Index thread, block, block_dim, grid_dim;
  unsigned char* shared = nullptr;
  int lane = 0;
};
extern thread_local Thread* current;

enum class Order { forward, reverse, shuffled };
void set_order(Order order, uint64_t seed);

// Runs body(context) once per thread. Empty: done; otherwise what went wrong.
const char* run(Index grid, Index block, size_t shared_bytes, void (*body)(void*), void* context);

// -- called by device code ------------------------------------------------------------------------

void barrier(int id, int threads);

// All 32 lanes of the warp come with the same `what`; the last one runs compute(inputs, outputs),
// arrays of the lanes' pointers.
using Compute = void (*)(const void* const* in, void* const* out);
void collective(const char* what, Compute compute, const void* in, void* out);

// bytes <= 16 of dst, of which the first `valid` come from src and the others are zero.
void copy_async(void* dst, const void* src, int bytes, int valid);
void copy_async_commit();
void copy_async_wait(int groups_left);

// The present launch fails with this message; does not return.
[[noreturn]] void fail(const char* message);

}  // namespace lk::emulator
