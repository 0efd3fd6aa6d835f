// The eight AMX operations the kernels are written against, in two bodies: the instructions, or a software model of
// them. Included inside an unnamed namespace; KJAX_SOFT_TILES selects the model. Tile numbers are literals, because the
// instructions encode them. The instructions' bodies tell the compiler nothing about memory: tile_fence() separates
// them from plain code.

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

#if defined(KJAX_SOFT_TILES)

struct SoftTile {
  alignas(64) uint8_t row[16][64];
};
thread_local SoftTile soft_tile[8];
thread_local bool soft_configured = false;

inline void tile_config(const TileConfig&) { soft_configured = true; }
inline void tile_release() { soft_configured = false; }
inline void tile_fence() {}

// Denormals count as zero on the way in and out of every step.
inline float flush(float x) { return __builtin_fabsf(x) < 1.17549435e-38f ? 0.0f * x : x; }
inline float soft_bf16(const uint8_t* p) {
  uint16_t bits;
  __builtin_memcpy(&bits, p, 2);
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  __builtin_memcpy(&value, &wide, 4);
  return flush(value);
}
inline float soft_float(const uint8_t* p) {
  float value;
  __builtin_memcpy(&value, p, 4);
  return flush(value);
}

inline void soft_zero(int t) { soft_tile[t] = {}; }
inline void soft_load(int t, const void* base, int64_t stride) {
  if (!soft_configured) __builtin_trap();  // as the instruction would fault
  for (int r = 0; r < 16; ++r)
    __builtin_memcpy(soft_tile[t].row[r], static_cast<const uint8_t*>(base) + r * stride, 64);
}
inline void soft_store(int t, void* base, int64_t stride) {
  for (int r = 0; r < 16; ++r) __builtin_memcpy(static_cast<uint8_t*>(base) + r * stride, soft_tile[t].row[r], 64);
}
// The even and the odd products are summed apart, each with one rounding per step, then together, then to the tile.
inline void soft_dpbf16(int c, int a, int b) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 16; ++n) {
      float even = 0, odd = 0;
      for (int k = 0; k < 16; ++k) {
        const uint8_t *x = soft_tile[a].row[m] + 4 * k, *y = soft_tile[b].row[k] + 4 * n;
        even = flush(__builtin_fmaf(soft_bf16(x), soft_bf16(y), even));
        odd = flush(__builtin_fmaf(soft_bf16(x + 2), soft_bf16(y + 2), odd));
      }
      uint8_t* out = soft_tile[c].row[m] + 4 * n;
      const float sum = flush(soft_float(out) + flush(even + odd));
      __builtin_memcpy(out, &sum, 4);
    }
}
#define tile_zero(t) soft_zero(t)
#define tile_load(t, base, stride) soft_load(t, base, stride)
#define tile_store(t, base, stride) soft_store(t, base, stride)
#define tile_dpbf16(c, a, b) soft_dpbf16(c, a, b)

#else

inline void tile_config(const TileConfig& config) { __asm__ volatile("ldtilecfg %0" ::"m"(config)); }
inline void tile_release() { __asm__ volatile("tilerelease"); }
inline void tile_fence() { __asm__ volatile("" ::: "memory"); }
#define tile_zero(t) __asm__ volatile("tilezero %%tmm" #t::)
#define tile_load(t, base, stride) \
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm" #t::"r"(base), "r"(static_cast<int64_t>(stride)))
#define tile_store(t, base, stride) \
  __asm__ volatile("tilestored %%tmm" #t ", (%0,%1,1)" ::"r"(base), "r"(static_cast<int64_t>(stride)) : "memory")
#define tile_dpbf16(c, a, b) __asm__ volatile("tdpbf16ps %%tmm" #b ", %%tmm" #a ", %%tmm" #c::)

#endif
