// The stored formats, defined once in portable code: where a row lies, and any run of its weights as floats.
// Included inside an unnamed namespace by each file that decodes, so that no ISA shares its code.

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return value;
}

inline uint16_t float_to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(bits >> 16 | 0x40);  // a quiet NaN stays one
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);                   // round to nearest even
}

// Bytes of n weights of a row; whole rows of int4 end at a whole int32.
inline int64_t bytes_of(Format format, int64_t n) { return n * kBits[static_cast<int>(format)] / 8; }
inline int64_t row_bytes(Format format, int64_t cols) {
  return format == Format::kInt4Group32 ? (cols + 7) / 8 * 4 : bytes_of(format, cols);
}
inline const uint8_t* byte_at(Format format, const Matrix& w, int64_t row, int64_t col) {
  return w.data ? w.data + row * row_bytes(format, w.cols) + bytes_of(format, col) : nullptr;
}

inline int64_t scales_per_row(const ScaleBlock& block, int64_t cols) { return (cols + block.cols - 1) / block.cols; }
inline const uint8_t* scale_ptr(Format format, const Matrix& w, int64_t row, int64_t col) {
  const ScaleBlock& block = kScaleBlock[static_cast<int>(format)];
  return w.scales + (row / block.rows * scales_per_row(block, w.cols) + col / block.cols) * block.bytes;
}
inline float load_scale(Format format, const uint8_t* p) {
  if (kScaleBlock[static_cast<int>(format)].bytes == 2) {
    uint16_t bits;
    __builtin_memcpy(&bits, p, 2);
    return bf16_to_float(bits);
  }
  float scale;
  __builtin_memcpy(&scale, p, 4);
  return scale;
}
inline float scale_at(Format format, const Matrix& w, int64_t row, int64_t col) {
  return load_scale(format, scale_ptr(format, w, row, col));
}

// Sign, 4 bits of exponent with bias 7, 3 of mantissa; no infinities, and the code of all ones is NaN.
inline float e4m3_to_float(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  if ((code & 127) == 127) return __builtin_nanf("");
  float value;
  if (exponent) {
    const uint32_t bits = static_cast<uint32_t>(exponent + 120) << 23 | static_cast<uint32_t>(mantissa) << 20;
    __builtin_memcpy(&value, &bits, 4);
  } else {
    value = static_cast<float>(mantissa) * 0.001953125f;  // 2^-9
  }
  return code & 128 ? -value : value;
}

inline float code_at(Format format, const uint8_t* row, int64_t col) {
  if (format == Format::kInt4Group32) return static_cast<float>((row[col / 2] >> (col % 2 * 4) & 15) - 8);
  if (format == Format::kInt8Group128) return static_cast<float>(static_cast<int8_t>(row[col]));
  return e4m3_to_float(row[col]);
}

// Weights [row, col .. col + n) as floats.
[[maybe_unused]] void decode_row(Format format, const Matrix& w, int64_t row, int64_t col, int64_t n, float* out) {
  const uint8_t* const stored = byte_at(format, w, row, 0);
  switch (format) {
    case Format::kBf16:
      for (int64_t i = 0; i < n; ++i) out[i] = bf16_to_float(reinterpret_cast<const uint16_t*>(stored)[col + i]);
      return;
    case Format::kFp32:
      __builtin_memcpy(out, reinterpret_cast<const float*>(stored) + col, static_cast<size_t>(n) * 4);
      return;
    default:
      for (int64_t i = 0; i < n;) {
        const int64_t block = kScaleBlock[static_cast<int>(format)].cols;
        const int64_t end = (col + i) / block * block + block - col;  // of this scale
        const float scale = scale_at(format, w, row, col + i);
        for (; i < n && i < end; ++i) out[i] = bf16_to_float(float_to_bf16(scale * code_at(format, stored, col + i)));
      }
  }
}
