// The kernels' own thread pool: workers that spin briefly, then sleep, and one job at a time on all of them.
#pragma once
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string>

namespace kjax {

// Raised by kernel calls between tasks while cancellation is switched on.
struct Cancelled : std::runtime_error {
  Cancelled() : std::runtime_error("cancelled") {}
};
void cancel(bool on);

// One thread's part of a job.
class Worker {
 public:
  int id;
  int node;  // an index into nodes(), whose memory this thread should read
  std::byte* scratch = nullptr;  // for whoever wrote the job

  // Throws when the job was cancelled, failed elsewhere or lost a mapped file; called between tasks.
  void check() const;
  // Waits until `counter` is at least `value`, which an earlier task of the same job will see to.
  void wait_for(const std::atomic<int32_t>& counter, int32_t value) const;

 private:
  friend class Pool;
  const std::atomic<bool>* failed_ = nullptr;
};

// A reference to a callable, without the heap.
class Job {
 public:
  template <class F>
  Job(F& f) : object_(&f), call_([](void* object, Worker& worker) { (*static_cast<F*>(object))(worker); }) {}
  void operator()(Worker& worker) const { call_(object_, worker); }

 private:
  void* object_;
  void (*call_)(void*, Worker&);
};

// Runs `job` once on each of thread_count() threads, the caller among them; the first exception of any is thrown here.
// Calls from several threads take turns: a job already has the whole machine. In the child of a fork it throws.
void run(Job job);

// Holds the pool for one call, so that what lies between checks and jobs (shared workspace) is held too. Mapped files
// are read within a turn only: require_files() relies on it.
class Turn {
 public:
  Turn();
  explicit Turn(std::try_to_lock_t);  // without waiting; false where another call has the turn
  ~Turn();
  Turn(const Turn&) = delete;
  explicit operator bool() const { return held_; }
  void run(Job job);

 private:
  bool held_ = true;
};

// KJAX_THREADS, or the cores of the affinity mask limited by the cgroup's CPU quota. Throws on an unusable
// KJAX_THREADS.
int thread_count();
int count_threads(const std::string& root);  // the same, determined anew from the files below `root`
// The quota in cores (0: none) that the control-group files below `root` give to the group named in
// `root`/proc/self/cgroup.
double cgroup_cpu_quota(const std::string& root);

}  // namespace kjax
