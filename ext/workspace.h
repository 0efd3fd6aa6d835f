// Memory that a call needs besides its arguments, kept from call to call.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "routing.h"
#include "schedule.h"
#include "tasks.h"

namespace kjax {

using Counter = std::atomic<int32_t>;

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline size_t size_of(Dtype dtype) { return dtype == Dtype::kBf16 ? 2 : 4; }

// Length of an operand row: zero-padded for whole vectors, and never a multiple of 4 KB, where all rows would share one
// L1 set.
inline int64_t row_length(int64_t n) { return round_up(n, kPad) + kPad; }

// Operand rows and activations that lie in memory at a time, for each thread: what two threads have stays in the L3 of
// a desktop, and many have tasks enough in a group that they seldom wait where groups meet (docs/performance.md).
constexpr size_t kRowMemory = size_t{8} << 20;
// What is in force. Tests choose other bounds, which change no result; with 0 every segment is a group of its own.
inline std::atomic<size_t> row_memory{kRowMemory};

// Counters of one call, reset without reallocation.
class Counters {
 public:
  Counter* reset(int64_t n) {
    if (n > size_) {
      data_ = std::make_unique<Counter[]>(n);
      size_ = n;
    }
    for (int64_t i = 0; i < n; ++i) data_[i].store(0, std::memory_order_relaxed);
    return data_.get();
  }

 private:
  std::unique_ptr<Counter[]> data_;
  int64_t size_ = 0;
};

// Memory between calls; calls take turns, so there is one.
struct Workspace {
  Routing routing;
  Memory rows;     // by slot: x and h of a forward call; dy, x where needed, and g and u, then dg and du, of a backward
  Memory sums;     // fp32 output [tokens, width] where the output itself is bf16
  Memory partial;  // [slots, strips] parts of dgate
  Memory low, low_gradients;  // T and dT of the adapters [routes, ranks]
  Memory scratch;             // of all threads
  Counters gathered, ready, recomputed, turn;
  Schedule schedule;
  Tasks tasks;
  std::vector<double> squares;  // per expert, of its adapters' gradients

  // At the beginning of a call, after the routing is built: a size of call that stopped coming stops costing memory.
  void settle() {
    constexpr int kPatience = 256;  // calls: more than a step of 60 layers makes, so that evaluations do not count
    smaller_ = routing.routes() * 4 < largest_ ? smaller_ + 1 : 0;
    if (smaller_ == kPatience) release();
    largest_ = std::max(largest_, routing.routes());
  }
  void release() {
    for (Memory* memory : {&rows, &sums, &partial, &low, &low_gradients, &scratch}) memory->release();
    largest_ = 0;
    smaller_ = 0;
  }

 private:
  int64_t largest_ = 0;
  int smaller_ = 0;
};

}  // namespace kjax
