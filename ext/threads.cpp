// The pool, its size, and the places where a task waits.
#include "threads.h"

#include <unistd.h>

#include <algorithm>
#include <cfenv>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <fstream>
#include <memory>
#include <mutex>
#include <sstream>
#include <thread>
#include <utility>
#include <vector>

#include "mapped.h"
#include "numa.h"
#include "text.h"

namespace kjax {
namespace {

std::atomic<bool> cancelled{false};

// Raised inside workers when another one failed; never leaves the pool.
struct Aborted {};

inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  __asm__ volatile("yield");
#endif
}

// About a tenth of a millisecond: longer than the gap between two calls of a layer, too short to be seen as load.
constexpr int kSpins = 2000;

// Rounding to nearest, and denormals as they are: callers differ (XLA's threads flush them), and which thread takes a
// task is chance.
class PlainArithmetic {
 public:
  PlainArithmetic() {
    std::fegetenv(&callers_);
    std::fesetenv(FE_DFL_ENV);
  }
  ~PlainArithmetic() { std::fesetenv(&callers_); }

 private:
  std::fenv_t callers_;
};

}  // namespace

void cancel(bool on) { cancelled.store(on); }

void Worker::check() const {
  if (cancelled.load(std::memory_order_relaxed)) throw Cancelled();
  if (failed_->load(std::memory_order_relaxed) || file_lost()) throw Aborted();
}

void Worker::wait_for(const std::atomic<int32_t>& counter, int32_t value) const {
  for (int spins = 0; counter.load(std::memory_order_acquire) < value; ++spins) {
    if (failed_->load(std::memory_order_relaxed) || file_lost()) throw Aborted();
    if (spins < kSpins)
      pause();
    else
      std::this_thread::yield();  // more threads than cores: the one waited for needs this core
  }
}

// Threads live as long as the process; a Pool is never destroyed, so no thread is joined at exit.
class Pool {
 public:
  static Pool& get() {
    static Pool* pool = new Pool;
    return *pool;
  }

  // The mutex of a forked parent may be locked for ever, so this comes before any lock.
  void check_process() const {
    const pid_t owner = owner_.load();
    if (owner && owner != getpid())
      throw std::runtime_error(
          "this process was forked after kjax started its kernel threads, and threads do not survive a "
          "fork: start it with the \"spawn\" or \"forkserver\" method instead");
  }

  void run(Job job) {
    check_process();
    job_ = &job;
    failed_.store(false);
    error_ = nullptr;
    const int others = static_cast<int>(workers_.size()) - 1;
    running_.store(others, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
    part(*workers_[0]);
    for (int spins = 0; int32_t left = running_.load(std::memory_order_acquire); ++spins) {
      if (spins < kSpins)
        pause();
      else
        running_.wait(left, std::memory_order_acquire);
    }
    const std::exception_ptr error = std::exchange(error_, nullptr);
    require_files();
    if (error) std::rethrow_exception(error);
  }

  std::mutex turn;

  // The threads that are missing; within a turn.
  void start() {
    const int count = thread_count();
    const std::vector<int>& homes = thread_nodes();
    owner_.store(getpid());
    workers_.reserve(count);
    while (static_cast<int>(workers_.size()) < count) {
      auto worker = std::make_unique<Worker>();
      worker->id = static_cast<int>(workers_.size());
      worker->node = homes[workers_.size()];
      worker->failed_ = &failed_;
      workers_.push_back(std::move(worker));
      if (workers_.size() == 1) continue;  // the caller's
      try {
        std::thread(&Pool::loop, this, workers_.back().get(), generation_.load()).detach();
      } catch (const std::bad_alloc&) {
        workers_.pop_back();
        throw;
      } catch (const std::system_error& error) {
        workers_.pop_back();
        throw std::runtime_error(text("cannot start kernel thread ", workers_.size(), " of ", count, " (", error.what(),
                                      "): set KJAX_THREADS to a smaller number"));
      }
    }
  }

 private:
  // The caller's thread is not pinned: the one CPU that the others leave idle is where it belongs.
  void loop(Worker* worker, int32_t seen) {
    if (nodes().size() > 1) pin_thread(nodes()[worker->node]);
    for (;;) {
      for (int spins = 0; generation_.load(std::memory_order_acquire) == seen && spins < kSpins; ++spins) pause();
      generation_.wait(seen, std::memory_order_acquire);
      ++seen;
      part(*worker);
      if (running_.fetch_sub(1, std::memory_order_acq_rel) == 1) running_.notify_all();
    }
  }

  void part(Worker& worker) {
    const PlainArithmetic plain;
    try {
      (*job_)(worker);
    } catch (const Aborted&) {
    } catch (...) {
      std::lock_guard lock(error_mutex_);
      if (!error_) error_ = std::current_exception();
      failed_.store(true);
    }
  }

  std::vector<std::unique_ptr<Worker>> workers_;
  std::atomic<pid_t> owner_{0};
  std::atomic<int32_t> generation_{0};  // counts jobs
  std::atomic<int32_t> running_{0};     // workers still in the present one
  std::atomic<bool> failed_{false};
  const Job* job_ = nullptr;
  std::mutex error_mutex_;
  std::exception_ptr error_;
};

Turn::Turn() {
  Pool& pool = Pool::get();
  pool.check_process();
  std::unique_lock lock(pool.turn);
  pool.start();  // before anything is allocated for the threads there will be
  watch_files();
  lock.release();
}
Turn::Turn(std::try_to_lock_t) : held_(Pool::get().turn.try_lock()) {}
Turn::~Turn() {
  if (held_) Pool::get().turn.unlock();
}
void Turn::run(Job job) { Pool::get().run(job); }

void run(Job job) {
  Turn turn;
  turn.run(job);
}

namespace {

bool read_line(const std::string& path, std::string& line) {
  std::ifstream file(path);
  return static_cast<bool>(std::getline(file, line));
}

// Smallest quota from the group up to the root; "max", -1 and a missing file mean none.
double smallest_quota(std::string group, const std::string& mount, bool v2) {
  double least = 0;
  for (;;) {
    std::string line, period_line;
    double quota = 0, period = 0;
    if (v2 && read_line(mount + group + "/cpu.max", line)) {
      std::istringstream fields(line);
      if (!(fields >> quota >> period)) quota = 0;
    } else if (!v2 && read_line(mount + group + "/cpu.cfs_quota_us", line) &&
               read_line(mount + group + "/cpu.cfs_period_us", period_line)) {
      quota = std::atof(line.c_str());
      period = std::atof(period_line.c_str());
    }
    if (quota > 0 && period > 0) least = least > 0 ? std::min(least, quota / period) : quota / period;
    const size_t slash = group.rfind('/');
    if (group.empty() || slash == std::string::npos) return least;
    group.resize(slash);
  }
}

}  // namespace

double cgroup_cpu_quota(const std::string& root) {
  std::ifstream groups(root + "/proc/self/cgroup");
  double least = 0;
  for (std::string line; std::getline(groups, line);) {  // hierarchy:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    std::string group = line.substr(second + 1);
    if (group == "/") group.clear();
    const bool v2 = controllers.empty();
    if (!v2 && ("," + controllers + ",").find(",cpu,") == std::string::npos) continue;
    const double quota = smallest_quota(group, root + (v2 ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu"), v2);
    if (quota > 0) least = least > 0 ? std::min(least, quota) : quota;
  }
  return least;
}

int count_threads(const std::string& root) {
  constexpr int kMost = 4096;
  if (const char* value = std::getenv("KJAX_THREADS"); value && *value) {
    char* end;
    const long n = std::strtol(value, &end, 10);
    if (*end || n < 1 || n > kMost)
      throw std::invalid_argument(text("KJAX_THREADS=", value, " is not a number of threads from 1 to ", kMost));
    return static_cast<int>(n);
  }
  int cores = static_cast<int>(allowed_cpus().size());
  if (!cores) cores = static_cast<int>(std::thread::hardware_concurrency());
  const double quota = cgroup_cpu_quota(root);
  if (quota > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota)));
  return std::max(cores, 1);
}

int thread_count() {
  static const int count = count_threads("");
  return count;
}

}  // namespace kjax
