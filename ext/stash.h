// What a forward call keeps for its backward call: gate and up activations, found by the slip the forward call
// returned.
#pragma once
#include <cstdint>
#include <memory>
#include <optional>

#include "kernels.h"
#include "memory.h"

namespace kjax {

// What must agree between a forward and its backward call.
struct StashKey {
  int store, layer;
  int64_t tokens, per_token, routes, ranks;
  uint64_t idx_hash;
  bool operator==(const StashKey&) const = default;
};
uint64_t hash_idx(const int32_t* idx, int64_t n);

struct Activations {
  Memory memory;
  size_t bytes = 0;
};

struct StashStats {
  int64_t entries, bytes, spare, hits, misses, evicted;
};

// Room for `bytes`, or nothing where the whole budget is smaller; old entries leave when it is put, not before.
std::optional<Activations> stash_room(size_t bytes);
int32_t stash_draw_slip();  // never 0, and new for every execution
void stash_put(int32_t slip, const StashKey& key, Activations activations);
// The activations of `slip` if everything agrees; they are gone from the stash then. Counts a hit or a miss.
std::optional<Activations> stash_take(int32_t slip, const StashKey& key);
void stash_recycle(Activations activations);  // memory for a later stash_room

size_t stash_budget();
void stash_set_budget(size_t bytes);
StashStats stash_stats();
void stash_clear(std::optional<int> store);

}  // namespace kjax
