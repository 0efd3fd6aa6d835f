// AVX2 + FMA kernels: tiles of 3 rows x 32 floats, twelve of sixteen registers.
#include <immintrin.h>
#include <utility>

#include "kernels.h"

namespace kjax {
namespace {

constexpr int kLanes = 8, kRows = 3, kVectors = 4;
constexpr int64_t kDepth = 128;  // with 32 columns a panel is 16 KB of L1
constexpr int64_t kWidth = 4 * kLine;
struct V {
  __m256 v;
};

inline __m256i first_lanes(int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline V set1(float x) { return {_mm256_set1_ps(x)}; }
inline V load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline V load_n(const float* p, int64_t n) { return {_mm256_maskload_ps(p, first_lanes(n))}; }
inline void store(float* p, V v) { _mm256_storeu_ps(p, v.v); }
inline void store_n(float* p, V v, int64_t n) { _mm256_maskstore_ps(p, first_lanes(n), v.v); }
inline V add(V a, V b) { return {_mm256_add_ps(a.v, b.v)}; }
inline V sub(V a, V b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline V mul(V a, V b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline V div(V a, V b) { return {_mm256_div_ps(a.v, b.v)}; }
inline V fma(V a, V b, V c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
// sum += a * b. Said in assembly, as the compiler otherwise picks forms that overwrite an operand and runs out of
// registers.
inline void add_product(V& sum, V a, V b) { __asm__("vfmadd231ps %2, %1, %0" : "+x"(sum.v) : "x"(a.v), "x"(b.v)); }
// sum[i][j] += x[i * kDepth] * w[j], of three vectors of weights in registers and the last in memory, which takes no
// instruction of its own. Sums, weights and a number take all sixteen registers, so the compiler has no choice here.
template <int R>
inline void add_step(V (&sum)[R][kVectors], const float* x, const float* w) {
  __m256 y[3], number;
#pragma GCC unroll 3
  for (int j = 0; j < 3; ++j) __asm__("vmovups %1, %0" : "=x"(y[j]) : "m"(*reinterpret_cast<const __m256*>(w + 8 * j)));
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
    __asm__(
        "vbroadcastss %5, %4\n\tvfmadd231ps %6, %4, %0\n\tvfmadd231ps %7, %4, %1\n\tvfmadd231ps %8, %4, %2\n\t"
        "vfmadd231ps %9, %4, %3"
        : "+x"(sum[i][0].v), "+x"(sum[i][1].v), "+x"(sum[i][2].v), "+x"(sum[i][3].v), "=&x"(number)
        : "m"(x[i * kDepth]), "x"(y[0]), "x"(y[1]), "x"(y[2]), "m"(*reinterpret_cast<const __m256*>(w + 24)));
}
inline V min_v(V a, V b) { return {_mm256_min_ps(a.v, b.v)}; }
inline V max_v(V a, V b) { return {_mm256_max_ps(a.v, b.v)}; }
inline V round_v(V v) { return {_mm256_round_ps(v.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline V scale_by_power_of_two(V v, V n) {
  const __m256i bits = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(v.v, _mm256_castsi256_ps(bits))};
}
inline float sum(V v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v.v), _mm256_extractf128_ps(v.v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}
// Four columns of 32 bits of eight rows that lie `step` bytes apart.
inline void load_columns(const uint8_t* p, int64_t step, V (&out)[4]) {
  __m256 rows[4], t[4];
  for (int r = 0; r < 4; ++r) {
    const float* const low = reinterpret_cast<const float*>(p + r * step);
    const float* const high = reinterpret_cast<const float*>(p + (r + 4) * step);
    rows[r] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(low)), _mm_loadu_ps(high), 1);
  }
  for (int i = 0; i < 2; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(rows[2 * i], rows[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_ps(rows[2 * i], rows[2 * i + 1]);
  }
  for (int i = 0; i < 2; ++i) {
    out[2 * i].v = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    out[2 * i + 1].v = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
  }
}
inline void transpose(V (&b)[kLanes]) {
  __m256 t[8], s[8];
  for (int i = 0; i < 4; ++i) {
    t[2 * i] = _mm256_unpacklo_ps(b[2 * i].v, b[2 * i + 1].v);
    t[2 * i + 1] = _mm256_unpackhi_ps(b[2 * i].v, b[2 * i + 1].v);
  }
  for (int i = 0; i < 2; ++i)
    for (int j = 0; j < 2; ++j) {
      s[4 * i + 2 * j] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0x44);
      s[4 * i + 2 * j + 1] = _mm256_shuffle_ps(t[4 * i + j], t[4 * i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; ++i) {
    b[i].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x20);
    b[i + 4].v = _mm256_permute2f128_ps(s[i], s[i + 4], 0x31);
  }
}

#include "decode_scalar.h"

inline V from_bits(__m256i bits) { return {_mm256_castsi256_ps(bits)}; }
inline __m256i to_bits(V v) { return _mm256_castps_si256(v.v); }
inline V shift_left(V v, int n) { return from_bits(_mm256_slli_epi32(to_bits(v), n)); }
inline V shift_right(V v, int n) { return from_bits(_mm256_srai_epi32(to_bits(v), n)); }
inline V and_bits(V v, int mask) { return from_bits(_mm256_and_si256(to_bits(v), _mm256_set1_epi32(mask))); }
inline V ints_as_floats(V v) { return {_mm256_cvtepi32_ps(to_bits(v))}; }
inline V load_int8(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline V load_int4(const uint8_t* p) {
  int packed;
  __builtin_memcpy(&packed, p, 4);
  const __m256i shifted = _mm256_srlv_epi32(_mm256_set1_epi32(packed), _mm256_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28));
  const __m256i codes = _mm256_and_si256(shifted, _mm256_set1_epi32(15));
  return {_mm256_cvtepi32_ps(_mm256_sub_epi32(codes, _mm256_set1_epi32(8)))};
}
// A code of e4m3 moved into the bits of a half is the same number times 2^-8, subnormals included.
inline V load_e4m3(const uint8_t* p) {
  const __m128i code = _mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
  return {_mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(code, 7), _mm_set1_epi16(static_cast<int16_t>(0xbfff))))};
}
inline V int4_scales(const uint8_t* p) {
  int two;
  __builtin_memcpy(&two, p, 4);
  constexpr int a = 0x01008080, b = 0x03028080;  // each to the upper half of a float
  return from_bits(_mm256_shuffle_epi8(_mm256_set1_epi32(two), _mm256_setr_epi32(a, a, a, a, b, b, b, b)));
}
inline void by_eights(const float* p, V (&out)[8]) {
  for (int l = 0; l < 8; ++l) out[l] = load(p + 8 * l);
  transpose(out);
}

inline V widen_bf16(__m128i bits) { return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16))}; }
inline V load_bf16(const uint16_t* p) { return widen_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
inline V load_bf16_n(const uint16_t* p, int64_t n) {
  alignas(16) uint16_t lanes[kLanes] = {};
  __builtin_memcpy(lanes, p, static_cast<size_t>(n) * 2);
  return load_bf16(lanes);
}
inline void store_bf16(uint16_t* p, V v) {
  const __m256i bits = _mm256_castps_si256(v.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i nearest = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(v.v, v.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(nearest, quiet, is_nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0x08);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline void store_bf16_n(uint16_t* p, V v, int64_t n) {
  alignas(16) uint16_t lanes[kLanes];
  store_bf16(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<size_t>(n) * 2);
}

#include "decode_f32.h"
#include "prefetch.h"
#include "elementwise.h"
#include "lowrank.h"
#include "with_rows.h"
#include "pieces_f32.h"
#include "few_f32.h"
#include "gemm_f32.h"

}  // namespace

const FloatKernels kAvx2Kernels = {
    {"avx2", kWidth / 2, kWidth, KJAX_FORMATS(along), KJAX_FORMATS(across), {}, nullptr, nullptr},
    {convert, swiglu, swiglu_backward, add_scaled},
    {dots, expand, outer, transpose_into, drop}};

}  // namespace kjax
