// How a product divides its reduction, and spreads other work over its steps.
// Included inside an unnamed namespace.

inline int64_t blocks_of(int64_t n, int64_t size) { return (n + size - 1) / size; }

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
