// Across stored rows: two are interleaved into a panel of vectors, and operand rows are broadcast against it.
// Included inside an unnamed namespace after decode_ahead.h and dot_rows.h.

constexpr int64_t kAcrossDepth = 256;  // a panel of one line of 64 columns is 32 KB of L1
constexpr int64_t kDeepRows = 24;      // more rows have panels twice as deep

inline const uint16_t* operands(const Product& p, int64_t row, int64_t k) {
  return static_cast<const uint16_t*>(p.a) + row * p.lda + k;
}

// C [R, 64] (+)= A [R, 2 * pairs] x a panel [pairs][64][2], with a tick every T pairs
template <int R, int T, class Beside>
void panel_tile(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t pairs, float* c, int64_t ldc, bool add,
                Beside& cursor) {
  Beside beside = cursor;
  __m512 sum[R][4];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
  const auto step = [&](int64_t h) __attribute__((always_inline)) {
    __m512bh w[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) w[j] = as_bf16(_mm512_load_si512(panel + h * kLine * 2 + j * 32));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      int pair;
      __builtin_memcpy(&pair, a + i * lda + 2 * h, 4);
      const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, w[j]);
    }
  };
  int64_t k = pairs;
  for (; k >= T; k -= T) {
    beside.tick();
#pragma GCC unroll 4
    for (int64_t h = 0; h < T; ++h) step(h);
    a += 2 * T;
    panel += T * kLine * 2;
  }
  for (; k > 0; --k) {
    step(0);
    a += 2;
    panel += kLine * 2;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sum[i][j]);
  cursor = beside;
}

// Calls f(first row, rows) for equal parts of at most `most` rows: a row or two of accumulators left over alone could
// not hide the latency of the dot product.
template <int most, class F>
inline void for_parts(int64_t rows, F f) {
  for (int64_t r = 0, parts = (rows + most - 1) / most; parts > 0; --parts) {
    const int64_t n = (rows - r + parts - 1) / parts;
    f(r, n);
    r += n;
  }
}
// The same with the number of rows as a template argument: f<R>(first row).
template <int most, class F>
inline void for_tiles(int64_t rows, F f) {
  for_parts<most>(rows,
                  [&](int64_t r, int64_t n) { with_rows<1, most>(n, [&]<int R>() { f.template operator()<R>(r); }); });
}
constexpr int kTileRows = 6;  // x 4 vectors: twenty-four accumulators
inline int64_t tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// Many rows: the next panel is made beside the products of this one. Panels are of all lines and stay in L1, line by
// line; for yet more rows of one line, and deep, for sums that are stored and loaded again cost more than a panel that
// comes from L2.
template <Format F>
void across_many(const Product& p) {
  const Matrix& w = p.strip.matrix;
  const int64_t lines = (p.strip.count + kLine - 1) / kLine;
  constexpr int kPanelTick = 4 / PairsAhead<F>::kUnits;  // pairs between two ticks of what runs beside
  const bool deep = p.rows > kDeepRows;
  const int64_t most = deep ? 2 * kAcrossDepth : kAcrossDepth, together = deep ? 1 : lines;
  constexpr int64_t kPanel = kAcrossDepth * 4 * kLine;
  uint16_t* const panels[] = {reinterpret_cast<uint16_t*>(p.scratch), reinterpret_cast<uint16_t*>(p.scratch) + kPanel};
  constexpr int64_t kRoom = (2 * kAcrossDepth / kBlock + 1) * (4 * kLine / kBlock + 1) * Decode<F>::kTableBytes;
  static_assert(2 * kPanel * sizeof(uint16_t) + kRoom <= scratch_bytes(0));
  std::byte* const room = reinterpret_cast<std::byte*>(panels[1] + kPanel);
  // Nothing hides the first panel, so it is short. Blocks start at multiples of kLine, as across_panel wants them.
  const auto blocks_of_rows = [&](const Matrix& m) { return Blocks{m.rows, m.rows % most == 128 ? 128 : kLine, most}; };
  const Blocks blocks = blocks_of_rows(w);
  const auto lines_from = [&](int64_t line) {
    const int64_t first = line * kLine, n = p.strip.count - first;
    return Strip{w, p.strip.first + first, n < together * kLine ? n : together * kLine};
  };
  int64_t which = 0;
  const auto size = [&](int64_t i) { return i < blocks.count() ? blocks.size(i) : 0; };
  const auto tables_of = [&](int64_t i, const Strip& strip) {
    return Tables<F>(w, blocks.start(i), size(i), strip.first, strip.count, room);
  };
  const int64_t whole = p.strip.count / kLine;  // lines, whose columns panels have in another order
  if (p.add) order_lines<F>(p, whole, false);
  PairsAhead<F>(lines_from(0), tables_of(0, lines_from(0)), 0, size(0), panels[0], 0, Prefetch()).finish();
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t k = blocks.start(i), pairs = (blocks.size(i) + 1) / 2, ticks = tiles(p.rows) * (pairs / kPanelTick);
    // Asked for now, decoded beside the next block, multiplied after that.
    const int64_t later = i + 2 - blocks.count();
    const Strip& s = later < 0 ? p.strip : p.next;
    const Blocks its = blocks_of_rows(s.matrix);
    const int64_t from = later < 0 ? its.start(i + 2) : blocks.count() == 1 ? 0 : its.start(later);
    const int64_t end = later < 0 ? from + its.size(i + 2) : from < its.total ? its.start(later) + its.size(later) : 0;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count),
                      from < its.total ? end - from : 0, ticks * lines, scales_of<F>(s.matrix, from, s.first, s.count));
    for (int64_t line = 0; line < lines; line += together) {
      const uint16_t* panel = panels[which];
      which = 1 - which;
      const int64_t next = line + together < lines ? i : i + 1;
      const Strip strip = lines_from(next == i ? line + together : 0);
      const Tables<F> tables = tables_of(next, strip);
      PairsAhead<F> beside(strip, tables, blocks.start(next), size(next), panels[which],
                           ticks * (together < lines - line ? together : lines - line), prefetch);
      for (int64_t l = line; l < line + together && l < lines; ++l, panel += pairs * kLine * 2)
        for_tiles<kTileRows>(p.rows, [&]<int R>(int64_t r) {
          panel_tile<R, kPanelTick>(operands(p, r, k), p.lda, panel, pairs, p.c + r * p.ldc + l * kLine, p.ldc,
                                    p.add || i > 0, beside);
        });
      beside.finish();
      prefetch = beside.prefetch();
    }
  }
  order_lines<F>(p, whole, true);
}

// What products of no rows cost: their decoding.
template <Format F>
void across_nothing(const Product& p) {
  uint16_t* const panel = reinterpret_cast<uint16_t*>(p.scratch);
  std::byte* const room = p.scratch + kAcrossDepth * 4 * kLine * sizeof(uint16_t);
  const int64_t rows = p.strip.matrix.rows;
  Prefetch none;
  for (int64_t k = 0; k < rows; k += kLine) {
    const int64_t depth = rows - k < kLine ? rows - k : kLine;
    const Tables<F> tables(p.strip.matrix, k, depth, p.strip.first, p.strip.count, room);
    across_panel<F>(p.strip.matrix, tables, k, depth, p.strip.first, p.strip.count, panel, none);
  }
}
