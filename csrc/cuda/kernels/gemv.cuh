// The linear operator for few rows (M <= 64): weights pass from memory to registers once.
//
// Weights are the 16-row operand of the matrix instruction and tokens its 8 columns, so one token
// wastes nothing but columns. A packed byte indexes a table of pairs of codes, and the pair is a
// whole register of the operand: decoding two weights is one byte taken out, one address and one
// load from shared memory. Sums over a block of 64 columns are of unscaled codes; its absmax
// multiplies the sum, in float32.
//
// Block of 256 threads, 8 warps: 2 groups of rows x 4 slices of the columns.
//
//             slice 0  slice 1  slice 2  slice 3      each a contiguous range of chunks
//   group 0   warp 0   warp 1   warp 2   warp 3       16 MT rows
//   group 1   warp 4   warp 5   warp 6   warp 7       16 MT rows
//
// A warp streams its share through a ring of its own, without meeting the others. Slices are added
// in order at the end. If there are fewer blocks than multiprocessors the columns are cut further
// (split_k = gridDim.y times 4 slices), and gemv_finish adds their sums. All sizes of tile add in
// this same order, so the bits of a row do not depend on how many rows come with it.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/kernels/gemv_operands.cuh"

namespace lk::cuda {

constexpr int kGemvThreads = 256, kGemvWarps = 8, kGemvSlices = 4, kGemvGroups = 2;
constexpr int kMaxGemvRows = 64;

// Shared memory while streaming; afterwards the sums of the slices and then the adapter take it.
//
//   0       pairs         [256 bytes][32 lanes] x 4   a copy per lane: any 32 bytes, no conflict
//   32 KB   rings         [8 warps] x 8 KB
//   96 KB   nested_code   [256] float
constexpr int kPairsBytes = 256 * 128, kRingBytes = 8192;
constexpr int kNestedCodeAt = kPairsBytes + kGemvWarps * kRingBytes;
constexpr int kGemvShared = kNestedCodeAt + 256 * 4;

// Ranks of the adapter that pass through shared memory at a time.
constexpr int kRanksAtOnce = 32;
constexpr int kRankPitch = kRanksAtOnce + 4;  // 16-byte loads of 8 rows fall into different banks

struct GemvArgs {
  Matrix x;
  Weight4 w;
  Matrix B;  // data null: no adapter
  const float* s = nullptr;
  float scaling = 1.0f;
  EpilogueOperand addend;
  Vector bias;
  MutMatrix y;
  float* partial = nullptr;  // [gridDim.y][M][N] if the columns are cut, else null
  // Slice i, counted over all gridDim.y, has slice_chunks chunks, and one more if i <
  // longer_slices.
  int slice_chunks = 0, longer_slices = 0;

  __device__ int first_chunk(int slice) const {
    return slice * slice_chunks + (slice < longer_slices ? slice : longer_slices);
  }
};

template <int token_tiles, int row_tiles>
struct GemvTile {
  static constexpr int rows = 16 * row_tiles * kGemvGroups, tokens = 8 * token_tiles;
  static constexpr int stage = row_tiles * 16 * kChunkBytes, stages = kRingBytes / stage;
  // [slice][token][row]; four lanes of a quad then write to different banks.
  static constexpr int sum_pitch = rows + 4;
  static constexpr int sums = kGemvSlices * tokens * sum_pitch;
  static_assert((sums + rows * kRankPitch + tokens * kRanksAtOnce) * 4 <= kGemvShared);
  // Outputs of a thread in the end: one row, every `step`-th token.
  static constexpr int step = kGemvThreads / rows, outputs = tokens / step;
  // Few tokens leave registers for two blocks on a multiprocessor.
  static constexpr int blocks_per_multiprocessor = token_tiles <= 2 ? 2 : 1;
};

// -- the product ----------------------------------------------------------------------------------

// sums[row tile][token tile] of this warp's rows over chunks [begin, end).
template <class T, int token_tiles, int row_tiles>
struct GemvWarp {
  using Tile = GemvTile<token_tiles, row_tiles>;
  const Weight4& w;
  const unsigned lane;
  const int begin, end;
  const int tiles;     // of tokens, that have any
  const float offset;  // of double-quantized scales
  PackedRing<row_tiles> ring;
  Scales<row_tiles> scales;
  TokenRows<token_tiles> x;
  float sums[row_tiles][token_tiles][4] = {};

  __device__ GemvWarp(const GemvArgs& args, int64_t row, int begin_, int end_, unsigned char* ring_,
                      unsigned lane_)
      : w(args.w),
        lane(lane_),
        begin(begin_),
        end(end_),
        tiles(static_cast<int>(ceil_div(args.x.rows, 8))),
        offset(args.w.absmax ? 0.0f : ptx::load_const<float>(args.w.nested_offset)),
        ring(args.w, row, begin_, ring_, lane_),
        scales(args.w, row, lane_),
        x(args.x, begin_, lane_) {}

  // How many blocks the slice has from the chunk on.
  __device__ int blocks_left(int chunk) const {
    const int all = static_cast<int>(w.K / kGemvBlock), mine = end * kChunkBlocks;
    return (mine < all ? mine : all) - chunk * kChunkBlocks;
  }

  __device__ void start() {
#pragma unroll
    for (int slot = 0; slot < Tile::stages; ++slot) {
      if (begin + slot < end) ring.fetch(slot);
      ptx::copy_async_commit();
    }
    scales.fetch(w, begin, lane);
#pragma unroll
    for (int i = 0; i < x.ahead; ++i) x.fetch(i / token_tiles, i % token_tiles, blocks_left(begin));
  }

  __device__ void run(const unsigned char* lane_pairs, const float* nested_code) {
    int slot = 0, left = blocks_left(begin);
    for (int chunk = begin; chunk < end; ++chunk) {
      float scale[2 * row_tiles];
      scales.take(w, nested_code, offset, scale);
      scales.fetch(w, chunk + 1, lane);
      ptx::copy_async_wait<Tile::stages - 1>();
      __syncwarp();
#pragma unroll(token_tiles >= 4 ? 1 : kChunkBlocks)
      for (int block = 0; block < kChunkBlocks; ++block)
        if (block < left) add_block(lane_pairs, scale, block, left, slot);
      __syncwarp();
      if (chunk + Tile::stages < end) ring.fetch(slot);
      ptx::copy_async_commit();
      slot = slot + 1 < Tile::stages ? slot + 1 : 0;
      left -= kChunkBlocks;
      x.chunk += 2 * kGemvChunk;
    }
  }

  __device__ __forceinline__ void add_block(const unsigned char* lane_pairs,
                                            const float (&scale)[2 * row_tiles], int block,
                                            int left, int slot) {
    uint32_t a[row_tiles][4][4];  // [step][register]
    float block_scale[2 * row_tiles];
#pragma unroll
    for (int i = 0; i < 2 * row_tiles; ++i) {
      const uint2 bytes = ring.bytes(slot, block, i / 2, i % 2);
#pragma unroll
      for (int s = 0; s < 4; ++s) {
        const uint32_t word = s < 2 ? bytes.x : bytes.y;
        a[i / 2][s][i % 2] = lookup(lane_pairs, word, s % 2 * 2);
        a[i / 2][s][i % 2 + 2] = lookup(lane_pairs, word, s % 2 * 2 + 1);
      }
      block_scale[i] = ptx::shuffle(scale[i], (lane & ~3) | block);
    }
    // Tiles go in pairs: these are enough independent sums for the latency of the matrix
    // instruction, and a branch between pairs that keeps the compiler from loading all operands at
    // once.
    constexpr int pair = token_tiles < 2 ? 1 : 2;
#pragma unroll
    for (int n = 0; n < token_tiles; n += pair) {
      if (token_tiles <= pair || n < tiles) {
#pragma unroll
        for (int i = 0; i < pair; ++i) add_tile(a, block_scale, block, n + i);
      }
#pragma unroll
      for (int i = 0; i < pair; ++i) x.fetch_ahead(block, n + i, left);
    }
  }

  // Adds the block's product with one token tile.
  __device__ __forceinline__ void add_tile(const uint32_t (&a)[row_tiles][4][4],
                                           const float (&block_scale)[2 * row_tiles], int block,
                                           int n) {
    float sum[row_tiles][4] = {};
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      uint32_t b[2];
      x.step(block, n, s, b);
#pragma unroll
      for (int i = 0; i < row_tiles; ++i) ptx::mma<T>(sum[i], a[i][s], b);
    }
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        sums[i][n][j] = __fmaf_rn(block_scale[2 * i + j / 2], sum[i][j], sums[i][n][j]);
  }

  // Stores to [token][row] of the slice's sums, at the warp's first row.
  __device__ void store(float* to) const {
#pragma unroll
    for (int i = 0; i < row_tiles; ++i)
#pragma unroll
      for (int n = 0; n < token_tiles; ++n)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          to[(8 * n + 2 * (lane % 4) + j % 2) * Tile::sum_pitch + 16 * i + lane / 4 + 8 * (j / 2)] =
              sums[i][n][j];
  }
};

// -- adapter, bias, result ------------------------------------------------------------------------

// Brings what the end needs of B and bias to the second-level cache while the weights stream.
template <int rows>
__device__ __forceinline__ void prefetch_rest(const GemvArgs& args, int64_t row0) {
  constexpr unsigned line = 128;
  const unsigned thread = threadIdx.x;
  if (args.bias.data && thread < rows && row0 + thread < args.w.N)
    ptx::prefetch(static_cast<const unsigned char*>(args.bias.data) +
                  (row0 + thread) * element_size(args.bias.dtype));
  if (!args.B.data) return;
  const int64_t size = element_size(args.B.dtype);
  const unsigned row_bytes = static_cast<unsigned>(args.B.cols * size);
  const unsigned lines = row_bytes / line + 2;  // rows may start anywhere
  for (unsigned e = thread; e < rows * lines; e += kGemvThreads) {
    const unsigned wanted = e % lines * line, byte = wanted < row_bytes ? wanted : row_bytes - 1;
    if (row0 + e / lines < args.w.N)
      ptx::prefetch(static_cast<const unsigned char*>(args.B.data) +
                    (row0 + e / lines) * args.B.stride * size + byte);
  }
}

// Stores y for this thread's row, of those from row0 on, and its tokens, whose sums of the base it
// gives. `scratch` is free shared memory.
template <int rows, int outputs>
__device__ __forceinline__ void finish(const GemvArgs& args, int64_t row0,
                                       const float (&base)[outputs], float* scratch) {
  constexpr unsigned step = kGemvThreads / rows;
  const unsigned thread = threadIdx.x, row = thread % rows, first = thread / rows;
  const unsigned M = static_cast<unsigned>(args.x.rows);
  const int64_t n = row0 + row, R = args.B.cols;
  const float bias =
      args.bias.data && n < args.w.N ? load_one(args.bias.data, args.bias.dtype, n) : 0.0f;
  float adapter[outputs] = {};
  float* const b_rows = scratch;                      // [row][rank]
  float* const s_rows = scratch + rows * kRankPitch;  // [token][rank]
  for (int64_t r0 = 0; args.B.data && r0 < R; r0 += kRanksAtOnce) {
    for (unsigned e = thread; e < rows * kRanksAtOnce; e += kGemvThreads) {
      const int64_t r = r0 + e % kRanksAtOnce, b_row = row0 + e / kRanksAtOnce;
      b_rows[e / kRanksAtOnce * kRankPitch + e % kRanksAtOnce] =
          r < R && b_row < args.w.N ? load_one(args.B.data, args.B.dtype, b_row * args.B.stride + r)
                                    : 0.0f;
    }
    for (unsigned e = thread; e < M * kRanksAtOnce; e += kGemvThreads) {
      const int64_t r = r0 + e % kRanksAtOnce;
      s_rows[e] = r < R ? args.s[e / kRanksAtOnce * R + r] : 0.0f;
    }
    __syncthreads();
    const int ranks = static_cast<int>(min64(kRanksAtOnce, R - r0));
    for (int r = 0; r < ranks; r += 4) {
      const float4 b = ptx::load<float4>(b_rows + row * kRankPitch + r);
#pragma unroll
      for (int j = 0; j < outputs; ++j) {
        if (first + j * step >= M) break;
        const float4 s = ptx::load<float4>(s_rows + (first + j * step) * kRanksAtOnce + r);
        adapter[j] = __fmaf_rn(s.x, b.x, adapter[j]);
        adapter[j] = __fmaf_rn(s.y, b.y, adapter[j]);
        adapter[j] = __fmaf_rn(s.z, b.z, adapter[j]);
        adapter[j] = __fmaf_rn(s.w, b.w, adapter[j]);
      }
    }
    __syncthreads();
  }
  if (n >= args.w.N) return;
#pragma unroll
  for (int j = 0; j < outputs; ++j) {
    const unsigned m = first + j * step;
    if (m >= M) break;
    float v = base[j];
    if (args.B.data) v = __fmaf_rn(args.scaling, adapter[j], v);
    if (const float* addend = args.addend.row(m)) v = __fadd_rn(v, addend[n]);
    if (args.bias.data) v = __fadd_rn(v, bias);
    store_one(args.y.data, args.y.dtype, int64_t{m} * args.y.stride + n, v);
  }
}

template <class T, int token_tiles, int row_tiles>
__global__ void __launch_bounds__(kGemvThreads,
                                  (GemvTile<token_tiles, row_tiles>::blocks_per_multiprocessor))
    gemv_product(GemvArgs args) {
  using Tile = GemvTile<token_tiles, row_tiles>;
  unsigned char* const shared = ptx::shared_memory();
  float* const nested_code = reinterpret_cast<float*>(shared + kNestedCodeAt);
  // Unsigned, so that division and remainder are a shift and a mask.
  const unsigned thread = threadIdx.x, lane = ptx::lane(), warp = thread / 32;
  const unsigned group = warp / kGemvSlices, slice = warp % kGemvSlices;
  const int64_t row0 = int64_t{blockIdx.x} * Tile::rows;
  const unsigned group_row = group * 16 * row_tiles;

  // Everything that comes from far is asked for before the tables are made.
  const int split = static_cast<int>(blockIdx.y);
  const int nth = split * kGemvSlices + static_cast<int>(slice);
  GemvWarp<T, token_tiles, row_tiles> work(args, row0 + group_row, args.first_chunk(nth),
                                           args.first_chunk(nth + 1),
                                           shared + kPairsBytes + warp * kRingBytes, lane);
  work.start();
  prefetch_rest<Tile::rows>(args, row0);
  if (!args.w.absmax) nested_code[thread] = args.w.nested_code[thread];
  fill_pairs<T>(args.w.code, shared);
  __syncthreads();

  work.run(shared + 4 * lane, nested_code);

  ptx::copy_async_wait<0>();
  __syncthreads();
  float* const sums = reinterpret_cast<float*>(shared);
  work.store(sums + slice * Tile::tokens * Tile::sum_pitch + group_row);
  ptx::start_next_kernel();
  __syncthreads();
  float base[Tile::outputs];
  const unsigned row = thread % Tile::rows, first = thread / Tile::rows;
#pragma unroll
  for (int j = 0; j < Tile::outputs; ++j) {
    const float* from = sums + (first + j * Tile::step) * Tile::sum_pitch + row;
    base[j] = from[0];
#pragma unroll
    for (int i = 1; i < kGemvSlices; ++i)
      base[j] = __fadd_rn(base[j], from[i * Tile::tokens * Tile::sum_pitch]);
  }

  // This block waits even if it writes partial sums alone: who waits for this kernel counts on S
  // too.
  ptx::wait_for_previous_kernel();
  if (!args.partial) return finish<Tile::rows>(args, row0, base, sums + Tile::sums);
  if (row0 + row >= args.w.N) return;
#pragma unroll
  for (int j = 0; j < Tile::outputs; ++j) {
    const int64_t m = first + j * Tile::step;
    if (m < args.x.rows) args.partial[(split * args.x.rows + m) * args.w.N + row0 + row] = base[j];
  }
}

constexpr int kFinishRows = 32, kFinishOutputs = kMaxGemvRows * kFinishRows / kGemvThreads;
constexpr int kFinishShared = (kFinishRows * kRankPitch + kMaxGemvRows * kRanksAtOnce) * 4;

// Adds the partial sums in their order, then goes on as without them.
__global__ void __launch_bounds__(kGemvThreads) gemv_finish(GemvArgs args, int split_k) {
  constexpr int step = kGemvThreads / kFinishRows;
  const int thread = static_cast<int>(threadIdx.x);
  const int row = thread % kFinishRows, first = thread / kFinishRows;
  const int64_t row0 = int64_t{blockIdx.x} * kFinishRows, n = row0 + row;
  prefetch_rest<kFinishRows>(args, row0);
  ptx::wait_for_previous_kernel();
  float base[kFinishOutputs] = {};
#pragma unroll
  for (int j = 0; j < kFinishOutputs; ++j) {
    const int64_t m = first + j * step;
    if (m >= args.x.rows || n >= args.w.N) break;
    base[j] = args.partial[m * args.w.N + n];
    for (int split = 1; split < split_k; ++split)
      base[j] = __fadd_rn(base[j], args.partial[(split * args.x.rows + m) * args.w.N + n]);
  }
  finish<kFinishRows>(args, row0, base, reinterpret_cast<float*>(ptx::shared_memory()));
}

}  // namespace lk::cuda
