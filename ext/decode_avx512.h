// Stored rows -> bf16 operands of AVX-512 products. Format knowledge only; nothing here knows about products.
// Included inside an unnamed namespace by the files that multiply in bf16, after simd_avx512.h and prefetch.h.

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

// n bytes, up to 64, and zeros.
inline __m512i load_bytes(const uint8_t* p, int64_t n) {
  return n >= 64 ? _mm512_loadu_si512(p) : _mm512_maskz_loadu_epi8(n > 0 ? ~uint64_t{0} >> (64 - n) : 0, p);
}

alignas(64) const uint16_t kZeroTo31[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                            16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
inline __m512i word(int value) { return _mm512_set1_epi16(static_cast<int16_t>(value)); }

// A bf16 as floats in all lanes.
inline __m512 broadcast_bf16(const uint8_t* p) {
  int16_t bits;
  __builtin_memcpy(&bits, p, 2);
  return _mm512_castsi512_ps(_mm512_maskz_set1_epi16(0xaaaaaaaa, bits));
}

// 64 weights in stored order.
struct Weights {
  __m512i low, high;
};

// Formats in which every stored row has scales of its own, bf16, for groups of its columns.
template <Format F>
constexpr bool kRowScales = kScaleBlock[static_cast<int>(F)].rows == 1 && kScaleBlock[static_cast<int>(F)].bytes == 2;

// How a format is decoded:
//   kInPlace      stored rows are operands already
//   kBlockRows    consecutive rows, from a multiple of it on, that share what scale() returns
//   kTableBytes   room per 128 x 128 weights for what prepare() computes once and scale() looks up
//   scale(w, tables, row, col)   what load() needs for columns [col, col + 128), col a multiple of 128
//   load(scale, p, c, n)         weights [col + c .. col + c + 64) of a row whose column `col` is at p, c 0 or 64;
//                                from n on they are finite
template <Format F>
struct Decode;
constexpr int64_t kBlock = 128;  // columns that scale() covers

template <>
struct Decode<Format::kBf16> {
  static constexpr bool kInPlace = true;
  static constexpr int64_t kBlockRows = kBlock, kTableBytes = 0;
  struct Scale {};
  static inline Scale scale(const Matrix&, const std::byte*, int64_t, int64_t) { return {}; }
  static inline Weights load(const Scale&, const uint8_t* p, int64_t c, int64_t n) {
    return {load_bytes(p + 2 * c, 2 * n), load_bytes(p + 2 * c + 64, 2 * n - 64)};
  }
};

// An e4m3 code moved into the bits of a half is the same number times 2^-8, subnormals included; the scale makes up for
// it.
template <Format F>
struct DecodeFp8 {
  static constexpr bool kInPlace = false;
  static constexpr int64_t kBlockRows = F == Format::kFp8Block ? kBlock : 1, kTableBytes = 0;
  using Scale = __m512;
  static inline Scale scale(const Matrix& w, const std::byte*, int64_t row, int64_t col) {
    return _mm512_set1_ps(scale_at(F, w, row, col) * 256.0f);
  }
  static inline Weights load(const Scale& scale, const uint8_t* p, int64_t c, int64_t n) {
    const __m512i codes = load_bytes(p + c, n);
    return {widen(scale, _mm512_castsi512_si256(codes)), widen(scale, _mm512_extracti64x4_epi64(codes, 1))};
  }
  // The halves of 16 codes, as words: what widen() does with 32, at 512 bits a twelfth slower for so few.
  static inline __m256i halves(__m256i words) {
    const __m256i codes = _mm256_slli_epi16(words, 8);
    const __m256i half = _mm256_ternarylogic_epi32(codes, _mm256_srli_epi16(codes, 1),
                                                   _mm256_set1_epi16(static_cast<short>(0x8000)), 0xE4);
    return _mm256_and_si256(half, _mm256_set1_epi16(static_cast<short>(0xbfff)));
  }

 private:
  static inline __m512i widen(__m512 scale, __m256i bytes) {
    const __m512i codes = _mm512_slli_epi16(_mm512_cvtepu8_epi16(bytes), 8);
    const __m512i sign = _mm512_set1_epi16(static_cast<short>(0x8000));
    const __m512i half = _mm512_ternarylogic_epi32(codes, _mm512_srli_epi16(codes, 1), sign,
                                                   0xE4);  // sign bit of codes, the rest shifted
    const __m512i finite = _mm512_and_si512(half, _mm512_set1_epi16(static_cast<short>(0xbfff)));
    const __m512 low = _mm512_cvtph_ps(_mm512_castsi512_si256(finite)),
                 high = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(finite, 1));
    return round_bf16(_mm512_mul_ps(low, scale), _mm512_mul_ps(high, scale));
  }
};
template <>
struct Decode<Format::kFp8Channel> : DecodeFp8<Format::kFp8Channel> {};

#if defined(__AVX512VBMI__)
// The 128 magnitudes of a block, as bf16(scale * e4m3), are a table of low and one of high bytes: two look-ups for 64
// weights. Without scales they are those of the codes.
template <>
struct Decode<Format::kFp8Block> {
  static constexpr bool kInPlace = false;
  static constexpr int64_t kBlockRows = kBlock, kTableBytes = 256;
  struct Scale {
    __m512i low[2], high[2];
  };
  static inline Scale scale(const Matrix&, const std::byte* table, int64_t, int64_t) {
    const auto line = [&](int64_t i) { return _mm512_load_si512(table + 64 * i); };
    return {{line(0), line(1)}, {line(2), line(3)}};
  }
  static inline Weights load(const Scale& scale, const uint8_t* p, int64_t c, int64_t n) {
    // Unpacking takes the low half of each 128-bit lane, then the high half.
    const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i codes = _mm512_permutexvar_epi64(order, load_bytes(p + c, n));
    const __m512i low = _mm512_permutex2var_epi8(scale.low[0], codes, scale.low[1]);
    const __m512i magnitude = _mm512_permutex2var_epi8(scale.high[0], codes, scale.high[1]);
    const __m512i high = _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi8(static_cast<char>(0x80)),
                                                   0x78);  // magnitude ^ (codes & sign)
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }
  static inline void prepare(const Matrix& w, int64_t row, int64_t col, std::byte* table) {
    const __m512 scale = _mm512_set1_ps((w.scales ? scale_at(Format::kFp8Block, w, row, col) : 1.0f) * 256.0f);
    const __m512i steps = _mm512_load_si512(kZeroTo31);
    const __m512i even = _mm512_add_epi16(_mm512_mullo_epi16(steps, word(0x0404)), word(0x0200)),  // bytes 0, 2, 4 ..
        odd = _mm512_or_si512(even, word(0x0101));
    for (int half = 0; half < 2; ++half) {
      __m512i words[2];
      for (int i = 0; i < 2; ++i) {
        const __m512i bits = _mm512_slli_epi16(_mm512_add_epi16(steps, word(64 * half + 32 * i)), 7);  // see DecodeFp8
        words[i] = round_bf16(_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(bits)), scale),
                              _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1)), scale));
      }
      _mm512_store_si512(table + 64 * half, _mm512_permutex2var_epi8(words[0], even, words[1]));
      _mm512_store_si512(table + 128 + 64 * half, _mm512_permutex2var_epi8(words[0], odd, words[1]));
    }
  }
};
#else
template <>
struct Decode<Format::kFp8Block> : DecodeFp8<Format::kFp8Block> {};
#endif

template <>
struct Decode<Format::kInt8Group128> {
  static constexpr bool kInPlace = false;
  static constexpr int64_t kBlockRows = 1, kTableBytes = 0;
  using Scale = __m512;
  static inline Scale scale(const Matrix& w, const std::byte*, int64_t row, int64_t col) {
    return broadcast_bf16(scale_ptr(Format::kInt8Group128, w, row, col));
  }
  static inline Weights load(const Scale& scale, const uint8_t* p, int64_t c, int64_t n) {
    const auto weights = [&](int64_t i) {
      const __m128i codes = n >= 64 ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + c + 16 * i))
                                    : _mm512_castsi512_si128(load_bytes(p + c + 16 * i, n - 16 * i));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes)), scale);
    };
    return {round_bf16(weights(0), weights(1)), round_bf16(weights(2), weights(3))};
  }
};

// The 16 possible weights of a group are a table; those of two neighbouring groups share one look-up.
template <>
struct Decode<Format::kInt4Group32> {
  static constexpr bool kInPlace = false;
  static constexpr int64_t kBlockRows = 1, kTableBytes = 0;
  using Scale = const uint8_t*;
  static inline Scale scale(const Matrix& w, const std::byte*, int64_t row, int64_t col) {
    return scale_ptr(Format::kInt4Group32, w, row, col);
  }
  static inline Weights load(const Scale& scales, const uint8_t* p, int64_t c, int64_t n) {
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const uint8_t *const first = scales + c / 16, *const second = n > 32 ? first + 2 : first;
    const __m512i table =
        round_bf16(_mm512_mul_ps(codes, broadcast_bf16(first)), _mm512_mul_ps(codes, broadcast_bf16(second)));
    // Four bytes of the first group and four of the second in each 128-bit lane, because unpacking works by lanes.
    const __m512i order = _mm512_add_epi16(_mm512_and_si512(_mm512_load_si512(kZeroTo31), word(3)), lanes_and_groups());
    const __m512i bytes = spread(order, p + c / 2, n);
    const __m512i group = _mm512_slli_epi16(_mm512_and_si512(_mm512_load_si512(kZeroTo31), word(4)), 2);
    const __m512i even = _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(bytes, word(15), group, 0xEA),
                                                  table);  // (bytes & 15) | group
    const __m512i odd = _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi16(bytes, 4), group), table);
    return {_mm512_unpacklo_epi16(even, odd), _mm512_unpackhi_epi16(even, odd)};
  }

 private:
  // 4 times the lane, and 16 more in the upper half of each lane.
  static inline __m512i lanes_and_groups() {
    const __m512i steps = _mm512_load_si512(kZeroTo31);
    return _mm512_or_si512(_mm512_srli_epi16(_mm512_and_si512(steps, word(24)), 1),
                           _mm512_slli_epi16(_mm512_and_si512(steps, word(4)), 2));
  }
  // Bytes `order` of those of n nibbles at p, as words.
  static inline __m512i spread(__m512i order, const uint8_t* p, int64_t n) {
    const __m256i bytes = n >= 64 ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))
                                  : _mm256_maskz_loadu_epi8(first_halves((n + 1) / 2), p);
#if defined(__AVX512VBMI__)
    return _mm512_maskz_permutexvar_epi8(0x5555555555555555, order, _mm512_castsi256_si512(bytes));
#else
    return _mm512_permutexvar_epi16(order, _mm512_cvtepu8_epi16(bytes));
#endif
  }
};

// The scales of `cols` columns from (row, col) on, to be asked for row by row.
template <Format F>
inline ScaleRun scales_of(const Matrix& w, int64_t row, int64_t col, int64_t cols) {
  constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
  if (block.bytes == 0 || cols <= 0 || !w.scales) return {};
  const int64_t wide = (col + cols - 1) / block.cols - col / block.cols + 1;
  return {scale_ptr(F, w, row, col), block.rows == 1 ? scales_per_row(block, w.cols) * block.bytes : 0,
          wide * block.bytes};
}

// What prepare() made for a region of a matrix that starts at multiples of 128 rows and columns or lies within such a
// block; an empty one, which may lie beyond the matrix, has none.
template <Format F>
class Tables {
 public:
  Tables(const Matrix& w, int64_t row, int64_t rows, int64_t col, int64_t cols, std::byte* room)
      : room_(room), row_(row / kBlock), col_(col / kBlock), wide_((col + cols - 1) / kBlock - col_ + 1) {
    if (rows <= 0 || cols <= 0) return;
    if constexpr (Decode<F>::kTableBytes != 0)
      for (int64_t r = row_; r * kBlock < row + rows; ++r)
        for (int64_t c = col_; c * kBlock < col + cols; ++c) Decode<F>::prepare(w, r * kBlock, c * kBlock, at(r, c));
  }
  typename Decode<F>::Scale scale(const Matrix& w, int64_t row, int64_t col) const {
    return Decode<F>::scale(w, at(row / kBlock, col / kBlock), row, col);
  }
  const std::byte* at_block(int64_t row, int64_t col) const { return at(row / kBlock, col / kBlock); }

 private:
  std::byte* at(int64_t r, int64_t c) const { return room_ + ((r - row_) * wide_ + c - col_) * Decode<F>::kTableBytes; }
  std::byte* const room_;
  const int64_t row_, col_, wide_;
};

// Rows [row, row + rows) x columns [k, k + depth) -> out [rows][stride], k a multiple of 128; up to the next multiple
// of 64 columns are written, those from depth on are finite. Not inlined: among a product's loops INT8 took half again
// as long.
template <Format F>
__attribute__((noinline)) void decode_rows(const Matrix& w, const Tables<F>& tables, int64_t row, int64_t rows,
                                           int64_t k, int64_t depth, uint16_t* out, int64_t stride, Prefetch& cursor) {
  Prefetch prefetch = cursor;
  const int64_t row_size = row_bytes(F, w.cols);
  for (int64_t i = 0; i < depth; i += kBlock) {
    const uint8_t* p = byte_at(F, w, row, k + i);
    for (int64_t r = 0; r < rows; ++r, p += row_size) {
      prefetch.tick();
      const auto scale = tables.scale(w, row + r, k + i);
      const auto store = [&](int64_t c, int64_t n) {
        const Weights weights = Decode<F>::load(scale, p, c, n);
        _mm512_storeu_si512(out + r * stride + i + c, weights.low);
        _mm512_storeu_si512(out + r * stride + i + c + 32, weights.high);
      };
      if (depth - i >= kBlock) {
        store(0, 64);
        store(64, 64);
      } else {
        for (int64_t c = 0; c < depth - i; c += 64) store(c, depth - i - c);
      }
    }
  }
  cursor = prefetch;
}
inline int64_t decode_ticks(int64_t rows, int64_t depth) { return rows * ((depth + kBlock - 1) / kBlock); }

#define KJAX_FORMATS(f)                                                                                     \
  {f<Format::kBf16>,        nullptr, f<Format::kFp8Block>, f<Format::kFp8Channel>, f<Format::kInt4Group32>, \
   f<Format::kInt8Group128>}
