// Decoding the next block of stored rows for the tiles a little at a time, between the products of the present one.
// Included inside an unnamed namespace after decode_panel.h and pace.h.

// The block of stored weights that is read after the one being decoded: its rows are asked for as those of the same
// number are decoded, with the scales that rows have of their own. Empty where nothing is read after it.
template <Format F>
class Later {
 public:
  Later() = default;
  // `rows` stored rows from (row, col) on
  Later(const Matrix& w, int64_t row, int64_t rows, int64_t col)
      : data_(byte_at(F, w, row, col)),
        stride_(row_bytes(F, w.cols)),
        rows_(data_ ? rows : 0),
        scales_(scales_of<F>(w, row, col, 1)) {}
  // Columns [col, col + n) of a row, counted from the block's
  inline __attribute__((always_inline)) void ask(int64_t row, int64_t col, int64_t n) const {
    if (row >= rows_) return;
    const uint8_t* const p = data_ + row * stride_ + bytes_of(F, col);
    for (int64_t i = 0; i < bytes_of(F, n); i += 64) __builtin_prefetch(p + i, 0, 2);
    if (scales_.stride && col == 0) __builtin_prefetch(scales_.at + row * scales_.stride, 0, 2);
  }

 private:
  const uint8_t* data_ = nullptr;
  int64_t stride_ = 0, rows_ = 0;
  ScaleRun scales_;
};

// kLine stored rows x columns [k, k + depth) -> tiles [kLine / 16][tile_steps] of [16 rows][32]; k a multiple of 128.
// Rows beyond the strip repeat its last one, columns beyond depth are finite. A unit is 128 columns of eight rows.
template <Format F>
class TilesAhead {
 public:
  TilesAhead(const Strip& strip, int64_t k, int64_t depth, int64_t tile_steps, uint16_t* tiles, std::byte* room,
             const Later<F>& later)
      : strip_(strip),
        k_(k),
        depth_(depth),
        tile_steps_(tile_steps),
        tiles_(tiles),
        tables_(strip.matrix, strip.first, strip.count, k, depth, room),
        later_(later) {}
  int64_t units() const { return blocks_of(depth_, kBlock) * (kLine / kTogether); }
  __attribute__((noinline)) void unit() {
    const int64_t stride = row_bytes(F, strip_.matrix.cols), last = strip_.count - 1, left = depth_ - at_;
    const uint8_t* const stored = byte_at(F, strip_.matrix, strip_.first, k_ + at_);
    uint16_t* out = tiles_ + (row_ / 16 * tile_steps_ + at_ / 32) * kTile + row_ % 16 * 32;
    const auto rows = [&](auto decode) {
      auto scale = tables_.scale(strip_.matrix, strip_.first + (row_ < last ? row_ : last), k_ + at_);
#pragma GCC unroll 1
      for (int64_t i = row_; i < row_ + kTogether; ++i, out += 32) {
        const int64_t row = i < last ? i : last;
        if constexpr (Decode<F>::kBlockRows == 1) scale = tables_.scale(strip_.matrix, strip_.first + row, k_ + at_);
        later_.ask(row, at_, kBlock);
        decode(scale, stored + row * stride);
      }
    };
    const auto store = [&](const auto& scale, const uint8_t* p, int64_t c, int64_t n) __attribute__((always_inline)) {
      const Weights weights = Decode<F>::load(scale, p, c, n);
      _mm512_store_si512(out + c / 32 * kTile, weights.low);
      _mm512_store_si512(out + (c / 32 + 1) * kTile, weights.high);
    };
    if (left >= kBlock)
      rows([&](const auto& scale, const uint8_t* p) __attribute__((always_inline)) {
        store(scale, p, 0, 64);
        store(scale, p, 64, 64);
      });
    else
      rows([&](const auto& scale, const uint8_t* p) {
        for (int64_t c = 0; c < left; c += 64) store(scale, p, c, left - c);
      });
    row_ += kTogether;
    if (row_ == kLine) {
      row_ = 0;
      at_ += kBlock;
    }
  }

 private:
  static constexpr int64_t kTogether = 8;

  const Strip strip_;
  const int64_t k_, depth_, tile_steps_;
  uint16_t* const tiles_;
  const Tables<F> tables_;
  const Later<F> later_;
  int64_t row_ = 0, at_ = 0;
};

// Stored rows [k, k + depth) of a strip -> panels [lines of 64 columns][pairs][64][2] of `pairs` pairs of rows each,
// zeros beyond depth rows; k and pairs multiples of 16. A unit is 64 columns of eight pairs.
template <Format F>
class PanelAhead {
 public:
  PanelAhead(const Strip& strip, int64_t k, int64_t depth, int64_t pairs, uint16_t* panel, std::byte* room,
             const Later<F>& later)
      : strip_(strip),
        k_(k),
        depth_(depth),
        pairs_(pairs),
        lines_((strip.count + kLine - 1) / kLine),
        panel_(panel),
        tables_(strip.matrix, k, depth, strip.first, strip.count, room),
        later_(later) {}
  int64_t units() const { return depth_ > 0 ? pairs_ / kTogether * lines_ : 0; }
  __attribute__((noinline)) void unit() {
    const int64_t c = line_ * kLine, block = (strip_.first + c) / kBlock * kBlock, at = strip_.first + c - block;
    const int64_t stride = row_bytes(F, strip_.matrix.cols), first = 2 * pair_, end = k_ + depth_;
    uint16_t* out = panel_ + (line_ * pairs_ + pair_) * kLine * 2;
    const uint8_t* p = byte_at(F, strip_.matrix, k_ + first, block);
    const auto scale_of = [&](int64_t row) { return tables_.scale(strip_.matrix, row, block); };
    if (k_ + first + 2 * kTogether <= end && strip_.count - c >= kLine) {
      auto scale = scale_of(k_ + first);
      const int64_t share = kAsked / kLine < lines_ ? kAsked / kLine : lines_;
      const auto load = [&](int64_t row, const uint8_t* p) __attribute__((always_inline)) {
        if constexpr (Decode<F>::kBlockRows == 1) scale = scale_of(row);
        return Decode<F>::load(scale, p, at, kLine);
      };
#pragma GCC unroll 1
      for (int64_t r = first; r < first + 2 * kTogether; r += 2, p += 2 * stride, out += kLine * 2) {
        if ((r - first) / 2 * share / kTogether == line_ % share)
          for (int64_t i = r; i < r + 2; ++i) later_.ask(i, c / kAsked * kAsked, kAsked);
        if constexpr (DecodePair<F>::kExists) {
          DecodePair<F>::load(scale_of(k_ + r), p, scale_of(k_ + r + 1), p + stride, at, out);
        } else {
          const Weights a = load(k_ + r, p), b = load(k_ + r + 1, p + stride);
          interleave(a, b, out);
        }
      }
    } else {
      const auto load = [&](int64_t row) {
        if (row >= end) return Weights{_mm512_setzero_si512(), _mm512_setzero_si512()};
        return Decode<F>::load(scale_of(row), byte_at(F, strip_.matrix, row, block), at, strip_.count - c);
      };
      for (int64_t r = first; r < first + 2 * kTogether; r += 2, out += kLine * 2)
        interleave(load(k_ + r), load(k_ + r + 1), out);
    }
    if (++line_ < lines_) return;
    line_ = 0;
    pair_ += kTogether;
  }

 private:
  static constexpr int64_t kTogether = 8;  // bounds the DRAM pages open at once, too
  // Columns of a row to ask for at a time: 128 bytes, which memory delivers together. Single lines came at half the
  // rate, and the rows of a unit at once filled the core's buffers: lines of columns that share them share the rows.
  static constexpr int64_t kAsked = 1024 / kBits[static_cast<int>(F)];

  const Strip strip_;
  const int64_t k_, depth_, pairs_, lines_;
  uint16_t* const panel_;
  const Tables<F> tables_;
  const Later<F> later_;
  int64_t pair_ = 0, line_ = 0;
};

// What happens between tile products: the next block is decoded unit by unit, and bytes of later ones are asked for.
// Not inlined, so that the loops around the products stay small.
template <class Ahead>
class Between {
 public:
  Between(const Ahead& ahead, int64_t ticks, const Prefetch& prefetch)
      : prefetch_(prefetch), ahead_(ahead), pace_(ahead.units(), ticks) {}
  __attribute__((noinline)) void tick() {
    prefetch_.tick();
    pace_.tick([&] { ahead_.unit(); });
  }
  void finish() {
    pace_.finish([&] { ahead_.unit(); });
  }

 private:
  Prefetch prefetch_;
  Ahead ahead_;
  Pace pace_;
};
