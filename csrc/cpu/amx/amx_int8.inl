// int8.inl's product on the tile registers of AMX, which multiply signed bytes and add in int32.
//
//   x        for each 16 rows, group:   | row 0: bytes of the group | row 1 | ... up to 16 rows |
//   panel    of int8.inl, with the table's entries as signed bytes: 16 quads are two registers,
//            side by side
//
// A group of 64 k is one product of registers, and one of 32 k a product of half as deep ones. Its
// sums are the same integers as in int8.inl, and are scaled and added in the same order: so are the
// bits of y.
//
// A group of 32 rows and 32 columns loads four registers, makes four products and stores four,
// while the sums of the group before are scaled.

constexpr const char* kInt8Tiles = "amx_int8";
// Rows from which this is used: counted, not measured. A group of 32 columns takes int8.inl 32
// products for each row, two of which begin in a cycle, and this 32 cycles of the unit for each 16
// rows, beside storing panel and sums. Both scale the sums in 5 instructions for 16 of them.
constexpr int64_t kAmxInt8 = 8;

inline bool amx_int8_takes(int64_t rows) {
  const Kernel asked = asked_kernel();
  return ((asked == Kernel::any && rows >= kAmxInt8) || asked == Kernel::amx) && rows > 0 &&
         has_feature(kInt8Tiles);
}

// Rows of x as bytes, for tile registers of `height` rows; row i of them is row m0 + i of x.
struct AmxBytes {
  const LinearArgs& a;
  int64_t m0, rows;
  int height;
  int64_t K;
  int group_shift;
  uint8_t* bytes;
  float* scale;  // times the table's step, [register][group][row]

  int64_t groups() const { return K >> group_shift; }
  int64_t registers() const { return ceil_div(rows, height); }
  int64_t height_of(int64_t tile) const { return min64(height, rows - tile * height); }
  uint8_t* bytes_of(int64_t tile, int64_t group) const {
    return bytes + (((tile * groups() + group) * height) << group_shift);
  }
  float* scale_of(int64_t tile, int64_t group) const {
    return scale + (tile * groups() + group) * height;
  }

  // Rounds columns [k0, k0 + n) of the rows of one register; n is at most kInt8Depth.
  void round_rows(int64_t tile, int64_t k0, int64_t n, float step) const {
    alignas(64) float values[kInt8Depth + kLanes];
    const int64_t size = int64_t{1} << group_shift;
    for (int64_t r = 0; r < height_of(tile); ++r) {
      load_row(values, a.x.data, a.x.dtype, (m0 + tile * height + r) * a.x.stride + k0, n);
      for (int64_t k = 0; k < n; k += size) {
        const int64_t group = (k0 + k) >> group_shift;
        int32_t bias;  // of an unsigned table
        Int8Rows::round_group(values + k, size, step,
                              reinterpret_cast<uint32_t*>(bytes_of(tile, group) + r * size), 1,
                              scale_of(tile, group)[r], bias);
      }
    }
  }
};

// c += the rows of register `tile`, and of the next one where Rows is 2, times the panel.
template <int Rows>
void amx_int8_multiply(const AmxBytes& x, int64_t tile, const Int8Panel& panel, float* c) {
  alignas(64) int32_t sums[2][Rows * kAmxRows * kMicroColumns];
  const int64_t first = panel.p0 >> x.group_shift, groups = panel.depth >> x.group_shift;
  const int64_t size = int64_t{1} << x.group_shift, row_bytes = kMicroColumns * sizeof(int32_t);
  const int block_shift = panel.chunks.w.block_shift - x.group_shift;
  const auto add = [&](int64_t g) {
    vf weight[kMicroVectors];
    for (int v = 0; v < kMicroVectors; ++v)  // missing columns take the scales of the first
      weight[v] = load(panel.scales + ((first + g) >> block_shift) * kLanes +
                       (v * kLanes < panel.count ? v : 0) * panel.scale_stride);
    for (int t = 0; t < Rows; ++t) {
      const float* scale = x.scale_of(tile + t, first + g);
      const int32_t* from = sums[g % 2] + t * kAmxRows * kMicroColumns;
      float* to = c + t * x.height * kStripWidth;
      const int64_t height = x.height_of(tile + t);
      for (int64_t i = 0; i < height; ++i, from += kMicroColumns, to += kStripWidth)
        for (int v = 0; v < kMicroVectors; ++v) {
          const vf sum = mul(to_float(loadi(from + v * kLanes)), set1(scale[i]));
          store(to + v * kLanes, fma(sum, weight[v], load(to + v * kLanes)));
        }
    }
  };
  in_memory(panel.quads);
  for (int64_t g = 0; g < groups; ++g) {
    const char* w = reinterpret_cast<const char*>(panel.quads) + g * (size / 4) * row_bytes;
    int32_t* to = sums[g % 2];
    _tile_zero(0);
    _tile_zero(1);
    _tile_loadd(4, x.bytes_of(tile, first + g), size);
    _tile_loadd(6, w, row_bytes);
    _tile_loadd(7, w + row_bytes / 2, row_bytes);
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    if constexpr (Rows == 2) {
      _tile_zero(2);
      _tile_zero(3);
      _tile_loadd(5, x.bytes_of(tile + 1, first + g), size);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    if (g > 0) add(g - 1);
    _tile_stored(0, to, row_bytes);
    _tile_stored(1, to + kLanes, row_bytes);
    if constexpr (Rows == 2) {
      _tile_stored(2, to + kAmxRows * kMicroColumns, row_bytes);
      _tile_stored(3, to + kAmxRows * kMicroColumns + kLanes, row_bytes);
    }
  }
  add(groups - 1);
}

// Computes the outputs of the rows of registers [begin, end) and of columns [j0, j0 + columns), at
// most kStripWidth.
inline void amx_int8_outputs(const LinearArgs& a, const Expansion* many, const AmxBytes& x, vi lut,
                             int64_t begin, int64_t end, int64_t j0, int64_t columns) {
  const Chunks chunks(*a.base.quantized);
  const int64_t i0 = begin * x.height, rows = min64(end * x.height, x.rows) - i0;
  float* c = static_cast<float*>(scratch(Buffer::accumulator, rows * kStripWidth * sizeof(float)));
  for (int64_t k = 0; k < rows * kStripWidth; k += kLanes) store(c + k, zero());
  add_adapters(a, many, x.m0 + i0, rows, j0, columns, c);
  const float* scales = load_lane_scales(chunks, j0, columns);
  uint32_t* quads = static_cast<uint32_t*>(scratch(Buffer::panel, kInt8Depth * kMicroColumns));
  const int64_t stride = chunks.blocks_per_row * kLanes;
  const auto panel_of = [&](int64_t j, int64_t p0) -> Int8Panel {
    const int64_t count = min64(kMicroColumns, columns - j), depth = min64(kInt8Depth, x.K - p0);
    return {chunks, j0 + j, count, p0, depth, quads, scales + j / kLanes * stride, stride};
  };
  const AmxRegisters registers(x.height, 1 << x.group_shift);
  for (int64_t p0 = 0; p0 < x.K; p0 += kInt8Depth)
    for (int64_t j = 0; j < columns; j += kMicroColumns) {
      const Int8Panel panel = panel_of(j, p0);
      panel.fill(lut, j + kMicroColumns < columns ? panel_of(j + kMicroColumns, p0)
                      : p0 + panel.depth < x.K    ? panel_of(0, p0 + panel.depth)
                                                  : panel_of(columns, 0));
      for (int64_t tile = begin; tile < end; tile += 2) {
        float* to = c + (tile - begin) * x.height * kStripWidth + j;
        if (tile + 1 < end)
          amx_int8_multiply<2>(x, tile, panel, to);
        else
          amx_int8_multiply<1>(x, tile, panel, to);
      }
    }
  store_outputs(a, x.m0 + i0, rows, j0, columns, c);
}

// Computes rows x.m0 .. x.m0 + x.rows of y.
inline void amx_int8_rows(const LinearArgs& a, const Expansion* many, const ByteTable& table,
                          const AmxBytes& x, const Parallel& pool) {
  uint8_t entry[16];
  for (int i = 0; i < 16; ++i) entry[i] = table.entry[i] ^ 0x80;
  const vi lut = make_byte_lut(entry);
  int8_passes(
      x.registers(), x.K, a.y.cols, pool,
      [&](int64_t tile, int64_t k0, int64_t n) { x.round_rows(tile, k0, n, table.step); },
      [&](int64_t first, int64_t last, int64_t j0, int64_t columns) {
        amx_int8_outputs(a, many, x, lut, first, last, j0, columns);
      });
}

inline void linear_int8_amx(const LinearArgs& a, const Expansion* many, const Parallel& pool) {
  const Weight4& w = *a.base.quantized;
  const int64_t M = a.x.rows, K = w.K, most = min64(kRows, kInt8Bytes / (K + 1) + kAmxRows);
  const int shift = w.block_shift < 6 ? w.block_shift : 6;
  const ByteTable table(w.code);
  const int64_t at_once = ceil_div(M, ceil_div(M, most)), groups = K >> shift;
  const int64_t padded = ceil_div(at_once, kAmxRows) * kAmxRows;
  uint8_t* bytes = static_cast<uint8_t*>(
      scratch(Buffer::shared, static_cast<size_t>(padded * (K + 4 * groups))));
  float* scale = reinterpret_cast<float*>(bytes + padded * K);
  for (int64_t m = 0; m < M; m += at_once) {
    const int64_t rows = min64(at_once, M - m);
    amx_int8_rows(a, many, table, {a, m, rows, amx_height(rows), K, shift, bytes, scale}, pool);
  }
}
