#include "cuda/emulator/emulator.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace lk::emulator {

thread_local Thread* current = nullptr;

namespace {

constexpr int kLanes = 32, kBarriers = 16;
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStackBytes = 256 << 10;
#else
constexpr size_t kStackBytes = 64 << 10;
#endif

// -- stacks ---------------------------------------------------------------------------------------

#if defined(__x86_64__)
// Saves the callee-saved registers and the stack pointer, and continues on another stack.
asm(R"(
.text
.type lk_emulator_switch, @function
lk_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size lk_emulator_switch, .-lk_emulator_switch
)");
extern "C" void lk_emulator_switch(void** save, void* load);

struct Context {
  void* sp = nullptr;

  void start(unsigned char* stack, void (*entry)()) {
    // The switch pops six registers and returns to entry, which must find rsp % 16 == 8.
    void** top = reinterpret_cast<void**>(stack + kStackBytes) - 2;
    *top = reinterpret_cast<void*>(entry);
    sp = top - 6;
    std::memset(sp, 0, 6 * sizeof(void*));
  }
  static void swap(Context& from, Context& to) { lk_emulator_switch(&from.sp, to.sp); }
};
#else
struct Context {
  ucontext_t context;

  void start(unsigned char* stack, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

// -- one block ------------------------------------------------------------------------------------

struct Copy {
  void* dst;
  const void* src;
  int bytes, valid;
};

struct Fiber {
  Thread thread;
  Context context;
  unsigned char* stack = nullptr;
  bool finished = false;
  std::deque<std::vector<Copy>> groups;  // committed copies, oldest first
  std::vector<Copy> open;                // not yet committed
  void* fake_stack = nullptr;            // AddressSanitizer's
};

struct Barrier {
  std::vector<Fiber*> waiting;
  int threads = 0;
};

struct Warp {
  const void* in[kLanes];
  void* out[kLanes];
  std::vector<Fiber*> waiting;
  const char* what = nullptr;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  Barrier barriers[kBarriers];
  std::deque<Fiber*> ready;
  Fiber* running = nullptr;
  Context scheduler;
  void (*body)(void*) = nullptr;
  void* context = nullptr;
  std::string error;
};

Order order = Order::forward;
std::mt19937_64 generator;
thread_local Block* block = nullptr;
thread_local std::vector<unsigned char*> free_stacks;
thread_local std::string last_error;

struct HostStack {  // of the thread that called run(), for AddressSanitizer
  const void* bottom = nullptr;
  size_t size = 0;
  void* fake = nullptr;
};
thread_local HostStack host;

void before_switch([[maybe_unused]] void** save, [[maybe_unused]] const void* bottom,
                   [[maybe_unused]] size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(save, bottom, size);
#endif
}
void after_switch([[maybe_unused]] void* saved, [[maybe_unused]] const void** bottom,
                  [[maybe_unused]] size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(saved, bottom, size);
#endif
}

void to_scheduler(bool for_good) {
  Fiber& me = *block->running;
  before_switch(for_good ? nullptr : &me.fake_stack, host.bottom, host.size);
  Context::swap(me.context, block->scheduler);
  after_switch(me.fake_stack, nullptr, nullptr);
  current = &me.thread;
}

void fiber_main() {
  after_switch(nullptr, &host.bottom, &host.size);
  block->body(block->context);
  Fiber& me = *block->running;
  me.finished = true;
  to_scheduler(true);
  std::abort();  // a finished fiber is never resumed
}

void resume(Fiber& fiber) {
  block->running = &fiber;
  current = &fiber.thread;
  before_switch(&host.fake, fiber.stack, kStackBytes);
  Context::swap(block->scheduler, fiber.context);
  after_switch(host.fake, nullptr, nullptr);
  current = nullptr;
}

void in_order(std::vector<Fiber*>& fibers) {
  std::sort(fibers.begin(), fibers.end());  // by address: fibers lie in the order of their threads
  if (order == Order::reverse) std::reverse(fibers.begin(), fibers.end());
  if (order == Order::shuffled) std::shuffle(fibers.begin(), fibers.end(), generator);
}

void make_ready(std::vector<Fiber*>& fibers) {
  in_order(fibers);
  block->ready.insert(block->ready.end(), fibers.begin(), fibers.end());
  fibers.clear();
}

unsigned char* take_stack() {
  if (free_stacks.empty()) return static_cast<unsigned char*>(std::aligned_alloc(64, kStackBytes));
  unsigned char* stack = free_stacks.back();
  free_stacks.pop_back();
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(stack, kStackBytes);
#endif
  return stack;
}

void perform(const std::vector<Copy>& copies) {
  for (const Copy& copy : copies) {
    std::memset(copy.dst, 0, static_cast<size_t>(copy.bytes));
    if (copy.valid > 0) std::memcpy(copy.dst, copy.src, static_cast<size_t>(copy.valid));
  }
}

std::string describe_deadlock(const Block& b) {
  std::string text = "the block cannot go on:";
  int waiting = 0;
  for (int i = 0; i < kBarriers; ++i) {
    const Barrier& barrier = b.barriers[i];
    if (barrier.waiting.empty()) continue;
    text += " " + std::to_string(barrier.waiting.size()) + " of " +
            std::to_string(barrier.threads) + " threads at barrier " + std::to_string(i) + ";";
    waiting += static_cast<int>(barrier.waiting.size());
  }
  for (size_t w = 0; w < b.warps.size(); ++w) {
    const Warp& warp = b.warps[w];
    if (warp.waiting.empty()) continue;
    text += " " + std::to_string(warp.waiting.size()) + " of 32 lanes of warp " +
            std::to_string(w) + " at " + warp.what + ";";
    waiting += static_cast<int>(warp.waiting.size());
  }
  return text + " " + std::to_string(static_cast<int>(b.fibers.size()) - waiting) + " exited";
}

void run_block(Block& b, Index grid, Index dim, Index index, size_t shared_bytes) {
  const int threads = static_cast<int>(dim.x * dim.y * dim.z);
  b.fibers = std::vector<Fiber>(static_cast<size_t>(threads));
  b.warps = std::vector<Warp>(static_cast<size_t>(threads / kLanes));
  void* shared = nullptr;
  if (posix_memalign(&shared, 128, std::max<size_t>(shared_bytes, 1)) != 0) std::abort();
  std::memset(shared, 0xff, shared_bytes);  // NaN in every floating-point type
  std::vector<Fiber*> all;
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = b.fibers[static_cast<size_t>(i)];
    const unsigned u = static_cast<unsigned>(i);
    fiber.thread = {{u % dim.x, u / dim.x % dim.y, u / dim.x / dim.y},
                    index,
                    dim,
                    grid,
                    static_cast<unsigned char*>(shared),
                    i % kLanes};
    fiber.stack = take_stack();
    fiber.context.start(fiber.stack, fiber_main);
    all.push_back(&fiber);
  }
  make_ready(all);
  while (!b.ready.empty() && b.error.empty()) {
    Fiber* next = b.ready.front();
    b.ready.pop_front();
    resume(*next);
  }
  for (Fiber& fiber : b.fibers) {
    if (!fiber.finished && b.error.empty()) b.error = describe_deadlock(b);
    free_stacks.push_back(fiber.stack);
  }
  std::free(shared);
}

}  // namespace

void set_order(Order value, uint64_t seed) {
  order = value;
  generator.seed(seed);
}

const char* run(Index grid, Index dim, size_t shared_bytes, void (*body)(void*), void* context) {
  last_error.clear();
  const unsigned threads = dim.x * dim.y * dim.z;
  if (threads == 0 || threads > 1024 || threads % kLanes != 0)
    last_error = "invalid block of " + std::to_string(threads) + " threads";
  else if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535)
    last_error = "invalid grid";
  else if (shared_bytes > 227 * 1024)
    last_error = "too much shared memory: " + std::to_string(shared_bytes) + " bytes";
  for (unsigned z = 0; z < grid.z && last_error.empty(); ++z)
    for (unsigned y = 0; y < grid.y && last_error.empty(); ++y)
      for (unsigned x = 0; x < grid.x && last_error.empty(); ++x) {
        Block b;
        b.body = body;
        b.context = context;
        block = &b;
        run_block(b, grid, dim, {x, y, z}, shared_bytes);
        block = nullptr;
        last_error = b.error;
      }
  return last_error.c_str();
}

void fail(const char* message) {
  if (block->error.empty()) block->error = message;
  to_scheduler(false);
  std::abort();  // after an error no fiber is resumed
}

void barrier(int id, int threads) {
  if (id < 0 || id >= kBarriers) fail("barrier number out of 0..15");
  Barrier& b = block->barriers[id];
  if (!b.waiting.empty() && b.threads != threads) fail("threads expect a barrier of other sizes");
  b.threads = threads;
  b.waiting.push_back(block->running);
  // The last to arrive waits as well, so that the order of the fibers decides who goes on first.
  if (static_cast<int>(b.waiting.size()) == threads) make_ready(b.waiting);
  to_scheduler(false);
}

void collective(const char* what, Compute compute, const void* in, void* out) {
  Fiber* me = block->running;
  const size_t w = static_cast<size_t>(me - block->fibers.data()) / kLanes;
  Warp& warp = block->warps[w];
  if (warp.waiting.empty()) warp.what = what;
  if (std::strcmp(warp.what, what) != 0) fail("lanes of a warp meet in different instructions");
  warp.in[current->lane] = in;
  warp.out[current->lane] = out;
  warp.waiting.push_back(me);
  if (warp.waiting.size() < kLanes) return to_scheduler(false);
  compute(warp.in, warp.out);
  warp.waiting.pop_back();  // the last one goes on at once
  make_ready(warp.waiting);
}

void copy_async(void* dst, const void* src, int bytes, int valid) {
  if (reinterpret_cast<uintptr_t>(dst) % static_cast<unsigned>(bytes) != 0)
    fail("cp.async: misaligned destination");
  if (valid > 0 && reinterpret_cast<uintptr_t>(src) % static_cast<unsigned>(bytes) != 0)
    fail("cp.async: misaligned source");
  // Touched now, so that a sanitizer names this line and not the wait.
  for (int i = 0; i < valid; ++i) static_cast<void>(static_cast<const volatile char*>(src)[i]);
  static_cast<void>(static_cast<volatile char*>(dst)[bytes - 1]);
  block->running->open.push_back({dst, src, bytes, valid});
}

void copy_async_commit() {
  Fiber& me = *block->running;
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}

void copy_async_wait(int groups_left) {
  Fiber& me = *block->running;
  while (static_cast<int>(me.groups.size()) > groups_left) {
    perform(me.groups.front());
    me.groups.pop_front();
  }
}

}  // namespace lk::emulator

// Order of the fibers: 0 forward, 1 reverse, 2 shuffled by the seed.
extern "C" __attribute__((visibility("default"))) void lk_emulator_set_order(int order,
                                                                             uint64_t seed) {
  lk::emulator::set_order(static_cast<lk::emulator::Order>(order), seed);
}
