// Stored rows -> bf16 operands of AVX512-BF16 dot products. Format knowledge only; nothing here knows about products.
// Included inside an unnamed namespace by the AVX512-BF16 file.
//   along : the reduction runs along the stored row.    rows() in stored order; panel(): pairs along k, columns =
//   stored rows. across: the reduction runs across stored rows.      panel(): two stored rows interleaved, columns =
//   stored columns.

#include "decode_scalar.h"

inline __mmask32 first_halves(int64_t n) { return n >= 32 ? ~0u : n <= 0 ? 0u : (1u << n) - 1; }

// Two halves of 16 floats, rounded to bf16.
inline __m512i round_bf16(__m512 low, __m512 high) {
#if defined(__AVX512BF16__)
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
#else
  return _mm512_inserti64x4(_mm512_castsi256_si512(narrow_bf16({low})), narrow_bf16({high}), 1);
#endif
}
inline __m256i load_bytes(const uint8_t* p, int64_t n) {
  return n >= 32 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                 : _mm256_maskz_loadu_epi8(first_halves(n), p);
}

// load32: weights [row, col .. col + 32) as bf16, col a multiple of 32; those from n on are zero.
template <Format F>
struct Decode;

template <>
struct Decode<Format::kBf16> {
  static constexpr bool kInPlace = true;  // stored rows are operands already
  static inline __m512i load32(const Matrix& w, int64_t row, int64_t col, int64_t n) {
    const uint8_t* p = byte_at(Format::kBf16, w, row, col);
    return n >= 32 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi16(first_halves(n), p);
  }
};

// An e4m3 code moved into the bits of a half is the same number times 2^-8, subnormals included; the scale makes up for
// it.
template <Format F>
struct DecodeFp8 {
  static constexpr bool kInPlace = false;
  static inline __m512i load32(const Matrix& w, int64_t row, int64_t col, int64_t n) {
    const __m512i codes = _mm512_slli_epi16(_mm512_cvtepu8_epi16(load_bytes(byte_at(F, w, row, col), n)), 8);
    const __m512i sign = _mm512_set1_epi16(static_cast<short>(0x8000));
    const __m512i half = _mm512_ternarylogic_epi32(codes, _mm512_srli_epi16(codes, 1), sign,
                                                   0xE4);  // sign bit of codes, the rest shifted
    const __m512i finite = _mm512_and_si512(half, _mm512_set1_epi16(static_cast<short>(0xbfff)));
    const __m512 scale = _mm512_set1_ps(scale_at(F, w, row, col) * 256.0f);
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(finite)),
                 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(finite, 1));
    return round_bf16(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
  }
};
template <>
struct Decode<Format::kFp8Block> : DecodeFp8<Format::kFp8Block> {};
template <>
struct Decode<Format::kFp8Channel> : DecodeFp8<Format::kFp8Channel> {};

template <>
struct Decode<Format::kInt8Group128> {
  static constexpr bool kInPlace = false;
  static inline __m512i load32(const Matrix& w, int64_t row, int64_t col, int64_t n) {
    const __m256i codes = load_bytes(byte_at(Format::kInt8Group128, w, row, col), n);
    const __m512 scale = _mm512_set1_ps(scale_at(Format::kInt8Group128, w, row, col));
    const __m512i low = _mm512_cvtepi8_epi32(_mm256_castsi256_si128(codes)),
                  high = _mm512_cvtepi8_epi32(_mm256_extracti128_si256(codes, 1));
    return round_bf16(_mm512_mul_ps(_mm512_cvtepi32_ps(low), scale), _mm512_mul_ps(_mm512_cvtepi32_ps(high), scale));
  }
};

// The 16 possible weights of a group make a table; its copy in the upper half lets a look-up ignore the bit above the
// nibble.
template <>
struct Decode<Format::kInt4Group32> {
  static constexpr bool kInPlace = false;
  static inline __m512i load32(const Matrix& w, int64_t row, int64_t col, int64_t n) {
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512 values = _mm512_mul_ps(codes, _mm512_set1_ps(scale_at(Format::kInt4Group32, w, row, col)));
    const uint8_t* p = byte_at(Format::kInt4Group32, w, row, col);
    const __m128i packed = n >= 32 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p))
                                   : _mm_maskz_loadu_epi8(first_lanes(n > 0 ? (n + 1) / 2 : 0), p);
    const __m512i bytes = _mm512_cvtepu8_epi32(packed);
    const __m512i nibbles =
        _mm512_or_si512(bytes, _mm512_slli_epi32(bytes, 12));  // low nibble in the low word, high in the high
    return _mm512_maskz_permutexvar_epi16(first_halves(n), nibbles, round_bf16(values, values));
  }
};

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

// Rows [k, k + depth) x n columns from col -> panels [n / kLine][pairs][kLine][2], zeros beyond n columns and depth
// rows.
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
          const __m512i b =
              2 * q + 1 < depth ? Decode<F>::load32(w, row + 1, col + c + h, n - c - h) : _mm512_setzero_si512();
          _mm512_store_si512(out + h * 2, _mm512_permutex2var_epi16(a, low, b));
          _mm512_store_si512(out + h * 2 + 32, _mm512_permutex2var_epi16(a, high, b));
        }
    }
}

#define KJAX_FORMATS(f)                                                                                     \
  {f<Format::kBf16>,        nullptr, f<Format::kFp8Block>, f<Format::kFp8Channel>, f<Format::kInt4Group32>, \
   f<Format::kInt8Group128>}
