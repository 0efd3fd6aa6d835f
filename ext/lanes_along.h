// Along stored rows, 16 of them in the lanes: their codes are transposed, decoded in registers and met by broadcast
// operand rows. Included inside an unnamed namespace after lanes.h.

constexpr int64_t kLanesDepth = 256;  // columns per visit: the codes of 32 stored rows are 4 to 8 KB of L1
constexpr int64_t kLanesRows = 32;    // stored rows of a visit

// Columns of a stored row that share a scale, or a table.
template <Format F>
constexpr int64_t kScaledColumns = kRowScales<F> ? kScaleBlock[static_cast<int>(F)].cols : kBlock;

// The scales of a visit, [groups of columns][32 stored rows].
template <Format F>
void transpose_scales(const Matrix& w, int64_t row, int64_t rows, int64_t col, int64_t cols, float* out) {
  constexpr int64_t kMost = kLanesDepth / kScaledColumns<F>;  // scales of a row: 16 bytes or less
  const int64_t groups = (cols + kScaledColumns<F> - 1) / kScaledColumns<F>;
  const uint8_t* const first = scale_ptr(F, w, row, col);
  const int64_t step = scales_of<F>(w, row, col, cols).stride;
  for (int64_t r = 0; r < kLanesRows; r += 16) {
    const auto load = [&](int64_t i) {
      return _mm_maskz_loadu_epi16(r + i < rows ? (1u << groups) - 1 : 0u, first + (r + i) * step);
    };
    __m512i v[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      v[i] = _mm512_inserti32x4(_mm512_castsi128_si512(load(i)), load(4 + i), 1);
      v[i] = _mm512_inserti32x4(_mm512_inserti32x4(v[i], load(8 + i), 2), load(12 + i), 3);
    }
    const __m512i a = _mm512_unpacklo_epi32(v[0], v[1]), b = _mm512_unpackhi_epi32(v[0], v[1]),
                  c = _mm512_unpacklo_epi32(v[2], v[3]), d = _mm512_unpackhi_epi32(v[2], v[3]);
    const __m512i pairs[4] = {_mm512_unpacklo_epi64(a, c), _mm512_unpackhi_epi64(a, c), _mm512_unpacklo_epi64(b, d),
                              _mm512_unpackhi_epi64(b, d)};
#pragma GCC unroll 4
    for (int i = 0; i < kMost / 2; ++i) {
      _mm512_store_si512(out + 2 * i * kLanesRows + r, _mm512_slli_epi32(pairs[i], 16));
      _mm512_store_si512(out + (2 * i + 1) * kLanesRows + r,
                         _mm512_and_si512(pairs[i], _mm512_set1_epi32(static_cast<int>(0xffff0000))));
    }
  }
}

// -1/2 times the sums of packed operand rows [pairs][rows][2] over each 128 columns of a visit -> [groups][rows].
inline void minus_halves(const uint16_t* a, int64_t rows, int64_t pairs, float* out) {
  constexpr int64_t kGroup = kBlock / 2;
  const __m512bh half = as_bf16(word(0xbf00));  // of -1/2
  const __mmask16 lanes = first_lanes(rows);
  for (; pairs > 0; pairs -= kGroup, out += rows) {
    __m512 sum[4] = {};
    for (int64_t n = pairs < kGroup ? pairs : kGroup; n > 0; n -= 4)  // a multiple: operand rows are padded
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i, a += 2 * rows)
        sum[i] = _mm512_dpbf16_ps(sum[i], as_bf16(_mm512_maskz_loadu_epi32(lanes, a)), half);
    _mm512_mask_storeu_ps(out, lanes, _mm512_add_ps(_mm512_add_ps(sum[0], sum[1]), _mm512_add_ps(sum[2], sum[3])));
  }
}

// 32 stored rows, or what is left of a strip, along up to kLanesDepth columns.
struct LanesVisit {
  int64_t row = 0, rows = 0, k = 0, depth = 0;
};
inline int64_t lanes_visits(const Strip& s) {
  return blocks_of(s.count, kLanesRows) * blocks_of(s.matrix.cols, kLanesDepth);
}
inline LanesVisit lanes_visit(const Strip& s, int64_t i) {
  if (i >= lanes_visits(s)) return {};
  const int64_t blocks = blocks_of(s.matrix.cols, kLanesDepth), row = i / blocks * kLanesRows,
                k = i % blocks * kLanesDepth;
  return {row, s.count - row < kLanesRows ? s.count - row : kLanesRows, k,
          s.matrix.cols - k < kLanesDepth ? s.matrix.cols - k : kLanesDepth};
}

// What is done beside the products of a visit, a little at each of their steps, as long as something is left of it: the
// codes of the next visit are transposed and those of the one after it asked for. It has few instructions and stays in
// memory, so that products have the registers; what it knows of its way is tables, for branches that are taken now and
// then would cost as much as all else here.
class VisitsAhead {
 public:
  // out_step: bytes between the two parts of what is transposed.
  explicit VisitsAhead(int64_t out_step) : out_step_(out_step) {}
  // Codes of 32 stored rows x `bytes` bytes of columns, a multiple of 64, `step` apart, to be transposed to `out`,
  // [2][vectors][16 stored rows]. A unit is 8 rows x 16 bytes: along a line of 64 bytes, then the next 8 rows, then the
  // next line.
  void transpose_later(const uint8_t* stored, int64_t step, int64_t bytes, std::byte* out) {
    stored_ = stored;
    out_ = out;
    units_ = bytes / 4;
    at_ = 0;
    if (step == step_) return;  // the way is that of the visit before
    step_ = step;
    for (int64_t i = 0; i < 16; ++i) {
      const auto from = [&](int64_t u) { return u / 16 * 64 + u % 16 / 4 * 8 * step + u % 4 * 16; };
      const auto to = [&](int64_t u) { return u / 16 * 1024 + u % 16 / 8 * out_step_ + u / 4 % 2 * 32 + u % 4 * 256; };
      from_[i] = from(i + 1) - from(i);
      to_[i] = to(i + 1) - to(i);
    }
  }
  void ask_later(const LinesLater& lines) { lines_ = lines; }

  inline __attribute__((always_inline)) void ask() { lines_.ask(); }
  inline __attribute__((always_inline)) void transpose() {
    if (units_ <= 0) return;
    --units_;
    const uint8_t* const p = stored_;
    std::byte* const out = out_;
    stored_ = p + from_[at_ % 16];
    out_ = out + to_[at_ % 16];
    ++at_;
    transpose_codes(p, step_, out);
  }
  void finish() {
    while (units_ > 0) transpose();
    lines_.finish();
  }

 private:
  const int64_t out_step_;
  const uint8_t* stored_ = nullptr;
  int64_t step_ = 0, units_ = 0;
  std::byte* out_ = nullptr;
  uint64_t at_ = 0;
  int64_t from_[16], to_[16];
  LinesLater lines_;
};

// Pairs of columns that lane_tile takes: with sums of two groups of 128 in one function compilers spill them.
template <Format F>
constexpr int64_t kTilePairs = (F == Format::kInt8Group128 ? kBlock : kLanesDepth) / 2;

// C [R, 32] (+)= A [pairs][R][2] x codes [2][vectors][16 stored rows], where sums have scales with these, [groups][32
// stored rows], and with what such sums begin with, [groups][R] or null. A function of its own, for one loop's
// registers.
template <Format F, int R, bool kScaled>
KJAX_ALONE void lane_tile(const uint16_t* a, const std::byte* codes, int64_t codes_step, int64_t pairs,
                          const std::byte* table, const float* scales, const float* starts, float* c, int64_t ldc,
                          bool add, VisitsAhead& beside) {
  constexpr int64_t P = Lanes<F>::kPairs, kWhole = kScaledColumns<F> / 2, kMost = kTilePairs<F>;
  LaneSums<R> sums(c, ldc, add && !kScaled);
  for (int64_t k = 0; k < (kMost == kWhole ? 1 : pairs); k += kWhole) {
    if constexpr (kRowScales<F>) sums = LaneSums<R>(kPlusHalf<F> ? starts : nullptr);
    for (int64_t n = pairs - k < kWhole ? pairs - k : kWhole; n > 0; n -= P) {
      beside.ask();
      if (P > 2) beside.transpose();
      __asm__("" : "+r"(table));  // its lines are read again and again: sums need the registers
      const auto v = Lanes<F>::load(codes, table), w = Lanes<F>::load(codes + codes_step, table);
#pragma GCC unroll 4
      for (int64_t q = 0; q < P; ++q) {
        const __m512i y[2] = {Lanes<F>::pair(v, q), Lanes<F>::pair(w, q)};
        if (P == 2 && q == 1) beside.transpose();  // away from the look-ups: so many at once would hold up the products
        sums.multiply(q, a + 2 * q * R, y);
      }
      a += 2 * P * R;
      codes += 64;
    }
    if constexpr (kRowScales<F>) {
      sums.store_scaled(scales, c, ldc, add || k > 0);
      scales += kLanesRows;
      if constexpr (kPlusHalf<F>) starts += R;
    } else {
      table += Decode<F>::kTableBytes;
    }
  }
  if constexpr (!kScaled) sums.store(c, ldc);
  else if constexpr (!kRowScales<F>) sums.store_scaled(scales, c, ldc, add);
}

template <Format F>
void along_lanes(const Product& p) {
  const Matrix& w = p.strip.matrix;
  constexpr int64_t kBytes = kLanesDepth * kBits[static_cast<int>(F)] / 8;  // of a stored row's visit
  std::byte* const codes = p.scratch;                                       // two of [2][vectors][64]
  std::byte* const spare = codes + 2 * kLanesRows * kBytes;
  float* const scales = reinterpret_cast<float*>(spare + kLanesRows * kBytes);  // [groups of columns][32]
  float* const starts = scales + kLanesRows * (kLanesDepth / 32);               // [groups of all columns][rows]
  static_assert(!kPlusHalf<F> || Decode<F>::kTableBytes == 0);                  // they share the room
  const Tables<F> tables(w, p.strip.first, p.strip.count, 0, w.cols, reinterpret_cast<std::byte*>(starts));
  const int64_t groups = blocks_of(w.cols, kScaledColumns<F>), visits = lanes_visits(p.strip);
  const auto tile = [&](int64_t r, int64_t rows, int64_t k) {
    return static_cast<const uint16_t*>(p.a) + r * p.lda + k * rows;
  };
  if constexpr (kPlusHalf<F>)
    for_parts<kLaneRows>(p.rows, [&](int64_t r, int64_t n) {
      minus_halves(tile(r, n, 0), n, blocks_of(w.cols, kPad) * kPad / 2, starts + groups * r);
    });
  VisitsAhead beside(16 * kBytes);
  const auto transpose_later = [&](int64_t i) {
    const LanesVisit v = lanes_visit(p.strip, i);
    if (v.rows == 0) return;
    const uint8_t* stored = byte_at(F, w, p.strip.first + v.row, v.k);
    int64_t step = row_bytes(F, w.cols);
    const int64_t exist = bytes_of(F, v.depth + (F == Format::kInt4Group32)), bytes = blocks_of(exist, 64) * 64;
    if (exist < bytes || v.rows < kLanesRows) {  // a copy of what exists
      __builtin_memset(spare, 0, kLanesRows * kBytes);
      for (int64_t r = 0; r < v.rows; ++r) __builtin_memcpy(spare + r * kBytes, stored + r * step, exist);
      stored = reinterpret_cast<const uint8_t*>(spare);
      step = kBytes;
    }
    beside.transpose_later(stored, step, bytes, codes + i % 2 * kLanesRows * kBytes);
  };
  transpose_later(0);
  beside.finish();
  for (int64_t i = 0; i < visits; ++i) {
    const LanesVisit v = lanes_visit(p.strip, i);
    transpose_later(i + 1);
    const Strip& s = i + 2 < visits ? p.strip : p.next;
    const LanesVisit later = lanes_visit(s, i + 2 < visits ? i + 2 : i + 2 - visits);
    beside.ask_later({byte_at(F, s.matrix, s.first + later.row, later.k), row_bytes(F, s.matrix.cols),
                      bytes_of(F, later.depth), later.rows,
                      scales_of<F>(s.matrix, s.first + later.row, later.k, later.depth)});
    const std::byte* table = tables.at_block(p.strip.first, v.k);
    if constexpr (F == Format::kInt8Group128) table = reinterpret_cast<const std::byte*>(&kHalfTable);
    if constexpr (F == Format::kInt4Group32) table = reinterpret_cast<const std::byte*>(&kNibbleTable);
    if constexpr (kRowScales<F>) transpose_scales<F>(w, p.strip.first + v.row, v.rows, v.k, v.depth, scales);
    else
      for (int64_t r = 0; p.row_scales && r < kLanesRows; ++r)
        scales[r] = r < v.rows ? row_scale(p.row_scales, p.strip.first + v.row + r) : 0.0f;
    for_tiles<kLaneRows>(p.rows, [&]<int R>(int64_t r) {
      for (int64_t q = 0, all = blocks_of(v.depth, kPad) * kPad / 2; q < all; q += kTilePairs<F>) {
        const int64_t col = v.k + 2 * q;
        const auto multiply = [&]<bool kScaled>() {
          lane_tile<F, R, kScaled>(tile(r, R, col),
                                   codes + i % 2 * kLanesRows * kBytes + q / Lanes<F>::kPairs * 64, 16 * kBytes,
                                   all - q < kTilePairs<F> ? all - q : kTilePairs<F>, table,
                                   scales + 2 * q / kScaledColumns<F> * kLanesRows,
                                   starts + groups * r + col / kScaledColumns<F> * R, p.c + r * p.ldc + v.row, p.ldc,
                                   p.add || col > 0, beside);
        };
        if (kRowScales<F> || p.row_scales) multiply.template operator()<true>();
        else if constexpr (!kRowScales<F>) multiply.template operator()<false>();
      }
    });
    beside.finish();
  }
}

// Layout of operand rows for that: tiles of equal parts of them, [pair of columns][rows][2].
inline void pack_lanes(const uint16_t* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k,
                       int64_t depth, uint16_t* packed, int64_t length) {
  for_parts<kLaneRows>(rows, [&](int64_t r, int64_t n) {
    const int64_t begin = r > first ? r : first, end = r + n < first + count ? r + n : first + count;
    if (begin >= end) return;
    const __mmask16 mine = first_lanes(end - begin);
    for (int64_t i = 0; i < depth; i += 32) {
      __m512i lines[16];
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j)
        lines[j] = j < end - begin ? _mm512_loadu_si512(from + (begin - first + j) * lda + i) : _mm512_setzero_si512();
      transpose(lines);
      uint16_t* const to = packed + r * length + (k + i) * n + (begin - r) * 2;
#pragma GCC unroll 16
      for (int64_t j = 0; j < 16; ++j) _mm512_mask_storeu_epi32(to + j * n * 2, mine, lines[j]);
    }
  });
}
