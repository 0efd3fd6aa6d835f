// A cursor over the next strip's bytes, advanced from inside the micro-kernels so that decoding finds them in L2.
// Included inside an unnamed namespace by each kernel file.

// Bytes of scales that belong to a run of weights; those of the next run lie `stride` behind.
struct ScaleRun {
  const uint8_t* at = nullptr;
  int64_t stride = 0, bytes = 0;
};

class Prefetch {
 public:
  Prefetch() = default;
  // Asks for `rows` runs of `bytes` bytes, `stride` apart, and their scales, spread evenly over `steps` ticks.
  Prefetch(const uint8_t* base, int64_t stride, int64_t bytes, int64_t rows, int64_t steps, ScaleRun scales = {})
      : at_(base), stride_(stride), bytes_(bytes), rows_(base ? rows : 0), scales_(scales) {
    const int64_t lines = rows_ * ((bytes + kLineBytes - 1) / kLineBytes);
    const int64_t rate = (kUnit * lines + steps - 1) / (steps > 0 ? steps : 1);
    rate_ = static_cast<int>(rate < kMaxRate ? rate : kMaxRate);
  }

  inline __attribute__((always_inline)) void tick(int ticks = 1) {
    for (due_ += ticks * rate_; due_ >= kUnit; due_ -= kUnit) line();
  }

 private:
  static constexpr int kLineBytes = 64;
  static constexpr int kUnit = 16;             // rates are counted in sixteenths of a line per tick
  static constexpr int kMaxRate = 32 * kUnit;  // more would only queue behind the machine's line-fill buffers

  inline __attribute__((always_inline)) void line() {
    if (rows_ <= 0) {
      rate_ = due_ = 0;
      return;
    }
    if (done_ == 0 && scales_.bytes) {
      for (int64_t i = 0; i < scales_.bytes; i += kLineBytes) __builtin_prefetch(scales_.at + i, 0, 2);
      __builtin_prefetch(scales_.at + scales_.bytes - 1, 0, 2);
      scales_.at += scales_.stride;
    }
    __builtin_prefetch(at_ + done_, 0, 2);
    done_ += kLineBytes;
    if (done_ >= bytes_) {
      done_ = 0;
      at_ += stride_;
      --rows_;
    }
  }

  const uint8_t* at_ = nullptr;
  int64_t stride_ = 0, bytes_ = 0, rows_ = 0, done_ = 0;
  ScaleRun scales_;
  int rate_ = 0, due_ = 0;
};

// The same for products that are done within few cycles: two lines of 64 bytes at each step as long as there are any,
// and nothing that is decided anew at each of them, for branches that are taken now and then cost as much as all else
// that is done beside products.
class LinesLater {
 public:
  LinesLater() = default;
  LinesLater(const uint8_t* base, int64_t stride, int64_t bytes, int64_t rows, const ScaleRun& scales)
      : at_(base),
        scales_(scales.at),
        left_(base && bytes > 0 ? rows * ((bytes + kBytes - 1) / kBytes) : 0),
        of_run_((bytes + kBytes - 1) / kBytes),
        wrap_(stride - of_run_ * kBytes),
        scales_stride_(scales.stride) {}

  inline __attribute__((always_inline)) void ask() {
    if (left_ <= 0) return;
    --left_;
    const uint8_t* const p = at_;
    __builtin_prefetch(p, 0, 2);
    __builtin_prefetch(p + 64, 0, 2);
    __builtin_prefetch(scales_, 0, 2);
    const bool last = ++of_this_ == of_run_;
    of_this_ = last ? 0 : of_this_;
    at_ = p + kBytes + (last ? wrap_ : 0);
    scales_ += last ? scales_stride_ : 0;
  }
  void finish() {
    while (left_ > 0) ask();
  }

 private:
  static constexpr int64_t kBytes = 128;

  const uint8_t *at_ = nullptr, *scales_ = nullptr;
  int64_t left_ = 0, of_this_ = 0, of_run_ = 0, wrap_ = 0, scales_stride_ = 0;
};
