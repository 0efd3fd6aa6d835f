// Decoding the next stored rows inside the loops of AVX-512 products, beside them.
// Included inside an unnamed namespace after decode_panel.h and pace.h.

// Stored rows [first, first + rows) x columns [k, k + depth) -> out [rows][stride], as decode_rows leaves them, and
// later bytes asked for. k a multiple of 128; a unit is half of 128 weights of one row. Always inlined and without remainders,
// so that a product's sums stay in registers while both share the core.
template <Format F>
class RowsAhead {
 public:
  RowsAhead(const Matrix& w, const Tables<F>& tables, int64_t first, int64_t rows, int64_t k, int64_t depth,
            uint16_t* out, int64_t stride, int64_t ticks, const Prefetch& prefetch)
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
        prefetch_(prefetch) {}
  inline __attribute__((always_inline)) void tick() {
    prefetch_.tick();
    pace_.tick([&]() __attribute__((always_inline)) { unit(); });
  }
  // The rest, and the columns behind the last whole block.
  void finish() {
    pace_.finish([&] { unit(); });
    const int64_t whole = depth_ / kBlock * kBlock;
    if (whole < depth_)
      decode_rows(*w_, *tables_, first_, rows_, k_ + whole, depth_ - whole, out_ + whole, stride_, prefetch_);
  }
  const Prefetch& prefetch() const { return prefetch_; }

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
};

// Stored rows [k, k + depth) of a strip -> panels as across_panel makes them, and later bytes asked for. Always inlined
// and without remainders, so that a product's sums stay in registers. A unit is 64 columns of a pair.
template <Format F>
class PairsAhead {
 public:
  PairsAhead(const Strip& strip, const Tables<F>& tables, int64_t k, int64_t depth, uint16_t* panel, int64_t ticks,
             const Prefetch& prefetch)
      : matrix_(&strip.matrix),
        tables_(&tables),
        first_(strip.first),
        count_(strip.count),
        k_(k),
        depth_(depth),
        pairs_((depth + 1) / 2),
        lines_(strip.count / kLine),
        panel_(panel),
        pace_(depth / 2 * lines_, ticks),
        prefetch_(prefetch) {}
  inline __attribute__((always_inline)) void tick() {
    prefetch_.tick();
    pace_.tick([&]() __attribute__((always_inline)) { unit(); });
  }
  // The rest, a last row without a neighbour, and the columns behind the last whole line.
  void finish() {
    pace_.finish([&] { unit(); });
    const int64_t whole = lines_ * kLine, last = k_ + depth_ - 1;
    for (int64_t c = 0; depth_ % 2 && c < whole; c += kLine)
      interleave(load(last, c, kLine), {_mm512_setzero_si512(), _mm512_setzero_si512()},
                 panel_ + (c * pairs_ + depth_ / 2 * kLine) * 2);
    if (whole < count_)
      across_panel(*matrix_, *tables_, k_, depth_, first_ + whole, count_ - whole, panel_ + whole * pairs_ * 2, pairs_,
                   prefetch_);
  }
  const Prefetch& prefetch() const { return prefetch_; }

 private:
  static constexpr int64_t kTogether = 16;  // pairs per visit of a line of columns, as in across_panel

  inline __attribute__((always_inline)) Weights load(int64_t row, int64_t c, int64_t n) const {
    const int64_t block = (first_ + c) / kBlock * kBlock;
    return Decode<F>::load(tables_->scale(*matrix_, row, block), byte_at(F, *matrix_, row, block), first_ + c - block,
                           n);
  }
  inline __attribute__((always_inline)) void unit() {
    const int64_t c = line_ * kLine, row = k_ + 2 * pair_;
    uint16_t* const out = panel_ + (c * pairs_ + pair_ * kLine) * 2;
    if constexpr (DecodePair<F>::kExists) {
      const int64_t block = (first_ + c) / kBlock * kBlock;
      const auto scale = [&](int64_t r) { return tables_->scale(*matrix_, r, block); };
      DecodePair<F>::load(scale(row), byte_at(F, *matrix_, row, block), scale(row + 1),
                          byte_at(F, *matrix_, row + 1, block), first_ + c - block, out);
    } else {
      interleave(load(row, c, kLine), load(row + 1, c, kLine), out);
    }
    if (++pair_ % kTogether && pair_ < depth_ / 2) return;
    if (++line_ < lines_) {
      pair_ = (pair_ - 1) / kTogether * kTogether;
    } else {
      line_ = 0;
    }
  }

  const Matrix* matrix_;
  const Tables<F>* tables_;
  int64_t first_, count_, k_, depth_, pairs_, lines_;
  uint16_t* panel_;
  int64_t line_ = 0, pair_ = 0;
  Pace pace_;
  Prefetch prefetch_;
};
