// Stored rows -> bf16 operands of AVX512-BF16 dot products. Format knowledge only; nothing here knows about products.
// Included inside an unnamed namespace by the AVX512-BF16 file.
//   along : the reduction runs along the stored row.    rows() in stored order; panel(): pairs along k, columns = stored rows.
//   across: the reduction runs across stored rows.      panel(): two stored rows interleaved, columns = stored columns.

inline __mmask32 first_halves(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

template <Format>
struct Decode;

template <>
struct Decode<Format::kBf16> {
  static constexpr int kBitsPerWeight = 16;
  static constexpr bool kInPlace = true;  // stored rows are operands already
  static const uint16_t* at(const Matrix& w, int64_t row, int64_t col) {
    return reinterpret_cast<const uint16_t*>(w.data) + row * w.cols + col;
  }
  // 32 weights of one row; those from n on are zero
  static inline __m512i load32(const Matrix& w, int64_t row, int64_t col, int64_t n) {
    return n >= 32 ? _mm512_loadu_si512(at(w, row, col)) : _mm512_maskz_loadu_epi16(first_halves(n), at(w, row, col));
  }
};

// Byte position of a weight, for prefetching.
template <Format F>
const uint8_t* byte_at(const Matrix& w, int64_t row, int64_t col) {
  return w.data ? w.data + (row * w.cols + col) * Decode<F>::kBitsPerWeight / 8 : nullptr;
}
template <Format F>
constexpr int64_t bytes_of(int64_t n) {
  return n * Decode<F>::kBitsPerWeight / 8;
}

// 16 stored rows (those from `last` on as zeros) x depth weights from k -> 16 columns of a panel [depth / 2][kLine][2];
// depth is rounded up to whole vectors of 32 with zeros.
template <Format F>
void along_panel(const Matrix& w, int64_t row, int64_t last, int64_t k, int64_t depth, uint16_t* panel) {
  for (int64_t i = 0; i < depth; i += 32) {
    __m512i r[16];
    for (int64_t j = 0; j < 16; ++j)
      r[j] = row + j < last ? Decode<F>::load32(w, row + j, k + i, depth - i) : _mm512_setzero_si512();
    transpose(r);
    for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(panel + (i / 2 + j) * kLine * 2, r[j]);
  }
}

// Rows [k, k + depth) x n columns from col -> panels [n / kLine][pairs][kLine][2], zeros beyond n columns and depth rows.
template <Format F>
void across_panel(const Matrix& w, int64_t k, int64_t depth, int64_t col, int64_t n, uint16_t* panel, int64_t pairs) {
  alignas(64) static const uint16_t kLow[32] = {0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                                8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i low = _mm512_load_si512(kLow), high = _mm512_add_epi16(low, _mm512_set1_epi16(16));
  constexpr int64_t kTogether = 16;  // pairs of rows per visit of a column line: bounds the DRAM pages open at once
  for (int64_t p = 0; p < pairs; p += kTogether)
    for (int64_t c = 0; c < n; c += kLine) {
      uint16_t* out = panel + (c * pairs + p * kLine) * 2;
      for (int64_t q = p; q < pairs && q < p + kTogether; ++q, out += kLine * 2)
        for (int64_t h = 0; h < kLine; h += 32) {
          const int64_t row = k + 2 * q;
          const __m512i a = 2 * q < depth ? Decode<F>::load32(w, row, col + c + h, n - c - h) : _mm512_setzero_si512();
          const __m512i b = 2 * q + 1 < depth ? Decode<F>::load32(w, row + 1, col + c + h, n - c - h) : _mm512_setzero_si512();
          _mm512_store_si512(out + h * 2, _mm512_permutex2var_epi16(a, low, b));
          _mm512_store_si512(out + h * 2 + 32, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}
