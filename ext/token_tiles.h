// Tiles of 16 operand rows, tokens, as kernels take them whose results come out as [stored rows][tokens].
// Included inside an unnamed namespace after simd_avx512.h.

constexpr int64_t kTile = 512;  // bf16 of a tile: [16 pairs along k][16 tokens][2]

// Rows [n <= 16, 32] -> a tile, zeros beyond n rows.
inline void pack_tile(const uint16_t* from, int64_t lda, int64_t n, uint16_t* tile) {
  __m512i lines[16];
  for (int64_t j = 0; j < 16; ++j) lines[j] = j < n ? _mm512_loadu_si512(from + j * lda) : _mm512_setzero_si512();
  transpose(lines);
  for (int64_t j = 0; j < 16; ++j) _mm512_store_si512(tile + j * 32, lines[j]);
}

// C [n, 16] (+)= the transpose of sums [16 stored rows, 16 tokens]; the first n tokens, at most 16.
inline void unpack_sums(const float* sums, int64_t stride, int64_t n, float* c, int64_t ldc, bool add) {
  __m512i lines[16];
  for (int64_t i = 0; i < 16; ++i) lines[i] = _mm512_load_si512(sums + i * stride);
  transpose(lines);
  for (int64_t i = 0; i < 16 && i < n; ++i) {
    const __m512 sum = _mm512_castsi512_ps(lines[i]);
    _mm512_storeu_ps(c + i * ldc, add ? _mm512_add_ps(_mm512_loadu_ps(c + i * ldc), sum) : sum);
  }
}

// Asks for tiles of tokens that are multiplied next, a line at each step as long as there are any: operands of many
// rows are in L3 at best, and the first stored rows that meet them would wait.
class TokensLater {
 public:
  // Tiles [first, first + count) of `tokens` in columns [at, at + n) of `packed`
  TokensLater(const uint16_t* packed, int64_t tokens, int64_t first, int64_t count, int64_t at, int64_t n)
      : at_(packed + (at / 32 * tokens + first) * kTile),
        left_((n + 31) / 32 * count * kLines),
        of_step_(count * kLines),
        wrap_((tokens - count) * kTile) {}
  inline __attribute__((always_inline)) void ask() {
    if (left_ <= 0) return;
    --left_;
    __builtin_prefetch(at_, 0, 2);
    const bool last = ++of_this_ == of_step_;
    of_this_ = last ? 0 : of_this_;
    at_ += 32 + (last ? wrap_ : 0);
  }

 private:
  static constexpr int64_t kLines = kTile / 32;  // of a tile
  const uint16_t* at_;
  int64_t left_, of_this_ = 0, of_step_, wrap_;
};
