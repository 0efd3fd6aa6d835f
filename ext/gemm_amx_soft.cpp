// The AMX driver over a software model of the tiles, so that all of it runs on CPUs without AMX.
#include <immintrin.h>

#include "kernels.h"

#define KJAX_SOFT_TILES

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

}  // namespace

const Gemm kAmxSoftGemm = {
    "amx_soft", kLine, 4 * kLine, KJAX_FORMATS(along), KJAX_FORMATS(across), KJAX_FORMATS(pack_of), begin, end};

}  // namespace kjax
