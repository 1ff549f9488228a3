// The skinny products of an adapter: a tall matrix of activations, read once, times matrices that
// are at most 16 wide per pass.
//
//   row product      rows[m, r]    = Σ_c act[m, c] P[c, r]    S (P = Aᵀ), dS (P = B)
//   column product   columns[c, r] = Σ_m act[m, c] Q[m, r]    dB (Q = S), dAᵀ (Q = dS)
//
// act is x, under dropout or not, or dy; a column of ones beside Q gives dbias. A block owns 256
// columns of a range of rows and walks down the rows; its part of P stays in shared memory, its
// column sums stay in registers:
//
//              256 columns (strip)
//            | warp 0 | 1 | 2 | 3 |   each warp: 64 columns = 4 slices of 16
//   32 rows  |   tile in the ring |   -> row product, added over the warps    -> partial[strip]
//   32 rows  |        ...         |
//              column product, in registers until the last row                -> partial[range]
//
// A second kernel adds the partial sums in their order. The strips are the same for every number of
// rows, so the bits of a row of S and dS depend on that row alone.
//
// Partial sums are [part][pass][row or column][16], float32.
//
// Everything is as accurate as float32: a 16-bit activation is exact in a matrix instruction, the
// other operand is a sum of parts that are (see Parts).
#pragma once

#include "cuda/kernels/lora_parts.cuh"

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
  bool exact = false;  // its elements are exact in one part
};

// Q[m, r], dense.
struct SkinnyColumns {
  const float* data = nullptr;  // null: zeros
  int R = 0;
  bool ones = false;  // followed by a column of ones, r = R
};

struct SkinnyArgs {
  Matrix act;
  int64_t first_row = 0;  // of act, for dropout
  Dropout dropout;        // its scale is applied to the sums
  SkinnyRows p;
  SkinnyColumns q;
  float *row_partial = nullptr, *column_partial = nullptr;
  int row_passes = 0, column_passes = 0;
  // Blocks are numbered pass first: those that read the same activations run at the same time, and
  // all but one find them in the second-level cache.
  int first_pass = 0, passes = 0, strips = 0;
  int range = 0;  // rows of a block, a multiple of kLoraRows
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
  // Of the tile's element in the fragments.
  __device__ int at(int k16, int r8) const { return place + (k16 * kFragmentTiles + r8) * 128; }
};

template <DType dtype>
__device__ __forceinline__ void stage_p_as(const SkinnyRows& p, int c0, int columns, int r0,
                                           float* to) {
  const Staged s;
  constexpr int tiles = kLoraColumns / 16, batch = 8;
  int c = c0 + s.k;
  int64_t i = c * p.c_stride + (r0 + s.r) * p.r_stride;
#pragma unroll 1
  for (int t0 = 0; t0 < tiles; t0 += batch) {
    float v[batch][kFragmentTiles];  // loads first: they wait together
#pragma unroll
    for (int t = 0; t < batch; ++t) {
#pragma unroll
      for (int r = 0; r < kFragmentTiles; ++r) {
        const bool inside = c < columns && r0 + s.r + 8 * r < p.R;
        v[t][r] = inside ? load_one(p.data, dtype, i + 8 * r * p.r_stride) : 0.0f;
      }
      c += 16;
      i += 16 * p.c_stride;
    }
#pragma unroll
    for (int t = 0; t < batch; ++t)
#pragma unroll
      for (int r = 0; r < kFragmentTiles; ++r) to[s.at(t0 + t, r)] = v[t][r];
  }
}

// The strip's part of P, from column c0 of the activations on.
__device__ __forceinline__ void stage_p(const SkinnyRows& p, int c0, int columns, int r0,
                                        float* to) {
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

  // Rows [m0, end), at most 32.
  __device__ void load(const SkinnyColumns& q, int m0, int end, int r0) {
    const Staged s;
    const int64_t first = int64_t{m0 + s.k} * q.R + r0 + s.r;
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int r8 = 0; r8 < kFragmentTiles; ++r8) {
        const int r = r0 + s.r + 8 * r8;
        const bool inside = m0 + s.k + 16 * m < end;
        v[m][r8] = inside && q.ones && r == q.R ? 1.0f : 0.0f;
        if (inside && q.data && r < q.R)
          v[m][r8] = ptx::load<float>(q.data + first + 16 * m * q.R + 8 * r8);
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

  // Dropout on what this thread has copied, so no other thread need have arrived.
  __device__ void drop(unsigned char* tile, int64_t row0, uint64_t seed, uint32_t threshold) const {
    if (column >= act.cols) return;
#pragma unroll 1
    for (int i = 0; i < kCount; ++i) {
      unsigned char* chunk = tile + offset(i);
      const uint4 v = ptx::load<uint4>(chunk);
      uint32_t word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Words4 random =
            philox(seed, row0 + first_row + i * kLoraWarps, static_cast<uint32_t>(column / 4 + h));
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

  static __device__ void load_parts(Parts<T> (&parts)[kR], const float* fragments, int k16) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int r = 0; r < kR; ++r)
      parts[r].set(ptx::load<float4>(fragments + 4 * ((k16 * kR + r) * 32 + lane)));
  }

  // This warp's columns of the row product.
  static __device__ void add_rows(Rows& rows, unsigned char* tile, const float* p, bool exact) {
    const MatrixOffset offset(false);
    const int slice0 = static_cast<int>(threadIdx.x) / 32 * kLoraSlices;
#pragma unroll 2
    for (int s = 0; s < kLoraSlices; ++s) {
      Parts<T> parts[kR];
      load_parts(parts, p, slice0 + s);
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        uint32_t d[4];
        ptx::load_matrices(d, tile + offset.at(m, s));
        const Activations<T> a(d);
#pragma unroll
        for (int r = 0; r < kR; ++r) multiply(rows[m][r], a, parts[r], exact);
      }
    }
  }

  // The column product of this warp's columns.
  static __device__ void add_columns(Columns& columns, unsigned char* tile, const float* q) {
    const MatrixOffset offset(true);
#pragma unroll 1
    for (int m = 0; m < kM; ++m) {
      Parts<T> parts[kR];
      load_parts(parts, q, m);
#pragma unroll
      for (int s = 0; s < kLoraSlices; ++s) {
        uint32_t d[4];
        ptx::load_matrices_transposed(d, tile + offset.at(m, s));
        const Activations<T> a(d);
#pragma unroll
        for (int r = 0; r < kR; ++r) multiply(columns[s][r], a, parts[r], false);
      }
    }
  }
};

// -- partial sums out -----------------------------------------------------------------------------

// The warp's row sums into `sums`, [warp][16 rows, 8 r][lane] float4 in the order of the result's
// fragment.
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

// Adds the warps' row sums in their order; to[row][16], rows before `count`.
__device__ __forceinline__ void write_rows(const float* sums, float* to, int count) {
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
  to += row * kLoraPass + fragment % kFragmentTiles * 8 + 2 * t;
  if (row < count) ptx::store(to, make_float2(sum.x, sum.y));
  if (row + 8 < count) ptx::store(to + 8 * kLoraPass, make_float2(sum.z, sum.w));
}

// to[column][16], columns before `count`.
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

// -- kernels --------------------------------------------------------------------------------------

// How many blocks are meant to run on one multiprocessor at a time.
constexpr int lora_residents(bool rows, bool columns) { return rows && columns ? 2 : 3; }

// Shared memory: | P | row sums of the warps | Q, two | ring |, without what is not needed.
constexpr size_t lora_shared_bytes(bool rows, bool columns) {
  return (rows ? kLoraPBytes + kLoraSumBytes : 0) + (columns ? 2 * kLoraQBytes : 0) +
         kLoraStages * kLoraTileBytes;
}

template <class T, bool kRowProduct, bool kColumnProduct>
__global__ void __launch_bounds__(kLoraThreads, lora_residents(kRowProduct, kColumnProduct))
    skinny_products(SkinnyArgs args) {
  float* p = reinterpret_cast<float*>(ptx::shared_memory());
  float* sums = p + (kRowProduct ? kLoraPBytes / 4 : 0);
  float* q = sums + (kRowProduct ? kLoraSumBytes / 4 : 0);
  unsigned char* ring =
      reinterpret_cast<unsigned char*>(q + (kColumnProduct ? 2 * kLoraQBytes / 4 : 0));
  const auto slot = [ring](int step) { return ring + step % kLoraStages * kLoraTileBytes; };

  const int pass = args.first_pass + static_cast<int>(blockIdx.x) % args.passes;
  const int strip = static_cast<int>(blockIdx.x) / args.passes % args.strips;
  const int split = static_cast<int>(blockIdx.x) / args.passes / args.strips;
  const int column0 = strip * kLoraColumns, r0 = pass * kLoraPass;
  const int rows = static_cast<int>(args.act.rows), cols = static_cast<int>(args.act.cols);
  const int row0 = split * args.range, end = rows - row0 < args.range ? rows : row0 + args.range;
  const int steps = (end - row0 + kLoraRows - 1) / kLoraRows;
  const Copier copier(args.act, column0, end);

  ptx::wait_for_previous_kernel();
#pragma unroll
  for (int s = 0; s < kLoraStages - 1; ++s) {
    if (s < steps) copier.issue(slot(s), row0 + s * kLoraRows);
    ptx::copy_async_commit();
  }
  QueuedRows queued;
  if constexpr (kColumnProduct) queued.load(args.q, row0, end, r0);
  if constexpr (kRowProduct) stage_p(args.p, column0, cols, r0, p);
  const uint64_t seed = args.dropout.threshold ? *args.dropout.seed : 0;

  typename Tile<T>::Columns columns;
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    const int row = row0 + step * kLoraRows;
    unsigned char* tile = slot(step);
    float* q_tile = q + step % 2 * (kLoraQBytes / 4);
    if constexpr (kColumnProduct) queued.store(q_tile);
    ptx::copy_async_wait<kLoraStages - 2>();
    if (args.dropout.threshold)
      copier.drop(tile, args.first_row + row, seed, args.dropout.threshold);
    __syncthreads();  // the tile is there; the one before it has been used by all
    const int ahead = step + kLoraStages - 1;
    if (ahead < steps) copier.issue(slot(ahead), row0 + ahead * kLoraRows);
    ptx::copy_async_commit();
    if constexpr (kColumnProduct) {
      if (step + 1 < steps) queued.load(args.q, row + kLoraRows, end, r0);
      Tile<T>::add_columns(columns, tile, q_tile);
    }
    if constexpr (kRowProduct) {
      {
        typename Tile<T>::Rows rows;
        Tile<T>::add_rows(rows, tile, p, args.p.exact);
        leave_rows(rows, sums);
      }
      __syncthreads();
      if (pass < args.row_passes)
        write_rows(
            sums,
            args.row_partial +
                ((int64_t{strip} * args.row_passes + pass) * args.act.rows + row) * kLoraPass,
            end - row);
    }
  }
  ptx::start_next_kernel();
  if constexpr (kColumnProduct)
    write_columns(
        columns,
        args.column_partial +
            ((int64_t{split} * args.column_passes + pass) * args.act.cols + column0) * kLoraPass,
        cols - column0);
}

// out[i, r] = scale Σ_part partial[part][r / 16][i][r % 16], and the same without scale into
// after[i] for r = R.
struct PartialSums {
  const float* partial = nullptr;
  int parts = 0, passes = 0;
  int first_pass = 0;  // those before it are not wanted
  int64_t items = 0;   // i
  int64_t R = 0;
  float scale = 1.0f;
  void *out = nullptr, *after = nullptr;  // null: not wanted
  DType out_dtype = DType::f32, after_dtype = DType::f32;
  int64_t item_stride = 0, r_stride = 0;  // of out

  LK_ANYWHERE int64_t blocks() const { return (passes - first_pass) * ceil_div(items, 16); }
};

// A block adds 16 items x 16 ranks. Two jobs, so that one launch does all that a product left.
__global__ void __launch_bounds__(256) add_partials(PartialSums first, PartialSums second) {
  ptx::wait_for_previous_kernel();
  const int64_t first_blocks = first.blocks();
  const bool is_first = blockIdx.x < first_blocks;
  const PartialSums job = is_first ? first : second;
  const int64_t block = is_first ? blockIdx.x : blockIdx.x - first_blocks;
  const int64_t per_pass = ceil_div(job.items, 16), pass = job.first_pass + block / per_pass;
  const int64_t item = block % per_pass * 16 + threadIdx.x / 16;
  const int64_t r = pass * kLoraPass + threadIdx.x % 16;
  if (item >= job.items) return;
  const bool is_out = r < job.R && job.out, is_after = r == job.R && job.after;
  if (!is_out && !is_after) return;
  const float* from = job.partial + (pass * job.items + item) * kLoraPass + threadIdx.x % 16;
  const int64_t step = job.passes * job.items * kLoraPass;
  float sum = 0.0f;
#pragma unroll 8
  for (int part = 0; part < job.parts; ++part) sum += from[part * step];
  if (is_out)
    store_one(job.out, job.out_dtype, item * job.item_stride + r * job.r_stride, job.scale * sum);
  else
    store_one(job.after, job.after_dtype, item, sum);
}

}  // namespace lk::cuda
