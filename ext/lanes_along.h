// Along stored rows, 16 of them in the lanes: their codes are transposed, decoded in registers and met by broadcast
// operand rows. Included inside an unnamed namespace after lanes.h.

constexpr int64_t kLanesDepth = 256;  // columns per visit: the codes of 64 stored rows are 16 or 32 KB of L1

// C [R, 32] (+)= A [pairs][R][2] x codes [2][vectors][16 stored rows]
template <Format F, int R>
void lane_tile(const uint16_t* a, const std::byte* codes, int64_t codes_step, int64_t pairs, const std::byte* table,
               float* c, int64_t ldc, bool add, Prefetch& cursor) {
  Prefetch prefetch = cursor;
  constexpr int64_t P = Lanes<F>::kPairs, kWhole = kBlock / 2;
  LaneSums<R> sums(c, ldc, add);
  for (int64_t k = 0; k < pairs; k += kWhole) {
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
    table += Decode<F>::kTableBytes;
  }
  sums.store(c, ldc);
  cursor = prefetch;
}

template <Format F>
void along_lanes(const Product& p) {
  const Matrix& w = p.strip.matrix;
  constexpr int64_t kBytes = kLanesDepth * kBits[static_cast<int>(F)] / 8;  // of a stored row's visit
  std::byte* const codes = p.scratch;                                       // [4][vectors][64]
  std::byte* const spare = codes + kLine * kBytes;
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols, spare + kLine * kBytes);
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
    const int64_t bytes = (bytes_of(F, depth) + 63) / 64 * 64;
    if (bytes_of(F, depth) < bytes || p.strip.count < kLine) {  // a copy of what exists
      __builtin_memset(spare, 0, kLine * kBytes);
      for (int64_t r = 0; r < p.strip.count; ++r)
        __builtin_memcpy(spare + r * kBytes, stored + r * step, bytes_of(F, depth));
      stored = reinterpret_cast<const uint8_t*>(spare);
      step = kBytes;
    }
    for (int64_t r = 0; r < kLine; r += 16)
      for (int64_t b = 0; b < bytes; b += 64)
        transpose_codes<Lanes<F>::kWords>(stored + r * step + b, step, codes + r * kBytes + b * 16);
    const std::byte* const table = tables.at_block(p.strip.first, k);
    const auto multiply = [&](int64_t half) {
      for_tiles<kLaneRows>(p.rows, [&]<int R>(int64_t r) {
        lane_tile<F, R>(static_cast<const uint16_t*>(p.a) + r * p.lda + k * R, codes + half * kBytes, 16 * kBytes,
                        pairs, table, p.c + r * p.ldc + half, p.ldc, p.add || k > 0, prefetch);
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
