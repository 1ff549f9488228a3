// gemm.inl's product on pairs of bfloat16 numbers, for activations of 16 bits: each operand is
// rounded once to bfloat16, sums are float32.
//
//   forward  a(i, p) = x, P[p, j] = the codes of kLanes; the sums of a block are scaled
//   dX       a(i, p) = dy, P[p, j] = kLanes, decoded and rounded once
//
//   panel    pairs of P[p, j] for kDepth values of p and kMicroColumns columns j:
//
//              | pair 0: kMicroColumns dwords | pair 1: kMicroColumns dwords | ...
//
//   operand  pairs of a(i, p) for all rows and kDepth values of p, row by row
//
// Operand and panel pair the same two values of p: p and p + 4 of eight in forward, as the lookup
// in a packed dword gives them, and p and p + 1 in dX. Sums run over the pairs in order, in forward
// from zero for each block: a row's bits depend on nothing else.

constexpr int64_t kPanelPairs = kDepth / 2;          // pairs of p in a panel
constexpr int64_t kPairStride = kPanelPairs + kPad;  // dwords of an operand's row

enum class Pairing { eights, neighbours };

// Rows [i0, i0 + rows) of m, columns [p0, p0 + depth), as pairs; zero beyond.
template <Pairing pairing>
void pack_pairs(const Matrix& m, int64_t i0, int64_t rows, int64_t p0, int64_t depth,
                uint32_t* dst) {
  constexpr int64_t kStep = 2 * kLanes;  // numbers of a vector
  const int64_t padded = ceil_div(depth, kStep) * kStep;
  for (int64_t i = 0; i < rows; ++i, dst += kPairStride) {
    alignas(64) uint16_t row[kDepth];
    load_row16(row, m.data, m.dtype, (i0 + i) * m.stride + p0, depth);
    for (int64_t p = depth; p < padded; ++p) row[p] = 0;
    for (int64_t p = 0; p < padded; p += kStep) {
      const vi numbers = loadi(row + p);
      storei(dst + p / 2, pairing == Pairing::eights ? pairs_of_eight(numbers) : numbers);
    }
  }
}

// -- register tile --------------------------------------------------------------------------------

// c[i, j] += Σ a(i, p) P[p, j] over `pairs` pairs, times the scale of column j where there are
// scales. Inlined, it would be short of registers.
template <int Rows, int Vectors, bool Scaled>
__attribute__((noinline)) void pair_kernel(const uint32_t* a, const uint32_t* panel, int64_t pairs,
                                           const float* const* scales, float* c) {
  vf sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v)
      sum[i][v] = Scaled ? zero() : load(c + i * kStripWidth + v * kLanes);
  for (int64_t q = 0; q < pairs; ++q, panel += kMicroColumns) {
    vi b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = loadi(panel + v * kLanes);
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Vectors; ++v) sum[i][v] = dot2(sum[i][v], b[v], a[i * kPairStride + q]);
  }
  for (int v = 0; v < Vectors; ++v) {
    const vf scale = Scaled ? load(scales[v]) : zero();
    for (int i = 0; i < Rows; ++i) {
      float* to = c + i * kStripWidth + v * kLanes;
      store(to, Scaled ? fma(sum[i][v], scale, load(to)) : sum[i][v]);
    }
  }
}

template <int Rows, bool Scaled>
inline void pair_kernel_rows(int rows, int vectors, const uint32_t* a, const uint32_t* panel,
                             int64_t pairs, const float* const* scales, float* c) {
  if constexpr (Rows > 0) {
    if (rows != Rows)
      return pair_kernel_rows<Rows - 1, Scaled>(rows, vectors, a, panel, pairs, scales, c);
    if (vectors == 1) return pair_kernel<Rows, 1, Scaled>(a, panel, pairs, scales, c);
    pair_kernel<Rows, kMicroVectors, Scaled>(a, panel, pairs, scales, c);
  }
}

// -- panels ---------------------------------------------------------------------------------------

// Codes of rows of the weight as lanes: LaneRows, its lookup made in pairs.
struct LanePairs {
  static constexpr Pairing kPairing = Pairing::eights;
  static constexpr bool kScaled = true;
  const LaneRows& rows;
  const PairLut& table;

  // Pairs that share their scales.
  int64_t group() const {
    return min64(kPanelPairs, (int64_t{1} << rows.chunks.w.block_shift) / 2);
  }
  const float* scale(int64_t j, int64_t p) const { return rows.scale((j - rows.n0) / kLanes, p); }
  void fill(int64_t j0, int64_t columns, int64_t p0, int64_t depth, uint32_t* panel) const {
    uint32_t codes[kDepth / 8 * kLanes];
    for (int64_t j = 0; j < columns; j += kLanes) {
      rows.load_codes((j0 - rows.n0 + j) / kLanes, p0, depth, codes);
      uint32_t* out = panel + j;
      for (int64_t d = 0; d < depth / 8; ++d, out += 4 * kMicroColumns) {
        const vi dwords = loadi(codes + d * kLanes);
        rows.chunks.prefetch(j0 + kMicroColumns + j + d / 2, p0 + d % 2 * 128);
        for_pairs([&](auto s) {
          constexpr int S = decltype(s)::value;
          storei(out + S * kMicroColumns, pair_of<S>(table, dwords));
        });
      }
    }
  }
};

// Decoded columns of the weight: ColumnStrip, two of its rows a pair.
struct StripPairs {
  static constexpr Pairing kPairing = Pairing::neighbours;
  static constexpr bool kScaled = false;
  const ColumnStrip& strip;

  int64_t group() const { return kPanelPairs; }
  const float* scale(int64_t, int64_t) const { return nullptr; }
  void fill(int64_t j0, int64_t columns, int64_t p0, int64_t depth, uint32_t* panel) const {
    if (j0 == strip.j0) strip.load_row_scales(p0, depth);
    const Lut lut = strip.lut;
    const int64_t row_bytes = strip.w.K >> 1, vectors = columns / kLanes;  // K is a multiple of 32
    const uint8_t* packed = strip.packed(p0, j0);
    const float* scales = strip.scales + (j0 >> strip.w.block_shift) - strip.first_block;
    for (int64_t p = 0; p < depth; p += 2, packed += 2 * row_bytes, scales += 2 * strip.stride) {
      const bool both = p + 1 < depth;
      const vf even = set1(scales[0]), odd = set1(both ? scales[strip.stride] : 0.0f);
      for (int64_t v = 0; v < vectors; ++v) {
        const uint8_t* at = packed + v * (kLanes / 2);
        const vf first = mul(lut_nibbles(lut, at), even);
        const vf second = both ? mul(lut_nibbles(lut, at + row_bytes), odd) : zero();
        storei(panel + p / 2 * kMicroColumns + v * kLanes, round_pairs(first, second));
        __builtin_prefetch(at + kRowsFar * row_bytes, 0, 2);
      }
    }
  }
};

// -- product --------------------------------------------------------------------------------------

// c[i, j] += Σ_{p < depth} a(i0 + i, p) · P[p, j0 + j]; c as in gemm.inl.
template <class Source>
void accumulate_pairs(const Matrix& a, const Source& source, int64_t i0, int64_t rows, int64_t j0,
                      int64_t columns, int64_t depth, float* c) {
  uint32_t* panel = static_cast<uint32_t*>(
      scratch(Buffer::panel, kPanelPairs * kMicroColumns * sizeof(uint32_t)));
  uint32_t* operand =
      static_cast<uint32_t*>(scratch(Buffer::operand, rows * kPairStride * sizeof(uint32_t)));
  const int64_t even = ceil_div(rows, ceil_div(rows, kMicroRows));  // 16 rows as 8 + 8, not 14 + 2
  const int64_t group = source.group();
  for (int64_t p0 = 0; p0 < depth; p0 += kDepth) {
    const int64_t n = min64(kDepth, depth - p0), pairs = ceil_div(n, 2);
    pack_pairs<Source::kPairing>(a, i0, rows, p0, n, operand);
    for (int64_t j = 0; j < columns; j += kMicroColumns) {
      const int64_t width = min64(kMicroColumns, columns - j);
      source.fill(j0 + j, width, p0, n, panel);
      float* tile = c + j / kStripWidth * (rows * kStripWidth) + j % kStripWidth;
      const int vectors = width <= kLanes ? 1 : kMicroVectors;
      for (int64_t i = 0; i < rows; i += even)
        for (int64_t q = 0; q < pairs; q += group) {
          const float* scales[kMicroVectors];
          for (int v = 0; v < vectors; ++v)
            scales[v] = source.scale(j0 + j + v * kLanes, p0 + 2 * q);
          pair_kernel_rows<kMicroRows, Source::kScaled>(
              static_cast<int>(min64(even, rows - i)), vectors, operand + i * kPairStride + q,
              panel + q * kMicroColumns, min64(group, pairs - q), scales, tile + i * kStripWidth);
        }
    }
  }
}
