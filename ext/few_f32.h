// Products of few operand rows in fp32: weights are decoded in registers, for up to six rows at a time, and never
// stored. Included inside an unnamed namespace by each float kernel file, after pieces_f32.h and prefetch.h.

// Operand rows that meet a decoded vector: with two vectors of weights their sums take twelve registers. The sums that
// INT4 has besides leave room for fewer.
template <Format F>
constexpr int kFewRows = F == Format::kInt4Group32 ? 5 : 6;

// C [R, W] (+)= A [pieces][R][kStride] x `depth` columns from k on of W stored rows from `row` on; `rows` of those
// exist, and the last stands for those missing.
template <Format F, int R, int W>
__attribute__((noinline)) void few_along(const float* a, const Matrix& w, int64_t row, int64_t rows, int64_t k,
                                         int64_t depth, float* c, int64_t ldc, bool adding, Prefetch& cursor) {
  using P = Piece<F>;
  Prefetch prefetch = cursor;
  const uint8_t *stored[W], *scales[W];
  V total[W][R];
#pragma GCC unroll 8
  for (int j = 0; j < W; ++j) {
    const int64_t at = row + (j < rows ? j : rows - 1);
    stored[j] = byte_at(F, w, at, k);
    scales[j] = scale_ptr(F, w, at, k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) total[j][r] = set1(0.0f);
  }
  PartRun<F> part[W];
  for (int64_t run; depth > 0; depth -= run) {
    run = P::kRunScales || depth < P::kRun ? P::kRun : depth / P::kRun * P::kRun;
    if (depth < P::kRun)
      for (int j = 0; j < W; ++j) {
        part[j].copy(stored[j], P::kRunScales ? scales[j] : nullptr, depth);
        stored[j] = part[j].codes, scales[j] = part[j].scales;
      }
    V sums[W][R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int j = 0; j < W; ++j)
        sums[j][r] = P::kWords ? load(a + r * P::kStride + 8 * kLanes) : P::kRunScales ? set1(0.0f) : total[j][r];
#pragma GCC unroll 1
    for (int64_t at = 0; at < run; at += P::kColumns, a += R * P::kStride) {
      prefetch.tick();
      P pieces[W];
#pragma GCC unroll 8
      for (int j = 0; j < W; ++j, stored[j - 1] += P::kBytes) pieces[j].read(stored[j]);
#pragma GCC unroll 8
      for (int i = 0; i < P::kVectors; ++i) {
        V y[W];
#pragma GCC unroll 8
        for (int j = 0; j < W; ++j) y[j] = pieces[j].vector(i);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const V x = load(a + r * P::kStride + i * kLanes);
#pragma GCC unroll 8
          for (int j = 0; j < W; ++j) add_product(sums[j][r], x, y[j]);
        }
      }
    }
#pragma GCC unroll 8
    for (int j = 0; j < W; ++j) {
      V scale;
      if constexpr (P::kRunScales) scale = P::run_scales(scales[j]);
      scales[j] += P::kRunScales;
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) total[j][r] = P::kRunScales ? fma(sums[j][r], scale, total[j][r]) : sums[j][r];
    }
  }
  for (int j = 0; j < W && j < rows; ++j) {
    const float scale = F == Format::kFp8Channel ? kCodeUnit<F> * scale_at(F, w, row + j, k) : 1.0f;
    for (int r = 0; r < R; ++r) c[r * ldc + j] = (adding ? c[r * ldc + j] : 0.0f) + scale * sum(total[j][r]);
  }
  cursor = prefetch;
}

// Rows of operands in groups of nearly equal size. f(first row, rows)
template <int most, class Then>
inline void in_groups(int64_t rows, Then f) {
  int64_t groups = (rows + most - 1) / most;
  for (int64_t r = 0, n; r < rows; r += n) f(r, n = (rows - r + groups - 1) / groups), --groups;
}

template <Format F>
void along_few(const Product& p) {
  using P = Piece<F>;
  const Matrix& w = p.strip.matrix;
  float* const arranged = reinterpret_cast<float*>(p.scratch);  // [groups][pieces][rows][kStride]
  // Columns at a time: operands stay in 24 KB of L1.
  const int64_t deepest = p.rows <= 3 ? 2048 : p.rows <= 6 ? 1024 : 512;
  for (int64_t k = 0; k < w.cols; k += deepest) {
    const int64_t depth = w.cols - k < deepest ? w.cols - k : deepest;
    const int64_t pieces = (depth + P::kRun - 1) / P::kRun * (P::kRun / P::kColumns);
    in_groups<kFewRows<F>>(p.rows, [&](int64_t first, int64_t rows) {
      float* out = arranged + first * pieces * P::kStride;
      for (int64_t i = 0; i < pieces; ++i)
        for (int64_t r = 0; r < rows; ++r, out += P::kStride) {
          const int64_t at = i * P::kColumns, number = number_size(operand_type(F));
          P::arrange(static_cast<const uint8_t*>(p.a) + ((first + r) * p.lda + k + at) * number,
                     (depth + kPad - 1) / kPad * kPad - at, out);
        }
    });
    const auto multiply = [&]<int W, int least, int most>() {
      for (int64_t c = 0; c < p.strip.count; c += W) {
        const int64_t left = p.strip.count - c;
        // next: stored rows of this strip, its next columns, or the next strip
        const bool here = left > W, more = k + deepest < w.cols;
        const Strip& s = here || more ? p.strip : p.next;
        const int64_t row = here ? c + W : 0, col = here ? k : more ? k + deepest : 0;
        const int64_t n = s.matrix.cols - col < deepest ? s.matrix.cols - col : deepest;
        Prefetch prefetch(byte_at(F, s.matrix, s.first + row, col), row_bytes(F, s.matrix.cols), bytes_of(F, n),
                          s.count - row < W ? s.count - row : W, (p.rows + kFewRows<F> - 1) / kFewRows<F> * pieces);
        in_groups<kFewRows<F>>(p.rows, [&](int64_t first, int64_t rows) {
          with_rows<least, most>(rows, [&]<int R>() {
            few_along<F, R, W>(arranged + first * pieces * P::kStride, w, p.strip.first + c, left, k, depth,
                               p.c + first * p.ldc + c, p.ldc, p.add || k > 0, prefetch);
          });
        });
      }
    };
    if (p.rows <= 2)
      multiply.template operator()<4, 1, 2>();
    else
      multiply.template operator()<2, 3, kFewRows<F>>();
  }
}

// C [pieces][R][kStride], V vectors from number `first` on of one piece or of several, (+)= A [R][kFewDepth] x `rows`
// stored rows. INT4 meets its scales here, and A times scales is summed behind the first vectors.
constexpr int64_t kFewDepth = 64;  // stored rows at a time: their lines are asked for while those before are multiplied
template <Format F, int R, int N, int first>
__attribute__((noinline)) void few_across(const float* a, const uint8_t* stored, int64_t step, const uint8_t* scales,
                                          int64_t scales_step, int64_t rows, float* sums, bool adding,
                                          Prefetch& cursor) {
  using P = Piece<F>;
  constexpr int kOfPiece = N < P::kVectors ? N : P::kVectors;
  constexpr bool kEights = P::kWords && first == 0;
  const auto at = [&](int r, int i) __attribute__((always_inline)) {
    return sums + (i / kOfPiece * R + r) * P::kStride + (first + i % kOfPiece) * kLanes;
  };
  Prefetch prefetch = cursor;
  V sum[R][N], eight[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) sum[r][i] = adding ? load(at(r, i)) : set1(0.0f);
    if (kEights) eight[r] = adding ? load(sums + r * P::kStride + 8 * kLanes) : set1(0.0f);
  }
#pragma GCC unroll 1
  for (int64_t k = 0; k < rows; ++k, stored += step, scales += scales_step) {
    prefetch.tick();
    V x[R];
    if constexpr (P::kWords) {
      const V scale = P::run_scales(scales);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        x[r] = mul(set1(a[r * kFewDepth + k]), scale);
        if (kEights) eight[r] = add(eight[r], x[r]);
      }
    }
    P piece[N / kOfPiece];
    V y[N];
#pragma GCC unroll 8
    for (int j = 0; j < N / kOfPiece; ++j) {
      piece[j].read(stored + j * P::kBytes);
#pragma GCC unroll 8
      for (int i = 0; i < kOfPiece; ++i) y[j * kOfPiece + i] = piece[j].vector(first + i);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      if constexpr (!P::kWords) x[r] = set1(a[r * kFewDepth + k]);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) add_product(sum[r][i], x[r], y[i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) store(at(r, i), sum[r][i]);
    if (kEights) store(sums + r * P::kStride + 8 * kLanes, eight[r]);
  }
  cursor = prefetch;
}

// Vectors of columns at once that leave registers for the sums of so many rows.
constexpr int few_vectors(int64_t rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }

// All vectors of a piece, or those of several at once; returns the columns.
template <Format F, int R>
int64_t few_columns(const float* a, const uint8_t* stored, int64_t step, const uint8_t* scales, int64_t scales_step,
                    int64_t rows, int64_t columns, float* sums, bool adding, Prefetch& prefetch) {
  using P = Piece<F>;
  const auto multiply = [&]<int N, int first>() {
    few_across<F, R, N, first>(a, stored, step, scales, scales_step, rows, sums, adding, prefetch);
  };
  constexpr int kMost = few_vectors(R);
  if constexpr (P::kWords) {
    multiply.template operator()<kMost, 0>();
    if constexpr (kMost <= 4) multiply.template operator()<kMost, kMost>();
    if constexpr (kMost == 2) {
      multiply.template operator()<2, 4>();
      multiply.template operator()<2, 6>();
    }
    return P::kColumns;
  } else if (kMost == 2 || columns < kMost * kLanes) {
    multiply.template operator()<2, 0>();
    return P::kColumns;
  } else {
    multiply.template operator()<kMost, 0>();
    return kMost * kLanes;
  }
}

template <Format F>
void across_few(const Product& p) {
  using P = Piece<F>;
  constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
  const Matrix& w = p.strip.matrix;
  const int64_t end = p.strip.first + p.strip.count, bytes = row_bytes(F, w.cols),
                scales_bytes = block.bytes ? scales_per_row(block, w.cols) * block.bytes : 0;
  float* const a = reinterpret_cast<float*>(p.scratch);        // [rows][kFewDepth]
  float* const scaled = a + kFewRows<F> * kFewDepth;           // times the scales of a run of columns
  float* const sums = scaled + (kFewRows<F> + 1) * kFewDepth;  // [pieces][rows][kStride]
  PartRun<F>* const copies = reinterpret_cast<PartRun<F>*>(    // of stored rows at the end of their columns
      sums + (p.strip.count + P::kColumns) / P::kColumns * p.rows * P::kStride);
  // f(first column, columns, sums) of each part of the strip that lies in a run
  const auto for_runs = [&](auto f) {
    float* at = sums;
    for (int64_t col = p.strip.first, next; col < end; col = next) {
      next = P::kRunScales && !P::kWords ? (col / P::kRun + 1) * P::kRun : end;
      if (next > end) next = end;
      f(col, next - col, at);
      at += (next - col + P::kColumns - 1) / P::kColumns * p.rows * P::kStride;
    }
  };
  for (int64_t k = 0; k < w.rows; k += kFewDepth) {
    const int64_t depth = w.rows - k < kFewDepth ? w.rows - k : kFewDepth;
    const bool more = k + kFewDepth < w.rows;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? k + kFewDepth : 0,
                  n = s.matrix.rows - from < kFewDepth ? s.matrix.rows - from : kFewDepth;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count), n,
                      depth * (p.strip.count / kLanes / few_vectors(p.rows)));
    for (int64_t r = 0; r < p.rows; ++r) widen(p.a, F, r * p.lda + k, depth, a + r * kFewDepth);
    for_runs([&](int64_t col, int64_t columns, float* at) {
      const float* x = a;
      if constexpr (block.bytes && !P::kWords) {
        float* const scale = scaled + kFewRows<F> * kFewDepth;
        for (int64_t i = 0; i < depth; ++i) scale[i] = kCodeUnit<F> * scale_at(F, w, k + i, col);
        for (int64_t r = 0; r < p.rows; ++r)
          for (int64_t i = 0; i < depth; i += kLanes)
            store(scaled + r * kFewDepth + i, mul(load(a + r * kFewDepth + i), load(scale + i)));
        x = scaled;
      }
      while (columns > 0) {
        const uint8_t *stored = byte_at(F, w, k, col), *scales = scale_ptr(F, w, k, col);
        int64_t step = bytes, scales_step = scales_bytes;
        const int64_t exist = w.cols - col;
        if (exist < P::kColumns) {
          for (int64_t r = 0; r < depth; ++r)
            copies[r].copy(stored + r * step, P::kWords ? scales + r * scales_step : nullptr, exist);
          stored = copies->codes, scales = copies->scales;
          step = scales_step = sizeof(PartRun<F>);
        }
        int64_t done = 0;
        with_rows<1, kFewRows<F>>(p.rows, [&]<int R>() {
          done = few_columns<F, R>(x, stored, step, scales, scales_step, depth, columns < exist ? columns : exist, at,
                                   k > 0, prefetch);
        });
        col += done, columns -= done;
        at += done / P::kColumns * p.rows * P::kStride;
      }
    });
  }
  for_runs([&](int64_t col, int64_t columns, float* at) {
    for (int64_t i = 0; i < columns; i += P::kColumns)
      for (int64_t r = 0; r < p.rows; ++r, at += P::kStride) {
        float* const c = p.c + r * p.ldc + col + i - p.strip.first;
        for (int64_t v = 0; v < P::kVectors; ++v)
          for (int64_t lane = 0; lane < kLanes; ++lane) {
            const int64_t column = P::column(v, lane);
            if (i + column >= columns) continue;
            float sum = at[v * kLanes + lane];
            if (P::kWords) sum = sum * int4_unit(v) - 8 * at[8 * kLanes + lane];
            c[column] = p.add ? c[column] + sum : sum;
          }
      }
  });
}
