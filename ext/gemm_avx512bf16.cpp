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
constexpr int64_t kSums = 16;                // room for the sums of a stored row in dot products, one per operand row
constexpr int64_t kOperandBytes = 32 << 10;  // of operand rows that stay in L1 while stored rows meet them
constexpr int64_t kDepth = 2048;             // along: reduction per block of tiles of tokens
constexpr int64_t kTileDepth = 256;    // of it, per visit of the token tiles: 48 tokens are 24 KB of L1; decoded rows
                                       // of one visit are made beside the products of the visit before
constexpr int64_t kAcrossDepth = 256;  // across: a panel of one line of 64 columns is 32 KB of L1
constexpr int64_t kPanelTick = 4;      // pairs between two ticks of what runs beside
constexpr int64_t kFewRows = 16, kFewDepth = 64;  // few rows: a panel of all lines is, so rows are read whole

inline const uint16_t* operands(const Product& p, int64_t row, int64_t k) {
  return static_cast<const uint16_t*>(p.a) + row * p.lda + k;
}
inline __m512bh as_bf16(__m512i v) { return (__m512bh)v; }

// C [R, 64 L] (+)= A [R, 2 * pairs] x L panels [pairs][64][2], with a tick every T pairs
template <int R, int L, int T, class Beside>
void panel_tile(const uint16_t* a, int64_t lda, const uint16_t* panel, int64_t pairs, float* c, int64_t ldc, bool add,
                Beside& cursor) {
  Beside beside = cursor;
  __m512 sum[R][4 * L];
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 4 * L; ++j) sum[i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
  const int64_t line_step = pairs * kLine * 2;
  const auto step = [&](int64_t h) __attribute__((always_inline)) {
#pragma GCC unroll 4
    for (int l = 0; l < L; ++l) {
      const uint16_t* const line = panel + l * line_step + h * kLine * 2;
      __m512bh w[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        w[j] = as_bf16(_mm512_load_si512(line + j * 32));
        if (T == 1 && R > 3) __builtin_prefetch(line + (16 * 4 + j) * 32, 0, 3);  // where L1 lost the panel
      }
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        int pair;
        __builtin_memcpy(&pair, a + i * lda + 2 * h, 4);
        const __m512bh x = as_bf16(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[i][4 * l + j] = _mm512_dpbf16_ps(sum[i][4 * l + j], x, w[j]);
      }
    }
  };
  int64_t k = pairs;
  for (; k >= T; k -= T) {
    beside.tick();
#pragma GCC unroll 4
    for (int64_t h = 0; h < T; ++h) step(h);
    a += 2 * T;
    panel += T * kLine * 2;
  }
  for (; k > 0; --k) {
    step(0);
    a += 2;
    panel += kLine * 2;
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < 4 * L; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, sum[i][j]);
  cursor = beside;
}

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

// Sums [W stored rows][R of kSums operand rows] (+)= W [W, depth] x A [R, depth], both along k. Stored rows from
// (row, k0) on, k0 a multiple of 128, are decoded 64 columns at a time in registers; n of them exist, and the last
// stands for those missing. A in blocks [depth / 32][R][32], zeros from depth on.
template <Format F, int R, int W>
void dot_tile(const uint16_t* a, const Matrix& w, const Tables<F>& tables, int64_t row, int64_t n, int64_t k0,
              int64_t depth, float* sums, bool add, Prefetch& prefetch) {
  __m512 sum[W][R];
  const uint8_t* stored[W];
#pragma GCC unroll 4
  for (int j = 0; j < W; ++j) {
    stored[j] = byte_at(F, w, row + (j < n ? j : n - 1), k0);
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) sum[j][i] = _mm512_setzero_ps();
  }
  const auto multiply = [&](const __m512i(&y)[W]) __attribute__((always_inline)) {
#pragma GCC unroll 12
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
    prefetch.tick();
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

// Calls f<R> for a number of rows from `least` to `most`.
template <int least, int most, class F>
inline void with_rows(int64_t rows, F f) {
  [&]<int... R>(std::integer_sequence<int, R...>) {
    ((rows == least + R ? f.template operator()<least + R>() : void()), ...);
  }(std::make_integer_sequence<int, most - least + 1>());
}

// Calls f<R>(first row) for equal parts of at most `most` rows: a row or two of accumulators left over alone could not
// hide the latency of the dot product.
template <int most, class F>
inline void for_tiles(int64_t rows, F f) {
  for (int64_t r = 0, parts = (rows + most - 1) / most; parts > 0; --parts) {
    const int64_t n = (rows - r + parts - 1) / parts;
    with_rows<1, most>(n, [&]<int R>() { f.template operator()<R>(r); });
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

// Few rows, `least` to `most`: all of them meet W stored rows at a time.
template <Format F, int W, int least, int most>
void along_few(const Product& p) {
  const Matrix& w = p.strip.matrix;
  const int64_t deepest = kOperandBytes / 2 / most, groups = (p.strip.count + W - 1) / W,
                blocks = (w.cols + deepest - 1) / deepest;
  const int64_t step = (w.cols / blocks + kBlock - 1) / kBlock * kBlock, units = (w.cols + step - 1) / step * groups;
  constexpr int64_t ahead = 4;  // groups between asking for stored rows and reading them
  const uint16_t* const operands = static_cast<const uint16_t*>(p.a);
  float* const sums = reinterpret_cast<float*>(p.scratch);  // C^T [groups of W][kSums]
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols, p.scratch + 2 * kLine * kSums * sizeof(float));
  for (int64_t u = 0; u < units; ++u) {
    // The group `ahead` of this one, in this strip or the next.
    const bool here = u + ahead < units;
    const Strip& s = here ? p.strip : p.next;
    const int64_t v = here ? u + ahead : u + ahead - units, later = v % groups * W, later_k = v / groups * step;
    const int64_t later_depth = s.matrix.cols - later_k < step ? s.matrix.cols - later_k : step;
    const int64_t later_rows = s.count - later < W ? s.count - later : W;
    const int64_t k = u / groups * step, depth = w.cols - k < step ? w.cols - k : step, col = u % groups * W;
    Prefetch prefetch(byte_at(F, s.matrix, s.first + later, later_k), row_bytes(F, s.matrix.cols),
                      bytes_of(F, later_depth), later_k < s.matrix.cols && later_rows > 0 ? later_rows : 0,
                      depth / kBlock, scales_of<F>(s.matrix, s.first + later, later_k, later_depth));
    with_rows<least, most>(p.rows, [&]<int R>() {
      dot_tile<F, R, W>(operands + k * R, w, tables, p.strip.first + col, p.strip.count - col, k, depth,
                        sums + col * kSums, k > 0, prefetch);
    });
  }
  for (int64_t g = 0; g < p.strip.count; g += 16) unpack_sums(sums + g * kSums, kSums, p.rows, p.c + g, p.ldc, p.add);
}

// What products of no rows cost: their decoding.
template <Format F>
void decode_only(const Product& p) {
  const Matrix& w = p.strip.matrix;
  if (Decode<F>::kInPlace) return;
  constexpr int64_t kTogether = 4;
  std::byte* const room = p.scratch + kTogether * (kDepth + 32) * sizeof(uint16_t);
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols, room);
  Prefetch none;
  for (int64_t k = 0; k < w.cols; k += kDepth)
    for (int64_t r = 0; r < p.strip.count; r += kTogether)
      decode_rows(w, tables, p.strip.first + r, p.strip.count - r < kTogether ? p.strip.count - r : kTogether, k,
                  w.cols - k < kDepth ? w.cols - k : kDepth, reinterpret_cast<uint16_t*>(p.scratch), kDepth + 32, none);
}

template <Format F>
void along(const Product& p) {
  const int64_t tokens = token_tiles(p.rows), left = left_over(p.rows);
  if (!tokens)
    return p.rows == 0   ? decode_only<F>(p)
           : p.rows <= 4 ? along_few<F, 4, 1, 4>(p)
           : p.rows <= 8 ? along_few<F, 2, 5, 8>(p)
                         : along_few<F, 2, 9, 12>(p);
  const Matrix& w = p.strip.matrix;
  constexpr Constant<kTileDepth + 32> kStride;
  uint16_t* const decoded = reinterpret_cast<uint16_t*>(p.scratch);             // this and the next [64][kStride]
  float* const sums = reinterpret_cast<float*>(decoded + 2 * kLine * kStride);  // C^T [64][16 tokens]
  float* const left_sums = sums + kLine * kMaxRows;                             // C^T [64][kSums] of the rows left over
  const int64_t ldc = tokens * 16, groups = (p.strip.count + 15) / 16 * 16;
  const uint16_t* const packed = static_cast<const uint16_t*>(p.a);
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols,
                         reinterpret_cast<std::byte*>(left_sums + 2 * kLine * kSums));
  // Products fill two of four vector ports. The next rows are decoded beside them: all but the multiplications by
  // scales goes to the other two. A single tile takes turns with decoding, for its loop has no instructions to spare.
  const bool ahead = !Decode<F>::kInPlace && tokens > 1;
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
        (visits + (left > 0) * groups / 8) * steps + (in_place || ahead ? 0 : decode_ticks(p.strip.count, depth)),
        scales_of<F>(s.matrix, s.first, from, n));
    const auto left_over_rows = [&](const uint16_t* rows, int64_t stride, int64_t at, int64_t n) {
      const Matrix operands{reinterpret_cast<const uint8_t*>(rows), nullptr, p.strip.count, stride};
      const Tables<Format::kBf16> none(operands, 0, 0, 0, 0, nullptr);
      with_rows<1, kDotRows>(left, [&]<int R>() {
        for (int64_t g = 0; g < p.strip.count; g += 2)
          dot_tile<Format::kBf16, R, 2>(packed + tokens * 16 * p.lda + at * R, operands, none, g, p.strip.count - g, 0,
                                        n, left_sums + g * kSums, at > 0, prefetch);
      });
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
  for (int64_t g = 0; g < groups; g += 16) {
    for (int64_t t = 0; t < tokens; ++t)
      unpack_sums(sums + g * ldc + t * 16, ldc, p.rows - t * 16, p.c + t * 16 * p.ldc + g, p.ldc, p.add);
    if (left) unpack_sums(left_sums + g * kSums, kSums, left, p.c + tokens * 16 * p.ldc + g, p.ldc, p.add);
  }
}

// Many rows: the panel of the next stored rows is made beside the products of these.
template <Format F>
void across_many(const Product& p) {
  const Matrix& w = p.strip.matrix;
  const int64_t lines = (p.strip.count + kLine - 1) / kLine;
  constexpr int64_t kPanel = kAcrossDepth * 4 * kLine;  // numbers of a panel; a line of it is 32 KB and stays in L1
  uint16_t* const panels[] = {reinterpret_cast<uint16_t*>(p.scratch), reinterpret_cast<uint16_t*>(p.scratch) + kPanel};
  constexpr int64_t kRoom = (kAcrossDepth / kBlock + 1) * (4 * kLine / kBlock + 1) * Decode<F>::kTableBytes;
  static_assert(2 * (kPanel * sizeof(uint16_t) + kRoom) <= scratch_bytes(0));
  std::byte* const room = reinterpret_cast<std::byte*>(panels[1] + kPanel);
  std::byte* const rooms[] = {room, room + kRoom};
  // Nothing hides the first panel, so it is short. Blocks start at multiples of kLine, as across_panel wants them.
  const int64_t rest = w.rows % kAcrossDepth;
  const Blocks blocks{w.rows, rest == 128 ? rest : kLine, kAcrossDepth};
  const auto size = [&](int64_t i) { return i < blocks.count() ? blocks.size(i) : 0; };
  const auto tables_of = [&](int64_t i) {
    return Tables<F>(w, blocks.start(i), size(i), p.strip.first, size(i) > 0 ? p.strip.count : 0, rooms[i % 2]);
  };
  PairsAhead<F>(p.strip, tables_of(0), 0, size(0), panels[0], 0, Prefetch()).finish();
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t k = blocks.start(i), pairs = (blocks.size(i) + 1) / 2,
                  ticks = tiles(p.rows) * (pairs / kPanelTick) * lines;
    // Asked for now, decoded beside the next block, multiplied after that.
    const int64_t later = i + 2 - blocks.count();
    const Strip& s = later < 0 ? p.strip : p.next;
    const Blocks its{s.matrix.rows, blocks.first, kAcrossDepth};
    const int64_t from = later < 0 ? its.start(i + 2) : blocks.count() == 1 ? 0 : its.start(later);
    const int64_t end = later < 0         ? from + its.size(i + 2)
                        : from < its.total ? its.start(later) + its.size(later)
                                           : 0;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count),
                      from < its.total ? end - from : 0, ticks, scales_of<F>(s.matrix, from, s.first, s.count));
    const Tables<F> tables = tables_of(i + 1);
    PairsAhead<F> beside(p.strip, tables, blocks.start(i + 1), size(i + 1), panels[(i + 1) % 2], ticks, prefetch);
    for (int64_t line = 0; line < lines; ++line)
      for_tiles<kTileRows>(p.rows, [&]<int R>(int64_t r) {
        panel_tile<R, 1, kPanelTick>(operands(p, r, k), p.lda, panels[i % 2] + line * pairs * kLine * 2, pairs,
                                     p.c + r * p.ldc + line * kLine, p.ldc, p.add || i > 0, beside);
      });
    beside.finish();
  }
}

template <Format F>
void across(const Product& p) {
  if (p.rows > kFewRows) return across_many<F>(p);
  const Matrix& w = p.strip.matrix;
  const int64_t lines = (p.strip.count + kLine - 1) / kLine;
  constexpr int64_t step = kFewDepth;
  // Lines of 64 columns per tile: one or two rows of one line alone would wait for each dot product.
  const int64_t together = p.rows == 1 && lines % 4 == 0 ? 4 : (p.rows == 1 || p.rows == 2) && lines % 2 == 0 ? 2 : 1;
  uint16_t* const panel = reinterpret_cast<uint16_t*>(p.scratch);
  std::byte* const room = p.scratch + kFewDepth * 4 * kLine * sizeof(uint16_t);
  for (int64_t k = 0; k < w.rows; k += step) {
    const int64_t depth = w.rows - k < step ? w.rows - k : step, pairs = (depth + 1) / 2;
    const bool more = k + step < w.rows;
    const Strip& s = more ? p.strip : p.next;
    const int64_t from = more ? k + step : 0, n = s.matrix.rows - from < step ? s.matrix.rows - from : step;
    Prefetch prefetch(byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count), n,
                      across_ticks(p.strip.count, pairs) + tiles(p.rows) * pairs * lines / together,
                      scales_of<F>(s.matrix, from, s.first, s.count));
    const Tables<F> tables(w, k, depth, p.strip.first, p.strip.count, room);
    const bool add = p.add || k > 0;
    across_panel<F>(w, tables, k, depth, p.strip.first, p.strip.count, panel, pairs, prefetch);
    for (int64_t line = 0; line < lines; line += together) {
      const auto multiply = [&]<int R, int L>(int64_t r) {
        panel_tile<R, L, 1>(operands(p, r, k), p.lda, panel + line * pairs * kLine * 2, pairs,
                         p.c + r * p.ldc + line * kLine, p.ldc, add, prefetch);
      };
      if (together == 4) multiply.template operator()<1, 4>(0);
      else if (together == 2 && p.rows == 1) multiply.template operator()<1, 2>(0);
      else if (together == 2) multiply.template operator()<2, 2>(0);
      else for_tiles<kTileRows>(p.rows, [&]<int R>(int64_t r) { multiply.template operator()<R, 1>(r); });
    }
  }
}

}  // namespace

const Gemm kAvx512Bf16Gemm = {"avx512bf16",         kLine, 4 * kLine, KJAX_FORMATS(along),
                              KJAX_FORMATS(across), pack,  nullptr,   nullptr};

}  // namespace kjax
