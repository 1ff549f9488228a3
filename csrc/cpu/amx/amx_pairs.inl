// gemm_pairs.inl's product on the tile registers of AMX, from the same panels: operands rounded
// once to bfloat16 meet in one product each, where amx_gemm.inl needs three or six of splits.
//
//   operand  for each 16 rows, step of 16 pairs:  | row 0: 16 pairs | row 1 | ... up to 16 rows |
//   panel    of gemm_pairs.inl: 16 pairs of it are two registers, side by side
//
// A step of 32 rows and 32 columns loads four registers and makes four products. Sums run over the
// steps in order, from zero for each group of them that shares scales, or for each panel: a row's
// bits depend on nothing else. The unit takes subnormal numbers for zero, as dot2 does.

// Rows from which this is the fastest: counted, not measured. For each 32 weights of a panel
// filling it takes some 4 (forward) or 12 (dX) instructions, and a register of 16 rows one cycle of
// the unit. skinny_pairs.inl and gemm_pairs.inl take one product for each row, one or two of which
// begin in a cycle, so 5 rows would pay; the few more are for loading and storing registers.
constexpr int64_t kAmxForwardPairs = 8, kAmxDxPairs = 8;

constexpr int64_t kStepPairs = kStep / 2;
constexpr int64_t kPairRows = kPanelPairs / kStepPairs * kAmxBytes;  // bytes of 16 rows of operand

// Rows [i0, i0 + rows) of a, columns [p0, p0 + depth), zero beyond, for registers of `height` rows.
template <Pairing pairing>
void amx_pack_pairs(const Matrix& a, int64_t i0, int64_t rows, int height, int64_t p0,
                    int64_t depth, char* operand) {
  for (int64_t i = 0; i < rows; ++i) {
    alignas(64) uint16_t row[kDepth];
    load_row16(row, a.data, a.dtype, (i0 + i) * a.stride + p0, depth);
    for (int64_t p = depth; p < ceil_div(depth, kStep) * kStep; ++p) row[p] = 0;
    char* to = operand + i / height * kPairRows + i % height * 64;
    for (int64_t p = 0; p < depth; p += kStep, to += kAmxBytes) {
      const vi numbers = loadi(row + p);
      storei(reinterpret_cast<uint32_t*>(to),
             pairing == Pairing::eights ? pairs_of_eight(numbers) : numbers);
    }
  }
}

// c[i, j] += Σ_{p < depth} a(i0 + i, p) · P[p, j0 + j]; c as in gemm.inl.
template <class Source>
class AmxPairs {
 public:
  AmxPairs(const Matrix& operand_rows, const Source& weight, int64_t first, int64_t count)
      : a(operand_rows),
        source(weight),
        i0(first),
        rows(count),
        height(amx_height(count)),
        registers(height),
        panel(static_cast<uint32_t*>(
            scratch(Buffer::panel, kPanelPairs * kMicroColumns * sizeof(uint32_t)))),
        operand(static_cast<char*>(scratch(Buffer::operand, ceil_div(count, height) * kPairRows))) {
    store(ones, set1(1.0f));
  }

  void run(int64_t j0, int64_t columns, int64_t depth, float* c) {
    for (int64_t p0 = 0; p0 < depth; p0 += kDepth) {
      const int64_t n = min64(kDepth, depth - p0);
      amx_pack_pairs<Source::kPairing>(a, i0, rows, height, p0, n, operand);
      for (int64_t j = 0; j < columns; j += kMicroColumns) {
        const int64_t width = min64(kMicroColumns, columns - j);
        source.fill(j0 + j, width, p0, n, panel);
        // What an operand's padding meets must be numbers.
        for (int64_t q = ceil_div(n, 2) * kMicroColumns;
             q < ceil_div(n, kStep) * kStepPairs * kMicroColumns; q += kLanes)
          storei(panel + q, set1i(0));
        for (int v = 0; v < kMicroVectors; ++v)  // missing columns take the scales of the first
          scales[v] = Source::kScaled
                          ? source.scale(j0 + j + (v * kLanes < width ? v * kLanes : 0), p0)
                          : ones;
        multiply(ceil_div(n, kStep), c + j / kStripWidth * (rows * kStripWidth) + j % kStripWidth);
      }
    }
  }

 private:
  // All rows by one panel. While sums are computed, those before are added to c.
  void multiply(int64_t steps, float* c) {
    const int64_t group = source.group() / kStepPairs;
    int which = 0;
    sums[1].rows = 0;
    for (int64_t i = 0; i < rows; i += 2 * height)
      for (int64_t s = 0; s < steps; s += group, which ^= 1) {
        const int64_t count = min64(group, steps - s), share = ceil_div(2 * height, count);
        const auto between = [&](int64_t step) {
          add(sums[which ^ 1], step * share, (step + 1) * share, c);
        };
        const char* at = operand + i / height * kPairRows + s * kAmxBytes;
        const char* w = reinterpret_cast<const char*>(panel + s * kStepPairs * kMicroColumns);
        Sums& to = sums[which];
        if (i + height < rows)
          amx_multiply<2, 1, 1, kPairRows, RowsOfPairs>(at, w, count, height, to.values, between);
        else
          amx_multiply<1, 1, 1, kPairRows, RowsOfPairs>(at, w, count, height, to.values, between);
        to.row = i;
        to.rows = min64(2 * height, rows - i);
        to.group = s / group;
      }
    add(sums[which ^ 1], 0, 2 * height, c);
  }

  // Adds rows [begin, end) of those sums.
  void add(const Sums& from, int64_t begin, int64_t end, float* c) const {
    const int64_t count = min64(end, from.rows) - begin;
    if (count > 0)
      add_sums(from.values + begin * kMicroColumns, scales, from.group, count,
               c + (from.row + begin) * kStripWidth);
  }

  const Matrix& a;
  const Source& source;
  const int64_t i0, rows;
  const int height;
  const AmxRegisters registers;
  uint32_t* const panel;
  char* const operand;
  float ones[kLanes];
  const float* scales[kMicroVectors];  // of 16 columns: [group][kLanes]
  Sums sums[2];
};

template <class Source>
void accumulate_pairs_amx(const Matrix& a, const Source& source, int64_t i0, int64_t rows,
                          int64_t j0, int64_t columns, int64_t depth, float* c) {
  AmxPairs<Source>(a, source, i0, rows).run(j0, columns, depth, c);
}
