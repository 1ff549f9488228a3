// The base product on AMX's tile registers: it multiplies the operands and panels of amx_split.inl,
// and adds the sums to c.

// Makes what was stored there visible to the AMX instructions that follow: GCC's are asm statements
// that do not say what they read.
inline void in_memory(const void* p) { __asm__ volatile("" : : "r"(p) : "memory"); }

// The tile registers of this thread, until the end: of sums (0-3), of `rows` rows of operands of
// `bytes` bytes each (4-5), and of panels (6-7).
class AmxRegisters {
 public:
  explicit AmxRegisters(int rows, int bytes = 64) {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int t = 0; t < 8; ++t) {
      shape.row_bytes[t] = static_cast<uint16_t>(t / 2 == 2 ? bytes : 64);
      shape.rows[t] = static_cast<uint8_t>(t < 6 ? rows : bytes / 4);
    }
    in_memory(&shape);
    _tile_loadconfig(&shape);
  }
  ~AmxRegisters() { _tile_release(); }
  AmxRegisters(const AmxRegisters&) = delete;
  AmxRegisters& operator=(const AmxRegisters&) = delete;
};

// How many rows of a tile register the rows are dealt out to evenly: 17 as 9 + 8, not 16 + 1.
inline int amx_height(int64_t rows) {
  return static_cast<int>(ceil_div(rows, ceil_div(rows, kAmxRows)));
}

// How the two registers of a step lie in a panel: one after the other (amx_split.inl), or row by
// row side by side (gemm_pairs.inl).
struct WholeRegisters {
  static constexpr int64_t kNext = kAmxBytes, kRow = 64;  // bytes to the second one, and to a row
};
struct RowsOfPairs {
  static constexpr int64_t kNext = 64, kRow = kMicroVectors * 64;
};

// sums[row][column] = the product of `steps` steps, the smallest splits first, for once or twice
// `height` rows and kMicroColumns columns. RowsSize leads from the first `height` rows of a to the
// next. Registers 0-3 hold sums, 4-5 a split of a, 6-7 a split of the panel. After each step,
// between(s) runs beside the products that were begun.
template <int Rows, int SplitsA, int SplitsW, int64_t RowsSize, class Layout, class Between>
inline void amx_multiply(const char* a, const char* w, int64_t steps, int height, float* sums,
                         const Between& between) {
  const auto load_a = [&](int split) {
    _tile_loadd(4, a + split * kAmxBytes, 64);
    if constexpr (Rows == 2) _tile_loadd(5, a + RowsSize + split * kAmxBytes, 64);
  };
  const auto load_w = [&](int split) {
    const char* first = w + kMicroVectors * split * kAmxBytes;
    _tile_loadd(6, first, Layout::kRow);
    _tile_loadd(7, first + Layout::kNext, Layout::kRow);
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
    if constexpr (SplitsW > 2) {
      load_w(2);
      multiply();
    }
    if constexpr (SplitsW > 1) {
      load_w(1);
      multiply();
    }
    if constexpr (SplitsA > 1) {
      load_a(1);
      if constexpr (SplitsW > 1) multiply();
    }
    load_w(0);
    if constexpr (SplitsA > 1) {
      multiply();
      if constexpr (SplitsA > 2) {
        load_a(2);
        multiply();
      }
      load_a(0);
    }
    multiply();
    a += SplitsA * kAmxBytes;
    w += kMicroVectors * SplitsW * kAmxBytes;
    between(s);
  }
  constexpr int64_t stride = kMicroColumns * sizeof(float);
  _tile_stored(0, sums, stride);
  _tile_stored(1, sums + kLanes, stride);
  if constexpr (Rows == 2) {
    _tile_stored(2, sums + height * kMicroColumns, stride);
    _tile_stored(3, sums + height * kMicroColumns + kLanes, stride);
  }
}

// c[j] += Σ_p a(i, p) panel(p, j) for kMicroColumns columns, by float32 arithmetic.
__attribute__((noinline, cold)) void add_row(const Operand<false>& a, int64_t i, int64_t p0,
                                             int64_t depth, const float* panel, float* c) {
  float row[kDepth + kPad];
  a.pack(i, 1, p0, depth, row);
  vf sum[kMicroVectors];
  for (int v = 0; v < kMicroVectors; ++v) sum[v] = load(c + v * kLanes);
  for (int64_t p = 0; p < depth; ++p)
    for (int v = 0; v < kMicroVectors; ++v)
      sum[v] = fma(set1(row[p]), load(panel + p * kMicroColumns + v * kLanes), sum[v]);
  for (int v = 0; v < kMicroVectors; ++v) store(c + v * kLanes, sum[v]);
}

inline bool is_finite(const float* sums, int64_t rows) {
  vf check[kMicroVectors] = {zero(), zero()};  // zero times a number stays zero
  for (int64_t k = 0; k < rows * kMicroColumns; k += kMicroColumns)
    for (int v = 0; v < kMicroVectors; ++v)
      check[v] = fma(load(sums + k + v * kLanes), zero(), check[v]);
  return _mm512_cmp_ps_mask(check[0], check[1], _CMP_UNORD_Q) == 0;
}

// c[i, j] += sums[i, j] * scales[j] for kMicroColumns columns.
inline void add_sums(const float* sums, const float* const* scales, int64_t group, int64_t rows,
                     float* c) {
  const vf low = load(scales[0] + group * kLanes), high = load(scales[1] + group * kLanes);
  for (int64_t i = 0; i < rows; ++i, sums += kMicroColumns, c += kStripWidth) {
    store(c, fma(load(sums), low, load(c)));
    store(c + kLanes, fma(load(sums + kLanes), high, load(c + kLanes)));
  }
}

// Sums on their way to rows [row, row + rows) of c.
struct Sums {
  alignas(64) float values[2 * kAmxRows * kMicroColumns];
  int64_t row = 0, rows = 0, group = 0;
};

// c[i, j] += Σ_{p < depth} a(i0 + i, p) · P[p, j0 + j]; c is a piece, as in gemm.inl.
template <int SplitsA, int SplitsW, class Source>
class AmxProduct {
 public:
  AmxProduct(const Operand<false>& operand, Source& weight, int64_t first, int64_t count)
      : a(operand),
        source(weight),
        i0(first),
        rows(count),
        height(amx_height(count)),
        registers(height) {
    panel.floats = static_cast<float*>(scratch(
        Buffer::panel,
        kDepth * kMicroColumns * sizeof(float) + kSteps * kMicroVectors * SplitsW * kAmxBytes));
    panel.splits = reinterpret_cast<char*>(panel.floats + kDepth * kMicroColumns);
  }

  void run(int64_t j0, int64_t columns, int64_t depth, float* c) {
    const int64_t size = ceil_div(rows, height) * kRowsSize, chunks = ceil_div(depth, kDepth);
    const auto at = [&](int64_t j) {
      return c + j / kStripWidth * (rows * kStripWidth) + j % kStripWidth;
    };
    if (source.whole_rows() && chunks * size <= kWholeOperand) {
      char* operand = static_cast<char*>(scratch(Buffer::operand, chunks * size));
      for (int64_t k = 0; k < chunks; ++k) pack(k, depth, operand + k * size);
      for (int64_t j = 0; j < columns; j += kMicroColumns) {
        source.begin(j0 + j, min64(kMicroColumns, columns - j));
        for (int64_t k = 0; k < chunks; ++k)
          multiply(k, depth, operand + k * size, j0 + j, min64(kMicroColumns, columns - j), at(j));
      }
      return;
    }
    char* operand = static_cast<char*>(scratch(Buffer::operand, size));
    source.begin(j0, columns);
    for (int64_t k = 0; k < chunks; ++k) {
      pack(k, depth, operand);
      for (int64_t j = 0; j < columns; j += kMicroColumns)
        multiply(k, depth, operand, j0 + j, min64(kMicroColumns, columns - j), at(j));
    }
  }

 private:
  static constexpr int64_t kDepth = Source::kDepth, kSteps = kDepth / kStep;
  static constexpr int64_t kRowsSize = kSteps * SplitsA * kAmxBytes;

  void pack(int64_t chunk, int64_t depth, char* operand) const {
    const int64_t p = chunk * kDepth;
    amx_pack<SplitsA, kDepth>(a, i0, rows, height, p, min64(kDepth, depth - p), operand);
  }

  // Multiplies all rows by one panel. While sums are computed, those before are added to c.
  void multiply(int64_t chunk, int64_t depth, const char* operand, int64_t j0, int64_t columns,
                float* c) {
    p0 = chunk * kDepth;
    n = min64(kDepth, depth - p0);
    panel_j0 = j0;
    panel_columns = columns;
    source.template fill<SplitsW>(j0, columns, p0, n, panel);
    const int64_t steps = ceil_div(n, kStep);
    int which = 0;
    sums[1].rows = 0;
    for (int64_t i = 0; i < rows; i += 2 * height)
      for (int64_t s = 0; s < steps; s += panel.group, which ^= 1) {
        const int64_t count = min64(panel.group, steps - s), share = ceil_div(2 * height, count);
        const auto between = [&](int64_t step) {
          add(sums[which ^ 1], step * share, (step + 1) * share, c);
        };
        const char* at = operand + i / height * kRowsSize + s * SplitsA * kAmxBytes;
        const char* splits = panel.splits + s * kMicroVectors * SplitsW * kAmxBytes;
        Sums& to = sums[which];
        if (i + height < rows)
          amx_multiply<2, SplitsA, SplitsW, kRowsSize, WholeRegisters>(at, splits, count, height,
                                                                       to.values, between);
        else
          amx_multiply<1, SplitsA, SplitsW, kRowsSize, WholeRegisters>(at, splits, count, height,
                                                                       to.values, between);
        to.row = i;
        to.rows = min64(2 * height, rows - i);
        to.group = s / panel.group;
      }
    add(sums[which ^ 1], 0, 2 * height, c);
  }

  // Adds rows [begin, end) of those sums.
  void add(const Sums& from, int64_t begin, int64_t end, float* c) {
    const int64_t count = min64(end, from.rows) - begin, row = from.row + begin;
    if (count <= 0) return;
    const float* values = from.values + begin * kMicroColumns;
    if (panel.tame && is_finite(values, count))
      add_sums(values, panel.scales, from.group, count, c + row * kStripWidth);
    else
      add_with_care(values, from.group, row, count, c);
  }
  __attribute__((noinline, cold)) void add_with_care(const float* values, int64_t group,
                                                     int64_t row, int64_t count, float* c) {
    if (!panel.filled) source.floats(panel_j0, panel_columns, p0, n, panel);
    const int64_t begin = group * panel.group * kStep;
    for (int64_t i = row; i < row + count; ++i, values += kMicroColumns) {
      if (panel.tame && is_finite(values, 1))
        add_sums(values, panel.scales, group, 1, c + i * kStripWidth);
      else
        add_row(a, i0 + i, p0 + begin, min64(panel.group * kStep, n - begin),
                panel.floats + begin * kMicroColumns, c + i * kStripWidth);
    }
  }

  const Operand<false>& a;
  Source& source;
  const int64_t i0, rows;
  const int height;
  const AmxRegisters registers;
  int64_t p0 = 0, n = 0, panel_j0 = 0, panel_columns = 0;
  AmxPanel panel;
  Sums sums[2];
};

template <int SplitsA, int SplitsW, class Source>
void accumulate_splits(const Operand<false>& a, Source& source, int64_t i0, int64_t rows,
                       int64_t j0, int64_t columns, int64_t depth, float* c) {
  AmxProduct<SplitsA, SplitsW, Source>(a, source, i0, rows).run(j0, columns, depth, c);
}

template <int SplitsW, class Source>
void accumulate_from(const Operand<false>& a, Source source, int64_t i0, int64_t rows, int64_t j0,
                     int64_t columns, int64_t depth, float* c) {
  if (a.m.dtype == DType::f32)
    accumulate_splits<3, SplitsW>(a, source, i0, rows, j0, columns, depth, c);
  else if (a.m.dtype == DType::f16)
    accumulate_splits<2, SplitsW>(a, source, i0, rows, j0, columns, depth, c);
  else
    accumulate_splits<1, SplitsW>(a, source, i0, rows, j0, columns, depth, c);
}

template <bool TransposedSource>
void accumulate_amx(const Operand<false>& a, const Quantized& source, int64_t i0, int64_t rows,
                    int64_t j0, int64_t columns, int64_t depth, float* c) {
  if (TransposedSource && CodeSource::takes(source.w))
    accumulate_from<3>(a, CodeSource(source), i0, rows, j0, columns, depth, c);
  else
    accumulate_from<3>(a, SplitSource<TransposedSource, Quantized>(source), i0, rows, j0, columns,
                       depth, c);
}

template <bool TransposedSource>
void accumulate_amx(const Operand<false>& a, const ColumnStrip& source, int64_t i0, int64_t rows,
                    int64_t j0, int64_t columns, int64_t depth, float* c) {
  accumulate_from<3>(a, SplitSource<TransposedSource, ColumnStrip>(source), i0, rows, j0, columns,
                     depth, c);
}

template <bool TransposedSource>
void accumulate_amx(const Operand<false>& a, const Dense& source, int64_t i0, int64_t rows,
                    int64_t j0, int64_t columns, int64_t depth, float* c) {
  const SplitSource<TransposedSource, Dense> split(source);
  if (source.m.dtype == DType::f32)
    accumulate_from<3>(a, split, i0, rows, j0, columns, depth, c);
  else if (source.m.dtype == DType::f16)
    accumulate_from<2>(a, split, i0, rows, j0, columns, depth, c);
  else
    accumulate_from<1>(a, split, i0, rows, j0, columns, depth, c);
}
