// The stored formats, defined once in portable code: any run of weights of one stored row as floats.
// Included inside an unnamed namespace by each file that decodes, so that no ISA shares its code.

float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

// Weights [row, col .. col + n) as floats.
void decode_row(Format format, const Matrix& w, int64_t row, int64_t col, int64_t n, float* out) {
  const int64_t at = row * w.cols + col;
  switch (format) {
    case Format::kBf16: {
      const uint16_t* p = reinterpret_cast<const uint16_t*>(w.data) + at;
      for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(p[i]);
      return;
    }
    case Format::kFp32:
      __builtin_memcpy(out, reinterpret_cast<const float*>(w.data) + at, static_cast<size_t>(n) * 4);
      return;
  }
}
