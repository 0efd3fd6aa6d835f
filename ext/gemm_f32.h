// Products with fp32 operands in registers, written against the vector type V of the including file (kRows x kVectors
// tiles, kDepth of the reduction per block, kWidth columns per strip). Operands and weights of any format are widened
// to float blocks in scratch; bf16 products in fp32 are exact. Included inside an unnamed namespace by each float
// kernel file.

constexpr int64_t kTileCols = kVectors * kLanes;  // columns of C per tile
// Weights decoded at a time: a panel of this width and depth stays in L1 while the rows of A pass by.
constexpr int64_t kPanelCols = kTileCols < 32 ? 32 : kTileCols;
constexpr int64_t kChunk = 192;  // rows of A widened at once, a multiple of kRows: they stay in L2 for all columns
constexpr int64_t kTick = 8;     // steps of the reduction between two of the prefetch cursor
// Up to this many rows weights are decoded in registers instead of into panels.
constexpr int64_t kFewAlong[kFormats] = {12, 12, 6, 6, 6, 8}, kFewAcross[kFormats] = {6, 6, 6, 6, 4, 6};

// `count` tiles of C, [R, kTileCols] one below the other, (+)= A [count R, depth], rows kDepth apart, x panel
// [depth][kTileCols]
template <int R>
__attribute__((noinline)) void tiles(int64_t count, const float* a, const float* panel, int64_t depth, float* c,
                                     int64_t ldc, bool add, Prefetch& cursor) {
  Prefetch prefetch = cursor;
  for (; count > 0; --count, a += R * kDepth, c += R * ldc) {
    V sum[R][kVectors];
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = add ? load(c + i * ldc + j * kLanes) : set1(0.0f);
    const float *x = a, *w = panel;
    int64_t k = depth;
    for (; k >= kTick; k -= kTick) {
      prefetch.tick();
#pragma GCC unroll 1
      for (int64_t i = 0; i < kTick; i += 4) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j, ++x, w += kTileCols) add_step(sum, x, w);
      }
    }
    for (; k > 0; --k, ++x, w += kTileCols) add_step(sum, x, w);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
  }
  cursor = prefetch;
}

struct Scratch {
  float *panel, *lines, *rows;
  explicit Scratch(std::byte* bytes)
      : panel(reinterpret_cast<float*>(bytes)), lines(panel + kDepth * kPanelCols), rows(lines + kDepth * kLanes) {}
};
static_assert((kDepth * (kPanelCols + kLanes + kChunk)) * sizeof(float) <= kPanelBytes);

// C (+)= A x the weights of a strip, a reduction of `length`. decode(k, depth, first column, panel) leaves kPanelCols
// columns as [kPanelCols / kTileCols][depth][kTileCols]; ahead(strip, k, n, steps) asks for n of the reduction from k
// on.
template <class Decode, class Ahead>
void by_panels(const Product& p, Format format, int64_t length, int64_t next_length, Decode decode, Ahead ahead) {
  const Scratch s(p.scratch);
  for (int64_t k = 0; k < length; k += kDepth) {
    const int64_t depth = length - k < kDepth ? length - k : kDepth;
    const bool more = k + kDepth < length;
    const int64_t from = more ? k + kDepth : 0, left = (more ? length : next_length) - from;
    Prefetch prefetch =
        ahead(more ? p.strip : p.next, from, left < kDepth ? left : kDepth,
              (p.rows + kRows - 1) / kRows * ((p.strip.count + kTileCols - 1) / kTileCols) * (depth / kTick));
    for (int64_t row = 0; row == 0 || row < p.rows; row += kChunk) {
      const int64_t rows = p.rows - row < kChunk ? p.rows - row : kChunk;
      for (int64_t r = 0; r < rows; ++r) widen(p.a, format, (row + r) * p.lda + k, depth, s.rows + r * kDepth);
      for (int64_t c = 0; c < p.strip.count; c += kPanelCols) {
        decode(k, depth, c, s);
        for (int64_t t = 0; t < kPanelCols && c + t < p.strip.count; t += kTileCols)
          for (int64_t r = 0; r < rows;) {
            // A remainder of one or two rows would not hide the latency of its sums, so the tile before it gives some
            // of its own.
            const int64_t left = rows - r, whole = left < kRows + 3 ? 1 : (left - 3) / kRows;
            const int64_t height = left <= kRows ? left : left < kRows + 3 ? (left + 1) / 2 : kRows;
            with_rows<1, kRows>(height, [&]<int R>() {
              tiles<R>(whole, s.rows + r * kDepth, s.panel + t * depth, depth, p.c + (row + r) * p.ldc + c + t, p.ldc,
                       p.add || k > 0, prefetch);
            });
            r += whole * height;
          }
      }
    }
  }
}

// Column i of the columns whose codes lie in words of kLanes stored rows, times the scales of these.
template <Format F>
inline __attribute__((always_inline)) V column_of(V words, int i, V scales) {
  switch (F) {
    case Format::kBf16:
      return i ? high_half(words) : low_half(words);
    case Format::kFp32:
      return words;
    case Format::kInt4Group32:
      return fma(int4_codes(words, i), mul(scales, set1(int4_unit(i))), mul(scales, set1(-8.0f)));
    case Format::kInt8Group128:
      return mul(int8_codes(words, i), mul(scales, set1(0x1p-24f)));
    default:
      return mul(mul(e4m3_codes(words, i), set1(0x1p120f)), scales);
  }
}

// kLanes stored rows from `row` (those past `last` as zeros), `depth` weights from k -> columns `at..` of the panel.
template <Format F>
void transpose_block(const Matrix& w, int64_t row, int64_t last, int64_t k, int64_t depth, float* lines, float* panel) {
  constexpr int kOfWord = 32 / kBits[static_cast<int>(F)];
  constexpr int64_t kStep = 4 * kOfWord;  // columns transposed at once
  constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
  const uint8_t* from = byte_at(F, w, row, k);
  int64_t step = row_bytes(F, w.cols);
  if (row + kLanes > last || depth % kStep) {  // a copy
    const int64_t bytes = bytes_of(F, depth + (F == Format::kInt4Group32));
    for (int64_t r = 0; r < kLanes; ++r) {
      float* const line = lines + r * kDepth;
      __builtin_memset(line, 0, kDepth * 4);
      if (row + r < last) __builtin_memcpy(line, from + r * step, static_cast<size_t>(bytes));
    }
    from = reinterpret_cast<const uint8_t*>(lines);
    step = kDepth * 4;
  }
  V scales;
  for (int64_t i = 0; i < depth; i += kStep) {
    if (block.bytes && (i == 0 || (k + i) % block.cols == 0)) {
      float s[kLanes] = {};
      for (int64_t r = 0; r < kLanes && row + r < last; ++r) s[r] = scale_at(F, w, row + r, k + i);
      scales = load(s);
    }
    V words[4];
    load_columns(from + bytes_of(F, i), step, words);
    float* const out = panel + i * kTileCols;
    const int64_t n = depth - i < kStep ? depth - i : kStep;
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c)
#pragma GCC unroll 8
      for (int j = 0; j < kOfWord; ++j)
        if (c * kOfWord + j < n) store(out + (c * kOfWord + j) * kTileCols, column_of<F>(words[c], j, scales));
  }
}

template <Format F>
void along(const Product& p) {
  if (p.rows <= kFewAlong[static_cast<int>(F)] && p.rows > 0) return along_few<F>(p);
  const Matrix& w = p.strip.matrix;
  const int64_t last = p.strip.first + p.strip.count;
  by_panels(
      p, F, w.cols, p.next.matrix.cols,
      [&](int64_t k, int64_t depth, int64_t c, const Scratch& s) {
        for (int64_t i = 0; i < kPanelCols && c + i < p.strip.count; i += kLanes)
          transpose_block<F>(w, p.strip.first + c + i, last, k, depth, s.lines,
                             s.panel + i / kTileCols * kTileCols * depth + i % kTileCols);
      },
      [](const Strip& next, int64_t k, int64_t n, int64_t steps) {
        return Prefetch(byte_at(F, next.matrix, next.first, k), row_bytes(F, next.matrix.cols), bytes_of(F, n),
                        next.count, steps);
      });
}

template <Format F>
void across(const Product& p) {
  if (p.rows <= kFewAcross[static_cast<int>(F)] && p.rows > 0) return across_few<F>(p);
  const Matrix& w = p.strip.matrix;
  by_panels(
      p, F, w.rows, p.next.matrix.rows,
      [&](int64_t k, int64_t depth, int64_t c, const Scratch& s) {
        const int64_t col = p.strip.first + c;
        for (int64_t r = 0; r < depth; ++r)
          for (int64_t i = 0; i < kPanelCols; i += 32) {
            V v[32 / kLanes];
            decode_32<F>(w, k + r, col + i, v);
#pragma GCC unroll 8
            for (int64_t j = 0, c = i; j < 32 / kLanes; ++j, c += kLanes)
              store(s.panel + c / kTileCols * kTileCols * depth + r * kTileCols + c % kTileCols, v[j]);
          }
      },
      [](const Strip& next, int64_t k, int64_t n, int64_t steps) {
        return Prefetch(byte_at(F, next.matrix, k, next.first), row_bytes(F, next.matrix.cols), bytes_of(F, next.count),
                        n, steps);
      });
}

#define KJAX_FORMATS(f)                                                   \
  {f<Format::kBf16>,       f<Format::kFp32>,        f<Format::kFp8Block>, \
   f<Format::kFp8Channel>, f<Format::kInt4Group32>, f<Format::kInt8Group128>}
