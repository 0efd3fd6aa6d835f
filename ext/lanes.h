// Codes -> bf16 pairs in registers, while sums fill most of them: as far as it can be done with instructions that leave
// the two ports of the dot products alone, and without storing what was decoded, for a store takes as long as two of
// them. Included inside an unnamed namespace after panel_across.h.

// A signed byte plus a half is one of 128 magnitudes and a sign, and a bf16: of a negative byte all other bits are
// flipped, then this is the table. Sums of products begin at minus half the sum of the operands.
struct HalfTable {
  alignas(64) uint8_t bytes[256];
  constexpr HalfTable() : bytes() {
    for (int i = 0; i < 128; ++i) {
      const uint32_t bits = __builtin_bit_cast(uint32_t, static_cast<float>(i) + 0.5f);
      bytes[i] = static_cast<uint8_t>(bits >> 16);
      bytes[128 + i] = static_cast<uint8_t>(bits >> 24);
    }
  }
};
constexpr HalfTable kHalfTable{};
template <Format F>
constexpr bool kPlusHalf = F == Format::kInt8Group128;  // what `along` transposes
// Of a negative byte all bits but its sign are flipped: logic and shifts, which cost nothing beside dot products as
// masks of bytes and instructions of Galois fields do.
inline __attribute__((always_inline)) __m512i flip_negative(__m512i codes) {
  const __m512i sign = _mm512_and_si512(codes, _mm512_set1_epi8(static_cast<char>(0x80)));
  return _mm512_xor_si512(codes, _mm512_sub_epi8(sign, _mm512_srli_epi16(sign, 7)));
}

// 8 stored rows x 16 bytes of columns -> halves of 4 vectors, each with the same 4 bytes of all rows: each lane of 128
// bits has the first 2 bytes of its four rows, then the next 2. So few at a time leave products their registers.
inline __attribute__((always_inline)) void transpose_codes(const uint8_t* p, int64_t step, std::byte* out) {
  const auto rows = [&](int64_t i) __attribute__((always_inline)) {
    const auto row = [&](int64_t r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p + r * step)); };
    return _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(i + 4), 1);
  };
  const __m256i r0 = rows(0), r1 = rows(1), r2 = rows(2), r3 = rows(3);
  const __m256i a = _mm256_unpacklo_epi16(r0, r1), b = _mm256_unpackhi_epi16(r0, r1), c = _mm256_unpacklo_epi16(r2, r3),
                d = _mm256_unpackhi_epi16(r2, r3);
  const auto store = [&](int64_t i, __m256i v) { _mm256_store_si256(reinterpret_cast<__m256i*>(out + 64 * i), v); };
  store(0, _mm256_unpacklo_epi32(a, c));
  store(1, _mm256_unpackhi_epi32(a, c));
  store(2, _mm256_unpacklo_epi32(b, d));
  store(3, _mm256_unpackhi_epi32(b, d));
}

// How codes of 16 stored rows, as transpose_codes leaves them, become pairs of columns. Where rows have
// scales, sums are multiplied by them, group by group: multiplying weights in registers, once more for every tile of
// operand rows, would take longer than decoding them once for all (decode_ahead.h).
//   kPairs   pairs of columns in a vector of codes
//   load(p, table)   a vector of codes, as far as it is decoded at once
//   pair(loaded, i)  a vector of bf16 pairs of it; i is known after unrolling
template <Format F>
struct Lanes;

// Codes of a byte, by a table of low and one of high bytes.
struct ByteLanes {
  static constexpr int64_t kPairs = 2;
  static inline __attribute__((always_inline)) LowHigh load(const std::byte* p, const std::byte* table) {
    return by_table(_mm512_load_si512(p), table);
  }
  static inline __attribute__((always_inline)) __m512i pair(const LowHigh& v, int64_t i) {
    return i ? _mm512_unpackhi_epi8(v.low, v.high) : _mm512_unpacklo_epi8(v.low, v.high);
  }
};
template <>
struct Lanes<Format::kFp8Block> : ByteLanes {};
template <>
struct Lanes<Format::kInt8Group128> : ByteLanes {
  static inline __attribute__((always_inline)) LowHigh load(const std::byte* p, const std::byte* table) {
    return by_table(flip_negative(_mm512_load_si512(p)), table);
  }
};

// The bf16 of 16 codes, twice: a look-up takes five bits, of which the fifth is the next code's.
struct NibbleTable {
  alignas(64) uint16_t words[32];
  constexpr NibbleTable() : words() {
    for (int i = 0; i < 32; ++i)
      words[i] = static_cast<uint16_t>(__builtin_bit_cast(uint32_t, static_cast<float>(i % 16 - 8)) >> 16);
  }
};
constexpr NibbleTable kNibbleTable{};
template <>
struct Lanes<Format::kInt4Group32> {
  static constexpr int64_t kPairs = 4;
  struct Codes {
    __m512i codes;
    const std::byte* table;
  };
  static inline __attribute__((always_inline)) Codes load(const std::byte* p, const std::byte* table) {
    return {_mm512_load_si512(p), table};
  }
  static inline __attribute__((always_inline)) __m512i pair(const Codes& v, int64_t i) {
    const __m512i both = i < 2 ? _mm512_unpacklo_epi16(v.codes, v.codes) : _mm512_unpackhi_epi16(v.codes, v.codes);
    const __m512i shifts = _mm512_set1_epi32(i % 2 ? 12 << 16 | 8 : 4 << 16);  // of the two words of four codes
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(both, shifts), _mm512_load_si512(v.table));
  }
};

// A pair of numbers in all lanes. Said in assembly, as compilers load an operand of its own for each dot product.
inline __attribute__((always_inline)) __m512i everywhere(const uint16_t* pair) {
#if defined(KJAX_EMULATED)
  int two;
  __builtin_memcpy(&two, pair, 4);
  return _mm512_set1_epi32(two);
#else
  __m512i lanes;
  __asm__("vpbroadcastd %1, %0" : "=v"(lanes) : "m"(*reinterpret_cast<const int*>(pair)));
  return lanes;
#endif
}

constexpr int kLaneRows = 12;  // operand rows of a tile, x 2 vectors: twenty-four sums

// The sums of a tile of R operand rows x 32 numbers. Few rows have others for odd pairs: a dot product takes 6 cycles.
template <int R>
struct LaneSums {
  static constexpr int kChains = R <= 5 ? 2 : 1;
  __m512 of[kChains][R][2];

  inline __attribute__((always_inline)) LaneSums(const float* c, int64_t ldc, bool add) {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) {
        of[kChains - 1][i][j] = _mm512_setzero_ps();
        of[0][i][j] = add ? _mm512_loadu_ps(c + i * ldc + j * 16) : _mm512_setzero_ps();
      }
  }
  // A number for each row to begin with; null: zeros.
  inline __attribute__((always_inline)) explicit LaneSums(const float* start) : LaneSums(nullptr, 0, false) {
#pragma GCC unroll 12
    for (int i = 0; start && i < R; ++i) of[0][i][0] = of[0][i][1] = _mm512_set1_ps(start[i]);
  }
  // Pair `q` of the rows at x [R][2], times two vectors of pairs.
  inline __attribute__((always_inline)) void multiply(int64_t q, const uint16_t* x, const __m512i (&y)[2]) {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i) {
      const __m512i pair = everywhere(x + 2 * i);
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j)
        of[q % kChains][i][j] = _mm512_dpbf16_ps(of[q % kChains][i][j], as_bf16(pair), as_bf16(y[j]));
    }
  }
  inline __attribute__((always_inline)) void store(float* c, int64_t ldc) const {
#pragma GCC unroll 12
    for (int i = 0; i < R; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < 2; ++j) _mm512_storeu_ps(c + i * ldc + j * 16, all(i, j));
  }
  // C (+)= the sums, multiplied by 32 scales.
  inline __attribute__((always_inline)) void store_scaled(const float* scales, float* c, int64_t ldc, bool add) const {
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const __m512 scale = _mm512_load_ps(scales + 16 * j);
#pragma GCC unroll 12
      for (int i = 0; i < R; ++i) {
        float* const to = c + i * ldc + j * 16;
        _mm512_storeu_ps(
            to, add ? _mm512_fmadd_ps(all(i, j), scale, _mm512_loadu_ps(to)) : _mm512_mul_ps(all(i, j), scale));
      }
    }
  }

 private:
  inline __attribute__((always_inline)) __m512 all(int i, int j) const {
    return kChains == 1 ? of[0][i][j] : _mm512_add_ps(of[0][i][j], of[kChains - 1][i][j]);
  }
};
