// The base product on the tile registers of AMX, which multiply bfloat16 and add in float32.
//
// A float32 number is the exact sum of three bfloat16 numbers, its parts: v = v1 + v2 + v3, each the
// rest rounded to nearest, |v2| <= 2^-8 |v|, |v3| <= 2^-16 |v|. A product of two is then
//
//   a w = a1 w1 + (a1 w2 + a2 w1) + (a1 w3 + a2 w2 + a3 w1) + less than 2^-22 |a w|
//
// six products of parts, each exact in float32. bfloat16 numbers have one part, float16 ones two.
//
// The unit takes subnormal numbers for zero, so a is scaled by 2^40 and w by 2^24: what is lost then
// lies below float32's smallest number. A sum that is not finite (an operand was not, or it was too
// large) is computed again by float32 arithmetic.
//
//   operand  for each tile of rows, step of 32 p, part:  | row 0: 32 p | row 1 | ... 16 rows
//   panel    for each step, part, tile of columns:       | p = 0, 1: 16 columns of pairs | ...
//
// Sums run over the steps in order, from zero for each kTileDepth: a row's bits depend on nothing else.

constexpr int64_t kTilesFrom = 5;  // rows from which this is faster
constexpr int64_t kTilePanels = 4;  // panels at a time: an operand in parts costs a tenth of its product
constexpr int kTileRows = 16;
constexpr int64_t kStep = 32;  // p of a tile
constexpr int64_t kTileDepth = 128;  // p per panel
constexpr int64_t kSteps = kTileDepth / kStep;
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kShare = 2 * kTileRows / kSteps;
constexpr float kScaleA = 0x1p40f, kScaleW = 0x1p24f, kUnscale = 0x1p-64f;
static_assert(kTile == 2 * W, "two tiles of columns are filled at a time");

constexpr int64_t kRowsAhead = 8;  // from a load of a to its prefetch

inline int parts_of(DType t) { return t == DType::f32 ? 3 : t == DType::f16 ? 2 : 1; }
inline int parts_of(const Quantized&) { return 3; }
inline int parts_of(const Dense& source) { return parts_of(source.m.dtype); }

// The next part of v, in the upper halves of the lanes; v becomes the rest.
inline vi take_part(vf& v) {
  const vi part = addi(as_bits(v), set1i(0x8000));
  v = _mm512_sub_ps(v, as_float(_mm512_and_si512(part, set1i(0xffff0000))));
  return part;
}

// What was stored there is seen by the tile instructions that follow: GCC's are asm statements that
// do not say what they read.
inline void in_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// All tiles of rows of one shape; the tile registers of this thread are given back at the end.
class Tiles {
 public:
  explicit Tiles(int rows) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) {
      shape.row_bytes[t] = 64;
      shape.rows[t] = static_cast<uint8_t>(t < 6 ? rows : kTileRows);
    }
    in_memory(&shape);
    _tile_loadconfig(&shape);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// -- operand --------------------------------------------------------------------------------------

// Rows [i0, i0 + rows) of a, columns [p0, p0 + depth), in tiles of `height` rows.
template <int Parts>
void pack_tiles(const Operand<false>& a, int64_t i0, int64_t rows, int height, int64_t p0,
                int64_t depth, char* operand) {
  uint16_t odd_words[2 * W];  // of two vectors
  for (int i = 0; i < 2 * W; ++i) odd_words[i] = static_cast<uint16_t>(2 * i + 1);
  const vi words = loadi(odd_words);
  const vf scale = set1(kScaleA);
  const int64_t steps = ceil_div(depth, kStep);
  for (int64_t i = 0; i < rows; ++i) {
    if (i + kRowsAhead < rows) a.prefetch(i0 + i + kRowsAhead, 1, p0, depth);
    alignas(64) float row[kTileDepth];
    load_row(row, a.m.data, a.m.dtype, (i0 + i) * a.m.stride + p0, depth);
    for (int64_t p = depth; p < steps * kStep; ++p) row[p] = 0.0f;
    char* tile = operand + (i / height * kSteps * Parts) * kTileBytes + i % height * 64;
    char* to = tile;
    vf check = zero();
    for (int64_t s = 0; s < steps; ++s) {
      vf low = mul(load(row + s * kStep), scale), high = mul(load(row + s * kStep + W), scale);
      check = fma(low, zero(), fma(high, zero(), check));
      for (int part = 0; part < Parts; ++part, to += kTileBytes) {
        const vi first = take_part(low), second = take_part(high);
        storei(reinterpret_cast<uint32_t*>(to), _mm512_permutex2var_epi16(first, words, second));
      }
    }
    // Rounding its bits may have made a number of a NaN.
    if (_mm512_cmp_ps_mask(check, check, _CMP_UNORD_Q)) *reinterpret_cast<uint16_t*>(tile) = 0x7fc0;
  }
}

// -- panel ----------------------------------------------------------------------------------------

// kTile columns of float32, as fill_transposed and fill_natural leave them, in parts. False: there is
// a NaN among them, and rounding its bits may have made it a number.
template <int Parts>
bool split_panel(const float* panel, int64_t depth, char* to) {
  const vf scale = set1(kScaleW);
  __mmask16 nan = 0;
  for (int64_t s = 0; s < ceil_div(depth, kStep); ++s, to += 2 * Parts * kTileBytes)
    for (int64_t q = 0; q < kTileRows; ++q)
      for (int64_t v = 0; v < NV; ++v) {
        const float* from = panel + (s * kStep + 2 * q) * kTile + v * W;
        vf even = mul(load(from), scale), odd = mul(load(from + kTile), scale);
        nan |= _mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q);
        for (int part = 0; part < Parts; ++part) {
          const vi low = take_part(even), high = take_part(odd);
          storei(reinterpret_cast<uint32_t*>(to + (part * NV + v) * kTileBytes + q * 64),
                 _mm512_mask_blend_epi16(0xaaaaaaaa, shr<16>(low), high));
        }
      }
  return nan == 0;
}

// -- product --------------------------------------------------------------------------------------

// sums[row][column] of kTile columns: the product of `steps` steps, the smallest parts first. Row tiles
// of `height` rows. Registers: 0-3 the sums, 4-5 a part of two row tiles, 6-7 a part of two column
// tiles.
// After each step, between(s) runs beside the products that were begun.
template <int Rows, int PartsA, int PartsW, class Between>
inline void multiply_tiles(const char* a, const char* w, int64_t steps, int height, float* sums,
                           const Between& between) {
  const auto load_a = [&](int part) {
    _tile_loadd(4, a + part * kTileBytes, 64);
    if constexpr (Rows == 2) _tile_loadd(5, a + (kSteps * PartsA + part) * kTileBytes, 64);
  };
  const auto load_w = [&](int part) {
    _tile_loadd(6, w + 2 * part * kTileBytes, 64);
    _tile_loadd(7, w + (2 * part + 1) * kTileBytes, 64);
  };
  const auto multiply = [] {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Rows == 2) {
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  };
  in_memory(a);
  in_memory(w);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t s = 0; s < steps; ++s, a += PartsA * kTileBytes, w += 2 * PartsW * kTileBytes) {
    load_a(0);
    if constexpr (PartsW > 2) {
      load_w(2);
      multiply();
    }
    if constexpr (PartsW > 1) {
      load_w(1);
      multiply();
    }
    if constexpr (PartsA > 1) {
      load_a(1);
      if constexpr (PartsW > 1) multiply();
    }
    load_w(0);
    if constexpr (PartsA > 1) multiply();
    if constexpr (PartsA > 2) {
      load_a(2);
      multiply();
    }
    if constexpr (PartsA > 1) load_a(0);
    multiply();
    between(s);
  }
  constexpr int64_t stride = kTile * sizeof(float);
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + W, stride);
  if constexpr (Rows == 2) {
    _tile_stored(2, sums + height * kTile, stride);
    _tile_stored(3, sums + height * kTile + W, stride);
  }
}

// c[j] += Σ_p row i of a times the panel, kTile columns, by float32 arithmetic.
__attribute__((noinline, cold)) void add_row(const Operand<false>& a, int64_t i, int64_t p0,
                                             int64_t depth, const float* panel, float* c) {
  float row[kTileDepth + kPad];
  a.pack(i, 1, p0, depth, row);
  vf sum[NV];
  for (int v = 0; v < NV; ++v) sum[v] = load(c + v * W);
  for (int64_t p = 0; p < depth; ++p)
    for (int v = 0; v < NV; ++v)
      sum[v] = fma(set1(row[p]), load(panel + p * kTile + v * W), sum[v]);
  for (int v = 0; v < NV; ++v) store(c + v * W, sum[v]);
}

inline bool is_finite(const float* sums, int64_t rows) {
  vf check[NV] = {zero(), zero()};  // zero times a number stays zero
#pragma GCC unroll 8
  for (int64_t k = 0; k < rows * kTile; k += kTile)
    for (int v = 0; v < NV; ++v) check[v] = fma(load(sums + k + v * W), zero(), check[v]);
  return _mm512_cmp_ps_mask(check[0], check[1], _CMP_UNORD_Q) == 0;
}

// c[i, j] += sums[i, j] without their scale, kTile columns.
inline void add_sums(const float* sums, int64_t rows, float* c) {
#pragma GCC unroll 8
  for (int64_t i = 0; i < rows; ++i, sums += kTile, c += kWidth)
    for (int v = 0; v < NV; ++v)
      store(c + v * W, fma(load(sums + v * W), set1(kUnscale), load(c + v * W)));
}

// The product of rows with one panel of kTile columns.
struct PanelProduct {
  const Operand<false>& a;
  int64_t i0, p0, depth;
  const float* panel;
  bool numbers;  // in the panel
  float* c;

  // Rows [i, i + rows).
  void add(const float* sums, int64_t i, int64_t rows) const {
    if (numbers && is_finite(sums, rows))
      add_sums(sums, rows, c + i * kWidth);
    else
      add_with_care(sums, i, rows);
  }
  __attribute__((noinline, cold)) void add_with_care(const float* sums, int64_t i,
                                                     int64_t rows) const {
    for (int64_t k = 0; k < rows; ++k) {
      float* row = c + (i + k) * kWidth;
      if (numbers && is_finite(sums + k * kTile, 1))
        add_sums(sums + k * kTile, 1, row);
      else
        add_row(a, i0 + i + k, p0, depth, panel, row);
    }
  }
};

// c[i, j] += Σ_{p < depth} a(i0 + i, p) · P[p, j0 + j] for columns of several panels, whose tiles of c
// lie one after the other.
template <bool TransposedSource, int PartsA, int PartsW, class Source>
void accumulate_parts(const Operand<false>& a, const Source& source, int64_t i0, int64_t rows,
                      int64_t j0, int64_t columns, int64_t depth, float* c) {
  const int height = static_cast<int>(ceil_div(rows, ceil_div(rows, kTileRows)));
  const int64_t row_tiles = ceil_div(rows, height);
  const int64_t tile_size = kSteps * PartsA * kTileBytes;
  char* operand = static_cast<char*>(scratch(Slot::operand, row_tiles * tile_size));
  char* memory = static_cast<char*>(
      scratch(Slot::panel, kTileDepth * kTile * sizeof(float) + kSteps * 2 * PartsW * kTileBytes));
  float* panel = reinterpret_cast<float*>(memory);
  char* parts = memory + kTileDepth * kTile * sizeof(float);
  alignas(64) float sums[2][2 * kTileRows * kTile];  // of this product and the one before
  const Tiles tiles(height);
  for (int64_t p0 = 0; p0 < depth; p0 += kTileDepth) {
    const int64_t n = min64(kTileDepth, depth - p0), steps = ceil_div(n, kStep);
    pack_tiles<PartsA>(a, i0, rows, height, p0, n, operand);
    for (int64_t k = n * kTile; k < steps * kStep * kTile; k += W) store(panel + k, zero());
    for (int64_t j = 0; j < columns; j += kTile) {
      const int64_t width = min64(kTile, columns - j);
      if constexpr (TransposedSource)
        fill_transposed(source, j0 + j, width, p0, n, panel);
      else
        fill_natural(source, j0 + j, width, p0, n, panel);
      if (width <= W)
        for (int64_t p = 0; p < n; ++p) store(panel + p * kTile + W, zero());
      const bool numbers = split_panel<PartsW>(panel, n, parts);
      float* to = c + j / kWidth * (rows * kWidth) + j % kWidth;
      const PanelProduct product{a, i0, p0, n, panel, numbers, to};
      const int64_t share = ceil_div(2 * height, steps);  // rows that are added in one step
      int64_t before = 0, before_rows = 0, which = 0;
      for (int64_t i = 0; i < rows; i += 2 * height, which ^= 1) {
        const auto between = [&](int64_t s) {
          const int64_t k = s * share, count = min64(share, before_rows - k);
          if (count == kShare)  // unrolled
            product.add(sums[which ^ 1] + k * kTile, before + k, kShare);
          else if (count > 0)
            product.add(sums[which ^ 1] + k * kTile, before + k, count);
        };
        const char* tile = operand + i / height * tile_size;
        if (i + height < rows)
          multiply_tiles<2, PartsA, PartsW>(tile, parts, steps, height, sums[which], between);
        else
          multiply_tiles<1, PartsA, PartsW>(tile, parts, steps, height, sums[which], between);
        before = i;
        before_rows = min64(2 * height, rows - i);
      }
      product.add(sums[which ^ 1], before, before_rows);
    }
  }
}

template <bool TransposedSource, class Source>
void accumulate_tiles(const Operand<false>& a, const Source& source, int64_t i0, int64_t rows,
                      int64_t j0, int64_t columns, int64_t depth, float* c) {
  const auto run = [&](auto parts_a, auto parts_w) {
    accumulate_parts<TransposedSource, decltype(parts_a)::value, decltype(parts_w)::value>(
        a, source, i0, rows, j0, columns, depth, c);
  };
  const auto with_w = [&](auto parts_a) {
    const int parts = parts_of(source);
    if (parts == 3) return run(parts_a, Constant<3>{});
    if (parts == 2) return run(parts_a, Constant<2>{});
    run(parts_a, Constant<1>{});
  };
  const int parts = parts_of(a.m.dtype);
  if (parts == 3) return with_w(Constant<3>{});
  if (parts == 2) return with_w(Constant<2>{});
  with_w(Constant<1>{});
}
