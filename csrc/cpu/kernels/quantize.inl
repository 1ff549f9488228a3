// Quantize, double-quantize and dequantize.

// Nearest entries of a sorted view of the 16 codes; a value on a midpoint takes the lower entry.
struct Nearest {
  vf middle;           // of the 15 midpoints
  Lut levels[3];       // the next levels of the binary search
  Lut nibbles;         // of the i-th smallest code, as bits
  bool sorted = true;  // nibbles[i] == i

  explicit Nearest(const float* code) {
    uint32_t nibble[16];
    for (uint32_t i = 0; i < 16; ++i) {  // stable insertion sort
      uint32_t j = i;
      for (; j > 0 && code[nibble[j - 1]] > code[i]; --j) nibble[j] = nibble[j - 1];
      nibble[j] = i;
    }
    float midpoints[15], bits[16];
    for (int i = 0; i < 15; ++i) {
      // Values are clamped to [-1, 1]. Moving midpoints from beyond does the same for all values.
      const float m = (code[nibble[i]] + code[nibble[i + 1]]) / 2;
      midpoints[i] = m >= 1.0f ? __builtin_inff() : m < -1.0f ? -__builtin_inff() : m;
    }
    middle = set1(midpoints[7]);
    for (int l = 0; l < 3; ++l) {
      float level[16] = {};
      for (int r = 0; r < 8; r += 4 >> l) level[r] = midpoints[2 * r + (4 >> l) - 1];
      levels[l] = make_lut(level);
    }
    for (uint32_t i = 0; i < 16; ++i) {
      bits[i] = float_of(nibble[i]);
      sorted = sorted && nibble[i] == i;
    }
    nibbles = make_lut(bits);
  }
  // r is half the rank before the last comparison.
  vi of(vf v) const {
    vi r = add_if_greater(set1i(0), v, middle, 4);
    r = add_if_greater(r, v, lut8(levels[0], r), 2);
    r = add_if_greater(r, v, lut8(levels[1], r), 1);
    r = add_if_greater(addi(r, r), v, lut8(levels[2], r), 1);
    return sorted ? r : as_bits(lut16(nibbles, r));
  }
};

// The largest magnitude of n values, whole vectors; as bits, so that a NaN or infinity wins.
inline float absmax_of(const float* values, int64_t n) {
  vi largest = set1i(0);
  for (int64_t i = 0; i < n; i += kLanes) largest = maxi(largest, abs_bits(load(values + i)));
  return float_of(hmax(largest));
}

inline float inverse_absmax(float absmax) { return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f); }

// One block of n values into n / 2 bytes; its absmax. at(i, even, odd): values i .. i + 2 kLanes,
// every other one. Magnitudes compare as bits, so that a NaN or infinity wins.
template <class At>
inline float quantize_block(const Nearest& nearest, const At& at, int64_t n, uint8_t* packed) {
  vf even, odd;
  vi largest = set1i(0);
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    at(i, even, odd);
    largest = maxi(largest, maxi(abs_bits(even), abs_bits(odd)));
  }
  const float absmax = float_of(hmax(largest));
  const vf inverse = set1(inverse_absmax(absmax));
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    at(i, even, odd);
    const vi high = nearest.of(mul(even, inverse)), low = nearest.of(mul(odd, inverse));
    store_bytes(packed + i / 2, addi(shl<4>(high), low));
  }
  return absmax;
}

constexpr int64_t kMaxBlock = 4096;
constexpr int64_t kBytesAhead = 2048;  // from a load of the dense weight to its prefetch

// 2 kLanes values of the dense weight, every other one.
struct LoadF32 {
  using T = float;
  void operator()(const T* p, vf& even, vf& odd) const {
    even_odd(load(p), load(p + kLanes), even, odd);
  }
};
struct LoadBf16 {
  using T = uint16_t;
  void operator()(const T* p, vf& even, vf& odd) const { load_bf16_pairs(p, even, odd); }
};
struct LoadF16 {
  using T = uint16_t;
  void operator()(const T* p, vf& even, vf& odd) const {
    even_odd(load_f16(p), load_f16(p + kLanes), even, odd);
  }
};

// Block b, which ends early.
inline void quantize_last_block(const QuantizeArgs& a, const Nearest& nearest, int64_t b) {
  const int64_t first = b * a.blocksize, n = a.numel - first;
  const int64_t whole = ceil_div(n, 2 * kLanes) * 2 * kLanes;  // the value after an odd end is zero
  float* padded = static_cast<float*>(scratch(Buffer::rows, kMaxBlock * sizeof(float)));
  uint8_t packed[kMaxBlock / 2];
  load_row(padded, a.weight, a.dtype, first, n);
  for (int64_t i = n; i < whole; ++i) padded[i] = 0.0f;
  const auto at = [&](int64_t i, vf& even, vf& odd) { LoadF32{}(padded + i, even, odd); };
  a.absmax[b] = quantize_block(nearest, at, whole, packed);
  __builtin_memcpy(a.packed + first / 2, packed, static_cast<size_t>(ceil_div(n, 2)));
}

template <class Load>
void quantize_blocks(const QuantizeArgs& a, const Load& load_as, int64_t begin, int64_t end) {
  using T = typename Load::T;
  const Nearest nearest(a.code);
  const T* weight = static_cast<const T*>(a.weight);
  const int64_t size = a.blocksize, whole = min64(end, a.numel / size);
  for (int64_t b = begin; b < whole; ++b) {
    const T* values = weight + b * size;  // size is a multiple of 32
    const char* ahead = reinterpret_cast<const char*>(values) + kBytesAhead;
    for (int64_t i = 0; i < size * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(ahead + i);
    const auto at = [&](int64_t i, vf& even, vf& odd) { load_as(values + i, even, odd); };
    a.absmax[b] = quantize_block(nearest, at, size, a.packed + b * size / 2);
  }
  if (whole < end) quantize_last_block(a, nearest, whole);
}

void quantize(const QuantizeArgs& a, const Parallel& pool) {
  parallel(pool, ceil_div(a.numel, a.blocksize), [&](int64_t begin, int64_t end) {
    if (a.dtype == DType::f32)
      quantize_blocks(a, LoadF32{}, begin, end);
    else if (a.dtype == DType::bf16)
      quantize_blocks(a, LoadBf16{}, begin, end);
    else
      quantize_blocks(a, LoadF16{}, begin, end);
  });
}

// Σ of n values in float64, as eight interleaved sums.
inline double sum_of(const float* values, int64_t n) {
  double sum[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < 8; ++j) sum[j] += static_cast<double>(values[i + j]);
  for (; i < n; ++i) sum[0] += static_cast<double>(values[i]);
  for (int j = 1; j < 8; ++j) sum[0] += sum[j];
  return sum[0];
}

// How many of 255 sorted midpoints lie below v: 16 at a time, first every sixteenth.
struct NestedNearest {
  float midpoints[256], coarse[16];  // the last one is beyond all values

  explicit NestedNearest(const float* code) {
    for (int i = 0; i < 255; ++i) midpoints[i] = (code[i] + code[i + 1]) / 2;
    midpoints[255] = __builtin_inff();
    for (int i = 0; i < 16; ++i) coarse[i] = midpoints[16 * i + 15];
  }
  int of(float v) const {
    const int row = count16(v, coarse);
    return 16 * row + count16(v, midpoints + 16 * row);
  }
  static int count16(float v, const float* thresholds) {
    int count = 0;
    for (int i = 0; i < 16; i += kLanes) count += count_greater(set1(v), load(thresholds + i));
    return count;
  }
};

// offset = mean(absmax), summed in float64; absmax - offset to the nearest of 256 sorted codes, in
// blocks of 256.
void double_quantize(const DoubleQuantizeArgs& a, const Parallel& pool) {
  const double sum = sum_of(a.absmax, a.blocks), blocks = static_cast<double>(a.blocks);
  const float offset = a.blocks ? static_cast<float>(sum / blocks) : 0.0f;
  *a.offset = offset;
  const NestedNearest nearest(a.nested_code);
  parallel(pool, ceil_div(a.blocks, kNestedBlock), [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kNestedBlock, n = min64(kNestedBlock, a.blocks - first);
      float values[kNestedBlock];
      for (int64_t i = 0; i < kNestedBlock; ++i)
        values[i] = i < n ? a.absmax[first + i] - offset : 0.0f;
      const float absmax = absmax_of(values, kNestedBlock), inverse = inverse_absmax(absmax);
      a.nested_absmax[b] = absmax;
      for (int64_t i = 0; i < n; ++i)
        a.quantized[first + i] = static_cast<uint8_t>(nearest.of(values[i] * inverse));
    }
  });
}

// Elements [first, first + n), whole blocks but the last, of a 16-bit type. A block has 16
// different values: they are rounded once, and looked up as they are.
inline void dequantize_halves(const DequantizeArgs& a, const Quantized& source, int64_t first,
                              int64_t n, const float* scales) {
  const Weight4& w = a.weight;
  const int64_t size = int64_t{1} << w.block_shift;
  uint16_t* out = static_cast<uint16_t*>(a.out) + first;
  for (int64_t i = 0; i < n; i += size) {
    const float scale = scales[i >> w.block_shift];
    float tail[32];
    uint16_t entries[16];
    for (int v = 0; v < 16; v += kLanes) {
      const vf value = mul(load(w.code + v), set1(scale));
      if (a.dtype == DType::bf16)
        store_bf16(entries + v, value);
      else
        store_f16(entries + v, value);
    }
    const HalfLut table = make_half_lut(entries);
    const int64_t end = min64(i + size, n);
    int64_t j = i;
    for (; j + 32 <= end; j += 32) lut_halves(table, w.packed + ((first + j) >> 1), out + j);
    if (j == end) continue;
    source.decode(first + j, first + end, scale, tail);
    store_row(out, a.dtype, j, tail, end - j);
  }
}

void dequantize(const DequantizeArgs& a, const Parallel& pool) {
  const Quantized source(a.weight);
  const Weight4& w = a.weight;
  const Scales all_scales(w);
  constexpr int64_t kSpan = 4096;  // elements at a time: whole blocks of every size
  const int64_t numel = w.N * w.K;
  parallel(pool, ceil_div(numel, kSpan), [&](int64_t begin, int64_t end) {
    float scales[kSpan / 32];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kSpan, n = min64(kSpan, numel - first),
                    size = int64_t{1} << w.block_shift;
      all_scales.read(scales, first >> w.block_shift, ceil_div(n, size));
      if (a.dtype != DType::f32) {
        dequantize_halves(a, source, first, n, scales);
        continue;
      }
      float* dst = static_cast<float*>(a.out) + first;
      for (int64_t i = 0; i < n; i += size)
        source.decode(first + i, first + min64(i + size, n), scales[i >> w.block_shift], dst + i);
    }
  });
}
