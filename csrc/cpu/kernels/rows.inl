// Rows as float32: conversions at the edges of the kernels, and the row sources that panels are
// filled from. Included once per instruction set, inside its anonymous namespace, after a
// vocabulary of simd/.

inline float load_one(const void* p, DType t, int64_t i) {
  switch (t) {
    case DType::f32:
      return static_cast<const float*>(p)[i];
    case DType::bf16:
      return float_from_bf16(static_cast<const uint16_t*>(p)[i]);
    default:
      return float_from_f16(static_cast<const uint16_t*>(p)[i]);
  }
}

inline void store_one(void* p, DType t, int64_t i, float v) {
  switch (t) {
    case DType::f32:
      static_cast<float*>(p)[i] = v;
      return;
    case DType::bf16:
      static_cast<uint16_t*>(p)[i] = bf16_from_float(v);
      return;
    default:
      static_cast<uint16_t*>(p)[i] = f16_from_float(v);
  }
}

// dst[0, n) = src[offset, offset + n) as float32.
inline void load_row(float* dst, const void* src, DType t, int64_t offset, int64_t n) {
  int64_t i = 0;
  if (t == DType::f32) {
    const float* p = static_cast<const float*>(src) + offset;
    for (; i + W <= n; i += W) store(dst + i, load(p + i));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(src) + offset;
    if (t == DType::bf16)
      for (; i + W <= n; i += W) store(dst + i, load_bf16(p + i));
    else
      for (; i + W <= n; i += W) store(dst + i, load_f16(p + i));
  }
  for (; i < n; ++i) dst[i] = load_one(src, t, offset + i);
}

// dst[offset, offset + n) = src[0, n), rounded once.
inline void store_row(void* dst, DType t, int64_t offset, const float* src, int64_t n) {
  int64_t i = 0;
  if (t == DType::f32) {
    float* p = static_cast<float*>(dst) + offset;
    for (; i + W <= n; i += W) store(p + i, load(src + i));
  } else {
    uint16_t* p = static_cast<uint16_t*>(dst) + offset;
    if (t == DType::bf16)
      for (; i + W <= n; i += W) store_bf16(p + i, load(src + i));
    else
      for (; i + W <= n; i += W) store_f16(p + i, load(src + i));
  }
  for (; i < n; ++i) store_one(dst, t, offset + i, src[i]);
}

// dst[offset, offset + n) += scale * src[0, n), rounded once.
inline void add_to_row(void* dst, DType t, int64_t offset, float scale, const float* src,
                       int64_t n) {
  int64_t i = 0;
  const vf scales = set1(scale);
  if (t == DType::f32) {
    float* p = static_cast<float*>(dst) + offset;
    for (; i + W <= n; i += W) store(p + i, fma(scales, load(src + i), load(p + i)));
  } else {
    uint16_t* p = static_cast<uint16_t*>(dst) + offset;
    if (t == DType::bf16)
      for (; i + W <= n; i += W) store_bf16(p + i, fma(scales, load(src + i), load_bf16(p + i)));
    else
      for (; i + W <= n; i += W) store_f16(p + i, fma(scales, load(src + i), load_f16(p + i)));
  }
  for (; i < n; ++i) store_one(dst, t, offset + i, load_one(dst, t, offset + i) + scale * src[i]);
}

// -- scales of the 4-bit weight -------------------------------------------------------------------

inline float block_scale(const Weight4& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  return w.nested_code[w.absmax_u8[block]] * w.nested_absmax[block >> kNestedShift] +
         *w.nested_offset;
}

// dst[0, n) = the scales of blocks [first, first + n). Product and sum are rounded separately, as
// stored ones were.
inline void load_scales(float* dst, const Weight4& w, int64_t first, int64_t n) {
  if (w.absmax) return load_row(dst, w.absmax, DType::f32, first, n);
  int64_t i = 0;
  while (i < n) {
    // A run shares one nested absmax.
    const int64_t run_end = min64(n, ((((first + i) >> kNestedShift) + 1) << kNestedShift) - first);
    const vf nested = set1(w.nested_absmax[(first + i) >> kNestedShift]),
             offset = set1(*w.nested_offset);
    for (; i + W <= run_end; i += W)
      store(dst + i,
            add(mul(gather(w.nested_code, load_u8(w.absmax_u8 + first + i)), nested), offset));
    for (; i < run_end; ++i) dst[i] = block_scale(w, first + i);
  }
}

// -- row sources ----------------------------------------------------------------------------------
// row(r, begin, n, dst) writes columns [begin, begin + n) of stored row r as float32.

// Rows of a 4-bit weight, any shape: blocks may cross rows and a row may start in the middle of a
// byte.
struct Quantized {
  const Weight4& w;
  Lut lut;

  explicit Quantized(const Weight4& weight) : w(weight), lut(make_lut(weight.code)) {}
  void row(int64_t r, int64_t begin, int64_t n, float* dst) const {
    int64_t i = r * w.K + begin;
    const int64_t end = i + n;
    while (i < end) {
      const int64_t block = i >> w.block_shift;
      const int64_t block_end = min64(end, (block + 1) << w.block_shift);
      decode(i, block_end, block_scale(w, block), dst);
      dst += block_end - i;
      i = block_end;
    }
  }

  // Elements [i, end), all of one block.
  void decode(int64_t i, int64_t end, float scale, float* dst) const {
    if (i & 1) {
      *dst++ = w.code[w.packed[i >> 1] & 15] * scale;
      ++i;
    }
    const vf scales = set1(scale);
    for (; i + W <= end; i += W, dst += W)
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
