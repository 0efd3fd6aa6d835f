// What the tasks of a call are: runs of tasks of one stage, in the order in which they are claimed.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace kjax {

// kGateUp and kDown multiply along stored rows, kInner and kOuter across them (pass.h, forward.cpp, backward.cpp).
enum class Stage { kGather, kGateUp, kDown, kInner, kOuter, kClear };

class Schedule {
 public:
  struct Task {
    Stage stage;
    int64_t item, strip;  // of a piece (kGather), of a segment (products) or of an idle expert (kClear)
  };

  void clear() {
    runs_.clear();
    count_ = 0;
  }
  // `strips` tasks for each of the items [first, end), item by item.
  void add(Stage stage, int64_t first, int64_t end, int64_t strips) {
    if (first == end) return;
    runs_.push_back({count_, stage, first, strips});
    count_ += (end - first) * strips;
  }
  int64_t count() const { return count_; }
  Task at(int64_t t) const {
    const Run& run =
        *(std::upper_bound(runs_.begin(), runs_.end(), t, [](int64_t t, const Run& r) { return t < r.begin; }) - 1);
    return {run.stage, run.first + (t - run.begin) / run.strips, (t - run.begin) % run.strips};
  }

 private:
  struct Run {
    int64_t begin;  // its first task
    Stage stage;
    int64_t first, strips;
  };
  std::vector<Run> runs_;
  int64_t count_ = 0;
};

}  // namespace kjax
