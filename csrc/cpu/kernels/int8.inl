// y = x Wᵀ on bytes, for a 4-bit weight whose blocks fit its rows. Only where somebody asked for it
// (LinearArgs::int8): everything else in this folder computes with exact codes and float32.
//
//   group    64 consecutive k, or a block of 32
//   x[m, k]  = scale(m, group) q[m, k], rounded: scale = largest |x| of the group / 127
//   code[i]  = step (table[i] - zero), rounded
//   y[m, n]  = Σ_group scale(m, group) step w_scale(n, group) (Σ_k table[nibble] q - zero Σ_k q)
//
// where zero is kByteZero: 128 if the instruction takes the bytes of the table unsigned, else 0.
//
// The sum over a group is exact in int32; groups are added in float32, in their order. So a row's
// bits depend on nothing but itself and the weight.
//
// Lanes are outputs: packed dwords of kLanes rows of the weight are transposed as in
// dequant_panels.inl, after which a lookup of the high nibbles gives each lane a quad of weights,
// 8j, 8j+2, 8j+4, 8j+6, and one of the low nibbles the odd ones. Bytes of x are laid out in micro
// tiles of a few rows to match:
//
//   micro tile   | quad 0: a dword for each row | quad 1: ... |
//
// Scales and -zero Σ q lie likewise, by group.

constexpr int64_t kInt8Depth =
    512;  // k per panel: one of kMicroColumns rows fits the first-level cache
constexpr int64_t kInt8Bytes = 4 << 20;     // of rounded x at a time
constexpr float kInt8Smallest = 0x1p-100f;  // a group is rounded as if it had one value this large

// 16 codes as bytes.
struct ByteTable {
  uint8_t entry[16];
  float step;

  // The largest code gets 64 to 127 steps: as many as leave the least squared error.
  explicit ByteTable(const float* code) {
    const float absmax = absmax_of(code, 16), largest = absmax > 0.0f ? absmax : 1.0f;
    float best = 0.0f, least = 0.0f;
    for (int steps = 127; steps >= 64; --steps) {
      const float scale = static_cast<float>(steps) / largest, size = 1.0f / scale;
      vf squares = zero();
      for (int i = 0; i < 16; i += kLanes) {
        const vf exact = load(code + i), rounded = to_float(to_int(mul(exact, set1(scale))));
        const vf error = fma(rounded, set1(-size), exact);
        squares = fma(error, error, squares);
      }
      const float sum = hsum(squares);
      if (best == 0.0f || sum < least) best = scale, least = sum;
    }
    step = 1.0f / best;
    for (int i = 0; i < 16; i += kLanes) {
      uint32_t lane[kLanes];
      storei(lane, to_int(mul(load(code + i), set1(best))));
      for (int j = 0; j < kLanes; ++j) entry[i + j] = static_cast<uint8_t>(lane[j] + kByteZero);
    }
  }
};

// Rows of x as bytes, in micro tiles of `height` rows; row i of them is row m0 + i of x.
struct Int8Rows {
  const LinearArgs& a;
  int64_t m0, rows, height, K;
  int group_shift;
  uint32_t* quads;
  float* scale;  // times the table's step
  int32_t* bias;

  int64_t groups() const { return K >> group_shift; }
  int64_t height_of(int64_t i) const { return min64(height, rows - i); }

  // Rounds columns [k0, k0 + n) of the micro tile that begins at row i; n is at most kInt8Depth.
  void round_rows(int64_t i, int64_t k0, int64_t n, float step) const {
    alignas(64) float values[kInt8Depth + kLanes];
    const int64_t micro_rows = height_of(i), size = int64_t{1} << group_shift;
    for (int64_t r = 0; r < micro_rows; ++r) {
      load_row(values, a.x.data, a.x.dtype, (m0 + i + r) * a.x.stride + k0, n);
      for (int64_t k = 0; k < n; k += size) {
        const int64_t g = i * groups() + ((k0 + k) >> group_shift) * micro_rows + r;
        round_group(values + k, size, step, quads + i * (K / 4) + (k0 + k) / 4 * micro_rows + r,
                    micro_rows, scale[g], bias[g]);
      }
    }
  }

  // A NaN or infinity in the group shows in its scale.
  static void round_group(const float* values, int64_t size, float step, uint32_t* quads,
                          int64_t stride, float& scale, int32_t& bias) {
    uint32_t order[kLanes];
    for (uint32_t j = 0; j < kLanes; ++j) order[j] = j / 8 * 8 + j % 4 * 2 + j / 4 % 2;
    const vi permutation = loadi(order);
    const float absmax = absmax_of(values, size);
    const float largest = absmax > kInt8Smallest ? absmax : kInt8Smallest;
    const vf inverse = set1(127.0f / largest);
    vi sum = set1i(0);
    for (int64_t i = 0; i < size; i += kLanes) {
      const vi rounded = to_int(permute(mul(load(values + i), inverse), permutation));
      sum = addi(sum, rounded);
      uint32_t quad[kLanes / 4];
      store_bytes(quad, rounded);
      for (int j = 0; j < kLanes / 4; ++j) quads[(i / 4 + j) * stride] = quad[j];
    }
    const bool finite = bits_of(absmax) < 0x7f800000u;
    bias = finite ? -kByteZero * static_cast<int32_t>(hsum(to_float(sum))) : 0;
    scale = finite ? largest * (1.0f / 127.0f) * step : float_of(0x7fc00000u);
  }
};

inline vi even_bytes(vi lut, vi packed) {
  return lut_bytes(lut, andi(shr<4>(packed), set1i(0x0f0f0f0f)));
}
inline vi odd_bytes(vi lut, vi packed) { return lut_bytes(lut, andi(packed, set1i(0x0f0f0f0f))); }

// -- gemv: bytes of the weight stay in registers --------------------------------------------------

// Up to so many rows of x. More sums would not fit the registers.
constexpr int kMaxInt8Gemv = kLanes > 8 ? 16 : 4;
constexpr int kInt8Held = 4;  // up to so many rows, their outputs stay in registers as well

// The sums of a group of columns: for few rows two of each, as one alone would wait for itself.
template <int M>
struct Int8Sums {
  static constexpr int kChains = M <= kInt8Held ? 2 : 1;
  vi sum[kChains][M];

  explicit Int8Sums(const int32_t* bias) {
    for (int m = 0; m < M; ++m) {
      sum[0][m] = set1i(static_cast<uint32_t>(bias[m]));
      if (kChains > 1) sum[kChains - 1][m] = set1i(0);
    }
  }
  // Adds the products of eight weights of each lane.
  void add(vi lut, vi packed, const uint32_t* quads) {
    const vi high = even_bytes(lut, packed), low = odd_bytes(lut, packed);
    for (int m = 0; m < M; ++m) sum[0][m] = dot4(sum[0][m], high, quads[m]);
    for (int m = 0; m < M; ++m) sum[kChains - 1][m] = dot4(sum[kChains - 1][m], low, quads[M + m]);
  }
  vf total(int m) const {
    return to_float(kChains > 1 ? addi(sum[0][m], sum[kChains - 1][m]) : sum[0][m]);
  }
};

// c[m, 0 .. kLanes) += the products of a micro tile of M rows with rows n .. n + count of the
// weight.
template <int M>
__attribute__((noinline)) void int8_gemv(const Int8Rows& x, const Chunks& chunks, vi lut, int64_t n,
                                         int64_t count, const float* w_scale, float* c) {
  const int per_group = 1 << (x.group_shift - 3), shift = chunks.w.block_shift;
  vf held[M];
  if (M <= kInt8Held)
    for (int m = 0; m < M; ++m) held[m] = load(c + m * kStripWidth);
  const uint32_t* quads = x.quads;
  const float* scale = x.scale;
  const int32_t* bias = x.bias;
  const auto finish = [&](const Int8Sums<M>& sums, int64_t k) {
    const vf weight = load(w_scale + (k >> shift) * kLanes);
    for (int m = 0; m < M; ++m) {
      float* to = c + m * kStripWidth;
      const vf before = M <= kInt8Held ? held[m] : load(to);
      const vf after = fma(mul(sums.total(m), set1(scale[m])), weight, before);
      if (M <= kInt8Held)
        held[m] = after;
      else
        store(to, after);
    }
    scale += M;
    bias += M;
  };
  for (int64_t k = 0; k < x.K; k += kChunk) {
    vf dwords[kLanes];
    load_chunk(chunks, n, count, k, dwords);
    chunks.prefetch_rows(n + kLanes, k);
    const int present = static_cast<int>(min64(kLanes, (x.K - k) / 8));
    for (int d0 = 0; d0 < present; d0 += per_group) {
      Int8Sums<M> sums(bias);
      for (int d = d0; d < d0 + per_group; ++d, quads += 2 * M)
        sums.add(lut, as_bits(dwords[d]), quads);
      finish(sums, k + 8 * d0);
    }
  }
  if (M <= kInt8Held)
    for (int m = 0; m < M; ++m) store(c + m * kStripWidth, held[m]);
}

template <int M>
inline void int8_gemv_rows(const Int8Rows& x, const Chunks& chunks, vi lut, int64_t n,
                           int64_t count, const float* w_scale, float* c) {
  if constexpr (M > 0) {
    if (x.rows != M) return int8_gemv_rows<M - 1>(x, chunks, lut, n, count, w_scale, c);
    int8_gemv<M>(x, chunks, lut, n, count, w_scale, c);
  }
}

// -- gemm: panels of bytes ------------------------------------------------------------------------

// Bytes of rows n0 .. n0 + count (at most kMicroColumns) of the weight, k in [p0, p0 + depth).
struct Int8Panel {
  const Chunks& chunks;
  int64_t n0, count, p0, depth;
  uint32_t* quads;       // [quad][v][lane]
  const float* scales;   // of load_lane_scales, from n0 on
  int64_t scale_stride;  // from them to those of the next kLanes rows

  // `next` will be filled next: its bytes are on their way while this one is multiplied.
  void fill(vi lut, const Int8Panel& next) const {
    for (int64_t v = 0; v * kLanes < count; ++v)
      for (int64_t p = 0; p < depth; p += kChunk) {
        vf dwords[kLanes];
        load_chunk(chunks, n0 + v * kLanes, count - v * kLanes, p0 + p, dwords);
        chunks.prefetch_rows(next.n0 + v * kLanes, next.p0 + p);
        const int64_t present = min64(kLanes, (depth - p) / 8);
        uint32_t* out = quads + (p / 4 * kMicroVectors + v) * kLanes;
        for (int64_t d = 0; d < present; ++d, out += 2 * kMicroVectors * kLanes) {
          const vi packed = as_bits(dwords[d]);
          storei(out, even_bytes(lut, packed));
          storei(out + kMicroVectors * kLanes, odd_bytes(lut, packed));
        }
      }
  }
};

// c += the micro tile of Rows rows of x that begins at row i0, times the panel. Inlined, it would
// be short of registers.
template <int Rows, int Vectors>
__attribute__((noinline)) void int8_micro_kernel(const Int8Rows& x, int64_t i0,
                                                 const Int8Panel& panel, float* c) {
  const int64_t first = panel.p0 >> x.group_shift, groups = panel.depth >> x.group_shift;
  const int64_t per_group = int64_t{1} << (x.group_shift - 2);
  const int block_shift = panel.chunks.w.block_shift - x.group_shift;
  const uint32_t *quads = x.quads + i0 * (x.K / 4) + panel.p0 / 4 * Rows, *bytes = panel.quads;
  const float* scale = x.scale + i0 * x.groups() + first * Rows;
  const int32_t* bias = x.bias + i0 * x.groups() + first * Rows;
  for (int64_t g = 0; g < groups; ++g, scale += Rows, bias += Rows) {
    // Without this g++ carries c from group to group, which takes the registers of the sums.
    __asm__ volatile("" : : : "memory");
    vi sum[Rows][Vectors];
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Vectors; ++v) sum[i][v] = set1i(static_cast<uint32_t>(bias[i]));
    for (int64_t q = 0; q < per_group; ++q, quads += Rows, bytes += kMicroVectors * kLanes) {
      vi b[Vectors];
      for (int v = 0; v < Vectors; ++v) b[v] = loadi(bytes + v * kLanes);
      for (int i = 0; i < Rows; ++i) {
        const vi a = set1i(quads[i]);
        for (int v = 0; v < Vectors; ++v) sum[i][v] = dot4(sum[i][v], b[v], a);
      }
    }
    vf weight[Vectors];
    for (int v = 0; v < Vectors; ++v)
      weight[v] =
          load(panel.scales + ((first + g) >> block_shift) * kLanes + v * panel.scale_stride);
    for (int i = 0; i < Rows; ++i)
      for (int v = 0; v < Vectors; ++v) {
        float* to = c + i * kStripWidth + v * kLanes;
        store(to, fma(mul(to_float(sum[i][v]), set1(scale[i])), weight[v], load(to)));
      }
  }
}

template <int Rows>
inline void int8_micro_kernel_rows(const Int8Rows& x, int64_t i, const Int8Panel& panel, float* c) {
  if constexpr (Rows > 0) {
    if (x.height_of(i) != Rows) return int8_micro_kernel_rows<Rows - 1>(x, i, panel, c);
    if (panel.count > kLanes) return int8_micro_kernel<Rows, kMicroVectors>(x, i, panel, c);
    int8_micro_kernel<Rows, 1>(x, i, panel, c);
  }
}

// c[i, j] += Σ_k of rows [i0, i0 + rows) of x, which are whole micro tiles, and columns [j0, j0 +
// columns). scales: of load_lane_scales for these columns.
inline void int8_gemm(const Int8Rows& x, const Chunks& chunks, vi lut, int64_t i0, int64_t rows,
                      int64_t j0, int64_t columns, const float* scales, float* c) {
  uint32_t* quads = static_cast<uint32_t*>(scratch(Buffer::panel, kInt8Depth * kMicroColumns));
  const int64_t stride = chunks.blocks_per_row * kLanes;
  const auto panel_of = [&](int64_t j, int64_t p0) -> Int8Panel {
    const int64_t count = min64(kMicroColumns, columns - j), depth = min64(kInt8Depth, x.K - p0);
    return {chunks, j0 + j, count, p0, depth, quads, scales + j / kLanes * stride, stride};
  };
  for (int64_t p0 = 0; p0 < x.K; p0 += kInt8Depth)
    for (int64_t j = 0; j < columns; j += kMicroColumns) {
      const Int8Panel panel = panel_of(j, p0);
      const Int8Panel next = j + kMicroColumns < columns ? panel_of(j + kMicroColumns, p0)
                             : p0 + panel.depth < x.K    ? panel_of(0, p0 + panel.depth)
                                                         : panel_of(columns, 0);
      panel.fill(lut, next);
      for (int64_t i = i0; i < i0 + rows; i += x.height)
        int8_micro_kernel_rows<kMicroRows>(x, i, panel, c + (i - i0) * kStripWidth + j);
    }
}

// -- the operator ---------------------------------------------------------------------------------

// Computes the outputs of rows [i0, i0 + rows) of x and columns [j0, j0 + columns), at most
// kStripWidth.
inline void int8_outputs(const LinearArgs& a, const Expansion* many, const Int8Rows& x, vi lut,
                         int64_t i0, int64_t rows, int64_t j0, int64_t columns) {
  const Chunks chunks(*a.base.quantized);
  float* c = static_cast<float*>(scratch(Buffer::accumulator, rows * kStripWidth * sizeof(float)));
  for (int64_t k = 0; k < rows * kStripWidth; k += kLanes) store(c + k, zero());
  add_adapters(a, many, x.m0 + i0, rows, j0, columns, c);
  const float* scales = load_lane_scales(chunks, j0, columns);
  if (x.rows <= kMaxInt8Gemv) {
    for (int64_t j = 0; j < columns; j += kLanes)
      int8_gemv_rows<kMaxInt8Gemv>(x, chunks, lut, j0 + j, min64(kLanes, columns - j),
                                   scales + j * chunks.blocks_per_row, c + j);
  } else {
    int8_gemm(x, chunks, lut, i0, rows, j0, columns, scales, c);
  }
  store_outputs(a, x.m0 + i0, rows, j0, columns, c);
}

// Rounds all K columns of the tiles of x, round(tile, k0, n), then computes N outputs for each of
// them: multiply(first tile, last, j0, columns), columns at most kStripWidth.
template <class Round, class Multiply>
void int8_passes(int64_t tiles, int64_t K, int64_t N, const Parallel& pool, const Round& round,
                 const Multiply& multiply) {
  const int64_t depths = ceil_div(K, kInt8Depth);
  prepare(pool, tiles * depths, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t k0 = t % depths * kInt8Depth;
      round(t / depths, k0, min64(kInt8Depth, K - k0));
    }
  });
  // Each thread gets as much work as the others, in one piece where possible.
  int64_t width = kStripWidth, chunks = 1;
  while (width > kMicroColumns && ceil_div(N, width) < 4 * pool.threads) width /= 2;
  while (chunks * 2 <= tiles && ceil_div(N, width) * chunks < 4 * pool.threads) chunks *= 2;
  const int64_t strips = ceil_div(N, width), chunk = ceil_div(tiles, chunks);
  parallel(pool, strips * ceil_div(tiles, chunk), [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t / strips * chunk, j0 = t % strips * width;
      multiply(first, min64(first + chunk, tiles), j0, min64(width, N - j0));
    }
  });
}

// Computes rows x.m0 .. x.m0 + x.rows of y.
inline void int8_rows(const LinearArgs& a, const Expansion* many, const ByteTable& table,
                      const Int8Rows& x, const Parallel& pool) {
  const vi lut = make_byte_lut(table.entry);
  int8_passes(
      ceil_div(x.rows, x.height), x.K, a.y.cols, pool,
      [&](int64_t tile, int64_t k0, int64_t n) {
        x.round_rows(tile * x.height, k0, n, table.step);
      },
      [&](int64_t first, int64_t last, int64_t j0, int64_t columns) {
        const int64_t i0 = first * x.height;
        int8_outputs(a, many, x, lut, i0, min64(last * x.height, x.rows) - i0, j0, columns);
      });
}

inline void linear_int8(const LinearArgs& a, const Expansion* many, const Parallel& pool) {
  const Weight4& w = *a.base.quantized;
  const int64_t M = a.x.rows, K = w.K, most = min64(kRows, kInt8Bytes / (K + 1) + 1);
  const int shift = w.block_shift < 6 ? w.block_shift : 6;
  const ByteTable table(w.code);
  const int64_t at_once = ceil_div(M, ceil_div(M, most)), groups = K >> shift;
  uint32_t* quads = static_cast<uint32_t*>(
      scratch(Buffer::shared, static_cast<size_t>(at_once * (K + 8 * groups))));
  float* scale = reinterpret_cast<float*>(quads + at_once * K / 4);
  int32_t* bias = reinterpret_cast<int32_t*>(scale + at_once * groups);
  for (int64_t m = 0; m < M; m += at_once) {
    const int64_t rows = min64(at_once, M - m);
    const int64_t height =
        rows <= kMaxInt8Gemv ? rows : ceil_div(rows, ceil_div(rows, kMicroRows));  // 18 as 9 + 9
    int8_rows(a, many, table, {a, m, rows, height, K, shift, quads, scale, bias}, pool);
  }
}
