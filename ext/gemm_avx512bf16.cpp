// AVX512-BF16 kernels, chosen by an expert's number of rows and each prefetching the weights that come next.
//   along : stored rows are read as they lie, or decoded to rows. Few operand rows meet them in dot products; more are
//           packed in tiles of 16 tokens, the vector, and the stored row is broadcast a pair at a time. Nothing is
//           transposed but the sums.
//   across: two stored rows are interleaved into a panel of vectors, and operand rows are broadcast.
#include <immintrin.h>

#include <utility>

#include "kernels.h"

namespace kjax {
namespace {

#include "simd_avx512.h"
#include "token_tiles.h"
#include "prefetch.h"
#include "decode_avx512.h"
#include "decode_ahead.h"

// Up to kDotOnly rows the dot kernel takes all. Of more, it takes what is left over after whole tiles of 16 tokens, up
// to kDotRows; more are padded to a tile.
constexpr int64_t kDotOnly = 12, kDotRows = 8;
constexpr int64_t kDepth = 2048;       // along: reduction per block; one horizontal sum per 4 x 6 tile stays below 3 %
constexpr int64_t kTileDepth = 256;    // of it, per visit of the token tiles: 48 tokens are 24 KB of L1; decoded rows
                                       // of one visit are made beside the products of the visit before
constexpr int64_t kAcrossDepth = 256;  // across: a panel of one line of 64 columns is 32 KB of L1
constexpr int64_t kFewRows = 16, kFewDepth = 64;  // few rows: a panel of all lines is, so rows are read whole

inline const uint16_t* operands(const Product& p, int64_t row, int64_t k) {
  return static_cast<const uint16_t*>(p.a) + row * p.lda + k;
}
inline __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

// C [R, 64 L] (+)= A [R, 2 * pairs] x L panels [pairs][64][2]
template <int R, int L>
void panel_tile(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t pairs, float* c, int64_t ldc, bool add,
                Prefetch& cursor) {
  Prefetch prefetch = cursor;
  __m512 sum[R][4 * L];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 4 * L; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k) {
    prefetch.tick();
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
      const uint16_t* const line = panel + (l * pairs + k) * kLine * 2;
      __m512bh w[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        w[j] = as_bf16(_mm512_load_si512(line + j * 32));
        if (R > 3) __builtin_prefetch(line + (16 * 4 + j) * 32, 0, 3);  // sixteen steps ahead, where L1 lost the panel
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        int pair;
        __builtin_memcpy(&pair, a + i * lda + 2 * k, 4);
        const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[i][4 * l + j] = _mm512_dpbf16_ps(sum[i][4 * l + j], x, w[j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 4 * L; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sum[i][j]);
  cursor = prefetch;
}

// Four horizontal sums at once.
inline __m128 sum4(__m512 s0, __m512 s1, __m512 s2, __m512 s3) {
  const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(s0, s1), _mm512_unpackhi_ps(s0, s1));
  const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(s2, s3), _mm512_unpackhi_ps(s2, s3));
  const __m512d xd = _mm512_castps_pd(x), yd = _mm512_castps_pd(y);
  const __m512 z =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(xd, yd)), _mm512_castpd_ps(_mm512_unpackhi_pd(xd, yd)));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
  return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

// C [R, W] (+)= A [R, depth] x W stored rows [W, depth], both along k; A in blocks [depth / 32][R of `step`][32]. Of C,
// `cols` columns are written.
template <int R, int W>
void dot_tile(const uint16_t* a, int64_t step, const uint16_t* const (&w)[W], int64_t depth, float* c, int64_t ldc,
              int64_t cols, bool add, Prefetch& cursor) {
  Prefetch prefetch = cursor;
  __m512 sum[R * W + 3];
#pragma GCC unroll 32
  for (int i = 0; i < R * W + 3; ++i) sum[i] = _mm512_setzero_ps();
  const auto multiply = [&](const __m512bh(&y)[W]) {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const __m512bh x = as_bf16(_mm512_loadu_si512(a + i * 32));
#pragma GCC unroll 4
      for (int j = 0; j < W; ++j) sum[i * W + j] = _mm512_dpbf16_ps(sum[i * W + j], x, y[j]);
    }
  };
  __m512bh y[W];
  int64_t k = 0;
  for (; k + 32 <= depth; k += 32, a += step * 32) {
    prefetch.tick();
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) y[j] = as_bf16(_mm512_loadu_si512(w[j] + k));
    multiply(y);
  }
  if (k < depth) {  // the stored row ends here; the operand row goes on in zeros
#pragma GCC unroll 4
    for (int j = 0; j < W; ++j) y[j] = as_bf16(_mm512_maskz_loadu_epi16(first_halves(depth - k), w[j] + k));
    multiply(y);
  }
  alignas(16) float sums[R * W + 3];
#pragma GCC unroll 8
  for (int i = 0; i < R * W; i += 4) _mm_store_ps(sums + i, sum4(sum[i], sum[i + 1], sum[i + 2], sum[i + 3]));
  for (int i = 0; i < R; ++i)
    for (int64_t j = 0; j < cols; ++j) c[i * ldc + j] = (add ? c[i * ldc + j] : 0.0f) + sums[i * W + j];
  cursor = prefetch;
}

// Calls f<R>(first row) for equal parts of at most `most` rows: a row or two of accumulators left over alone could not
// hide the latency of the dot product.
template <int most, class F>
inline void for_tiles(int64_t rows, F f) {
  for (int64_t r = 0, parts = (rows + most - 1) / most; parts > 0; --parts) {
    const int64_t n = (rows - r + parts - 1) / parts;
    [&]<int... R>(std::integer_sequence<int, R...>) {
      ((n == R + 1 ? f.template operator()<R + 1>(r) : void()), ...);
    }(std::make_integer_sequence<int, most>());
    r += n;
  }
}
constexpr int kTileRows = 6;  // x 4 vectors: twenty-four accumulators
inline int64_t tiles(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

// A number the compiler knows, not of the library, whose code kernel files would share.
template <int64_t n>
struct Constant {
  constexpr operator int64_t() const { return n; }
};

// C^T [R stored rows, 16 J tokens] (+)= W [R, 32 steps] x tiles of tokens [steps][.][16 pairs][16][2], `step` apart.
// `stride` is an int64_t or a Constant.
template <int R, int J, class Stride, class Beside>
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
  for (int64_t s = 0; s < steps; ++s, tokens += step) {
    beside.tick();
#pragma GCC unroll 8
    for (int64_t q = 0; q < 16; q += kChains, w += 2 * kChains) {
#pragma GCC unroll 2
      for (int h = 0; h < kChains; ++h) {
        __m512bh x[J];
#pragma GCC unroll 3
        for (int j = 0; j < J; ++j) x[j] = as_bf16(_mm512_load_si512(tokens + j * kTile + (q + h) * 32));
#pragma GCC unroll 8
        for (int i = 0; i < R; ++i) {
          int pair;
          __builtin_memcpy(&pair, w + i * stride + 2 * h, 4);
          const __m512bh y = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 3
          for (int j = 0; j < J; ++j) sum[h][i][j] = _mm512_dpbf16_ps(sum[h][i][j], y, x[j]);
        }
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

// Tiles of tokens in the packed part of a segment's operand rows, and the rows left over behind it.
inline int64_t token_tiles(int64_t rows) {
  return rows <= kDotOnly ? 0 : rows <= 20 ? 1 : rows < 32 ? 2 : rows / 16 + (rows % 16 > kDotRows);
}
inline int64_t left_over(int64_t rows) {
  const int64_t left = rows - 16 * token_tiles(rows);
  return left > 0 ? left : 0;
}

// Layout of `along`: tiles [column block of 32][tile of tokens][16 pairs][16 rows][2], zeros beyond the last row;
// behind the room of their rows, what is left over as [column block of 32][row][32].
void pack(const void* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k, int64_t depth,
          void* packed, int64_t length) {
  const int64_t tokens = token_tiles(rows), left = left_over(rows);
  uint16_t* const tiles = static_cast<uint16_t*>(packed);
  for (int64_t r = 0; r < count; r += 16) {
    const uint16_t* const source = static_cast<const uint16_t*>(from) + r * lda;
    const int64_t n = count - r < 16 ? count - r : 16, tile = (first + r) / 16;
    for (int64_t i = 0; i < depth; i += 32) {
      const int64_t block = (k + i) / 32;
      if (tile < tokens) {
        pack_tile(source + i, lda, n, tiles + (block * tokens + tile) * kTile);
      } else {
        uint16_t* const to = tiles + tokens * 16 * length + (block * left + first + r - tokens * 16) * 32;
        for (int64_t j = 0; j < n; ++j) _mm512_storeu_si512(to + j * 32, _mm512_loadu_si512(source + j * lda + i));
      }
    }
  }
}

// Few rows: W stored rows at a time, so that up to 24 / W operand rows meet each of them in one pass.
template <Format F, int W>
void along_few(const Product& p, int64_t deepest) {
  const Matrix& w = p.strip.matrix;
  const int64_t k_end = w.cols, blocks = (k_end + deepest - 1) / deepest;
  const int64_t step = (k_end / blocks + kBlock - 1) / kBlock * kBlock, groups = (p.strip.count + W - 1) / W,
                units = (k_end + step - 1) / step * groups;
  constexpr int64_t ahead = 4;
  constexpr int most = 24 / W;
  const uint16_t* const operands = static_cast<const uint16_t*>(p.a);
  uint16_t* const decoded = reinterpret_cast<uint16_t*>(p.scratch);
  constexpr int64_t kStride = kDepth + 32;  // rows 4 KB apart would share L1 sets
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, k_end, p.scratch + W * kStride * sizeof(uint16_t));
  for (int64_t u = 0; u < units; ++u) {
    // The group `ahead` of this one, in this strip or the next.
    const bool here = u + ahead < units;
    const Strip& s = here ? p.strip : p.next;
    const int64_t v = here ? u + ahead : u + ahead - units, later = v % groups * W, later_k = v / groups * step;
    const int64_t later_depth = s.matrix.cols - later_k < step ? s.matrix.cols - later_k : step;
    const int64_t k = u / groups * step, depth = k_end - k < step ? k_end - k : step, col = u % groups * W;
    const int64_t later_rows = s.count - later < W ? s.count - later : W;
    Prefetch prefetch(byte_at(F, s.matrix, s.first + later, later_k), row_bytes(F, s.matrix.cols),
                      bytes_of(F, later_depth), later_k < s.matrix.cols && later_rows > 0 ? later_rows : 0,
                      (p.rows + most - 1) / most * (depth / 32) + (Decode<F>::kInPlace ? 0 : decode_ticks(W, depth)));
    const int64_t rows = p.strip.count - col < W ? p.strip.count - col : W;
    const uint16_t* stored[W];
    if constexpr (!Decode<F>::kInPlace)
      decode_rows(w, tables, p.strip.first + col, rows, k, depth, decoded, kStride, prefetch);
    for (int64_t j = 0; j < W; ++j) {  // a repeated row fills up the last group
      const int64_t row = j < rows ? j : rows - 1;
      stored[j] = Decode<F>::kInPlace ? reinterpret_cast<const uint16_t*>(byte_at(F, w, p.strip.first + col + row, k))
                                      : decoded + row * kStride;
    }
    for_tiles<most>(p.rows, [&]<int R>(int64_t r) {
      dot_tile<R, W>(operands + (k / 32 * p.rows + r) * 32, p.rows, stored, depth, p.c + r * p.ldc + col, p.ldc, rows,
                     p.add || k > 0, prefetch);
    });
  }
}

template <Format F>
void along(const Product& p) {
  const int64_t tokens = token_tiles(p.rows), left = left_over(p.rows);
  if (!tokens)
    return p.rows <= 6 || kBits[static_cast<int>(F)] < 8 ? along_few<F, 4>(p, kDepth)
           : p.rows <= 8                                 ? along_few<F, 3>(p, kDepth)
                                                         : along_few<F, 2>(p, kDepth / 2);
  const Matrix& w = p.strip.matrix;
  constexpr Constant<kTileDepth + 32> kStride;
  uint16_t* const decoded = reinterpret_cast<uint16_t*>(p.scratch);             // this and the next [64][kStride]
  float* const sums = reinterpret_cast<float*>(decoded + 2 * kLine * kStride);  // C^T [64][16 tokens]
  const int64_t ldc = tokens * 16, groups = (p.strip.count + 15) / 16 * 16;
  const uint16_t* const packed = static_cast<const uint16_t*>(p.a);
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols,
                         reinterpret_cast<std::byte*>(sums + kLine * kMaxRows));
  // Look-ups leave the multipliers to the products, so the next rows are decoded beside them; formats that are scaled
  // by multiplying take turns with the products, and so does a single tile, whose loop has few instructions to spare.
  const bool ahead = Decode<F>::kTableBytes != 0 && tokens > 1;
  int64_t which = 0;
  for (int64_t k = 0; k < w.cols; k += kDepth) {
    const int64_t depth = w.cols - k < kDepth ? w.cols - k : kDepth, steps = (depth + 31) / 32, end = k + depth;
    const bool more = end < w.cols;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? end : 0, n = s.matrix.cols - from < kDepth ? s.matrix.cols - from : kDepth;
    // In place where the rows are operands already, all of them exist, and so do whole tiles of them.
    const bool in_place = Decode<F>::kInPlace && p.strip.count == groups && depth % 32 == 0;
    const int64_t visits = (tokens + 2) / 3 * groups / 8;
    Prefetch prefetch(
        byte_at(F, s.matrix, s.first, from), row_bytes(F, s.matrix.cols), bytes_of(F, n), s.count,
        (visits + tiles(left) * groups / 4) * steps + (in_place || ahead ? 0 : decode_ticks(p.strip.count, depth)));
    const auto left_over_rows = [&](const uint16_t* rows, int64_t stride, int64_t at, int64_t n) {
      for (int64_t g = 0; g < p.strip.count; g += 4) {
        const uint16_t* four[4];
        for (int64_t j = 0; j < 4; ++j) four[j] = rows + (g + j < p.strip.count ? g + j : p.strip.count - 1) * stride;
        for_tiles<kTileRows>(left, [&]<int R>(int64_t r) {
          const int64_t row = tokens * 16 + r;
          const uint16_t* const x = packed + tokens * 16 * p.lda + (at / 32 * left + r) * 32;
          dot_tile<R, 4>(x, left, four, n, p.c + row * p.ldc + g, p.ldc, 4, p.add || at > 0, prefetch);
        });
      }
    };
    const uint16_t* const stored = reinterpret_cast<const uint16_t*>(byte_at(F, w, p.strip.first, k));
    for (int64_t i = 0, n; i < depth; i += n) {
      const auto whole = [&](int64_t at, int64_t end) {
        const int64_t most = at == 0 && ahead ? kBlock : kTileDepth;  // nothing hides the first decoding
        return end - at < most ? end - at : most;
      };
      const int64_t at = k + i;
      n = whole(at, end);
      const auto multiply_all = [&](const uint16_t* rows, auto stride, auto& beside) {
        for (int64_t t = 0; t < tokens;) {
          const int64_t wide = tokens == 1 ? 1 : tokens - t == 4 || tokens - t == 2 ? 2 : 3;  // not 3 + 1
          const auto multiply = [&]<int J>() {
            for (int64_t g = 0; g < groups; g += 8)
              token_tile<8, J>(rows + g * stride, stride, packed + (at / 32 * tokens + t) * kTile, tokens * kTile,
                               (n + 31) / 32, sums + g * ldc + t * 16, ldc, at > 0, beside);
          };
          if (wide == 3) multiply.template operator()<3>();
          else if (wide == 2) multiply.template operator()<2>();
          else multiply.template operator()<1>();
          t += wide;
        }
      };
      if (in_place) {
        multiply_all(stored + i, w.cols, prefetch);
        continue;
      }
      uint16_t* const rows = decoded + which * kLine * kStride;
      if (at == 0 || !ahead) decode_rows(w, tables, p.strip.first, p.strip.count, at, n, rows, kStride, prefetch);
      if (ahead) {
        which = 1 - which;
        const int64_t next = at + n, next_end = next < end ? end : w.cols - end < kDepth ? w.cols : end + kDepth;
        RowsAhead<F> beside(w, tables, p.strip.first, next < w.cols ? p.strip.count : 0, next, whole(next, next_end),
                            decoded + which * kLine * kStride, kStride, visits * ((n + 31) / 32), prefetch);
        multiply_all(rows, kStride, beside);
        beside.finish();
        prefetch = beside.prefetch();
      } else {
        multiply_all(rows, kStride, prefetch);
      }
      if (left) left_over_rows(rows, kStride, at, n);
    }
    if (left && in_place) left_over_rows(stored, w.cols, k, depth);
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < groups; g += 16)
      unpack_sums(sums + g * ldc + t * 16, ldc, p.rows - t * 16, p.c + t * 16 * p.ldc + g, p.ldc, p.add);
}

template <Format F>
void across(const Product& p) {
  const Matrix& w = p.strip.matrix;
  const int64_t lines = (p.strip.count + kLine - 1) / kLine, step = p.rows <= kFewRows ? kFewDepth : kAcrossDepth;
  const int64_t at_once = p.rows <= kFewRows ? lines : 1;  // a panel of 32 KB stays in L1
  // Lines of 64 columns per tile: one or two rows of one line alone would wait for each dot product.
  const int64_t together = p.rows == 1 && lines % 4 == 0 ? 4 : p.rows <= 2 && lines % 2 == 0 ? 2 : 1;
  uint16_t* const panel = reinterpret_cast<uint16_t*>(p.scratch);
  std::byte* const room = p.scratch + kAcrossDepth * 4 * kLine * sizeof(uint16_t);
  for (int64_t k = 0; k < w.rows; k += step) {
    const int64_t depth = w.rows - k < step ? w.rows - k : step, pairs = (depth + 1) / 2;
    const bool more = k + step < w.rows;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? k + step : 0, n = s.matrix.rows - from < step ? s.matrix.rows - from : step;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count), n,
                      across_ticks(p.strip.count, pairs) + tiles(p.rows) * pairs * lines / together);
    const Tables<F> tables(w, k, depth, p.strip.first, p.strip.count, room);
    const bool add = p.add || k > 0;
    for (int64_t first = 0; first < lines; first += at_once) {
      const int64_t col = first * kLine,
                    n = p.strip.count - col < at_once * kLine ? p.strip.count - col : at_once * kLine;
      across_panel<F>(w, tables, k, depth, p.strip.first + col, n, panel, pairs, prefetch);
      for (int64_t line = first; line < first + at_once && line < lines; line += together) {
        const uint16_t* const from_line = panel + (line - first) * pairs * kLine * 2;
        const auto multiply = [&]<int R, int L>(int64_t r) {
          panel_tile<R, L>(operands(p, r, k), p.lda, from_line, pairs, p.c + r * p.ldc + line * kLine, p.ldc, add,
                           prefetch);
        };
        if (together == 4) multiply.template operator()<1, 4>(0);
        else if (together == 2 && p.rows == 1) multiply.template operator()<1, 2>(0);
        else if (together == 2) multiply.template operator()<2, 2>(0);
        else for_tiles<kTileRows>(p.rows, [&]<int R>(int64_t r) { multiply.template operator()<R, 1>(r); });
      }
    }
  }
}

}  // namespace

const Gemm kAvx512Bf16Gemm = {"avx512bf16",         kLine, 4 * kLine, KJAX_FORMATS(along),
                              KJAX_FORMATS(across), pack,  nullptr,   nullptr};

}  // namespace kjax
