// AVX-512F kernels in fp32: tiles of 6 rows x 64 floats, twenty-four of thirty-two registers.
#include <immintrin.h>

#include "kernels.h"

namespace kjax {
namespace {

constexpr int kRows = 6, kVectors = 4;
#include "simd_avx512.h"
inline void transpose(V (&b)[kLanes]) {
  __m512i r[kLanes];
  for (int i = 0; i < kLanes; ++i) r[i] = _mm512_castps_si512(b[i].v);
  transpose(r);
  for (int i = 0; i < kLanes; ++i) b[i].v = _mm512_castsi512_ps(r[i]);
}
#include "decode_scalar.h"
#include "prefetch.h"
#include "elementwise.h"
#include "gemm_f32.h"

}  // namespace

const FloatKernels kAvx512Kernels = {
    {"avx512", kLine, kLine, KJAX_FORMATS(along), KJAX_FORMATS(across), nullptr, 0, nullptr, nullptr},
    {convert, swiglu, swiglu_backward, add_scaled}};

}  // namespace kjax
