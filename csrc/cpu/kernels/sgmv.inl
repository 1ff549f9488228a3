// The products behind the operators with many adapters. P is a module's pages, A or B; C is S or
// dS:
//
//   shrink      C[m, r] = scale Σ_c act[m, c] P[r, c]      S (of x and A) and dS (of dy and B)
//   Expansion   out[m, c] += Σ_r C[m, r] P[r, c]           Δ (of S and B) and dx (of dS and A)
//
// A row's bits depend on its own data and its adapter alone: not on the other rows, the tiles, or
// the threads.

// Rows of the batch that share an adapter, and that adapter.
struct Segment {
  const int32_t* rows;
  int64_t count;
  int64_t slot, rank, page_rank;
  const int32_t* page_ids;
  float scaling;
  Dropout dropout;

  Segment(const BatchPlan& plan, const Pages& pages, int64_t t)
      : rows(plan.rows + plan.tiles[t].row0),
        count(plan.tiles[t].rows),
        slot(plan.tiles[t].slot),
        rank(pages.ranks[slot]),
        page_rank(pages.page_rank),
        page_ids(plan.page_ids + plan.tiles[t].page0),
        scaling(pages.scalings[slot]),
        dropout(dropout_of(pages, slot)) {}
  // The row of the pages that holds rank r.
  int64_t page_row(int64_t r) const { return page_ids[r / page_rank] * page_rank + r % page_rank; }
};

// -- tasks ----------------------------------------------------------------------------------------

struct Load {
  int64_t units, cost;  // cost of each unit
};

// Streaming a unit's pages from memory takes about as long as the arithmetic of this many rows.
constexpr int64_t kStreamCost = 16;

// Calls body(t, begin, end) over ranges that make up the units of every tile, load(t).units. Each
// thread gets the same cost, in one piece.
template <class LoadOf, class Body>
void for_units(const BatchPlan& plan, const Parallel& pool, const LoadOf& load, const Body& body) {
  int64_t total = 0;
  for (int64_t t = 0; t < plan.tile_count; ++t) total += load(t).units * load(t).cost;
  if (total == 0) return;
  parallel(pool, pool.threads, [&](int64_t first, int64_t last) {
    const int64_t from = total * first / pool.threads, to = total * last / pool.threads;
    int64_t position = 0;
    for (int64_t t = 0; t < plan.tile_count && position < to; ++t) {
      const Load l = load(t);
      if (l.units == 0) continue;
      // The units that begin in [from, to).
      const auto unit_at = [&](int64_t cost) {
        return cost <= position ? 0 : min64(l.units, ceil_div(cost - position, l.cost));
      };
      const int64_t begin = unit_at(from), end = unit_at(to);
      if (begin < end) body(t, begin, end);
      position += l.units * l.cost;
    }
  });
}

// -- shrink ---------------------------------------------------------------------------------------
// Lanes run along c, one vector accumulator for each (m, r), in whichever tile of the plan it
// is computed.

constexpr int64_t kDotDepth =
    512;  // c per block: kDotRanks rows of it stay in the first-level cache
constexpr int64_t kRanksAtOnce = 8 * kDotRanks;  // ranks at a time: bounds the accumulators
constexpr int kMaxTileRows = 128;                // of a plan
constexpr int64_t kDotAhead = 128;               // elements from a load to its prefetch

template <int Rows, int Ranks>
inline void dot_micro_kernel(const float* const* act, const float* const* page, int64_t n,
                             float* acc, int64_t acc_stride) {
  vf sum[Rows][Ranks];
  for (int i = 0; i < Rows; ++i)
    for (int r = 0; r < Ranks; ++r) sum[i][r] = load(acc + i * acc_stride + r * kLanes);
  for (int64_t c = 0; c < n; c += kLanes) {
    vf a[Rows];
    for (int i = 0; i < Rows; ++i) {
      a[i] = load(act[i] + c);
      if (Rows > 1) __builtin_prefetch(act[Rows + i] + c);
    }
    for (int r = 0; r < Ranks; ++r) {
      vf p = load(page[r] + c);
      in_register(p);
      if (Rows == 1) __builtin_prefetch(page[r] + c + kDotAhead);
      for (int i = 0; i < Rows; ++i) sum[i][r] = fma(a[i], p, sum[i][r]);
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int r = 0; r < Ranks; ++r) store(acc + i * acc_stride + r * kLanes, sum[i][r]);
}

template <int Ranks>
inline void dot_rows_of(int rows, const float* const* act, const float* const* page, int64_t n,
                        float* acc, int64_t acc_stride) {
  static_assert(kDotRows == 3, "the cases below");
  if (rows == 1) return dot_micro_kernel<1, Ranks>(act, page, n, acc, acc_stride);
  if (rows == 2) return dot_micro_kernel<2, Ranks>(act, page, n, acc, acc_stride);
  dot_micro_kernel<3, Ranks>(act, page, n, acc, acc_stride);
}

// Pointers to columns [c0, c0 + n) of `count` rows as float32 with zeros up to a whole vector: into
// the matrix where it can be read in place, otherwise to copies. row_of(i): which row of m.
template <class RowOf>
inline void read_rows(const Matrix& m, const RowOf& row_of, int64_t count, int64_t c0, int64_t n,
                      bool in_place, float* copies, const float** to) {
  in_place = in_place && m.dtype == DType::f32 && n % kLanes == 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t offset = row_of(i) * m.stride + c0;
    if (in_place) {
      to[i] = static_cast<const float*>(m.data) + offset;
      continue;
    }
    float* copy = copies + i * (kDotDepth + kPad);
    const char* next = static_cast<const char*>(m.data) + (offset + n) * element_size(m.dtype);
    for (int64_t byte = 0; byte < n * element_size(m.dtype); byte += 64)
      __builtin_prefetch(next + byte, 0, 2);
    load_row(copy, m.data, m.dtype, offset, n);
    for (int64_t c = n; c % kLanes != 0; ++c) copy[c] = 0.0f;
    to[i] = copy;
  }
}

// Ranks [r0, r1) of C for one segment, r0 a multiple of kDotRanks.
inline void shrink_ranks(const Segment& of, const Matrix& act, bool dropout, const Matrix& P,
                         float scale, int64_t r0, int64_t r1, float* C, int64_t stride) {
  const int64_t width = ceil_div(r1 - r0, kDotRanks) * kDotRanks;
  const int64_t even =
      ceil_div(of.count, ceil_div(of.count, kDotRows));  // 4 rows as 2 + 2, not 3 + 1
  constexpr int64_t copy_size = kDotDepth + kPad;
  float* acc =
      static_cast<float*>(scratch(Buffer::accumulator, of.count * width * kLanes * sizeof(float)));
  float* rows =
      static_cast<float*>(scratch(Buffer::operand, kMaxTileRows * copy_size * sizeof(float)));
  float* ranks = static_cast<float*>(scratch(Buffer::panel, kDotRanks * copy_size * sizeof(float)));
  const float *row[kMaxTileRows + kDotRows], *rank[kDotRanks];
  for (int64_t i = 0; i < of.count * width; ++i) store(acc + i * kLanes, zero());
  dropout = dropout && of.dropout.threshold != 0;
  for (int64_t c0 = 0; c0 < act.cols; c0 += kDotDepth) {
    const int64_t n = min64(kDotDepth, act.cols - c0);
    read_rows(act, [&](int64_t i) { return of.rows[i]; }, of.count, c0, n, !dropout, rows, row);
    if (dropout)
      for (int64_t i = 0; i < of.count; ++i)
        apply_dropout(of.dropout, of.rows[i], c0, n, rows + i * copy_size);
    for (int i = 0; i < kDotRows; ++i) row[of.count + i] = row[of.count - 1];  // to be prefetched
    for (int64_t r = 0; r < width; r += kDotRanks) {
      const int64_t last = r1 - r0 - 1 - r;  // a missing rank repeats the last one
      const bool half = last < kDotRanks / 2;
      read_rows(
          P, [&](int64_t j) { return of.page_row(r0 + r + min64(j, last)); },
          half ? kDotRanks / 2 : kDotRanks, c0, n, of.count <= kDotRows, ranks, rank);
      for (int64_t i = 0; i < of.count; i += even) {
        const int height = static_cast<int>(min64(even, of.count - i));
        float* sums = acc + (i * width + r) * kLanes;
        if (half)
          dot_rows_of<kDotRanks / 2>(height, row + i, rank, n, sums, width * kLanes);
        else
          dot_rows_of<kDotRanks>(height, row + i, rank, n, sums, width * kLanes);
      }
    }
  }
  for (int64_t i = 0; i < of.count; ++i)
    for (int64_t r = 0; r < r1 - r0; ++r)
      C[of.rows[i] * stride + r0 + r] = hsum(load(acc + (i * width + r) * kLanes)) * scale;
}

// C[m, r] = scale Σ_c act[m, c] P[r, c] for the tiles that are wanted(segment); scale is that
// segment's where it is asked for. Writes nothing past a rank.
template <class Wanted>
void shrink(const BatchPlan& plan, const Pages& pages, const Matrix& act, bool dropout,
            const Matrix& P, bool scaled, float* C, int64_t stride, const Parallel& pool,
            const Wanted& wanted) {
  for_units(
      plan, pool,
      [&](int64_t t) -> Load {
        const Tile& tile = plan.tiles[t];
        const bool any = tile.rows > 0 && wanted(tile.slot);
        return {any ? ceil_div(pages.ranks[tile.slot], kDotRanks) : 0, kStreamCost + tile.rows};
      },
      [&](int64_t t, int64_t begin, int64_t end) {
        const Segment of(plan, pages, t);
        const int64_t stop = min64(end * kDotRanks, of.rank);
        for (int64_t r = begin * kDotRanks; r < stop; r += kRanksAtOnce)
          shrink_ranks(of, act, dropout, P, scaled ? of.scaling : 1.0f, r,
                       min64(r + kRanksAtOnce, stop), C, stride);
      });
}

// -- expand ---------------------------------------------------------------------------------------
// The sums over r are those of gemm.inl's product: r in order, from zero.

// The ranks of a segment's adapter, as rows.
struct PageRows {
  const Matrix& P;
  const Segment& of;
  bool streamed;  // the next columns are read next

  void prefetch(int64_t r, int64_t j0, int64_t columns) const {
    const int64_t size = element_size(P.dtype);
    const char* p = static_cast<const char*>(P.data) + (of.page_row(r) * P.stride + j0) * size;
    for (int64_t byte = 0; byte < columns * size; byte += 64) __builtin_prefetch(p + byte, 0, 2);
  }
};

// This overload fills a panel without a detour.
inline void fill_natural(const PageRows& source, int64_t j0, int64_t columns, int64_t p0,
                         int64_t depth, float* panel) {
  const Matrix& P = source.P;
  for (int64_t p = 0; p < depth; ++p) {
    if (source.streamed) source.prefetch(p0 + p, j0 + columns, columns);
    const int64_t offset = source.of.page_row(p0 + p) * P.stride + j0;
    load_row(panel + p * kMicroColumns, P.data, P.dtype, offset, columns);
  }
}

// What adapters add to an output: in forward Δ, scaled (C = S, P = B); in backward the mask times
// dS A (C = dS, P = A).
struct Expansion {
  const BatchPlan& plan;
  const Pages& pages;
  Matrix C, P;
  bool backward;

  bool has_adapter(int64_t row) const {
    const int32_t t = plan.tile_of_row[row];
    return t >= 0 && pages.ranks[plan.tiles[t].slot] > 0;
  }

  // c[i, j] += Σ_r C[i, r] P[r, j0 + j] of a segment; row i of C is order[first + i], or first + i.
  void product(const Segment& of, const int32_t* order, int64_t first, int64_t rows, int64_t j0,
               int64_t columns, bool streamed, float* c) const {
    accumulate<false>(Operand<false>{C, nullptr, order}, PageRows{P, of, streamed}, first, rows, j0,
                      columns, of.rank, c);
  }

  // Computes a zeroed piece of rows [i0, i0 + rows). Rows without an adapter stay zero. more: the
  // columns that follow come next.
  void rows(int64_t i0, int64_t rows, int64_t j0, int64_t columns, bool more, float* c) const {
    const int32_t* tile = plan.tile_of_row + i0;
    for (int64_t i = 0, end; i < rows; i = end) {
      for (end = i + 1; end < rows && tile[end] == tile[i];) ++end;
      if (!has_adapter(i0 + i)) continue;
      const Segment of(plan, pages, tile[i]);
      for (int64_t j = 0; j < columns; j += kStripWidth) {
        const int64_t n = min64(kStripWidth, columns - j);
        float* strip = c + j * rows + i * kStripWidth;
        product(of, nullptr, i0 + i, end - i, j0 + j, n, more || j + n < columns, strip);
        if (backward)
          for (int64_t k = i; k < end; ++k)
            apply_dropout(of.dropout, i0 + k, j0 + j, n, strip + (k - i) * kStripWidth);
        else
          for (int64_t k = 0; k < (end - i) * kStripWidth; k += kLanes)
            store(strip + k, mul(load(strip + k), set1(of.scaling)));
      }
    }
  }

  // Calls put(segment, row, j0, columns, c) for every row that has an adapter; c[j] is the product
  // alone.
  template <class Put>
  void all(const Parallel& pool, const Put& put) const {
    const auto load_of = [&](int64_t t) -> Load {
      const Tile& tile = plan.tiles[t];
      const int64_t rank = tile.rows > 0 ? pages.ranks[tile.slot] : 0;
      return {rank > 0 ? ceil_div(P.cols, kStripWidth) : 0, (kStreamCost + tile.rows) * rank};
    };
    for_units(plan, pool, load_of, [&](int64_t t, int64_t begin, int64_t end) {
      constexpr int64_t kAtOnce = 4 * kMicroRows;  // rows whose c stays in the first-level cache
      const Segment of(plan, pages, t);
      float* c =
          static_cast<float*>(scratch(Buffer::accumulator, kAtOnce * kStripWidth * sizeof(float)));
      for (int64_t j0 = begin * kStripWidth; j0 < min64(end * kStripWidth, P.cols);
           j0 += kStripWidth)
        for (int64_t i = 0; i < of.count; i += kAtOnce) {
          const int64_t columns = min64(kStripWidth, P.cols - j0),
                        rows = min64(kAtOnce, of.count - i);
          for (int64_t k = 0; k < rows * kStripWidth; k += kLanes) store(c + k, zero());
          product(of, of.rows, i, rows, j0, columns, i == 0, c);
          for (int64_t k = 0; k < rows; ++k)
            put(of, of.rows[i + k], j0, columns, c + k * kStripWidth);
        }
    });
  }
};
