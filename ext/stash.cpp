// The stash: entries by slip, least recently put first out under a byte budget.
#include "stash.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <mutex>
#include <random>
#include <vector>

#include "store.h"

namespace kjax {
namespace {

struct Entry {
  int32_t slip;
  StashKey key;
  Activations activations;
};

// A quarter of the machine: the rest is for weights and page cache. kjax sets it from the plan of a run.
size_t default_budget() {
  const long pages = sysconf(_SC_PHYS_PAGES), size = sysconf(_SC_PAGESIZE);
  return pages > 0 && size > 0 ? static_cast<size_t>(pages) * static_cast<size_t>(size) / 4 : size_t{4} << 30;
}

std::mutex mutex;
// Some for each layer of a step: few enough to be searched one by one, and vectors do not allocate in a steady step.
// Never destroyed: a call may be in flight at exit.
std::vector<Entry>& entries = *new std::vector<Entry>;  // oldest first
// Memory of entries taken, so that a step after the first asks the system for none.
std::vector<Activations>& spare = *new std::vector<Activations>;
size_t budget = default_budget();
size_t held = 0, spare_held = 0;
int64_t hits = 0, misses = 0, evicted = 0;

std::vector<Entry>::iterator find(int32_t slip) {
  return std::find_if(entries.begin(), entries.end(), [&](const Entry& entry) { return entry.slip == slip; });
}

void drop(std::vector<Entry>::iterator entry) {
  held -= entry->activations.memory.size();
  entries.erase(entry);
}

void shrink_to(size_t limit) {
  while (held + spare_held > limit && !spare.empty()) {
    spare_held -= spare.front().memory.size();
    spare.erase(spare.begin());
  }
  while (held > limit) {
    drop(entries.begin());
    ++evicted;
  }
}

}  // namespace

uint64_t hash_idx(const int32_t* idx, int64_t n) {
  uint64_t hash = 0x9e3779b97f4a7c15u ^ static_cast<uint64_t>(n);
  for (int64_t i = 0; i < n; ++i) {
    hash = (hash ^ static_cast<uint32_t>(idx[i])) * 0xff51afd7ed558ccdu;
    hash ^= hash >> 32;
  }
  return hash;
}

int32_t stash_draw_slip() {
  static std::atomic<uint32_t> next{
      std::random_device()()};  // a slip of another process matches by no more than chance
  uint32_t slip;
  while (!(slip = next.fetch_add(1))) {
  }
  return static_cast<int32_t>(slip);
}

std::optional<Activations> stash_room(size_t bytes) {
  std::lock_guard lock(mutex);
  const size_t whole = Memory::whole(bytes);
  if (whole > budget) return std::nullopt;
  Activations room;
  for (auto it = spare.begin(); it != spare.end(); ++it)
    // A much larger one would waste the budget.
    if (it->memory.size() >= whole && it->memory.size() <= whole + whole / 4) {
      room = std::move(*it);
      spare_held -= room.memory.size();
      spare.erase(it);
      break;
    }
  try {
    room.memory.grow(bytes);
  } catch (const std::bad_alloc&) {
    return std::nullopt;  // the backward call computes what was not kept
  }
  room.bytes = bytes;
  return room;
}

void stash_put(int32_t slip, const StashKey& key, Activations activations) {
  std::lock_guard lock(mutex);
  if (!is_open(key.store)) return;  // closed during the call: close_store() has already cleared what was there
  if (const auto old = find(slip); old != entries.end()) drop(old);
  entries.reserve(entries.size() + 1);
  held += activations.memory.size();
  entries.push_back({slip, key, std::move(activations)});
  shrink_to(budget);
}

std::optional<Activations> stash_take(int32_t slip, const StashKey& key) {
  std::lock_guard lock(mutex);
  const auto found = find(slip);
  if (!slip || found == entries.end() || !(found->key == key)) {
    ++misses;
    return std::nullopt;
  }
  ++hits;
  Activations activations = std::move(found->activations);
  held -= activations.memory.size();
  entries.erase(found);
  return activations;
}

void stash_recycle(Activations activations) {
  std::lock_guard lock(mutex);
  spare.reserve(spare.size() + 1);
  spare_held += activations.memory.size();
  spare.push_back(std::move(activations));
  shrink_to(budget);
}

size_t stash_budget() {
  std::lock_guard lock(mutex);
  return budget;
}

void stash_set_budget(size_t bytes) {
  std::lock_guard lock(mutex);
  budget = bytes;
  shrink_to(budget);
}

StashStats stash_stats() {
  std::lock_guard lock(mutex);
  return {static_cast<int64_t>(entries.size()),
          static_cast<int64_t>(held),
          static_cast<int64_t>(spare_held),
          hits,
          misses,
          evicted};
}

void stash_clear(std::optional<int> store) {
  std::lock_guard lock(mutex);
  for (size_t i = entries.size(); i-- > 0;)
    if (!store || entries[i].key.store == *store) drop(entries.begin() + static_cast<std::ptrdiff_t>(i));
  if (!store || entries.empty()) {
    spare.clear();
    spare_held = 0;
  }
}

}  // namespace kjax
