// Across stored rows: two are interleaved into a panel of vectors, and operand rows are broadcast against it.
// Included inside an unnamed namespace after decode_ahead.h and dot_rows.h.

constexpr int64_t kAcrossDepth = 256;             // across: a panel of one line of 64 columns is 32 KB of L1
constexpr int64_t kPanelTick = 4;                 // pairs between two ticks of what runs beside
constexpr int64_t kFewRows = 12, kFewDepth = 64;  // few rows: a panel of all lines is, so rows are read whole

inline const uint16_t* operands(const Product& p, int64_t row, int64_t k) {
  return static_cast<const uint16_t*>(p.a) + row * p.lda + k;
}

// C [R, 64 L] (+)= A [R, 2 * pairs] x L panels [pairs][64][2], with a tick every T pairs
template <int R, int L, int T, class Beside>
void panel_tile(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t pairs, float* c, int64_t ldc, bool add,
                Beside& cursor) {
  Beside beside = cursor;
  __m512 sum[R][4 * L];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 4 * L; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
  const int64_t line_step = pairs * kLine * 2;
  const auto step = [&](int64_t h) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
      const uint16_t* const line = panel + l * line_step + h * kLine * 2;
      __m512bh w[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        w[j] = as_bf16(_mm512_load_si512(line + j * 32));
        if (T == 1 && R > 3) __builtin_prefetch(line + (16 * 4 + j) * 32, 0, 3);  // where L1 lost the panel
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        int pair;
        __builtin_memcpy(&pair, a + i * lda + 2 * h, 4);
        const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[i][4 * l + j] = _mm512_dpbf16_ps(sum[i][4 * l + j], x, w[j]);
      }
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
#pragma GCC unroll 16
    for (int j = 0; j < 4 * L; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sum[i][j]);
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

// Many rows: the panel of the next stored rows is made beside the products of these.
template <Format F>
void across_many(const Product& p) {
  const Matrix& w = p.strip.matrix;
  const int64_t lines = (p.strip.count + kLine - 1) / kLine;
  constexpr int64_t kPanel = kAcrossDepth * 4 * kLine;  // numbers of a panel; a line of it is 32 KB and stays in L1
  uint16_t* const panels[] = {reinterpret_cast<uint16_t*>(p.scratch), reinterpret_cast<uint16_t*>(p.scratch) + kPanel};
  constexpr int64_t kRoom = (kAcrossDepth / kBlock + 1) * (4 * kLine / kBlock + 1) * Decode<F>::kTableBytes;
  static_assert(2 * (kPanel * sizeof(uint16_t) + kRoom) <= scratch_bytes(0));
  std::byte* const room = reinterpret_cast<std::byte*>(panels[1] + kPanel);
  std::byte* const rooms[] = {room, room + kRoom};
  // Nothing hides the first panel, so it is short. Blocks start at multiples of kLine, as across_panel wants them.
  const int64_t rest = w.rows % kAcrossDepth;
  const Blocks blocks{w.rows, rest == 128 ? rest : kLine, kAcrossDepth};
  const auto size = [&](int64_t i) { return i < blocks.count() ? blocks.size(i) : 0; };
  const auto tables_of = [&](int64_t i) {
    return Tables<F>(w, blocks.start(i), size(i), p.strip.first, p.strip.count, rooms[i % 2]);
  };
  PairsAhead<F>(p.strip, tables_of(0), 0, size(0), panels[0], 0, Prefetch()).finish();
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t k = blocks.start(i), pairs = (blocks.size(i) + 1) / 2,
                  ticks = tiles(p.rows) * (pairs / kPanelTick) * lines;
    // Asked for now, decoded beside the next block, multiplied after that.
    const int64_t later = i + 2 - blocks.count();
    const Strip& s = later < 0 ? p.strip : p.next;
    const Blocks its{s.matrix.rows, blocks.first, kAcrossDepth};
    const int64_t from = later < 0 ? its.start(i + 2) : blocks.count() == 1 ? 0 : its.start(later);
    const int64_t end = later < 0 ? from + its.size(i + 2) : from < its.total ? its.start(later) + its.size(later) : 0;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count),
                      from < its.total ? end - from : 0, ticks, scales_of<F>(s.matrix, from, s.first, s.count));
    const Tables<F> tables = tables_of(i + 1);
    PairsAhead<F> beside(p.strip, tables, blocks.start(i + 1), size(i + 1), panels[(i + 1) % 2], ticks, prefetch);
    for (int64_t line = 0; line < lines; ++line)
      for_tiles<kTileRows>(p.rows, [&]<int R>(int64_t r) {
        panel_tile<R, 1, kPanelTick>(operands(p, r, k), p.lda, panels[i % 2] + line * pairs * kLine * 2, pairs,
                                     p.c + r * p.ldc + line * kLine, p.ldc, p.add || i > 0, beside);
      });
    beside.finish();
  }
}

// Few rows: panels of all lines are made and multiplied in turns.
template <Format F>
void across_few(const Product& p) {
  const Matrix& w = p.strip.matrix;
  const int64_t lines = (p.strip.count + kLine - 1) / kLine;
  constexpr int64_t step = kFewDepth;
  // Lines of 64 columns per tile: one or two rows of one line alone would wait for each dot product.
  const int64_t together = p.rows == 1 && lines % 4 == 0 ? 4 : (p.rows == 1 || p.rows == 2) && lines % 2 == 0 ? 2 : 1;
  uint16_t* const panel = reinterpret_cast<uint16_t*>(p.scratch);
  std::byte* const room = p.scratch + kFewDepth * 4 * kLine * sizeof(uint16_t);
  for (int64_t k = 0; k < w.rows; k += step) {
    const int64_t depth = w.rows - k < step ? w.rows - k : step, pairs = (depth + 1) / 2;
    const bool more = k + step < w.rows;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? k + step : 0, n = s.matrix.rows - from < step ? s.matrix.rows - from : step;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count), n,
                      across_ticks(p.strip.count, pairs) + tiles(p.rows) * pairs * lines / together,
                      scales_of<F>(s.matrix, from, s.first, s.count));
    const Tables<F> tables(w, k, depth, p.strip.first, p.strip.count, room);
    const bool add = p.add || k > 0;
    across_panel<F>(w, tables, k, depth, p.strip.first, p.strip.count, panel, pairs, prefetch);
    for (int64_t line = 0; line < lines; line += together) {
      const auto multiply = [&]<int R, int L>(int64_t r) {
        panel_tile<R, L, 1>(operands(p, r, k), p.lda, panel + line * pairs * kLine * 2, pairs,
                            p.c + r * p.ldc + line * kLine, p.ldc, add, prefetch);
      };
      if (together == 4) multiply.template operator()<1, 4>(0);
      else if (together == 2 && p.rows == 1) multiply.template operator()<1, 2>(0);
      else if (together == 2) multiply.template operator()<2, 2>(0);
      else for_tiles<kTileRows>(p.rows, [&]<int R>(int64_t r) { multiply.template operator()<R, 1>(r); });
    }
  }
}
