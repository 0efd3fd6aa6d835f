// Two stored rows -> bf16 pairs in registers, the operands of products across stored rows, with few instructions and
// none, but for scales, that takes the ports of the dot products.
// Included inside an unnamed namespace after decode_avx512.h.

// Codes by a table of the low and the high bytes of the 128 magnitudes, signs in the high ones.
struct LowHigh {
  __m512i low, high;
};
inline __attribute__((always_inline)) LowHigh by_table(__m512i codes, const std::byte* table) {
  const auto line = [&](int64_t i) { return _mm512_load_si512(table + 64 * i); };
  const __m512i low = _mm512_permutex2var_epi8(line(0), codes, line(1));
  __m512i magnitude = _mm512_permutex2var_epi8(line(2), codes, line(3));
  static const uint32_t kSigns = 0x80808080;
#if defined(KJAX_EMULATED)
  return {low, _mm512_ternarylogic_epi32(magnitude, codes, _mm512_set1_epi32(static_cast<int>(kSigns)), 0x78)};
#else  // magnitude ^ (codes & sign), said in assembly, as compilers keep the signs in a register that sums need
  __asm__("vpternlogd $0x78, %2%{1to16%}, %1, %0" : "+v"(magnitude) : "v"(codes), "m"(kSigns));
  return {low, magnitude};
#endif
}

// bf16 of two vectors of floats, interleaved: a in the even words.
inline __attribute__((always_inline)) __m512i round_pairs(__m512 a, __m512 b, __m512i order) {
  return _mm512_permutexvar_epi16(order, round_bf16(a, b));
}
struct PairOrder {
  alignas(64) uint16_t words[32];
  constexpr PairOrder() : words() {
    for (int i = 0; i < 32; ++i) words[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  }
};
constexpr PairOrder kPairOrder{};

// How two stored rows of 32 columns become two vectors of pairs, whose columns come in the order that costs least:
//   pairs(a, b, half, table, a_scale, b_scale, out)   `half` of the line of 64 columns at a and b
template <Format F>
struct AcrossPairs;

template <>
struct AcrossPairs<Format::kBf16> {
  static inline __attribute__((always_inline)) void pairs(const uint8_t* a, const uint8_t* b, int64_t half,
                                                          const std::byte*, const uint8_t*, const uint8_t*,
                                                          __m512i (&out)[2]) {
    const __m512i x = _mm512_loadu_si512(a + 64 * half), y = _mm512_loadu_si512(b + 64 * half);
    out[0] = _mm512_unpacklo_epi16(x, y);
    out[1] = _mm512_unpackhi_epi16(x, y);
  }
};
template <>
struct AcrossPairs<Format::kFp8Block> {
  static inline __attribute__((always_inline)) void pairs(const uint8_t* a, const uint8_t* b, int64_t half,
                                                          const std::byte* table, const uint8_t*, const uint8_t*,
                                                          __m512i (&out)[2]) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    const LowHigh v = by_table(half ? _mm512_unpackhi_epi8(x, y) : _mm512_unpacklo_epi8(x, y), table);
    out[0] = _mm512_unpacklo_epi8(v.low, v.high);
    out[1] = _mm512_unpackhi_epi8(v.low, v.high);
  }
};
// 32 columns of two stored rows, 16 floats at a time: floats(p) of codes at p, times the scales of the rows.
template <class Floats>
inline __attribute__((always_inline)) void scaled_pairs(const uint8_t* a, const uint8_t* b, __m512 a_scale,
                                                        __m512 b_scale, Floats floats, __m512i (&out)[2]) {
  const __m512i order = _mm512_load_si512(kPairOrder.words);
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    out[i] = round_pairs(_mm512_mul_ps(floats(a + 16 * i), a_scale), _mm512_mul_ps(floats(b + 16 * i), b_scale), order);
}
template <>
struct AcrossPairs<Format::kInt8Group128> {
  static inline __attribute__((always_inline)) void pairs(const uint8_t* a, const uint8_t* b, int64_t half,
                                                          const std::byte*, const uint8_t* a_scale,
                                                          const uint8_t* b_scale, __m512i (&out)[2]) {
    scaled_pairs(
        a + 32 * half, b + 32 * half, broadcast_bf16(a_scale), broadcast_bf16(b_scale),
        [](const uint8_t* p) __attribute__((always_inline)) {
          const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
          return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
        },
        out);
  }
};
template <>
struct AcrossPairs<Format::kFp8Channel> {
  static inline __attribute__((always_inline)) void pairs(const uint8_t* a, const uint8_t* b, int64_t half,
                                                          const std::byte*, const uint8_t* a_scale,
                                                          const uint8_t* b_scale, __m512i (&out)[2]) {
    const auto scale = [](const uint8_t* p) __attribute__((always_inline)) {
      float of_row;
      __builtin_memcpy(&of_row, p, 4);
      return _mm512_scalef_ps(_mm512_set1_ps(of_row), _mm512_set1_ps(8));  // see DecodeFp8
    };
    scaled_pairs(
        a + 32 * half, b + 32 * half, scale(a_scale), scale(b_scale),
        [](const uint8_t* p) __attribute__((always_inline)) {
          return _mm512_cvtph_ps(DecodeFp8<Format::kFp8Channel>::halves(
              _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))));
        },
        out);
  }
};
// The 16 possible weights of both rows' groups are one table; even columns, then odd ones.
template <>
struct AcrossPairs<Format::kInt4Group32> {
  static inline __attribute__((always_inline)) void pairs(const uint8_t* a, const uint8_t* b, int64_t half,
                                                          const std::byte* constants, const uint8_t* a_scale,
                                                          const uint8_t* b_scale, __m512i (&out)[2]) {
    const auto line = [&](int64_t i) { return _mm512_load_si512(constants + 64 * i); };
    const __m512i nibble = word(15), row = _mm512_set1_epi32(16 << 16);
    const auto at = [&](const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * half)); };
    const __m512 codes = _mm512_load_ps(constants);
    const auto scale = [&](const uint8_t* p) {  // of two that lie side by side
      int both;
      __builtin_memcpy(&both, p, 4);
      const __m512i v = _mm512_set1_epi32(both);
      return _mm512_castsi512_ps(half ? _mm512_and_si512(v, _mm512_set1_epi32(static_cast<int>(0xffff0000)))
                                      : _mm512_slli_epi32(v, 16));
    };
    const __m512i table = round_bf16(_mm512_mul_ps(codes, scale(a_scale)), _mm512_mul_ps(codes, scale(b_scale)));
    const __m512i bytes = _mm512_castsi256_si512(_mm256_inserti128_si256(_mm256_castsi128_si256(at(a)), at(b), 1));
    const __m512i words = _mm512_permutexvar_epi8(line(1), bytes);
    const auto look_up = [&](__m512i v) {
      return _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(v, nibble, row, 0xEA), table);  // (v & 15) | row
    };
    out[0] = look_up(words);
    out[1] = look_up(_mm512_srli_epi16(words, 4));
  }
};

struct Int4Constants {
  alignas(64) float codes[16];
  alignas(64) uint8_t bytes[64];
  constexpr Int4Constants() : codes(), bytes() {
    for (int i = 0; i < 16; ++i) codes[i] = static_cast<float>(i - 8);
    for (int i = 0; i < 64; ++i) bytes[i] = static_cast<uint8_t>(i / 4 + i % 4 / 2 * 16);
  }
};
constexpr Int4Constants kInt4Constants{};

// C of a line of 64 columns between the order of columns and that of AcrossPairs.
template <Format F>
inline void order_line(float* c, bool back) {
  if constexpr (F == Format::kInt8Group128 || F == Format::kFp8Channel) return;
  __m512 v[4];
  for (int i = 0; i < 4; ++i) v[i] = _mm512_loadu_ps(c + 16 * i);
  if constexpr (F == Format::kInt4Group32) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
                  odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23),
                  high = _mm512_add_epi32(low, _mm512_set1_epi32(8));
    for (int i = 0; i < 4; i += 2) {
      _mm512_storeu_ps(c + 16 * i, _mm512_permutex2var_ps(v[i], back ? low : even, v[i + 1]));
      _mm512_storeu_ps(c + 16 * i + 16, _mm512_permutex2var_ps(v[i], back ? high : odd, v[i + 1]));
    }
  } else if constexpr (F == Format::kBf16) {
    // In order: fours 0 2 4 6 and 1 3 5 7 of eight.
    const __m512i even = _mm512_setr_epi64(0, 1, 4, 5, 8, 9, 12, 13),
                  odd = _mm512_add_epi64(even, _mm512_set1_epi64(2));
    const __m512i low = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), high = _mm512_add_epi64(low, _mm512_set1_epi64(4));
    for (int i = 0; i < 4; i += 2) {
      const __m512d a = _mm512_castps_pd(v[i]), b = _mm512_castps_pd(v[i + 1]);
      _mm512_storeu_pd(c + 16 * i, _mm512_permutex2var_pd(a, back ? low : even, b));
      _mm512_storeu_pd(c + 16 * i + 16, _mm512_permutex2var_pd(a, back ? high : odd, b));
    }
  } else {
    // Fours i, 4 + i, 8 + i, 12 + i of sixteen: its own inverse.
    const __m512 a = _mm512_shuffle_f32x4(v[0], v[1], 0x88), b = _mm512_shuffle_f32x4(v[0], v[1], 0xdd),
                 d = _mm512_shuffle_f32x4(v[2], v[3], 0x88), e = _mm512_shuffle_f32x4(v[2], v[3], 0xdd);
    _mm512_storeu_ps(c, _mm512_shuffle_f32x4(a, d, 0x88));
    _mm512_storeu_ps(c + 16, _mm512_shuffle_f32x4(b, e, 0x88));
    _mm512_storeu_ps(c + 32, _mm512_shuffle_f32x4(a, d, 0xdd));
    _mm512_storeu_ps(c + 48, _mm512_shuffle_f32x4(b, e, 0xdd));
  }
}

// C of the first `lines` lines of a product.
template <Format F>
inline void order_lines(const Product& p, int64_t lines, bool back) {
  for (int64_t r = 0; r < p.rows; ++r)
    for (int64_t line = 0; line < lines; ++line) order_line<F>(p.c + r * p.ldc + line * kLine, back);
}

// What a format looks up for a block of 128 x 128 weights at (row, col), rows and columns as Tables has them.
template <Format F>
inline const std::byte* pairs_table(const Tables<F>& tables, int64_t row, int64_t col) {
  if constexpr (F == Format::kInt4Group32) return reinterpret_cast<const std::byte*>(&kInt4Constants);
  return tables.at_block(row, col);
}
