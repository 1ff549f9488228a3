// Chunks of a 4-bit weight whose blocks fit its rows, and the panels of gemm.inl, which are filled
// from them without a detour.
//
// A chunk is one vector load of packed bytes: 8 kLanes weights of one row. Dword lane j holds
// weights 8j
// .. 8j+7, and byte b of a dword holds weight 2b in its high nibble, so one right shift of all
// lanes brings weight 8j + s to the low nibble of lane j.

constexpr int kChunk = 8 * kLanes;
static_assert(kDepth % kChunk == 0, "a panel holds whole chunks");

// Calls f(Constant<S>{}) for the weights S = 0..7 of a dword.
template <class F>
inline void for_nibbles(const F& f) {
  f(Constant<0>{});
  f(Constant<1>{});
  f(Constant<2>{});
  f(Constant<3>{});
  f(Constant<4>{});
  f(Constant<5>{});
  f(Constant<6>{});
  f(Constant<7>{});
}

// Walks chunks of rows of the weight: scales per lane, packed dwords.
struct Chunks {
  const Weight4& w;
  Scales scales;
  int64_t blocks_per_row;
  vi scale_lane;  // lane j of a chunk takes the scale this many blocks after the chunk's first

  explicit Chunks(const Weight4& weight)
      : w(weight), scales(weight), blocks_per_row(weight.K >> weight.block_shift) {
    uint32_t lane[kLanes];
    for (int j = 0; j < kLanes; ++j) lane[j] = static_cast<uint32_t>(8 * j) >> w.block_shift;
    scale_lane = loadi(lane);
  }
  // Floats that the scales of chunks [begin, end) of a row may take, with room for vector loads.
  static int64_t scales_size(const Weight4& w) { return (w.K >> w.block_shift) + 2 * kLanes; }

  int64_t first_block(int64_t k) const { return k >> w.block_shift; }
  void load_row_scales(float* dst, int64_t n, int64_t first, int64_t count) const {
    scales.read(dst, n * blocks_per_row + first, count);
  }
  // A hint only: may name a row beyond the last. Hardware prefetchers stop at pages, which rows of
  // codes soon reach.
  void prefetch(int64_t n, int64_t k) const { __builtin_prefetch(w.packed + ((n * w.K + k) >> 1)); }
  // Asks for the bytes of rows n .. n + kLanes.
  void prefetch_rows(int64_t n, int64_t k) const {
    const uint8_t* p = w.packed + ((n * w.K + k) >> 1);
    for (int64_t l = 0; l < kLanes; ++l, p += w.K >> 1) __builtin_prefetch(p);
  }
  void prefetch_scales(int64_t n, int64_t first, int64_t count) const {
    const int64_t block = w.first_block + n * blocks_per_row + first, size = w.absmax ? 4 : 1;
    const char* p = w.absmax ? reinterpret_cast<const char*>(w.absmax)
                             : reinterpret_cast<const char*>(w.absmax_u8);
    for (int64_t byte = 0; byte < count * size; byte += 64)
      __builtin_prefetch(p + block * size + byte);
  }
  vi packed(int64_t n, int64_t k) const {
    const uint8_t* p = w.packed + ((n * w.K + k) >> 1);
    const int64_t dwords = (w.K - k) >> 3;
    return dwords >= kLanes ? loadi(p) : loadi_partial(p, static_cast<int>(dwords));
  }
};

// Packed dwords of a chunk of rows n .. n + count: lane l of dwords[d] is weights k + 8d .. of row
// n + l. A missing row repeats the last one.
inline void load_chunk(const Chunks& chunks, int64_t n, int64_t count, int64_t k,
                       vf (&dwords)[kLanes]) {
  const int64_t row_bytes = chunks.w.K >> 1;
  if (count >= kLanes && chunks.w.K - k >= kChunk) {
    const uint8_t* p = chunks.w.packed + n * row_bytes + (k >> 1);
    for (int64_t l = 0; l < kLanes; ++l, p += row_bytes) dwords[l] = as_float(loadi(p));
  } else {
    for (int64_t l = 0; l < kLanes; ++l)
      dwords[l] = as_float(chunks.packed(n + min64(l, count - 1), k));
  }
  transpose(dwords);
}

// The scales of rows [n0, n0 + count) as lanes, [group][block][lane]: group g is the kLanes rows
// from n0 + g kLanes on, and a missing row repeats the last one. They lie in scratch memory, until
// this function is called again.
inline float* load_lane_scales(const Chunks& chunks, int64_t n0, int64_t count) {
  const int64_t blocks = chunks.blocks_per_row, groups = ceil_div(count, kLanes);
  const int64_t stride = Chunks::scales_size(chunks.w);
  float* scales = static_cast<float*>(
      scratch(Buffer::scales, (groups * blocks + stride) * kLanes * sizeof(float)));
  float *to = scales, *by_row = scales + groups * blocks * kLanes;
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t l = 0; l < kLanes; ++l)
      chunks.load_row_scales(by_row + l * stride, n0 + min64(g * kLanes + l, count - 1), 0, blocks);
    for (int64_t b = 0; b < blocks; b += kLanes) {
      vf lanes[kLanes];
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] = load(by_row + l * stride + b);
      transpose(lanes);
      for (int64_t q = 0; q < min64(kLanes, blocks - b); ++q, to += kLanes) store(to, lanes[q]);
    }
  }
  return scales;
}

// Rows [n0, n0 + count) of the weight as lanes, in groups, with their scales for all k.
struct LaneRows {
  const Chunks& chunks;
  const Lut& lut;
  int64_t n0, count;
  const float* scales;  // of load_lane_scales

  LaneRows(const Chunks& walk, const Lut& table, int64_t first, int64_t rows)
      : chunks(walk),
        lut(table),
        n0(first),
        count(rows),
        scales(load_lane_scales(chunks, n0, count)) {}
  const float* scale(int64_t g, int64_t k) const {
    return scales + (g * chunks.blocks_per_row + chunks.first_block(k)) * kLanes;
  }
  // codes[d * kLanes + l] = packed dword d of row l of the group, from column k0 on.
  void load_codes(int64_t g, int64_t k0, int64_t depth, uint32_t* codes) const {
    const int64_t n = n0 + g * kLanes, left = count - g * kLanes;
    for (int64_t k = 0; k < depth; k += kChunk) {
      vf dwords[kLanes];
      load_chunk(chunks, n, left, k0 + k, dwords);
      const int64_t present = min64(kLanes, (depth - k) / 8);
      for (int64_t d = 0; d < present; ++d)
        storei(codes + (k / 8 + d) * kLanes, as_bits(dwords[d]));
    }
  }
};

// This overload for the rows that the source holds transposes packed dwords before it decodes them,
// which takes an eighth of the shuffles.
inline void fill_transposed(const LaneRows& source, int64_t j0, int64_t columns, int64_t p0,
                            int64_t depth, float* panel) {
  uint32_t codes[kDepth / 8 * kLanes];
  const Lut lut = source.lut;
  for (int64_t j = 0; j < columns; j += kLanes) {
    const int64_t g = (j0 - source.n0 + j) / kLanes;
    source.load_codes(g, p0, depth, codes);
    for (int64_t d = 0; d < depth / 8; ++d) {
      const NibbleWeights weights(lut, loadi(codes + d * kLanes));
      // Two lines of each of the next panel's rows.
      source.chunks.prefetch(j0 + kMicroColumns + j + d / 2, p0 + d % 2 * 128);
      const vf scale = load(source.scale(g, p0 + 8 * d));
      float* out = panel + 8 * d * kMicroColumns + j;
      for_nibbles([&](auto s) {
        constexpr int S = decltype(s)::value;
        store(out + S * kMicroColumns, mul(weights.template weight<S>(lut), scale));
      });
    }
  }
}

// Columns [j0, j0 + columns) of all rows of the weight, with their scales for kDepth rows at a
// time.
struct ColumnStrip {
  const Weight4& w;
  Scales all_scales;
  const Lut& lut;
  int64_t j0, columns, first_block, blocks, stride;  // blocks of these columns in each row
  float* scales;                                     // [row][stride]

  ColumnStrip(const Weight4& weight, const Lut& table, int64_t first, int64_t count)
      : w(weight),
        all_scales(weight),
        lut(table),
        j0(first),
        columns(count),
        first_block(first >> w.block_shift) {
    blocks = ((j0 + columns - 1) >> w.block_shift) + 1 - first_block;
    stride = ceil_div(blocks, kLanes) * kLanes;
    scales = static_cast<float*>(scratch(Buffer::scales, kDepth * stride * sizeof(float)));
  }
  const uint8_t* packed(int64_t row, int64_t j) const { return w.packed + ((row * w.K + j) >> 1); }
  void load_row_scales(int64_t p0, int64_t depth) const {
    for (int64_t p = 0; p < depth; ++p)
      all_scales.read(scales + p * stride, (p0 + p) * (w.K >> w.block_shift) + first_block, blocks);
  }
};

// This overload decodes straight into the panel. A block holds all columns of a panel. All panels
// of the strip share the work of asking for its next rows, whole runs at a time.
inline void fill_natural(const ColumnStrip& source, int64_t j0, int64_t columns, int64_t p0,
                         int64_t depth, float* panel) {
  if (j0 == source.j0) source.load_row_scales(p0, depth);
  const Lut lut = source.lut;
  const int64_t row_bytes = source.w.K >> 1, vectors = columns / kLanes;  // K is a multiple of 32
  const int64_t panels = ceil_div(source.columns, kMicroColumns),
                lines = ceil_div(source.columns, 128);
  const uint8_t* packed = source.packed(p0, j0);
  const float* scales = source.scales + (j0 >> source.w.block_shift) - source.first_block;
  // The lines of the next kDepth rows that this panel asks for begin here.
  int64_t line = (j0 - source.j0) / kMicroColumns * (kDepth * lines) / panels;
  const uint8_t* next = source.packed(p0 + kDepth + line / lines, source.j0);
  line %= lines;
  for (int64_t p = 0; p < depth; ++p, packed += row_bytes) {
    if (p % (128 / kMicroColumns) == 0) {
      __builtin_prefetch(next + line * 64, 0, 2);
      if (++line == lines) {
        line = 0;
        next += row_bytes;
      }
    }
    const vf scale = set1(scales[p * source.stride]);
    for (int64_t v = 0; v < vectors; ++v)
      store(panel + p * kMicroColumns + v * kLanes,
            mul(lut_nibbles(lut, packed + v * (kLanes / 2)), scale));
  }
}
