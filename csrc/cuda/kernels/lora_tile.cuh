// Tiles of activations in shared memory, and what they are multiplied by: the pieces of the skinny
// products of one adapter (lora.cuh) and of many (multi.cuh).
#pragma once

#include "cuda/kernels/lora_split.cuh"

namespace lk::cuda {

constexpr int kLoraWarps = 4, kLoraThreads = 32 * kLoraWarps;
constexpr int kLoraRows = 32;                                // of a tile
constexpr int kLoraColumns = 256;                            // of a tile and a strip
constexpr int kLoraSlices = kLoraColumns / 16 / kLoraWarps;  // of one warp
constexpr int kLoraPass = 16;                                // ranks
constexpr int kLoraStages = 3;                               // tiles in the ring
constexpr int kLoraChunks = kLoraColumns / 8;                // of 16 bytes in a row of a tile
constexpr int kLoraTileBytes = kLoraRows * kLoraColumns * 2;
static_assert(kLoraChunks == 32, "a warp copies one row at a time, a lane one chunk of it");

// P[c, r].
struct SkinnyRows {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t c_stride = 0, r_stride = 0, R = 0;
  bool exact = false;  // its elements are exact in one split

  __device__ int64_t at(int r) const { return r * r_stride; }
};

// Q[m, r], dense.
struct SkinnyColumns {
  const float* data = nullptr;  // null: zeros
  int R = 0;
  bool ones = false;  // followed by a column of ones, r = R

  __device__ const float* row(int m) const { return data + int64_t{m} * R; }
};

// -- operands in fragment order -------------------------------------------------------------------
// A tile of 16 k x 8 r is 32 lanes x float4; g = lane / 4, t = lane % 4:
//
//   lane | (2t, g) (2t+1, g) (2t+8, g) (2t+9, g) |
//
// tiles in the order [k / 16][r / 8]. As bfloat16 pairs these are b0 and b1 of one m16n8k16. As
// tf32 they are two m16n8k8, whose k-slots t and t+4 stand for k = 2t and 2t+1 in both operands, so
// that the 16-bit pairs of the activations serve as well.

constexpr int kFragmentTiles = kLoraPass / 8;      // side by side
constexpr int kFragmentRow = kFragmentTiles * 32;  // float4 of 16 k
constexpr int kLoraPBytes = kLoraColumns / 16 * kFragmentRow * 16;
constexpr int kLoraQBytes = kLoraRows / 16 * kFragmentRow * 16;  // one of two
constexpr int kLoraSumBytes = kLoraWarps * kLoraRows * kLoraPass * 4;

// The element of each tile that a thread stages: 16 k x 2 r per warp, which are 32 banks.
struct Staged {
  int k, r, place;

  __device__ Staged() {
    static_assert(kLoraThreads == 16 * 8, "one element per thread");
    const int thread = static_cast<int>(threadIdx.x);
    k = thread % 16;
    r = thread / 16;
    place = (r * 4 + k % 8 / 2) * 4 + k / 8 * 2 + k % 2;
  }
  // The place of the tile's element in the fragments.
  __device__ int at(int k16, int r8) const { return place + (k16 * kFragmentTiles + r8) * 128; }
};

template <DType dtype, class P>
__device__ __forceinline__ void stage_p_as(const P& p, int c0, int columns, int r0, float* to) {
  const Staged s;
  constexpr int tiles = kLoraColumns / 16, batch = 8;
  int c = c0 + s.k;
  bool exists[kFragmentTiles];
  int64_t i[kFragmentTiles];
#pragma unroll
  for (int r = 0; r < kFragmentTiles; ++r) {
    exists[r] = r0 + s.r + 8 * r < p.R;
    i[r] = c * p.c_stride + (exists[r] ? p.at(r0 + s.r + 8 * r) : 0);
  }
#pragma unroll 1
  for (int t0 = 0; t0 < tiles; t0 += batch) {
    float v[batch][kFragmentTiles];  // loads first: they wait together
#pragma unroll
    for (int t = 0; t < batch; ++t) {
#pragma unroll
      for (int r = 0; r < kFragmentTiles; ++r) {
        v[t][r] = c < columns && exists[r] ? load_one(p.data, dtype, i[r]) : 0.0f;
        i[r] += 16 * p.c_stride;
      }
      c += 16;
    }
#pragma unroll
    for (int t = 0; t < batch; ++t)
#pragma unroll
      for (int r = 0; r < kFragmentTiles; ++r) to[s.at(t0 + t, r)] = v[t][r];
  }
}

// Stages the strip's share of P, from column c0 of the activations on.
template <class P>
__device__ __forceinline__ void stage_p(const P& p, int c0, int columns, int r0, float* to) {
  switch (p.dtype) {
    case DType::f32:
      return stage_p_as<DType::f32>(p, c0, columns, r0, to);
    case DType::bf16:
      return stage_p_as<DType::bf16>(p, c0, columns, r0, to);
    default:
      return stage_p_as<DType::f16>(p, c0, columns, r0, to);
  }
}

// 32 rows of Q, which pass through registers a tile ahead of their use. Not load_const: the kernel
// before may still be writing Q when this one starts.
struct QueuedRows {
  static constexpr int kM = kLoraRows / 16;
  float v[kM][kFragmentTiles];

  // Loads rows [m0, end), at most 32.
  template <class Q>
  __device__ void load(const Q& q, int m0, int end, int r0) {
    const Staged s;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
      const bool inside = m0 + s.k + 16 * m < end;
      const float* row = inside && q.data ? q.row(m0 + s.k + 16 * m) : nullptr;
#pragma unroll
      for (int r8 = 0; r8 < kFragmentTiles; ++r8) {
        const int r = r0 + s.r + 8 * r8;
        v[m][r8] = inside && q.ones && r == q.R ? 1.0f : 0.0f;
        if (row && r < q.R) v[m][r8] = ptx::load<float>(row + r);
      }
    }
  }
  __device__ void store(float* to) const {
    const Staged s;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r8 = 0; r8 < kFragmentTiles; ++r8) to[s.at(m, r8)] = v[m][r8];
  }
};

// -- the ring of activations ----------------------------------------------------------------------
// A tile in shared memory: 32 rows of 32 chunks of 8 elements. Chunk c of row m is at place
// c ^ (m & 7), so that the 8 rows of one chunk, which ldmatrix reads together, are in 8 different
// groups of four banks.
//
//   row 0  | 0 1 2 3 4 5 6 7 | 8 9 ...
//   row 1  | 1 0 3 2 5 4 7 6 | 9 8 ...
//   row 2  | 2 3 0 1 6 7 4 5 | 10 11 ...

__device__ __forceinline__ int chunk_offset(int row, int chunk) {
  return row * (kLoraChunks * 16) + (chunk ^ (row & 7)) * 16;
}

// What one thread copies of every tile: its lane's chunk of every fourth row. Row and column have
// been folded into one offset, from which the others differ in few bits, to save registers.
struct Copier {
  const Matrix& act;
  int column;  // of its chunk
  int end;     // of the rows
  int first_row, first_offset;

  __device__ Copier(const Matrix& act, int column0, int end)
      : act(act),
        column(column0 + static_cast<int>(threadIdx.x) % 32 * 8),
        end(end),
        first_row(static_cast<int>(threadIdx.x) / 32),
        first_offset(chunk_offset(first_row, static_cast<int>(threadIdx.x) % 32)) {}

  static constexpr int kCount = kLoraRows / kLoraWarps;
  __device__ int offset(int i) const {
    static_assert(kLoraWarps == 4, "bit 2 of the row is bit 0 of i");
    return (first_offset ^ (i & 1) * 64) + i * (kLoraWarps * kLoraChunks * 16);
  }

  __device__ void issue(unsigned char* tile, int row0) const {
    const uint16_t* data = static_cast<const uint16_t*>(act.data);
    const uint16_t* from = data + int64_t{row0 + first_row} * act.stride + column;
    const int left = column < act.cols ? end - row0 : 0;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const bool valid = first_row + i * kLoraWarps < left;
      ptx::copy_async(tile + offset(i), valid ? from : data, valid);
      from += kLoraWarps * act.stride;
    }
  }

  // Copies a tile whose rows are rows numbers[row0].. of the activations.
  __device__ void issue(unsigned char* tile, const int32_t* numbers, int row0) const {
    const uint16_t* data = static_cast<const uint16_t*>(act.data);
    const int left = column < act.cols ? end - row0 : 0;
    int64_t from[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int row = first_row + i * kLoraWarps;
      from[i] =
          row < left ? ptx::load_const<int32_t>(numbers + row0 + row) * act.stride + column : 0;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i)
      ptx::copy_async(tile + offset(i), data + from[i], first_row + i * kLoraWarps < left);
  }

  // Applies dropout to what this thread has copied, so no other thread need have arrived. number(i)
  // is the row of the activations that row i of the tile is.
  template <class Number>
  __device__ void drop(unsigned char* tile, Number number, uint64_t seed,
                       uint32_t threshold) const {
    if (column >= act.cols) return;
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      const int64_t row = number(first_row + i * kLoraWarps);
      unsigned char* chunk = tile + offset(i);
      const uint4 v = ptx::load<uint4>(chunk);
      uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Words4 random = philox(seed, row, static_cast<uint32_t>(column / 4 + h));
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (random.word[e] < threshold) word[2 * h + e / 2] &= e % 2 ? 0x0000ffffu : 0xffff0000u;
      }
      ptx::store(chunk, make_uint4(word[0], word[1], word[2], word[3]));
    }
  }
};

// -- tiles ----------------------------------------------------------------------------------------

// The lane's offset for ldmatrix of 16 x 16 activations, in the order of the first operand:
// matrices (0, 0) (8, 0) (0, 8) (8, 8), (row, column) of the operand; where rows are columns, the
// middle two change places. This is the first of the warp's slices; at(m, s) the s-th, 16 m rows
// below.
struct MatrixOffset {
  int first;

  __device__ explicit MatrixOffset(bool transposed) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    const int low = lane / 8 % 2, high = lane / 16;
    const int row = lane % 8 + 8 * (transposed ? high : low);
    first = chunk_offset(row, warp * (2 * kLoraSlices) + (transposed ? low : high));
  }
  __device__ int at(int m, int s) const {
    static_assert(kLoraSlices == 4, "two chunks each: s is bits 1 and 2 of the chunk");
    return (first ^ s * 32) + m * (16 * kLoraChunks * 16);
  }
};

template <class T>
struct Tile {
  static constexpr int kM = kLoraRows / 16, kR = kFragmentTiles;
  using Rows = Sum[kM][kR];
  using Columns = Sum[kLoraSlices][kR];

  static __device__ void load_splits(Splits<T> (&splits)[kR], const float* fragments, int k16) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int r = 0; r < kR; ++r)
      splits[r].set(ptx::load<float4>(fragments + 4 * ((k16 * kR + r) * 32 + lane)));
  }

  // Adds the row product of this warp's columns.
  static __device__ void add_rows(Rows& rows, unsigned char* tile, const float* p, bool exact) {
    const MatrixOffset offset(false);
    const int slice0 = static_cast<int>(threadIdx.x) / 32 * kLoraSlices;
#pragma unroll 2
    for (int s = 0; s < kLoraSlices; ++s) {
      Splits<T> splits[kR];
      load_splits(splits, p, slice0 + s);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t d[4];
        ptx::load_matrices(d, tile + offset.at(m, s));
        const Activations<T> a(d);
#pragma unroll
        for (int r = 0; r < kR; ++r) multiply(rows[m][r], a, splits[r], exact);
      }
    }
  }

  // Adds the column product of this warp's columns.
  static __device__ void add_columns(Columns& columns, unsigned char* tile, const float* q) {
    const MatrixOffset offset(true);
#pragma unroll 1
    for (int m = 0; m < kM; ++m) {
      Splits<T> splits[kR];
      load_splits(splits, q, m);
#pragma unroll
      for (int s = 0; s < kLoraSlices; ++s) {
        uint32_t d[4];
        ptx::load_matrices_transposed(d, tile + offset.at(m, s));
        const Activations<T> a(d);
#pragma unroll
        for (int r = 0; r < kR; ++r) multiply(columns[s][r], a, splits[r], false);
      }
    }
  }
};

// -- partial sums out -----------------------------------------------------------------------------

// Writes the warp's row sums to `sums`, [warp][16 rows, 8 r][lane] float4 in the order of the
// result's fragment.
template <class Rows>
__device__ __forceinline__ void leave_rows(const Rows& rows, float* sums) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  float* to = sums + warp * (kLoraRows * kLoraPass) + 4 * lane;
#pragma unroll
  for (int m = 0; m < kLoraRows / 16; ++m)
#pragma unroll
    for (int r = 0; r < kFragmentTiles; ++r)
      ptx::store(
          to + (m * kFragmentTiles + r) * 128,
          make_float4(rows[m][r].at(0), rows[m][r].at(1), rows[m][r].at(2), rows[m][r].at(3)));
}

// Adds the warps' row sums in their order; write(row, r, sums of ranks r and r + 1) for rows before
// `count`.
template <class Write>
__device__ __forceinline__ void write_rows(const float* sums, int count, Write write) {
  constexpr int pieces = kLoraRows * kLoraPass / 4;
  static_assert(pieces == kLoraThreads, "one float4 per thread");
  const int thread = static_cast<int>(threadIdx.x), g = thread % 32 / 4, t = thread % 4;
  float4 sum = ptx::load<float4>(sums + 4 * thread);
#pragma unroll
  for (int w = 1; w < kLoraWarps; ++w) {
    const float4 v = ptx::load<float4>(sums + 4 * (w * pieces + thread));
    sum = make_float4(sum.x + v.x, sum.y + v.y, sum.z + v.z, sum.w + v.w);
  }
  const int fragment = thread / 32, row = fragment / kFragmentTiles * 16 + g;
  const int r = fragment % kFragmentTiles * 8 + 2 * t;
  if (row < count) write(row, r, make_float2(sum.x, sum.y));
  if (row + 8 < count) write(row + 8, r, make_float2(sum.z, sum.w));
}

// Writes to[column][16] for columns before `count`.
template <class Columns>
__device__ __forceinline__ void write_columns(const Columns& columns, float* to, int count) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int s = 0; s < kLoraSlices; ++s)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int column = (warp * kLoraSlices + s) * 16 + half * 8 + lane / 4;
      if (column >= count) continue;
#pragma unroll
      for (int r = 0; r < kFragmentTiles; ++r) {
        const Sum& sum = columns[s][r];
        ptx::store(to + column * kLoraPass + r * 8 + 2 * (lane % 4),
                   make_float2(sum.at(2 * half), sum.at(2 * half + 1)));
      }
    }
}

}  // namespace lk::cuda
