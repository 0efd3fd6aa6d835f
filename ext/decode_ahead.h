// Decoding the next block of stored rows a little at a time, between the products of the present one.
// Included inside an unnamed namespace after decode_panel.h.

// The reduction in blocks: a short one first where it has to be decoded before there is a product to hide it behind.
struct Blocks {
  int64_t total, first, step;
  int64_t count() const { return total <= first ? 1 : 1 + (total - first + step - 1) / step; }
  int64_t start(int64_t i) const { return i == 0 ? 0 : first + (i - 1) * step; }
  int64_t size(int64_t i) const {
    const int64_t whole = i == 0 ? first : step, left = total - start(i);
    return left < whole ? left : whole;
  }
};

// Spreads `units` of work evenly over `ticks`.
class Pace {
 public:
  Pace(int64_t units, int64_t ticks)
      : left_(units), rate_((kWhole * units + (ticks > 0 ? ticks : 1) - 1) / (ticks > 0 ? ticks : 1)) {}
  template <class Unit>
  inline __attribute__((always_inline)) void tick(Unit unit) {
    for (due_ += rate_; due_ >= kWhole && left_ > 0; due_ -= kWhole, --left_) unit();
  }
  template <class Unit>
  void finish(Unit unit) {
    for (; left_ > 0; --left_) unit();
  }

 private:
  static constexpr int64_t kWhole = 16;
  int64_t left_, rate_, due_ = 0;
};

// kLine stored rows x columns [k, k + depth) -> tiles [kLine / 16][tile_steps] of [16 rows][32]; k a multiple of 128.
// Rows beyond the strip repeat its last one, columns beyond depth are finite. A unit is 128 weights of one row.
template <Format F>
class TilesAhead {
 public:
  TilesAhead(const Strip& strip, int64_t k, int64_t depth, int64_t tile_steps, uint16_t* tiles, std::byte* room,
             int64_t ticks)
      : strip_(strip),
        k_(k),
        depth_(depth),
        tile_steps_(tile_steps),
        tiles_(tiles),
        tables_(strip.matrix, strip.first, strip.count, k, depth, room),
        pace_((depth + kBlock - 1) / kBlock * kLine, ticks) {}
  inline __attribute__((always_inline)) void tick() {
    pace_.tick([&] { unit(); });
  }
  void finish() {
    pace_.finish([&] { unit(); });
  }

 private:
  __attribute__((noinline)) void unit() {
    const int64_t row = strip_.first + (row_ < strip_.count ? row_ : strip_.count - 1);
    const auto scale = tables_.scale(strip_.matrix, row, k_ + at_);
    const uint8_t* const p = byte_at(F, strip_.matrix, row, k_ + at_);
    uint16_t* const out = tiles_ + (row_ / 16 * tile_steps_ + at_ / 32) * kTile + row_ % 16 * 32;
    for (int64_t c = 0; c < kBlock && c < depth_ - at_; c += 64) {
      const Weights weights = Decode<F>::load(scale, p, c, depth_ - at_ - c);
      _mm512_store_si512(out + c / 32 * kTile, weights.low);
      _mm512_store_si512(out + (c / 32 + 1) * kTile, weights.high);
    }
    if (++row_ == kLine) {
      row_ = 0;
      at_ += kBlock;
    }
  }

  const Strip strip_;
  const int64_t k_, depth_, tile_steps_;
  uint16_t* const tiles_;
  const Tables<F> tables_;
  Pace pace_;
  int64_t row_ = 0, at_ = 0;
};

// Stored rows [k, k + depth) of a strip -> panels [lines of 64 columns][pairs][64][2] of `pairs` pairs of rows each,
// zeros beyond depth rows; k even. A unit is 64 columns of a pair.
template <Format F>
class PanelAhead {
 public:
  PanelAhead(const Strip& strip, int64_t k, int64_t depth, int64_t pairs, uint16_t* panel, std::byte* room,
             int64_t ticks)
      : strip_(strip),
        k_(k),
        depth_(depth),
        pairs_(pairs),
        lines_((strip.count + kLine - 1) / kLine),
        panel_(panel),
        tables_(strip.matrix, k, depth, strip.first, strip.count, room),
        pace_(depth > 0 ? pairs * lines_ : 0, ticks) {}
  inline __attribute__((always_inline)) void tick() {
    pace_.tick([&] { unit(); });
  }
  void finish() {
    pace_.finish([&] { unit(); });
  }

 private:
  // Sixteen pairs per visit of a line of columns: bounds the DRAM pages open at once, as in across_panel.
  static constexpr int64_t kTogether = 16;

  __attribute__((noinline)) void unit() {
    const int64_t c = line_ * kLine, block = (strip_.first + c) / kBlock * kBlock, at = strip_.first + c - block;
    const int64_t pair = group_ + in_group_, row = k_ + 2 * pair;
    uint16_t* const out = panel_ + (line_ * pairs_ + pair) * kLine * 2;
    const auto load = [&](int64_t r) {
      if (r >= k_ + depth_) return Weights{_mm512_setzero_si512(), _mm512_setzero_si512()};
      return Decode<F>::load(tables_.scale(strip_.matrix, r, block), byte_at(F, strip_.matrix, r, block), at,
                             strip_.count - c);
    };
    bool done = false;
    if constexpr (DecodePair<F>::kExists)
      if ((done = row + 1 < k_ + depth_ && strip_.count - c >= kLine))
        DecodePair<F>::load(tables_.scale(strip_.matrix, row, block), byte_at(F, strip_.matrix, row, block),
                            tables_.scale(strip_.matrix, row + 1, block), byte_at(F, strip_.matrix, row + 1, block), at,
                            out);
    if (!done) interleave(load(row), load(row + 1), out);
    const int64_t group = pairs_ - group_ < kTogether ? pairs_ - group_ : kTogether;
    if (++in_group_ < group) return;
    in_group_ = 0;
    if (++line_ < lines_) return;
    line_ = 0;
    group_ += group;
  }

  const Strip strip_;
  const int64_t k_, depth_, pairs_, lines_;
  uint16_t* const panel_;
  const Tables<F> tables_;
  Pace pace_;
  int64_t group_ = 0, line_ = 0, in_group_ = 0;
};

// What happens between tile products: bytes of later blocks are asked for, the next block is decoded. Not inlined, so
// that the loops around the products stay small.
template <class Ahead>
struct Between {
  Prefetch prefetch;
  Ahead ahead;
  __attribute__((noinline)) void tick() {
    prefetch.tick();
    ahead.tick();
  }
};

// Stored rows [first, first + rows) x columns [k, k + depth) -> out [rows][stride], as decode_rows leaves them, and
// later bytes asked for. k a multiple of 128; a unit is 128 weights of one row. Always inlined and without remainders,
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
        pace_(depth / kBlock * rows, ticks),
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
  inline __attribute__((always_inline)) void unit() {
    const auto scale = tables_->scale(*w_, first_ + row_, k_ + at_);
    const uint8_t* const p = from_ + row_ * row_bytes_ + bytes_of(F, at_);
    uint16_t* const out = out_ + row_ * stride_ + at_;
#pragma GCC unroll 2
    for (int64_t c = 0; c < kBlock; c += 64) {
      const Weights weights = Decode<F>::load(scale, p, c, 64);
      _mm512_storeu_si512(out + c, weights.low);
      _mm512_storeu_si512(out + c + 32, weights.high);
    }
    if (++row_ == rows_) {
      row_ = 0;
      at_ += kBlock;
    }
  }

  const Matrix* w_;
  const Tables<F>* tables_;
  int64_t first_, rows_, k_, depth_, row_bytes_;
  const uint8_t* from_;
  uint16_t* out_;
  int64_t stride_, row_ = 0, at_ = 0;
  Pace pace_;
  Prefetch prefetch_;
};

// Stored rows [k, k + depth) of a strip -> panels as PanelAhead leaves them, and later bytes asked for. Always inlined
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
  static constexpr int64_t kTogether = 16;  // pairs per visit of a line of columns, as in PanelAhead

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
