// C[i, j] += Σ_p a(i, p) · P[p, j]: the one product behind every operator with more than a few
// rows.
//
//   panel    P[p, j] for kDepth values of p and kMicroColumns columns j, float32, filled from a
//            source into scratch memory that fits the first-level cache
//
//              | p = 0: kMicroColumns floats | p = 1: kMicroColumns floats | ...
//
//   operand  a(i, p) for all rows and kDepth values of p, float32, row by row
//   strip    C[i, j] for some rows and kStripWidth columns, float32, in scratch memory; it is
//            rounded into the output once, at the end
//   piece    up to kStripsAtOnce strips, one after the other: what one task computes
//
// The micro kernel keeps kMicroRows x kMicroColumns sums in registers while it goes down a panel.
// The order of the sum over p is the same for every row and every partition of the work: rows are
// batch-invariant.

constexpr int kMicroColumns = kMicroVectors * kLanes;
constexpr int kPanelsPerStrip = 4;
constexpr int kStripWidth = kPanelsPerStrip * kMicroColumns;
constexpr int64_t kDepth = 256;  // p per panel
constexpr int64_t kRows = 256;   // rows of C per task at most
constexpr int64_t kPad = 16;     // keeps rows of scratch off one cache set
// Strips in a piece of C. The operand is read anew for each piece, from beyond the second-level
// cache, so pieces are as wide as that cache allows.
constexpr int64_t kStripsAtOnce = 8;
// Up to this many rows of C stay in one piece.
constexpr int64_t kWhole = 2 * (kMicroRows > kSkinnyRows ? kMicroRows : kSkinnyRows);

// -- operand --------------------------------------------------------------------------------------

// a(i, p) = m[i, p], with dropout if asked; Transposed: a(i, p) = m[p, i]. With `order`, row i of m
// is its row order[i].
template <bool Transposed>
struct Operand {
  Matrix m;
  const Dropout* dropout = nullptr;
  const int32_t* order = nullptr;

  int64_t row_of(int64_t i) const { return order ? order[i] : i; }

  void pack(int64_t i0, int rows, int64_t p0, int64_t depth, float* dst) const {
    if constexpr (Transposed) {
      float values[64];  // at least kMicroRows
      for (int64_t p = 0; p < depth; ++p) {
        load_row(values, m.data, m.dtype, row_of(p0 + p) * m.stride + i0, rows);
        for (int i = 0; i < rows; ++i) dst[i * (kDepth + kPad) + p] = values[i];
      }
    } else {
      for (int i = 0; i < rows; ++i) {
        float* row = dst + i * (kDepth + kPad);
        load_row(row, m.data, m.dtype, row_of(i0 + i) * m.stride + p0, depth);
        if (dropout) apply_dropout(*dropout, row_of(i0 + i), p0, depth, row);
      }
    }
  }
  // Asks for rows that are packed next: their runs are too short for hardware to see them coming.
  void prefetch(int64_t i0, int rows, int64_t p0, int64_t depth) const {
    if constexpr (!Transposed) {
      const int64_t size = element_size(m.dtype);
      for (int i = 0; i < rows; ++i) {
        const char* row =
            static_cast<const char*>(m.data) + (row_of(i0 + i) * m.stride + p0) * size;
        for (int64_t byte = 0; byte < depth * size; byte += 64)
          __builtin_prefetch(row + byte, 0, 2);
      }
    }
  }
};

// -- panel ----------------------------------------------------------------------------------------

// P[p, j] = source row j0 + j, column p0 + p: rows become lanes by transposes of kLanes x
// kLanes.
template <class Source>
void fill_transposed_rows(const Source& source, int64_t j0, int64_t columns, int64_t p0,
                          int64_t depth, float* panel) {
  constexpr int64_t stride = kDepth + kPad;
  float* rows = static_cast<float*>(scratch(Buffer::rows, kLanes * stride * sizeof(float)));
  for (int64_t j = 0; j < columns; j += kLanes) {
    float* dst = panel + j;
    for (int l = 0; l < kLanes; ++l) {
      if (j + l < columns)
        source.row(j0 + j + l, p0, depth, rows + l * stride);
      else
        for (int64_t p = 0; p < depth; ++p) rows[l * stride + p] = 0.0f;
    }
    for (int64_t p = 0; p < depth; p += kLanes) {
      vf lanes[kLanes];
      for (int l = 0; l < kLanes; ++l) lanes[l] = load(rows + l * stride + p);
      transpose(lanes);
      const int64_t count = min64(kLanes, depth - p);
      for (int64_t q = 0; q < count; ++q) store(dst + (p + q) * kMicroColumns, lanes[q]);
    }
  }
}

// P[p, j] = source row p0 + p, column j0 + j.
template <class Source>
void fill_natural_rows(const Source& source, int64_t j0, int64_t columns, int64_t p0, int64_t depth,
                       float* panel) {
  float* row = static_cast<float*>(scratch(Buffer::rows, (kMicroColumns + kLanes) * sizeof(float)));
  const int64_t padded = ceil_div(columns, kLanes) * kLanes;
  for (int64_t p = 0; p < depth; ++p) {
    source.row(p0 + p, j0, columns, row);
    for (int64_t j = columns; j < padded; ++j) row[j] = 0.0f;
    for (int64_t j = 0; j < padded; j += kLanes)
      store(panel + p * kMicroColumns + j, load(row + j));
  }
}

// Sources with a better way overload these two.
template <class Source>
void fill_transposed(const Source& source, int64_t j0, int64_t columns, int64_t p0, int64_t depth,
                     float* panel) {
  fill_transposed_rows(source, j0, columns, p0, depth, panel);
}
template <class Source>
void fill_natural(const Source& source, int64_t j0, int64_t columns, int64_t p0, int64_t depth,
                  float* panel) {
  fill_natural_rows(source, j0, columns, p0, depth, panel);
}

// -- micro kernel ---------------------------------------------------------------------------------

// c[i, j] += Σ_p a[i][p] panel[p][j] for a micro tile, whose sums stay in registers.

template <int Rows, int Vectors>
inline void micro_kernel(const float* a, const float* panel, int64_t depth, float* c) {
  vf acc[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) acc[i][v] = load(c + i * kStripWidth + v * kLanes);
  for (int64_t p = 0; p < depth; ++p) {
    vf b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = load(panel + p * kMicroColumns + v * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const vf x = set1(a[i * (kDepth + kPad) + p]);
      for (int v = 0; v < Vectors; ++v) acc[i][v] = fma(x, b[v], acc[i][v]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) store(c + i * kStripWidth + v * kLanes, acc[i][v]);
}

template <int Rows>
inline void micro_kernel_rows(int rows, int vectors, const float* a, const float* panel,
                              int64_t depth, float* c) {
  if constexpr (Rows > 0) {
    if (rows != Rows) return micro_kernel_rows<Rows - 1>(rows, vectors, a, panel, depth, c);
    if (vectors == 1) return micro_kernel<Rows, 1>(a, panel, depth, c);
    return micro_kernel<Rows, kMicroVectors>(a, panel, depth, c);
  }
}

// -- product --------------------------------------------------------------------------------------

// c[i, j] += Σ_{p < depth} a(i0 + i, p) · P[p, j0 + j]; P is the source, transposed or as it lies.
// c is a piece: the strips of the columns, one after the other.
template <bool TransposedSource, class A, class Source>
void accumulate(const A& a, const Source& source, int64_t i0, int64_t rows, int64_t j0,
                int64_t columns, int64_t depth, float* c) {
  constexpr int64_t stride = kDepth + kPad;
  float* panel =
      static_cast<float*>(scratch(Buffer::panel, kDepth * kMicroColumns * sizeof(float)));
  float* operand = static_cast<float*>(scratch(Buffer::operand, rows * stride * sizeof(float)));
  const int64_t even = ceil_div(rows, ceil_div(rows, kMicroRows));  // 16 rows as 8 + 8, not 14 + 2
  const auto height = [&](int64_t i) {
    return i < rows ? static_cast<int>(min64(even, rows - i)) : 0;
  };
  for (int64_t p0 = 0; p0 < depth; p0 += kDepth) {
    const int64_t n = min64(kDepth, depth - p0);
    for (int64_t i = 0; i < rows; i += even) {
      a.prefetch(i0 + i + even, height(i + even), p0, n);
      a.pack(i0 + i, height(i), p0, n, operand + i * stride);
    }
    for (int64_t j = 0; j < columns; j += kMicroColumns) {
      const int64_t width = min64(kMicroColumns, columns - j);
      if constexpr (TransposedSource)
        fill_transposed(source, j0 + j, width, p0, n, panel);
      else
        fill_natural(source, j0 + j, width, p0, n, panel);
      float* strip = c + j / kStripWidth * (rows * kStripWidth) + j % kStripWidth;
      for (int64_t i = 0; i < rows; i += even)
        micro_kernel_rows<kMicroRows>(height(i), width <= kLanes ? 1 : kMicroVectors,
                                      operand + i * stride, panel, n, strip + i * kStripWidth);
    }
  }
}

// -- tasks ----------------------------------------------------------------------------------------

template <class Body>
void parallel(const Parallel& pool, int64_t tasks, const Body& body) {
  if (!pool.run) {
    const int64_t begin = tasks * pool.share / pool.threads,
                  end = tasks * (pool.share + 1) / pool.threads;
    if (begin < end) body(begin, end);
    return;
  }
  pool.run(
      tasks,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// The same for tasks that prepare scratch memory for those that follow: a share needs all of it.
template <class Body>
void prepare(const Parallel& pool, int64_t tasks, const Body& body) {
  if (pool.run) return parallel(pool, tasks, body);
  if (tasks > 0) body(0, tasks);
}

// Calls body(i0, rows, j0, columns, c) for the pieces of an [I, J] output; c is zeroed. Rows are
// cut into as few chunks as keep all threads busy (each chunk fills its panels anew); a row's
// result does not depend on the cut.
template <class Body>
void for_pieces(const Parallel& pool, int64_t I, int64_t J, const Body& body) {
  if (I == 0 || J == 0) return;
  const int64_t strips = ceil_div(J, kStripWidth);
  // Whether threads would wait for more than an eighth of the time, in the last round.
  const auto idle = [&](int64_t tasks) {
    const int64_t slots = ceil_div(tasks, pool.threads) * pool.threads;
    return 8 * (slots - tasks) > slots;
  };
  int64_t chunks = ceil_div(I, kRows);
  while (ceil_div(I, chunks) > kWhole && idle(strips * chunks)) ++chunks;
  const int64_t height = ceil_div(I, chunks), strip_size = height * kStripWidth;
  const int64_t at_once = min64(kStripsAtOnce, strips);
  chunks = ceil_div(I, height);
  parallel(pool, strips * chunks, [&](int64_t begin, int64_t end) {
    float* c =
        static_cast<float*>(scratch(Buffer::accumulator, at_once * strip_size * sizeof(float)));
    for (int64_t t = begin, count; t < end; t += count) {
      const int64_t strip = t % strips, i0 = t / strips * height, rows = min64(height, I - i0);
      count = min64(min64(at_once, strips - strip), end - t);
      for (int64_t k = 0; k < count * rows * kStripWidth; k += kLanes) store(c + k, zero());
      const int64_t j0 = strip * kStripWidth;
      body(i0, rows, j0, min64(count * kStripWidth, J - j0), c);
    }
  });
}

// Calls body(j, width, c) for each strip of a piece that is `columns` wide.
template <class Body>
void for_strips(int64_t rows, int64_t columns, float* c, const Body& body) {
  for (int64_t j = 0; j < columns; j += kStripWidth, c += rows * kStripWidth)
    body(j, min64(kStripWidth, columns - j), c);
}

// out[i0 + i, j0 + j] = c[i, j] * scale, rounded once, for one strip.
inline void store_strip(const MutMatrix& out, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                        float* c, float scale = 1.0f) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = c + i * kStripWidth;
    if (scale != 1.0f)
      for (int64_t j = 0; j < columns; ++j) row[j] *= scale;
    store_row(out.data, out.dtype, (i0 + i) * out.stride + j0, row, columns);
  }
}

// Stores all strips of a piece likewise.
inline void store_strips(const MutMatrix& out, int64_t i0, int64_t rows, int64_t j0,
                         int64_t columns, float* c, float scale = 1.0f) {
  for_strips(rows, columns, c, [&](int64_t j, int64_t width, float* strip) {
    store_strip(out, i0, rows, j0 + j, width, strip, scale);
  });
}
