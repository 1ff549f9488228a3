// The base product on the tile registers of AMX, which multiply bfloat16 and add in float32.
//
// A float32 number is the exact sum of three bfloat16 numbers, its splits: v = v1 + v2 + v3, each
// of them what is left, rounded to nearest, |v2| <= 2^-8 |v|, |v3| <= 2^-16 |v|. A product of two
// is then
//
//   a w = a1 w1 + (a1 w2 + a2 w1) + (a1 w3 + a2 w2 + a3 w1) + less than 2^-22 |a w|
//
// which are six products of splits, each exact in float32. bfloat16 numbers have one split, float16
// ones two.
//
// The unit takes subnormal numbers for zero, so a is scaled by 2^40: what is lost then lies below
// float32's smallest number. A sum that is not finite (an operand was not, or it was too large) is
// computed again by float32 arithmetic.
//
// The codes of a 4-bit weight are multiplied, and the sums of a block are scaled: each code has its
// splits in a table. Other weights, and all weights in the transposed product, are split as they
// are, scaled by 2^24.
//
//   operand  for each 16 rows, step of 32 p, split:       | row 0: 32 p | row 1 | ... 16 rows
//   panel    for each step, split, 16 columns:            | p = 0, 1: 16 columns of pairs | ...
//   sums     [32 rows][32 columns] of a group of steps: those that share their scales
//
// Sums run over the steps in order, from zero for each group: a row's bits depend on nothing else.

constexpr bool kHasAmx = true;
constexpr int64_t kAmxForward = 14, kAmxDx = 48;  // rows from which this is faster
constexpr int kAmxRows = 16;                      // of a tile register
constexpr int64_t kStep = 32;                     // p of a tile register
constexpr int64_t kAmxBytes = 1024;               // of a tile register
constexpr int kMaxSplits = 3;
constexpr float kScaleA = 0x1p40f, kUnscaleA = 0x1p-40f, kScaleW = 0x1p24f;
static_assert(kMicroColumns == 2 * kLanes, "two registers of columns are filled at a time");

constexpr int64_t kCodesAhead = 256;        // p from a load of codes to their prefetch
constexpr int64_t kRowsAhead = 8;           // from a load of a to its prefetch
constexpr int64_t kWholeOperand = 3 << 19;  // bytes: kept for all p, the weight is read row by row

// Returns the next split of v, in the upper halves of the lanes; v becomes the rest.
inline vi take_split(vf& v) {
  const vi split = addi(as_bits(v), set1i(0x8000));
  v = _mm512_sub_ps(v, as_float(_mm512_and_si512(split, set1i(0xffff0000))));
  return split;
}

// -- operand --------------------------------------------------------------------------------------

// Packs rows [i0, i0 + rows) of a, columns [p0, p0 + depth), for registers of `height` rows.
template <int Splits, int64_t Depth>
void amx_pack(const Operand<false>& a, int64_t i0, int64_t rows, int height, int64_t p0,
              int64_t depth, char* operand) {
  uint16_t odd_words[2 * kLanes];  // of two vectors
  for (int i = 0; i < 2 * kLanes; ++i) odd_words[i] = static_cast<uint16_t>(2 * i + 1);
  const vi words = loadi(odd_words);
  const vf scale = set1(kScaleA);
  const int64_t steps = ceil_div(depth, kStep);
  for (int64_t i = 0; i < rows; ++i) {
    if (i + kRowsAhead < rows) a.prefetch(i0 + i + kRowsAhead, 1, p0, depth);
    alignas(64) float row[Depth];
    load_row(row, a.m.data, a.m.dtype, (i0 + i) * a.m.stride + p0, depth);
    for (int64_t p = depth; p < steps * kStep; ++p) row[p] = 0.0f;
    char* first_step =
        operand + (i / height * (Depth / kStep) * Splits) * kAmxBytes + i % height * 64;
    char* to = first_step;
    vf check = zero();
    for (int64_t s = 0; s < steps; ++s) {
      vf low = mul(load(row + s * kStep), scale), high = mul(load(row + s * kStep + kLanes), scale);
      check = fma(low, zero(), fma(high, zero(), check));
      for (int split = 0; split < Splits; ++split, to += kAmxBytes) {
        const vi first = take_split(low), second = take_split(high);
        storei(reinterpret_cast<uint32_t*>(to), _mm512_permutex2var_epi16(first, words, second));
      }
    }
    // Rounding its bits may have made a number of a NaN.
    if (_mm512_cmp_ps_mask(check, check, _CMP_UNORD_Q))
      *reinterpret_cast<uint16_t*>(first_step) = 0x7fc0;
  }
}

// -- panel ----------------------------------------------------------------------------------------

// A packed panel of kMicroColumns columns and up to Source::kDepth values of p.
struct AmxPanel {
  char* splits;
  float* floats;  // the same as float32, for those that need care
  bool filled;    // they are there
  bool tame;      // finite, and so are the scales, far from the ends of float32
  int64_t group;  // steps that share their scales
  const float* scales[kMicroVectors];  // of 16 columns: [group][kLanes]
};

// Splits the float32 panel.
template <int Splits>
void split_panel(int64_t depth, AmxPanel& to) {
  char* splits = to.splits;
  __mmask16 nan = 0;  // rounding its bits may make a number of a NaN
  for (int64_t s = 0; s < ceil_div(depth, kStep); ++s, splits += kMicroVectors * Splits * kAmxBytes)
    for (int64_t q = 0; q < kAmxRows; ++q)
      for (int64_t v = 0; v < kMicroVectors; ++v) {
        const float* from = to.floats + (s * kStep + 2 * q) * kMicroColumns + v * kLanes;
        vf even = mul(load(from), set1(kScaleW)),
           odd = mul(load(from + kMicroColumns), set1(kScaleW));
        nan |= _mm512_cmp_ps_mask(even, odd, _CMP_UNORD_Q);
        for (int split = 0; split < Splits; ++split) {
          const vi low = take_split(even), high = take_split(odd);
          storei(reinterpret_cast<uint32_t*>(splits + (split * kMicroVectors + v) * kAmxBytes +
                                             q * 64),
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
  float scales[kLanes];

  explicit SplitSource(const Source& from) : source(from) {
    store(scales, set1(kUnscaleA / kScaleW));
  }
  static bool whole_rows() { return Transposed; }
  void begin(int64_t, int64_t) const {}
  void floats(int64_t j0, int64_t columns, int64_t p0, int64_t depth, AmxPanel& to) const {
    if constexpr (Transposed)
      fill_transposed(source, j0, columns, p0, depth, to.floats);
    else
      fill_natural(source, j0, columns, p0, depth, to.floats);
    for (int64_t p = 0; p < ceil_div(depth, kStep) * kStep; ++p)
      for (int64_t v = p < depth ? ceil_div(columns, kLanes) : 0; v < kMicroVectors; ++v)
        store(to.floats + p * kMicroColumns + v * kLanes, zero());
    to.filled = true;
  }
  template <int Splits>
  void fill(int64_t j0, int64_t columns, int64_t p0, int64_t depth, AmxPanel& to) const {
    floats(j0, columns, p0, depth, to);
    split_panel<Splits>(depth, to);
    to.group = kDepth / kStep;
    for (const float*& columns_scales : to.scales) columns_scales = scales;
  }
};

// Rows of a 4-bit weight whose blocks fit its rows, as columns of codes.
class CodeSource {
 public:
  static constexpr int64_t kDepth = 128;
  explicit CodeSource(const Quantized& weight) : source(weight), chunks(weight.w) {
    vf rest = source.lut.entries;
    for (vi& table : tables) {
      uint32_t split[16];
      uint16_t words[32];  // twice: the fifth bit of an index is not ours
      storei(split, take_split(rest));
      for (int i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(split[i % 16] >> 16);
      table = loadi(words);
    }
    for (int b = 0; b < 4; ++b) {
      uint8_t offsets[64];  // of bits in a quadword, for each byte of the result
      for (int i = 0; i < 64; ++i)
        offsets[i] = static_cast<uint8_t>(i / 4 % 2 * 32 + 8 * b + (i % 4 == 0 ? 4 : 0));
      nibbles[b] = loadi(offsets);
    }
  }
  // Whether the tables hold the codes exactly, and all codes are tame.
  static bool takes(const Weight4& w) {
    if (!blocks_fit_rows(w)) return false;
    for (int i = 0; i < 16; ++i) {
      const float size = float_of(bits_of(w.code[i]) & 0x7fffffff);
      if (!(size == 0.0f || (size > 0x1p-60f && size < 0x1p60f))) return false;
    }
    return true;
  }

  void floats(int64_t j0, int64_t columns, int64_t p0, int64_t depth, AmxPanel& to) const {
    SplitSource<true, Quantized>(source).floats(j0, columns, p0, depth, to);
  }
  static bool whole_rows() { return true; }
  // Says that columns [j0, j0 + columns) come next.
  void begin(int64_t j0, int64_t columns) {
    first_column = j0;
    scales = load_lane_scales(chunks, j0, columns);
    vi largest = set1i(0), smallest = set1i(bits_of(1.0f));
    const int64_t size = ceil_div(columns, kLanes) * chunks.blocks_per_row * kLanes;
    for (int64_t k = 0; k < size; k += kLanes) {
      const vf scale = load(scales + k);
      const vi bits = abs_bits(scale);
      largest = maxi(largest, bits);
      smallest =
          _mm512_mask_min_epi32(smallest, _mm512_test_epi32_mask(bits, bits), smallest, bits);
      store(scales + k, mul(scale, set1(kUnscaleA)));
    }
    tame = _mm512_reduce_max_epi32(largest) < static_cast<int>(bits_of(0x1p60f)) &&
           _mm512_reduce_min_epi32(smallest) > static_cast<int>(bits_of(0x1p-80f));
  }
  template <int>
  void fill(int64_t j0, int64_t columns, int64_t p0, int64_t depth, AmxPanel& to) const {
    for (int64_t v = 0; v < kMicroVectors; ++v)
      for (int64_t p = 0; p < depth; p += kChunk) {
        vf dwords[kLanes];
        load_chunk(chunks, j0 + v * kLanes, columns - v * kLanes, p0 + p, dwords);
        chunks.prefetch_rows(j0 + v * kLanes, p0 + p + kCodesAhead);
        for (int64_t d = 0; d < min64(kLanes, (depth - p) / 8); ++d) {
          const int64_t q = (p + 8 * d) / 2;
          char* at = to.splits + (q / kAmxRows * kMicroVectors * kMaxSplits + v) * kAmxBytes +
                     q % kAmxRows * 64;
          for (int b = 0; b < 4; ++b) {
            const vi index = _mm512_multishift_epi64_epi8(nibbles[b], as_bits(dwords[d]));
            for (int split = 0; split < kMaxSplits; ++split)
              storei(reinterpret_cast<uint32_t*>(at + split * kMicroVectors * kAmxBytes + b * 64),
                     _mm512_permutexvar_epi16(index, tables[split]));
          }
        }
      }
    to.filled = false;
    to.tame = tame;
    to.group = min64(kDepth / kStep, (int64_t{1} << source.w.block_shift) / kStep);
    for (int64_t v = 0; v < kMicroVectors; ++v) {  // missing columns take the scales of the first
      const int64_t group = (j0 - first_column) / kLanes + (v * kLanes < columns ? v : 0);
      to.scales[v] = scales + (group * chunks.blocks_per_row + chunks.first_block(p0)) * kLanes;
    }
  }

 private:
  const Quantized& source;
  Chunks chunks;
  vi tables[kMaxSplits], nibbles[4];
  int64_t first_column = 0;
  float* scales = nullptr;  // of load_lane_scales, times kUnscaleA
  bool tame = true;
};
