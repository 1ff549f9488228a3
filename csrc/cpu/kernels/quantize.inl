// Quantize, double-quantize and dequantize.

// Nearest entries of a sorted view of the 16 codes; a value on a midpoint takes the lower entry.
struct Nearest {
  Lut midpoints;       // entry 15 unused
  uint8_t nibble[16];  // of the i-th smallest code

  explicit Nearest(const float* code) {
    for (int i = 0; i < 16; ++i) {  // stable insertion sort
      int j = i;
      for (; j > 0 && code[nibble[j - 1]] > code[i]; --j) nibble[j] = nibble[j - 1];
      nibble[j] = static_cast<uint8_t>(i);
    }
    float between[16] = {};
    for (int i = 0; i < 15; ++i) between[i] = (code[nibble[i]] + code[nibble[i + 1]]) / 2;
    midpoints = make_lut(between);
  }
  // How many midpoints lie below each value: binary search by table lookups.
  vi rank(vf v) const {
    vi r = set1i(0);
    for (uint32_t step = 8; step; step /= 2)
      r = add_if_greater(r, v, lut16(midpoints, addi(r, set1i(step - 1))), step);
    return r;
  }
};

// The largest magnitude of values[0, n); as bits, so that a NaN or infinity wins. values is padded
// with zeros to W.
inline float absmax_of(const float* values, int64_t n) {
  vi largest = set1i(0);
  for (int64_t i = 0; i < n; i += W) largest = maxi(largest, abs_bits(load(values + i)));
  uint32_t lane[W], best = 0;
  storei(lane, largest);
  for (int i = 0; i < W; ++i) best = lane[i] > best ? lane[i] : best;
  return float_of(best);
}

inline float inverse_absmax(float absmax) { return 1.0f / (absmax > 1e-38f ? absmax : 1e-38f); }

void quantize(const QuantizeArgs& a, const Parallel& pool) {
  const Nearest nearest(a.code);
  const int64_t blocks = ceil_div(a.numel, a.blocksize);
  parallel(pool, blocks, [&](int64_t begin, int64_t end) {
    constexpr int64_t kMaxBlock = 4096;
    float* values = static_cast<float*>(scratch(Slot::rows, (kMaxBlock + W) * sizeof(float)));
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * a.blocksize, n = min64(a.blocksize, a.numel - first);
      load_row(values, a.weight, a.dtype, first, n);
      for (int64_t i = n; i < n + W; ++i) values[i] = 0.0f;
      const float absmax = absmax_of(values, n);
      a.absmax[b] = absmax;
      const vf inverse = set1(inverse_absmax(absmax));
      uint8_t* out = a.packed + first / 2;  // blocksize is even
      for (int64_t i = 0; i < n; i += W) {
        uint32_t rank[W];
        storei(rank, nearest.rank(clamp1(mul(load(values + i), inverse))));
        for (int64_t j = 0; j < W && i + j < n; j += 2)  // the value after an odd end is zero
          out[(i + j) / 2] =
              static_cast<uint8_t>(nearest.nibble[rank[j]] << 4 | nearest.nibble[rank[j + 1]]);
      }
    }
  });
}

// offset = mean(absmax), summed in float64; absmax - offset to the nearest of 256 sorted codes, in
// blocks of 256.
void double_quantize(const DoubleQuantizeArgs& a, const Parallel& pool) {
  double sum = 0.0;
  for (int64_t i = 0; i < a.blocks; ++i) sum += static_cast<double>(a.absmax[i]);
  const float offset = a.blocks ? static_cast<float>(sum / static_cast<double>(a.blocks)) : 0.0f;
  *a.offset = offset;
  parallel(pool, ceil_div(a.blocks, kNestedBlock), [&](int64_t begin, int64_t end) {
    float midpoint[255], values[kNestedBlock + W];
    for (int i = 0; i < 255; ++i) midpoint[i] = (a.nested_code[i] + a.nested_code[i + 1]) / 2;
    for (int64_t b = begin; b < end; ++b) {
      const int64_t first = b * kNestedBlock, n = min64(kNestedBlock, a.blocks - first);
      for (int64_t i = 0; i < n + W; ++i) values[i] = i < n ? a.absmax[first + i] - offset : 0.0f;
      const float absmax = absmax_of(values, n), inverse = inverse_absmax(absmax);
      a.nested_absmax[b] = absmax;
      for (int64_t i = 0; i < n; ++i) {
        const float v = values[i] * inverse;
        int below = 0;
        for (int step = 128; step; step /= 2)
          if (v > midpoint[below + step - 1]) below += step;
        a.quantized[first + i] = static_cast<uint8_t>(below);
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
