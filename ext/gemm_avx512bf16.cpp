// AVX512-BF16 kernels: a dot kernel for few rows, a 6 x 64 panel kernel above, each prefetching the weights that come
// next.
#include <immintrin.h>

#include "kernels.h"

namespace kjax {
namespace {

#include "simd_avx512.h"
#include "decode_avx512.h"
#include "prefetch.h"

// From this many rows on, transposing a panel costs less than the dot kernel's weaker reuse (measured: anywhere
// in 32..96).
constexpr int64_t kPanelRows = 96;
constexpr int64_t kDotDepth = 2048;    // long enough that one horizontal sum per 4 x 6 block is below 3 %
constexpr int64_t kAlongDepth = 2048;  // a panel of 64 columns is 256 KB of L2
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

template <Format F>
void along_dot(const Product& p) {
  const int64_t k_end = p.strip.matrix.cols, blocks = (k_end + kDotDepth - 1) / kDotDepth;
  const int64_t step = (k_end / blocks + 127) / 128 * 128, groups = (p.strip.count + 3) / 4,
                units = (k_end + step - 1) / step * groups;
  const int64_t ahead = p.rows <= 6 ? 4 : p.rows <= 12 ? 2 : 1;  // fewer rows, less time per group of four stored rows
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
                      tiles(p.rows) * (depth / 32));
    const uint16_t* w[4];
    for (int64_t j = 0; j < 4; ++j) {
      const int64_t row =
          p.strip.first +
          (col + j < p.strip.count ? col + j : p.strip.count - 1);  // a repeated row fills up the last four
      if constexpr (Decode<F>::kInPlace) {
        w[j] = reinterpret_cast<const uint16_t*>(byte_at(F, p.strip.matrix, row, k));
      } else {
        uint16_t* const decoded =
            reinterpret_cast<uint16_t*>(p.scratch) + j * (kDotDepth + 32);  // rows 4 KB apart would share L1 sets
        for (int64_t i = 0; i < depth; i += 32)
          _mm512_storeu_si512(decoded + i, Decode<F>::load32(p.strip.matrix, row, k + i, depth - i));
        w[j] = decoded;
      }
    }
    for_tiles(p.rows, [&]<int R>(int64_t r) {
      dot_tile<R>(operands(p, r, k), p.lda, w, depth, p.c + r * p.ldc + col, p.ldc, p.add || k > 0, prefetch);
    });
  }
}

template <Format F>
void along(const Product& p) {
  if (p.rows < kPanelRows) return along_dot<F>(p);
  uint16_t* const panel = reinterpret_cast<uint16_t*>(p.scratch);
  const Matrix& w = p.strip.matrix;
  for (int64_t k = 0; k < w.cols; k += kAlongDepth) {
    const int64_t depth = w.cols - k < kAlongDepth ? w.cols - k : kAlongDepth, pairs = (depth + 1) / 2;
    for (int64_t c = 0; c < kLine; c += 16)
      along_panel<F>(w, p.strip.first + c, p.strip.first + p.strip.count, k, depth, panel + c * 2);
    const bool more = k + kAlongDepth < w.cols;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? k + kAlongDepth : 0,
                  n = s.matrix.cols - from < kAlongDepth ? s.matrix.cols - from : kAlongDepth;
    Prefetch prefetch(byte_at(F, s.matrix, s.first, from), row_bytes(F, s.matrix.cols), bytes_of(F, n), s.count,
                      tiles(p.rows) * pairs);
    multiply_panel(p, k, panel, pairs, 0, prefetch);
  }
}

template <Format F>
void across(const Product& p) {
  uint16_t* const panel = reinterpret_cast<uint16_t*>(p.scratch);
  const Matrix& w = p.strip.matrix;
  for (int64_t k = 0; k < w.rows; k += kAcrossDepth) {
    const int64_t depth = w.rows - k < kAcrossDepth ? w.rows - k : kAcrossDepth, pairs = (depth + 1) / 2;
    across_panel<F>(w, k, depth, p.strip.first, p.strip.count, panel, pairs);
    const bool more = k + kAcrossDepth < w.rows;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? k + kAcrossDepth : 0,
                  n = s.matrix.rows - from < kAcrossDepth ? s.matrix.rows - from : kAcrossDepth;
    const int64_t lines = (p.strip.count + kLine - 1) / kLine;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count), n,
                      tiles(p.rows) * pairs * lines);
    for (int64_t c = 0; c < p.strip.count; c += kLine) multiply_panel(p, k, panel + c * pairs * 2, pairs, c, prefetch);
  }
}

}  // namespace

const Gemm kAvx512Bf16Gemm = {"avx512bf16",         kLine,   4 * kLine, KJAX_FORMATS(along),
                              KJAX_FORMATS(across), nullptr, nullptr,   nullptr};

}  // namespace kjax
