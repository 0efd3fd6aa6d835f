// One call: its checks, routing, stash and statistics around a pass.
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <span>
#include <stdexcept>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "pass.h"
#include "stash.h"
#include "store.h"
#include "text.h"
#include "threads.h"
#include "workspace.h"

namespace kjax {
namespace {

Workspace& workspace() {
  static Workspace* const space = new Workspace;  // never destroyed: a call may be in flight at exit
  return *space;
}

std::shared_ptr<const Store> open(const Call& call) {
  std::shared_ptr<const Store> store = find_store(call.store);
  if (call.layer < 0 || call.layer >= store->layers)
    throw std::invalid_argument(
        text("expert store ", call.store, ": layer ", call.layer, " is not in 0..", store->layers - 1));
  store->check_layer(static_cast<int>(call.layer));
  if (call.width != store->width)
    throw std::invalid_argument(
        text("expert store ", call.store, ": rows have ", call.width, " numbers, its experts take ", store->width));
  if (call.tokens > INT32_MAX || call.tokens * call.per_token > INT32_MAX)
    throw std::invalid_argument(
        text("expert store ", call.store, ": ", call.tokens, " tokens are too many for one call"));
  return store;
}

// Adds the time a call took to its store's statistics.
class Clock {
 public:
  explicit Clock(std::atomic<int64_t>& total) : total_(total) {}
  ~Clock() {
    total_ += std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now() - begin_).count();
  }

 private:
  std::atomic<int64_t>& total_;
  const std::chrono::steady_clock::time_point begin_ = std::chrono::steady_clock::now();
};

StashKey key_of(const Call& call, const Store& store, const Routing& routing) {
  return {store.id,
          static_cast<int>(call.layer),
          call.tokens,
          call.per_token,
          routing.routes(),
          call.adapters ? call.adapters->rank() : 0,
          hash_idx(call.idx, call.tokens * call.per_token)};
}

size_t kept_bytes(const Call& call, const Store& store, const Routing& routing) {
  const size_t low = call.adapters ? static_cast<size_t>(routing.routes() * call.adapters->rank()) * sizeof(float) : 0;
  return 2 * static_cast<size_t>(routing.routes() * store.hidden) *
             size_of(kOperandType[static_cast<int>(store.format)]) +
         low;
}

constexpr size_t kLanes = 8;  // sums side by side, so that a compiler can make vectors of them

void add_squares(std::span<const float> numbers, double (&lanes)[kLanes]) {
  const auto add = [&](size_t i, size_t lane) { lanes[lane] += static_cast<double>(numbers[i]) * numbers[i]; };
  const size_t whole = numbers.size() / kLanes * kLanes;
  for (size_t i = 0; i < whole; i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) add(i + lane, lane);
  for (size_t i = whole; i < numbers.size(); ++i) add(i, i - whole);
}

// The sum of the squares of all gradients of the layer: per expert on any thread, then in the order of experts.
double squares(Turn& turn, Workspace& space, const Call& call, const Store& store, const AdapterGradients& gradients) {
  std::vector<double>& sums = space.squares;
  sums.assign(store.experts, 0.0);
  std::atomic<int> next{0};
  auto job = [&](Worker& worker) {
    for (int e; (e = next.fetch_add(1)) < store.experts;) {
      worker.check();
      double lanes[kLanes] = {};
      for (int p = 0; p < kProjections; ++p) {
        const int64_t rank = call.adapters->of[p].rank;
        if (!rank) continue;
        const int64_t in = p == kDown ? store.hidden : store.width, out = p == kDown ? store.width : store.hidden;
        for (const std::span<const float> part : {std::span(gradients.a[p] + e * rank * in, rank * in),
                                                  std::span(gradients.b[p] + e * rank * out, rank * out)})
          add_squares(part, lanes);
      }
      for (double lane : lanes) sums[e] += lane;
    }
  };
  turn.run(job);
  double total = 0;
  for (double sum : sums) total += sum;
  return total;
}

}  // namespace

void release_workspace() {
  if (const Turn turn(std::try_to_lock); turn) workspace().release();
}

int32_t experts_forward(const Call& call, bool keep, void* y) {
  const std::shared_ptr<const Store> store = open(call);
  const Kernels& kernels = *chosen().kernels;
  Turn turn;
  store->require_whole();
  Workspace& space = workspace();
  const Clock clock(store->stats.forward_ns);
  space.routing.build(call.idx, call.tokens, call.per_token, store->experts);
  space.settle();
  ++store->stats.forward;
  store->stats.tokens += space.routing.tokens;
  store->stats.routes += space.routing.routes();
  std::optional<Activations> kept;
  if (keep) kept = stash_room(kept_bytes(call, *store, space.routing));
  if (space.routing.segments.empty()) {
    std::fill_n(static_cast<std::byte*>(y), static_cast<size_t>(call.tokens * call.width) * size_of(call.dtype),
                std::byte{0});
  } else {
    forward_pass(call, *store, kernels, space, turn, kept ? kept->memory.data() : nullptr, y);
  }
  if (!keep) return 0;
  const int32_t slip = stash_draw_slip();
  if (kept) stash_put(slip, key_of(call, *store, space.routing), std::move(*kept));
  return slip;
}

void experts_backward(const Call& call, int32_t slip, const void* dy, void* dx, float* dgate,
                      const AdapterGradients& gradients) {
  const std::shared_ptr<const Store> store = open(call);
  const Kernels& kernels = *chosen().kernels;
  Turn turn;
  store->require_whole();
  Workspace& space = workspace();
  const Clock clock(store->stats.backward_ns);
  space.routing.build(call.idx, call.tokens, call.per_token, store->experts);
  space.settle();
  ++store->stats.backward;
  std::optional<Activations> kept = stash_take(slip, key_of(call, *store, space.routing));
  if (!kept) ++store->stats.recomputed;
  if (space.routing.segments.empty()) {
    std::fill_n(static_cast<std::byte*>(dx), static_cast<size_t>(call.tokens * call.width) * size_of(call.dtype),
                std::byte{0});
    std::fill_n(dgate, call.tokens * call.per_token, 0.0f);
    for (int e = 0; gradients.fresh && e < store->experts; ++e) clear(gradients, *call.adapters, *store, e);
    if (gradients.grown) *gradients.grown = 0;
    return;
  }
  backward_pass(call, *store, kernels, space, turn, kept ? kept->memory.data() : nullptr, dy, dx, dgate, gradients);
  if (kept) stash_recycle(std::move(*kept));
  if (!gradients.squares) return;
  const double before = std::exchange(*gradients.squares, squares(turn, space, call, *store, gradients));
  *gradients.grown = static_cast<float>(*gradients.squares - before);
}

}  // namespace kjax
