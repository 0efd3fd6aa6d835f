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
