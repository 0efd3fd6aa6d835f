// What the self-test does not look at: every decode over random bytes, shapes and places between unmapped pages; memory
// refused at each single allocation; no allocation in a steady call, and how much first calls allocate; calls from a
// thread with arithmetic of its own; experts read by threads of their memory node; mapped files that are cold or lost;
// calls and closings from several threads at once.
//   kjax_robust fuzz [SECONDS [SEED]] | refusals | steady | modes | memory | nodes | files | together [SECONDS]
// Exit status 1 and a line that says how to repeat it when something is wrong. Meant for builds with sanitizers too.
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cfenv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "adapter_call.h"
#include "dispatch.h"
#include "experts.h"
#include "numa.h"
#include "robust_data.h"
#include "robust_memory.h"
#include "stash.h"
#include "store.h"
#include "text.h"
#include "threads.h"
#include "workspace.h"

namespace kjax {
namespace {

// A small store and a call over it, with adapters that stay on the host where they are asked for.
struct Example : AdapterArrays {
  Example(Format format, uint64_t seed, bool adapted = false, int64_t tokens = 50, int64_t width = 96,
          int64_t hidden = 72)
      : tokens(tokens), width(width), hidden(hidden) {
    Random random(seed);
    constexpr int kExperts = 5;
    const auto store = std::make_shared<Store>(1, kExperts, width, hidden, format);
    for (int projection = 0; projection < kProjections; ++projection) {
      const Matrix w = store->matrix(0, 0, projection);
      const int64_t bytes = w.rows * row_bytes(format, w.cols), scales = scale_count(format, w.rows, w.cols);
      std::vector<int32_t> buffer(kExperts), scale_buffer(kExperts);
      const std::vector<int64_t> offset(kExperts, 0);
      for (int e = 0; e < kExperts; ++e) {
        const auto codes = std::make_shared<Fenced>(bytes, true), scale = std::make_shared<Fenced>(scales * 4, true);
        fill(format, codes->data(), bytes, scale->data(), scales, true, random);
        buffer[e] = store->add_buffer(std::shared_ptr<const uint8_t>(codes, codes->data()), bytes);
        scale_buffer[e] = store->add_buffer(std::shared_ptr<const uint8_t>(scale, scale->data()), scales * 4);
      }
      store->place(0, projection, buffer.data(), offset.data(), scales ? scale_buffer.data() : nullptr, offset.data());
    }
    std::vector<int32_t> nodes(kExperts);
    for (int e = 0; e < kExperts; ++e) nodes[e] = e % static_cast<int>(kjax::nodes().size());
    store->set_nodes(nodes.data());
    id = register_store(store);
    for (int64_t i = 0; i < tokens * width; ++i) x.push_back(static_cast<float>(random.between(-99, 99)) / 50);
    for (int64_t i = 0; i < tokens * kPerToken; ++i) {
      idx.push_back(static_cast<int32_t>(random.between(-1, kExperts - 1)));
      gate.push_back(0.25f);
    }
    if (adapted) add_adapters(kExperts);
  }

  void add_adapters(int experts) {
    factors.assign(kRank * experts * (width + hidden), 0.01f);  // either factor of a projection fits in
    gradients.resize(2 * kProjections, factors);
    auto adapters = std::make_shared<HostAdapters>();
    adapters->layers = 1;
    adapters->experts = experts;
    adapters->width = width;
    adapters->hidden = hidden;
    adapters->squares.assign(1, 0.0);
    for (int p = 0; p < kProjections; ++p) {
      adapters->first[p] = {factors.data(), factors.data(), kRank, 0};
      adapters->gradients.a[p] = gradients[2 * p].data();
      adapters->gradients.b[p] = gradients[2 * p + 1].data();
    }
    host = open_host_adapters();
    bind_host_adapters(static_cast<int>(host), adapters);
  }
  Tensor operand(size_t) const override { throw std::invalid_argument("no factors are operands"); }
  float* result(size_t, std::span<const int64_t>) override { return &grown; }
  size_t operand_count() const override { return 0; }
  size_t result_count() const override { return 1; }

  // The bits of y, of the gradients from the stash, and of those computed again.
  uint64_t results() {
    thread_local std::vector<float> y, dx, dgate;
    y.resize(tokens * width);
    dx.resize(tokens * width);
    dgate.resize(tokens * kPerToken);
    for (std::vector<float>& sums : gradients) std::fill(sums.begin(), sums.end(), 0.0f);
    Call call{id, 0, tokens, width, kPerToken, Dtype::kFp32, x.data(), idx.data(), gate.data()};
    std::optional<AdapterCall> adapters;
    const float scales[kProjections] = {1, 2, 3};
    if (host >= 0) adapters.emplace(call, AdapterSetting{scales, 0, host}, *this);
    uint64_t hash = 0;
    const auto add = [&](const std::vector<float>& numbers) {
      hash =
          hash * 31 + hash_idx(reinterpret_cast<const int32_t*>(numbers.data()), static_cast<int64_t>(numbers.size()));
    };
    const int32_t slip = experts_forward(call, true, y.data());
    add(y);
    for (int i = 0; i < 2; ++i) {
      experts_backward(call, slip, x.data(), dx.data(), dgate.data(),
                       adapters ? adapters->gradients() : AdapterGradients{});
      add(dx);
      add(dgate);
    }
    for (const std::vector<float>& sums : gradients) add(sums);
    return hash;
  }

  static constexpr int64_t kPerToken = 2, kRank = 8;
  const int64_t tokens, width, hidden;
  int id;
  int64_t host = -1;
  std::vector<float> x, gate, factors;
  std::vector<std::vector<float>> gradients;
  std::vector<int32_t> idx;
  float grown = 0;
};

// A fresh process, without threads or kept memory, that refuses allocation `at` of its first call; -1 refuses none. It
// then calls again and reports the results. True while there was such an allocation.
bool refuse(int64_t at, Example& example, uint64_t& results, bool& good) {
  int channel[2];
  if (pipe(channel)) throw std::runtime_error("pipe");
  const pid_t child = fork();
  if (child == 0) {
    alarm(60);
    const int64_t before = allocations.load();
    refuse_at.store(at < 0 ? -1 : before + at);
    try {
      example.results();
    } catch (const std::bad_alloc&) {
    } catch (const std::exception& error) {
      if (at < 0) _exit(3);
    }
    refuse_at.store(-1);
    const uint64_t hash = example.results();
    if (write(channel[1], &hash, sizeof hash) != sizeof hash) _exit(4);
    _exit(allocations.load() - before > at ? 0 : 2);
  }
  close(channel[1]);
  uint64_t hash = 0;
  const bool told = read(channel[0], &hash, sizeof hash) == sizeof hash;
  close(channel[0]);
  int status;
  waitpid(child, &status, 0);
  if (at < 0) results = hash;
  if (!told || hash != results || !WIFEXITED(status) || (WEXITSTATUS(status) != 0 && WEXITSTATUS(status) != 2)) {
    std::printf("allocation %lld refused: status %#x, results %s\n", static_cast<long long>(at), status,
                hash == results ? "right" : "wrong");
    good = false;
  }
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

int refusals() {
  Example example(Format::kFp8Block, 1, true);
  uint64_t results = 0;
  bool good = true;
  refuse(-1, example, results, good);
  int64_t at = 0;
  for (; good && at < 2000; ++at)
    if (!refuse(at, example, results, good)) break;
  std::printf("refusals: each of %lld allocations of a first call refused once%s\n", static_cast<long long>(at),
              good ? ", an exception every time, and the next call right" : ": WRONG");
  return !good;
}

int steady() {
  bool good = true;
  for (const auto& [format, adapted] : {std::pair{Format::kBf16, false},
                                        {Format::kFp32, false},
                                        {Format::kBf16, true},
                                        {Format::kInt4Group32, false},
                                        {Format::kInt4Group32, true}}) {
    Example example(format, 2, adapted);
    const uint64_t expected = example.results();
    for (int i = 0; i < 3; ++i) example.results();
    const int64_t before = allocations.load();
    for (int i = 0; i < 20; ++i) good &= example.results() == expected;
    const int64_t made = allocations.load() - before;
    std::printf("steady: %lld allocations in 60 calls on %s%s\n", static_cast<long long>(made),
                kFormatInfo[static_cast<int>(format)].name, adapted ? " with adapters on the host" : "");
    good &= made == 0;
    close_store(example.id);
  }
  return !good;
}

// Calls from a thread that flushes denormals and rounds upwards, over numbers whose products are denormal.
int modes() {
  Example example(Format::kFp32, 7);
  for (float& x : example.x) x *= 1e-20f;
  const uint64_t expected = example.results();
  std::fesetround(FE_UPWARD);
#if defined(__x86_64__)
  const uint32_t before = __builtin_ia32_stmxcsr();
  __builtin_ia32_ldmxcsr(before | 0x8040);
#endif
  const uint64_t results = example.results();
  bool kept = std::fegetround() == FE_UPWARD;
#if defined(__x86_64__)
  kept = kept && (__builtin_ia32_stmxcsr() & 0x8040) == 0x8040;
  __builtin_ia32_ldmxcsr(before);
#endif
  std::fesetround(FE_TONEAREST);
  const bool good = results == expected && kept;
  std::printf("modes: results %s on the caller's rounding and denormals, which %s\n",
              results == expected ? "do not depend" : "DEPEND", kept ? "stay" : "ARE CHANGED");
  return !good;
}

// What the first calls on the threads there are take besides weights and the caller's arrays, at the width of
// DeepSeek-V3: with few tokens, and how much more with many, whose rows would take 2.5 times their bound at once.
int memory() {
  constexpr int64_t kTokens = 2000, kHidden = 512;
  constexpr size_t kRows = size_t{40} << 20;
  row_memory = kRows / static_cast<size_t>(thread_count());
  double taken[2];
  int64_t routes = 0;
  for (const bool many : {false, true}) {
    Example example(Format::kInt4Group32, 6, true, many ? kTokens : 4, 7168, kHidden);
    if (many) example.results();  // its own arrays, which results() keeps
    release_workspace();
    stash_clear({});
    const int64_t before = held.load();
    most_held.store(before);
    example.results();
    taken[many] = 1e-6 * static_cast<double>(most_held.load() - before);
    routes = std::count_if(example.idx.begin(), example.idx.end(), [](int32_t e) { return e >= 0; });
  }
  const double more = taken[1] - taken[0];
  const double stash = 1e-6 * static_cast<double>(routes * (2 * kHidden * 2 + 3 * Example::kRank * 4));
  const double other = 3;  // T and dT, turns, and what is not a whole huge page
  const bool few_good = taken[0] <= 64 || thread_count() > 64, many_good = more <= 1e-6 * kRows + stash + other;
  std::printf("memory: first calls on %d threads take %.1f MB%s, with many tokens %.1f MB more%s\n", thread_count(),
              taken[0], few_good ? "" : " (more than 64)", more, many_good ? "" : ": TOO MUCH");
  return !(few_good && many_good);
}

// Calls over two stores from four threads, while a fifth opens and closes others.
int together(double seconds) {
  set_nodes({{0, {0}}, {1, {1}}});  // made up: two queues of tasks, whatever the machine has
  Example one(Format::kBf16, 3), two(Format::kFp8Channel, 4);
  const uint64_t first = one.results(), second = two.results();
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  std::atomic<int64_t> calls{0}, wrong{0};
  std::vector<std::thread> threads;
  for (int i = 0; i < 5; ++i)
    threads.emplace_back([&, i] {
      while (std::chrono::steady_clock::now() < end) {
        if (i == 4) {
          Example other(Format::kInt8Group128, 5, true);
          other.results();
          close_store(other.id);
          close_host_adapters(static_cast<int>(other.host));
          release_workspace();
        } else {
          wrong += i % 2 ? one.results() != first : two.results() != second;
        }
        ++calls;
      }
    });
  for (std::thread& thread : threads) thread.join();
  std::printf("together: %lld rounds of calls on 5 threads, %lld wrong\n", static_cast<long long>(calls.load()),
              static_cast<long long>(wrong.load()));
  return wrong != 0;
}

int main(int argc, char** argv) {
  const std::string what = argc > 1 ? argv[1] : "";
  if (what == "fuzz")
    return fuzz(argc > 2 ? std::atof(argv[2]) : 10, argc > 3 ? std::strtoull(argv[3], nullptr, 10) : 1);
  row_memory = 0;  // small calls, whose segments take turns in memory all the same
  if (what == "refusals") return refusals();
  if (what == "steady") return steady();
  if (what == "modes") return modes();
  if (what == "memory") return memory();
  if (what == "nodes") return nodes_first();
  if (what == "files") return files();
  if (what == "together") return together(argc > 2 ? std::atof(argv[2]) : 5);
  std::fputs(
      "kjax_robust fuzz [SECONDS [SEED]] | refusals | steady | modes | memory | nodes | files | together [SECONDS]\n",
      stderr);
  return 2;
}

}  // namespace
}  // namespace kjax

int main(int argc, char** argv) {
  try {
    return kjax::main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
