// Products with fp32 operands in registers, written against the vector type V of the including file (kRows x kVectors
// tiles, kDepth of the reduction per block, kWidth columns per strip). Operands and weights of any format are widened
// to float blocks in scratch; bf16 products in fp32 are exact. Included inside an unnamed namespace by each float
// kernel file.

inline Dtype operand_type(Format format) { return kOperandType[static_cast<int>(format)]; }

constexpr int64_t kTileCols = kVectors * kLanes;  // columns of C per tile
constexpr int64_t kChunk = 16 * kRows;            // rows of A widened at once: they stay in L2 for all columns
constexpr int64_t kTick = 4;                      // steps of the reduction between two of the prefetch cursor
// Up to this many rows, weights go along their own row against each operand row instead of through a transposed panel.
constexpr int64_t kFewRows = 8;

inline void widen(const void* a, Format format, int64_t at, int64_t n, float* out) {
  convert(static_cast<const uint8_t*>(a) + at * number_size(operand_type(format)), operand_type(format), out,
          Dtype::kFp32, n, 0);
}

// C tile [R, kTileCols] (+)= A [R, depth], rows kDepth apart, x panel [depth][kTileCols]
template <int R>
void tile(const float* a, const float* panel, int64_t depth, float* c, int64_t ldc, bool add, Prefetch& prefetch) {
  V sum[R][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = add ? load(c + i * ldc + j * kLanes) : set1(0.0f);
  const auto step = [&]() __attribute__((always_inline)) {
    V w[kVectors];
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) w[j] = load(panel + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V x = set1(a[i * kDepth]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(x, w[j], sum[i][j]);
    }
    ++a;
    panel += kTileCols;
  };
  int64_t k = depth;
  for (; k >= kTick; k -= kTick) {
    prefetch.tick();
#pragma GCC unroll 8
    for (int64_t i = 0; i < kTick; ++i) step();
  }
  for (; k > 0; --k) step();
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) store(c + i * ldc + j * kLanes, sum[i][j]);
}

void any_tile(int64_t rows, const float* a, const float* panel, int64_t depth, float* c, int64_t ldc, bool add,
              Prefetch& prefetch) {
  switch (rows) {
    case 1:
      return tile<1>(a, panel, depth, c, ldc, add, prefetch);
    case 2:
      return tile<2>(a, panel, depth, c, ldc, add, prefetch);
    case 3:
      return tile<3>(a, panel, depth, c, ldc, add, prefetch);
    case 4:
      return tile<4>(a, panel, depth, c, ldc, add, prefetch);
    case 5:
      return tile<5>(a, panel, depth, c, ldc, add, prefetch);
    default:
      return tile<kRows>(a, panel, depth, c, ldc, add, prefetch);
  }
}

// Rows of the tile at the front of `rows`: a remainder of one or two rows would not hide the latency of its sums, so
// the tile before it gives some of its own.
inline int64_t tile_rows(int64_t rows) {
  if (rows <= kRows) return rows;
  return rows < kRows + 3 ? (rows + 1) / 2 : kRows;
}

struct Scratch {
  float *panel, *rows, *line;
  explicit Scratch(std::byte* bytes)
      : panel(reinterpret_cast<float*>(bytes)), rows(panel + kDepth * kWidth), line(rows + kDepth * kChunk) {}
};
static_assert((kDepth * (kWidth + kChunk + kLanes)) * sizeof(float) <= kPanelBytes);

// All rows of A against the panels [cols / kTileCols][depth][kTileCols] of one block of the reduction.
void multiply_panels(const Product& p, Format format, const Scratch& s, int64_t k, int64_t depth, Prefetch& prefetch) {
  for (int64_t row = 0; row < p.rows; row += kChunk) {
    const int64_t rows = p.rows - row < kChunk ? p.rows - row : kChunk;
    for (int64_t r = 0; r < rows; ++r) widen(p.a, format, (row + r) * p.lda + k, depth, s.rows + r * kDepth);
    for (int64_t c = 0; c < p.strip.count; c += kTileCols)
      for (int64_t r = 0, n; r < rows; r += n) {
        n = tile_rows(rows - r);
        any_tile(n, s.rows + r * kDepth, s.panel + c * depth, depth, p.c + (row + r) * p.ldc + c, p.ldc, p.add || k > 0,
                 prefetch);
      }
  }
}

int64_t panel_steps(const Product& p, int64_t depth) {
  return (p.rows + kRows - 1) / kRows * ((p.strip.count + kTileCols - 1) / kTileCols) * (depth / kTick);
}

// kLanes stored rows from `row` (those past `last` as zeros), `depth` weights from k -> columns `at..` of the panel.
// bf16 rows are transposed as they lie, two neighbours at once in each lane; others as floats.
template <Format F>
void transpose_block(const Matrix& w, int64_t row, int64_t last, int64_t k, int64_t depth, float* line, float* panel) {
  constexpr bool kPairs = F == Format::kBf16;
  constexpr int64_t kStep = kPairs ? 2 * kLanes : kLanes;
  for (int64_t r = 0; r < kLanes && !kPairs; ++r) {
    if (row + r < last) decode<F>(w, row + r, k, depth, line + r * kDepth);
    else __builtin_memset(line + r * kDepth, 0, static_cast<size_t>(depth) * 4);
  }
  for (int64_t i = 0; i < depth; i += kStep) {
    const int64_t n = depth - i < kStep ? depth - i : kStep;
    V block[kLanes];
    for (int64_t r = 0; r < kLanes; ++r) {
      if constexpr (kPairs) {
        const uint8_t* stored = byte_at(F, w, row + r, k + i);
        block[r] = set1(0.0f);
        if (row + r >= last) continue;
        if (n < kStep) {
          __builtin_memset(line, 0, kStep * 2);
          stored = static_cast<const uint8_t*>(__builtin_memcpy(line, stored, static_cast<size_t>(n) * 2));
        }
        block[r] = load(reinterpret_cast<const float*>(stored));
      } else {
        block[r] = load(line + r * kDepth + i);
      }
    }
    transpose(block);
    float* out = panel + i * kTileCols;
    if constexpr (kPairs) {
      for (int64_t r = 0; r < n; r += 2, out += 2 * kTileCols) {
        store(out, low_half(block[r / 2]));
        if (r + 1 < n) store(out + kTileCols, high_half(block[r / 2]));
      }
    } else {
      for (int64_t r = 0; r < n; ++r, out += kTileCols) store(out, block[r]);
    }
  }
}

// R operand rows x 4 stored rows, both along k.
template <int R>
void dot(const float* a, int64_t lda, const float* w, int64_t ldw, int64_t n, float* c, int64_t ldc, bool add,
         Prefetch& prefetch) {
  V sums[R][4];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[i][j] = set1(0.0f);
  for (int64_t k = 0; k < n; k += kLanes) {
    V x[R];
    prefetch.tick();
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) x[i] = load(a + i * lda + k);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const V y = load(w + j * ldw + k);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) sums[i][j] = fma(x[i], y, sums[i][j]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < 4; ++j) c[i * ldc + j] = (add ? c[i * ldc + j] : 0.0f) + sum(sums[i][j]);
}

// Few operand rows: blocks of kFewDepth weights of 4 stored rows are widened in L1 and used at once. Rows of the blocks
// lie a line more than 4 KB apart, where they do not share L1 sets.
constexpr int64_t kFewDepth = 1024, kFewStride = kFewDepth + 16, kDotRows = 3;
template <Format F>
void along_few(const Product& p) {
  float* const a = reinterpret_cast<float*>(p.scratch);  // [kFewRows][kFewStride]
  float* const w = a + kFewRows * kFewStride;            // [4][kFewStride]
  const int64_t k_end = p.strip.matrix.cols;
  for (int64_t k = 0; k < k_end; k += kFewDepth) {
    const int64_t depth = k_end - k < kFewDepth ? k_end - k : kFewDepth, whole = (depth + kLanes - 1) / kLanes * kLanes;
    for (int64_t r = 0; r < p.rows; ++r) {
      widen(p.a, F, r * p.lda + k, depth, a + r * kFewStride);
      for (int64_t i = depth; i < whole; ++i) a[r * kFewStride + i] = 0.0f;
    }
    for (int64_t c = 0; c < p.strip.count; c += 4) {
      const int64_t ahead = p.strip.count - c - 4 < 4 ? p.strip.count - c - 4 : 4;
      Prefetch prefetch(byte_at(F, p.strip.matrix, p.strip.first + c + 4, k), row_bytes(F, k_end), bytes_of(F, depth),
                        ahead, (p.rows + kDotRows - 1) / kDotRows * (whole / kLanes));
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t row = c + j < p.strip.count ? c + j : p.strip.count - 1;  // a repeated row fills up the last four
        decode<F>(p.strip.matrix, p.strip.first + row, k, depth, w + j * kFewStride);
        for (int64_t i = depth; i < whole; ++i) w[j * kFewStride + i] = 0.0f;
      }
      for (int64_t r = 0; r < p.rows; r += kDotRows) {
        const float* const x = a + r * kFewStride;
        float* const out = p.c + r * p.ldc + c;
        const bool add = p.add || k > 0;
        if (p.rows - r >= 3) dot<3>(x, kFewStride, w, kFewStride, whole, out, p.ldc, add, prefetch);
        else if (p.rows - r == 2) dot<2>(x, kFewStride, w, kFewStride, whole, out, p.ldc, add, prefetch);
        else dot<1>(x, kFewStride, w, kFewStride, whole, out, p.ldc, add, prefetch);
      }
    }
  }
}

template <Format F>
void along(const Product& p) {
  if (p.rows <= kFewRows) return along_few<F>(p);
  const Scratch s(p.scratch);
  const Matrix& w = p.strip.matrix;
  for (int64_t k = 0; k < w.cols; k += kDepth) {
    const int64_t depth = w.cols - k < kDepth ? w.cols - k : kDepth, last = p.strip.first + p.strip.count;
    for (int64_t c = 0; c < (p.strip.count + kTileCols - 1) / kTileCols * kTileCols; c += kLanes)
      transpose_block<F>(w, p.strip.first + c, last, k, depth, s.line,
                         s.panel + c / kTileCols * kTileCols * depth + c % kTileCols);
    const bool more = k + kDepth < w.cols;
    const Strip& next = more ? p.strip : p.next;
    const int64_t from = more ? k + kDepth : 0, n = next.matrix.cols - from < kDepth ? next.matrix.cols - from : kDepth;
    Prefetch prefetch(byte_at(F, next.matrix, next.first, from), row_bytes(F, next.matrix.cols), bytes_of(F, n),
                      next.count, panel_steps(p, depth));
    multiply_panels(p, F, s, k, depth, prefetch);
  }
}

template <Format F>
void across(const Product& p) {
  const Scratch s(p.scratch);
  const Matrix& w = p.strip.matrix;
  const int64_t whole = (p.strip.count + kTileCols - 1) / kTileCols * kTileCols;
  for (int64_t i = p.strip.count; i < whole; ++i) s.line[i] = 0.0f;
  for (int64_t k = 0; k < w.rows; k += kDepth) {
    const int64_t depth = w.rows - k < kDepth ? w.rows - k : kDepth;
    for (int64_t r = 0; r < depth; ++r) {
      const auto at = [&](int64_t c) {
        return s.panel + c / kTileCols * kTileCols * depth + r * kTileCols + c % kTileCols;
      };
      if (F == Format::kBf16 && p.strip.count == whole) {
        const uint16_t* const stored = reinterpret_cast<const uint16_t*>(byte_at(F, w, k + r, p.strip.first));
        for (int64_t c = 0; c < whole; c += kLanes) store(at(c), load_bf16(stored + c));
      } else {
        decode<F>(w, k + r, p.strip.first, p.strip.count, s.line);
        for (int64_t c = 0; c < whole; c += kLanes) store(at(c), load(s.line + c));
      }
    }
    const bool more = k + kDepth < w.rows;
    const Strip& next = more ? p.strip : p.next;
    const int64_t from = more ? k + kDepth : 0, n = next.matrix.rows - from < kDepth ? next.matrix.rows - from : kDepth;
    Prefetch prefetch(byte_at(F, next.matrix, from, next.first), row_bytes(F, next.matrix.cols),
                      bytes_of(F, next.count), n, panel_steps(p, depth));
    multiply_panels(p, F, s, k, depth, prefetch);
  }
}

#define KJAX_FORMATS(f)                                                   \
  {f<Format::kBf16>,       f<Format::kFp32>,        f<Format::kFp8Block>, \
   f<Format::kFp8Channel>, f<Format::kInt4Group32>, f<Format::kInt8Group128>}
