// Along stored rows, 16 of them in the lanes: their codes are transposed, decoded in registers and met by broadcast
// operand rows. Included inside an unnamed namespace after lanes.h.

constexpr int64_t kLanesDepth = 256;  // columns per visit: the codes of 64 stored rows are 8 to 16 KB of L1

// Columns of a stored row that share a scale, or a table.
template <Format F>
constexpr int64_t kScaledColumns = kRowScales<F> ? kScaleBlock[static_cast<int>(F)].cols : kBlock;

// The scales of a visit, [groups of columns][64 stored rows].
template <Format F>
void transpose_scales(const Matrix& w, int64_t row, int64_t rows, int64_t col, int64_t cols, float* out) {
  constexpr int64_t kMost = kLanesDepth / kScaledColumns<F>;  // scales of a row: 16 bytes or less
  const int64_t groups = (cols + kScaledColumns<F> - 1) / kScaledColumns<F>;
  const uint8_t* const first = scale_ptr(F, w, row, col);
  const int64_t step = scales_of<F>(w, row, col, cols).stride;
  for (int64_t r = 0; r < kLine; r += 16) {
    const auto load = [&](int64_t i) {
      return _mm_maskz_loadu_epi16(r + i < rows ? (1u << groups) - 1 : 0u, first + (r + i) * step);
    };
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm512_inserti32x4(_mm512_castsi128_si512(load(i)), load(4 + i), 1);
      v[i] = _mm512_inserti32x4(_mm512_inserti32x4(v[i], load(8 + i), 2), load(12 + i), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]),
                  c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    const __m512i pairs[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                              _mm512_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < kMost / 2; ++i) {
      _mm512_store_si512(out + 2 * i * kLine + r, _mm512_slli_epi32(pairs[i], 16));
      _mm512_store_si512(out + (2 * i + 1) * kLine + r,
                         _mm512_and_si512(pairs[i], _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
  }
}

// -1/2 times the sums of packed operand rows [pairs][rows][2] over each 128 columns of a visit -> [groups][rows].
inline void minus_halves(const uint16_t* a, int64_t rows, int64_t pairs, float* out) {
  constexpr int64_t kGroup = kBlock / 2;
  const __m512bh half = as_bf16(word(0xbf00));  // of -1/2
  const __mmask16 lanes = first_lanes(rows);
  for (; pairs > 0; pairs -= kGroup, out += rows) {
    __m512 sum[4] = {};
    for (int64_t n = pairs < kGroup ? pairs : kGroup; n > 0; n -= 4)  // a multiple: operand rows are padded
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, a += 2 * rows)
        sum[i] = _mm512_dpbf16_ps(sum[i], as_bf16(_mm512_maskz_loadu_epi32(lanes, a)), half);
    _mm512_mask_storeu_ps(out, lanes, _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
  }
}

// C [R, 32] (+)= A [pairs][R][2] x codes [2][vectors][16 stored rows], with scales [groups][64 stored rows] of the
// first of these rows on where sums have them, and what these begin with, [groups][R] or null.
template <Format F, int R>
void lane_tile(const uint16_t* a, const std::byte* codes, int64_t codes_step, int64_t pairs, const std::byte* table,
               const float* scales, const float* starts, float* c, int64_t ldc, bool add, Prefetch& cursor) {
  Prefetch prefetch = cursor;
  constexpr int64_t P = Lanes<F>::kPairs, kWhole = kScaledColumns<F> / 2;
  LaneSums<R> sums(c, ldc, add && !kRowScales<F>);
  for (int64_t k = 0; k < pairs; k += kWhole) {
    if constexpr (kRowScales<F>) sums = LaneSums<R>(kPlusHalf<F> ? starts : nullptr);
    for (int64_t n = pairs - k < kWhole ? pairs - k : kWhole; n > 0; n -= P) {
      prefetch.tick();
      __asm__("" : "+r"(table));  // its lines are read again and again: sums need the registers
      const auto v = Lanes<F>::load(codes, table), w = Lanes<F>::load(codes + codes_step, table);
#pragma GCC unroll 4
      for (int64_t q = 0; q < P; ++q) {
        const __m512i y[2] = {Lanes<F>::pair(v, q), Lanes<F>::pair(w, q)};
        sums.multiply(q, a + 2 * q * R, y);
      }
      a += 2 * P * R;
      codes += 64;
    }
    if constexpr (kRowScales<F>) {
      sums.store_scaled(scales, c, ldc, add || k > 0);
      scales += kLine;
      if constexpr (kPlusHalf<F>) starts += R;
    } else {
      table += Decode<F>::kTableBytes;
    }
  }
  if constexpr (!kRowScales<F>) sums.store(c, ldc);
  cursor = prefetch;
}

template <Format F>
void along_lanes(const Product& p) {
  const Matrix& w = p.strip.matrix;
  constexpr int64_t kBytes = kLanesDepth * kBits[static_cast<int>(F)] / 8;  // of a stored row's visit
  std::byte* const codes = p.scratch;                                       // [4][vectors][64]
  std::byte* const spare = codes + kLine * kBytes;
  float* const scales = reinterpret_cast<float*>(spare + kLine * kBytes);  // [groups of columns][64]
  constexpr int64_t kGroups = kLanesDepth / kScaledColumns<F>;
  float* const starts = scales + kLine * (kLanesDepth / 32);  // [groups of columns][rows]
  std::byte* const room = reinterpret_cast<std::byte*>(starts + (kPlusHalf<F> ? kGroups * kMaxRows : 0));
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols, room);
  const int64_t parts = (p.rows + kLaneRows - 1) / kLaneRows;
  for (int64_t k = 0; k < w.cols; k += kLanesDepth) {
    const int64_t depth = w.cols - k < kLanesDepth ? w.cols - k : kLanesDepth,
                  pairs = (depth + kPad - 1) / kPad * kPad / 2;
    const bool here = k + kLanesDepth < w.cols;
    const Strip& s = here ? p.strip : p.next;
    const int64_t from = here ? k + kLanesDepth : 0, left = s.matrix.cols - from,
                  n = left < kLanesDepth ? left : kLanesDepth;
    Prefetch prefetch(byte_at(F, s.matrix, s.first, from), row_bytes(F, s.matrix.cols), bytes_of(F, n),
                      n > 0 ? s.count : 0, 2 * parts * (pairs / Lanes<F>::kPairs),
                      scales_of<F>(s.matrix, s.first, from, n));
    const uint8_t* stored = byte_at(F, w, p.strip.first, k);
    int64_t step = row_bytes(F, w.cols);
    const int64_t exist = bytes_of(F, depth + (F == Format::kInt4Group32)), bytes = (exist + 63) / 64 * 64;
    if (exist < bytes || p.strip.count < kLine) {  // a copy of what exists
      __builtin_memset(spare, 0, kLine * kBytes);
      for (int64_t r = 0; r < p.strip.count; ++r) __builtin_memcpy(spare + r * kBytes, stored + r * step, exist);
      stored = reinterpret_cast<const uint8_t*>(spare);
      step = kBytes;
    }
    for (int64_t r = 0; r < kLine; r += 16)
      for (int64_t b = 0; b < bytes; b += 64)
        transpose_codes<F>(stored + r * step + b, step, codes + r * kBytes + b * 16);
    const std::byte* table = tables.at_block(p.strip.first, k);
    if constexpr (F == Format::kInt8Group128) table = reinterpret_cast<const std::byte*>(&kHalfTable);
    if constexpr (F == Format::kInt4Group32) table = reinterpret_cast<const std::byte*>(&kNibbleTable);
    if constexpr (kRowScales<F>) transpose_scales<F>(w, p.strip.first, p.strip.count, k, depth, scales);
    const auto tile = [&](int64_t r, int64_t rows) { return static_cast<const uint16_t*>(p.a) + r * p.lda + k * rows; };
    if constexpr (kPlusHalf<F>)
      for_parts<kLaneRows>(
          p.rows, [&](int64_t r, int64_t n) { minus_halves(tile(r, n), n, pairs, starts + kGroups * r); });
    const auto multiply = [&](int64_t half) {
      for_tiles<kLaneRows>(p.rows, [&]<int R>(int64_t r) {
        lane_tile<F, R>(tile(r, R), codes + half * kBytes, 16 * kBytes, pairs, table, scales + half,
                        starts + kGroups * r, p.c + r * p.ldc + half, p.ldc, p.add || k > 0, prefetch);
      });
    };
    multiply(0);
    multiply(32);
  }
}

// Layout of operand rows for that: tiles of equal parts of them, [pair of columns][rows][2].
inline void pack_lanes(const uint16_t* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k,
                       int64_t depth, uint16_t* packed, int64_t length) {
  for_parts<kLaneRows>(rows, [&](int64_t r, int64_t n) {
    const int64_t begin = r > first ? r : first, end = r + n < first + count ? r + n : first + count;
    if (begin >= end) return;
    const __mmask16 mine = first_lanes(end - begin);
    for (int64_t i = 0; i < depth; i += 32) {
      __m512i lines[16];
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j)
        lines[j] = j < end - begin ? _mm512_loadu_si512(from + (begin - first + j) * lda + i) : _mm512_setzero_si512();
      transpose(lines);
      uint16_t* const to = packed + r * length + (k + i) * n + (begin - r) * 2;
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j) _mm512_mask_storeu_epi32(to + j * n * 2, mine, lines[j]);
    }
  });
}
