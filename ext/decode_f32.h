// Stored rows -> floats, by whole vectors of the including file's type V. Format knowledge only; nothing here knows
// about products. Included inside an unnamed namespace by each float kernel file, after decode_scalar.h.
//   load_bf16, load_int8, load_int4, load_e4m3: kLanes stored numbers as floats, unscaled; of e4m3 their 256th part.
//   low_half, high_half: the two bf16 of each 32-bit lane as floats.

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

// 32 weights of a scaled format as floats, scale * code.
template <Format F>
inline void decode_codes(const uint8_t* codes, const uint8_t* scale, V (&out)[32 / kLanes]) {
  const V s = set1(kCodeUnit<F> * load_scale(F, scale));
#pragma GCC unroll 8
  for (int64_t i = 0; i < 32 / kLanes; ++i) out[i] = mul(load_code<F>(codes, i * kLanes), s);
}

// Weights [row, col .. col + n) as floats, scale * code; col is a multiple of 32. Fills `out` to whole 32, with zeros
// or with what stands behind the row's codes in its last byte.
template <Format F>
void decode(const Matrix& w, int64_t row, int64_t col, int64_t n, float* out) {
  const uint8_t* const stored = byte_at(F, w, row, col);
  if constexpr (F == Format::kFp32) {
    __builtin_memcpy(out, stored, static_cast<size_t>(n) * 4);
  } else if constexpr (F == Format::kBf16) {
    const uint16_t* const from = reinterpret_cast<const uint16_t*>(stored);
    for (int64_t i = 0; i < n; i += kLanes)
      store(out + i, n - i < kLanes ? load_bf16_n(from + i, n - i) : load_bf16(from + i));
  } else {
    constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
    const uint8_t* const scales = scale_ptr(F, w, row, col);
    uint8_t last[32] = {};
    V v[32 / kLanes];
    for (int64_t i = 0; i < n; i += 32) {
      const uint8_t* codes = stored + bytes_of(F, i);
      if (n - i < 32) {
        __builtin_memcpy(last, codes, static_cast<size_t>(bytes_of(F, n - i + (F == Format::kInt4Group32))));
        codes = last;
      }
      decode_codes<F>(codes, scales + (col % block.cols + i) / block.cols * block.bytes, v);
#pragma GCC unroll 8
      for (int64_t j = 0; j < 32 / kLanes; ++j) store(out + i + j * kLanes, v[j]);
    }
  }
}

// Weights [row, col .. col + 32) as floats, zeros behind the row; col is a multiple of 32.
template <Format F>
inline __attribute__((always_inline)) void decode_32(const Matrix& w, int64_t row, int64_t col, V (&out)[32 / kLanes]) {
  if (col + 32 > w.cols) {
    float some[32] = {};
    if (col < w.cols) decode<F>(w, row, col, w.cols - col, some);
    for (int64_t i = 0; i < 32 / kLanes; ++i) out[i] = load(some + i * kLanes);
    return;
  }
  const uint8_t* const stored = byte_at(F, w, row, col);
  if constexpr (kScaleBlock[static_cast<int>(F)].bytes > 0)
    return decode_codes<F>(stored, scale_ptr(F, w, row, col), out);
#pragma GCC unroll 8
  for (int64_t i = 0; i < 32 / kLanes; ++i) {
    if constexpr (F == Format::kFp32)
      out[i] = load(reinterpret_cast<const float*>(stored) + i * kLanes);
    else
      out[i] = load_bf16(reinterpret_cast<const uint16_t*>(stored) + i * kLanes);
  }
}
