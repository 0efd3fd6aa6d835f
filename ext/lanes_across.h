// Across stored rows: pairs of them are decoded in registers, 32 columns in the lanes, and met by broadcast operand
// rows. Included inside an unnamed namespace after lanes.h.

constexpr int64_t kPairsDepth = 128;  // stored rows per visit: 4 KB apart, they and the next fill half the ways of L2

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
struct AcrossLanes;

template <>
struct AcrossLanes<Format::kBf16> {
  static inline __attribute__((always_inline)) void pairs(const uint8_t* a, const uint8_t* b, int64_t half,
                                                          const std::byte*, const uint8_t*, const uint8_t*,
                                                          __m512i (&out)[2]) {
    const __m512i x = _mm512_loadu_si512(a + 64 * half), y = _mm512_loadu_si512(b + 64 * half);
    out[0] = _mm512_unpacklo_epi16(x, y);
    out[1] = _mm512_unpackhi_epi16(x, y);
  }
};
template <>
struct AcrossLanes<Format::kFp8Block> {
  static inline __attribute__((always_inline)) void pairs(const uint8_t* a, const uint8_t* b, int64_t half,
                                                          const std::byte* table, const uint8_t*, const uint8_t*,
                                                          __m512i (&out)[2]) {
    const __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    const LowHigh v = by_table(half ? _mm512_unpackhi_epi8(x, y) : _mm512_unpacklo_epi8(x, y), table);
    out[0] = _mm512_unpacklo_epi8(v.low, v.high);
    out[1] = _mm512_unpackhi_epi8(v.low, v.high);
  }
};
template <>
struct AcrossLanes<Format::kInt8Group128> {
  static inline __attribute__((always_inline)) void pairs(const uint8_t* a, const uint8_t* b, int64_t half,
                                                          const std::byte*, const uint8_t* a_scale,
                                                          const uint8_t* b_scale, __m512i (&out)[2]) {
    const __m512 x = broadcast_bf16(a_scale), y = broadcast_bf16(b_scale);
    const __m512i order = _mm512_load_si512(kPairOrder.words);
    const auto weights = [&](const uint8_t* p, __m512 scale) {
      const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
      return _mm512_mul_ps(_mm512_cvtepi32_ps(codes), scale);
    };
#pragma GCC unroll 2
    for (int i = 0; i < 2; ++i) {
      const int64_t at = 32 * half + 16 * i;
      out[i] = round_pairs(weights(a + at, x), weights(b + at, y), order);
    }
  }
};
// The 16 possible weights of both rows' groups are one table; even columns, then odd ones.
template <>
struct AcrossLanes<Format::kInt4Group32> {
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

// C of a line of 64 columns between the order of columns and that of AcrossLanes.
template <Format F>
inline void order_line(float* c, bool back) {
  if constexpr (F == Format::kInt8Group128) return;
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

// C [R, 32] (+)= A [pairs][R][2] x pairs of stored rows from w on, `half` of a line of 64 columns.
template <Format F, int R, int half>
void across_tile(const uint16_t* a, const uint8_t* w, int64_t row_size, int64_t pairs, const std::byte* table,
                 const uint8_t* scales, int64_t scales_step, float* c, int64_t ldc, bool add, Prefetch& cursor) {
  Prefetch prefetch = cursor;
  LaneSums<R> sums(c, ldc, add);
  for (; pairs > 0; pairs -= 2) {  // an even number: operand rows are padded
    prefetch.tick();
    __asm__("" : "+r"(table));  // its lines are read again and again: sums need the registers
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      __m512i y[2];
      AcrossLanes<F>::pairs(w, w + row_size, half, table, scales, scales + scales_step, y);
      w += 2 * row_size;
      scales += 2 * scales_step;
      sums.multiply(q, a, y);
      a += 2 * R;
    }
  }
  sums.store(c, ldc);
  cursor = prefetch;
}

// Asks for the stored rows that are visited after those from k on, in this strip or the next.
template <Format F>
Prefetch visit_after(const Product& p, int64_t k, int64_t ticks) {
  const bool here = k + kPairsDepth < p.strip.matrix.rows;
  const Strip& s = here ? p.strip : p.next;
  const int64_t from = here ? k + kPairsDepth : 0, left = s.matrix.rows - from;
  return Prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count),
                  left < kPairsDepth ? left : kPairsDepth, ticks, scales_of<F>(s.matrix, from, s.first, s.count));
}

template <Format F>
void across_lanes(const Product& p) {
  const Matrix& w = p.strip.matrix;
  constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
  constexpr int64_t kLineBytes = kLine * kBits[static_cast<int>(F)] / 8, kSpareScales = 4;
  uint16_t* const packed = reinterpret_cast<uint16_t*>(p.scratch);                         // [rows, kPairsDepth]
  std::byte* const spare = reinterpret_cast<std::byte*>(packed + kMaxRows * kPairsDepth);  // a line's rows, and scales
  std::byte* const room = spare + kPairsDepth * (kLineBytes + kSpareScales);
  const int64_t lines = (p.strip.count + kLine - 1) / kLine, row_size = row_bytes(F, w.cols),
                scales_size = scales_per_row(block, w.cols) * block.bytes;
  const auto order = [&](bool back) {
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t line = 0; line < lines; ++line) order_line<F>(p.c + r * p.ldc + line * kLine, back);
  };
  if (p.add) order(false);
  for (int64_t k = 0; k < w.rows; k += kPairsDepth) {
    const int64_t depth = w.rows - k < kPairsDepth ? w.rows - k : kPairsDepth,
                  padded = (depth + kPad - 1) / kPad * kPad;
    Prefetch prefetch = visit_after<F>(p, k, (p.rows + kLaneRows - 1) / kLaneRows * lines * padded / 2);
    const Tables<F> tables(w, k, depth, p.strip.first, p.strip.count, room);
    pack_lanes(operands(p, 0, k), p.lda, p.rows, 0, p.rows, 0, padded, packed, padded);
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t col = p.strip.first + line * kLine, n = p.strip.count - line * kLine;
      const uint8_t* stored = byte_at(F, w, k, col);
      const uint8_t* of_rows = kRowScales<F> ? scale_ptr(F, w, k, col) : nullptr;
      int64_t step = row_size, scales_step = kRowScales<F> ? scales_size : 0;
      if (depth < padded || n < kLine) {  // a copy of what exists
        const int64_t bytes = n < kLine ? bytes_of(F, n + (F == Format::kInt4Group32)) : kLineBytes;
        std::byte* const copies = spare + kPairsDepth * kLineBytes;
        __builtin_memset(spare, 0, kPairsDepth * (kLineBytes + kSpareScales));
        for (int64_t r = 0; r < depth; ++r) {
          __builtin_memcpy(spare + r * kLineBytes, stored + r * step, bytes);
          if (scales_step)
            __builtin_memcpy(copies + r * kSpareScales, of_rows + r * scales_step,
                             F == Format::kInt4Group32 && n > 32 ? 4 : 2);
        }
        stored = reinterpret_cast<const uint8_t*>(spare);
        step = kLineBytes;
        if (scales_step) of_rows = reinterpret_cast<const uint8_t*>(copies), scales_step = kSpareScales;
      }
      const std::byte* table = tables.at_block(k, col);
      if constexpr (F == Format::kInt4Group32) table = reinterpret_cast<const std::byte*>(&kInt4Constants);
      const auto multiply = [&]<int half>() {
        for_tiles<kLaneRows>(p.rows, [&]<int R>(int64_t r) {
          across_tile<F, R, half>(packed + r * padded, stored, step, padded / 2, table, of_rows, scales_step,
                                  p.c + r * p.ldc + line * kLine + half * 32, p.ldc, p.add || k > 0, prefetch);
        });
      };
      multiply.template operator()<0>();
      multiply.template operator()<1>();
    }
  }
  order(true);
}
