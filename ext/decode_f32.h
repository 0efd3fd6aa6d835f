// Stored codes -> floats, by whole vectors of the including file's type V. Format knowledge only; nothing here knows
// about products. Included inside an unnamed namespace by each float kernel file, after decode_scalar.h.
//   load_bf16, load_int8, load_int4, load_e4m3: kLanes stored numbers as floats, unscaled; of e4m3 their 256th part.
//   shift_left, shift_right (the sign's bit comes in), and_bits: of each 32-bit lane; ints_as_floats: their values.

// Of the numbers in each 32-bit lane number i, the lowest first; those of
//   bf16   as they are
//   int8   times 2^24
//   e4m3   times 2^-120, subnormals with them
//   int4   (code + 8) * 16^(i % 4)
inline V low_half(V words) { return shift_left(words, 16); }
inline V high_half(V words) { return and_bits(words, static_cast<int>(0xffff0000)); }
inline V int8_codes(V words, int i) {
  return ints_as_floats(and_bits(shift_left(words, 24 - 8 * i), static_cast<int>(0xff000000)));
}
inline V e4m3_codes(V words, int i) {
  return and_bits(shift_right(shift_left(words, 24 - 8 * i), 4), static_cast<int>(0x87f00000));
}
inline V int4_codes(V words, int i) {
  return ints_as_floats(and_bits(i < 4 ? words : shift_right(words, 16), 15 << i % 4 * 4));
}

// What a loaded code is multiplied by, beside its scale.
template <Format F>
constexpr float kCodeUnit = F == Format::kFp8Block || F == Format::kFp8Channel ? 256.0f : 1.0f;

template <Format F>
inline V load_code(const uint8_t* stored, int64_t col) {
  if constexpr (F == Format::kInt4Group32)
    return load_int4(stored + col / 2);
  else if constexpr (F == Format::kInt8Group128)
    return load_int8(stored + col);
  else
    return load_e4m3(stored + col);
}

// Weights [row, col .. col + 32) as floats, scale * code; zeros behind the row, or what stands behind its last code in
// a byte. col is a multiple of 32.
template <Format F>
inline void decode_32(const Matrix& w, int64_t row, int64_t col, V (&out)[32 / kLanes]) {
  const int64_t n = w.cols - col;
  if (n <= 0) {
    for (V& v : out) v = set1(0.0f);
    return;
  }
  const uint8_t* codes = byte_at(F, w, row, col);
  alignas(16) uint8_t last[32 * kBits[static_cast<int>(F)] / 8];
  if (n < 32) {
    __builtin_memset(last, 0, sizeof last);
    __builtin_memcpy(last, codes, static_cast<size_t>(bytes_of(F, n + (F == Format::kInt4Group32))));
    codes = last;
  }
  V scale;
  if constexpr (kScaleBlock[static_cast<int>(F)].bytes > 0) scale = set1(kCodeUnit<F> * scale_at(F, w, row, col));
#pragma GCC unroll 8
  for (int64_t i = 0; i < 32 / kLanes; ++i) {
    if constexpr (F == Format::kFp32)
      out[i] = load(reinterpret_cast<const float*>(codes) + i * kLanes);
    else if constexpr (F == Format::kBf16)
      out[i] = load_bf16(reinterpret_cast<const uint16_t*>(codes) + i * kLanes);
    else
      out[i] = mul(load_code<F>(codes, i * kLanes), scale);
  }
}
