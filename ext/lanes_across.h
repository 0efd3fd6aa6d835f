// Across stored rows: pairs of them are decoded in registers, 32 columns in the lanes, and met by broadcast operand
// rows. Included inside an unnamed namespace after lanes.h.

constexpr int64_t kPairsDepth = 128;  // stored rows per visit: 4 KB apart, they and the next fill half the ways of L2

// Twice 64 bytes at a time, for two pairs of stored rows of 32 columns, ask for as much as is visited meanwhile.
template <Format F>
constexpr int kAsks = F == Format::kBf16 ? 2 : 1;

// C [R, 32] (+)= A [pairs][R][2] x pairs of stored rows from w on, `half` of a line of 64 columns.
template <Format F, int R, int half>
KJAX_ALONE void across_tile(const uint16_t* a, const uint8_t* w, int64_t row_size, int64_t pairs,
                            const std::byte* table, const uint8_t* scales, int64_t scales_step, float* c, int64_t ldc,
                            bool add, LinesLater& later) {
  LaneSums<R> sums(c, ldc, add);
  for (; pairs > 0; pairs -= 2) {  // an even number: operand rows are padded
#pragma GCC unroll 2
    for (int i = 0; i < kAsks<F>; ++i) later.ask();
    __asm__("" : "+r"(table));  // its lines are read again and again: sums need the registers
#pragma GCC unroll 2
    for (int q = 0; q < 2; ++q) {
      __m512i y[2];
      AcrossPairs<F>::pairs(w, w + row_size, half, table, scales, scales + scales_step, y);
      w += 2 * row_size;
      scales += 2 * scales_step;
      sums.multiply(q, a, y);
      a += 2 * R;
    }
  }
  sums.store(c, ldc);
}

// The stored rows that are visited after those from k on, in this strip or the next, to be asked for.
template <Format F>
LinesLater visit_after(const Product& p, int64_t k) {
  const bool here = k + kPairsDepth < p.strip.matrix.rows;
  const Strip& s = here ? p.strip : p.next;
  const int64_t from = here ? k + kPairsDepth : 0, left = s.matrix.rows - from;
  return {byte_at(F, s.matrix, from, s.first), row_bytes(F, s.matrix.cols), bytes_of(F, s.count),
          left < kPairsDepth ? left : kPairsDepth, scales_of<F>(s.matrix, from, s.first, s.count)};
}

// Packed operand rows of one tile [pairs][rows][2], times what `depth` stored rows from `first` on count for.
inline void scale_packed(uint16_t* a, int64_t rows, const uint8_t* scales, int64_t first, int64_t depth) {
  const __mmask16 lanes = first_lanes(rows);
  const __m512i high = _mm512_set1_epi32(static_cast<int>(0xffff0000));
  for (int64_t k = 0; k < depth; k += 2, a += 2 * rows) {
    const __m512i pairs = _mm512_maskz_loadu_epi32(lanes, a);
    const __m512 even = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)),
                 odd = _mm512_castsi512_ps(_mm512_and_si512(pairs, high));
    const __m512 x = _mm512_mul_ps(even, _mm512_set1_ps(row_scale(scales, first + k))),
                 y = k + 1 < depth ? _mm512_mul_ps(odd, _mm512_set1_ps(row_scale(scales, first + k + 1)))
                                   : _mm512_setzero_ps();
    _mm512_mask_storeu_epi32(a, lanes, round_pairs(x, y, _mm512_load_si512(kPairOrder.words)));
  }
}

template <Format F>
void across_lanes(const Product& p) {
  const Matrix& w = p.strip.matrix;
  constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
  constexpr bool kOfRows = block.rows == 1 && block.bytes > 0;  // scales
  constexpr int64_t kLineBytes = kLine * kBits[static_cast<int>(F)] / 8, kSpareScales = 4;
  uint16_t* const packed = reinterpret_cast<uint16_t*>(p.scratch);                         // [rows, kPairsDepth]
  std::byte* const spare = reinterpret_cast<std::byte*>(packed + kMaxRows * kPairsDepth);  // a line's rows, and scales
  std::byte* const room = spare + kPairsDepth * (kLineBytes + kSpareScales);
  const int64_t lines = (p.strip.count + kLine - 1) / kLine, row_size = row_bytes(F, w.cols),
                scales_size = scales_per_row(block, w.cols) * block.bytes;
  if (p.add) order_lines<F>(p, lines, false);
  for (int64_t k = 0; k < w.rows; k += kPairsDepth) {
    const int64_t depth = w.rows - k < kPairsDepth ? w.rows - k : kPairsDepth,
                  padded = (depth + kPad - 1) / kPad * kPad;
    LinesLater later = visit_after<F>(p, k);
    const Tables<F> tables(w, k, depth, p.strip.first, p.strip.count, room);
    pack_lanes(operands(p, 0, k), p.lda, p.rows, 0, p.rows, 0, padded, packed, padded);
    if (p.row_scales)
      for_parts<kLaneRows>(p.rows,
                           [&](int64_t r, int64_t n) { scale_packed(packed + r * padded, n, p.row_scales, k, depth); });
    for (int64_t line = 0; line < lines; ++line) {
      const int64_t col = p.strip.first + line * kLine, n = p.strip.count - line * kLine;
      const uint8_t* stored = byte_at(F, w, k, col);
      const uint8_t* of_rows = kOfRows ? scale_ptr(F, w, k, col) : nullptr;
      int64_t step = row_size, scales_step = kOfRows ? scales_size : 0;
      if (depth < padded || n < kLine) {  // a copy of what exists
        const int64_t bytes = n < kLine ? bytes_of(F, n + (F == Format::kInt4Group32)) : kLineBytes;
        std::byte* const copies = spare + kPairsDepth * kLineBytes;
        __builtin_memset(spare, 0, kPairsDepth * (kLineBytes + kSpareScales));
        for (int64_t r = 0; r < depth; ++r) {
          __builtin_memcpy(spare + r * kLineBytes, stored + r * step, bytes);
          if (scales_step)
            __builtin_memcpy(copies + r * kSpareScales, of_rows + r * scales_step,
                             F == Format::kInt4Group32 && n > 32 ? 4 : block.bytes);
        }
        stored = reinterpret_cast<const uint8_t*>(spare);
        step = kLineBytes;
        if (scales_step) of_rows = reinterpret_cast<const uint8_t*>(copies), scales_step = kSpareScales;
      }
      const std::byte* const table = pairs_table<F>(tables, k, col);
      const auto multiply = [&]<int half>() {
        for_tiles<kLaneRows>(p.rows, [&]<int R>(int64_t r) {
          across_tile<F, R, half>(packed + r * padded, stored, step, padded / 2, table, of_rows, scales_step,
                                  p.c + r * p.ldc + line * kLine + half * 32, p.ldc, p.add || k > 0, later);
        });
      };
      multiply.template operator()<0>();
      multiply.template operator()<1>();
    }
    later.finish();
  }
  order_lines<F>(p, lines, true);
}
