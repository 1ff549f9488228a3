// Decodes packed weights to tiles of 16-bit values in shared memory. A step of the contraction is
// 64 deep and 128 outputs wide: 8192 weights, of which each of 256 threads decodes one run of 32.
// It copies the 16 bytes of its run itself, ahead of time, so no barrier lies between copy and
// decode.
//
//   forward: tile [128 n][64 k]          backward: tile [64 n][128 k]
//     row n: 2 runs, 128 bytes             row n: 4 runs, 256 bytes
//   A row consists of 16-byte chunks of 8 weights; chunk c of row n lies at c ^ (n % 8), so that
//   eight rows of one chunk (a matrix of ldmatrix) lie in different banks.
//
// Both are rows of W as they are stored; the direction decides how ldmatrix reads them.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

constexpr int kMmaThreads = 256;
constexpr int kMmaOutputs = 128;
constexpr int kMmaDepth = 64;
constexpr int kRun = 32;  // weights with one scale, whatever the block size
static_assert(kMmaOutputs * kMmaDepth == kMmaThreads * kRun, "one run per thread");

constexpr int kRawBytes = kMmaThreads * kRun / 2;  // packed bytes of a step
constexpr int kDecodedBytes = kMmaOutputs * kMmaDepth * 2;

// The 16 codes, one copy per lane and so per bank: nibble c of lane l is float c * 32 + l. Then the
// 256 codes of double quantization and its offset.
constexpr int kCodeBytes = 16 * 32 * 4;
constexpr int kTableBytes = kCodeBytes + 256 * 4 + 128;

__device__ inline void fill_tables(const Weight4& w, unsigned char* tables) {
  float* code = reinterpret_cast<float*>(tables);
  float* nested = reinterpret_cast<float*>(tables + kCodeBytes);
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int i = 0; i < 16 * 32; i += kMmaThreads) code[i + thread] = w.code[(i + thread) / 32];
  if (w.absmax) return;
  nested[thread] = w.nested_code[thread];
  if (thread == 0) nested[256] = *w.nested_offset;
}

// The scale of a run on its way from memory; loaded a step before it is needed.
struct PendingScale {
  float absmax = 0.0f;
  uint8_t nested_code = 0;
};

// This thread's runs: one in every step. The tile begins at `output`, a row of W for forward and a
// column for backward; steps go along the other dimension.
template <bool backward>
class Runs {
 public:
  __device__ Runs(const Weight4& w, int64_t output) : w_(w) {
    const int thread = static_cast<int>(threadIdx.x);
    raw_at_ = 16 * thread;
    // Four of eight neighbouring threads, which store together, have neighbouring rows of the tile,
    // and two have neighbouring runs: together they fill all banks.
    const int row = backward ? (thread >> 1 & 3) + (thread >> 4) * 4 : thread >> 1;
    const int run = backward ? (thread & 1) + (thread >> 3 & 1) * 2 : thread & 1;
    chunk_at_ = row * (backward ? 2 * kMmaOutputs : 2 * kMmaDepth) + ((4 * run) ^ (row & 7)) * 16;
    // Any weight will do beyond the last output, as long as it is one.
    const int64_t n = backward ? row : min64(output + row, w.N - 1);
    const int64_t k = backward ? min64(output + run * kRun, w.K - kRun) : run * kRun;
    first_ = n * w.K + k;
    depth_ = backward ? row : run * kRun;
  }

  // Byte of this thread's raw weights, and of the first chunk of its run in the decoded tile: the
  // others are at chunk_at() ^ 16, ^ 32, ^ 48.
  __device__ int raw_at() const { return raw_at_; }
  __device__ int chunk_at() const { return chunk_at_; }

  // Starts copying the run of a step; beyond the depth, zeros come.
  __device__ void copy(int step, unsigned char* raw) const {
    const bool valid = is_inside(step);
    ptx::copy_async(raw + raw_at_, w_.packed + (valid ? element(step) / 2 : 0), valid);
  }

  __device__ PendingScale scale(int step) const {
    PendingScale s;
    const int64_t block = (is_inside(step) ? element(step) : 0) >> w_.block_shift;
    if (w_.absmax) {
      s.absmax = ptx::load_const<float>(w_.absmax + block);
    } else {
      s.nested_code = ptx::load_const<uint8_t>(w_.absmax_u8 + block);
      s.absmax = ptx::load_const<float>(w_.nested_absmax + (block >> kNestedShift));
    }
    return s;
  }

  // Zero beyond the depth, where the nibbles are zeros too but their code may not be.
  __device__ float resolve(const PendingScale& s, int step, const unsigned char* tables) const {
    float scale = s.absmax;
    if (!w_.absmax) {
      const float* nested = reinterpret_cast<const float*>(tables + kCodeBytes);
      scale = __fadd_rn(__fmul_rn(nested[s.nested_code], scale), nested[256]);
    }
    return is_inside(step) ? scale : 0.0f;
  }

 private:
  __device__ bool is_inside(int step) const {
    return static_cast<int64_t>(step) * kMmaDepth + depth_ < (backward ? w_.N : w_.K);
  }
  __device__ int64_t element(int step) const {
    return first_ + static_cast<int64_t>(step) * kMmaDepth * (backward ? w_.K : 1);
  }

  const Weight4& w_;
  int raw_at_, chunk_at_;
  int depth_;      // of the contraction, where step 0 has this run
  int64_t first_;  // element of the weight, in step 0
};

// The codes of eight nibbles in the order of the weights: the high one of each byte is the first.
__device__ __forceinline__ void look_up(uint32_t word, const unsigned char* tables,
                                        float (&code)[8]) {
  const uint32_t lane = ptx::lane() * 4;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int bit = 8 * (i / 2) + (i % 2 ? 0 : 4);
    const uint32_t at_7 = bit > 7 ? word >> (bit - 7) : word << (7 - bit);  // times 128 bytes
    code[i] = ptx::load<float>(tables + ((at_7 & 0x780) | lane));
  }
}

// Eight weights, exactly as dequantized: the float32 product, rounded once.
template <class T>
__device__ __forceinline__ void store_weights(const float (&code)[8], float scale,
                                              unsigned char* dst) {
  uint32_t pair[4];
#pragma unroll
  for (int i = 0; i < 4; ++i)
    pair[i] = ptx::pack<T>(__fmul_rn(code[2 * i], scale), __fmul_rn(code[2 * i + 1], scale));
  ptx::store(dst, make_uint4(pair[0], pair[1], pair[2], pair[3]));
}

}  // namespace lk::cuda
