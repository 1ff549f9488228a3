// Quantize, double-quantize and dequantize.

// Nearest entries of a sorted view of the 16 codes; a value on a midpoint takes the lower entry.
// Binary search over the 15 midpoints: level l compares with the midpoint that its l bits so far
// name, so each level is a table of its own.
struct Nearest {
  static constexpr int kLevels = 4;
  Lut levels[kLevels];  // of 1, 2, 4, 8 midpoints
  Lut nibbles;          // of the i-th smallest code, as bits
  bool sorted = true;   // nibbles[i] == i

  explicit Nearest(const float* code) {
    uint32_t nibble[16];
    for (uint32_t i = 0; i < 16; ++i) {  // stable insertion sort
      uint32_t j = i;
      for (; j > 0 && code[nibble[j - 1]] > code[i]; --j) nibble[j] = nibble[j - 1];
      nibble[j] = i;
    }
    for (int l = 0; l < kLevels; ++l) {
      float midpoints[16] = {};
      for (int i = 0; i < 1 << l; ++i) {
        const int below = (2 * i + 1) * (8 >> l);  // codes below the midpoint
        midpoints[i] = (code[nibble[below - 1]] + code[nibble[below]]) / 2;
      }
      levels[l] = make_lut(midpoints);
    }
    float bits[16];
    for (uint32_t i = 0; i < 16; ++i) {
      bits[i] = float_of(nibble[i]);
      sorted = sorted && nibble[i] == i;
    }
    nibbles = make_lut(bits);
  }
  vi of(vf v) const {
    vi r = set1i(0);
    for (int l = 0; l < kLevels; ++l) r = add_if_greater(addi(r, r), v, lut8(levels[l], r), 1);
    return sorted ? r : as_bits(lut16(nibbles, r));
  }
};

inline float inverse_absmax(float absmax) { return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f); }

// The largest magnitude of n values, whole vectors at(i); as bits, so that a NaN or infinity wins.
template <class At>
inline float absmax_of(const At& at, int64_t n) {
  vi largest = set1i(0);
  for (int64_t i = 0; i < n; i += W) largest = maxi(largest, abs_bits(at(i)));
  return float_of(hmax(largest));
}

// One block of n values, whole vectors at(i), into n / 2 bytes; its absmax.
template <class At>
inline float quantize_block(const Nearest& nearest, const At& at, int64_t n, uint8_t* packed) {
  const float absmax = absmax_of(at, n);
  const vf inverse = set1(inverse_absmax(absmax));
  for (int64_t i = 0; i < n; i += W)
    store_nibbles(packed + i / 2, nearest.of(clamp1(mul(at(i), inverse))));
  return absmax;
}

constexpr int64_t kMaxBlock = 4096;
constexpr int64_t kBytesAhead = 2048;  // from a load of the dense weight to its prefetch

// W values of the dense weight.
struct LoadF32 {
  using T = float;
  vf operator()(const T* p) const { return load(p); }
};
struct LoadBf16 {
  using T = uint16_t;
  vf operator()(const T* p) const { return load_bf16(p); }
};
struct LoadF16 {
  using T = uint16_t;
  vf operator()(const T* p) const { return load_f16(p); }
};

template <class Load>
void quantize_blocks(const QuantizeArgs& a, const Load& load_as, int64_t begin, int64_t end) {
  using T = typename Load::T;
  const Nearest nearest(a.code);
  const T* weight = static_cast<const T*>(a.weight);
  for (int64_t b = begin; b < end; ++b) {
    const int64_t first = b * a.blocksize, n = min64(a.blocksize, a.numel - first);
    const T* values = weight + first;
    uint8_t* out = a.packed + first / 2;  // blocksize is even
    if (n == a.blocksize) {               // a multiple of 32
      const char* next = reinterpret_cast<const char*>(values) + kBytesAhead;
      for (int64_t i = 0; i < n * int64_t{sizeof(T)}; i += 64) __builtin_prefetch(next + i);
      a.absmax[b] = quantize_block(nearest, [&](int64_t i) { return load_as(values + i); }, n, out);
      continue;
    }
    float* padded = static_cast<float*>(scratch(Slot::rows, kMaxBlock * sizeof(float)));
    uint8_t nibbles[kMaxBlock / 2];
    load_row(padded, a.weight, a.dtype, first, n);
    const int64_t whole = ceil_div(n, W) * W;  // the value after an odd end is zero
    for (int64_t i = n; i < whole; ++i) padded[i] = 0.0f;
    a.absmax[b] =
        quantize_block(nearest, [&](int64_t i) { return load(padded + i); }, whole, nibbles);
    __builtin_memcpy(out, nibbles, static_cast<size_t>(ceil_div(n, 2)));
  }
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

// offset = mean(absmax), summed in float64; absmax - offset to the nearest of 256 sorted codes, in
// blocks of 256.
void double_quantize(const DoubleQuantizeArgs& a, const Parallel& pool) {
  const float offset =
      a.blocks ? static_cast<float>(sum_of(a.absmax, a.blocks) / static_cast<double>(a.blocks))
               : 0.0f;
  *a.offset = offset;
  parallel(pool, ceil_div(a.blocks, kNestedBlock), [&](int64_t begin, int64_t end) {
    float midpoint[255], values[kNestedBlock];
    for (int i = 0; i < 255; ++i) midpoint[i] = (a.nested_code[i] + a.nested_code[i + 1]) / 2;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kNestedBlock, n = min64(kNestedBlock, a.blocks - first);
      for (int64_t i = 0; i < kNestedBlock; ++i)
        values[i] = i < n ? a.absmax[first + i] - offset : 0.0f;
      const float absmax = absmax_of([&](int64_t i) { return load(values + i); }, kNestedBlock);
      const vf inverse = set1(inverse_absmax(absmax));
      a.nested_absmax[b] = absmax;
      for (int64_t i = 0; i < n; i += W) {
        const vf v = mul(load(values + i), inverse);
        vi below = set1i(0);
        for (uint32_t step = 128; step; step /= 2)
          below = add_if_greater(below, v, gather(midpoint, addi(below, set1i(step - 1))), step);
        uint32_t code[W];
        storei(code, below);
        for (int64_t j = 0; j < min64(W, n - i); ++j)
          a.quantized[first + i + j] = static_cast<uint8_t>(code[j]);
      }
    }
  });
}

void dequantize(const DequantizeArgs& a, const Parallel& pool) {
  const Quantized source(a.weight);
  const Weight4& w = a.weight;
  constexpr int64_t kSpan = 4096;  // elements at a time: whole blocks of every size
  const int64_t numel = w.N * w.K;
  parallel(pool, ceil_div(numel, kSpan), [&](int64_t begin, int64_t end) {
    float* values = static_cast<float*>(scratch(Slot::rows, kSpan * sizeof(float)));
    float scales[kSpan / 32];
    for (int64_t t = begin; t < end; ++t) {
      const int64_t first = t * kSpan, n = min64(kSpan, numel - first),
                    size = int64_t{1} << w.block_shift;
      float* dst = a.dtype == DType::f32 ? static_cast<float*>(a.out) + first : values;
      load_scales(scales, w, first >> w.block_shift, ceil_div(n, size));
      for (int64_t i = 0; i < n; i += size)
        source.decode(first + i, first + min64(i + size, n), scales[i >> w.block_shift], dst + i);
      if (dst == values) store_row(a.out, a.dtype, first, values, n);
    }
  });
}
