// The fewest operand rows of the formats whose stored rows have scales: codes become floats in registers, which takes
// the fewest instructions, and sums of them are multiplied by the scales of their groups. A dot product of bf16 counts
// for two of these, but so few rows do not make up for rounding weights to it.
// Included inside an unnamed namespace after lanes_across.h.

constexpr int64_t kFloatRowsAlong = 2, kFloatRows = 3;  // at most, along and across

// How the codes of 128 columns of a stored row become eight vectors of floats.
//   load(p)          the codes at p, as far as they are loaded at once
//   vector(codes, i) vector i; i is known after unrolling
//   scales(p)        what a lane's sum over the vectors is multiplied by
//   from_columns(c), to_columns(c)   128 numbers from the order of columns to that of vectors, and back
template <Format F>
struct Floats;

template <>
struct Floats<Format::kInt8Group128> {
  static inline __attribute__((always_inline)) const uint8_t* load(const uint8_t* p) { return p; }
  static inline __attribute__((always_inline)) __m512 vector(const uint8_t* p, int i) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + 16 * i))));
  }
  static inline __attribute__((always_inline)) __m512 scales(const uint8_t* p) { return broadcast_bf16(p); }
  static inline void from_columns(float*) {}
  static inline void to_columns(float*) {}
};

// A lane has the eight codes of a word: vector i its i-th, and a group's scale is that of four lanes.
template <>
struct Floats<Format::kInt4Group32> {
  static inline __attribute__((always_inline)) __m512i load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static inline __attribute__((always_inline)) __m512 vector(__m512i codes, int i) {
    return _mm512_permutexvar_ps(_mm512_srli_epi32(codes, static_cast<unsigned>(4 * i)),
                                 _mm512_load_ps(kInt4Constants.codes));
  }
  static inline __attribute__((always_inline)) __m512 scales(const uint8_t* p) {
    int64_t four;
    __builtin_memcpy(&four, p, 8);
    constexpr int a = 0x01008080, b = 0x03028080, c = 0x05048080, d = 0x07068080;  // each to the upper half of a float
    const __m512i order = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
    return _mm512_castsi512_ps(_mm512_shuffle_epi8(_mm512_set1_epi64(four), order));
  }
  static inline void from_columns(float* c) {
    __m512i lines[16];
    for (int j = 0; j < 16; ++j)
      lines[j] = _mm512_castsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(c + 8 * j)));
    transpose(lines);
    for (int i = 0; i < 8; ++i) _mm512_storeu_si512(c + 16 * i, lines[i]);
  }
  static inline void to_columns(float* c) {
    __m512i lines[16];
    for (int i = 0; i < 16; ++i) lines[i] = i < 8 ? _mm512_loadu_si512(c + 16 * i) : _mm512_setzero_si512();
    transpose(lines);
    for (int j = 0; j < 16; ++j)
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(c + 8 * j), _mm512_castsi512_si256(lines[j]));
  }
};

// Of a line of columns of a stored row, from a multiple of 128 on: its codes, and the scales of its groups.
constexpr int64_t kLineColumns = 128;
template <Format F>
constexpr int64_t kLineCodes = kLineColumns * kBits[static_cast<int>(F)] / 8;
template <Format F>
constexpr int64_t kLineScales =
    kLineColumns / kScaleBlock[static_cast<int>(F)].cols * kScaleBlock[static_cast<int>(F)].bytes;

// A copy of n columns of a stored row, where a whole line does not lie, and zeros.
template <Format F>
struct PartLine {
  alignas(64) uint8_t codes[kLineCodes<F>];
  uint8_t scales[8];
  void copy(const uint8_t* from, const uint8_t* of_groups, int64_t n) {
    constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
    *this = {};
    __builtin_memcpy(codes, from, static_cast<size_t>(bytes_of(F, n + (F == Format::kInt4Group32))));
    __builtin_memcpy(scales, of_groups, static_cast<size_t>(scales_per_row(block, n) * block.bytes));
  }
};

// Sums [W stored rows][R of kSums operand rows] (+)= W [W, depth] x A [lines][R][128], as from_columns leaves them and
// zero from depth on. Stored rows from (row, k) on, k a multiple of 128; n of them exist, and the last stands for those
// missing.
template <Format F, int R, int W>
void float_tile(const float* a, const Matrix& w, int64_t row, int64_t n, int64_t k, int64_t depth, float* sums,
                bool add, const RowsLater<F, W>& later) {
  __m512 total[W][R];
  const uint8_t *stored[W], *scales[W];
#pragma GCC unroll 4
  for (int j = 0; j < W; ++j) {
    const int64_t at = row + (j < n ? j : n - 1);
    stored[j] = byte_at(F, w, at, k);
    scales[j] = scale_ptr(F, w, at, k);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) total[j][r] = _mm512_setzero_ps();
  }
  PartLine<F> part[W];
  for (int64_t at = 0; depth > 0; depth -= kLineColumns, at += kLineColumns) {
    later.ask(at);
    if (depth < kLineColumns)
      for (int j = 0; j < W; ++j) {
        part[j].copy(stored[j], scales[j], depth);
        stored[j] = part[j].codes, scales[j] = part[j].scales;
      }
    decltype(Floats<F>::load(nullptr)) codes[W];
    __m512 sum[W][R];
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) codes[j] = Floats<F>::load(stored[j]);
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) {
      __m512 x[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) x[r] = _mm512_load_ps(a + r * kLineColumns + 16 * i);
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) {
        const __m512 y = Floats<F>::vector(codes[j], i);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r) sum[j][r] = i ? _mm512_fmadd_ps(y, x[r], sum[j][r]) : _mm512_mul_ps(y, x[r]);
      }
    }
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) {
      const __m512 scale = Floats<F>::scales(scales[j]);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) total[j][r] = _mm512_fmadd_ps(sum[j][r], scale, total[j][r]);
      stored[j] += kLineCodes<F>;
      scales[j] += kLineScales<F>;
    }
    a += R * kLineColumns;
  }
#pragma GCC unroll 4
  for (int j = 0; j < W; ++j) {
    const __m512 all = sums_of(total[j]);
    _mm512_store_ps(sums + j * kSums, add ? _mm512_add_ps(_mm512_load_ps(sums + j * kSums), all) : all);
  }
}

// Operand rows as dot products take them, [blocks of 32 columns][R][32], into lines for float_tile.
template <Format F>
void widen_lines(const uint16_t* from, int64_t rows, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; k += kLineColumns)
    for (int64_t r = 0; r < rows; ++r, to += kLineColumns) {
      for (int64_t i = 0; i < kLineColumns; i += kLanes) {
        const int64_t at = k + i;
        store(to + i, at / 32 * 32 < depth ? load_bf16(from + (at / 32 * rows + r) * 32 + at % 32) : set1(0));
      }
      Floats<F>::from_columns(to);
    }
}

template <Format F>
void along_floats(const Product& p) {
  constexpr int64_t kDeepest = 4096;  // two rows of floats in 32 KB of L1
  constexpr int kTogether = 4;        // stored rows
  float* const sums = reinterpret_cast<float*>(p.scratch);
  float* const x = sums + 2 * kLine * kSums;  // up to kDeepest + kBlock columns
  along_groups<F, kTogether>(p, kDeepest, sums, [&](int64_t stored, int64_t k, int64_t depth, const auto& later) {
    if (stored == 0) widen_lines<F>(static_cast<const uint16_t*>(p.a) + k * p.rows, p.rows, depth, x);
    with_rows<1, kFloatRowsAlong>(p.rows, [&]<int R>() {
      float_tile<F, R, kTogether>(x, p.strip.matrix, p.strip.first + stored, p.strip.count - stored, k, depth,
                                  sums + stored * kSums, k > 0, later);
    });
  });
}

// Sums [R][8 vectors] (+)= A [R, rows] x `rows` stored rows of a line, vectors [first, first + V); A's rows are
// kPairsDepth apart.
template <Format F, int R, int V, int first>
void float_line(const float* a, const uint8_t* stored, int64_t step, const uint8_t* scales, int64_t scales_step,
                int64_t rows, float* sums, bool add, LinesLater& later) {
  __m512 sum[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i)
      sum[r][i] = add ? _mm512_load_ps(sums + r * kLineColumns + 16 * (first + i)) : _mm512_setzero_ps();
  for (int64_t k = 0; k < rows; ++k, stored += step, scales += scales_step) {
    later.ask();
    const __m512 scale = Floats<F>::scales(scales);
    const auto codes = Floats<F>::load(stored);
    __m512 x[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) x[r] = _mm512_mul_ps(_mm512_set1_ps(a[r * kPairsDepth + k]), scale);
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) {
      const __m512 y = Floats<F>::vector(codes, first + i);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sum[r][i] = _mm512_fmadd_ps(x[r], y, sum[r][i]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int i = 0; i < V; ++i) _mm512_store_ps(sums + r * kLineColumns + 16 * (first + i), sum[r][i]);
}

template <Format F>
void across_floats(const Product& p) {
  const Matrix& w = p.strip.matrix;
  constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
  const int64_t end = p.strip.first + p.strip.count, row_size = row_bytes(F, w.cols),
                scales_size = scales_per_row(block, w.cols) * block.bytes;
  float* const x = reinterpret_cast<float*>(p.scratch);  // [rows][kPairsDepth]
  float* const sums = x + kFloatRows * kPairsDepth;      // [lines][rows][128]
  constexpr int64_t kLines = 3;                          // 256 columns may begin and end within one
  PartLine<F>* const copies = reinterpret_cast<PartLine<F>*>(sums + kLines * kFloatRows * kLineColumns);  // of the rows
  // f(first column, columns, sums) of each line
  const auto for_lines = [&](auto f) {
    float* at = sums;
    for (int64_t col = p.strip.first, next; col < end; col = next, at += p.rows * kLineColumns) {
      next = (col / kLineColumns + 1) * kLineColumns < end ? (col / kLineColumns + 1) * kLineColumns : end;
      f(col, next - col, at);
    }
  };
  for (int64_t k = 0; k < w.rows; k += kPairsDepth) {
    const int64_t depth = w.rows - k < kPairsDepth ? w.rows - k : kPairsDepth;
    LinesLater later = visit_after<F>(p, k);
    for (int64_t r = 0; r < p.rows; ++r)
      for (int64_t i = 0; i < depth; i += kLanes)
        store(x + r * kPairsDepth + i, load_bf16_n(operands(p, r, k) + i, depth - i < kLanes ? depth - i : kLanes));
    for_lines([&](int64_t col, int64_t n, float* at) {
      const uint8_t* stored = byte_at(F, w, k, col);
      const uint8_t* scales = scale_ptr(F, w, k, col);
      int64_t step = row_size, scales_step = scales_size;
      if (n < kLineColumns) {
        for (int64_t r = 0; r < depth; ++r) copies[r].copy(stored + r * step, scales + r * scales_step, n);
        stored = copies->codes, scales = copies->scales;
        step = scales_step = sizeof(PartLine<F>);
      }
      const auto multiply = [&]<int R, int V, int first>() {
        float_line<F, R, V, first>(x, stored, step, scales, scales_step, depth, at, k > 0, later);
      };
      with_rows<1, 2>(p.rows, [&]<int R>() { multiply.template operator()<R, 8, 0>(); });
      with_rows<3, kFloatRows>(p.rows, [&]<int R>() {
        multiply.template operator()<R, 4, 0>();
        multiply.template operator()<R, 4, 4>();
      });
    });
    later.finish();
  }
  for_lines([&](int64_t col, int64_t n, float* at) {
    for (int64_t r = 0; r < p.rows; ++r, at += kLineColumns) {
      Floats<F>::to_columns(at);
      float* const c = p.c + r * p.ldc + col - p.strip.first;
      for (int64_t i = 0; i < n; i += kLanes) store(c + i, p.add ? add(load(c + i), load(at + i)) : load(at + i));
    }
  });
}
