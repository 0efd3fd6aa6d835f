// AVX512-BF16 kernels, chosen by an expert's number of rows and each prefetching the weights that come next.
//   along : a few operand rows meet stored rows in dot products (dot_rows.h); more are broadcast against 16 stored rows
//           in the lanes, decoded in registers (lanes_along.h); many are packed in tiles of 16 tokens, the vector, and
//           the stored row, as it lies or decoded, is broadcast a pair at a time (tiles_along.h).
//   across: two stored rows are decoded in registers and operand rows broadcast (lanes_across.h); for many rows they
//           are interleaved into a panel of vectors before (panel_across.h).
// The fewest of INT8 and INT4 are multiplied in fp32, both ways (float_rows.h).
#include <immintrin.h>

#include <type_traits>
#include <utility>

#include "kernels.h"

namespace kjax {
namespace {

#include "simd_avx512.h"
#include "token_tiles.h"
#include "prefetch.h"
#include "decode_avx512.h"
#include "decode_panel.h"
#include "pairs_across.h"
#include "pace.h"
#include "decode_ahead.h"
#include "with_rows.h"
#include "dot_rows.h"
#include "panel_across.h"
#include "lanes.h"
#include "lanes_along.h"
#include "lanes_across.h"
#include "float_rows.h"
#include "tiles_along.h"

// Rows of a format that meet stored rows as floats, then in dot products, then with weights decoded in registers, and
// across stored rows as floats, then with weights decoded in registers: where these are the fastest on Zen 4 and near it
// by the tables of Zen 5 (docs/zen4.md, docs/performance.md).
struct Rows {
  int64_t floats, dot, along, floats_across, across;
};
constexpr Rows kRows[kFormats] = {{0, 14, 0, 0, 12}, {},        {0, 6, 28, 0, 12}, {0, 6, 28, 0, 24},
                                  {1, 1, 28, 2, 9},  {2, 7, 28, 3, 8}};
static_assert([] {
  for (const Rows& r : kRows)
    if (r.floats > kFloatRowsAlong || r.floats_across > kFloatRows) return false;
  return true;
}());
template <Format F>
constexpr Rows kRowsOf = kRows[static_cast<int>(F)];

template <Format F>
void pack(const void* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k, int64_t depth,
          void* packed, int64_t length) {
  const uint16_t* const source = static_cast<const uint16_t*>(from);
  uint16_t* const to = static_cast<uint16_t*>(packed);
  if (rows <= kRowsOf<F>.dot) pack_rows(source, lda, count, first, rows, k, depth, to);
  else if (rows <= kRowsOf<F>.along) pack_lanes(source, lda, count, first, rows, k, depth, to, length);
  else pack_tokens<F>(source, lda, count, first, rows, k, depth, to, length);
}

template <Format F>
void along(const Product& p) {
  if (p.rows == 0) return along_nothing<F>(p);
  constexpr int64_t kFloats = kRowsOf<F>.floats, kDot = kRowsOf<F>.dot;
  constexpr int64_t kFour = kRowScales<F> ? 4 : 3;  // rows that meet four stored rows at a time
  if constexpr (kFloats > 0)
    if (p.rows <= kFloats) return along_floats<F>(p);
  if constexpr (kDot >= kFour)
    if (p.rows <= kFour) return along_few<F, 4, kFloats + 1, kFour>(p);
  if constexpr (kDot > kFour)
    if (p.rows <= kDot) return along_few<F, 2, kFour + 1, kDot>(p);
  if constexpr (kRowsOf<F>.along > 0)
    if (p.rows <= kRowsOf<F>.along) return along_lanes<F>(p);
  along_tokens<F>(p);
}

template <Format F>
void across(const Product& p) {
  if (p.rows == 0) return across_nothing<F>(p);
  if constexpr (kRowsOf<F>.floats_across > 0)
    if (p.rows <= kRowsOf<F>.floats_across) return across_floats<F>(p);
  p.rows <= kRowsOf<F>.across ? across_lanes<F>(p) : across_many<F>(p);
}

static_assert(kRowsOf<Format::kFp8Channel>.dot == kRowsOf<Format::kFp8Block>.dot &&
              kRowsOf<Format::kFp8Channel>.along == kRowsOf<Format::kFp8Block>.along);  // pack() and along() agree
// Weights with a scale for each stored row, as codes alone, which are looked up for fewer instructions: the scales
// multiply what comes out along stored rows and what goes in across them.
Product scales_apart(Product p) {
  p.row_scales = p.strip.matrix.scales;
  p.strip.matrix.scales = p.next.matrix.scales = nullptr;
  return p;
}
template <>
void along<Format::kFp8Channel>(const Product& p) {
  along<Format::kFp8Block>(scales_apart(p));
}
template <>
void across_lanes<Format::kFp8Channel>(const Product& p) {
  across_lanes<Format::kFp8Block>(scales_apart(p));
}

}  // namespace

const Gemm kAvx512Bf16Gemm = {"avx512bf16",       kLine,   4 * kLine, KJAX_FORMATS(along), KJAX_FORMATS(across),
                              KJAX_FORMATS(pack), nullptr, nullptr};

}  // namespace kjax
