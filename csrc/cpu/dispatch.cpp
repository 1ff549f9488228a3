// Choice of the instruction set at run time, and the per-thread scratch memory of the kernels.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>

#include "cpu/api.h"
#include "cpu/table.h"

namespace lk {

// Each is defined by a unit of isa/.
extern const KernelTable kScalarTable;
#if defined(__x86_64__)
extern const KernelTable kAvx2Table, kAvx512Table, kAvx512Bf16Table, kAmxTable;
#elif defined(__aarch64__)
extern const KernelTable kNeonTable, kNeonBf16Table;
#endif

namespace {

struct Isa {
  const KernelTable* table;
  bool (*supported)();
};

#if defined(__x86_64__)
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() { return has_avx512() && __builtin_cpu_supports("avx512bf16"); }

#if defined(LOWRANK_EMULATED_AMX)  // its registers are memory, see amx/emulated_tiles.h
bool has_amx() { return has_avx512_bf16() && __builtin_cpu_supports("avx512vbmi"); }
bool has_amx_int8() { return has_amx() && __builtin_cpu_supports("avx512vnni"); }
#elif defined(__linux__)
// Whether the CPU has all features that these bits of cpuid(7, 0).edx stand for.
bool has_all(unsigned bits) {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & bits) == bits;
}

// Linux lets a process use AMX's registers after it has asked for them.
bool has_amx() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM
  static const bool granted = has_avx512_bf16() && __builtin_cpu_supports("avx512vbmi") &&
                              has_all(kAmxBf16 | kAmxTile) &&
                              syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
}

// Few rows run on AVX512-VNNI.
bool has_amx_int8() {
  constexpr unsigned kAmxInt8 = 1u << 25;
  static const bool has = has_amx() && __builtin_cpu_supports("avx512vnni") && has_all(kAmxInt8);
  return has;
}
#else
bool has_amx() { return false; }
bool has_amx_int8() { return false; }
#endif
#elif defined(__aarch64__)
// Bits of Linux's words on the CPU; older C libraries lack their names.
bool has_dotprod() { return getauxval(AT_HWCAP) >> 20 & 1; }
bool has_bf16() { return getauxval(AT_HWCAP2) >> 14 & 1; }
#endif

// The list of the instruction sets, best first: whoever wants to know them asks this library.
const Isa kIsas[] = {
#if defined(__x86_64__)
    {&kAmxTable, has_amx},
    {&kAvx512Bf16Table, has_avx512_bf16},
    {&kAvx512Table, has_avx512},
    {&kAvx2Table,
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     }},
#elif defined(__aarch64__)
    {&kNeonBf16Table, has_bf16},
    {&kNeonTable, [] { return true; }},
#endif
    {&kScalarTable, [] { return true; }},
};
constexpr int kCount = sizeof(kIsas) / sizeof(kIsas[0]);

const KernelTable* best() {
  for (const Isa& isa : kIsas)
    if (isa.supported()) return isa.table;
  return &kScalarTable;
}

std::atomic<const KernelTable*>& active() {
  static std::atomic<const KernelTable*> table{best()};
  return table;
}

thread_local bool int8_active = false;
std::atomic<bool> exact_active{false};

std::atomic<Kernel> asked{Kernel::any};

struct Allocation {
  void* data = nullptr;
  size_t capacity = 0;
  ~Allocation() { std::free(data); }
};

}  // namespace

bool has_feature(const char* name) {
#if defined(__x86_64__)
  if (std::strcmp(name, "amx_int8") == 0) return has_amx_int8();
  if (std::strcmp(name, "avx512_vnni") == 0) return __builtin_cpu_supports("avx512vnni");
  if (std::strcmp(name, "avx_vnni") == 0) return __builtin_cpu_supports("avxvnni");
#elif defined(__aarch64__)
  if (std::strcmp(name, "neon_dotprod") == 0) return has_dotprod();
#endif
  return false;
}

Kernel asked_kernel() { return asked.load(std::memory_order_relaxed); }

void* scratch(Buffer which, size_t bytes) {
  thread_local Allocation buffers[static_cast<int>(Buffer::count)];
  Allocation& buffer = buffers[static_cast<int>(which)];
  if (buffer.capacity < bytes) {
    std::free(buffer.data);
    buffer.data = nullptr;
    buffer.capacity = 0;
    if (posix_memalign(&buffer.data, 64, bytes) != 0) throw std::bad_alloc();
    // Zeroed: kernels may compute with padding, whose results nobody reads.
    std::memset(buffer.data, 0, bytes);
    buffer.capacity = bytes;
  }
  return buffer.data;
}

}  // namespace lk

const char* lk_isa_active(void) { return lk_kernels()->isa; }

int lk_isa_set(const char* name) {
  if (name == nullptr || *name == '\0') {
    lk::active() = lk::best();
    return 0;
  }
  for (const auto& isa : lk::kIsas) {
    if (std::strcmp(isa.table->isa, name) == 0) {
      if (!isa.supported()) return 2;
      lk::active() = isa.table;
      return 0;
    }
  }
  return 1;
}

int lk_isa_count(void) { return lk::kCount; }

const char* lk_isa_name(int index) {
  return index >= 0 && index < lk::kCount ? lk::kIsas[index].table->isa : nullptr;
}

int lk_isa_supported(int index) {
  return index >= 0 && index < lk::kCount && lk::kIsas[index].supported();
}

void lk_int8_set(int on) { lk::int8_active = on != 0; }

int lk_int8_active(void) { return lk::int8_active; }

void lk_exact_set(int on) { lk::exact_active = on != 0; }

int lk_exact_active(void) { return lk::exact_active; }

int lk_pairs(void) { return lk_kernels()->pairs; }

const char* lk_int8_kernels(void) {
  for (const char* name : lk_kernels()->int8)
    if (name && lk::has_feature(name)) return name;
  return nullptr;
}

int lk_kernel_count(void) { return lk::kLastKernel - lk::kFirstKernel + 1; }

const char* lk_kernel_name(int index) {
  return index >= 0 && index < lk_kernel_count() ? lk::kKernelNames[lk::kFirstKernel + index]
                                                 : nullptr;
}

int lk_kernel_set(const char* name) {
  int kernel = 0;
  for (const char* known : lk::kKernelNames) {
    if (std::strcmp(known, name ? name : "") == 0) {
      lk::asked = static_cast<lk::Kernel>(kernel);
      return 0;
    }
    ++kernel;
  }
  return 1;
}

const char* lk_build_info(void) { return "liblowrank_cpu, g++ " __VERSION__; }

const lk::KernelTable* lk_kernels(void) { return lk::active().load(std::memory_order_relaxed); }
