// Products of one to kMaxGemv rows of activations and a 4-bit weight whose blocks fit its rows: the
// weight is decoded in registers and never stored.
//
// Activations are laid out to match the chunks of dequant_panels.inl ("shuffled"):
//
//   shuffled[chunk][s][m][j] = x[m][8 kLanes chunk + 8j + s]         zero beyond K

constexpr int kMaxGemv = 4;

// Row m of M; x is padded with zeros up to whole chunks.
inline void shuffle_row(float* dst, const float* x, int64_t m, int64_t M, int64_t K) {
  dst += m * kLanes;
  for (int64_t chunk = 0; chunk < K; chunk += kChunk, dst += M * kChunk)
    for (int s = 0; s < 8; ++s)
      for (int j = 0; j < kLanes; ++j) dst[s * M * kLanes + j] = x[chunk + 8 * j + s];
}

inline void unshuffle(float* dst, const float* src, int64_t n) {
  for (int64_t chunk = 0; chunk < n; chunk += kChunk)
    for (int s = 0; s < 8; ++s)
      for (int j = 0; j < kLanes; ++j) {
        const int64_t k = chunk + 8 * j + s;
        if (k < n) dst[k] = src[chunk + s * kLanes + j];
      }
}

// -- y = x Wᵀ: dot form ---------------------------------------------------------------------------

constexpr int64_t kDotRowsAhead = 8;  // from a load to its prefetch into the second level

// How a chunk of the weight meets x, in float32. gemv_pairs.inl has the other way.
struct FloatProducts {
  using Number = float;                       // what shuffled x is made of
  static constexpr int kSteps = 8;            // vectors of x that meet a chunk
  static constexpr int kGroup = kLookupRows;  // rows of the weight whose lookups are made together
  // Rows of the weight at a time: with more, the sums of M rows of x would not fit the registers.
  template <int M>
  static constexpr int kRows = M < 4 ? 4 : 2;
  Lut lut;

  explicit FloatProducts(const float* code) : lut(make_lut(code)) {}
  NibbleWeights decode(vi packed) const { return NibbleWeights(lut, packed); }
  static vf load_x(const float* x) { return load(x); }
  template <int S>
  vf weight(const NibbleWeights& of) const {
    return of.template weight<S>(lut);
  }
  static vf add_product(vf sum, vf weight, vf x) { return fma(weight, x, sum); }
};

template <int S, int Steps, class F>
inline void for_steps(const F& f) {
  if constexpr (S < Steps) {
    f(Constant<S>{});
    for_steps<S + 1, Steps>(f);
  }
}

// total[r][m] = lanes of the dot product of weight row n + r with activation row m. Addresses are
// sums of few variables, or they would not fit the integer registers.
template <int Rows, int M, class Products>
inline void dot_rows(const Chunks& chunks, const Products& products, const float* scales,
                     int64_t scales_stride, int64_t n, const typename Products::Number* x,
                     vf (&total)[Rows][M]) {
  constexpr int Steps = Products::kSteps;
  constexpr int Group = Rows < Products::kGroup ? Rows : Products::kGroup;
  const int64_t K = chunks.w.K, row_bytes = K >> 1;
  const uint8_t* row = chunks.w.packed + n * row_bytes;
  const int block_shift = chunks.w.block_shift;
  const vi scale_lane = chunks.scale_lane;
  vf held[Rows][M];  // the caller's would be written to memory with every chunk
  for (int r = 0; r < Rows; ++r)
    for (int m = 0; m < M; ++m) held[r][m] = zero();
  const auto add_chunk = [&](const float* of_block, const auto& packed) {
    for (int first = 0; first < Rows; first += Group) {
      decltype(products.decode(packed(0))) decoded[Group];
      vf sum[Group][M];
      for (int r = 0; r < Group; ++r) {
        decoded[r] = products.decode(packed(first + r));
        for (int m = 0; m < M; ++m) sum[r][m] = zero();
      }
      for_steps<0, Steps>([&](auto s) {
        constexpr int S = decltype(s)::value;
        decltype(Products::load_x(x)) activation[M];  // loaded once for the group
        for (int m = 0; m < M; ++m) activation[m] = Products::load_x(x + (S * M + m) * kLanes);
        for (int r = 0; r < Group; ++r) {
          const auto weight = products.template weight<S>(decoded[r]);
          for (int m = 0; m < M; ++m)
            sum[r][m] = Products::add_product(sum[r][m], weight, activation[m]);
        }
      });
      for (int r = 0; r < Group; ++r) {
        const vf scale = permute(load(of_block + (first + r) * scales_stride), scale_lane);
        for (int m = 0; m < M; ++m) held[first + r][m] = fma(sum[r][m], scale, held[first + r][m]);
      }
    }
  };
  int64_t k = 0;
  for (; k + kChunk <= K; k += kChunk, row += kChunk / 2, x += Steps * M * kLanes)
    add_chunk(scales + (k >> block_shift), [&](int r) {
      __builtin_prefetch(row + (r + kDotRowsAhead) * row_bytes, 0, 2);
      return loadi(row + r * row_bytes);
    });
  if (k < K)
    add_chunk(scales + (k >> block_shift), [&](int r) {
      return loadi_partial(row + r * row_bytes, static_cast<int>((K - k) >> 3));
    });
  for (int r = 0; r < Rows; ++r)
    for (int m = 0; m < M; ++m) total[r][m] = held[r][m];
}

template <class Products>
struct GemvArgs {
  const LinearArgs& a;
  const Products& products;
  const typename Products::Number* x;  // shuffled
  const float* s;  // scaling * S, M rows of s_stride, zero beyond R; null: no adapter
  int64_t s_stride;
  const Expansion* many;
};

// What the adapters of `many` add to outputs [n0, n0 + kStripWidth): to[m][n - n0]. Where to[m] is
// null they add nothing.
template <int M>
struct Deltas {
  float sums[M * kStripWidth];
  const float* to[M] = {};
  int64_t n0 = 0;

  void fill(const Expansion& many, int64_t begin, int64_t columns) {
    n0 = begin;
    for (int64_t k = 0; k < M * kStripWidth; k += kLanes) store(sums + k, zero());
    many.rows(0, M, n0, columns, true, sums);
    for (int m = 0; m < M; ++m) to[m] = many.has_adapter(m) ? sums + m * kStripWidth : nullptr;
  }
};

// Computes outputs [n0, n0 + Rows) of every activation row.
template <int Rows, int M, class Products>
void gemv_outputs(const GemvArgs<Products>& f, const Chunks& chunks, const Products& products,
                  float* scales, float* b_row, const Deltas<M>& deltas, int64_t n0) {
  const int64_t scales_size = Chunks::scales_size(chunks.w);
  vf total[Rows][M];
  for (int r = 0; r < Rows; ++r) {
    for (int m = 0; m < M; ++m) total[r][m] = zero();
    chunks.load_row_scales(scales + r * scales_size, n0 + r, 0, chunks.blocks_per_row);
  }
  dot_rows<Rows, M>(chunks, products, scales, scales_size, n0, f.x, total);
  for (int r = 0; r < Rows; ++r) {
    const int64_t n = n0 + r;
    if (f.s) {
      const Matrix& B = f.a.lora.B;
      load_row(b_row, B.data, B.dtype, n * B.stride, B.cols);
      for (int64_t k = 0; k < f.s_stride; k += kLanes)
        for (int m = 0; m < M; ++m)
          total[r][m] = fma(load(b_row + k), load(f.s + m * f.s_stride + k), total[r][m]);
    }
    const float bias = f.a.bias.data ? load_one(f.a.bias.data, f.a.bias.dtype, n) : 0.0f;
    for (int m = 0; m < M; ++m) {
      float y = hsum(total[r][m]);
      if (deltas.to[m]) y += deltas.to[m][n - deltas.n0];
      store_one(f.a.y.data, f.a.y.dtype, m * f.a.y.stride + n, y + bias);
    }
  }
}

template <int M, class Products>
void gemv_forward(const GemvArgs<Products>& f, const Parallel& pool) {
  constexpr int kRowsAtOnce = Products::template kRows<M>;
  const Weight4& w = *f.a.base.quantized;
  parallel(pool, ceil_div(w.N, kRowsAtOnce), [&](int64_t begin, int64_t end) {
    const Chunks chunks(w);
    const Products products = f.products;
    const int64_t scales_size = Chunks::scales_size(w);
    const int64_t b_size = f.s ? f.s_stride : 0;
    float* memory = static_cast<float*>(
        scratch(Buffer::rows, (kRowsAtOnce * scales_size + b_size) * sizeof(float)));
    float* scales = memory;
    for (int64_t i = 0; i < kRowsAtOnce * scales_size; ++i) scales[i] = 0.0f;
    float* b_row = memory + kRowsAtOnce * scales_size;
    for (int64_t i = 0; i < b_size; ++i) b_row[i] = 0.0f;
    Deltas<M> deltas;
    for (int64_t t = begin; t < end; ++t) {
      const int64_t n = t * kRowsAtOnce;
      if (f.many && (t - begin) % (kStripWidth / kRowsAtOnce) == 0)
        deltas.fill(*f.many, n, min64(kStripWidth, min64(end * kRowsAtOnce, w.N) - n));
      if (n + kRowsAtOnce <= w.N)
        gemv_outputs<kRowsAtOnce, M>(f, chunks, products, scales, b_row, deltas, n);
      else
        for (int64_t i = n; i < w.N; ++i)
          gemv_outputs<1, M>(f, chunks, products, scales, b_row, deltas, i);
    }
  });
}

// scaling * S of the adapter of a, rows padded with zeros to whole vectors; null: no adapter.
struct ScaledS {
  float* data = nullptr;
  int64_t stride = 0;

  static int64_t stride_of(const LinearArgs& a) {
    return a.lora.A.data ? ceil_div(a.lora.A.rows, kLanes) * kLanes : 0;
  }
  ScaledS(const LinearArgs& a, float* memory) : stride(stride_of(a)) {
    if (stride == 0) return;
    data = memory;
    const int64_t R = a.lora.A.rows;
    for (int64_t m = 0; m < a.x.rows; ++m)
      for (int64_t r = 0; r < stride; ++r)
        data[m * stride + r] = r < R ? a.s[m * R + r] * a.lora.scaling : 0.0f;
  }
};

// Calls f(Constant<M>{}) for 1 <= M <= kMaxGemv.
template <class F>
inline void for_gemv_rows(int64_t M, const F& f) {
  switch (M) {
    case 1:
      return f(Constant<1>{});
    case 2:
      return f(Constant<2>{});
    case 3:
      return f(Constant<3>{});
    default:
      return f(Constant<4>{});
  }
}

// Computes y for 1 <= M <= kMaxGemv; S is in a.s already.
inline void linear_gemv(const LinearArgs& a, const Expansion* many, const Parallel& pool) {
  const int64_t M = a.x.rows, K = a.x.cols;
  const int64_t padded = ceil_div(K, kChunk) * kChunk;
  float* row = static_cast<float*>(
      scratch(Buffer::shared, (M * (padded + ScaledS::stride_of(a)) + padded) * sizeof(float)));
  float* x = row + padded;
  for (int64_t k = K; k < padded; ++k) row[k] = 0.0f;
  for (int64_t m = 0; m < M; ++m) {
    load_row(row, a.x.data, a.x.dtype, m * a.x.stride, K);
    shuffle_row(x, row, m, M, K);
  }
  const ScaledS s(a, x + M * padded);
  const FloatProducts products(a.base.quantized->code);
  const GemvArgs<FloatProducts> f{a, products, x, s.data, s.stride, many};
  for_gemv_rows(M, [&](auto rows) { gemv_forward<decltype(rows)::value>(f, pool); });
}

// -- dx = dy W: outer-product form ----------------------------------------------------------------

// Rows from a load to its prefetches into the first and the second level, and of scales: a strip of
// a row is too short for hardware to stream.
constexpr int64_t kRowsNear = 4, kRowsFar = 32, kScalesAhead = 32;

// acc[m][k] (shuffled) += Σ_r dy[m, n + r] W[n + r, k] over the chunks of [k_begin, k_end).
// Addresses are sums of few variables, or they would not fit the integer registers; members are
// read once, as vector stores may alias them.
template <int Rows, int M>
inline void outer_rows(const Chunks& chunks, const Lut& lut, const float* scales,
                       int64_t scales_stride, int64_t n, const float* dy, int64_t dy_stride,
                       int64_t k_begin, int64_t k_end, float* acc, int64_t acc_stride) {
  const int64_t row_bytes = chunks.w.K >> 1;
  const uint8_t* row = chunks.w.packed + n * row_bytes + (k_begin >> 1);
  const int block_shift = chunks.w.block_shift;
  const int64_t first = k_begin >> block_shift;
  const vi scale_lane = chunks.scale_lane;
  float gradient[Rows][M];
  for (int r = 0; r < Rows; ++r)
    for (int m = 0; m < M; ++m) gradient[r][m] = dy[m * dy_stride + n + r];
  for (int64_t k = k_begin; k < k_end; k += kChunk, row += kChunk / 2, acc += kChunk) {
    NibbleWeights weights[Rows];
    vf coefficient[Rows][M];
    const int64_t left = k_end - k, block = (k >> block_shift) - first;
    for (int r = 0; r < Rows; ++r) {
      const uint8_t* p = row + r * row_bytes;
      weights[r] = NibbleWeights(
          lut, left >= kChunk ? loadi(p) : loadi_partial(p, static_cast<int>(left >> 3)));
      __builtin_prefetch(p + kRowsNear * row_bytes);
      __builtin_prefetch(p + kRowsFar * row_bytes, 0, 2);
      const vf scale = permute(load(scales + r * scales_stride + block), scale_lane);
      for (int m = 0; m < M; ++m) coefficient[r][m] = mul(scale, set1(gradient[r][m]));
    }
    for_nibbles([&](auto s) {
      constexpr int S = decltype(s)::value;
      vf sum[M];
      for (int m = 0; m < M; ++m) sum[m] = load(acc + m * acc_stride + S * kLanes);
      for (int r = 0; r < Rows; ++r) {
        const vf weight = weights[r].template weight<S>(lut);
        for (int m = 0; m < M; ++m) sum[m] = fma(weight, coefficient[r][m], sum[m]);
      }
      for (int m = 0; m < M; ++m) store(acc + m * acc_stride + S * kLanes, sum[m]);
    });
  }
}

// dst[0, k_end - k_begin) = columns of row m of mask (dS A).
inline void adapter_columns(const BackwardArgs& a, int64_t m, int64_t k_begin, int64_t k_end,
                            float* dst, float* row) {
  const Matrix& A = a.lora.A;
  const int64_t n = k_end - k_begin;
  for (int64_t k = 0; k < n; ++k) dst[k] = 0.0f;
  for (int64_t r = 0; r < A.rows; ++r) {
    load_row(row, A.data, A.dtype, r * A.stride + k_begin, n);
    const vf coefficient = set1(a.ds[m * A.rows + r]);
    for (int64_t k = 0; k < n; k += kLanes)
      store(dst + k, fma(coefficient, load(row + k), load(dst + k)));
  }
  apply_dropout(a.lora.dropout, m, k_begin, n, dst);
}

// base[0, k_end - k_begin) += what the adapters of `many` add to these columns of row m of dx.
inline void add_adapters_to_row(const Expansion& many, int64_t m, int64_t k_begin, int64_t k_end,
                                float* base) {
  if (!many.has_adapter(m)) return;
  for (int64_t k = k_begin; k < k_end; k += kStripWidth) {
    float sums[kStripWidth] = {};
    const int64_t columns = min64(kStripWidth, k_end - k);
    many.rows(m, 1, k, columns, true, sums);
    for (int64_t j = 0; j < columns; ++j) base[k - k_begin + j] += sums[j];
  }
}

// Computes columns [k_begin, k_end) of dx; k_begin is a multiple of kChunk. dy is float32 [M, N];
// a.ds holds dS already.
template <int M>
void gemv_columns(const BackwardArgs& a, const Expansion* many, const Lut& lut, const float* dy,
                  int64_t k_begin, int64_t k_end) {
  constexpr int kRowsAtOnce = 4;
  const Weight4& w = *a.base.quantized;
  const Chunks chunks(w);
  const int64_t width = ceil_div(k_end - k_begin, kChunk) * kChunk;
  const int64_t scales_size = Chunks::scales_size(w);
  const int64_t first = chunks.first_block(k_begin);
  const int64_t blocks = chunks.first_block(k_end - 1) + 1 - first;
  float* acc = static_cast<float*>(scratch(Buffer::accumulator, M * width * sizeof(float)));
  float* memory = static_cast<float*>(
      scratch(Buffer::rows, (kRowsAtOnce * scales_size + 3 * width) * sizeof(float)));
  float* scales = memory;
  for (int64_t i = 0; i < kRowsAtOnce * scales_size; ++i) scales[i] = 0.0f;
  for (int64_t i = 0; i < M * width; i += kLanes) store(acc + i, zero());
  int64_t n = 0;
  for (; n + kRowsAtOnce <= w.N; n += kRowsAtOnce) {
    for (int r = 0; r < kRowsAtOnce; ++r) {
      chunks.prefetch_scales(n + r + kScalesAhead, first, blocks);
      chunks.load_row_scales(scales + r * scales_size, n + r, first, blocks);
    }
    outer_rows<kRowsAtOnce, M>(chunks, lut, scales, scales_size, n, dy, w.N, k_begin, k_end, acc,
                               width);
  }
  for (; n < w.N; ++n) {
    chunks.load_row_scales(scales, n, first, blocks);
    outer_rows<1, M>(chunks, lut, scales, scales_size, n, dy, w.N, k_begin, k_end, acc, width);
  }
  float* base = memory + kRowsAtOnce * scales_size;
  float* adapter = base + width;
  for (int m = 0; m < M; ++m) {
    unshuffle(base, acc + m * width, k_end - k_begin);
    if (a.lora.A.data) {
      adapter_columns(a, m, k_begin, k_end, adapter, adapter + width);
      for (int64_t k = 0; k < k_end - k_begin; ++k) base[k] += adapter[k];
    }
    if (many) add_adapters_to_row(*many, m, k_begin, k_end, base);
    if (a.added.data) {
      load_row(adapter, a.added.data, a.added.dtype, k_begin, k_end - k_begin);
      for (int64_t k = 0; k < k_end - k_begin; ++k) base[k] += adapter[k];
    }
    store_row(a.dx.data, a.dx.dtype, m * a.dx.stride + k_begin, base, k_end - k_begin);
  }
}

inline void dx_gemv(const BackwardArgs& a, const Expansion* many, const Parallel& pool) {
  const Lut lut = make_lut(a.base.quantized->code);
  const int64_t M = a.dy.rows, N = a.dy.cols, K = a.dx.cols;
  float* dy = static_cast<float*>(scratch(Buffer::shared, M * N * sizeof(float)));
  for (int64_t m = 0; m < M; ++m) load_row(dy + m * N, a.dy.data, a.dy.dtype, m * a.dy.stride, N);
  // Wide strips: a strip reads the same few cache lines of every row, and long runs stream better.
  const int64_t chunks = ceil_div(K, kChunk), strips = min64(chunks, pool.threads);
  parallel(pool, strips, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t k_begin = chunks * t / strips * kChunk,
                    k_end = min64(K, chunks * (t + 1) / strips * kChunk);
      for_gemv_rows(M, [&](auto rows) {
        gemv_columns<decltype(rows)::value>(a, many, lut, dy, k_begin, k_end);
      });
    }
  });
}
