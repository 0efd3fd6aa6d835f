// Decoding the next stored rows inside the loops of AVX-512 products, beside them.
// Included inside an unnamed namespace after token_tiles.h, decode_panel.h and pace.h.

// Stored rows [first, first + rows) x columns [k, k + depth) -> out [rows][stride], as decode_rows leaves them, and
// later bytes of stored rows and of tokens asked for. k a multiple of 128; a unit is half of 128 weights of one row.
// Always inlined and without remainders, so that a product's sums stay in registers while both share the core.
template <Format F>
class RowsAhead {
 public:
  RowsAhead(const Matrix& w, const Tables<F>& tables, int64_t first, int64_t rows, int64_t k, int64_t depth,
            uint16_t* out, int64_t stride, int64_t ticks, const Prefetch& prefetch, const TokensLater& tokens)
      : w_(&w),
        tables_(&tables),
        first_(first),
        rows_(rows),
        k_(k),
        depth_(depth),
        row_bytes_(row_bytes(F, w.cols)),
        from_(byte_at(F, w, first, k)),
        out_(out),
        stride_(stride),
        pace_(depth / kBlock * rows * (kBlock / kUnit), ticks),
        prefetch_(prefetch),
        tokens_(tokens) {}
  inline __attribute__((always_inline)) void tick() {
    prefetch_.tick();
    pace_.tick([&]() __attribute__((always_inline)) { unit(); });
  }
  // For tokens
  inline __attribute__((always_inline)) void ask() { tokens_.ask(); }
  // The rest, and the columns behind the last whole block.
  void finish() {
    pace_.finish([&] { unit(); });
    const int64_t whole = depth_ / kBlock * kBlock;
    if (whole < depth_)
      decode_rows(*w_, *tables_, first_, rows_, k_ + whole, depth_ - whole, out_ + whole, stride_, prefetch_);
  }
  const Prefetch& prefetch() const { return prefetch_; }
  const TokensLater& tokens() const { return tokens_; }

 private:
  static constexpr int64_t kUnit = 64;      // weights at a time: more at once would hold up the products
  static constexpr int64_t kRowsAhead = 6;  // from asking L2 for a row to decoding it

  inline __attribute__((always_inline)) void unit() {
    const uint8_t* const p = from_ + row_ * row_bytes_ + bytes_of(F, at_);
    // What L2 has lost again behind many operand rows would keep the products' queues full of decoding that waits.
    __builtin_prefetch(p + kRowsAhead * row_bytes_ + bytes_of(F, c_), 0, 3);
    const Weights weights = Decode<F>::load(tables_->scale(*w_, first_ + row_, k_ + at_), p, c_, kUnit);
    uint16_t* const out = out_ + row_ * stride_ + at_ + c_;
    _mm512_storeu_si512(out, weights.low);
    _mm512_storeu_si512(out + 32, weights.high);
    c_ = kUnit - c_;
    if (c_ == 0 && ++row_ == rows_) {
      row_ = 0;
      at_ += kBlock;
    }
  }

  const Matrix* w_;
  const Tables<F>* tables_;
  int64_t first_, rows_, k_, depth_, row_bytes_;
  const uint8_t* from_;
  uint16_t* out_;
  int64_t stride_, row_ = 0, at_ = 0, c_ = 0;
  Pace pace_;
  Prefetch prefetch_;
  TokensLater tokens_;
};

// Stored rows [k, k + depth) of a strip -> panels as across_panel makes them, but for the columns of whole lines of 64,
// which come in the order of AcrossPairs; and later bytes asked for. Always inlined and without remainders, so that a
// product's sums stay in registers. A unit is a line of a pair of rows, or half of one.
template <Format F>
class PairsAhead {
 public:
  static constexpr int kUnits = kRowScales<F> ? 2 : 1;  // of a line: more at once would hold up the products
  PairsAhead(const Strip& strip, const Tables<F>& tables, int64_t k, int64_t depth, uint16_t* panel, int64_t ticks,
             const Prefetch& prefetch)
      : strip_(&strip),
        tables_(&tables),
        k_(k),
        depth_(depth),
        lines_(strip.count / kLine),
        row_bytes_(row_bytes(F, strip.matrix.cols)),
        scales_bytes_(scales_of<F>(strip.matrix, k, strip.first, kLine).stride),
        panel_(panel),
        pace_(depth / 2 * lines_ * kUnits, ticks),
        prefetch_(prefetch) {
    if (depth >= 2 && lines_ > 0) begin_run();
  }
  inline __attribute__((always_inline)) void tick() {
    prefetch_.tick();
    pace_.tick([&]() __attribute__((always_inline)) { unit(); });
  }
  // The rest, a last row without a neighbour, and the columns behind the last whole line.
  void finish() {
    pace_.finish([&] { unit(); });
    const int64_t whole = lines_ * kLine, pairs = (depth_ + 1) / 2;
    alignas(64) static const uint8_t kZeros[2 * kLine] = {};
    for (line_ = 0; depth_ % 2 && line_ < lines_; ++line_) {
      pair_ = depth_ / 2;
      begin_run();
      for (int64_t half = 0; half < 2; ++half) decode(kZeros, kZeros, half);
    }
    if (whole < strip_->count)
      across_panel(strip_->matrix, *tables_, k_, depth_, strip_->first + whole, strip_->count - whole,
                   panel_ + whole * pairs * 2, prefetch_);
  }
  const Prefetch& prefetch() const { return prefetch_; }

 private:
  static constexpr int64_t kTogether = 16;   // pairs per visit of a line, as in across_panel
  static constexpr int64_t kPairsAhead = 3;  // from asking L2 for a pair of rows to decoding it

  // From pair_ of line_ on, up to kTogether pairs.
  inline __attribute__((always_inline)) void begin_run() {
    const int64_t row = k_ + 2 * pair_, col = strip_->first + line_ * kLine, left = depth_ / 2 - pair_;
    run_ = (left < kTogether ? left : kTogether) * kUnits;
    stored_ = byte_at(F, strip_->matrix, row, col);
    if constexpr (kScaleBlock[static_cast<int>(F)].bytes > 0) scales_ = scale_ptr(F, strip_->matrix, row, col);
    table_ = pairs_table<F>(*tables_, row, col);
    out_ = panel_ + (line_ * kLine * ((depth_ + 1) / 2) + pair_ * kLine) * 2;
  }
  inline __attribute__((always_inline)) void decode(const uint8_t* next, const uint8_t* next_scales, int64_t half) {
    __m512i v[2];
    AcrossPairs<F>::pairs(stored_, next, half, table_, scales_, next_scales, v);
    _mm512_store_si512(out_ + half * kLine, v[0]);
    _mm512_store_si512(out_ + half * kLine + 32, v[1]);
  }
  inline __attribute__((always_inline)) void unit() {
    if (kUnits == 1 || run_ % 2 == 0)
      for (int64_t i = 0; i < 2; ++i)
        for (int64_t line = 0; line < bytes_of(F, kLine); line += 64)
          __builtin_prefetch(stored_ + (2 * kPairsAhead + i) * row_bytes_ + line, 0, 3);
    if constexpr (kUnits == 1) {
#pragma GCC unroll 2
      for (int64_t half = 0; half < 2; ++half) decode(stored_ + row_bytes_, scales_ + scales_bytes_, half);
    } else {
      decode(stored_ + row_bytes_, scales_ + scales_bytes_, run_ % 2);
    }
    if (--run_ % kUnits == 0) {
      stored_ += 2 * row_bytes_;
      scales_ += 2 * scales_bytes_;
      out_ += 2 * kLine;
    }
    if (run_ > 0) return;
    if (++line_ == lines_) {
      line_ = 0;
      pair_ += kTogether;
    }
    begin_run();
  }

  const Strip* strip_;
  const Tables<F>* tables_;
  int64_t k_, depth_, lines_, row_bytes_, scales_bytes_;
  uint16_t* panel_;
  int64_t line_ = 0, pair_ = 0;
  // Of the run: its units left, and where the next pair of rows lies.
  int64_t run_ = 0;
  const uint8_t *stored_ = nullptr, *scales_ = nullptr;
  const std::byte* table_ = nullptr;
  uint16_t* out_ = nullptr;
  Pace pace_;
  Prefetch prefetch_;
};
