// AVX-512 for CPUs without it, so that its kernels are tested everywhere: SIMDe's intrinsics, those that SIMDe 0.8.2
// lacks, and masked loads and stores, which are whole ones there. Included before everything else in the AVX-512 files
// of an emulated build (KJAX_EMULATE, tests alone).
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>

#include <cstdint>
#include <cstring>

#define __AVX512VBMI__ 1  // SIMDe has these too

namespace emulated {

template <class T, int n>
struct Lanes {
  T at[n];
};
template <class To, class From>
inline To bits(const From& from) {
  To to;
  static_assert(sizeof to == sizeof from);
  std::memcpy(&to, &from, sizeof to);
  return to;
}
// Lanes whose bit is 0 are zero, and their memory is not touched.
template <class Vector, class T>
inline Vector load_masked(uint64_t mask, const void* from) {
  constexpr int n = sizeof(Vector) / sizeof(T);
  Lanes<T, n> lanes{};
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) std::memcpy(&lanes.at[i], static_cast<const T*>(from) + i, sizeof(T));
  return bits<Vector>(lanes);
}
template <class T, class Vector>
inline void store_masked(void* to, uint64_t mask, const Vector& v) {
  constexpr int n = sizeof(Vector) / sizeof(T);
  const auto lanes = bits<Lanes<T, n>>(v);
  for (int i = 0; i < n; ++i)
    if (mask >> i & 1) std::memcpy(static_cast<T*>(to) + i, &lanes.at[i], sizeof(T));
}
template <class Vector, class To, class From, int n, class V>
inline Vector convert(const V& v) {
  const auto from = bits<Lanes<From, n>>(v);
  Lanes<To, n> to;
  for (int i = 0; i < n; ++i) to.at[i] = static_cast<To>(from.at[i]);
  return bits<Vector>(to);
}
// By halves, as the instructions of compilers do it.
inline float sum(const simde__m512& v) {
  auto lanes = bits<Lanes<float, 16>>(v);
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; ++i) lanes.at[i] += lanes.at[i + n];
  return lanes.at[0];
}

}  // namespace emulated

#undef _mm512_maskz_loadu_ps
#undef _mm512_maskz_loadu_epi8
#undef _mm256_maskz_loadu_epi8
#undef _mm256_maskz_loadu_epi16
#undef _mm_maskz_loadu_epi16
#undef _mm512_mask_storeu_ps
#undef _mm512_mask_storeu_epi32
#undef _mm256_mask_storeu_epi16
#undef _mm512_cvtepi32_epi16
#undef _mm512_cvtepi8_epi32
#undef _mm512_cvtepu8_epi16
#undef _mm512_reduce_add_ps
#define _mm512_maskz_loadu_ps(mask, p) (emulated::load_masked<simde__m512, float>(mask, p))
#define _mm512_maskz_loadu_epi8(mask, p) (emulated::load_masked<simde__m512i, uint8_t>(mask, p))
#define _mm512_maskz_loadu_epi32(mask, p) (emulated::load_masked<simde__m512i, uint32_t>(mask, p))
#define _mm256_maskz_loadu_epi8(mask, p) (emulated::load_masked<simde__m256i, uint8_t>(mask, p))
#define _mm256_maskz_loadu_epi16(mask, p) (emulated::load_masked<simde__m256i, uint16_t>(mask, p))
#define _mm_maskz_loadu_epi16(mask, p) (emulated::load_masked<simde__m128i, uint16_t>(mask, p))
#define _mm512_mask_storeu_ps(p, mask, v) (emulated::store_masked<float>(p, mask, v))
#define _mm512_mask_storeu_epi32(p, mask, v) (emulated::store_masked<uint32_t>(p, mask, v))
#define _mm256_mask_storeu_epi16(p, mask, v) (emulated::store_masked<uint16_t>(p, mask, v))
#define _mm512_cvtepi32_epi16(v) (emulated::convert<simde__m256i, int16_t, int32_t, 16>(v))
#define _mm512_cvtepi8_epi32(v) (emulated::convert<simde__m512i, int32_t, int8_t, 16>(v))
#define _mm512_cvtepu8_epi16(v) (emulated::convert<simde__m512i, uint16_t, uint8_t, 32>(v))
#define _mm512_reduce_add_ps(v) (emulated::sum(v))
