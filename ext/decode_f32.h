// Stored rows -> floats, by whole vectors of the including file's type V. Format knowledge only; nothing here knows
// about products. Included inside an unnamed namespace by each float kernel file, after decode_scalar.h.
//   load_bf16, load_int8, load_int4, load_e4m3: kLanes stored numbers as floats, unscaled.
//   low_half, high_half: the two bf16 of each 32-bit lane as floats.

// Nearest bf16 of a finite number, ties to even, as a float.
inline V round_to_bf16(V v) { return high_half(add_bits(v, add_bits(bits_of(0x7fff), lowest_kept_bit(v)))); }

template <Format F>
inline V load_code(const uint8_t* stored, int64_t col) {
  if constexpr (F == Format::kInt4Group32) return load_int4(stored + col / 2);
  else if constexpr (F == Format::kInt8Group128) return load_int8(stored + col);
  else return load_e4m3(stored + col);
}

// Weights [row, col .. col + n) as floats; col is a multiple of 32.
template <Format F>
inline void decode(const Matrix& w, int64_t row, int64_t col, int64_t n, float* out) {
  const uint8_t* const stored = byte_at(F, w, row, 0);
  const int64_t whole = n / kLanes * kLanes;
  if constexpr (F == Format::kFp32) {
    __builtin_memcpy(out, reinterpret_cast<const float*>(stored) + col, static_cast<size_t>(n) * 4);
    return;
  } else if constexpr (F == Format::kBf16) {
    for (int64_t i = 0; i < whole; i += kLanes)
      store(out + i, load_bf16(reinterpret_cast<const uint16_t*>(stored) + col + i));
  } else {
    constexpr int64_t kGroup = kScaleBlock[static_cast<int>(F)].cols;
    for (int64_t i = 0; i < whole;) {
      const int64_t group_end = ((col + i) / kGroup + 1) * kGroup - col, end = group_end < whole ? group_end : whole;
      const V scale = set1(scale_at(F, w, row, col + i));
      for (; i < end; i += kLanes) store(out + i, round_to_bf16(mul(load_code<F>(stored, col + i), scale)));
    }
  }
  if (whole < n) decode_row(F, w, row, col + whole, n - whole, out + whole);
}
