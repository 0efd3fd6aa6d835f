// AMX-BF16 kernels: the driver over the tile instructions.
#include <immintrin.h>

#include "kernels.h"

namespace kjax {
namespace {

#include "simd_avx512.h"
#include "token_tiles.h"
#include "prefetch.h"
#include "decode_avx512.h"
#include "decode_panel.h"
#include "decode_ahead.h"
#include "tile.h"
#include "gemm_amx.h"

}  // namespace

const Gemm kAmxGemm = {"amx", kLine, 4 * kLine, KJAX_FORMATS(along), KJAX_FORMATS(across), KJAX_FORMATS(pack_of),
                       begin, end};

}  // namespace kjax
