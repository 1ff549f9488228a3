// The base product on the tile registers of AMX, which multiply bfloat16 and add in float32.
//
// A float32 number is the exact sum of three bfloat16 numbers, its parts: v = v1 + v2 + v3, each
// the rest rounded to nearest, |v2| <= 2^-8 |v|, |v3| <= 2^-16 |v|. A product of two is then
//
//   a w = a1 w1 + (a1 w2 + a2 w1) + (a1 w3 + a2 w2 + a3 w1) + less than 2^-22 |a w|
//
// six products of parts, each exact in float32. bfloat16 numbers have one part, float16 ones two.
//
// The unit takes subnormal numbers for zero, so a is scaled by 2^40: what is lost then lies below
// float32's smallest number. A sum that is not finite (an operand was not, or it was too large) is
// computed again by float32 arithmetic.
//
// Of a 4-bit weight the codes are multiplied, and the sums of a block are scaled: each code has its
// parts in a table. Other weights, and the transposed product, are split as they are, scaled by
// 2^24.
//
//   operand  for each tile of rows, step of 32 p, part:  | row 0: 32 p | row 1 | ... 16 rows
//   panel    for each step, part, tile of columns:       | p = 0, 1: 16 columns of pairs | ...
//   sums     [32 rows][32 columns] of a group of steps: those that share their scales
//
// Sums run over the steps in order, from zero for each group: a row's bits depend on nothing else.

constexpr bool kHasTiles = true;
constexpr int64_t kTilesForward = 14, kTilesDx = 48;  // rows from which this is faster
constexpr int kTileRows = 16;
constexpr int64_t kStep = 32;  // p of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int kMaxParts = 3;
constexpr float kScaleA = 0x1p40f, kUnscaleA = 0x1p-40f, kScaleW = 0x1p24f;
static_assert(kTile == 2 * W, "two tiles of columns are filled at a time");

constexpr int64_t kCodesAhead = 256;        // p from a load of codes to their prefetch
constexpr int64_t kRowsAhead = 8;           // from a load of a to its prefetch
constexpr int64_t kWholeOperand = 3 << 19;  // bytes: kept for all p, the weight is read row by row

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
template <int Parts, int64_t Depth>
void pack_tiles(const Operand<false>& a, int64_t i0, int64_t rows, int height, int64_t p0,
                int64_t depth, char* operand) {
  uint16_t odd_words[2 * W];  // of two vectors
  for (int i = 0; i < 2 * W; ++i) odd_words[i] = static_cast<uint16_t>(2 * i + 1);
  const vi words = loadi(odd_words);
  const vf scale = set1(kScaleA);
  const int64_t steps = ceil_div(depth, kStep);
  for (int64_t i = 0; i < rows; ++i) {
    if (i + kRowsAhead < rows) a.prefetch(i0 + i + kRowsAhead, 1, p0, depth);
    alignas(64) float row[Depth];
    load_row(row, a.m.data, a.m.dtype, (i0 + i) * a.m.stride + p0, depth);
    for (int64_t p = depth; p < steps * kStep; ++p) row[p] = 0.0f;
    char* tile = operand + (i / height * (Depth / kStep) * Parts) * kTileBytes + i % height * 64;
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

// kTile columns and up to Source::kDepth values of p.
struct TilePanel {
  char* parts;
  float* floats;        // the same as float32, for those that need care
  bool filled;          // they are there
  bool tame;            // finite, and so are the scales, far from the ends of float32
  int64_t group;        // steps that share their scales
  const float* scales;  // [group][kTile]
};

// The float32 panel, in parts.
template <int Parts>
void split_panel(int64_t depth, TilePanel& to) {
  char* parts = to.parts;
  __mmask16 nan = 0;  // rounding its bits may make a number of a NaN
  for (int64_t s = 0; s < ceil_div(depth, kStep); ++s, parts += NV * Parts * kTileBytes)
    for (int64_t q = 0; q < kTileRows; ++q)
      for (int64_t v = 0; v < NV; ++v) {
        const float* from = to.floats + (s * kStep + 2 * q) * kTile + v * W;
        vf even = mul(load(from), set1(kScaleW)), odd = mul(load(from + kTile), set1(kScaleW));
        nan |= _mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q);
        for (int part = 0; part < Parts; ++part) {
          const vi low = take_part(even), high = take_part(odd);
          storei(reinterpret_cast<uint32_t*>(parts + (part * NV + v) * kTileBytes + q * 64),
                 _mm512_mask_blend_epi16(0xaaaaaaaa, shr<16>(low), high));
        }
      }
  to.tame = nan == 0;
}

// A source whose rows or columns are filled as float32 and split.
template <bool Transposed, class Source>
struct SplitSource {
  static constexpr int64_t kDepth = 256;
  const Source& source;
  float scales[kTile];

  explicit SplitSource(const Source& from) : source(from) {
    for (int v = 0; v < NV; ++v) store(scales + v * W, set1(kUnscaleA / kScaleW));
  }
  static bool whole_rows() { return Transposed; }
  void begin(int64_t, int64_t) const {}
  void floats(int64_t j0, int64_t columns, int64_t p0, int64_t depth, TilePanel& to) const {
    if constexpr (Transposed)
      fill_transposed(source, j0, columns, p0, depth, to.floats);
    else
      fill_natural(source, j0, columns, p0, depth, to.floats);
    for (int64_t p = 0; p < ceil_div(depth, kStep) * kStep; ++p)
      for (int64_t v = p < depth ? ceil_div(columns, W) : 0; v < NV; ++v)
        store(to.floats + p * kTile + v * W, zero());
    to.filled = true;
  }
  template <int Parts>
  void fill(int64_t j0, int64_t columns, int64_t p0, int64_t depth, TilePanel& to) const {
    floats(j0, columns, p0, depth, to);
    split_panel<Parts>(depth, to);
    to.group = kDepth / kStep;
    to.scales = scales;
  }
};

// Rows of a 4-bit weight whose blocks fit its rows, as columns of codes.
class CodeSource {
 public:
  static constexpr int64_t kDepth = 128;
  explicit CodeSource(const Quantized& weight) : source(weight), chunks(weight.w) {
    vf rest = source.lut.entries;
    for (vi& table : tables) {
      uint32_t part[16];
      uint16_t words[32];  // twice: the fifth bit of an index is not ours
      storei(part, take_part(rest));
      for (int i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(part[i % 16] >> 16);
      table = loadi(words);
    }
    for (int b = 0; b < 4; ++b) {
      uint8_t offsets[64];  // of bits in a quadword, for each byte of the result
      for (int i = 0; i < 64; ++i)
        offsets[i] = static_cast<uint8_t>(i / 4 % 2 * 32 + 8 * b + (i % 4 == 0 ? 4 : 0));
      nibbles[b] = loadi(offsets);
    }
  }
  // Codes that the tables hold exactly, and tame ones.
  static bool takes(const Weight4& w) {
    if (!blocks_fit_rows(w)) return false;
    for (int i = 0; i < 16; ++i) {
      const float size = float_of(bits_of(w.code[i]) & 0x7fffffff);
      if (!(size == 0.0f || (size > 0x1p-60f && size < 0x1p60f))) return false;
    }
    return true;
  }

  void floats(int64_t j0, int64_t columns, int64_t p0, int64_t depth, TilePanel& to) const {
    SplitSource<true, Quantized>(source).floats(j0, columns, p0, depth, to);
  }
  static bool whole_rows() { return true; }
  // Columns [j0, j0 + columns) come next.
  void begin(int64_t j0, int64_t columns) {
    const int64_t blocks = chunks.blocks_per_row, stride = Chunks::scales_size(source.w);
    const int64_t panels = ceil_div(columns, kTile);
    first_column = j0;
    scales = static_cast<float*>(
        scratch(Slot::scales, (panels * blocks * kTile + W * stride) * sizeof(float)));
    float* by_row = scales + panels * blocks * kTile;
    vi largest = set1i(0), smallest = set1i(bits_of(1.0f));
    for (int64_t j = 0; j < panels * kTile; j += W) {
      for (int64_t l = 0; l < W; ++l)
        chunks.load_row_scales(by_row + l * stride, j0 + min64(j + l, columns - 1), 0, blocks);
      float* to = scales + j / kTile * (blocks * kTile) + j % kTile;
      for (int64_t b = 0; b < blocks; b += W) {
        vf lanes[W];
        for (int64_t l = 0; l < W; ++l) lanes[l] = load(by_row + l * stride + b);
        transpose(lanes);
        for (int64_t q = 0; q < min64(W, blocks - b); ++q) {
          const vi size = abs_bits(lanes[q]);
          largest = maxi(largest, size);
          smallest =
              _mm512_mask_min_epi32(smallest, _mm512_test_epi32_mask(size, size), smallest, size);
          store(to + (b + q) * kTile, mul(lanes[q], set1(kUnscaleA)));
        }
      }
    }
    tame = _mm512_reduce_max_epi32(largest) < static_cast<int>(bits_of(0x1p60f)) &&
           _mm512_reduce_min_epi32(smallest) > static_cast<int>(bits_of(0x1p-80f));
  }
  template <int>
  void fill(int64_t j0, int64_t columns, int64_t p0, int64_t depth, TilePanel& to) const {
    for (int64_t v = 0; v < NV; ++v)
      for (int64_t p = 0; p < depth; p += kChunk) {
        vf dwords[W];
        for (int64_t l = 0; l < W; ++l) {  // a missing row repeats the last one
          const int64_t n = j0 + min64(v * W + l, columns - 1);
          dwords[l] = as_float(chunks.packed(n, p0 + p));
          chunks.prefetch(n, p0 + p + kCodesAhead);
        }
        transpose(dwords);
        for (int64_t d = 0; d < min64(W, (depth - p) / 8); ++d) {
          const int64_t q = (p + 8 * d) / 2;
          char* at =
              to.parts + (q / kTileRows * NV * kMaxParts + v) * kTileBytes + q % kTileRows * 64;
          for (int b = 0; b < 4; ++b) {
            const vi index = _mm512_multishift_epi64_epi8(nibbles[b], as_bits(dwords[d]));
            for (int part = 0; part < kMaxParts; ++part)
              storei(reinterpret_cast<uint32_t*>(at + part * NV * kTileBytes + b * 64),
                     _mm512_permutexvar_epi16(index, tables[part]));
          }
        }
      }
    to.filled = false;
    to.tame = tame;
    to.group = min64(kDepth / kStep, (int64_t{1} << source.w.block_shift) / kStep);
    to.scales =
        scales +
        ((j0 - first_column) / kTile * chunks.blocks_per_row + chunks.first_block(p0)) * kTile;
  }

 private:
  const Quantized& source;
  Chunks chunks;
  vi tables[kMaxParts], nibbles[4];
  int64_t first_column = 0;
  float* scales = nullptr;  // [panel][block][column], of a
  bool tame = true;
};

// -- product --------------------------------------------------------------------------------------

// sums[row][column] of one or two tiles of `height` rows, and kTile columns: the product of `steps`
// steps, the smallest parts first. TileSize: from one tile of rows to the next. Registers: 0-3
// sums, 4-5 a part of a, 6-7 a part of two column tiles. After each step, between(s) runs beside
// the products that were begun.
template <int Rows, int PartsA, int PartsW, int64_t TileSize, class Between>
inline void multiply_tiles(const char* a, const char* w, int64_t steps, int height, float* sums,
                           const Between& between) {
  const auto load_a = [&](int part) {
    _tile_loadd(4, a + part * kTileBytes, 64);
    if constexpr (Rows == 2) _tile_loadd(5, a + TileSize + part * kTileBytes, 64);
  };
  const auto load_w = [&](int part) {
    _tile_loadd(6, w + NV * part * kTileBytes, 64);
    _tile_loadd(7, w + (NV * part + 1) * kTileBytes, 64);
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
  for (int64_t s = 0; s < steps; ++s) {
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
    if constexpr (PartsA > 1) {
      multiply();
      if constexpr (PartsA > 2) {
        load_a(2);
        multiply();
      }
      load_a(0);
    }
    multiply();
    a += PartsA * kTileBytes;
    w += NV * PartsW * kTileBytes;
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
  float row[kDepth + kPad];
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
  for (int64_t k = 0; k < rows * kTile; k += kTile)
    for (int v = 0; v < NV; ++v) check[v] = fma(load(sums + k + v * W), zero(), check[v]);
  return _mm512_cmp_ps_mask(check[0], check[1], _CMP_UNORD_Q) == 0;
}

// c[i, j] += sums[i, j] * scales[j], kTile columns.
inline void add_sums(const float* sums, const float* scales, int64_t rows, float* c) {
  const vf low = load(scales), high = load(scales + W);
  for (int64_t i = 0; i < rows; ++i, sums += kTile, c += kWidth) {
    store(c, fma(load(sums), low, load(c)));
    store(c + W, fma(load(sums + W), high, load(c + W)));
  }
}

// Sums on their way to rows [row, row + rows) of c.
struct Sums {
  alignas(64) float values[2 * kTileRows * kTile];
  int64_t row = 0, rows = 0, group = 0;
};

// c[i, j] += Σ_{p < depth} a(i0 + i, p) · P[p, j0 + j] for columns of several panels, whose tiles
// of c lie one after the other.
template <int PartsA, int PartsW, class Source>
class PartsProduct {
 public:
  PartsProduct(const Operand<false>& operand, Source& weight, int64_t first, int64_t count)
      : a(operand),
        source(weight),
        i0(first),
        rows(count),
        height(static_cast<int>(ceil_div(count, ceil_div(count, kTileRows)))),
        tiles(height) {
    panel.floats = static_cast<float*>(
        scratch(Slot::panel, kDepth * kTile * sizeof(float) + kSteps * NV * PartsW * kTileBytes));
    panel.parts = reinterpret_cast<char*>(panel.floats + kDepth * kTile);
  }

  void run(int64_t j0, int64_t columns, int64_t depth, float* c) {
    const int64_t size = ceil_div(rows, height) * kTileSize, chunks = ceil_div(depth, kDepth);
    const auto at = [&](int64_t j) { return c + j / kWidth * (rows * kWidth) + j % kWidth; };
    if (source.whole_rows() && chunks * size <= kWholeOperand) {
      char* operand = static_cast<char*>(scratch(Slot::operand, chunks * size));
      for (int64_t k = 0; k < chunks; ++k) pack(k, depth, operand + k * size);
      for (int64_t j = 0; j < columns; j += kTile) {
        source.begin(j0 + j, min64(kTile, columns - j));
        for (int64_t k = 0; k < chunks; ++k)
          multiply(k, depth, operand + k * size, j0 + j, min64(kTile, columns - j), at(j));
      }
      return;
    }
    char* operand = static_cast<char*>(scratch(Slot::operand, size));
    source.begin(j0, columns);
    for (int64_t k = 0; k < chunks; ++k) {
      pack(k, depth, operand);
      for (int64_t j = 0; j < columns; j += kTile)
        multiply(k, depth, operand, j0 + j, min64(kTile, columns - j), at(j));
    }
  }

 private:
  static constexpr int64_t kDepth = Source::kDepth, kSteps = kDepth / kStep;
  static constexpr int64_t kTileSize = kSteps * PartsA * kTileBytes;

  void pack(int64_t chunk, int64_t depth, char* operand) const {
    const int64_t p = chunk * kDepth;
    pack_tiles<PartsA, kDepth>(a, i0, rows, height, p, min64(kDepth, depth - p), operand);
  }

  // All rows by one panel. While sums are computed, those before are added to c.
  void multiply(int64_t chunk, int64_t depth, const char* operand, int64_t j0, int64_t columns,
                float* c) {
    p0 = chunk * kDepth;
    n = min64(kDepth, depth - p0);
    panel_j0 = j0;
    panel_columns = columns;
    source.template fill<PartsW>(j0, columns, p0, n, panel);
    const int64_t steps = ceil_div(n, kStep);
    int which = 0;
    sums[1].rows = 0;
    for (int64_t i = 0; i < rows; i += 2 * height)
      for (int64_t s = 0; s < steps; s += panel.group, which ^= 1) {
        const int64_t count = min64(panel.group, steps - s), share = ceil_div(2 * height, count);
        const auto between = [&](int64_t step) {
          add(sums[which ^ 1], step * share, (step + 1) * share, c);
        };
        const char* at = operand + i / height * kTileSize + s * PartsA * kTileBytes;
        const char* parts = panel.parts + s * NV * PartsW * kTileBytes;
        Sums& to = sums[which];
        if (i + height < rows)
          multiply_tiles<2, PartsA, PartsW, kTileSize>(at, parts, count, height, to.values,
                                                       between);
        else
          multiply_tiles<1, PartsA, PartsW, kTileSize>(at, parts, count, height, to.values,
                                                       between);
        to.row = i;
        to.rows = min64(2 * height, rows - i);
        to.group = s / panel.group;
      }
    add(sums[which ^ 1], 0, 2 * height, c);
  }

  // Rows [begin, end) of those.
  void add(const Sums& from, int64_t begin, int64_t end, float* c) {
    const int64_t count = min64(end, from.rows) - begin, row = from.row + begin;
    if (count <= 0) return;
    const float* values = from.values + begin * kTile;
    if (panel.tame && is_finite(values, count))
      add_sums(values, panel.scales + from.group * kTile, count, c + row * kWidth);
    else
      add_with_care(values, from.group, row, count, c);
  }
  __attribute__((noinline, cold)) void add_with_care(const float* values, int64_t group,
                                                     int64_t row, int64_t count, float* c) {
    if (!panel.filled) source.floats(panel_j0, panel_columns, p0, n, panel);
    const int64_t begin = group * panel.group * kStep;
    for (int64_t i = row; i < row + count; ++i, values += kTile) {
      if (panel.tame && is_finite(values, 1))
        add_sums(values, panel.scales + group * kTile, 1, c + i * kWidth);
      else
        add_row(a, i0 + i, p0 + begin, min64(panel.group * kStep, n - begin),
                panel.floats + begin * kTile, c + i * kWidth);
    }
  }

  const Operand<false>& a;
  Source& source;
  const int64_t i0, rows;
  const int height;
  const Tiles tiles;
  int64_t p0 = 0, n = 0, panel_j0 = 0, panel_columns = 0;
  TilePanel panel;
  Sums sums[2];
};

template <int PartsA, int PartsW, class Source>
void accumulate_parts(const Operand<false>& a, Source& source, int64_t i0, int64_t rows, int64_t j0,
                      int64_t columns, int64_t depth, float* c) {
  PartsProduct<PartsA, PartsW, Source>(a, source, i0, rows).run(j0, columns, depth, c);
}

template <int PartsW, class Source>
void accumulate_from(const Operand<false>& a, Source source, int64_t i0, int64_t rows, int64_t j0,
                     int64_t columns, int64_t depth, float* c) {
  if (a.m.dtype == DType::f32)
    accumulate_parts<3, PartsW>(a, source, i0, rows, j0, columns, depth, c);
  else if (a.m.dtype == DType::f16)
    accumulate_parts<2, PartsW>(a, source, i0, rows, j0, columns, depth, c);
  else
    accumulate_parts<1, PartsW>(a, source, i0, rows, j0, columns, depth, c);
}

template <bool TransposedSource>
void accumulate_tiles(const Operand<false>& a, const Quantized& source, int64_t i0, int64_t rows,
                      int64_t j0, int64_t columns, int64_t depth, float* c) {
  if (TransposedSource && CodeSource::takes(source.w))
    accumulate_from<3>(a, CodeSource(source), i0, rows, j0, columns, depth, c);
  else
    accumulate_from<3>(a, SplitSource<TransposedSource, Quantized>(source), i0, rows, j0, columns,
                       depth, c);
}

template <bool TransposedSource>
void accumulate_tiles(const Operand<false>& a, const ColumnStrip& source, int64_t i0, int64_t rows,
                      int64_t j0, int64_t columns, int64_t depth, float* c) {
  accumulate_from<3>(a, SplitSource<TransposedSource, ColumnStrip>(source), i0, rows, j0, columns,
                     depth, c);
}

template <bool TransposedSource>
void accumulate_tiles(const Operand<false>& a, const Dense& source, int64_t i0, int64_t rows,
                      int64_t j0, int64_t columns, int64_t depth, float* c) {
  const SplitSource<TransposedSource, Dense> split(source);
  if (source.m.dtype == DType::f32)
    accumulate_from<3>(a, split, i0, rows, j0, columns, depth, c);
  else if (source.m.dtype == DType::f16)
    accumulate_from<2>(a, split, i0, rows, j0, columns, depth, c);
  else
    accumulate_from<1>(a, split, i0, rows, j0, columns, depth, c);
}
