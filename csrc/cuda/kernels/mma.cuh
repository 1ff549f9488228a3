// y = x Wᵀ + adapter + bias and dx = dy W + adapter for tens to about a thousand rows: packed
// weights are decoded once per block into shared memory and multiplied by tensor cores.
//
//   out[i, o] = mask(i, o) scaling Σ_r s(i, r) factor(r, o) + Σ_d in[i, d] w(d, o) + bias[o]
//               (or, of many adapters, an addend in place of the first term)
//   w(d, o) = W[o, d] forward, W[d, o] backward
//
// A block of 8 warps makes a tile of `rows` x 128 outputs, or of one of split_k ranges of the
// depth: then float32 sums go to `partial`, and add_split_k() adds them in their order. In one step
// of the depth (64), between two barriers, all of this goes on at once:
//
//   step i           multiply activations i by decoded weights i
//   step i + 1       decode raw weights into the other of two decoded tiles
//   i + stages - 1   copy activations (cp.async)
//   i + stages       copy raw weights (cp.async)
//
// An element's sum is the first term, then the depth in order, 16 at a time: its bits depend
// on split_k, not on the tile's shape nor on other rows.
#pragma once

#include "cuda/epilogue.h"
#include "cuda/kernels/mma_adapter.cuh"
#include "cuda/kernels/mma_dequant.cuh"

namespace lk::cuda {

struct MmaArgs {
  Matrix in;  // [M, depth]
  Weight4 w;  // packed null: no base
  MmaAdapter adapter;
  EpilogueOperand addend;
  Vector bias;
  MutMatrix out;             // [M, outputs], dtype of `in`
  float* partial = nullptr;  // [split_k][M][partial_pitch]; null: split_k is 1
  int64_t partial_pitch = 0;
  int split_k = 1, split_steps = 0, steps = 0;  // split_steps: of each range but the last
};

// The order of tiles: 8 row tiles share a strip of the weight while it is in the second-level
// cache, and a group of 8 row tiles goes through all strips before the next group.
constexpr unsigned kMmaGroup = 8;

// Dynamic shared memory during the steps, in this order; the epilogue's tile takes its place.
//
//   tables                       mma_dequant.cuh
//   raw     [stages][16 bytes per thread]
//   decoded [2][16384 bytes]     mma_dequant.cuh
//   in      [stages][rows][64]   16-byte chunk c of row i at c ^ (i % 8)
template <class T_, bool backward_, int rows_>
struct MmaKind {
  using T = T_;
  static constexpr bool backward = backward_;
  static constexpr int rows = rows_;
  // Few rows are a matter of bytes on their way, many of shared memory per block. The sums of 128
  // rows, and what goes on beside them, do not fit into the registers of two blocks.
  static constexpr int stages = rows <= 16 ? 4 : 3;
  static constexpr int blocks_per_multiprocessor = rows <= 16 ? 3 : rows <= 64 ? 2 : 1;
  // Warps lie side by side along the rows and the outputs; each has fragments of 16 x 8 sums.
  static constexpr int warps_m = rows <= 16 ? 1 : 2, warps_n = 8 / warps_m;
  static constexpr int m = rows / warps_m / 16, n = kMmaOutputs / warps_n / 8;

  static constexpr int raw_at = kTableBytes;
  static constexpr int decoded_at = raw_at + stages * kRawBytes;
  static constexpr int in_at = decoded_at + 2 * kDecodedBytes;
  static constexpr int in_bytes = rows * kMmaDepth * 2;
  static constexpr int shared_bytes = in_at + stages * in_bytes;

  // 16 bytes more than a row, so that rows of a fragment lie in different banks.
  static constexpr int out_pitch = kMmaOutputs * 2 + 16;
  static constexpr int epilogue_bytes = rows * out_pitch;
  static_assert(kTableBytes % 128 == 0, "see MmaBase");
  static_assert(epilogue_bytes <= shared_bytes && shared_bytes <= 99 << 10, "fits every GPU");
};

struct MmaPlace {
  int64_t row, output;
};

template <class Kind>
__device__ __forceinline__ MmaPlace locate(const MmaArgs& a) {
  const unsigned row_tiles = static_cast<unsigned>(ceil_div(a.out.rows, Kind::rows));
  const unsigned strips = static_cast<unsigned>(ceil_div(a.out.cols, kMmaOutputs));
  const unsigned per_group = (row_tiles < kMmaGroup ? row_tiles : kMmaGroup) * strips;
  const unsigned group = blockIdx.x / per_group, i = blockIdx.x - group * per_group;
  const unsigned left = row_tiles - group * kMmaGroup;
  const unsigned height = left < kMmaGroup ? left : kMmaGroup;
  return {static_cast<int64_t>(group * kMmaGroup + i % height) * Kind::rows,
          static_cast<int64_t>(i / height) * kMmaOutputs};
}

// The place of this thread's warp in the tile, and of the thread in the warp.
template <class Kind>
struct MmaThread {
  int row, output, g, t, lane;

  __device__ MmaThread() {
    const int warp = static_cast<int>(threadIdx.x) / 32;
    lane = static_cast<int>(threadIdx.x) % 32;
    row = warp / Kind::warps_n * Kind::m * 16;
    output = warp % Kind::warps_n * Kind::n * 8;
    g = lane / 4;
    t = lane % 4;
  }
};

// -- the product with the base --------------------------------------------------------------------

template <class Kind>
class MmaBase {
 public:
  using T = typename Kind::T;
  using Sums = float[Kind::m][Kind::n][4];

  __device__ MmaBase(const MmaArgs& args, const MmaPlace& place)
      : a_(args), runs_(args.w, place.output) {
    const int thread = static_cast<int>(threadIdx.x), row = thread / 8, column = thread % 8 * 8;
    in_ = static_cast<const uint16_t*>(args.in.data) + (place.row + row) * args.in.stride + column;
    rows_left_ = static_cast<int>(min64(args.in.rows - place.row, Kind::rows)) - row;
    first_ = static_cast<int>(blockIdx.y) * args.split_steps;
    end_ = first_ + args.split_steps;
    if (end_ > args.steps) end_ = args.steps;
  }

  // Starts the first copies; whatever comes before run() hides them.
  __device__ void start() const {
    runs_.copy(first_, at(raw(0)));
#pragma unroll
    for (int i = 0; i < Kind::stages - 1; ++i) copy(first_ + i, i, (i + 1) % Kind::stages);
    fill_tables(a_.w, tables());
  }

  __device__ void run(Sums& sum) {
    scale_ = runs_.scale(first_);
    ptx::copy_async_wait<Kind::stages - 2>();
    __syncthreads();  // the tables; raw weights are this thread's own
    decode_first();
    int slot = 0;  // of step i, and of what is copied stages later
    for (int i = first_; i < end_; ++i) {
      ptx::copy_async_wait<Kind::stages - 2>();
      __syncthreads();  // activations and decoded weights of step i are there, i - 1 is done
      const int before = slot == 0 ? Kind::stages - 1 : slot - 1;
      const int after = slot == Kind::stages - 1 ? 0 : slot + 1;
      copy(i + Kind::stages - 1, before, slot);
      if (i + 1 < end_)
        step<true>(i, slot, after, sum);
      else
        step<false>(i, slot, after, sum);
      slot = after;
    }
  }

 private:
  // Bytes from the beginning of shared memory, multiples of 128. A chunk is selected by an
  // exclusive or on such an offset plus the row's.
  __device__ static int raw(int slot) { return Kind::raw_at + slot * kRawBytes; }
  __device__ static int decoded(int i) { return Kind::decoded_at + (i & 1) * kDecodedBytes; }
  __device__ static int in(int slot) { return Kind::in_at + slot * Kind::in_bytes; }

  __device__ static unsigned char* at(int offset) { return ptx::shared_memory() + offset; }
  __device__ static unsigned char* tables() { return at(0); }

  // Copies one group: activations of a step, raw weights of the next.
  __device__ void copy(int step, int in_slot, int raw_slot) const {
    if (step < end_) copy_in(step, at(in(in_slot)));
    if (step + 1 < end_) runs_.copy(step + 1, at(raw(raw_slot)));
    ptx::copy_async_commit();
  }

  // Copies zeros beyond the last row and the depth. Both sides have zeros there: none meets an
  // infinity.
  __device__ void copy_in(int step, unsigned char* dst) const {
    constexpr int at_once = kMmaThreads / 8;
    // Warps without a row here have nothing to copy: rows that are no output do not matter.
    if (Kind::rows < at_once && rows_left_ <= 0) return;
    // 16 bytes per thread: 8 chunks in a row. Chunk c of row r lies at c ^ (r % 8).
    const int linear = 16 * static_cast<int>(threadIdx.x);
    unsigned char* to = dst + (linear ^ (linear >> 3 & 0x70));
    const int64_t left = 2 * a_.in.cols - static_cast<int64_t>(step) * (2 * kMmaDepth);
    const int end = left < 2 * kMmaDepth ? static_cast<int>(left) : 2 * kMmaDepth;
    const int inside = end - (linear & 0x70), bytes = inside < 0 ? 0 : inside < 16 ? inside : 16;
    const uint16_t* from = in_ + static_cast<int64_t>(step) * kMmaDepth;
#pragma unroll
    for (int i = 0; i < Kind::rows; i += at_once) {
      if constexpr (Kind::backward)
        ptx::copy_async_part(to, from, i < rows_left_ ? bytes : 0);
      else  // whole runs of 32
        ptx::copy_async(to, from, i < rows_left_ && bytes);
      to += at_once * kMmaDepth * 2;
      from += at_once * a_.in.stride;
    }
  }

  // Returns the scale of the step that is decoded now; starts loading the one after it.
  __device__ float next_scale(int step) {
    const float scale = runs_.resolve(scale_, step, tables());
    scale_ = runs_.scale(step + 1);
    return scale;
  }

  __device__ void load_run(int raw_slot, uint32_t (&word)[4]) const {
    const uint4 words = ptx::load<uint4>(at(raw(raw_slot) + runs_.raw_at()));
    word[0] = words.x, word[1] = words.y, word[2] = words.z, word[3] = words.w;
  }

  __device__ void decode_first() {
    uint32_t word[4];
    load_run(0, word);
    const float scale = next_scale(first_);
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      float code[8];
      look_up(word[q], tables(), code);
      store_weights<T>(code, scale, at((decoded(first_) + runs_.chunk_at()) ^ (q * 16)));
    }
  }

  // Multiplies four times 16 of the depth, and between them decodes the four chunks of this
  // thread's next run.
  template <bool decodes>
  __device__ __forceinline__ void step(int i, int slot, int after, Sums& sum) {
    const int in_tile = in(slot) + in_fragment(), tile = decoded(i) + weight_fragment();
    const int next = decoded(i + 1) + runs_.chunk_at();
    uint32_t word[4] = {};
    float scale = 0.0f;
    if constexpr (decodes) {
      load_run(after, word);
      scale = next_scale(i + 1);
    }
#pragma unroll
    for (int q = 0; q < kMmaDepth / 16; ++q) {
      uint32_t x[Kind::m][4], w[Kind::n / 2][4];
      load_weights(tile, q, w);
#pragma unroll
      for (int k = 0; k < Kind::m; ++k)
        ptx::load_matrices(x[k], at((in_tile ^ (q * 32)) + k * 16 * kMmaDepth * 2));
      float code[8];
      if constexpr (decodes) look_up(word[q], tables(), code);
#pragma unroll
      for (int k = 0; k < Kind::m; ++k)
#pragma unroll
        for (int j = 0; j < Kind::n; ++j)
          ptx::mma<T>(sum[k][j], x[k], {w[j / 2][j % 2 * 2], w[j / 2][j % 2 * 2 + 1]});
      if constexpr (decodes) store_weights<T>(code, scale, at(next ^ (q * 16)));
    }
  }

  // The beginning of this lane's row of the first A fragments: row l % 16 of the warp's, chunk 0
  // or 1.
  __device__ static int in_fragment() {
    const MmaThread<Kind> me;
    return (me.row + me.lane % 16) * (kMmaDepth * 2) + ((me.lane / 16) ^ (me.lane & 7)) * 16;
  }

  // Likewise for B fragments, two of them (16 outputs) at once, whose matrices are in the order
  // (depth 0.., outputs 0..), (depth 8.., outputs 0..), and the same for outputs 8...
  __device__ static int weight_fragment() {
    const MmaThread<Kind> me;
    const int in_matrix = me.lane & 7, deeper = me.lane >> 3 & 1, further = me.lane >> 4;
    if constexpr (Kind::backward)
      return (8 * deeper + in_matrix) * (kMmaOutputs * 2) +
             ((me.output / 8 + further) ^ in_matrix) * 16;
    else
      return (me.output + 8 * further + in_matrix) * (kMmaDepth * 2) + (deeper ^ in_matrix) * 16;
  }

  // Rows of the tile are outputs for forward, and the depth for backward: then transposed.
  __device__ static void load_weights(int tile, int q, uint32_t (&w)[Kind::n / 2][4]) {
#pragma unroll
    for (int j = 0; j < Kind::n / 2; ++j)
      if constexpr (Kind::backward)
        ptx::load_matrices_transposed(w[j], at((tile ^ (j * 32)) + q * 16 * kMmaOutputs * 2));
      else
        ptx::load_matrices(w[j], at((tile ^ (q * 32)) + j * 16 * kMmaDepth * 2));
  }

  const MmaArgs& a_;
  Runs<Kind::backward> runs_;
  const uint16_t* in_;  // where this thread copies from: 16 bytes of every 32nd row
  int rows_left_;       // from its first row
  int first_, end_;     // steps of this block's range of the depth
  PendingScale scale_;
};

// -- the end --------------------------------------------------------------------------------------

// Stores pairs of this block's sums for add_split_k().
template <class Kind>
__device__ __forceinline__ void store_partial(const MmaArgs& a, const MmaPlace& place,
                                              const float (&sum)[Kind::m][Kind::n][4]) {
  const MmaThread<Kind> me;
#pragma unroll
  for (int k = 0; k < Kind::m; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = place.row + me.row + 16 * k + 8 * half + me.g;
      if (row >= a.out.rows) continue;
      float* dst = a.partial + (blockIdx.y * a.out.rows + row) * a.partial_pitch;
#pragma unroll
      for (int j = 0; j < Kind::n; ++j) {
        const int64_t output = place.output + me.output + 8 * j + 2 * me.t;
        if (output < a.partial_pitch)
          ptx::store(dst + output, make_float2(sum[k][j][2 * half], sum[k][j][2 * half + 1]));
      }
    }
}

// Rounds sums plus bias to `tile` [rows][out_pitch bytes].
template <class Kind>
__device__ __forceinline__ void round_sums(const MmaArgs& a, const MmaPlace& place,
                                           const float (&sum)[Kind::m][Kind::n][4],
                                           unsigned char* tile) {
  const MmaThread<Kind> me;
  float bias[2 * Kind::n] = {};
  if (a.bias.data) {
    const int64_t first = place.output + me.output + 2 * me.t, left = a.out.cols - first;
    load_pairs<Kind::n>(
        a.bias.data, a.bias.dtype, first, 8, 1, [&](int j, int i) { return 8 * j + i < left; },
        bias);
  }
#pragma unroll
  for (int j = 0; j < Kind::n; ++j)
#pragma unroll
    for (int k = 0; k < Kind::m; ++k)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = me.row + 16 * k + 8 * half + me.g, output = me.output + 8 * j + 2 * me.t;
        const float* c = sum[k][j] + 2 * half;
        ptx::store(tile + row * Kind::out_pitch + 2 * output,
                   ptx::pack<typename Kind::T>(c[0] + bias[2 * j], c[1] + bias[2 * j + 1]));
      }
}

// Stores whole rows of the tile, 16 bytes per thread where the output allows it.
template <class Kind>
__device__ __forceinline__ void store_tile(const MmaArgs& a, const MmaPlace& place,
                                           const unsigned char* tile) {
  const int chunk = static_cast<int>(threadIdx.x) % 16;
  uint16_t* out = static_cast<uint16_t*>(a.out.data);
  const int64_t output = place.output + chunk * 8, left = a.out.cols - output;
  const bool whole =
      left >= 8 && a.out.stride % 8 == 0 && reinterpret_cast<uintptr_t>(a.out.data) % 16 == 0;
  for (int r = static_cast<int>(threadIdx.x) / 16; r < Kind::rows; r += kMmaThreads / 16) {
    if (place.row + r >= a.out.rows) return;
    const unsigned char* src = tile + r * Kind::out_pitch + chunk * 16;
    uint16_t* dst = out + (place.row + r) * a.out.stride + output;
    if (whole)
      ptx::store(dst, ptx::load<uint4>(src));
    else
      for (int e = 0; e < 8 && e < left; ++e) dst[e] = ptx::load<uint16_t>(src + 2 * e);
  }
}

template <class Kind>
__device__ __forceinline__ void finish(const MmaArgs& a, const MmaPlace& place,
                                       const float (&sum)[Kind::m][Kind::n][4]) {
  if (a.partial) return store_partial<Kind>(a, place, sum);
  unsigned char* tile = ptx::shared_memory();
  __syncthreads();  // the steps are done with shared memory
  round_sums<Kind>(a, place, sum, tile);
  __syncthreads();
  store_tile<Kind>(a, place, tile);
}

template <class Kind>
__device__ __forceinline__ void begin_with_adapter(const MmaArgs& a, const MmaPlace& place,
                                                   float (&sum)[Kind::m][Kind::n][4]) {
  const MmaThread<Kind> me;
  add_adapter<Kind::backward>(a.adapter, place.row + me.row, a.out.rows, place.output + me.output,
                              a.out.cols, sum);
}

template <class Kind>
__device__ __forceinline__ void begin_with_addend(const MmaArgs& a, const MmaPlace& place,
                                                  float (&sum)[Kind::m][Kind::n][4]) {
  const MmaThread<Kind> me;
#pragma unroll
  for (int k = 0; k < Kind::m; ++k)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t row = place.row + me.row + 16 * k + 8 * half + me.g;
      const float* from = row < a.out.rows ? a.addend.row(row) : nullptr;
      if (!from) continue;
#pragma unroll
      for (int j = 0; j < Kind::n; ++j) {
        const int64_t output = place.output + me.output + 8 * j + 2 * me.t;
        if (output >= a.addend.stride) continue;
        const float2 v = ptx::load<float2>(from + output);
        sum[k][j][2 * half] = v.x, sum[k][j][2 * half + 1] = v.y;
      }
    }
}

template <class Kind>
__global__ void __launch_bounds__(kMmaThreads, Kind::blocks_per_multiprocessor)
    mma_product(const MmaArgs args) {
  const MmaPlace place = locate<Kind>(args);
  MmaBase<Kind> base(args, place);
  float sum[Kind::m][Kind::n][4] = {};
  if (args.w.packed) base.start();
  if (args.adapter.s && blockIdx.y == 0) begin_with_adapter<Kind>(args, place, sum);
  if (args.addend.data && blockIdx.y == 0) begin_with_addend<Kind>(args, place, sum);
  if (args.w.packed) base.run(sum);
  ptx::start_next_kernel();
  finish<Kind>(args, place, sum);
}

// out = Σ partial + bias, in the order of the depth; four columns per thread.
__global__ void __launch_bounds__(kMmaThreads) add_split_k(const MmaArgs a) {
  ptx::wait_for_previous_kernel();
  const int64_t per_row = a.partial_pitch / 4;
  const int64_t i = int64_t{blockIdx.x} * kMmaThreads + threadIdx.x;
  if (i >= a.out.rows * per_row) return;
  const int64_t row = i / per_row, output = i % per_row * 4;
  float v[4] = {};
#pragma unroll 4
  for (int s = 0; s < a.split_k; ++s) {
    const float4 sums =
        ptx::load<float4>(a.partial + (s * a.out.rows + row) * a.partial_pitch + output);
    v[0] += sums.x, v[1] += sums.y, v[2] += sums.z, v[3] += sums.w;
  }
  if (a.bias.data) {
    float bias[4];
    load_pairs<2>(
        a.bias.data, a.bias.dtype, output, 2, 1,
        [&](int j, int i) { return output + 2 * j + i < a.out.cols; }, bias);
#pragma unroll
    for (int e = 0; e < 4; ++e) v[e] += bias[e];
  }
  uint16_t* dst = static_cast<uint16_t*>(a.out.data) + row * a.out.stride + output;
  const bool bf16 = a.out.dtype == DType::bf16;
  const uint2 rounded = bf16 ? make_uint2(ptx::pack<Bf16>(v[0], v[1]), ptx::pack<Bf16>(v[2], v[3]))
                             : make_uint2(ptx::pack<F16>(v[0], v[1]), ptx::pack<F16>(v[2], v[3]));
  if (output + 4 <= a.out.cols && reinterpret_cast<uintptr_t>(dst) % 8 == 0) {
    ptx::store(dst, rounded);
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e)
    if (output + e < a.out.cols)
      dst[e] = static_cast<uint16_t>((e < 2 ? rounded.x : rounded.y) >> (e % 2 * 16));
}

}  // namespace lk::cuda
