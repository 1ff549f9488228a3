// What a linear layer adds to x Wᵀ, for pieces of y.

// c = what adapters add to the piece: those of `many` by row, or the one of a, scaling S Bᵀ, or
// none. c is zero before. All strips of a piece are filled at once: short runs of an adapter's
// pages are slow to come from memory.
inline void add_adapters(const LinearArgs& a, const Expansion* many, int64_t i0, int64_t rows,
                         int64_t j0, int64_t columns, float* c) {
  if (many) return many->rows(i0, rows, j0, columns, false, c);
  if (!a.lora.A.data) return;
  const int64_t R = a.lora.A.rows;
  const Operand<false> s{Matrix{a.s, DType::f32, a.x.rows, R, R}};
  accumulate<true>(s, Dense{a.lora.B}, i0, rows, j0, columns, R, c);
  for (int64_t k = 0; k < ceil_div(columns, kStripWidth) * rows * kStripWidth; k += kLanes)
    store(c + k, mul(load(c + k), set1(a.lora.scaling)));
}

// Adds a vector, if there is one, to every row of the piece.
inline void add_to_rows(const Vector& vector, int64_t rows, int64_t j0, int64_t columns, float* c) {
  if (!vector.data) return;
  for_strips(rows, columns, c, [&](int64_t j, int64_t width, float* strip) {
    float values[kStripWidth];
    load_row(values, vector.data, vector.dtype, j0 + j, width);
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t k = 0; k < width; ++k) strip[i * kStripWidth + k] += values[k];
  });
}

// y = c + bias, rounded once.
inline void store_outputs(const LinearArgs& a, int64_t i0, int64_t rows, int64_t j0,
                          int64_t columns, float* c) {
  add_to_rows(a.bias, rows, j0, columns, c);
  store_strips(a.y, i0, rows, j0, columns, c);
}
