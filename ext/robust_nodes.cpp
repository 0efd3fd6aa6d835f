// Which thread reads which expert first, on two made-up memory nodes: those of its own node before any other, and those
// of the other where its own has no work.
#include <signal.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "experts.h"
#include "numa.h"
#include "robust_data.h"
#include "stash.h"
#include "store.h"
#include "threads.h"

namespace kjax {
namespace {

constexpr int kExperts = 48, kWidth = 256, kHidden = 128;  // 64 KB: whole pages of any size
constexpr size_t kBytes = size_t{kWidth} * kHidden * 2;

struct Read {
  int expert;
  bool by_caller;
};
uint8_t* watched;  // [kExperts, kBytes], unreadable until the first read
std::array<Read, kExperts> reads;
std::atomic<int> count{0};
std::array<std::atomic<bool>, kExperts> open;

// Notes who reads an expert that is still closed, and opens it.
void on_read(int, siginfo_t* info, void*) {
  const ptrdiff_t at = static_cast<uint8_t*>(info->si_addr) - watched;
  if (at < 0 || at >= static_cast<ptrdiff_t>(kExperts * kBytes)) {
    signal(SIGSEGV, SIG_DFL);  // not ours: it comes again
    return;
  }
  const int expert = static_cast<int>(at / static_cast<ptrdiff_t>(kBytes));
  if (!open[expert].exchange(true)) reads[count.fetch_add(1)] = {expert, syscall(SYS_gettid) == getpid()};
  mprotect(watched + expert * kBytes, kBytes, PROT_READ);
}

int node_of(int expert) { return expert % 2; }

// The first read of another node's expert while more of the reader's own were unread than the other thread can hold,
// one at work and one ahead; -1 if there is none.
int too_early() {
  int unread[2] = {kExperts / 2, kExperts / 2};
  for (int n = 0; n < count.load(); ++n) {
    const int home = thread_nodes()[reads[n].by_caller ? 0 : 1];
    if (node_of(reads[n].expert) != home && unread[home] > 2) return n;
    --unread[node_of(reads[n].expert)];
  }
  return -1;
}

}  // namespace

int nodes_first() {
  setenv("KJAX_THREADS", "2", 1);
  set_nodes({{0, {0}}, {1, {1}}});
  watched = static_cast<uint8_t*>(
      __real_mmap(nullptr, kExperts * kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  if (watched == MAP_FAILED) throw std::bad_alloc();
  const auto store = std::make_shared<Store>(1, kExperts, kWidth, kHidden, Format::kBf16);
  const int buffer =
      store->add_buffer(std::shared_ptr<const uint8_t>(watched, [](const uint8_t*) {}), kExperts * kBytes);
  std::vector<int64_t> offset(kExperts);
  std::vector<int32_t> nodes(kExperts);
  for (int e = 0; e < kExperts; ++e) {
    offset[e] = static_cast<int64_t>(e * kBytes);
    nodes[e] = node_of(e);
  }
  const std::vector<int32_t> buffers(kExperts, buffer);
  for (int p = 0; p < kProjections; ++p) store->place(0, p, buffers.data(), offset.data(), nullptr, nullptr);
  store->set_nodes(nodes.data());
  register_store(store);

  // Each token to one expert, so that all have equally many rows and are taken by number.
  constexpr int64_t kTokens = kExperts * 4;
  const std::vector<float> x(kTokens * kWidth, 1.0f), gate(kTokens, 1.0f);
  std::vector<float> y(x.size());
  std::vector<int32_t> idx(kTokens);
  for (int64_t t = 0; t < kTokens; ++t) idx[t] = static_cast<int32_t>(t % kExperts);
  const Call call{store->id, 0, kTokens, kWidth, 1, Dtype::kFp32, x.data(), idx.data(), gate.data()};

  struct sigaction watch = {};
  watch.sa_sigaction = on_read;
  watch.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &watch, nullptr);
  int64_t by_caller = 0;
  const auto forward = [&] {
    count.store(0);
    for (std::atomic<bool>& one : open) one.store(false);
    mprotect(watched, kExperts * kBytes, PROT_NONE);
    experts_forward(call, false, y.data());
    for (int n = 0; n < count.load(); ++n) by_caller += reads[n].by_caller;
  };
  constexpr int kCalls = 50;
  for (int i = 0; i < kCalls; ++i) {
    forward();
    if (const int n = too_early(); n >= 0 || count != kExperts) {
      std::printf("nodes: call %d, read %d of %d is too early: WRONG\n", i, n, count.load());
      return 1;
    }
  }
  const int64_t of_all = std::exchange(by_caller, 0);
  for (int32_t& expert : idx) expert |= 1;  // of node 1 alone
  for (int i = 0; i < kCalls; ++i) forward();
  std::printf(
      "nodes: the caller reads %lld of %d experts first, each thread those of its node before others; %lld of %d "
      "where its node has no work%s\n",
      static_cast<long long>(of_all), kCalls * kExperts, static_cast<long long>(by_caller), kCalls * kExperts / 2,
      by_caller ? "" : ": WRONG");
  return !by_caller;
}

}  // namespace kjax
