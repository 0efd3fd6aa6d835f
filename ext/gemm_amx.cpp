// AMX-BF16 kernels: the driver over the tile instructions, and for experts with few rows, whose tiles would be nearly
// empty, the AVX-512 kernels that decode in registers.
#include <immintrin.h>

#include "kernels.h"

namespace kjax {
namespace {

#include "simd_avx512.h"
#include "token_tiles.h"
#include "prefetch.h"
#include "decode_avx512.h"
#include "decode_panel.h"
#include "pace.h"
#include "decode_tiles.h"
#include "tile.h"
#include "gemm_amx.h"

// Up to so many operand rows the AVX-512 kernels were faster; bf16 along its rows needs no decoding and is as fast.
template <Format F>
constexpr int64_t kFewAlong = Decode<F>::kInPlace ? 0 : kRowScales<F> ? 3 : 2;
constexpr int64_t kFewAcross = 4;
template <Format F>
constexpr bool few_along(int64_t rows) {
  return rows > 0 && rows <= kFewAlong<F>;
}

template <Format F>
void along_any(const Product& p) {
  few_along<F>(p.rows) ? kAvx512Bf16Gemm.along[static_cast<int>(F)](p) : along<F>(p);
}
template <Format F>
void across_any(const Product& p) {
  p.rows > 0 && p.rows <= kFewAcross ? kAvx512Bf16Gemm.across[static_cast<int>(F)](p) : across<F>(p);
}
template <Format F>
void pack_any(const void* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k, int64_t depth,
              void* packed, int64_t length) {
  const Pack chosen = few_along<F>(rows) ? kAvx512Bf16Gemm.pack[static_cast<int>(F)] : pack;
  chosen(from, lda, count, first, rows, k, depth, packed, length);
}

}  // namespace

// Both have strips of the same widths.
const Gemm kAmxGemm = {
    "amx", kLine, 4 * kLine, KJAX_FORMATS(along_any), KJAX_FORMATS(across_any), KJAX_FORMATS(pack_any), begin, end};

}  // namespace kjax
