// The row sources that products read: rows of a 4-bit weight, of a dense matrix, and of one under
// dropout, as float32.

// -- scales of the 4-bit weight -------------------------------------------------------------------

inline float block_scale(const Weight4& w, int64_t block) {
  block += w.first_block;
  if (w.absmax) return w.absmax[block];
  return w.nested_code[w.absmax_u8[block]] * w.nested_absmax[block >> kNestedShift] +
         *w.nested_offset;
}

#ifndef LK_NUMBER_TABLE
// 256 numbers that bytes are looked up in. A vocabulary with something faster than gather has its
// own.
struct NumberTable {
  const float* numbers;

  explicit NumberTable(const float* table) : numbers(table) {}
  // dst[i] = the number of index[i], 0 <= i < n.
  void look_up(float* dst, const uint8_t* index, int64_t n) const {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store(dst + i, gather(numbers, load_u8(index + i)));
    for (; i < n; ++i) dst[i] = numbers[index[i]];
  }
};
#endif

// The scales of a weight's blocks.
struct Scales {
  const Weight4& w;
  NumberTable nested;

  explicit Scales(const Weight4& weight) : w(weight), nested(weight.nested_code) {}
  // dst[0, n) = the scales of blocks [first, first + n). Product and sum are rounded separately, as
  // stored ones were.
  void read(float* dst, int64_t first, int64_t n) const {
    if (w.absmax) return load_row(dst, w.absmax, DType::f32, w.first_block + first, n);
    if (n < kLanes) {
      for (int64_t i = 0; i < n; ++i) dst[i] = block_scale(w, first + i);
      return;
    }
    first += w.first_block;
    for (int64_t i = 0; i < n;) {
      // A run shares one nested absmax.
      const int64_t block = first + i;
      const int64_t run = min64(n - i, (((block >> kNestedShift) + 1) << kNestedShift) - block);
      float* to = dst + i;
      nested.look_up(to, w.absmax_u8 + block, run);
      const float absmax = w.nested_absmax[block >> kNestedShift], offset = *w.nested_offset;
      int64_t k = 0;
      for (; k + kLanes <= run; k += kLanes)
        store(to + k, add(mul(load(to + k), set1(absmax)), set1(offset)));
      for (; k < run; ++k) to[k] = to[k] * absmax + offset;
      i += run;
    }
  }
};

// -- row sources ----------------------------------------------------------------------------------
// row(r, begin, n, dst) writes columns [begin, begin + n) of stored row r as float32.

// Rows of a 4-bit weight, any shape: blocks may cross rows and a row may start in the middle of a
// byte.
struct Quantized {
  const Weight4& w;
  Lut lut;

  explicit Quantized(const Weight4& weight) : w(weight), lut(make_lut(weight.code)) {}
  void row(int64_t r, int64_t begin, int64_t n, float* dst) const {
    int64_t i = w.first + r * w.K + begin;
    const int64_t end = i + n;
    while (i < end) {
      const int64_t block = i >> w.block_shift;
      const int64_t block_end = min64(end, (block + 1) << w.block_shift);
      decode(i, block_end, block_scale(w, block), dst);
      dst += block_end - i;
      i = block_end;
    }
  }

  // Decodes elements [i, end), all of one block.
  void decode(int64_t i, int64_t end, float scale, float* dst) const {
    if (i & 1) {
      *dst++ = w.code[w.packed[i >> 1] & 15] * scale;
      ++i;
    }
    const vf scales = set1(scale);
    for (; i + kLanes <= end; i += kLanes, dst += kLanes)
      store(dst, mul(lut_nibbles(lut, w.packed + (i >> 1)), scales));
    for (; i < end; ++i) *dst++ = w.code[w.packed[i >> 1] >> (i & 1 ? 0 : 4) & 15] * scale;
  }
};

struct Dense {
  Matrix m;

  void row(int64_t r, int64_t begin, int64_t n, float* dst) const {
    load_row(dst, m.data, m.dtype, r * m.stride + begin, n);
  }
};

// Rows of x under dropout. With `order`, row r is row order[r] of x.
struct Dropped {
  Matrix m;
  const Dropout& dropout;
  const int32_t* order = nullptr;

  void row(int64_t r, int64_t begin, int64_t n, float* dst) const {
    const int64_t m_row = order ? order[r] : r;
    load_row(dst, m.data, m.dtype, m_row * m.stride + begin, n);
    apply_dropout(dropout, m_row, begin, n, dst);
  }
};
