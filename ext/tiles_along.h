// Along stored rows, many operand rows: packed in tiles of 16 tokens, the vector, which eight stored rows, as they lie
// or decoded, are broadcast against a pair at a time. Included inside an unnamed namespace after token_tiles.h,
// decode_ahead.h and dot_rows.h.

constexpr int64_t kDotRows = 12;    // left over after whole tiles, at most; more are padded to one
constexpr int64_t kDepth = 2048;    // reduction per block of tiles
constexpr int64_t kTogether = 8;    // stored rows of a tile
constexpr int64_t kMostTiles = 16;  // of tokens, that stored rows which are decoded meet in turns

// The reduction in equal blocks, so that what is asked for ahead of one is no more than it has time for.
inline int64_t block_depth(int64_t cols) {
  const int64_t blocks = blocks_of(cols, kDepth);
  return blocks_of(blocks_of(cols, blocks > 0 ? blocks : 1), 2 * kBlock) * 2 * kBlock;
}

// Columns per visit of all token tiles with eight stored rows: as many as keep the tokens' part within a third of
// L2, for sums that are stored and loaded again cost more than tokens that come from there.
inline int64_t visit_depth(int64_t tokens) {
  constexpr int64_t kBytes = 320 << 10, kLeast = 2 * kBlock;
  const int64_t depth = kBytes / static_cast<int64_t>(16 * sizeof(uint16_t)) / tokens / kBlock * kBlock;
  return depth < kLeast ? kLeast : depth;
}

// A number the compiler knows, not of the library, whose code kernel files would share.
template <int64_t n>
struct Constant {
  constexpr operator int64_t() const { return n; }
};

// C^T [R stored rows, 16 J tokens] (+)= W [R, 32 steps] x tiles of tokens [steps][.][16 pairs][16][2], `step` apart.
// `stride` is an int64_t or a Constant; a tick every T pairs.
template <int R, int J, int T, class Stride, class Beside>
void token_tile(const uint16_t* w, Stride stride, const uint16_t* tokens, int64_t step, int64_t steps, float* c,
                int64_t ldc, bool add, Beside& cursor) {
  Beside beside = cursor;
  constexpr int kChains = J == 1 ? 2 : 1;  // sums of their own for odd pairs, where R sums could not hide the latency
  __m512 sum[kChains][R][J];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) {
      sum[kChains - 1][i][j] = _mm512_setzero_ps();
      sum[0][i][j] = add ? _mm512_load_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
    }
  for (int64_t s = 0; s < steps; ++s, tokens += step)
    for (int64_t q = 0; q < 16; q += T) {
      beside.tick();
      if constexpr (J == 3 && requires { beside.ask(); }) beside.ask();  // two tiles leave no instructions to spare
#pragma GCC unroll 16
      for (int h = 0; h < T; ++h, w += 2) {
        __m512bh x[J];
#pragma GCC unroll 3
        for (int j = 0; j < J; ++j) x[j] = as_bf16(_mm512_load_si512(tokens + j * kTile + (q + h) * 32));
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          int pair;
          __builtin_memcpy(&pair, w + i * stride, 4);
          const __m512bh y = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 3
          for (int j = 0; j < J; ++j) sum[h % kChains][i][j] = _mm512_dpbf16_ps(sum[h % kChains][i][j], y, x[j]);
        }
      }
    }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j)
      _mm512_store_ps(c + i * ldc + j * 16,
                      kChains == 1 ? sum[0][i][j] : _mm512_add_ps(sum[0][i][j], sum[kChains - 1][i][j]));
  cursor = beside;
}

// The same with nothing but requests for memory beside it: a function of its own, for one loop's addresses.
template <int R, int J, class Stride>
__attribute__((noinline)) void token_tile_alone(const uint16_t* w, Stride stride, const uint16_t* tokens, int64_t step,
                                                int64_t steps, float* c, int64_t ldc, bool add, Prefetch& prefetch) {
  token_tile<R, J, 16>(w, stride, tokens, step, steps, c, ldc, add, prefetch);
}

// Tiles of tokens in the packed part of a segment's operand rows, and the rows left over behind it. Two tiles hide
// decoding, one does not.
template <Format F>
int64_t token_tiles(int64_t rows) {
  if (!Decode<F>::kInPlace && rows < 32) return rows <= 20 ? 1 : 2;
  return rows < 16 ? 1 : rows / 16 + (rows % 16 > kDotRows);
}
template <Format F>
int64_t left_over(int64_t rows) {
  const int64_t left = rows - 16 * token_tiles<F>(rows);
  return left > 0 ? left : 0;
}

// [rows of this call][columns] -> [column block of 32][row of `rows`][32], from row `first` on.
inline void pack_rows(const uint16_t* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k,
                      int64_t depth, uint16_t* to) {
  for (int64_t i = 0; i < depth; i += 32)
    for (int64_t r = 0; r < count; ++r)
      _mm512_storeu_si512(to + ((k + i) / 32 * rows + first + r) * 32, _mm512_loadu_si512(from + r * lda + i));
}

// Layout of `along` of many rows: tiles [column block of 32][tile of tokens][16 pairs][16 rows][2], zeros beyond the
// last row; behind the room of their rows, what is left over as [column block of 32][row][32].
template <Format F>
void pack_tokens(const uint16_t* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k,
                 int64_t depth, uint16_t* packed, int64_t length) {
  const int64_t tokens = token_tiles<F>(rows), left = left_over<F>(rows);
  for (int64_t r = 0; r < count; r += 16) {
    const uint16_t* const source = from + r * lda;
    const int64_t n = count - r < 16 ? count - r : 16, tile = (first + r) / 16;
    if (tile < tokens)
      for (int64_t i = 0; i < depth; i += 32)
        pack_tile(source + i, lda, n, packed + ((k + i) / 32 * tokens + tile) * kTile);
    else pack_rows(source, lda, n, first + r - tokens * 16, left, k, depth, packed + tokens * 16 * length);
  }
}

// What products of no rows cost: their decoding.
template <Format F>
void along_nothing(const Product& p) {
  const Matrix& w = p.strip.matrix;
  if (Decode<F>::kInPlace) return;
  std::byte* const room = p.scratch + kTogether * (kDepth + 32) * sizeof(uint16_t);
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols, room);
  Prefetch none;
  for (int64_t k = 0; k < w.cols; k += kDepth)
    for (int64_t r = 0; r < p.strip.count; r += kTogether)
      decode_rows(w, tables, p.strip.first + r, p.strip.count - r < kTogether ? p.strip.count - r : kTogether, k,
                  w.cols - k < kDepth ? w.cols - k : kDepth, reinterpret_cast<uint16_t*>(p.scratch), kDepth + 32, none);
}

template <Format F>
void along_tokens(const Product& p) {
  const int64_t tokens = token_tiles<F>(p.rows), left = left_over<F>(p.rows);
  const Matrix& w = p.strip.matrix;
  constexpr Constant<kDepth + 32> kStride;
  uint16_t* const decoded = reinterpret_cast<uint16_t*>(p.scratch);                 // these and the next [8][kStride]
  float* const sums = reinterpret_cast<float*>(decoded + 2 * kTogether * kStride);  // C^T [64][16 tokens]
  float* const left_sums = sums + kLine * kMaxRows;  // C^T [64][kSums] of the rows left over
  const int64_t ldc = tokens * 16, groups = (p.strip.count + 15) / 16 * 16;
  const uint16_t* const packed = static_cast<const uint16_t*>(p.a);
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols,
                         reinterpret_cast<std::byte*>(left_sums + 2 * kLine * kSums));
  // Products fill two of four vector ports. The next rows are decoded beside them: all but the multiplications by
  // scales goes to the other two. A single tile takes turns with decoding, for its loop has no instructions to spare.
  const bool ahead = !Decode<F>::kInPlace && tokens > 1;
  const auto exist = [&](int64_t g) { return p.strip.count - g < kTogether ? p.strip.count - g : kTogether; };
  const auto rows_left_over = [&](const uint16_t* rows, int64_t stride, int64_t g, int64_t count, int64_t at,
                                  int64_t n, Prefetch& prefetch) {
    const Matrix operands{reinterpret_cast<const uint8_t*>(rows), nullptr, count, stride};
    const Tables<Format::kBf16> none(operands, 0, 0, 0, 0, nullptr);
    const int64_t together = operand_depth<Format::kBf16>(left, n);
    with_rows<1, kDotRows>(left, [&]<int R>() {
      for (int64_t i = 0; i < n; i += together)
        for (int64_t r = 0; r < count; r += 2)
          dot_tile<Format::kBf16, R, 2>(packed + tokens * 16 * p.lda + (at + i) * R, operands, none, r, count - r, i,
                                        n - i < together ? n - i : together, left_sums + (g + r) * kSums, at + i > 0,
                                        TicksLater{&prefetch});
    });
  };
  // Tiles of tokens from `first` to `last`, two or three at a time: f<J>(t).
  const auto for_tokens = [&](int64_t first, int64_t last, auto f) {
    for (int64_t t = first; t < last;) {
      const int64_t wide = last - t == 1 ? 1 : last - t == 4 || last - t == 2 ? 2 : 3;  // not 3 + 1
      if (wide == 3) f.template operator()<3>(t);
      else if (wide == 2) f.template operator()<2>(t);
      else f.template operator()<1>(t);
      t += wide;
    }
  };
  // Eight stored rows of the strip, g and on, times tiles of tokens from t on; columns [at, at + n) of them are at
  // `rows`. What is decoded beside comes a little at a time, or it would hold the products up.
  constexpr int kTick = 2;
  constexpr int64_t kTicks = 16 / kTick;  // of a step
  const auto multiply = [&]<int J>(const uint16_t* rows, auto stride, int64_t g, int64_t t, int64_t at, int64_t n,
                                   auto& beside) {
    const uint16_t* const x = packed + (at / 32 * tokens + t) * kTile;
    float* const c = sums + g * ldc + t * 16;
    if constexpr (std::is_same_v<decltype(beside), Prefetch&>)
      token_tile_alone<kTogether, J>(rows, stride, x, tokens * kTile, (n + 31) / 32, c, ldc, at > 0, beside);
    else
      token_tile<kTogether, J, kTick>(rows, stride, x, tokens * kTile, (n + 31) / 32, c, ldc, at > 0, beside);
  };
  // Tiles of more tokens than L2 has room for take turns, and stored rows are decoded for each part of them.
  const int64_t parts = blocks_of(tokens, kMostTiles), together = blocks_of(tokens, parts);
  const int64_t most = block_depth(w.cols);
  int64_t which = 0;
  for (int64_t k = 0; k < w.cols; k += most) {
    const int64_t depth = w.cols - k < most ? w.cols - k : most, steps = (depth + 31) / 32, end = k + depth;
    const bool more = end < w.cols;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? end : 0, its = block_depth(s.matrix.cols),
                  n = s.matrix.cols - from < its ? s.matrix.cols - from : its;
    // In place where the rows are operands already, all of them exist, and so do whole tiles of them.
    const bool in_place = Decode<F>::kInPlace && p.strip.count == groups && depth % 32 == 0;
    Prefetch prefetch(byte_at(F, s.matrix, s.first, from), row_bytes(F, s.matrix.cols), bytes_of(F, n), s.count,
                      groups / kTogether * steps * (parts * blocks_of(together, 3) * (ahead ? kTicks : 1) + (left > 0)) +
                          (in_place || ahead ? 0 : decode_ticks(p.strip.count, depth)),
                      scales_of<F>(s.matrix, s.first, from, n));
    if (in_place) {
      const uint16_t* const stored = reinterpret_cast<const uint16_t*>(byte_at(F, w, p.strip.first, k));
      for_tokens(0, tokens, [&]<int J>(int64_t t) {
        for (int64_t g = 0; g < groups; g += kTogether)
          multiply.template operator()<J>(stored + g * w.cols, w.cols, g, t, k, depth, prefetch);
      });
      if (left) rows_left_over(stored, w.cols, 0, groups, k, depth, prefetch);
      continue;
    }
    const auto visit = [&](int64_t at, int64_t end) {
      const int64_t whole = at == 0 && ahead ? kBlock : visit_depth(together);  // nothing hides the first decoding
      return end - at < whole ? end - at : whole;
    };
    for (int64_t part = 0; part < parts; ++part)
      for (int64_t at = k, n; at < end; at += n) {
        n = visit(at, end);
        const int64_t first = part * together, last = part + 1 < parts ? first + together : tokens;
        // The visit behind this one: of the columns that follow, or for the next part of the tokens. Behind the last
        // one begins another product, of the same tokens if it is of the same expert: their first visit is asked for.
        const int64_t after = at + n < end || part + 1 == parts ? at + n : k,
                      after_end = after < end ? end : w.cols - end < most ? w.cols : end + most,
                      after_n = visit(after, after_end),
                      after_first = at + n < end ? first : part + 1 < parts ? last : 0;
        const int64_t ticks = blocks_of(last - first, 3) * ((n + 31) / 32) * kTicks;
        TokensLater later(packed, tokens, after_first, last - first, after < w.cols ? after : 0,
                          after_n > 0 ? after_n : kBlock);
        for (int64_t g = 0; g < groups; g += kTogether) {
          uint16_t* const rows = decoded + which * kTogether * kStride;
          if (!ahead || (at == 0 && g == 0 && part == 0))
            decode_rows(w, tables, p.strip.first + g, exist(g), at, n, rows, kStride, prefetch);
          const auto multiply_all = [&](auto& beside) {
            for_tokens(first, last, [&]<int J>(int64_t t) {
              multiply.template operator()<J>(rows, kStride, g, t, at, n, beside);
            });
          };
          if (ahead) {
            which = 1 - which;
            // The next rows; or the first of them again, of the next visit.
            const int64_t row = g + kTogether < groups ? g + kTogether : 0, col = row > 0 ? at : after;
            RowsAhead<F> beside(w, tables, p.strip.first + row, col < w.cols ? exist(row) : 0, col,
                                row > 0 ? n : after_n, decoded + which * kTogether * kStride, kStride, ticks, prefetch,
                                later);
            multiply_all(beside);
            beside.finish();
            prefetch = beside.prefetch();
            later = beside.tokens();
          } else {
            multiply_all(prefetch);
          }
          if (left && part + 1 == parts && exist(g) > 0) rows_left_over(rows, kStride, g, exist(g), at, n, prefetch);
        }
      }
  }
  scale_sums(p, sums, ldc, ldc);
  if (left) scale_sums(p, left_sums, kSums, kSums);
  for (int64_t g = 0; g < groups; g += 16) {
    for (int64_t t = 0; t < tokens; ++t)
      unpack_sums(sums + g * ldc + t * 16, ldc, p.rows - t * 16, p.c + t * 16 * p.ldc + g, p.ldc, p.add);
    if (left) unpack_sums(left_sums + g * kSums, kSums, left, p.c + tokens * 16 * p.ldc + g, p.ldc, p.add);
  }
}
