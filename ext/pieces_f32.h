// Stored codes as floats in registers, in an order that costs least, and operands in the same order; written against
// the vector type V of the including file. Included inside an unnamed namespace by each float kernel file, after
// decode_f32.h and elementwise.h.
//   int4_scales(p): of kLanes / 4 groups, each for the lanes of its 32 columns.
//   by_eights(p, out): lane l of out[i] is p[8 l + i].

inline Dtype operand_type(Format format) { return kOperandType[static_cast<int>(format)]; }

// n operands from the element `at` on as floats, by whole vectors: of a row, which is zero to a multiple of kPad.
inline void widen(const void* a, Format format, int64_t at, int64_t n, float* out) {
  if (operand_type(format) == Dtype::kFp32) {
    __builtin_memcpy(out, static_cast<const float*>(a) + at, static_cast<size_t>(n) * 4);
  } else {
    const uint16_t* const from = static_cast<const uint16_t*>(a) + at;
    for (int64_t i = 0; i < n; i += kLanes) store(out + i, load_bf16(from + i));
  }
}

// What int4_codes of number i are multiplied by.
inline float int4_unit(int64_t i) {
  constexpr float units[4] = {0x1p0f, 0x1p-4f, 0x1p-8f, 0x1p-12f};
  return units[i % 4];
}

// A piece of a stored row: what is decoded at once. Lane l of vector i has column
//   bf16  2 l + i           the two halves of a 32-bit lane
//   int4  8 l + i           the eight codes of one
//   else  kLanes i + l
template <Format F>
struct Piece {
  static constexpr bool kHalves = F == Format::kBf16, kWords = F == Format::kInt4Group32;
  static constexpr int kVectors = kWords ? 8 : 2;
  static constexpr int64_t kColumns = kVectors * kLanes, kBytes = kColumns * kBits[static_cast<int>(F)] / 8;
  // Vectors of operands or sums that belong to it: those of INT4 have 8 times their sum behind them, for the 8 that
  // every code has too much.
  static constexpr int64_t kStride = (kVectors + kWords) * kLanes;
  // Bytes of the scales of a run of columns, whose sums are multiplied by them at once; others have none by column.
  static constexpr int64_t kRunScales = kWords                       ? kColumns / 32 * 2
                                        : F == Format::kInt8Group128 ? 2
                                        : F == Format::kFp8Block     ? 4
                                                                     : 0;
  static constexpr int64_t kRun = kRunScales && !kWords ? 128 : kColumns;

  V words;
  const uint8_t* codes;
  inline __attribute__((always_inline)) void read(const uint8_t* p) {
    codes = p;
    if constexpr (kWords) words = load(reinterpret_cast<const float*>(p));
  }
  inline __attribute__((always_inline)) V vector(int i) const {
    if constexpr (kHalves) {
      const float* p = reinterpret_cast<const float*>(codes);
      __asm__ volatile("" : "+r"(p));  // loaded for each half: a register that keeps the word would be one too many
      return i ? high_half(load(p)) : low_half(load(p));
    } else if constexpr (kWords)
      return int4_codes(words, i);
    else if constexpr (F == Format::kFp32)
      return load(reinterpret_cast<const float*>(codes) + i * kLanes);
    else
      return load_code<F>(codes, i * kLanes);
  }
  static inline __attribute__((always_inline)) V run_scales(const uint8_t* p) {
    if constexpr (kWords)
      return int4_scales(p);
    else
      return set1(kCodeUnit<F> * load_scale(F, p));
  }
  static int64_t column(int64_t i, int64_t lane) {
    return kHalves ? 2 * lane + i : kWords ? 8 * lane + i : kLanes * i + lane;
  }

  // Operands of a piece from p on, zeros from n on; n is a multiple of kPad.
  static void arrange(const void* p, int64_t n, float* out) {
    const Dtype type = operand_type(F);
    if (n < kColumns && !kWords) {
      for (int64_t i = 0; i < kVectors; ++i) store(out + i * kLanes, set1(0.0f));
      return;
    }
    if constexpr (kHalves) {
      const V pairs = load(static_cast<const float*>(p));
      store(out, low_half(pairs));
      store(out + kLanes, high_half(pairs));
    } else if constexpr (kWords) {
      float columns[kColumns];
      for (int64_t i = 0; i < kColumns; i += kLanes)
        store(columns + i, i < n ? load_number(p, type, i, kLanes) : set1(0.0f));
      V v[8], eight = set1(0.0f);
      by_eights(columns, v);
      for (int i = 0; i < 8; ++i) {
        eight = add(eight, v[i]);
        store(out + i * kLanes, mul(v[i], set1(int4_unit(i))));
      }
      store(out + 8 * kLanes, mul(eight, set1(-8.0f)));
    } else {
      for (int64_t i = 0; i < kVectors; ++i) store(out + i * kLanes, load_number(p, type, i * kLanes, kLanes));
    }
  }
};

// A copy of n columns of a stored row, where a whole run does not lie, and zeros; and of their scales, if these matter.
template <Format F>
struct PartRun {
  alignas(16) uint8_t codes[Piece<F>::kRun * kBits[static_cast<int>(F)] / 8];
  uint8_t scales[8];
  void copy(const uint8_t* from, const uint8_t* of_groups, int64_t n) {
    constexpr ScaleBlock block = kScaleBlock[static_cast<int>(F)];
    *this = {};
    __builtin_memcpy(codes, from, static_cast<size_t>(bytes_of(F, n + (F == Format::kInt4Group32))));
    if (of_groups) __builtin_memcpy(scales, of_groups, static_cast<size_t>(scales_per_row(block, n) * block.bytes));
  }
};
