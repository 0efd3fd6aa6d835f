// The order of work and of additions. A call is one sequence of tasks, claimed in order by all threads; a task may wait
// for earlier tasks only, so the sequence cannot deadlock. Products are tasks of (segment of an expert's rows, strip of
// columns): each computes privately, waits until its strip's turn reaches its segment, adds in fp32 and passes the turn
// on. Segments go in an order that depends on the routing alone, so results do not depend on the number of threads.
#include "experts.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <stdexcept>

#include "dispatch.h"
#include "memory.h"
#include "routing.h"
#include "stash.h"
#include "store.h"
#include "text.h"
#include "threads.h"

namespace kjax {
namespace {

using Counter = std::atomic<int32_t>;

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
size_t size_of(Dtype dtype) { return dtype == Dtype::kBf16 ? 2 : 4; }

// Length of an operand row: zero-padded for whole vectors, and never a multiple of 4 KB, where all rows would share one
// L1 set.
int64_t row_length(int64_t n) { return round_up(n, kPad) + kPad; }

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
  Memory rows, more_rows;  // operand rows by slot: x or dy [slots, row_length(width)]; h, and x in a recomputation
  Memory sums;             // fp32 output [tokens, width] where the output itself is bf16
  Memory partial;          // [routes, strips] parts of dgate
  Memory activations;      // g and u, then dg and du, of a backward call, by slot
  Counters gathered, ready, turn;
};
Workspace& workspace() {
  static Workspace* const space = new Workspace;  // never destroyed: a call may be in flight at exit
  return *space;
}

// What forward and backward share: the store's shapes, the kernels, and the sequence of tasks.
class Pass {
 protected:
  Pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space)
      : call(call),
        store(store),
        gemm(*kernels.gemm[static_cast<int>(store.format)]),
        elementwise(*kernels.elementwise),
        space(space),
        routing(space.routing),
        type(kOperandType[static_cast<int>(store.format)]),
        width(store.width),
        hidden(store.hidden),
        segments(static_cast<int64_t>(space.routing.segments.size())),
        gathers(static_cast<int64_t>(space.routing.pieces.size())),
        gathered(space.gathered.reset(segments)),
        ready(space.ready.reset(segments)) {}

  // Operand row `slot` of rows of `length` numbers.
  std::byte* row(const Memory& memory, int64_t slot, int64_t length) const {
    return memory.data() + static_cast<size_t>(slot * length) * size_of(type);
  }
  size_t operand_bytes(int64_t n) const { return static_cast<size_t>(routing.slots * row_length(n)) * size_of(type); }
  Matrix matrix(int64_t segment, int projection) const {
    return store.matrix(static_cast<int>(call.layer), routing.segments[segment].expert, projection);
  }
  static Strip strip(const Matrix& w, int64_t along_count, int64_t block, int64_t step) {
    return {w, block * step, std::min(step, along_count - block * step)};
  }

  bool takes_packed(const Segment& s) const { return gemm.pack && s.rows >= gemm.packed_from; }

  // Copies the token rows of one piece together, rounded to the operand type, and packs them where `along` wants that.
  void gather(const Worker& worker, const void* from, const Memory& rows, int64_t task, bool for_along) const {
    const Piece& piece = routing.pieces[task];
    const Segment& s = routing.segments[piece.segment];
    const int64_t length = row_length(width);
    const bool packed = for_along && takes_packed(s);
    std::byte* const to = packed ? worker.scratch.data() + staging_offset() : row(rows, s.slot + piece.row, length);
    for (int64_t r = 0; r < piece.rows; ++r)
      elementwise.convert(static_cast<const std::byte*>(from) +
                              static_cast<size_t>(routing.token[s.first + piece.row + r] * width) * size_of(call.dtype),
                          call.dtype, to + r * length * size_of(type), type, width, length - width);
    if (packed) gemm.pack(to, length, piece.rows, piece.row, s.rows, 0, width, row(rows, s.slot, length), length);
    gathered[piece.segment].fetch_add(static_cast<int32_t>(piece.rows), std::memory_order_release);
  }

  // C of one product, [rows, ldc] in this worker's scratch after the kernel's own.
  static float* results(const Worker& worker, int64_t which) {
    return reinterpret_cast<float*>(worker.scratch.data() + kScratch) + which * kMaxRows * kWidest;
  }
  static constexpr int64_t kWidest = 4 * kLine;
  // Rows on their way into the packed layout: a piece of x, or h of one strip.
  static size_t staging_offset() { return kScratch + 2 * sizeof(float) * kMaxRows * kWidest; }
  size_t worker_bytes() const {
    return staging_offset() +
           std::max(kRowTile * row_length(width), kMaxRows * row_length(gemm.along_width)) * size_of(type);
  }

  // g and u [., length] of one strip from the gathered rows of x, where there is a place for them by route or by slot,
  // and h = silu(g) * u where that is wanted.
  void gate_up(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const Memory& x, std::byte* g,
               std::byte* u, int64_t length, bool by_slot, const Memory* h) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(gathered[segment], static_cast<int32_t>(s.rows));
    const Strip gate = strip(matrix(segment, kGate), hidden, block, gemm.along_width);
    const Strip up = strip(matrix(segment, kUp), hidden, block, gemm.along_width);
    const int64_t ldc = round_up(gate.count, kLine), x_length = row_length(width);
    float *const cg = results(worker, 0), *const cu = results(worker, 1);
    Product product{row(x, s.slot, x_length), x_length, s.rows, gate, up, cg, ldc, false, worker.scratch.data()};
    multiply_along(product);
    product.strip = up;
    product.next = next;
    product.c = cu;
    multiply_along(product);

    const bool packed = h && takes_packed(s);
    const int64_t h_length = packed ? row_length(gate.count) : row_length(hidden);
    std::byte* const h_rows = !h       ? nullptr
                              : packed ? worker.scratch.data() + staging_offset()
                                       : row(*h, s.slot, h_length) + gate.first * size_of(type);
    const int64_t pad = packed ? h_length - gate.count : gate.first + gate.count == hidden ? h_length - hidden : 0;
    for (int64_t r = 0; r < s.rows; ++r) {
      const size_t kept = static_cast<size_t>(((by_slot ? s.slot : s.first) + r) * length + gate.first) * size_of(type);
      elementwise.swiglu(cg + r * ldc, cu + r * ldc, gate.count, pad, g ? g + kept : nullptr, g ? u + kept : nullptr,
                         h ? h_rows + r * h_length * size_of(type) : nullptr, type);
    }
    if (packed)
      gemm.pack(h_rows, h_length, s.rows, 0, s.rows, gate.first, gate.count, row(*h, s.slot, row_length(hidden)),
                row_length(hidden));
  }
  void multiply_along(const Product& product) const { gemm.along[static_cast<int>(store.format)](product); }
  void multiply_across(const Product& product) const { gemm.across[static_cast<int>(store.format)](product); }

  // Adds C, scaled per route, to the fp32 sums of its tokens when the strip's turn comes. The first in turn clears the
  // strip, the last rounds it into a bf16 output.
  void hand_off(const Worker& worker, Counter& turn, int64_t segment, int64_t first, int64_t count, const float* c,
                int64_t ldc, const float* scales, void* output) const {
    worker.wait_for(turn, static_cast<int32_t>(segment));
    float* const sums =
        call.dtype == Dtype::kFp32 ? static_cast<float*>(output) : reinterpret_cast<float*>(space.sums.data());
    if (segment == 0)
      for (int64_t t = 0; t < call.tokens; ++t) std::fill_n(sums + t * width + first, count, 0.0f);
    const Segment& s = routing.segments[segment];
    for (int64_t r = 0; r < s.rows; ++r)
      elementwise.add_scaled(scales ? scales[routing.place[s.first + r]] : 1.0f, c + r * ldc,
                             sums + routing.token[s.first + r] * width + first, count);
    if (segment == segments - 1 && call.dtype == Dtype::kBf16)
      for (int64_t t = 0; t < call.tokens; ++t)
        elementwise.convert(sums + t * width + first, Dtype::kFp32, static_cast<uint16_t*>(output) + t * width + first,
                            Dtype::kBf16, count, 0);
    turn.store(static_cast<int32_t>(segment + 1), std::memory_order_release);
  }

  // Runs task(worker, t, t_next) for t in [0, tasks), each thread claiming one task ahead so that it can prefetch for
  // it.
  template <class Task>
  void sequence(Turn& turn, int64_t tasks, Task task) const {
    std::atomic<int64_t> next{0};
    auto job = [&](Worker& worker) {
      worker.scratch.grow(worker_bytes());
      const Begun begun(gemm);
      for (int64_t t = next.fetch_add(1), after; t < tasks; t = after) {
        after = next.fetch_add(1);
        worker.check();
        task(worker, t, after);
      }
    };
    turn.run(job);
  }

  // What a kernel needs a thread to do around its products, also when one throws.
  struct Begun {
    explicit Begun(const Gemm& gemm) : gemm(gemm) {
      if (gemm.begin) gemm.begin();
    }
    ~Begun() {
      if (gemm.end) gemm.end();
    }
    const Gemm& gemm;
  };

  const Call& call;
  const Store& store;
  const Gemm& gemm;
  const Elementwise& elementwise;
  Workspace& space;
  const Routing& routing;
  const Dtype type;
  const int64_t width, hidden, segments, gathers;
  Counter *const gathered, *const ready;
};

class Forward : Pass {
 public:
  Forward(const Call& call, const Store& store, const Kernels& kernels, Workspace& space)
      : Pass(call, store, kernels, space),
        hidden_strips((hidden + gemm.along_width - 1) / gemm.along_width),
        width_strips((width + gemm.along_width - 1) / gemm.along_width),
        turns(space.turn.reset(width_strips)) {
    space.rows.grow(operand_bytes(width));
    space.more_rows.grow(operand_bytes(hidden));
    if (call.dtype == Dtype::kBf16) space.sums.grow(static_cast<size_t>(call.tokens * width) * sizeof(float));
  }

  // kept: room for g and u, [2, routes, hidden], or null
  void operator()(Turn& turn, std::byte* kept, void* y) const {
    std::byte* const u = kept ? kept + static_cast<size_t>(routing.routes() * hidden) * size_of(type) : nullptr;
    const int64_t up_to_gather = gathers, up_to_gate_up = up_to_gather + segments * hidden_strips;
    sequence(turn, up_to_gate_up + segments * width_strips, [&](Worker& worker, int64_t t, int64_t after) {
      if (t < up_to_gather) return gather(worker, call.x, space.rows, t, true);
      const Strip next = first_strip(after - up_to_gather);
      if (t < up_to_gate_up) {
        const int64_t segment = (t - up_to_gather) / hidden_strips, block = (t - up_to_gather) % hidden_strips;
        gate_up(worker, segment, block, next, space.rows, kept, u, hidden, false, &space.more_rows);
        ready[segment].fetch_add(1, std::memory_order_release);
      } else {
        down(worker, (t - up_to_gate_up) / width_strips, (t - up_to_gate_up) % width_strips, next, y);
      }
    });
  }

 private:
  // The strip that product task t reads first, for prefetching.
  Strip first_strip(int64_t t) const {
    if (t < 0) return {};
    if (t < segments * hidden_strips)
      return strip(matrix(t / hidden_strips, kGate), hidden, t % hidden_strips, gemm.along_width);
    t -= segments * hidden_strips;
    if (t < segments * width_strips)
      return strip(matrix(t / width_strips, kDown), width, t % width_strips, gemm.along_width);
    return {};
  }

  void down(const Worker& worker, int64_t segment, int64_t block, const Strip& next, void* y) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(ready[segment], static_cast<int32_t>(hidden_strips));
    const Strip w = strip(matrix(segment, kDown), width, block, gemm.along_width);
    const int64_t length = row_length(hidden), ldc = round_up(w.count, kLine);
    float* const c = results(worker, 0);
    multiply_along(
        {row(space.more_rows, s.slot, length), length, s.rows, w, next, c, ldc, false, worker.scratch.data()});
    hand_off(worker, turns[block], segment, w.first, w.count, c, ldc, call.gate, y);
  }

  const int64_t hidden_strips, width_strips;
  Counter* const turns;
};

class Backward : Pass {
 public:
  Backward(const Call& call, const Store& store, const Kernels& kernels, Workspace& space)
      : Pass(call, store, kernels, space),
        along_strips((hidden + gemm.along_width - 1) / gemm.along_width),
        hidden_strips((hidden + gemm.across_width - 1) / gemm.across_width),
        width_strips((width + gemm.across_width - 1) / gemm.across_width),
        turns(space.turn.reset(width_strips)) {
    space.rows.grow(operand_bytes(width));
    space.partial.grow(static_cast<size_t>(routing.routes() * hidden_strips) * sizeof(float));
    if (call.dtype == Dtype::kBf16) space.sums.grow(static_cast<size_t>(call.tokens * width) * sizeof(float));
  }

  // kept: g and u [2, routes, hidden] as the forward call left them, or null to compute them again from x
  void operator()(Turn& turn, const std::byte* kept, const void* dy, void* dx, float* dgate) const {
    // g and u become dg and du, operands with padded rows.
    const int64_t length = row_length(hidden);
    space.activations.grow(2 * operand_bytes(hidden));
    std::byte *const g = space.activations.data(), *const u = g + operand_bytes(hidden);
    if (!kept) {
      space.more_rows.grow(operand_bytes(width));
      const int64_t tasks = segments * along_strips;
      sequence(turn, gathers + tasks, [&](Worker& worker, int64_t t, int64_t after) {
        if (t < gathers) return gather(worker, call.x, space.more_rows, t, true);
        const int64_t task = t - gathers, later = after - gathers;
        const Strip next =
            later < tasks ? strip(matrix(later / along_strips, kGate), hidden, later % along_strips, gemm.along_width)
                          : Strip{};
        gate_up(worker, task / along_strips, task % along_strips, next, space.more_rows, g, u, length, true, nullptr);
      });
      space.gathered.reset(segments);
    }
    std::fill_n(dgate, call.tokens * call.per_token, 0.0f);
    const int64_t up_to_gather = gathers, up_to_inner = up_to_gather + segments * hidden_strips;
    sequence(turn, up_to_inner + segments * width_strips, [&](Worker& worker, int64_t t, int64_t after) {
      if (t < up_to_gather) return gather(worker, dy, space.rows, t, false);
      const Strip next = first_strip(after - up_to_gather);
      if (t < up_to_inner) {
        const int64_t segment = (t - up_to_gather) / hidden_strips;
        inner(worker, segment, (t - up_to_gather) % hidden_strips, next, kept, g, u, length);
        ready[segment].fetch_add(1, std::memory_order_release);
      } else {
        outer(worker, (t - up_to_inner) / width_strips, (t - up_to_inner) % width_strips, next, g, u, length, dx,
              dgate);
      }
    });
  }

 private:
  Strip first_strip(int64_t t) const {
    if (t < 0) return {};
    if (t < segments * hidden_strips)
      return strip(matrix(t / hidden_strips, kDown), hidden, t % hidden_strips, gemm.across_width);
    t -= segments * hidden_strips;
    if (t < segments * width_strips)
      return strip(matrix(t / width_strips, kGate), width, t % width_strips, gemm.across_width);
    return {};
  }

  // dg and du of one strip, and its part of dgate = dot(W_down^T dy, silu(g) * u)
  void inner(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const std::byte* kept,
             std::byte* g, std::byte* u, int64_t length) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(gathered[segment], static_cast<int32_t>(s.rows));
    const Strip w = strip(matrix(segment, kDown), hidden, block, gemm.across_width);
    const int64_t ldc = round_up(w.count, kLine), size = static_cast<int64_t>(size_of(type));
    float *const c = results(worker, 0), *const partial = reinterpret_cast<float*>(space.partial.data());
    multiply_across({row(space.rows, s.slot, row_length(width)), row_length(width), s.rows, w, next, c, ldc, false,
                     worker.scratch.data()});
    const int64_t pad = w.first + w.count == hidden ? length - hidden : 0;
    for (int64_t r = 0; r < s.rows; ++r) {
      const int64_t route = s.first + r;
      std::byte *const gr = g + ((s.slot + r) * length + w.first) * size, *const ur =
                                                                              u +
                                                                              ((s.slot + r) * length + w.first) * size;
      if (kept) {
        const std::byte* const from = kept + (route * hidden + w.first) * size;
        elementwise.convert(from, type, gr, type, w.count, 0);
        elementwise.convert(from + routing.routes() * hidden * size, type, ur, type, w.count, 0);
      }
      partial[route * hidden_strips + block] =
          elementwise.swiglu_backward(c + r * ldc, call.gate[routing.place[route]], w.count, pad, gr, ur, type);
    }
  }

  // dx of one strip: dg W_gate + du W_up; the first strip of a segment also sums its dgate
  void outer(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const std::byte* g,
             const std::byte* u, int64_t length, void* dx, float* dgate) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(ready[segment], static_cast<int32_t>(hidden_strips));
    if (block == 0) {
      const float* partial = reinterpret_cast<const float*>(space.partial.data()) + s.first * hidden_strips;
      for (int64_t r = 0; r < s.rows; ++r) {
        float sum = 0;
        for (int64_t b = 0; b < hidden_strips; ++b) sum += *partial++;
        dgate[routing.place[s.first + r]] = sum;
      }
    }
    const Strip gate = strip(matrix(segment, kGate), width, block, gemm.across_width);
    const Strip up = strip(matrix(segment, kUp), width, block, gemm.across_width);
    const int64_t ldc = round_up(gate.count, kLine), at = s.slot * length * static_cast<int64_t>(size_of(type));
    float* const c = results(worker, 0);
    multiply_across({g + at, length, s.rows, gate, up, c, ldc, false, worker.scratch.data()});
    multiply_across({u + at, length, s.rows, up, next, c, ldc, true, worker.scratch.data()});
    hand_off(worker, turns[block], segment, gate.first, gate.count, c, ldc, nullptr, dx);
  }

  const int64_t along_strips, hidden_strips, width_strips;
  Counter* const turns;
};

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
  return {store.id,         static_cast<int>(call.layer),
          call.tokens,      call.per_token,
          routing.routes(), hash_idx(call.idx, call.tokens * call.per_token)};
}

size_t kept_bytes(const Store& store, const Routing& routing) {
  return 2 * static_cast<size_t>(routing.routes() * store.hidden) *
         size_of(kOperandType[static_cast<int>(store.format)]);
}

}  // namespace

int32_t experts_forward(const Call& call, bool keep, void* y) {
  const std::shared_ptr<const Store> store = open(call);
  const Kernels& kernels = *chosen().kernels;
  Turn turn;
  Workspace& space = workspace();
  const Clock clock(store->stats.forward_ns);
  space.routing.build(call.idx, call.tokens, call.per_token, store->experts);
  ++store->stats.forward;
  store->stats.tokens += space.routing.tokens;
  store->stats.routes += space.routing.routes();
  std::optional<Activations> kept;
  if (keep) kept = stash_room(kept_bytes(*store, space.routing));
  if (space.routing.segments.empty()) {
    std::fill_n(static_cast<std::byte*>(y), static_cast<size_t>(call.tokens * call.width) * size_of(call.dtype),
                std::byte{0});
  } else {
    Forward(call, *store, kernels, space)(turn, kept ? kept->memory.data() : nullptr, y);
  }
  if (!keep) return 0;
  const int32_t slip = stash_draw_slip();
  if (kept) stash_put(slip, key_of(call, *store, space.routing), std::move(*kept));
  return slip;
}

void experts_backward(const Call& call, int32_t slip, const void* dy, void* dx, float* dgate) {
  const std::shared_ptr<const Store> store = open(call);
  const Kernels& kernels = *chosen().kernels;
  Turn turn;
  Workspace& space = workspace();
  const Clock clock(store->stats.backward_ns);
  space.routing.build(call.idx, call.tokens, call.per_token, store->experts);
  ++store->stats.backward;
  std::optional<Activations> kept = stash_take(slip, key_of(call, *store, space.routing));
  if (!kept) ++store->stats.recomputed;
  if (space.routing.segments.empty()) {
    std::fill_n(static_cast<std::byte*>(dx), static_cast<size_t>(call.tokens * call.width) * size_of(call.dtype),
                std::byte{0});
    std::fill_n(dgate, call.tokens * call.per_token, 0.0f);
    return;
  }
  Backward(call, *store, kernels, space)(turn, kept ? kept->memory.data() : nullptr, dy, dx, dgate);
  if (kept) stash_recycle(std::move(*kept));
}

}  // namespace kjax
