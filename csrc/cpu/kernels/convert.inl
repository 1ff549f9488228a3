// Numbers of any dtype as float32 and back: the conversions at the edges of the kernels.

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
    for (; i + kLanes <= n; i += kLanes) store(dst + i, load(p + i));
  } else {
    const uint16_t* p = static_cast<const uint16_t*>(src) + offset;
    if (t == DType::bf16)
      for (; i + kLanes <= n; i += kLanes) store(dst + i, load_bf16(p + i));
    else
      for (; i + kLanes <= n; i += kLanes) store(dst + i, load_f16(p + i));
  }
  for (; i < n; ++i) dst[i] = load_one(src, t, offset + i);
}

// dst[offset, offset + n) = src[0, n), rounded once.
inline void store_row(void* dst, DType t, int64_t offset, const float* src, int64_t n) {
  int64_t i = 0;
  if (t == DType::f32) {
    float* p = static_cast<float*>(dst) + offset;
    for (; i + kLanes <= n; i += kLanes) store(p + i, load(src + i));
  } else {
    uint16_t* p = static_cast<uint16_t*>(dst) + offset;
    if (t == DType::bf16)
      for (; i + kLanes <= n; i += kLanes) store_bf16(p + i, load(src + i));
    else
      for (; i + kLanes <= n; i += kLanes) store_f16(p + i, load(src + i));
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
    for (; i + kLanes <= n; i += kLanes) store(p + i, fma(scales, load(src + i), load(p + i)));
  } else {
    uint16_t* p = static_cast<uint16_t*>(dst) + offset;
    if (t == DType::bf16)
      for (; i + kLanes <= n; i += kLanes)
        store_bf16(p + i, fma(scales, load(src + i), load_bf16(p + i)));
    else
      for (; i + kLanes <= n; i += kLanes)
        store_f16(p + i, fma(scales, load(src + i), load_f16(p + i)));
  }
  for (; i < n; ++i) store_one(dst, t, offset + i, load_one(dst, t, offset + i) + scale * src[i]);
}
