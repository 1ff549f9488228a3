// Plain argument structs of the kernels, shared by every backend. No torch, no ownership: callers
// keep the memory. Dimensions: M tokens, N out_features, K in_features, R LoRA rank. Matrices are
// row-major, strides in elements.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define LK_ANYWHERE __host__ __device__
#else
#define LK_ANYWHERE
#endif

namespace lk {

enum class DType : int { f32, bf16, f16 };

// Static: a weak inline symbol compiled in one instruction set's unit could be linked into
// another's.
LK_ANYWHERE static constexpr int64_t element_size(DType t) { return t == DType::f32 ? 4 : 2; }
LK_ANYWHERE static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
LK_ANYWHERE static constexpr int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }

struct Matrix {
  const void* data = nullptr;
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0, stride = 0;
};

struct MutMatrix {
  void* data = nullptr;  // null: not wanted
  DType dtype = DType::f32;
  int64_t rows = 0, cols = 0, stride = 0;
};

struct Vector {
  const void* data = nullptr;  // null: none
  DType dtype = DType::f32;
};

// Weight W[N, K] in 4 bits: 16-entry table, one scale per block of consecutive elements.
//
//   element  i = n*K + k
//   byte j:  | element 2j: high nibble | element 2j+1: low nibble |
//   W[n, k]  = code[nibble(i)] * scale(i >> block_shift)
//   scale(j) = absmax[j], or, double-quantized,
//            = round(round(nested_code[absmax_u8[j]] * nested_absmax[j >> 8]) + *nested_offset)
struct Weight4 {
  const uint8_t* packed = nullptr;
  const float* absmax = nullptr;  // exactly one of absmax, absmax_u8
  const uint8_t* absmax_u8 = nullptr;
  const float* nested_absmax = nullptr;
  const float* nested_code = nullptr;
  const float* nested_offset = nullptr;
  const float* code = nullptr;
  int64_t N = 0, K = 0;
  int block_shift = 6;  // log2(blocksize), 5..12
  // Of rows of a larger weight (see rows_of): its block that packed begins with, and the element of
  // that block that is W[0, 0]. Where blocks fit rows, `first` is 0.
  int64_t first_block = 0, first = 0;
};

// Blocks do not cross rows; then every row also starts on a byte, and a row holds whole blocks.
LK_ANYWHERE static inline bool blocks_fit_rows(const Weight4& w) {
  return (w.K & ((int64_t{1} << w.block_shift) - 1)) == 0;
}

// Rows [n0, n0 + rows) of w as a weight of their own, over the same memory.
LK_ANYWHERE static inline Weight4 rows_of(const Weight4& w, int64_t n0, int64_t rows) {
  Weight4 part = w;
  const int64_t element = w.first + n0 * w.K, block = element >> w.block_shift;
  part.packed += (block << w.block_shift) >> 1;
  part.first_block += block;
  part.first = element - (block << w.block_shift);
  part.N = rows;
  return part;
}

constexpr int kNestedShift = 8;
constexpr int64_t kNestedBlock = 1 << kNestedShift;  // scales that share one nested absmax

// Inverted dropout on x[M, K]: element (m, k) is kept, times scale = 1/(1-p), when word k%4 of
// Philox4x32-10 with counter (k/4, m low, m high, 0) and key (*seed low, *seed high) is
// >= threshold. threshold = floor(p * 2^32); 0: no dropout.
struct Dropout {
  uint32_t threshold = 0;
  float scale = 1.0f;
  const uint64_t* seed = nullptr;
};

// Dropout with probability p, 0 <= p < 1; none where p is 0 or there is no seed.
LK_ANYWHERE static inline Dropout dropout_of(double p, const uint64_t* seed) {
  Dropout d;
  if (!seed || !(p > 0.0)) return d;
  d.threshold = static_cast<uint32_t>(p * 4294967296.0);
  d.scale = static_cast<float>(1.0 / (1.0 - p));
  d.seed = seed;
  return d;
}

struct Lora {
  Matrix A, B;  // [R, K], [N, R]; A.data null: no adapter
  float scaling = 1.0f;
  Dropout dropout;
};

// The frozen base: one of the two.
struct Base {
  const Weight4* quantized = nullptr;
  const Matrix* dense = nullptr;
};

// How a CPU multiplies rows by a 4-bit base. exact: codes and activations as they are, float32
// sums; bf16: each operand rounded once to bfloat16, float32 sums; int8: see cpu/kernels/int8.inl.
// Where the instruction set in use has no products of bfloat16, or none for the weight, bf16 is
// exact.
enum class Arithmetic : int { exact, bf16, int8 };

// y = x Wᵀ + scaling S Bᵀ + bias, S = dropout(x) Aᵀ (written to s, float32 [M, R]).
struct LinearArgs {
  Matrix x;
  Base base;
  Lora lora;
  Vector bias;
  MutMatrix y;
  float* s = nullptr;
  Arithmetic arithmetic = Arithmetic::exact;  // of x Wᵀ
};

// dS = scaling dy B (scratch ds, float32 [M, R]); dx = dy W + mask (dS A); dA = dSᵀ dropout(x);
// dB = scaling dyᵀ S; dbias = Σ_m dy. Without an adapter only dx. Outputs with null data are not
// computed.
struct BackwardArgs {
  Matrix dy, x;
  Base base;
  Lora lora;
  const float* s = nullptr;
  float* ds = nullptr;
  MutMatrix dx, dA, dB, dbias;
  Vector added;                               // [K], to every row of dx before it is rounded
  Arithmetic arithmetic = Arithmetic::exact;  // of dy W; int8 counts as exact
};

// -- many adapters in one batch -------------------------------------------------------------------
// Ranks go in whole steps: page_rank is a multiple of kRankStep, and so is the width of S.
constexpr int64_t kRankStep = 8;

// Adapters live in pages of page_rank ranks. A page has an id, the same in every module of a model:
//
//   A    page 0: | page_rank rows of K | page 1: | ... |      rank-major, as A is
//   B    page 0: | page_rank rows of N | page 1: | ... |      rank-major: B transposed
//
// Rank r of an adapter whose pages are ids[0], ids[1], ... is row
// ids[r / page_rank] * page_rank + r % page_rank of both. Rows past its rank are never used.

struct Pages {
  Matrix A, B;  // [pages * page_rank, K], [pages * page_rank, N], rows without gaps
  int64_t page_rank = kRankStep;
  int64_t slots = 0;
  const int32_t* ranks = nullptr;     // [slots]; 0: the adapter does not cover this module
  const float* scalings = nullptr;    // [slots]
  const double* dropout_p = nullptr;  // [slots]
  const uint64_t* seed = nullptr;     // null: no dropout, whatever dropout_p says
};

LK_ANYWHERE static inline Dropout dropout_of(const Pages& pages, int64_t slot) {
  return pages.seed ? dropout_of(pages.dropout_p[slot], pages.seed) : Dropout{};
}

// Up to BatchPlan::tile_rows rows of the batch that share an adapter: plan.rows[row0 .. row0+rows).
// Its pages are plan.page_ids[page0 ..]. The tiles of one slot follow one another, and so do their
// rows; tiles with rows == 0 are padding and come last.
struct Tile {
  int32_t slot, row0, rows, page0;
};

// A plan: which row of x[M, K] has which adapter. It is the same for every module of a model.
struct BatchPlan {
  const int32_t* rows = nullptr;         // row numbers by slot, ascending within a slot
  const Tile* tiles = nullptr;           // [tile_count]
  const int32_t* tile_of_row = nullptr;  // [M]; -1: the row has no adapter
  const int32_t* page_ids = nullptr;
  int64_t row_count = 0, tile_count = 0, page_count = 0;  // sizes of rows, tiles, page_ids
  int tile_rows = 16;                                     // 16, 32, 64 or 128
  int max_rank = 0;  // of any adapter of the plan, in any module
};

// y = x Wᵀ + bias + Δ, or without a base y += Δ; for a row m of slot u
//   S[m] = dropout_u(x)[m] A_uᵀ,  Δ[m] = scaling_u S[m] B_uᵀ.
// One rounding into y. S is float32 [M, s_stride], s_stride >= max_rank, in the order of x; it is
// zero past a row's rank and where a row has no adapter.
struct MultiArgs {
  Matrix x;
  const Weight4* base = nullptr;
  BatchPlan plan;
  Pages pages;
  Vector bias;  // only with a base
  MutMatrix y;
  float* s = nullptr;
  int64_t s_stride = 0;
  Arithmetic arithmetic = Arithmetic::exact;  // of x Wᵀ
};

// dS[m] = scaling_u dy[m] B_u (scratch ds, laid out as S); dx = dy W + mask_u (dS A_u), without a
// base only the second term, zero where a row has no adapter. For each slot with grad_rows[u] >= 0,
// into rows grad_rows[u] .. + ranks[u]:
//   dA[r] = Σ_m dS[m, r] dropout_u(x)[m],  dB[r] = scaling_u Σ_m S[m, r] dy[m]    (B transposed)
// over its rows in their order; zero if it has no row in the batch.
struct MultiBackwardArgs {
  Matrix dy, x;
  const Weight4* base = nullptr;
  BatchPlan plan;
  Pages pages;
  const float* s = nullptr;
  float* ds = nullptr;
  int64_t s_stride = 0;
  MutMatrix dx;
  Arithmetic arithmetic = Arithmetic::exact;  // as in BackwardArgs
  const int32_t* grad_rows = nullptr;         // [slots]; -1: no gradient wanted
  int64_t grad_rank = 0;                      // rows of dA and dB; 0: no gradients wanted
  float *dA = nullptr, *dB = nullptr;         // [grad_rank, K], [grad_rank, N]
  MutMatrix dbias;
};

// -- stacked experts ------------------------------------------------------------------------------

// E matrices of equal shape in one weight: expert e is rows [e size, (e + 1) size) of it, size =
// base.N / E, W_e [N, K], or [K, N] where transposed. Rows [offsets[e - 1], offsets[e]) of x belong
// to expert e, from 0 on for e = 0; those past offsets[E - 1] to none.
struct Experts {
  Weight4 base;
  int64_t count = 0;
  const int32_t* offsets = nullptr;  // [count]
  bool transposed = false;
};

// For a row m of expert e, y[m] = W_e x[m] + scaling B_e S[m] + bias_e with S[m] = A_e x[m]. Rows
// of no expert are zero, in s too. A [E R, K], B [E N, R]; of a transposed stack Bt [E R, N]
// instead of B: each expert's, transposed.
struct GroupedArgs {
  Matrix x;
  Experts experts;
  Matrix A, B, Bt;
  int64_t rank = 0;  // 0: no adapters
  float scaling = 1.0f;
  Vector bias;  // [E, N]
  MutMatrix y;
  float* s = nullptr;   // [M, R]
  float* ds = nullptr;  // scratch [M, R], of a transposed stack: scaling S
  Arithmetic arithmetic = Arithmetic::exact;
};

// dS = scaling dy B_e (scratch ds, [M, R]), dx = dy W_e + dS A_e, dA_e = dSᵀ x, dB_e = scaling dyᵀ
// S, over the rows of each expert; zero for one that has none, and dx for rows of no expert. Of a
// transposed stack At [E K, R] instead of A. Outputs with null data are not computed.
struct GroupedBackwardArgs {
  Matrix dy, x;
  Experts experts;
  Matrix A, At, B;
  int64_t rank = 0;
  float scaling = 1.0f;
  const float* s = nullptr;
  float* ds = nullptr;
  MutMatrix dx, dA, dB;  // dA [E R, K], dB [E N, R]
  Arithmetic arithmetic = Arithmetic::exact;
};

struct QuantizeArgs {
  const void* weight = nullptr;
  DType dtype = DType::f32;
  int64_t numel = 0, blocksize = 64;
  const float* code = nullptr;
  uint8_t* packed = nullptr;  // [ceil(numel/2)]
  float* absmax = nullptr;    // [ceil(numel/blocksize)]; a NaN or infinity of the block shows here
};

struct DoubleQuantizeArgs {
  const float* absmax = nullptr;
  int64_t blocks = 0;
  const float* nested_code = nullptr;  // [256], sorted
  uint8_t* quantized = nullptr;        // [blocks]
  float* nested_absmax = nullptr;      // [ceil(blocks/256)]
  float* offset = nullptr;             // [1]
};

struct DequantizeArgs {
  Weight4 weight;
  DType dtype = DType::f32;
  void* out = nullptr;  // [N, K]
};

// How a kernel runs its tasks: run() calls body(context, begin, end) over disjoint ranges that make
// up [0, tasks). Where run is null, the calling thread does a share of them, the one of `threads`
// equal ones that has the number `share`.
struct Parallel {
  void (*run)(int64_t tasks, void (*body)(void* context, int64_t begin, int64_t end),
              void* context);
  int threads;
  int share = 0;
};

}  // namespace lk
