// What forward and backward share. A call is one sequence of tasks, claimed in order by all threads; a task may wait
// for earlier tasks only, so the sequence cannot deadlock. Products are tasks of (segment of an expert's rows, strip of
// columns): each computes privately, waits until its strip's turn reaches its segment, adds in fp32 and passes the turn
// on. Segments go in an order that depends on the routing alone, so results do not depend on the number of threads.
#pragma once
#include <algorithm>

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
        adapters(call, store, kernels, space.routing),
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

  // Copies the token rows of one piece together, rounded to the operand type, and packs them where `along` wants that.
  // then(expert, first route, rows, operand rows, their length) runs while they are in the cache.
  template <class Then>
  void gather(const Worker& worker, const void* from, const Memory& rows, int64_t task, bool for_along,
              Then then) const {
    const Piece& piece = routing.pieces[task];
    const Segment& s = routing.segments[piece.segment];
    if (piece.row == 0) store.read_ahead(static_cast<int>(call.layer), s.expert);
    const int64_t length = row_length(width);
    const bool packed = for_along && gemm.pack;
    std::byte* const to = packed ? staging(worker) : row(rows, s.slot + piece.row, length);
    for (int64_t r = 0; r < piece.rows; ++r)
      elementwise.convert(static_cast<const std::byte*>(from) +
                              static_cast<size_t>(routing.token[s.first + piece.row + r] * width) * size_of(call.dtype),
                          call.dtype, to + r * length * size_of(type), type, width, length - width);
    then(s.expert, s.first + piece.row, piece.rows, to, length);
    if (packed) gemm.pack(to, length, piece.rows, piece.row, s.rows, 0, width, row(rows, s.slot, length), length);
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
  void gather_x(const Worker& worker, const Memory& rows, int64_t task, float* t) const {
    gather(worker, call.x, rows, task, true,
           [&](int expert, int64_t first, int64_t count, const std::byte* from, int64_t length) {
             if (adapters.any()) adapters.project_x(room(worker), expert, first, count, from, length, type, t);
           });
  }

  // g and u [., length] of one strip from the gathered rows of x, where there is a place for them by route or by slot,
  // and h = silu(g) * u where that is wanted. Adds the strip's part of T of down and passes `ready` on.
  void gate_up(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const Memory& x, std::byte* g,
               std::byte* u, int64_t length, bool by_slot, const Memory* h, float* t) const {
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
    const bool packed = h && gemm.pack, staged = packed || (!h && adapters.has(kDown));
    const int64_t h_length = staged ? ldc * static_cast<int64_t>(sizeof(float) / size_of(type)) : row_length(hidden);
    std::byte* const h_rows = staged ? reinterpret_cast<std::byte*>(cg)
                              : h    ? row(*h, s.slot, h_length) + gate.first * size_of(type)
                                     : nullptr;
    const int64_t pad = staged                               ? round_up(gate.count, kPad) - gate.count
                        : gate.first + gate.count == hidden ? h_length - hidden
                                                             : 0;
    for (int64_t r = 0; r < s.rows; ++r) {
      const size_t kept = static_cast<size_t>(((by_slot ? s.slot : s.first) + r) * length + gate.first) * size_of(type);
      elementwise.swiglu(cg + r * ldc, cu + r * ldc, gate.count, pad, g ? g + kept : nullptr, g ? u + kept : nullptr,
                         h_rows ? h_rows + r * h_length * size_of(type) : nullptr, type);
    }
    if (packed)
      gemm.pack(h_rows, h_length, s.rows, 0, s.rows, gate.first, gate.count, row(*h, s.slot, row_length(hidden)),
                row_length(hidden));
    if (adapters.has(kDown))
      adapters.project_h(worker, room(worker), s, gate.first, gate.count, h_rows, h_length, type, ready[segment], block,
                         t);
    ready[segment].fetch_add(1, std::memory_order_release);
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

  // Runs task(worker, t, t_next) for t in [0, count), each thread claiming one task ahead so that it can prefetch for
  // it. segment_of(t) tells whose expert a task reads, so that threads prefer those in the memory of their node.
  template <class SegmentOf, class Task>
  void sequence(Turn& turn, int64_t count, SegmentOf segment_of, Task task) const {
    Tasks& tasks = space.tasks;
    tasks.reset(count, store.split() ? static_cast<int>(nodes().size()) : 1, [&](int64_t t) {
      return home_of(store.node(routing.segments[segment_of(t)].expert));
    });
    const size_t bytes = worker_bytes();
    space.scratch.grow(bytes * static_cast<size_t>(thread_count()));
    auto job = [&](Worker& worker) {
      worker.scratch = space.scratch.data() + bytes * static_cast<size_t>(worker.id);
      const Begun begun(gemm);
      Tasks::Claims claims(tasks, worker.node);
      for (int64_t t = claims.take(), after; t < count; t = after < count ? after : claims.take()) {
        after = claims.ahead();
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
  const AdapterPass adapters;
  Counter *const gathered, *const ready;
};

// One call over its gathered routes, of which there is at least one. Each has to hold the pool.
// kept: room for g and u, [2, routes, hidden] operands, and T [routes, ranks] fp32; or null.
void forward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                  std::byte* kept, void* y);
// kept: what the forward pass left there, or null to compute it again from x. gradients: of the call's adapters.
void backward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                   const std::byte* kept, const void* dy, void* dx, float* dgate, const AdapterGradients& gradients);

}  // namespace kjax
