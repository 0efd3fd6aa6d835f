// Few operand rows along stored rows: dot products with weights that are decoded in registers.
// Included inside an unnamed namespace after decode_avx512.h.

constexpr int64_t kSums = 16;  // room for the sums of a stored row in dot products, one per operand row

// Columns of so many operand rows that stay in L1, 32 KB or more, while stored rows meet them; those of bf16 take
// a quarter of it, as they come faster. All of them, if that is next to all of L1: memory streams whole rows best.
template <Format F>
inline int64_t operand_depth(int64_t rows, int64_t cols) {
  constexpr int64_t kBytes = F == Format::kBf16 ? 24 << 10 : 32 << 10, kWhole = 55 << 9;
  const int64_t of_column = rows * static_cast<int64_t>(sizeof(uint16_t));
  return cols * of_column <= kWhole ? cols : kBytes / of_column / kBlock * kBlock;
}

inline __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

// The horizontal sums of R <= 16 vectors, one in each lane, zeros behind them.
template <int R>
inline __m512 sums_of(const __m512 (&v)[R]) {
  const auto at = [&](int i) { return i < R ? v[i] : _mm512_setzero_ps(); };
  __m512 pairs[8], fours[4], eights[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i)
    pairs[i] =
        _mm512_add_ps(_mm512_unpacklo_ps(at(2 * i), at(2 * i + 1)), _mm512_unpackhi_ps(at(2 * i), at(2 * i + 1)));
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m512d even = _mm512_castps_pd(pairs[2 * i]), odd = _mm512_castps_pd(pairs[2 * i + 1]);
    fours[i] =
        _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(even, odd)), _mm512_castpd_ps(_mm512_unpackhi_pd(even, odd)));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    eights[i] = _mm512_add_ps(_mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0x88),
                              _mm512_shuffle_f32x4(fours[2 * i], fours[2 * i + 1], 0xdd));
  return _mm512_add_ps(_mm512_shuffle_f32x4(eights[0], eights[1], 0x88),
                       _mm512_shuffle_f32x4(eights[0], eights[1], 0xdd));
}

// W stored rows x `depth` columns from (row, k0) on that are asked for, one after the other, while as many others are
// multiplied; where rows do not exist, the last stands for them. Without branches: one that is taken now and then costs
// as much as all else that is done beside products.
template <Format F, int W>
struct RowsLater {
  RowsLater(const Matrix& w, int64_t row, int64_t n, int64_t k0, int64_t depth)
      : ticks_((depth + kBlock - 1) / kBlock), inverse_((kOne + ticks_ - 1) / ticks_) {
    for (int j = 0; j < W; ++j) {
      const int64_t r = row + (j < n ? j : n - 1);
      rows_[j] = byte_at(F, w, r, k0);
      if constexpr (kRowScales<F>) scales_[j] = scale_ptr(F, w, r, k0);
    }
  }
  // Tick k / 128 of them: W times 128 columns.
  inline __attribute__((always_inline)) void ask(int64_t k) const {
#pragma GCC unroll 4
    for (int64_t i = 0; i < W; ++i) {
      const int64_t at = k / kBlock * W + i, row = at * inverse_ / kOne, block = at - row * ticks_;
      const uint8_t* const p = rows_[row] + block * bytes_of(F, kBlock);
      for (int64_t line = 0; line < bytes_of(F, kBlock); line += 64) __builtin_prefetch(p + line, 0, 2);
      if constexpr (kRowScales<F>)
        __builtin_prefetch(scales_[row] + 2 * block * (kBlock / kScaleBlock[static_cast<int>(F)].cols), 0, 2);
    }
  }

 private:
  static constexpr int64_t kOne = 1 << 16;
  int64_t ticks_, inverse_;
  const uint8_t *rows_[W], *scales_[W];
};

// The same of a whole strip, whose stored rows lie one behind the other: `done` bytes of another are multiplied.
template <Format F, int W>
class StripLater {
 public:
  StripLater(const Strip& s, int64_t done) {
    const int64_t bytes = s.count * row_bytes(F, s.matrix.cols);
    at_ = byte_at(F, s.matrix, s.first, 0) + (done < bytes ? done : bytes);
  }
  inline __attribute__((always_inline)) void ask(int64_t k) const {
    const uint8_t* const p = at_ + bytes_of(F, W * k);
    for (int64_t line = 0; line < bytes_of(F, W * kBlock); line += 64) __builtin_prefetch(p + line, 0, 2);
  }

 private:
  const uint8_t* at_;
};

// The same interface for whoever asks for other bytes meanwhile.
struct TicksLater {
  Prefetch* prefetch;
  void ask(int64_t) const { prefetch->tick(); }
};

// Sums [W stored rows][R of kSums operand rows] (+)= W [W, depth] x A [R, depth], both along k. Stored rows from
// (row, k0) on, k0 a multiple of 128, are decoded 64 columns at a time in registers; n of them exist, and the last
// stands for those missing. A in blocks [depth / 32][R][32], zeros from depth on.
template <Format F, int R, int W, class Later>
void dot_tile(const uint16_t* a, const Matrix& w, const Tables<F>& tables, int64_t row, int64_t n, int64_t k0,
              int64_t depth, float* sums, bool add, const Later& later) {
  __m512 sum[W][R];
  const uint8_t* stored[W];
#pragma GCC unroll 4
  for (int j = 0; j < W; ++j) {
    stored[j] = byte_at(F, w, row + (j < n ? j : n - 1), k0);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) sum[j][i] = _mm512_setzero_ps();
  }
  const auto multiply = [&](const __m512i(&y)[W]) __attribute__((always_inline)) {
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const __m512bh x = as_bf16(_mm512_loadu_si512(a + i * 32));
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) sum[j][i] = _mm512_dpbf16_ps(sum[j][i], x, as_bf16(y[j]));
    }
    a += R * 32;
  };
  typename Decode<F>::Scale scale[W];
  const auto visit = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    __m512i low[W], high[W];
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) {
      const Weights y = Decode<F>::load(scale[j], stored[j], c, n);
      low[j] = y.low, high[j] = y.high;
    }
    multiply(low);
    if (n > 32) multiply(high);
  };
  for (int64_t k = 0; k < depth; k += kBlock) {
    later.ask(k);
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) scale[j] = tables.scale(w, row + (j < n ? j : n - 1), k0 + k);
    if (depth - k >= kBlock) {
      visit(0, 64);
      visit(64, 64);
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) stored[j] += bytes_of(F, kBlock);
    } else {
      for (int64_t c = 0; c < depth - k; c += 64) visit(c, depth - k - c);
    }
  }
#pragma GCC unroll 4
  for (int j = 0; j < W; ++j) {
    const __m512 all = sums_of(sum[j]);
    _mm512_store_ps(sums + j * kSums, add ? _mm512_add_ps(_mm512_load_ps(sums + j * kSums), all) : all);
  }
}

// What a stored row counts for (Product::row_scales).
inline float row_scale(const uint8_t* scales, int64_t row) { return load_scale(Format::kFp8Channel, scales + 4 * row); }

// Sums [stored rows of p][stride], `n` of each, times what the rows count for.
inline void scale_sums(const Product& p, float* sums, int64_t stride, int64_t n) {
  for (int64_t r = 0; p.row_scales && r < p.strip.count; ++r) {
    const __m512 scale = _mm512_set1_ps(row_scale(p.row_scales, p.strip.first + r));
    for (int64_t i = 0; i < n; i += 16) {
      float* const at = sums + r * stride + i;
      _mm512_store_ps(at, _mm512_mul_ps(_mm512_load_ps(at), scale));
    }
  }
}

// Few rows: all of them meet W stored rows at a time, as tile(first stored row, k, depth, later) has it, in blocks
// of up to `deepest` columns and kBlock more; sums [stored rows][kSums].
template <Format F, int W, class Tile>
void along_groups(const Product& p, int64_t deepest, float* sums, Tile tile) {
  const Matrix& w = p.strip.matrix;
  const int64_t groups = (p.strip.count + W - 1) / W, blocks = (w.cols + deepest - 1) / deepest;
  const int64_t step = (w.cols / blocks + kBlock - 1) / kBlock * kBlock, units = (w.cols + step - 1) / step * groups;
  constexpr int64_t kAhead = 4;               // groups between asking for stored rows and reading them
  constexpr int64_t kStripBytes = 256 << 10;  // two strips of these, operands and sums are in L2 of 1 MB
  // Memory streams strips as they lie, not parts of their rows. Where L2 has no room for two, groups are asked for.
  const auto fits = [&](const Strip& s) { return s.count * row_bytes(F, s.matrix.cols) <= kStripBytes; };
  const bool cut = units > groups && p.next.count > 0 && fits(p.strip) && fits(p.next);
  for (int64_t u = 0; u < units; ++u) {
    const int64_t row = u % groups * W, k = u / groups * step, depth = w.cols - k < step ? w.cols - k : step;
    if constexpr (!kRowScales<F>)
      if (cut) {
        tile(row, k, depth, StripLater<F, W>(p.next, bytes_of(F, groups * W * k + row * depth)));
        continue;
      }
    // The group kAhead of this one, in this strip or the next.
    const bool here = u + kAhead < units || p.next.count == 0;
    const Strip& s = here ? p.strip : p.next;
    const int64_t v = (here ? u + kAhead : u + kAhead - units) % units, first = v % groups * W, col = v / groups * step;
    const bool exists = first < s.count && col < s.matrix.cols;
    tile(row, k, depth,
         exists ? RowsLater<F, W>(s.matrix, s.first + first, s.count - first, col, depth)
                : RowsLater<F, W>(w, p.strip.first, p.strip.count, k, depth));
  }
  scale_sums(p, sums, kSums, kSums);
  for (int64_t g = 0; g < p.strip.count; g += 16) unpack_sums(sums + g * kSums, kSums, p.rows, p.c + g, p.ldc, p.add);
}

template <Format F, int W, int least, int most>
void along_few(const Product& p) {
  const Matrix& w = p.strip.matrix;
  const uint16_t* const operands = static_cast<const uint16_t*>(p.a);
  float* const sums = reinterpret_cast<float*>(p.scratch);
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols, p.scratch + 2 * kLine * kSums * sizeof(float));
  along_groups<F, W>(p, operand_depth<F>(p.rows, w.cols), sums,
                     [&](int64_t stored, int64_t k, int64_t depth, const auto& later) {
                       with_rows<least, most>(p.rows, [&]<int R>() {
                         dot_tile<F, R, W>(operands + k * R, w, tables, p.strip.first + stored, p.strip.count - stored,
                                           k, depth, sums + stored * kSums, k > 0, later);
                       });
                     });
}
