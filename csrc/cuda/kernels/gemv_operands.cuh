// What the gemv kernel multiplies: packed weights on their way through shared memory, their
// scales, and the activations, each as the lanes of a warp hold them.
#pragma once

#include "cuda/elements.cuh"

namespace lk::cuda {

constexpr int kGemvBlock = 64;    // columns summed before they are scaled
constexpr int kGemvChunk = 256;   // columns of one step of the ring
constexpr int kChunkBlocks = 4;   // one per lane of a quad, for the scales
constexpr int kChunkBytes = 128;  // of one row

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

  // Starts copying the next chunk. Rows and columns that do not exist become zeros.
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
struct TokenRows {
  static constexpr int ahead = token_tiles == 4 ? 4 : 2;
  static_assert(kChunkBlocks * token_tiles % ahead == 0);
  const unsigned char* chunk;  // the lane's 32 bytes of the present chunk's block 0 in row 0
  unsigned g, last, pitch;     // its token of tile 0, the last token, bytes between rows
  uint4 operand[ahead][2];

  __device__ TokenRows(const Matrix& x, int first_chunk, unsigned lane) {
    chunk = static_cast<const unsigned char*>(x.data) + int64_t{first_chunk} * (2 * kGemvChunk) +
            32 * (lane % 4);
    g = lane / 4;
    last = static_cast<unsigned>(x.rows) - 1;
    pitch = static_cast<unsigned>(x.stride) * 2;
  }

  // The place of the operand of this block of the chunk and token tile.
  __device__ static int slot(int block, int tile) {
    return token_tiles % ahead == 0 ? tile % ahead : (block * token_tiles + tile) % ahead;
  }

  // Loads the operand, if its block is among the `left` ones of the chunk that exist.
  __device__ void fetch(int block, int tile, int left) {
    if (block >= left) return;
    const unsigned wanted = 8 * tile + g, token = wanted < last ? wanted : last;
    const unsigned char* p = chunk + uint64_t{token} * pitch + block * (2 * kGemvBlock);
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

}  // namespace lk::cuda
