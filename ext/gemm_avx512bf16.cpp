// AVX512-BF16 kernels: a dot kernel for few rows, a 6 x 64 panel kernel above, each prefetching the weights that come
// next.
#include <immintrin.h>

#include "kernels.h"

namespace kjax {
namespace {

#include "simd_avx512.h"
#include "token_tiles.h"
#include "prefetch.h"
#include "decode_avx512.h"

// What is left over after whole tiles of 16 tokens goes through the dot kernel up to this many rows; more are padded to
// a tile.
constexpr int64_t kDotRows = 10;
constexpr int64_t kDepth = 2048;       // along: reduction per block; long enough that one horizontal sum per 4 x 6
                                       // block of the dot kernel is below 3 %
constexpr int64_t kTileDepth = 256;    // of it, per visit of the tiles: 48 tokens are 24 KB of L1
constexpr int64_t kAcrossDepth = 256;  // a panel of 256 columns is 128 KB of L2

inline const uint16_t* operands(const Product& p, int64_t row, int64_t k) {
  return static_cast<const uint16_t*>(p.a) + row * p.lda + k;
}
inline __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

// C [R, 64] (+)= A [R, 2 * pairs] x panel [pairs][64][2]
template <int R>
void panel_tile(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t pairs, float* c, int64_t ldc, bool add,
                Prefetch& prefetch) {
  __m512 sum[R][4];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; ++k, panel += kLine * 2) {
    __m512bh w[4];
    prefetch.tick();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      w[j] = as_bf16(_mm512_load_si512(panel + j * 32));
      __builtin_prefetch(panel + (16 * 4 + j) * 32, 0, 3);  // the panel lies in L2: sixteen steps ahead into L1
    }
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      int pair;
      __builtin_memcpy(&pair, a + i * lda + 2 * k, 4);
      const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, w[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sum[i][j]);
}

// Four horizontal sums at once.
inline __m128 sum4(const __m512 (&s)[4]) {
  const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(s[0], s[1]), _mm512_unpackhi_ps(s[0], s[1]));
  const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(s[2], s[3]), _mm512_unpackhi_ps(s[2], s[3]));
  const __m512d xd = _mm512_castps_pd(x), yd = _mm512_castps_pd(y);
  const __m512 z =
      _mm512_add_ps(_mm512_castpd_ps(_mm512_unpacklo_pd(xd, yd)), _mm512_castpd_ps(_mm512_unpackhi_pd(xd, yd)));
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(z), _mm512_extractf32x8_ps(z, 1));
  return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}

// C [R, 4] (+)= A [R, depth] x four weight rows [4, depth], both along k
template <int R>
void dot_tile(const uint16_t* a, int64_t lda, const uint16_t* const (&w)[4], int64_t depth, float* c, int64_t ldc,
              bool add, Prefetch& prefetch) {
  __m512 sum[R][4];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_setzero_ps();
  const int64_t whole = depth / 32 * 32;
  for (int64_t k = 0; k < whole; k += 32) {
    __m512bh y[4];
    prefetch.tick();
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) y[j] = as_bf16(_mm512_loadu_si512(w[j] + k));
#pragma GCC unroll 8
    for (int i = 0; i < R; ++i) {
      const __m512bh x = as_bf16(_mm512_loadu_si512(a + i * lda + k));
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], x, y[j]);
    }
  }
  if (whole < depth) {  // the stored row ends here; the operand row goes on in zeros
    const __mmask32 rest = first_halves(depth - whole);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const __m512bh y = as_bf16(_mm512_maskz_loadu_epi16(rest, w[j] + whole));
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i)
        sum[i][j] = _mm512_dpbf16_ps(sum[i][j], as_bf16(_mm512_loadu_si512(a + i * lda + whole)), y);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i) {
    __m128 s = sum4(sum[i]);
    if (add) s = _mm_add_ps(s, _mm_loadu_ps(c + i * ldc));
    _mm_storeu_ps(c + i * ldc, s);
  }
}

// Calls f(row, number) for tiles of six rows; a remainder of 7 or 8 is taken as 4 + 3 or 4 + 4, because one or two rows
// of accumulators cannot hide the latency of the dot product.
template <class F>
inline void for_tiles(int64_t rows, F f) {
  int64_t r = 0;
  while (rows - r > 8 || rows - r == 6) {
    f.template operator()<6>(r);
    r += 6;
  }
  if (rows - r > 6) {
    f.template operator()<4>(r);
    r += 4;
  }
  switch (rows - r) {
    case 5:
      f.template operator()<5>(r);
      break;
    case 4:
      f.template operator()<4>(r);
      break;
    case 3:
      f.template operator()<3>(r);
      break;
    case 2:
      f.template operator()<2>(r);
      break;
    case 1:
      f.template operator()<1>(r);
      break;
    default:
      break;
  }
}
inline int64_t tiles(int64_t rows) { return (rows + 5) / 6; }

void multiply_panel(const Product& p, int64_t k, const uint16_t* panel, int64_t pairs, int64_t col,
                    Prefetch& prefetch) {
  const bool add = p.add || k > 0;
  for_tiles(p.rows, [&]<int R>(int64_t r) {
    panel_tile<R>(operands(p, r, k), p.lda, panel, pairs, p.c + r * p.ldc + col, p.ldc, add, prefetch);
  });
}

// C^T [R stored rows, 16 J tokens] (+)= W [R, 32 steps] x tiles of tokens [steps][.][16 pairs][16][2], `step` apart
template <int R, int J>
void token_tile(const uint16_t* w, int64_t stride, const uint16_t* tokens, int64_t step, int64_t steps, float* c,
                int64_t ldc, bool add, Prefetch& prefetch) {
  __m512 sum[R][J];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) sum[i][j] = add ? _mm512_load_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
  for (int64_t s = 0; s < steps; ++s, tokens += step) {
    prefetch.tick();
    for (int64_t q = 0; q < 16; ++q, w += 2) {
      __m512bh x[J];
#pragma GCC unroll 3
      for (int j = 0; j < J; ++j) x[j] = as_bf16(_mm512_load_si512(tokens + j * kTile + q * 32));
#pragma GCC unroll 16
      for (int i = 0; i < R; ++i) {
        int pair;
        __builtin_memcpy(&pair, w + i * stride, 4);
        const __m512bh y = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 3
        for (int j = 0; j < J; ++j) sum[i][j] = _mm512_dpbf16_ps(sum[i][j], y, x[j]);
      }
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 3
    for (int j = 0; j < J; ++j) _mm512_store_ps(c + i * ldc + j * 16, sum[i][j]);
}

// Tiles of tokens in the packed part of a segment's operand rows, and the rows left over behind it.
inline int64_t token_tiles(int64_t rows) { return rows / 16 + (rows % 16 > kDotRows); }
inline int64_t left_over(int64_t rows) { return rows % 16 > kDotRows ? 0 : rows % 16; }

// Layout of `along`: tiles [column block of 32][tile of tokens][16 pairs][16 rows][2], zeros beyond the last row; what
// is left over follows as rows.
void pack(const void* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k, int64_t depth,
          void* packed, int64_t length) {
  const int64_t tiles = token_tiles(rows);
  for (int64_t r = 0; r < count; r += 16) {
    const uint16_t* const source = static_cast<const uint16_t*>(from) + r * lda;
    const int64_t n = count - r < 16 ? count - r : 16, tile = (first + r) / 16;
    if (tile < tiles) {
      for (int64_t i = 0; i < depth; i += 32)
        pack_tile(source + i, lda, n, static_cast<uint16_t*>(packed) + ((k + i) / 32 * tiles + tile) * kTile);
    } else {
      for (int64_t j = 0; j < n; ++j)
        __builtin_memcpy(static_cast<uint16_t*>(packed) + (first + r + j) * length + k, source + j * lda,
                         static_cast<size_t>((depth + 31) / 32 * 64));
    }
  }
}

// Few rows: four stored rows at a time.
template <Format F>
void along_few(const Product& p) {
  const Matrix& w = p.strip.matrix;
  const int64_t k_end = w.cols, blocks = (k_end + kDepth - 1) / kDepth;
  const int64_t step = (k_end / blocks + kBlock - 1) / kBlock * kBlock, groups = (p.strip.count + 3) / 4,
                units = (k_end + step - 1) / step * groups;
  const int64_t ahead = p.rows <= 6 ? 4 : p.rows <= 12 ? 2 : 1;  // fewer rows, less time per group of four stored rows
  uint16_t* const decoded = reinterpret_cast<uint16_t*>(p.scratch);
  constexpr int64_t kStride = kDepth + 32;  // rows 4 KB apart would share L1 sets
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, k_end, p.scratch + 4 * kStride * sizeof(uint16_t));
  for (int64_t u = 0; u < units; ++u) {
    // The group `ahead` of this one, in this strip or the next.
    const bool here = u + ahead < units;
    const Strip& s = here ? p.strip : p.next;
    const int64_t v = here ? u + ahead : u + ahead - units, later = v % groups * 4, later_k = v / groups * step;
    const int64_t later_depth = s.matrix.cols - later_k < step ? s.matrix.cols - later_k : step;
    const int64_t k = u / groups * step, depth = k_end - k < step ? k_end - k : step, col = u % groups * 4;
    const int64_t later_rows = s.count - later < 4 ? s.count - later : 4;
    Prefetch prefetch(byte_at(F, s.matrix, s.first + later, later_k), row_bytes(F, s.matrix.cols),
                      bytes_of(F, later_depth), later_k < s.matrix.cols && later_rows > 0 ? later_rows : 0,
                      tiles(p.rows) * (depth / 32) + (Decode<F>::kInPlace ? 0 : decode_ticks(4, depth)));
    const int64_t rows = p.strip.count - col < 4 ? p.strip.count - col : 4;
    const uint16_t* four[4];
    if constexpr (!Decode<F>::kInPlace) 
      decode_rows(w, tables, p.strip.first + col, rows, k, depth, decoded, kStride, prefetch);
    for (int64_t j = 0; j < 4; ++j) {  // a repeated row fills up the last four
      const int64_t row = j < rows ? j : rows - 1;
      four[j] = Decode<F>::kInPlace
                    ? reinterpret_cast<const uint16_t*>(byte_at(F, w, p.strip.first + col + row, k))
                    : decoded + row * kStride;
    }
    for_tiles(p.rows, [&]<int R>(int64_t r) {
      dot_tile<R>(operands(p, r, k), p.lda, four, depth, p.c + r * p.ldc + col, p.ldc, p.add || k > 0, prefetch);
    });
  }
}

template <Format F>
void along(const Product& p) {
  const int64_t tokens = token_tiles(p.rows), left = left_over(p.rows);
  if (!tokens) return along_few<F>(p);
  const Matrix& w = p.strip.matrix;
  constexpr int64_t kStride = kDepth + 32;
  uint16_t* const decoded = reinterpret_cast<uint16_t*>(p.scratch);  // [64][kStride]
  float* const sums = reinterpret_cast<float*>(decoded + kLine * kStride);  // C^T [64][16 tokens]
  const int64_t ldc = tokens * 16, groups = (p.strip.count + 15) / 16 * 16;
  std::byte* const room = reinterpret_cast<std::byte*>(sums + kLine * kMaxRows);
  const uint16_t* const packed = static_cast<const uint16_t*>(p.a);
  for (int64_t k = 0; k < w.cols; k += kDepth) {
    const int64_t depth = w.cols - k < kDepth ? w.cols - k : kDepth, steps = (depth + 31) / 32;
    const bool more = k + kDepth < w.cols;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? k + kDepth : 0, n = s.matrix.cols - from < kDepth ? s.matrix.cols - from : kDepth;
    // In place where the rows are operands already, all of them exist, and so do whole tiles of them.
    const bool in_place = Decode<F>::kInPlace && p.strip.count == groups && depth % 32 == 0;
    const int64_t visits = tokens == 1 ? groups / 16 : (tokens + 2) / 3 * groups / 8;
    Prefetch prefetch(byte_at(F, s.matrix, s.first, from), row_bytes(F, s.matrix.cols), bytes_of(F, n), s.count,
                      (visits + tiles(left) * groups / 4) * steps + (in_place ? 0 : decode_ticks(p.strip.count, depth)));
    const uint16_t* rows = decoded;
    int64_t stride = kStride;
    if (in_place) {
      rows = reinterpret_cast<const uint16_t*>(byte_at(F, w, p.strip.first, k));
      stride = w.cols;
    } else {
      const Tables<F> tables(w, p.strip.first, p.strip.count, k, depth, room);
      decode_rows(w, tables, p.strip.first, p.strip.count, k, depth, decoded, kStride, prefetch);
    }
    for (int64_t i = 0; i < steps; i += kTileDepth / 32) {
      const int64_t some = steps - i < kTileDepth / 32 ? steps - i : kTileDepth / 32;
      for (int64_t t = 0; t < tokens;) {
        const uint16_t* const x = packed + ((k / 32 + i) * tokens + t) * kTile;
        const int64_t wide = tokens - t == 4 || tokens - t == 2 ? 2 : tokens - t == 1 ? 1 : 3;  // not 3 + 1
        for (int64_t g = 0; g < groups; g += wide == 1 ? 16 : 8) {
          float* const c = sums + g * ldc + t * 16;
          const uint16_t* const y = rows + g * stride + i * 32;
          const bool add = k + i > 0;
          if (wide == 3) token_tile<8, 3>(y, stride, x, tokens * kTile, some, c, ldc, add, prefetch);
          else if (wide == 2) token_tile<8, 2>(y, stride, x, tokens * kTile, some, c, ldc, add, prefetch);
          else token_tile<16, 1>(y, stride, x, tokens * kTile, some, c, ldc, add, prefetch);
        }
        t += wide;
      }
    }
    if (left)
      for (int64_t g = 0; g < p.strip.count; g += 4) {
        const uint16_t* four[4];
        for (int64_t j = 0; j < 4; ++j) four[j] = rows + (g + j < p.strip.count ? g + j : p.strip.count - 1) * stride;
        for_tiles(left, [&]<int R>(int64_t r) {
          const int64_t row = tokens * 16 + r;
          dot_tile<R>(operands(p, row, k), p.lda, four, depth, p.c + row * p.ldc + g, p.ldc, p.add || k > 0, prefetch);
        });
      }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t g = 0; g < groups; g += 16)
      unpack_sums(sums + g * ldc + t * 16, ldc, p.rows - t * 16, p.c + t * 16 * p.ldc + g, p.ldc, p.add);
}

template <Format F>
void across(const Product& p) {
  uint16_t* const panel = reinterpret_cast<uint16_t*>(p.scratch);
  std::byte* const room = p.scratch + kAcrossDepth * 4 * kLine * sizeof(uint16_t);
  const Matrix& w = p.strip.matrix;
  for (int64_t k = 0; k < w.rows; k += kAcrossDepth) {
    const int64_t depth = w.rows - k < kAcrossDepth ? w.rows - k : kAcrossDepth, pairs = (depth + 1) / 2;
    const bool more = k + kAcrossDepth < w.rows;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? k + kAcrossDepth : 0,
                  n = s.matrix.rows - from < kAcrossDepth ? s.matrix.rows - from : kAcrossDepth;
    const int64_t lines = (p.strip.count + kLine - 1) / kLine;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count), n,
                      across_ticks(p.strip.count, pairs) + tiles(p.rows) * pairs * lines);
    const Tables<F> tables(w, k, depth, p.strip.first, p.strip.count, room);
    across_panel<F>(w, tables, k, depth, p.strip.first, p.strip.count, panel, pairs, prefetch);
    for (int64_t c = 0; c < p.strip.count; c += kLine) multiply_panel(p, k, panel + c * pairs * 2, pairs, c, prefetch);
  }
}

}  // namespace

const Gemm kAvx512Bf16Gemm = {"avx512bf16",         kLine, 4 * kLine, KJAX_FORMATS(along),
                              KJAX_FORMATS(across), pack, kDotRows + 1, nullptr, nullptr};

}  // namespace kjax
