// Products with fp32 operands in registers, written against the vector type V of the including file (kRows x kVectors
// tiles). Operands and weights of any format are widened to float blocks in scratch; bf16 products in fp32 are exact.
// Included inside an unnamed namespace by each float kernel file.

inline Dtype operand_type(Format format) { return kOperandType[static_cast<int>(format)]; }

constexpr int64_t kTileCols = kVectors * kLanes;  // columns of C per tile
constexpr int64_t kDepth = 256;                   // reduction per block: a panel of kLine columns is 64 KB
constexpr int64_t kChunk = 16 * kRows;            // rows of A widened at once: 96 x 256 floats are 96 KB
// Below this many rows, weights go along their own row against each operand row instead of through a transposed panel.
constexpr int64_t kFewRows = 8;

inline void widen(const void* a, Format format, int64_t at, int64_t n, float* out) {
  convert(static_cast<const uint8_t*>(a) + at * number_size(operand_type(format)), operand_type(format), out,
          Dtype::kFp32, n, 0);
}

// A [rows, depth] -> tiles of [depth][kRows]
inline void pack_rows(const Product& p, Format format, int64_t row, int64_t rows, int64_t k, int64_t depth, float* line,
                      float* out) {
  for (int64_t r = 0; r < rows; ++r) {
    widen(p.a, format, (row + r) * p.lda + k, depth, line);
    float* tile = out + r / kRows * kRows * depth + r % kRows;
    for (int64_t i = 0; i < depth; ++i) tile[i * kRows] = line[i];
  }
}

// C tile [R, kTileCols] (+)= A tile [depth][kRows] x panel [depth][kTileCols]
template <int R>
void tile(const float* a, const float* panel, int64_t depth, float* c, int64_t ldc, bool add, Prefetch& prefetch) {
  V sum[R][kVectors];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) sum[i][j] = add ? load(c + i * ldc + j * kLanes) : set1(0.0f);
  for (int64_t k = 0; k < depth; ++k, a += kRows, panel += kTileCols) {
    V w[kVectors];
    prefetch.tick();
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) w[j] = load(panel + j * kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const V x = set1(a[i]);
#pragma GCC unroll 8
      for (int j = 0; j < kVectors; ++j) sum[i][j] = fma(x, w[j], sum[i][j]);
    }
  }
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

struct Scratch {
  float *panel, *rows, *line;
  explicit Scratch(std::byte* bytes)
      : panel(reinterpret_cast<float*>(bytes)), rows(panel + kDepth * 4 * kLine), line(rows + kDepth * kChunk) {}
};

// All rows of A against the panels [cols / kTileCols][depth][kTileCols] of one block of the reduction.
void multiply_panels(const Product& p, Format format, const Scratch& s, int64_t k, int64_t depth, Prefetch& prefetch) {
  for (int64_t row = 0; row < p.rows; row += kChunk) {
    const int64_t rows = p.rows - row < kChunk ? p.rows - row : kChunk;
    pack_rows(p, format, row, rows, k, depth, s.line, s.rows);
    for (int64_t c = 0; c < p.strip.count; c += kTileCols)
      for (int64_t r = 0; r < rows; r += kRows)
        any_tile(rows - r < kRows ? rows - r : kRows, s.rows + r * depth, s.panel + c * depth, depth,
                 p.c + (row + r) * p.ldc + c, p.ldc, p.add || k > 0, prefetch);
  }
}

int64_t panel_steps(const Product& p, int64_t depth) {
  return (p.rows + kRows - 1) / kRows * ((p.strip.count + kTileCols - 1) / kTileCols) * depth;
}

// kLanes stored rows from `row` (those past `last` as zeros), `depth` weights from k -> columns `at..` of the panel
void transpose_block(Format format, const Matrix& w, int64_t row, int64_t last, int64_t k, int64_t depth, float* line,
                     float* panel) {
  V block[kLanes];
  for (int64_t r = 0; r < kLanes; ++r) {
    float* out = line + r * kDepth;
    if (row + r < last) decode_row(format, w, row + r, k, depth, out);
    else __builtin_memset(out, 0, static_cast<size_t>(depth) * 4);
  }
  for (int64_t i = 0; i < depth; i += kLanes) {
    const int64_t n = depth - i < kLanes ? depth - i : kLanes;
    for (int64_t r = 0; r < kLanes; ++r) block[r] = load(line + r * kDepth + i);
    transpose(block);
    for (int64_t r = 0; r < n; ++r) store(panel + (i + r) * kTileCols, block[r]);
  }
}

// R operand rows x 4 stored rows, both along k.
template <int R>
void dot(const float* const* a, const float* const* w, int64_t n, float* c, int64_t ldc, bool add, Prefetch& prefetch) {
  V sums[R][4];
#pragma GCC unroll 4
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sums[i][j] = set1(0.0f);
  for (int64_t k = 0; k < n; k += kLanes) {
    V x[4];
    prefetch.tick();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) x[j] = load(w[j] + k);
#pragma GCC unroll 4
    for (int i = 0; i < R; ++i) {
      const V y = load(a[i] + k);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[i][j] = fma(y, x[j], sums[i][j]);
    }
  }
  for (int i = 0; i < R; ++i)
    for (int j = 0; j < 4; ++j) c[i * ldc + j] = (add ? c[i * ldc + j] : 0.0f) + sum(sums[i][j]);
}

// Few operand rows: blocks of kFewDepth weights of 4 stored rows are widened in L1 and used at once.
constexpr int64_t kFewDepth = 1024;
void along_few(const Product& p, Format format) {
  float* const a = reinterpret_cast<float*>(p.scratch);  // [kFewRows][kFewDepth]
  float* const w = a + kFewRows * kFewDepth;             // [4][kFewDepth]
  const float *x[4], *y[2];
  const int64_t k_end = p.strip.matrix.cols;
  for (int64_t k = 0; k < k_end; k += kFewDepth) {
    const int64_t depth = k_end - k < kFewDepth ? k_end - k : kFewDepth, whole = (depth + kLanes - 1) / kLanes * kLanes;
    for (int64_t r = 0; r < p.rows; ++r) {
      widen(p.a, format, r * p.lda + k, depth, a + r * kFewDepth);
      for (int64_t i = depth; i < whole; ++i) a[r * kFewDepth + i] = 0.0f;
    }
    for (int64_t c = 0; c < p.strip.count; c += 4) {
      const int64_t ahead = p.strip.count - c - 4 < 4 ? p.strip.count - c - 4 : 4;
      Prefetch prefetch(byte_at(format, p.strip.matrix, p.strip.first + c + 4, k), row_bytes(format, k_end),
                        bytes_of(format, depth), ahead, (p.rows + 1) / 2 * (whole / kLanes));
      for (int64_t j = 0; j < 4; ++j) {
        const int64_t row = c + j < p.strip.count ? c + j : p.strip.count - 1;  // a repeated row fills up the last four
        decode_row(format, p.strip.matrix, p.strip.first + row, k, depth, w + j * kFewDepth);
        for (int64_t i = depth; i < whole; ++i) w[j * kFewDepth + i] = 0.0f;
        x[j] = w + j * kFewDepth;
      }
      for (int64_t r = 0; r < p.rows; r += 2) {
        y[0] = a + r * kFewDepth;
        y[1] = y[0] + kFewDepth;
        float* out = p.c + r * p.ldc + c;
        if (p.rows - r > 1) dot<2>(y, x, whole, out, p.ldc, p.add || k > 0, prefetch);
        else dot<1>(y, x, whole, out, p.ldc, p.add || k > 0, prefetch);
      }
    }
  }
}

template <Format F>
void along(const Product& p) {
  if (p.rows <= kFewRows) return along_few(p, F);
  const Scratch s(p.scratch);
  const Matrix& w = p.strip.matrix;
  for (int64_t k = 0; k < w.cols; k += kDepth) {
    const int64_t depth = w.cols - k < kDepth ? w.cols - k : kDepth, last = p.strip.first + p.strip.count;
    for (int64_t c = 0; c < (p.strip.count + kTileCols - 1) / kTileCols * kTileCols; c += kLanes)
      transpose_block(F, w, p.strip.first + c, last, k, depth, s.rows,
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
  for (int64_t k = 0; k < w.rows; k += kDepth) {
    const int64_t depth = w.rows - k < kDepth ? w.rows - k : kDepth;
    for (int64_t c = 0; c < p.strip.count; c += kTileCols) {
      const int64_t n = p.strip.count - c < kTileCols ? p.strip.count - c : kTileCols;
      float* panel = s.panel + c * depth;
      for (int64_t r = 0; r < depth; ++r, panel += kTileCols) {
        decode_row(F, w, k + r, p.strip.first + c, n, panel);
        for (int64_t i = n; i < kTileCols; ++i) panel[i] = 0.0f;
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
