// The tile instructions of AMX in plain C++, for tests on CPUs that lack them: where
// LOWRANK_EMULATED_AMX is defined, a unit includes this file after immintrin.h and before the code
// that uses the instructions. No library that is installed is built with it.
//
// What each one does is in Intel's Software Developer's Manual (instructions TILELOADD, TDPBF16PS
// and so on) under the names used here. What the processor answers with an exception is a trap
// here: an instruction before a configuration, a tile register that is not configured, and operands
// whose shapes do not fit or that are one register.

namespace emulated_tiles {

constexpr int kRegisters = 8, kMaxRows = 16, kMaxBytes = 64, kMaxColumns = kMaxBytes / 4;

inline void demand(bool kept) {
  if (!kept) __builtin_trap();
}

struct Register {
  int rows = 0, bytes = 0;  // of each row
  union alignas(64) {
    uint8_t byte[kMaxRows][kMaxBytes];
    uint32_t dword[kMaxRows][kMaxColumns];
    float number[kMaxRows][kMaxColumns];
  };

  void clear() { __builtin_memset(byte, 0, sizeof byte); }
};

thread_local bool configured = false;
thread_local Register registers[kRegisters];

inline Register& use(int which) {
  Register& tile = registers[which];
  demand(configured && tile.rows > 0 && tile.bytes > 0);
  return tile;
}

// The 64 bytes of a configuration: palette, first row, 14 reserved ones, then for 16 registers
// their bytes of a row (16 bits each), and then their rows (8 bits each).
inline void load_config(const void* memory) {
  const uint8_t* config = static_cast<const uint8_t*>(memory);
  demand(config[0] == 1 && config[1] == 0);
  for (int i = 2; i < 16; ++i) demand(config[i] == 0);
  for (int t = 0; t < 16; ++t) {
    const int bytes = config[16 + 2 * t] | config[17 + 2 * t] << 8, rows = config[48 + t];
    demand(t < kRegisters ? bytes <= kMaxBytes && rows <= kMaxRows : bytes == 0 && rows == 0);
    demand((bytes == 0) == (rows == 0));
    if (t >= kRegisters) continue;
    registers[t].rows = rows;
    registers[t].bytes = bytes;
    registers[t].clear();
  }
  configured = true;
}

inline void release() {
  configured = false;
  for (Register& tile : registers) tile.clear();
}

inline void zero(int which) { use(which).clear(); }

inline void load(int which, const void* memory, int64_t stride) {
  Register& tile = use(which);
  tile.clear();
  for (int r = 0; r < tile.rows; ++r)
    __builtin_memcpy(tile.byte[r], static_cast<const char*>(memory) + r * stride,
                     static_cast<size_t>(tile.bytes));
}

inline void store(int which, void* memory, int64_t stride) {
  const Register& tile = use(which);
  for (int r = 0; r < tile.rows; ++r)
    __builtin_memcpy(static_cast<char*>(memory) + r * stride, tile.byte[r],
                     static_cast<size_t>(tile.bytes));
}

// The operands of a product: c [M][N] += a [M][K] b [K][N] in dwords, of which those of a and b
// hold the numbers that are multiplied.
struct Operands {
  Register& c;
  const Register &a, &b;
  int M, N, K;

  Operands(int to, int left, int right)
      : c(use(to)), a(use(left)), b(use(right)), M(c.rows), N(c.bytes / 4), K(a.bytes / 4) {
    demand(to != left && to != right && left != right);
    demand(a.bytes % 4 == 0 && b.bytes % 4 == 0 && c.bytes % 4 == 0);
    demand(a.rows == M && b.rows == K && b.bytes == c.bytes);
  }
};

inline float upper_half(uint32_t dword) { return float_of(dword & 0xffff0000u); }
inline float lower_half(uint32_t dword) { return float_of(dword << 16); }

// The even and the odd of the pairs are two sums, from zero; the sum of the two is added to c. Sums
// of columns that b does not have are thrown away. Not inlined: the rounding is in force while it
// runs.
__attribute__((noinline)) void add_products(const Operands& of) {
  for (int m = 0; m < of.M; ++m) {
    float even[kMaxColumns] = {}, odd[kMaxColumns] = {};
    for (int k = 0; k < of.K; ++k) {
      const float low = lower_half(of.a.dword[m][k]), high = upper_half(of.a.dword[m][k]);
      for (int n = 0; n < kMaxColumns; ++n) {
        even[n] = __builtin_fmaf(low, lower_half(of.b.dword[k][n]), even[n]);
        odd[n] = __builtin_fmaf(high, upper_half(of.b.dword[k][n]), odd[n]);
      }
    }
    for (int n = 0; n < of.N; ++n) of.c.number[m][n] += even[n] + odd[n];
  }
}

// TDPBF16PS: subnormal operands count as zero and subnormal results become zero (DAZ, FTZ), sums
// are rounded to nearest even, whatever MXCSR says.
inline void multiply_bf16(int to, int left, int right) {
  constexpr unsigned kNoExceptions = 0x1f80, kDaz = 1u << 6, kFtz = 1u << 15;
  const unsigned before = _mm_getcsr();
  _mm_setcsr(kNoExceptions | kDaz | kFtz);
  add_products(Operands(to, left, right));
  _mm_setcsr(before);
}

// TDPBSSD: sums of 32 bits, which wrap around.
inline void multiply_bytes(int to, int left, int right) {
  const Operands of(to, left, right);
  for (int m = 0; m < of.M; ++m)
    for (int k = 0; k < of.K; ++k)
      for (int n = 0; n < of.N; ++n)
        for (int b = 0; b < 4; ++b)
          of.c.dword[m][n] += static_cast<uint32_t>(static_cast<int8_t>(of.a.byte[m][4 * k + b]) *
                                                    static_cast<int8_t>(of.b.byte[k][4 * n + b]));
}

}  // namespace emulated_tiles

#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated_tiles::load_config
#define _tile_release emulated_tiles::release
#define _tile_zero emulated_tiles::zero
#define _tile_loadd emulated_tiles::load
#define _tile_stored emulated_tiles::store
#define _tile_dpbf16ps emulated_tiles::multiply_bf16
#define _tile_dpbssd emulated_tiles::multiply_bytes
