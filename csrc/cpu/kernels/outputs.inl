// What a linear layer adds to x Wᵀ, in pieces of y: tiles of several panels, one after the other.

// c += scaling S Bᵀ of the adapter of a, if any; c is zero.
inline void add_adapter(const LinearArgs& a, int64_t i0, int64_t rows, int64_t j0, int64_t columns,
                        float* c) {
  if (!a.lora.A.data) return;
  const int64_t R = a.lora.A.rows;
  const Operand<false> s{Matrix{a.s, DType::f32, a.x.rows, R, R}};
  accumulate<true>(s, Dense{a.lora.B}, i0, rows, j0, columns, R, c);
  for (int64_t k = 0; k < ceil_div(columns, kWidth) * rows * kWidth; k += W)
    store(c + k, mul(load(c + k), set1(a.lora.scaling)));
}

// y = c + bias, rounded once.
inline void store_outputs(const LinearArgs& a, int64_t i0, int64_t rows, int64_t j0,
                          int64_t columns, float* c) {
  if (a.bias.data)
    for_panels(rows, columns, c, [&](int64_t j, int64_t width, float* tile) {
      float bias[kWidth];
      load_row(bias, a.bias.data, a.bias.dtype, j0 + j, width);
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t k = 0; k < width; ++k) tile[i * kWidth + k] += bias[k];
    });
  store_tiles(a.y, i0, rows, j0, columns, c);
}
