// The operators of stacked experts: the rows of each expert meet its part of the stack by the
// routines of linear.inl, so that a row has the bits it has with that expert alone.
//
// The pool runs shares: an expert's outputs are cut into as many equal parts as its work is of a
// fourth of a thread's. Most have one; one that has most of the rows, or few that are alone, have
// several.

struct Share {
  int32_t expert, number, of;
};

// What reading and decoding an expert costs, in rows of x.
constexpr int64_t kExpertCost = 8;

inline int64_t first_row(const Experts& x, int64_t e) { return e ? x.offsets[e - 1] : 0; }
inline int64_t row_count(const Experts& x, int64_t e) { return x.offsets[e] - first_row(x, e); }

inline Matrix rows_at(const Matrix& m, int64_t begin, int64_t rows) {
  const int64_t offset = begin * m.stride * element_size(m.dtype);
  return {static_cast<const char*>(m.data) + offset, m.dtype, rows, m.cols, m.stride};
}
inline MutMatrix rows_at(const MutMatrix& m, int64_t begin, int64_t rows) {
  if (!m.data) return {};
  const int64_t offset = begin * m.stride * element_size(m.dtype);
  return {static_cast<char*>(m.data) + offset, m.dtype, rows, m.cols, m.stride};
}
inline Vector row_at(const Vector& v, int64_t row, int64_t cols) {
  if (!v.data) return {};
  return {static_cast<const char*>(v.data) + row * cols * element_size(v.dtype), v.dtype};
}

// Calls body(e, pool) for every share of every expert that has rows, or of every expert; the pool
// is one that does that share. `columns`: how wide an output is. What the threads take in turn are
// runs of shares of equal work: experts that have most of the rows may follow one another.
template <class Body>
void for_shares(const Experts& x, int64_t columns, bool all, const Parallel& pool,
                const Body& body) {
  const int64_t parts = 4 * pool.threads;
  int64_t total = 0, count = 0, runs = 0, before = 0;  // total and before: in rows
  for (int64_t e = 0; e < x.count; ++e)
    if (all || row_count(x, e) > 0) total += kExpertCost + row_count(x, e);
  const int64_t part = ceil_div(total, parts);
  int64_t* first = static_cast<int64_t*>(
      scratch(Buffer::shares, (parts + 1) * sizeof(int64_t) + (x.count + parts) * sizeof(Share)));
  Share* shares = reinterpret_cast<Share*>(first + parts + 1);
  for (int64_t e = 0; e < x.count; ++e) {
    const int64_t rows = row_count(x, e), work = kExpertCost + rows;
    if (!all && rows == 0) continue;
    const int64_t most =
        pool.threads > 1 ? ceil_div(columns, kStripWidth) * ceil_div(rows, kWhole) : 1;
    const int64_t of = min64(work / part, most) < 1 ? 1 : min64(work / part, most);
    for (int64_t i = 0; i < of; ++i) {
      if ((before + work * i / of) * parts >= runs * total) first[runs++] = count;
      shares[count++] = {static_cast<int32_t>(e), static_cast<int32_t>(i),
                         static_cast<int32_t>(of)};
    }
    before += work;
  }
  first[runs] = count;
  parallel(pool, runs, [&](int64_t begin, int64_t end) {
    for (int64_t t = first[begin]; t < first[end]; ++t)
      body(shares[t].expert, Parallel{nullptr, shares[t].of, shares[t].number});
  });
}

// Zeroes the rows of no expert.
inline void zero_rest(const Experts& x, const MutMatrix& m) {
  for (int64_t row = x.offsets[x.count - 1]; m.data && row < m.rows; ++row)
    __builtin_memset(static_cast<char*>(m.data) + row * m.stride * element_size(m.dtype), 0,
                     static_cast<size_t>(m.cols * element_size(m.dtype)));
}

inline Weight4 weight_of(const Experts& x, int64_t e) {
  const int64_t size = x.base.N / x.count;
  return rows_of(x.base, e * size, size);
}

// -- forward --------------------------------------------------------------------------------------

// Expert e as y = x Wᵀ, also where it is transposed (then it serves S alone). `w`: its weight.
inline LinearArgs linear_of(const GroupedArgs& a, int64_t e, const Weight4& w) {
  const int64_t begin = first_row(a.experts, e), rows = row_count(a.experts, e), N = a.y.cols,
                R = a.rank;
  LinearArgs of;
  of.x = rows_at(a.x, begin, rows);
  of.base.quantized = &w;
  of.bias = row_at(a.bias, e, N);
  of.y = rows_at(a.y, begin, rows);
  of.arithmetic = a.arithmetic;
  if (R == 0) return of;
  of.lora.A = rows_at(a.A, e * R, R);
  if (a.B.data) of.lora.B = rows_at(a.B, e * N, N);
  of.lora.scaling = a.scaling;
  of.s = a.s + begin * R;
  return of;
}

// Expert e of a transposed stack, as dx = dy W.
inline BackwardArgs transposed_of(const GroupedArgs& a, int64_t e, const Weight4& w) {
  const int64_t begin = first_row(a.experts, e), rows = row_count(a.experts, e), R = a.rank;
  BackwardArgs of;
  of.dy = rows_at(a.x, begin, rows);
  of.base.quantized = &w;
  of.dx = rows_at(a.y, begin, rows);
  of.added = row_at(a.bias, e, a.y.cols);
  of.arithmetic = a.arithmetic;
  if (R == 0) return of;
  of.lora.A = rows_at(a.Bt, e * R, R);
  of.ds = a.ds + begin * R;
  return of;
}

void grouped(const GroupedArgs& a, const Parallel& pool) {
  const Experts& x = a.experts;
  zero_rest(x, a.y);
  if (a.rank > 0) {
    zero_rest(x, MutMatrix{a.s, DType::f32, a.x.rows, a.rank, a.rank});
    for_shares(x, a.rank, false, pool, [&](int64_t e, const Parallel& share) {
      lora_shrink(linear_of(a, e, x.base), share);
    });
    for (int64_t i = 0; x.transposed && i < x.offsets[x.count - 1] * a.rank; ++i)
      a.ds[i] = a.scaling * a.s[i];
  }
  for_shares(x, a.y.cols, false, pool, [&](int64_t e, const Parallel& share) {
    const Weight4 w = weight_of(x, e);
    if (x.transposed)
      dx(transposed_of(a, e, w), nullptr, share);
    else
      linear_outputs(linear_of(a, e, w), nullptr, share);
  });
}

// -- backward -------------------------------------------------------------------------------------

// Expert e, also where it is transposed (then it serves dS, dA and dB alone).
inline BackwardArgs backward_of(const GroupedBackwardArgs& a, int64_t e, const Weight4& w) {
  const int64_t begin = first_row(a.experts, e), rows = row_count(a.experts, e), N = a.dy.cols,
                R = a.rank;
  BackwardArgs of;
  of.dy = rows_at(a.dy, begin, rows);
  of.x = rows_at(a.x, begin, rows);
  of.base.quantized = &w;
  of.lora.A = rows_at(a.A, e * R, R);
  of.lora.B = rows_at(a.B, e * N, N);
  of.lora.scaling = a.scaling;
  of.s = a.s + begin * R;
  of.ds = a.ds + begin * R;
  of.dx = rows_at(a.dx, begin, rows);
  of.dA = rows_at(a.dA, e * R, R);
  of.dB = rows_at(a.dB, e * N, N);
  of.arithmetic = a.arithmetic;
  return of;
}

// dx of expert e of a transposed stack, as y = x Wᵀ with S = dS and B = A transposed.
inline LinearArgs transposed_of(const GroupedBackwardArgs& a, int64_t e, const Weight4& w) {
  const int64_t begin = first_row(a.experts, e), rows = row_count(a.experts, e), K = a.dx.cols,
                R = a.rank;
  LinearArgs of;
  of.x = rows_at(a.dy, begin, rows);
  of.base.quantized = &w;
  of.y = rows_at(a.dx, begin, rows);
  of.lora.A = rows_at(a.A, e * R, R);
  of.lora.B = rows_at(a.At, e * K, K);
  of.s = a.ds + begin * R;
  of.arithmetic = a.arithmetic;
  return of;
}

void grouped_backward(const GroupedBackwardArgs& a, const Parallel& pool) {
  const Experts& x = a.experts;
  zero_rest(x, a.dx);
  if (a.dx.data || a.dA.data)
    for_shares(x, a.rank, false, pool, [&](int64_t e, const Parallel& share) {
      lora_ds(backward_of(a, e, x.base), share);
    });
  if (a.dx.data)
    for_shares(x, a.dx.cols, false, pool, [&](int64_t e, const Parallel& share) {
      const Weight4 w = weight_of(x, e);
      if (x.transposed)
        linear_outputs(transposed_of(a, e, w), nullptr, share);
      else
        dx(backward_of(a, e, w), nullptr, share);
    });
  if (a.dA.data || a.dB.data)
    for_shares(x, a.dA.data ? a.x.cols : a.dy.cols, true, pool,
               [&](int64_t e, const Parallel& share) {
                 lora_gradients(backward_of(a, e, x.base), share);
               });
}
