// The AMX driver, written against tile.h. Forward: stored rows are the A operand as they are, tokens are B, packed once
// per segment; backward: operand rows are A as they are, stored rows B, two interleaved. The tile unit is busy for 16
// cycles per product and leaves the vector ports alone: what the next block needs is decoded in between. Included
// inside an unnamed namespace.

// Reduction per block of `along`: 32 stored rows are 32 KB of L1 and met by all tokens. One tile of tokens meets them
// once, and its sums stay in the tiles: blocks are so short that what is decoded next and what is multiplied fit L1.
constexpr int64_t kDepth = 512, kOneTileDepth = 128;
// Of `across`: sums are loaded and stored once per 8 steps. Rows 4 KB apart share one 32nd of a 2 MB L2: a block that
// is being decoded and one on its way fill its 16 ways.
constexpr int64_t kAcrossDepth = 256;
// bf16 rows against one tile of tokens: 15 % faster than 256, decoded formats no faster.
constexpr int64_t kOneTileAcrossDepth = 64;
// The block that has to be decoded first, with nothing to hide it.
constexpr int64_t kFirstDepth = 128, kFirstAcrossDepth = 64;

void begin() {
  const TileConfig config;
  tile_config(config);
}
void end() { tile_release(); }

// Operand rows [count, depth] of a segment of `rows` rows, from its row `first` (a multiple of 16) and column k (of 32)
// on, into tiles [column block][row block] of [16 pairs][16 rows][2], zeros beyond `count` rows and in the rows' own
// padding.
void pack(const void* from, int64_t lda, int64_t count, int64_t first, int64_t rows, int64_t k, int64_t depth,
          void* packed, int64_t) {
  const int64_t across_tiles = blocks_of(rows, 16);
  for (int64_t r = 0; r < count; r += 16)
    for (int64_t i = 0; i < depth; i += 32) {
      uint16_t* const tile = static_cast<uint16_t*>(packed) + ((k + i) / 32 * across_tiles + (first + r) / 16) * kTile;
      pack_tile(static_cast<const uint16_t*>(from) + r * lda + i, lda, count - r, tile);
    }
}

template <Format>
constexpr Pack pack_of = pack;

// Where the next tile of an operand lies: its start, the distance of its rows, and of one reduction step, in bytes.
struct Operand {
  const void* base;
  int64_t stride, step;
  const uint8_t* at(int64_t s) const { return static_cast<const uint8_t*>(base) + s * step; }
};

// Where the sums of products begin: at zero, at C, or where the products before left them in tiles 0 to 3.
enum class Begin { kZero, kLoad, kKeep };
inline void begin_sums(float* const (&c)[4], int64_t stride, Begin begin) {
  tile_fence();
  if (begin == Begin::kZero) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
  } else if (begin == Begin::kLoad) {
    tile_load(0, c[0], stride);
    tile_load(1, c[1], stride);
    tile_load(2, c[2], stride);
    tile_load(3, c[3], stride);
  }
}
inline void store_sums(float* const (&c)[4], int64_t stride) {
  tile_store(0, c[0], stride);
  tile_store(1, c[1], stride);
  tile_store(2, c[2], stride);
  tile_store(3, c[3], stride);
}

// C tiles (0 1 / 2 3) (+)= A tiles 4, 5 x B tiles 6, 7 over `steps` steps
template <class Between>
inline void two_by_two(const Operand (&a)[2], const Operand (&b)[2], int64_t steps, float* const (&c)[4],
                       int64_t stride, Begin begin, Between& between) {
  begin_sums(c, stride, begin);
  for (int64_t s = 0; s < steps; ++s) {
    tile_load(4, a[0].at(s), a[0].stride);
    tile_load(6, b[0].at(s), b[0].stride);
    tile_load(7, b[1].at(s), b[1].stride);
    tile_load(5, a[1].at(s), a[1].stride);
    between.tick();
    tile_dpbf16(0, 4, 6);
    between.tick();
    tile_dpbf16(1, 4, 7);
    between.tick();
    tile_dpbf16(2, 5, 6);
    between.tick();
    tile_dpbf16(3, 5, 7);
  }
  store_sums(c, stride);
}

// Four stored tiles against one tile of tokens. `tokens_are_a`: C tile j = tokens x stored[j], otherwise stored[j] x
// tokens. Sums that are not stored stay in their tiles.
template <bool tokens_are_a, class Between>
inline void four_by_one(const Operand (&stored)[4], const Operand& tokens, int64_t steps, float* const (&c)[4],
                        int64_t stride, Begin begin, bool store, Between& between) {
  begin_sums(c, stride, begin);
  for (int64_t s = 0; s < steps; ++s) {
    tile_load(6, tokens.at(s), tokens.stride);
    tile_load(4, stored[0].at(s), stored[0].stride);
    tile_load(5, stored[1].at(s), stored[1].stride);
    between.tick();
    if constexpr (tokens_are_a) {
      tile_dpbf16(0, 6, 4);
      tile_dpbf16(1, 6, 5);
    } else {
      tile_dpbf16(0, 4, 6);
      tile_dpbf16(1, 5, 6);
    }
    between.tick();
    tile_load(4, stored[2].at(s), stored[2].stride);
    tile_load(5, stored[3].at(s), stored[3].stride);
    between.tick();
    if constexpr (tokens_are_a) {
      tile_dpbf16(2, 6, 4);
      tile_dpbf16(3, 6, 5);
    } else {
      tile_dpbf16(2, 4, 6);
      tile_dpbf16(3, 5, 6);
    }
    between.tick();
  }
  if (store) store_sums(c, stride);
}
constexpr int64_t kTicks = 4;  // per step, in both

// Block i of this strip, or of the next one behind it; no data where there is none.
struct Block {
  Strip strip;
  int64_t start, size;
};
inline Block block_of(const Product& p, const Blocks& blocks, int64_t next_total, int64_t i) {
  if (i < blocks.count()) return {p.strip, blocks.start(i), blocks.size(i)};
  const Blocks next{next_total, blocks.first, blocks.step};
  i -= blocks.count();
  if (!p.next.matrix.data || i >= next.count()) return {};
  return {p.next, next.start(i), next.size(i)};
}

template <Format F>
void along(const Product& p) {
  const int64_t token_tiles = blocks_of(p.rows, 16);
  const bool in_tiles = token_tiles == 1;  // where sums stay until the end
  const int64_t depth = in_tiles && !Decode<F>::kInPlace ? kOneTileDepth : kDepth;
  const int64_t tile_steps = depth / 32, buffer = 4 * tile_steps * kTile;
  uint16_t* const tiles = reinterpret_cast<uint16_t*>(p.scratch);  // 2 x [4][tile_steps] stored tiles
  float* const results =
      reinterpret_cast<float*>(tiles + 2 * buffer);  // [4][token tiles] of [16 stored rows][16 tokens]
  std::byte* const room = reinterpret_cast<std::byte*>(results + kLine * kMaxRows);
  const Matrix& w = p.strip.matrix;
  const uint16_t* const tokens = static_cast<const uint16_t*>(p.a);
  const auto result = [&](int64_t stored, int64_t token) { return results + (stored * token_tiles + token) * 256; };

  const Blocks blocks{w.cols, Decode<F>::kInPlace ? kDepth : kFirstDepth, depth};
  // In place where the rows are operands already, all of them exist, and whole tiles of them do.
  const auto in_place = [&](int64_t i) {
    return Decode<F>::kInPlace && p.strip.count == kLine && blocks.size(i) % 32 == 0;
  };
  const auto decoded = [&](int64_t i) { return i < blocks.count() && !in_place(i); };
  const auto decoder = [&](int64_t i, const Later<F>& later) {
    return TilesAhead<F>(p.strip, decoded(i) ? blocks.start(i) : 0, decoded(i) ? blocks.size(i) : 0, tile_steps,
                         tiles + i % 2 * buffer, room, later);
  };
  Between(decoder(0, {}), 1, {}).finish();
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t k = blocks.start(i), steps = blocks_of(blocks.size(i), 32), ticks = token_tiles * steps * kTicks;
    // The block after the next is asked for by decoding the next one, or where none is decoded, by itself.
    const Block after = block_of(p, blocks, p.next.matrix.cols, i + (Decode<F>::kInPlace ? 1 : 2));
    const Strip& s = after.strip;
    Between between(decoder(i + 1, Later<F>(s.matrix, s.first, s.count, after.start)), ticks,
                    Prefetch(decoded(i + 1) ? nullptr : byte_at(F, s.matrix, s.first, after.start),
                             row_bytes(F, s.matrix.cols), bytes_of(F, after.size), s.count, ticks));
    Operand stored[4];
    for (int64_t j = 0; j < 4; ++j)
      stored[j] = in_place(i) ? Operand{w.data + ((p.strip.first + 16 * j) * w.cols + k) * 2, w.cols * 2, 64}
                              : Operand{tiles + i % 2 * buffer + j * tile_steps * kTile, 64, kTile * 2};
    const auto token = [&](int64_t t) {
      return Operand{tokens + (k / 32 * token_tiles + t) * kTile, 64, token_tiles * kTile * 2};
    };
    const Begin begin = i == 0 ? Begin::kZero : in_tiles ? Begin::kKeep : Begin::kLoad;
    for (int64_t t = 0; t + 1 < token_tiles; t += 2)
      for (int64_t j = 0; j < 4; j += 2)
        two_by_two({stored[j], stored[j + 1]}, {token(t), token(t + 1)}, steps,
                   {result(j, t), result(j, t + 1), result(j + 1, t), result(j + 1, t + 1)}, 64, begin, between);
    if (const int64_t t = token_tiles - 1; token_tiles % 2)
      four_by_one<false>(stored, token(t), steps, {result(0, t), result(1, t), result(2, t), result(3, t)}, 64, begin,
                         !in_tiles || i + 1 == blocks.count(), between);
    between.finish();
  }
  tile_fence();
  for (int64_t j = 0; j < 4; ++j)
    for (int64_t t = 0; t < token_tiles; ++t)
      unpack_sums(result(j, t), 16, p.rows - t * 16, p.c + t * 16 * p.ldc + j * 16, p.ldc, p.add);
}

template <Format F>
void across(const Product& p) {
  const int64_t token_tiles = blocks_of(p.rows, 16), lines = blocks_of(p.strip.count, kLine);
  const int64_t depth = token_tiles == 1 && Decode<F>::kInPlace ? kOneTileAcrossDepth : kAcrossDepth;
  const int64_t panel = depth * 4 * kLine;
  uint16_t* const panels = reinterpret_cast<uint16_t*>(p.scratch);  // 2 x [columns / 64][steps * 16 pairs][64][2]
  std::byte* const room = reinterpret_cast<std::byte*>(panels + 2 * panel);
  const Matrix& w = p.strip.matrix;
  const Blocks blocks{w.rows, kFirstAcrossDepth, depth};
  const auto pairs_of = [&](int64_t i) { return blocks_of(blocks.size(i), 32) * 16; };
  const auto decoded = [&](int64_t i) { return i < blocks.count(); };
  const auto decoder = [&](int64_t i, const Later<F>& later) {
    return PanelAhead<F>(p.strip, decoded(i) ? blocks.start(i) : 0, decoded(i) ? blocks.size(i) : 0,
                         decoded(i) ? pairs_of(i) : 0, panels + i % 2 * panel, room, later);
  };
  Between(decoder(0, {}), 1, {}).finish();
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const int64_t k = blocks.start(i), pairs = pairs_of(i), steps = pairs / 16,
                  ticks = token_tiles * lines * steps * kTicks;
    const Block after = block_of(p, blocks, p.next.matrix.rows, i + 2);
    const Strip& s = after.strip;
    Between between(decoder(i + 1, Later<F>(s.matrix, after.start, after.size, s.first)), ticks,
                    Prefetch(decoded(i + 1) ? nullptr : byte_at(F, s.matrix, after.start, s.first),
                             row_bytes(F, s.matrix.cols), bytes_of(F, s.count), after.size, ticks));
    const Begin begin = p.add || i > 0 ? Begin::kLoad : Begin::kZero;
    const auto token = [&](int64_t t) {
      return Operand{static_cast<const uint16_t*>(p.a) + t * 16 * p.lda + k, p.lda * 2, 64};
    };
    for (int64_t line = 0; line < lines; ++line) {
      Operand stored[4];
      for (int64_t j = 0; j < 4; ++j)
        stored[j] = {panels + i % 2 * panel + line * pairs * kLine * 2 + j * 32, kLine * 4, 16 * kLine * 4};
      const auto result = [&](int64_t t, int64_t j) { return p.c + t * 16 * p.ldc + line * kLine + j * 16; };
      for (int64_t j = 0; j < 4; j += 2)
        for (int64_t t = 0; t + 1 < token_tiles; t += 2)
          two_by_two({token(t), token(t + 1)}, {stored[j], stored[j + 1]}, steps,
                     {result(t, j), result(t, j + 1), result(t + 1, j), result(t + 1, j + 1)}, p.ldc * 4, begin,
                     between);
      if (const int64_t t = token_tiles - 1; token_tiles % 2)
        four_by_one<true>(stored, token(t), steps, {result(t, 0), result(t, 1), result(t, 2), result(t, 3)}, p.ldc * 4,
                          begin, true, between);
    }
    between.finish();
  }
  tile_fence();
}
