// Dropout by counter: Philox4x32-10 (Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy
// as 1, 2, 3; SC11).

constexpr int kPhiloxLanes = 16;

// Words of kPhiloxLanes consecutive counters (k4, row low, row high, 0), k4 = first, first + 1, ...
inline void philox(const Dropout& d, int64_t row, uint32_t first, uint32_t (*word)[kPhiloxLanes]) {
  uint32_t c0[kPhiloxLanes], c1[kPhiloxLanes], c2[kPhiloxLanes], c3[kPhiloxLanes];
  for (int i = 0; i < kPhiloxLanes; ++i) {
    c0[i] = first + static_cast<uint32_t>(i);
    c1[i] = static_cast<uint32_t>(row);
    c2[i] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(*d.seed), k1 = static_cast<uint32_t>(*d.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kPhiloxLanes; ++i) {
      const uint64_t p0 = uint64_t{c0[i]} * 0xD2511F53u, p1 = uint64_t{c2[i]} * 0xCD9E8D57u;
      const uint32_t n0 = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      const uint32_t n2 = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c1[i] = static_cast<uint32_t>(p1);
      c3[i] = static_cast<uint32_t>(p0);
      c0[i] = n0;
      c2[i] = n2;
    }
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  for (int i = 0; i < kPhiloxLanes; ++i) {
    word[0][i] = c0[i];
    word[1][i] = c1[i];
    word[2][i] = c2[i];
    word[3][i] = c3[i];
  }
}

// values[0, n) are columns [begin, begin + n) of a row: kept ones times scale, dropped ones zero.
// begin % 4 == 0.
inline void apply_dropout(const Dropout& d, int64_t row, int64_t begin, int64_t n, float* values) {
  if (d.threshold == 0) return;
  uint32_t word[4][kPhiloxLanes];
  for (int64_t k = 0; k < n; k += 4 * kPhiloxLanes) {
    philox(d, row, static_cast<uint32_t>((begin + k) / 4), word);
    const int64_t count = min64(n - k, 4 * kPhiloxLanes);
    for (int64_t i = 0; i < count; ++i) {
      const float keep = word[i & 3][i >> 2] >= d.threshold ? d.scale : 0.0f;
      values[k + i] = keep == 0.0f ? 0.0f : values[k + i] * keep;
    }
  }
}
