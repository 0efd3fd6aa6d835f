// AVX-512F kernels in fp32: tiles of 6 rows x 64 floats, twenty-four of thirty-two registers.
#include <immintrin.h>
#include <utility>

#include "kernels.h"

namespace kjax {
namespace {

constexpr int kRows = 6, kVectors = 4;
constexpr int64_t kDepth = 128;  // with 64 columns a panel is 32 KB of L1
constexpr int64_t kWidth = 4 * kLine;
#include "simd_avx512.h"
inline void transpose(V (&b)[kLanes]) {
  __m512i r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = _mm512_castps_si512(b[i].v);
  transpose(r);
  for (int i = 0; i < kLanes; ++i) b[i].v = _mm512_castsi512_ps(r[i]);
}
// Four columns of 32 bits of sixteen rows that lie `step` bytes apart.
inline void load_columns(const uint8_t* p, int64_t step, V (&out)[4]) {
  __m512 rows[4], t[4];
  for (int r = 0; r < 4; ++r) {
    const auto part = [&](int i) { return _mm_loadu_ps(reinterpret_cast<const float*>(p + (r + 4 * i) * step)); };
    rows[r] = _mm512_insertf32x4(_mm512_castps128_ps512(part(0)), part(1), 1);
    rows[r] = _mm512_insertf32x4(_mm512_insertf32x4(rows[r], part(2), 2), part(3), 3);
  }
  for (int i = 0; i < 2; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    out[2 * i].v = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    out[2 * i + 1].v = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
  }
}
#include "decode_scalar.h"

inline V from_bits(__m512i bits) { return {_mm512_castsi512_ps(bits)}; }
inline __m512i to_bits(V v) { return _mm512_castps_si512(v.v); }
inline V shift_left(V v, int n) { return from_bits(_mm512_slli_epi32(to_bits(v), static_cast<unsigned>(n))); }
inline V shift_right(V v, int n) { return from_bits(_mm512_srai_epi32(to_bits(v), static_cast<unsigned>(n))); }
inline V and_bits(V v, int mask) { return from_bits(_mm512_and_si512(to_bits(v), _mm512_set1_epi32(mask))); }
inline V ints_as_floats(V v) { return {_mm512_cvtepi32_ps(to_bits(v))}; }
inline V load_int8(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline V load_int4(const uint8_t* p) {
  int64_t packed;
  __builtin_memcpy(&packed, p, 8);
  const __m512i halves = _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1),
                                                  _mm512_set1_epi64(packed));
  const __m512i shifted =
      _mm512_srlv_epi32(halves, _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 0, 4, 8, 12, 16, 20, 24, 28));
  const __m512i codes = _mm512_and_si512(shifted, _mm512_set1_epi32(15));
  return {_mm512_cvtepi32_ps(_mm512_sub_epi32(codes, _mm512_set1_epi32(8)))};
}
// A code moved into the bits of a half is the same number times 2^-8, subnormals included.
inline V load_e4m3(const uint8_t* p) {
  const __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(code, _mm256_set1_epi16(127)), 7);
  const __m256i sign = _mm256_slli_epi16(_mm256_srli_epi16(code, 7), 15);
  return {_mm512_cvtph_ps(_mm256_or_si256(magnitude, sign))};
}

inline V int4_scales(const uint8_t* p) {
  int64_t four;
  __builtin_memcpy(&four, p, 8);
  constexpr int a = 0x01008080, b = 0x03028080, c = 0x05048080, d = 0x07068080;  // each to the upper half of a float
  const __m512i order = _mm512_setr_epi32(a, a, a, a, b, b, b, b, c, c, c, c, d, d, d, d);
  return from_bits(_mm512_shuffle_epi8(_mm512_set1_epi64(four), order));
}
inline void by_eights(const float* p, V (&out)[8]) {
  const __m512i places = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
  for (int i = 0; i < 8; ++i) out[i] = {_mm512_i32gather_ps(places, p + i, 4)};
}

#include "decode_f32.h"
#include "prefetch.h"
#include "elementwise.h"
#include "lowrank.h"
#include "with_rows.h"
#include "pieces_f32.h"
#include "few_f32.h"
#include "add_step.h"
#include "gemm_f32.h"

}  // namespace

const FloatKernels kAvx512Kernels = {
    {"avx512", kWidth / 2, kWidth, KJAX_FORMATS(along), KJAX_FORMATS(across), {}, nullptr, nullptr},
    {convert, swiglu, swiglu_backward, add_scaled},
    {dots, expand, outer, transpose_into, drop}};

}  // namespace kjax
