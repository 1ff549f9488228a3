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
// A warp streams its part through a ring of its own, without meeting the others. Slices are added
// in order at the end. If there are fewer blocks than multiprocessors the columns are cut further
// (gridDim.y parts of 4 slices), and decode_finish adds the parts. All sizes of tile add in this
// same order, so the bits of a row do not depend on how many rows come with it.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

constexpr int kDecodeThreads = 256, kDecodeWarps = 8, kDecodeSlices = 4, kDecodeGroups = 2;
constexpr int kDecodeBlock = 64;   // columns summed before they are scaled
constexpr int kDecodeChunk = 256;  // columns of one step of the ring
constexpr int kChunkBlocks = 4;    // one per lane of a quad, for the scales
constexpr int kChunkBytes = 128;   // of one row
constexpr int kMaxDecodeRows = 64;

// Shared memory while streaming; afterwards the sums of the slices and then the adapter take it.
//
//   0       pairs         [256 bytes][32 lanes] x 4   a copy per lane: any 32 bytes, no conflict
//   32 KB   rings         [8 warps] x 8 KB
//   96 KB   nested_code   [256] float
constexpr int kPairsBytes = 256 * 128, kRingBytes = 8192;
constexpr int kNestedCodeAt = kPairsBytes + kDecodeWarps * kRingBytes;
constexpr int kDecodeShared = kNestedCodeAt + 256 * 4;

// Ranks of the adapter that pass through shared memory at a time.
constexpr int kRankStep = 32;
constexpr int kRankPitch = kRankStep + 4;  // 16-byte loads of 8 rows fall into different banks

struct DecodeArgs {
  Matrix x;
  Weight4 w;
  Matrix B;  // data null: no adapter
  const float* s = nullptr;
  float scaling = 1.0f;
  Vector bias;
  MutMatrix y;
  float* parts = nullptr;  // [gridDim.y][M][N] if the columns are cut, else null
  // Slice i, counted over the parts, has slice_chunks chunks, and one more if i < longer_slices.
  int slice_chunks = 0, longer_slices = 0;

  __device__ int first_chunk(int slice) const {
    return slice * slice_chunks + (slice < longer_slices ? slice : longer_slices);
  }
};

template <int token_tiles, int row_tiles>
struct DecodeTile {
  static constexpr int rows = 16 * row_tiles * kDecodeGroups, tokens = 8 * token_tiles;
  static constexpr int stage = row_tiles * 16 * kChunkBytes, stages = kRingBytes / stage;
  // [slice][token][row]; four lanes of a quad then write to different banks.
  static constexpr int sum_pitch = rows + 4;
  static constexpr int sums = kDecodeSlices * tokens * sum_pitch;
  static_assert((sums + rows * kRankPitch + tokens * kRankStep) * 4 <= kDecodeShared);
  // Outputs of a thread in the end: one row, every `step`-th token.
  static constexpr int step = kDecodeThreads / rows, outputs = tokens / step;
  // Few tokens leave registers for two blocks on a multiprocessor.
  static constexpr int blocks_per_multiprocessor = token_tiles <= 2 ? 2 : 1;
};

// -- weights --------------------------------------------------------------------------------------

// One warp's packed bytes. A chunk of a row is 8 pieces of 16 bytes; piece p of row r lies at
// p ^ 2 (r & 3), so that 4 rows x 4 lanes of 8 bytes, half a warp's load, touch every bank once:
//
//   row 0   0 1 2 3 4 5 6 7
//   row 1   2 3 0 1 6 7 4 5
//   row 2   4 5 6 7 0 1 2 3
//   row 3   6 7 4 5 2 3 0 1
template <int row_tiles>
struct PackedRing {
  static constexpr int stage = row_tiles * 16 * kChunkBytes;

  const uint8_t* source;        // this lane's piece of the next chunk in its first row
  int left;                     // bytes of the row from there on, possibly negative
  int64_t step;                 // bytes to the lane's next row, the fourth after it
  int rows;                     // how many of its rows exist
  unsigned char* target;        // where its piece goes, in stage 0
  const unsigned char* packed;  // row g of stage 0
  int swizzle;                  // where the lane's 8 bytes of block 0 are in it

  __device__ PackedRing(const Weight4& w, int64_t row, int chunk, unsigned char* ring,
                        unsigned lane) {
    const unsigned first = lane / 8, piece = lane % 8, g = lane / 4;
    const int64_t row_bytes = w.K / 2, column = int64_t{chunk} * kChunkBytes + 16 * piece;
    const int64_t exist = ceil_div(w.N - row - first, 4);
    source = w.packed + (row + first) * row_bytes + column;
    left = static_cast<int>(row_bytes - column);
    step = 4 * row_bytes;
    rows = static_cast<int>(min64(exist, 4 * row_tiles));
    target = ring + first * kChunkBytes + 16 * (piece ^ 2 * first);
    packed = ring + g * kChunkBytes;
    swizzle = 32 * (g & 3) + 8 * (lane % 4);
  }

  // The next chunk. Rows and columns that do not exist become zeros.
  __device__ void fetch(int slot) {
    const uint8_t* row = source;
#pragma unroll
    for (int i = 0; i < 4 * row_tiles; ++i) {
      ptx::copy_async_once(target + slot * stage + 4 * i * kChunkBytes, row, left > 0 && i < rows);
      row += step;
    }
    source += kChunkBytes;
    left -= kChunkBytes;
  }

  // Bytes 8t.. of block `block` of row g + 8 half of row tile `tile`.
  __device__ uint2 bytes(int slot, int block, int tile, int half) const {
    return ptx::load<uint2>(packed + slot * stage + (swizzle ^ 32 * block) +
                            (16 * tile + 8 * half) * kChunkBytes);
  }
};

// The pair that byte `byte` of `word` stands for, from this lane's copies.
__device__ __forceinline__ uint32_t lookup(const unsigned char* lane_pairs, uint32_t word,
                                           unsigned byte) {
  return ptx::load<uint32_t>(lane_pairs + 128 * ptx::permute(word, 0, 0x4440 + byte));
}

// Thread i writes the copies of entry i: the low half is the first element, the high nibble.
template <class T>
__device__ __forceinline__ void fill_pairs(const float* code, unsigned char* pairs) {
  const int i = static_cast<int>(threadIdx.x);
  const uint32_t pair = ptx::pack<T>(code[i >> 4], code[i & 15]);
#pragma unroll
  for (int j = 0; j < 8; ++j)  // neighbours start at different banks
    ptx::store(pairs + 128 * i + 16 * ((i + j) & 7), make_uint4(pair, pair, pair, pair));
}

// -- scales ---------------------------------------------------------------------------------------

// Lane t of a quad holds the scale of block t of the chunk for rows g and g + 8 of each row tile;
// the others get it by a shuffle. Loaded a chunk ahead. What does not exist is left as it was: its
// sums go nowhere.
template <int row_tiles>
struct Scales {
  static constexpr int count = 2 * row_tiles;
  int64_t first;  // block index of column 0 of row g
  int row_blocks, rows;
  float value[count] = {};  // absmax, or nested absmax
  uint32_t quantized[count] = {};

  __device__ Scales(const Weight4& w, int64_t row, unsigned lane) {
    row_blocks = static_cast<int>(w.K >> w.block_shift);
    first = (row + lane / 4) * row_blocks;
    rows = static_cast<int>(min64(ceil_div(w.N - row - lane / 4, 8), count));
  }

  __device__ void fetch(const Weight4& w, int chunk, unsigned lane) {
    const int block = (chunk * kChunkBlocks + static_cast<int>(lane % 4)) >> (w.block_shift - 6);
    if (block >= row_blocks) return;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if (i >= rows) break;
      const int64_t at = first + block + int64_t{row_blocks} * (8 * i);
      if (w.absmax) {
        value[i] = ptx::load_const<float>(w.absmax + at);
      } else {
        quantized[i] = ptx::load_const<uint8_t>(w.absmax_u8 + at);
        value[i] = ptx::load_const<float>(w.nested_absmax + (at >> kNestedShift));
      }
    }
  }

  // Product and sum rounded separately: see block_scale.
  __device__ void take(const Weight4& w, const float* nested_code, float offset,
                       float (&scale)[count]) const {
#pragma unroll
    for (int i = 0; i < count; ++i)
      scale[i] =
          w.absmax ? value[i] : __fadd_rn(__fmul_rn(nested_code[quantized[i]], value[i]), offset);
  }
};

// -- activations ----------------------------------------------------------------------------------

// Lane (g, t) reads 16 columns, from 16 t, of token g: for step s of the block's four the lane's
// operand is columns 4 s.. of these, and the weights' bytes 2 s and 2 s + 1 are the same columns.
// The order of columns within a block is free as long as both operands have it.
//
// Operands are loaded `ahead` of their use, in the order (block, token tile). Tokens that do not
// exist repeat the last one: their sums go nowhere.
template <int token_tiles>
struct Activations {
  static constexpr int ahead = token_tiles == 4 ? 4 : 2;
  static_assert(kChunkBlocks * token_tiles % ahead == 0);
  const unsigned char* chunk;  // the lane's 32 bytes of the present chunk's block 0 in row 0
  unsigned g, last, pitch;     // its token of tile 0, the last token, bytes between rows
  uint4 operand[ahead][2];

  __device__ Activations(const Matrix& x, int first_chunk, unsigned lane) {
    chunk = static_cast<const unsigned char*>(x.data) + int64_t{first_chunk} * (2 * kDecodeChunk) +
            32 * (lane % 4);
    g = lane / 4;
    last = static_cast<unsigned>(x.rows) - 1;
    pitch = static_cast<unsigned>(x.stride) * 2;
  }

  // Where the operand of this block of the chunk and token tile is held.
  __device__ static int slot(int block, int tile) {
    return token_tiles % ahead == 0 ? tile % ahead : (block * token_tiles + tile) % ahead;
  }

  // Of the chunk's blocks `left` exist, or more.
  __device__ void fetch(int block, int tile, int left) {
    if (block >= left) return;
    const unsigned wanted = 8 * tile + g, token = wanted < last ? wanted : last;
    const unsigned char* p = chunk + uint64_t{token} * pitch + block * (2 * kDecodeBlock);
    operand[slot(block, tile)][0] = ptx::load_const<uint4>(p);
    operand[slot(block, tile)][1] = ptx::load_const<uint4>(p + 16);
  }
  __device__ void fetch_ahead(int block, int tile, int left) {
    fetch(block + (tile + ahead) / token_tiles, (tile + ahead) % token_tiles, left);
  }

  __device__ void step(int block, int tile, int s, uint32_t (&b)[2]) const {
    const uint4 v = operand[slot(block, tile)][s / 2];
    b[0] = s % 2 ? v.z : v.x;
    b[1] = s % 2 ? v.w : v.y;
  }
};

// -- the product ----------------------------------------------------------------------------------

// sums[row tile][token tile] of this warp's rows over chunks [begin, end).
template <class T, int token_tiles, int row_tiles>
struct DecodeWarp {
  using Tile = DecodeTile<token_tiles, row_tiles>;
  const Weight4& w;
  const unsigned lane;
  const int begin, end;
  const int tiles;     // of tokens, that have any
  const float offset;  // of double-quantized scales
  PackedRing<row_tiles> ring;
  Scales<row_tiles> scales;
  Activations<token_tiles> x;
  float sums[row_tiles][token_tiles][4] = {};

  __device__ DecodeWarp(const DecodeArgs& args, int64_t row, int begin_, int end_,
                        unsigned char* ring_, unsigned lane_)
      : w(args.w),
        lane(lane_),
        begin(begin_),
        end(end_),
        tiles(static_cast<int>(ceil_div(args.x.rows, 8))),
        offset(args.w.absmax ? 0.0f : ptx::load_const<float>(args.w.nested_offset)),
        ring(args.w, row, begin_, ring_, lane_),
        scales(args.w, row, lane_),
        x(args.x, begin_, lane_) {}

  // Blocks of the slice from the chunk on.
  __device__ int blocks_left(int chunk) const {
    const int all = static_cast<int>(w.K / kDecodeBlock), mine = end * kChunkBlocks;
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
      x.chunk += 2 * kDecodeChunk;
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
    // In pairs: enough independent sums for the latency of the matrix instruction, and a branch
    // between pairs that keeps the compiler from loading all operands at once.
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

  // The block's part of one token tile.
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

  // To [token][row] of the slice's sums, at the warp's first row.
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
__device__ __forceinline__ void prefetch_rest(const DecodeArgs& args, int64_t row0) {
  constexpr unsigned line = 128;
  const unsigned thread = threadIdx.x;
  if (args.bias.data && thread < rows && row0 + thread < args.w.N)
    ptx::prefetch(static_cast<const unsigned char*>(args.bias.data) +
                  (row0 + thread) * element_size(args.bias.dtype));
  if (!args.B.data) return;
  const int64_t size = element_size(args.B.dtype);
  const unsigned row_bytes = static_cast<unsigned>(args.B.cols * size);
  const unsigned lines = row_bytes / line + 2;  // rows may start anywhere
  for (unsigned e = thread; e < rows * lines; e += kDecodeThreads) {
    const unsigned wanted = e % lines * line, byte = wanted < row_bytes ? wanted : row_bytes - 1;
    if (row0 + e / lines < args.w.N)
      ptx::prefetch(static_cast<const unsigned char*>(args.B.data) +
                    (row0 + e / lines) * args.B.stride * size + byte);
  }
}

// y of the rows from row0: this thread's row of them and its tokens, whose sums of the base it
// gives. `scratch` is free shared memory.
template <int rows, int outputs>
__device__ __forceinline__ void finish(const DecodeArgs& args, int64_t row0,
                                       const float (&base)[outputs], float* scratch) {
  constexpr unsigned step = kDecodeThreads / rows;
  const unsigned thread = threadIdx.x, row = thread % rows, first = thread / rows;
  const unsigned M = static_cast<unsigned>(args.x.rows);
  const int64_t n = row0 + row, R = args.B.cols;
  const float bias =
      args.bias.data && n < args.w.N ? load_one(args.bias.data, args.bias.dtype, n) : 0.0f;
  float adapter[outputs] = {};
  float* const b_rows = scratch;                      // [row][rank]
  float* const s_rows = scratch + rows * kRankPitch;  // [token][rank]
  for (int64_t r0 = 0; args.B.data && r0 < R; r0 += kRankStep) {
    for (unsigned e = thread; e < rows * kRankStep; e += kDecodeThreads) {
      const int64_t r = r0 + e % kRankStep, b_row = row0 + e / kRankStep;
      b_rows[e / kRankStep * kRankPitch + e % kRankStep] =
          r < R && b_row < args.w.N ? load_one(args.B.data, args.B.dtype, b_row * args.B.stride + r)
                                    : 0.0f;
    }
    for (unsigned e = thread; e < M * kRankStep; e += kDecodeThreads) {
      const int64_t r = r0 + e % kRankStep;
      s_rows[e] = r < R ? args.s[e / kRankStep * R + r] : 0.0f;
    }
    __syncthreads();
    const int ranks = static_cast<int>(min64(kRankStep, R - r0));
    for (int r = 0; r < ranks; r += 4) {
      const float4 b = ptx::load<float4>(b_rows + row * kRankPitch + r);
#pragma unroll
      for (int j = 0; j < outputs; ++j) {
        if (first + j * step >= M) break;
        const float4 s = ptx::load<float4>(s_rows + (first + j * step) * kRankStep + r);
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
    if (args.bias.data) v = __fadd_rn(v, bias);
    store_one(args.y.data, args.y.dtype, int64_t{m} * args.y.stride + n, v);
  }
}

template <class T, int token_tiles, int row_tiles>
__global__ void __launch_bounds__(kDecodeThreads,
                                  (DecodeTile<token_tiles, row_tiles>::blocks_per_multiprocessor))
    decode_product(DecodeArgs args) {
  using Tile = DecodeTile<token_tiles, row_tiles>;
  unsigned char* const shared = ptx::shared_memory();
  float* const nested_code = reinterpret_cast<float*>(shared + kNestedCodeAt);
  // Unsigned, so that division and remainder are a shift and a mask.
  const unsigned thread = threadIdx.x, lane = ptx::lane(), warp = thread / 32;
  const unsigned group = warp / kDecodeSlices, slice = warp % kDecodeSlices;
  const int64_t row0 = int64_t{blockIdx.x} * Tile::rows;
  const unsigned group_row = group * 16 * row_tiles;

  // Everything that comes from far is asked for before the tables are made.
  const int part = static_cast<int>(blockIdx.y);
  const int nth = part * kDecodeSlices + static_cast<int>(slice);
  DecodeWarp<T, token_tiles, row_tiles> work(args, row0 + group_row, args.first_chunk(nth),
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
    for (int i = 1; i < kDecodeSlices; ++i)
      base[j] = __fadd_rn(base[j], from[i * Tile::tokens * Tile::sum_pitch]);
  }

  // Even if only parts are written: who waits for this kernel counts on S as well.
  ptx::wait_for_previous_kernel();
  if (!args.parts) return finish<Tile::rows>(args, row0, base, sums + Tile::sums);
  if (row0 + row >= args.w.N) return;
#pragma unroll
  for (int j = 0; j < Tile::outputs; ++j) {
    const int64_t m = first + j * Tile::step;
    if (m < args.x.rows) args.parts[(part * args.x.rows + m) * args.w.N + row0 + row] = base[j];
  }
}

constexpr int kFinishRows = 32, kFinishOutputs = kMaxDecodeRows * kFinishRows / kDecodeThreads;
constexpr int kFinishShared = (kFinishRows * kRankPitch + kMaxDecodeRows * kRankStep) * 4;

// The parts in their order, then as without parts.
__global__ void __launch_bounds__(kDecodeThreads) decode_finish(DecodeArgs args, int parts) {
  constexpr int step = kDecodeThreads / kFinishRows;
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
    base[j] = args.parts[m * args.w.N + n];
    for (int part = 1; part < parts; ++part)
      base[j] = __fadd_rn(base[j], args.parts[(part * args.x.rows + m) * args.w.N + n]);
  }
  finish<kFinishRows>(args, row0, base, reinterpret_cast<float*>(ptx::shared_memory()));
}

// -- S --------------------------------------------------------------------------------------------

constexpr int kShrinkThreads = 512, kShrinkRanks = 4, kShrinkTokens = 4;
constexpr int kShrinkShared = kShrinkThreads / 32 * kShrinkRanks * kShrinkTokens * 4;

// Four 16-bit elements.
__device__ __forceinline__ void widen_four(uint2 u, DType t, float (&v)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const uint16_t h = static_cast<uint16_t>((j < 2 ? u.x : u.y) >> (16 * (j % 2)));
    v[j] = t == DType::bf16 ? ptx::widen<Bf16>(h) : ptx::widen<F16>(h);
  }
}

// Four elements from element i.
__device__ __forceinline__ void load_four(const Matrix& m, int64_t i, bool aligned, float (&v)[4]) {
  if (!aligned) {
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = load_one(m.data, m.dtype, i + j);
  } else if (m.dtype == DType::f32) {
    const float4 f = ptx::load_const<float4>(static_cast<const float*>(m.data) + i);
    v[0] = f.x, v[1] = f.y, v[2] = f.z, v[3] = f.w;
  } else {
    widen_four(ptx::load_const<uint2>(static_cast<const uint16_t*>(m.data) + i), m.dtype, v);
  }
}

// S = dropout(x) Aᵀ for 4 ranks x 4 tokens per block, in float32. Threads share the columns by
// fours, two fours at a time, so that up to 4096 columns are one trip to memory.
__global__ void __launch_bounds__(kShrinkThreads)
    decode_shrink(Matrix x, Matrix A, Dropout dropout, bool aligned, float* s) {
  ptx::start_next_kernel();
  constexpr int fours = 2, span = 4 * kShrinkThreads;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32, warp = thread / 32;
  const int64_t r0 = int64_t{blockIdx.x} * kShrinkRanks, m0 = int64_t{blockIdx.y} * kShrinkTokens;
  const int tokens = static_cast<int>(min64(kShrinkTokens, x.rows - m0));
  float sum[kShrinkTokens][kShrinkRanks] = {};
  for (int64_t k0 = 4 * thread; k0 < x.cols; k0 += fours * span) {
    float a[fours][kShrinkRanks][4] = {};
    uint2 packed_x[fours][kShrinkTokens] = {};
#pragma unroll
    for (int f = 0; f < fours; ++f) {
      const int64_t k = k0 + f * span;
      if (k >= x.cols) break;
#pragma unroll
      for (int r = 0; r < kShrinkRanks; ++r)  // ranks that do not exist repeat the last
        load_four(A, min64(r0 + r, A.rows - 1) * A.stride + k, aligned, a[f][r]);
#pragma unroll
      for (int m = 0; m < kShrinkTokens; ++m)
        if (m < tokens)
          packed_x[f][m] = ptx::load_const<uint2>(static_cast<const uint16_t*>(x.data) +
                                                  (m0 + m) * x.stride + k);
    }
#pragma unroll
    for (int f = 0; f < fours; ++f)
#pragma unroll
      for (int m = 0; m < kShrinkTokens; ++m) {
        if (m >= tokens || k0 + f * span >= x.cols) break;
        float v[4];
        widen_four(packed_x[f][m], x.dtype, v);
        drop_four(dropout, m0 + m, k0 + f * span, v);
#pragma unroll
        for (int r = 0; r < kShrinkRanks; ++r)
#pragma unroll
          for (int j = 0; j < 4; ++j) sum[m][r] = __fmaf_rn(v[j], a[f][r][j], sum[m][r]);
      }
  }

  float* const warps = reinterpret_cast<float*>(ptx::shared_memory());  // [warp][token][rank]
#pragma unroll
  for (int m = 0; m < kShrinkTokens; ++m) {
    if (m >= tokens) break;
#pragma unroll
    for (int r = 0; r < kShrinkRanks; ++r) {
#pragma unroll
      for (int other = 16; other > 0; other /= 2)
        sum[m][r] = __fadd_rn(sum[m][r], ptx::shuffle_xor(sum[m][r], other));
      if (lane == 0) warps[(warp * kShrinkTokens + m) * kShrinkRanks + r] = sum[m][r];
    }
  }
  __syncthreads();
  const int m = thread / kShrinkRanks, r = thread % kShrinkRanks;
  if (m >= tokens || r0 + r >= A.rows) return;
  float total = 0.0f;
  for (int i = 0; i < kShrinkThreads / 32; ++i)
    total = __fadd_rn(total, warps[i * kShrinkTokens * kShrinkRanks + thread]);
  s[(m0 + m) * A.rows + r0 + r] = dropout.threshold ? __fmul_rn(total, dropout.scale) : total;
}

}  // namespace lk::cuda
