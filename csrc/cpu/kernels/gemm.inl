// C[i, j] += Σ_p a(i, p) · P[p, j] over panels: the one product behind every operator with more
// than a few rows.
//
//   panel    P[p, j] for kDepth values of p and kTile columns j, float32, filled from a source:
//            small enough for the first-level cache
//
//              | p = 0: kTile floats | p = 1: kTile floats | ...
//
//   operand  a(i, p) for all rows and kDepth values of p, float32, row by row
//   C        float32 tile [rows, kWidth] in scratch; one rounding into the output at the end
//
// The order of the sum over p is the same for every row and every partition of the work: rows are
// batch-invariant.

constexpr int kTile = NV * W;  // columns of a register tile
constexpr int kSubPanels = 4;
constexpr int kWidth = kSubPanels * kTile;
constexpr int64_t kDepth = 256;  // p per panel
constexpr int64_t kRows = 256;   // rows of C per task at most
constexpr int64_t kPad = 16;     // keeps rows of scratch off one cache set
// Tiles of kWidth columns in a piece of C. The operand is read anew for each piece, from beyond the
// second-level cache: they are as wide as that cache allows.
constexpr int64_t kPanels = 8;
// Rows of C that are never cut.
constexpr int64_t kWhole = 2 * (MR > kSmallRows ? MR : kSmallRows);

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
      float values[64];  // at least MR
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
  // Rows of the next tile, on their way while these are packed: runs too short for hardware to see
  // coming.
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

// P[p, j] = source row j0 + j, column p0 + p: rows become lanes by W x W transposes.
template <class Source>
void fill_transposed_rows(const Source& source, int64_t j0, int64_t columns, int64_t p0,
                          int64_t depth, float* panel) {
  constexpr int64_t stride = kDepth + kPad;
  float* rows = static_cast<float*>(scratch(Slot::rows, W * stride * sizeof(float)));
  for (int64_t j = 0; j < columns; j += W) {
    float* dst = panel + j;
    for (int l = 0; l < W; ++l) {
      if (j + l < columns)
        source.row(j0 + j + l, p0, depth, rows + l * stride);
      else
        for (int64_t p = 0; p < depth; ++p) rows[l * stride + p] = 0.0f;
    }
    for (int64_t p = 0; p < depth; p += W) {
      vf lanes[W];
      for (int l = 0; l < W; ++l) lanes[l] = load(rows + l * stride + p);
      transpose(lanes);
      const int64_t count = min64(W, depth - p);
      for (int64_t q = 0; q < count; ++q) store(dst + (p + q) * kTile, lanes[q]);
    }
  }
}

// P[p, j] = source row p0 + p, column j0 + j.
template <class Source>
void fill_natural_rows(const Source& source, int64_t j0, int64_t columns, int64_t p0, int64_t depth,
                       float* panel) {
  float* row = static_cast<float*>(scratch(Slot::rows, (kTile + W) * sizeof(float)));
  const int64_t padded = ceil_div(columns, W) * W;
  for (int64_t p = 0; p < depth; ++p) {
    source.row(p0 + p, j0, columns, row);
    for (int64_t j = columns; j < padded; ++j) row[j] = 0.0f;
    for (int64_t j = 0; j < padded; j += W) store(panel + p * kTile + j, load(row + j));
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

// -- register tile --------------------------------------------------------------------------------

template <int Rows, int Vectors>
inline void tile(const float* a, const float* panel, int64_t depth, float* c) {
  vf acc[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) acc[i][v] = load(c + i * kWidth + v * W);
  for (int64_t p = 0; p < depth; ++p) {
    vf b[Vectors];
    for (int v = 0; v < Vectors; ++v) b[v] = load(panel + p * kTile + v * W);
    for (int i = 0; i < Rows; ++i) {
      const vf x = set1(a[i * (kDepth + kPad) + p]);
      for (int v = 0; v < Vectors; ++v) acc[i][v] = fma(x, b[v], acc[i][v]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int v = 0; v < Vectors; ++v) store(c + i * kWidth + v * W, acc[i][v]);
}

template <int Rows>
inline void tile_rows(int rows, int vectors, const float* a, const float* panel, int64_t depth,
                      float* c) {
  if constexpr (Rows > 0) {
    if (rows != Rows) return tile_rows<Rows - 1>(rows, vectors, a, panel, depth, c);
    if (vectors == 1) return tile<Rows, 1>(a, panel, depth, c);
    return tile<Rows, NV>(a, panel, depth, c);
  }
}

// -- product --------------------------------------------------------------------------------------

// c[i, j] += Σ_{p < depth} a(i0 + i, p) · P[p, j0 + j]; P is the source, transposed or as it lies.
// c is a [rows, kWidth] tile for each kWidth of the columns, one after the other.
template <bool TransposedSource, class A, class Source>
void accumulate(const A& a, const Source& source, int64_t i0, int64_t rows, int64_t j0,
                int64_t columns, int64_t depth, float* c) {
  constexpr int64_t stride = kDepth + kPad;
  float* panel = static_cast<float*>(scratch(Slot::panel, kDepth * kTile * sizeof(float)));
  float* operand = static_cast<float*>(scratch(Slot::operand, rows * stride * sizeof(float)));
  const int64_t even = ceil_div(rows, ceil_div(rows, MR));  // 16 rows as 8 + 8, not 14 + 2
  const auto height = [&](int64_t i) {
    return i < rows ? static_cast<int>(min64(even, rows - i)) : 0;
  };
  for (int64_t p0 = 0; p0 < depth; p0 += kDepth) {
    const int64_t n = min64(kDepth, depth - p0);
    for (int64_t i = 0; i < rows; i += even) {
      a.prefetch(i0 + i + even, height(i + even), p0, n);
      a.pack(i0 + i, height(i), p0, n, operand + i * stride);
    }
    for (int64_t j = 0; j < columns; j += kTile) {
      const int64_t width = min64(kTile, columns - j);
      if constexpr (TransposedSource)
        fill_transposed(source, j0 + j, width, p0, n, panel);
      else
        fill_natural(source, j0 + j, width, p0, n, panel);
      float* tile = c + j / kWidth * (rows * kWidth) + j % kWidth;
      for (int64_t i = 0; i < rows; i += even)
        tile_rows<MR>(height(i), width <= W ? 1 : NV, operand + i * stride, panel, n,
                      tile + i * kWidth);
    }
  }
}

// -- tasks ----------------------------------------------------------------------------------------

template <class Body>
void parallel(const Parallel& pool, int64_t tasks, const Body& body) {
  pool.run(
      tasks,
      [](void* context, int64_t begin, int64_t end) {
        (*static_cast<const Body*>(context))(begin, end);
      },
      const_cast<Body*>(&body));
}

// Calls body(i0, rows, j0, columns, c) over pieces of an [I, J] output: up to kPanels tiles of
// kWidth columns, c zeroed, one after the other. Rows are cut into as few chunks as keep all
// threads busy (each chunk fills its panels anew); a row's result does not depend on the cut.
template <class Body>
void for_tiles(const Parallel& pool, int64_t I, int64_t J, const Body& body) {
  if (I == 0 || J == 0) return;
  const int64_t panels = ceil_div(J, kWidth);
  // Whether threads would wait for more than an eighth of the time, in the last round.
  const auto idle = [&](int64_t tasks) {
    const int64_t slots = ceil_div(tasks, pool.threads) * pool.threads;
    return 8 * (slots - tasks) > slots;
  };
  int64_t chunks = ceil_div(I, kRows);
  while (ceil_div(I, chunks) > kWhole && idle(panels * chunks)) ++chunks;
  const int64_t height = ceil_div(I, chunks), tile = height * kWidth;
  const int64_t at_once = min64(kPanels, panels);
  chunks = ceil_div(I, height);
  parallel(pool, panels * chunks, [&](int64_t begin, int64_t end) {
    float* c = static_cast<float*>(scratch(Slot::accumulator, at_once * tile * sizeof(float)));
    for (int64_t t = begin, count; t < end; t += count) {
      const int64_t panel = t % panels, i0 = t / panels * height, rows = min64(height, I - i0);
      count = min64(min64(at_once, panels - panel), end - t);
      for (int64_t k = 0; k < count * rows * kWidth; k += W) store(c + k, zero());
      const int64_t j0 = panel * kWidth;
      body(i0, rows, j0, min64(count * kWidth, J - j0), c);
    }
  });
}

// body(j, width, c) for each tile of `columns` columns.
template <class Body>
void for_panels(int64_t rows, int64_t columns, float* c, const Body& body) {
  for (int64_t j = 0; j < columns; j += kWidth, c += rows * kWidth)
    body(j, min64(kWidth, columns - j), c);
}

// out[i0 + i, j0 + j] = c[i, j] * scale, rounded once; one tile.
inline void store_tile(const MutMatrix& out, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                       float* c, float scale = 1.0f) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = c + i * kWidth;
    if (scale != 1.0f)
      for (int64_t j = 0; j < columns; ++j) row[j] *= scale;
    store_row(out.data, out.dtype, (i0 + i) * out.stride + j0, row, columns);
  }
}

// Of the tiles of several panels.
inline void store_tiles(const MutMatrix& out, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                        float* c, float scale = 1.0f) {
  for_panels(rows, columns, c, [&](int64_t j, int64_t width, float* tile) {
    store_tile(out, i0, rows, j0 + j, width, tile, scale);
  });
}
