// What forward and backward share. A call is one sequence of tasks, claimed in order by all threads; a task may wait
// for earlier tasks only, so the sequence cannot deadlock. Products are tasks of (segment of an expert's rows, strip of
// columns): each computes privately, waits until its strip's turn reaches its segment, adds in fp32 and passes the turn
// on. Segments go in an order that depends on the routing alone, so results do not depend on the number of threads.
//
// Operand rows exist for kGroups groups of segments at a time, whatever the number of tokens. While the first products
// of a group are made, the next is gathered and the last ones of the group before follow, so that a thread finds done
// what it would have to wait for. The task that gathers waits until the group whose slots it takes has passed its turns
// on: those are earlier tasks, and all first products of a whole group were claimed since.
#pragma once
#include <algorithm>
#include <initializer_list>

#include "adapter_pass.h"
#include "dispatch.h"
#include "experts.h"
#include "numa.h"
#include "routing.h"
#include "store.h"
#include "threads.h"
#include "workspace.h"

namespace kjax {

// The store's shapes, the kernels, and the sequence of tasks.
class Pass {
 protected:
  // output_step: the strip width of the last products. of_width, of_hidden: how many arrays of rows of these lengths.
  Pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, int64_t Gemm::* output_step,
       int64_t of_width, int64_t of_hidden)
      : call(call),
        store(store),
        gemm(*kernels.gemm[static_cast<int>(store.format)]),
        pack(gemm.pack[static_cast<int>(store.format)]),
        elementwise(*kernels.elementwise),
        space(space),
        routing(space.routing),
        type(kOperandType[static_cast<int>(store.format)]),
        width(store.width),
        hidden(store.hidden),
        segments(static_cast<int64_t>(space.routing.segments.size())),
        output_strips(strips(width, gemm.*output_step)),
        adapters(call, store, kernels, space.routing),
        gathered(space.gathered.reset(segments)),
        ready(space.ready.reset(segments)),
        turns(space.turn.reset(output_strips)) {
    const size_t bytes =
        static_cast<size_t>(of_width * row_length(width) + of_hidden * row_length(hidden)) * size_of(type);
    space.routing.divide(static_cast<int64_t>(row_memory * static_cast<size_t>(thread_count()) / bytes));
    space.rows.grow(static_cast<size_t>(routing.slots) * bytes);
    if (call.dtype == Dtype::kBf16) space.sums.grow(static_cast<size_t>(call.tokens * width) * sizeof(float));
  }
  static int64_t strips(int64_t columns, int64_t step) { return (columns + step - 1) / step; }

  // Row `slot` of an array of rows of `length` numbers.
  std::byte* row(std::byte* rows, int64_t slot, int64_t length) const {
    return rows + static_cast<size_t>(slot * length) * size_of(type);
  }
  // The array behind so many others.
  std::byte* rows(int64_t of_width, int64_t of_hidden) const {
    return row(space.rows.data(), routing.slots, of_width * row_length(width) + of_hidden * row_length(hidden));
  }
  Matrix matrix(int64_t segment, int projection) const {
    return store.matrix(static_cast<int>(call.layer), routing.segments[segment].expert, projection);
  }
  static Strip strip(const Matrix& w, int64_t along_count, int64_t block, int64_t step) {
    return {w, block * step, std::min(step, along_count - block * step)};
  }

  // Copies the token rows of one piece together, rounded to the operand type, and packs them where `along` wants that.
  // then(expert, first route, rows, operand rows, their length) runs while they are in the cache.
  template <class Then>
  void gather(const Worker& worker, const void* from, std::byte* rows, int64_t task, bool for_along, Then then) const {
    const Piece& piece = routing.pieces[task];
    const Segment& s = routing.segments[piece.segment];
    const int64_t length = row_length(width);
    const bool packed = for_along && pack;
    std::byte* const to = packed ? staging(worker) : row(rows, s.slot + piece.row, length);
    for (int64_t r = 0; r < piece.rows; ++r)
      elementwise.convert(static_cast<const std::byte*>(from) +
                              static_cast<size_t>(routing.token[s.first + piece.row + r] * width) * size_of(call.dtype),
                          call.dtype, to + r * length * size_of(type), type, width, length - width);
    then(s.expert, s.first + piece.row, piece.rows, to, length);
    if (packed) pack(to, length, piece.rows, piece.row, s.rows, 0, width, row(rows, s.slot, length), length);
  }

  // The task of a piece: gathers it by copy() once nothing reads its slots any more.
  template <class Copy>
  void fill(const Worker& worker, int64_t task, Copy copy) const {
    const Piece& piece = routing.pieces[task];
    const Segment& s = routing.segments[piece.segment];
    if (piece.row == 0) store.read_ahead(static_cast<int>(call.layer), s.expert);
    for (int64_t block = 0; s.after && block < output_strips; ++block)
      worker.wait_for(turns[block], static_cast<int32_t>(s.after));
    copy();
    gathered[piece.segment].fetch_add(static_cast<int32_t>(piece.rows), std::memory_order_release);
  }

  // Scratch of a worker: first that of products and of adapters, which take turns; then what products result in, where
  // rows on their way into the packed layout lie while they are gathered.
  size_t before_results() const {
    return whole_lines(std::max(scratch_bytes(std::max(width, hidden)), adapters.scratch_bytes()));
  }
  size_t worker_bytes() const {
    const size_t results = sizeof(float) * kMaxRows * std::max(2 * gemm.along_width, gemm.across_width);
    const size_t gathered = size_of(type) * kRowTile * row_length(width);
    return whole_lines(before_results() + std::max(results, gathered));
  }
  static size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }
  // C of one product, [rows, ldc].
  float* results(const Worker& worker, int64_t which) const {
    return reinterpret_cast<float*>(worker.scratch + before_results()) + which * kMaxRows * gemm.along_width;
  }
  std::byte* staging(const Worker& worker) const { return worker.scratch + before_results(); }
  AdapterPass::Room room(const Worker& worker) const { return adapters.room(worker.scratch); }

  // Gathers a piece of x with T of gate and up.
  void gather_x(const Worker& worker, std::byte* x, int64_t task, float* t) const {
    gather(worker, call.x, x, task, true,
           [&](int expert, int64_t first, int64_t count, const std::byte* from, int64_t length) {
             if (adapters.any()) adapters.project_x(room(worker), expert, first, count, from, length, type, t);
           });
  }

  // g and u [., length] of one strip from the gathered rows of x, where there is a place for them by route or by slot,
  // and h = silu(g) * u where that is wanted. Adds the strip's part of T of down and counts itself in `done`.
  void gate_up(const Worker& worker, int64_t segment, int64_t block, const Strip& next, std::byte* x, std::byte* g,
               std::byte* u, int64_t length, bool by_slot, std::byte* h, float* t, Counter& done) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(gathered[segment], static_cast<int32_t>(s.rows));
    const Strip gate = strip(matrix(segment, kGate), hidden, block, gemm.along_width);
    const Strip up = strip(matrix(segment, kUp), hidden, block, gemm.along_width);
    const int64_t ldc = round_up(gate.count, kLine), x_length = row_length(width);
    float *const cg = results(worker, 0), *const cu = results(worker, 1);
    Product product{row(x, s.slot, x_length), x_length, s.rows, gate, up, cg, ldc, false, worker.scratch};
    multiply_along(product);
    product.strip = up;
    product.next = next;
    product.c = cu;
    multiply_along(product);

    if (adapters.any()) {
      adapters.add_b(room(worker), s, kGate, gate.first, gate.count, t, cg, ldc);
      adapters.add_b(room(worker), s, kUp, gate.first, gate.count, t, cu, ldc);
    }
    // Where h is packed, or only adapters want it, its rows take the place of g's.
    const bool packed = h && pack, staged = packed || (!h && adapters.has(kDown));
    const int64_t h_length = staged ? ldc * static_cast<int64_t>(sizeof(float) / size_of(type)) : row_length(hidden);
    std::byte* const h_rows = staged ? reinterpret_cast<std::byte*>(cg)
                              : h    ? row(h, s.slot, h_length) + gate.first * size_of(type)
                                     : nullptr;
    const int64_t pad = staged                              ? round_up(gate.count, kPad) - gate.count
                        : gate.first + gate.count == hidden ? h_length - hidden
                                                            : 0;
    for (int64_t r = 0; r < s.rows; ++r) {
      const size_t kept = static_cast<size_t>(((by_slot ? s.slot : s.first) + r) * length + gate.first) * size_of(type);
      elementwise.swiglu(cg + r * ldc, cu + r * ldc, gate.count, pad, g ? g + kept : nullptr, g ? u + kept : nullptr,
                         h_rows ? h_rows + r * h_length * size_of(type) : nullptr, type);
    }
    if (packed)
      pack(h_rows, h_length, s.rows, 0, s.rows, gate.first, gate.count, row(h, s.slot, row_length(hidden)),
           row_length(hidden));
    if (adapters.has(kDown))
      adapters.project_h(worker, room(worker), s, gate.first, gate.count, h_rows, h_length, type, done, block, t);
    done.fetch_add(1, std::memory_order_release);
  }
  void multiply_along(const Product& product) const { gemm.along[static_cast<int>(store.format)](product); }
  void multiply_across(const Product& product) const { gemm.across[static_cast<int>(store.format)](product); }

  // Adds C, scaled per route, to the fp32 sums of its tokens when the strip's turn comes. The first in turn clears the
  // strip, the last rounds it into a bf16 output.
  void hand_off(const Worker& worker, Counter& turn, int64_t segment, int64_t first, int64_t count, const float* c,
                int64_t ldc, const float* scales, void* output) const {
    constexpr int64_t kAhead = 3;  // rows, asked for early: weights have pushed sums out of the cache. 8 were slower
    worker.wait_for(turn, static_cast<int32_t>(segment));
    float* const sums =
        call.dtype == Dtype::kFp32 ? static_cast<float*>(output) : reinterpret_cast<float*>(space.sums.data());
    if (segment == 0)
      for (int64_t t = 0; t < call.tokens; ++t) std::fill_n(sums + t * width + first, count, 0.0f);
    const Segment& s = routing.segments[segment];
    for (int64_t r = 0; r < s.rows; ++r) {
      if (r + kAhead < s.rows) {
        const float* const later = sums + routing.token[s.first + r + kAhead] * width + first;
        for (int64_t i = 0; i < count; i += 16) __builtin_prefetch(later + i, 1);
      }
      elementwise.add_scaled(scales ? scales[routing.place[s.first + r]] : 1.0f, c + r * ldc,
                             sums + routing.token[s.first + r] * width + first, count);
    }
    if (segment == segments - 1 && call.dtype == Dtype::kBf16)
      for (int64_t t = 0; t < call.tokens; ++t)
        elementwise.convert(sums + t * width + first, Dtype::kFp32, static_cast<uint16_t*>(output) + t * width + first,
                            Dtype::kBf16, count, 0);
    turn.store(static_cast<int32_t>(segment + 1), std::memory_order_release);
  }

  struct Step {
    Stage stage;
    int64_t strips;
  };
  // first...: the stages of a group but its last.
  void schedule(std::initializer_list<Step> first, const Step& last) const {
    Schedule& tasks = space.schedule;
    tasks.clear();
    const int64_t groups = static_cast<int64_t>(routing.groups.size());
    const auto gather = [&](const Group& group) { tasks.add(Stage::kGather, group.first_piece, group.end_piece, 1); };
    const auto multiply = [&](const Group& group, const Step& step) {
      tasks.add(step.stage, group.first, group.end, step.strips);
    };
    gather(routing.groups[0]);
    for (int64_t i = 0; i <= groups; ++i) {
      for (const Step& step : first)
        if (i < groups) multiply(routing.groups[i], step);
      if (i + 1 < groups) gather(routing.groups[i + 1]);
      if (i > 0) multiply(routing.groups[i - 1], last);
    }
  }

  // What a task reads first, to be prefetched.
  Strip first_strip(const Schedule::Task& task) const {
    const auto [stage, item, block] = task;
    switch (stage) {
      case Stage::kGateUp:
        return strip(matrix(item, kGate), hidden, block, gemm.along_width);
      case Stage::kDown:
        return strip(matrix(item, kDown), width, block, gemm.along_width);
      case Stage::kInner:
        return strip(matrix(item, kDown), hidden, block, gemm.across_width);
      case Stage::kOuter:
        return strip(matrix(item, kGate), width, block, gemm.across_width);
      default:
        return {};
    }
  }
  static bool along(Stage stage) { return stage == Stage::kGateUp || stage == Stage::kDown; }

  // Whose expert a task reads, so that threads prefer those in the memory of their node.
  int64_t segment_of(const Schedule::Task& task) const {
    return task.stage == Stage::kGather  ? routing.pieces[task.item].segment
           : task.stage == Stage::kClear ? 0
                                         : task.item;
  }

  // Runs task(worker, what it is, next strip in its direction) for all tasks of the schedule, each thread claiming one
  // ahead so that it can prefetch for it.
  template <class Task>
  void run(Turn& turn, Task task) const {
    Tasks& tasks = space.tasks;
    const Schedule& schedule = space.schedule;
    const int64_t count = schedule.count();
    tasks.reset(count, store.split() ? static_cast<int>(nodes().size()) : 1,
                [&](int64_t t) { return home_of(store.node(routing.segments[segment_of(schedule.at(t))].expert)); });
    const size_t bytes = worker_bytes();
    space.scratch.grow(bytes * static_cast<size_t>(thread_count()));
    auto job = [&](Worker& worker) {
      worker.scratch = space.scratch.data() + bytes * static_cast<size_t>(worker.id);
      const Begun begun(gemm);
      Tasks::Claims claims(tasks, worker.node);
      for (int64_t t = claims.take(), after; t < count; t = after < count ? after : claims.take()) {
        after = claims.ahead();
        worker.check();
        const Schedule::Task now = schedule.at(t);
        Strip next;
        if (after < count)
          if (const Schedule::Task later = schedule.at(after); along(later.stage) == along(now.stage))
            next = first_strip(later);
        task(worker, now, next);
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
  const Pack pack;
  const Elementwise& elementwise;
  Workspace& space;
  const Routing& routing;
  const Dtype type;
  const int64_t width, hidden, segments, output_strips;
  const AdapterPass adapters;
  Counter *const gathered, *const ready, *const turns;
};

// One call over its gathered routes, of which there is at least one. Each has to hold the pool.
// kept: room for g and u, [2, routes, hidden] operands, and T [routes, ranks] fp32; or null.
void forward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                  std::byte* kept, void* y);
// kept: what the forward pass left there, or null to compute it again from x. gradients: of the call's adapters.
void backward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                   const std::byte* kept, const void* dy, void* dx, float* dgate, const AdapterGradients& gradients);

}  // namespace kjax
