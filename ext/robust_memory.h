// What kjax_robust counts of its allocations, and the one that it refuses (robust_memory.cpp).
#pragma once
#include <atomic>
#include <cstdint>

namespace kjax {

extern std::atomic<int64_t> allocations;  // so far
extern std::atomic<int64_t> held;         // bytes that are allocated now
extern std::atomic<int64_t> most_held;    // at any time since this was set
extern std::atomic<int64_t> refuse_at;    // the number of the allocation that fails; -1: none
extern std::atomic<bool> refuse_files;    // mapping one fails
extern void (*while_unmapping)();         // if not null, happens before memory is unmapped

}  // namespace kjax
