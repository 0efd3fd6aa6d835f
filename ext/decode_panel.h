// Stored rows -> panels of interleaved pairs of rows, the bf16 operands of products across them.
// Included inside an unnamed namespace after decode_avx512.h.

// Two stored rows x 64 columns -> [64][2]. Unpacking works by lanes of 128 bits, so what they need is brought there
// before; both leave the ports of the products free, which a permutation of two vectors does not.
inline void interleave(const Weights& a, const Weights& b, uint16_t* out) {
  const __m512i order = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  const auto store = [&](__m512i x, __m512i y, uint16_t* to) {
    x = _mm512_permutexvar_epi64(order, x);
    y = _mm512_permutexvar_epi64(order, y);
    _mm512_store_si512(to, _mm512_unpacklo_epi16(x, y));
    _mm512_store_si512(to + 32, _mm512_unpackhi_epi16(x, y));
  };
  store(a.low, b.low, out);
  store(a.high, b.high, out + 64);
}

// Whether pairs of a format's rows are decoded together, which then takes fewer instructions than apart and
// interleaved.
template <Format F>
struct DecodePair {
  static constexpr bool kExists = false;
};

#if defined(__AVX512VBMI__)
// The tables of both rows' groups are halves of one.
template <>
struct DecodePair<Format::kInt4Group32> {
  static constexpr bool kExists = true;
  // 64 columns of two stored rows -> [64][2]; scales and pointers as for Decode::load, all 64 columns exist.
  static inline void load(const uint8_t* a_scales, const uint8_t* a, const uint8_t* b_scales, const uint8_t* b,
                          int64_t c, uint16_t* out) {
    // Bytes of a and b in turns, as words: even columns are their low nibbles, odd columns the high ones.
    alignas(64) static const uint8_t kBytes[64] = {
        0, 0, 64, 0, 1, 0, 65, 0, 8,  0, 72, 0, 9,  0, 73, 0, 2, 0, 66, 0, 3, 0, 67, 0, 10, 0, 74, 0, 11, 0, 75, 0,
        4, 0, 68, 0, 5, 0, 69, 0, 12, 0, 76, 0, 13, 0, 77, 0, 6, 0, 70, 0, 7, 0, 71, 0, 14, 0, 78, 0, 15, 0, 79, 0};
    const __m512 codes = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
    const __m512i row = _mm512_set1_epi32(16 << 16);
    const auto bytes = [&](const uint8_t* p) {
      return _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + c / 2)));
    };
    const __m512i x = bytes(a), y = bytes(b), first = _mm512_load_si512(kBytes),
                  second = _mm512_or_si512(first, word(16));
#pragma GCC unroll 2
    for (int group = 0; group < 2; ++group) {
      const int64_t at = c / 16 + 2 * group;
      const __m512i table = round_bf16(_mm512_mul_ps(codes, broadcast_bf16(a_scales + at)),
                                       _mm512_mul_ps(codes, broadcast_bf16(b_scales + at)));
      const __m512i pairs = _mm512_maskz_permutex2var_epi8(0x5555555555555555, x, group ? second : first, y);
      const __m512i even =
          _mm512_permutexvar_epi16(_mm512_ternarylogic_epi32(pairs, word(15), row, 0xEA), table);  // (pairs & 15) | row
      const __m512i odd = _mm512_permutexvar_epi16(_mm512_or_si512(_mm512_srli_epi16(pairs, 4), row), table);
      _mm512_store_si512(out + group * 64, _mm512_unpacklo_epi32(even, odd));
      _mm512_store_si512(out + group * 64 + 32, _mm512_unpackhi_epi32(even, odd));
    }
  }
};
#endif

// `pairs` pairs of rows from (row, col) on, 64 columns of each -> [pairs][64][2]. A function of its own on copies,
// because what it stores could otherwise change, for all the compiler knows, what it reads.
template <Format F>
__attribute__((noinline)) void decode_pairs(Matrix w, Tables<F> tables, int64_t row, int64_t pairs, int64_t col,
                                            uint16_t* out) {
  const int64_t row_size = row_bytes(F, w.cols), block = col / kBlock * kBlock, at = col - block;
  const uint8_t* p = byte_at(F, w, row, block);
  for (int64_t end = row + 2 * pairs; row < end; row += 2, p += 2 * row_size, out += kLine * 2)
    DecodePair<F>::load(tables.scale(w, row, block), p, tables.scale(w, row + 1, block), p + row_size, at, out);
}

// Rows [k, k + depth) x n columns from col -> panels [n / kLine][pairs][kLine][2], a zero row behind an odd last one; k
// and col multiples of 64.
template <Format F>
inline void across_panel(const Matrix& w, const Tables<F>& tables, int64_t k, int64_t depth, int64_t col, int64_t n,
                         uint16_t* panel, Prefetch& cursor) {
  constexpr int64_t kTogether = 32;  // rows per visit of a column line: bounds the DRAM pages open at once
  constexpr int64_t kAtOnce = 4;     // pairs of rows between two requests for memory
  Prefetch prefetch = cursor;
  const int64_t row_size = row_bytes(F, w.cols), pairs = (depth + 1) / 2;
  for (int64_t i = 0; i < depth; i += kTogether)
    for (int64_t c = 0; c < n; c += kLine) {
      uint16_t* out = panel + (c * pairs + i / 2 * kLine) * 2;
      const int64_t block = (col + c) / kBlock * kBlock, at = col + c - block;
      const uint8_t* p = byte_at(F, w, k + i, block);
      auto scale = tables.scale(w, k + i, block);
      const auto load = [&](int64_t row, int64_t count) {
        if constexpr (Decode<F>::kBlockRows == 1) scale = tables.scale(w, row, block);
        return Decode<F>::load(scale, p + (row - k - i) * row_size, at, count);
      };
      const int64_t end = depth - i < kTogether ? depth - i : kTogether;
      const auto visit = [&](int64_t r, int64_t count) {
        prefetch.tick();
        const Weights a = load(k + i + r, count), b = load(k + i + r + 1, count);
        interleave(a, b, out);
        out += kLine * 2;
      };
      int64_t r = 0;
      if constexpr (DecodePair<F>::kExists)
        for (int64_t pairs; n - c >= kLine && r + 1 < end; r += 2 * pairs, out += pairs * kLine * 2) {
          pairs = (end - r) / 2 < kAtOnce ? (end - r) / 2 : kAtOnce;
          prefetch.tick(static_cast<int>(pairs));
          decode_pairs<F>(w, tables, k + i + r, pairs, col + c, out);
        }
      if (n - c >= kLine)
        for (; r + 1 < end; r += 2) visit(r, kLine);
      else
        for (; r + 1 < end; r += 2) visit(r, n - c);
      if (r < end) interleave(load(k + i + r, n - c), Weights{_mm512_setzero_si512(), _mm512_setzero_si512()}, out);
    }
  cursor = prefetch;
}
