// The order in which threads claim the tasks of a call: ascending, from one queue for each memory node.
//
// A task may wait for earlier tasks, so it matters that the earliest unfinished one is always running or about to be:
// every queue has at least one thread whose home it is and that leaves it only when it is used up, and a thread holds at
// most two tasks, of one queue and in ascending order. Then the earliest unfinished task cannot be held behind another.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>

namespace kjax {

class Tasks {
 public:
  // Tasks [0, count). queue_of(t) is called for each when there are several queues.
  template <class QueueOf>
  void reset(int64_t count, int queues, QueueOf queue_of) {
    if (queues > static_cast<int>(cursors_.size())) cursors_ = std::vector<Cursor>(queues);
    queues_ = queues;
    count_ = count;
    for (Cursor& cursor : cursors_) cursor.next.store(0, std::memory_order_relaxed);
    cursors_[0].begin = 0;
    cursors_[0].end = count;
    if (queues == 1) return;
    order_.resize(count);
    int64_t filled = 0;
    for (int queue = 0; queue < queues; ++queue) {
      cursors_[queue].begin = filled;
      for (int64_t t = 0; t < count; ++t)
        if (queue_of(t) == queue) order_[filled++] = t;
      cursors_[queue].end = filled;
    }
  }
  int64_t count() const { return count_; }

  // One thread's view; count() stands for no task.
  class Claims {
   public:
    Claims(Tasks& tasks, int home) : tasks_(tasks), home_(home), queue_(home) {}
    // A task of the home queue, or of another when that is used up. The thread holds none.
    int64_t take() {
      for (int i = 0; i < tasks_.queues_; ++i) {
        queue_ = (home_ + i) % tasks_.queues_;
        if (const int64_t t = tasks_.claim(queue_); t < tasks_.count_) return t;
      }
      return tasks_.count_;
    }
    // The next task of the same queue, while the thread still works on the last one.
    int64_t ahead() { return tasks_.claim(queue_); }

   private:
    Tasks& tasks_;
    const int home_;
    int queue_;
  };

 private:
  struct alignas(64) Cursor {
    std::atomic<int64_t> next{0};
    int64_t begin = 0, end = 0;
  };
  int64_t claim(int queue) {
    Cursor& cursor = cursors_[queue];
    const int64_t at = cursor.begin + cursor.next.fetch_add(1);
    if (at >= cursor.end) return count_;
    return queues_ == 1 ? at : order_[at];
  }

  int queues_ = 1;
  int64_t count_ = 0;
  std::vector<Cursor> cursors_ = std::vector<Cursor>(1);
  std::vector<int64_t> order_;  // of all queues, one after the other
};

}  // namespace kjax
