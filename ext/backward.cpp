// dx and dgate of the experts, by groups: gather dy, dg and du strip by strip, then dg W_gate + du W_up added to tokens.
#include "pass.h"

namespace kjax {
namespace {

class Backward : Pass {
 public:
  Backward(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, const std::byte* kept)
      : Pass(call, store, kernels, space, &Gemm::across_width, kept ? 1 : 2, 2),
        kept(kept),
        along_strips(strips(hidden, gemm.along_width)),
        hidden_strips(strips(hidden, gemm.across_width)),
        dy_rows(rows(0, 0)),
        x_rows(rows(1, 0)),
        g(rows(kept ? 1 : 2, 0)),
        u(rows(kept ? 1 : 2, 1)),
        recomputed(space.recomputed.reset(segments)) {
    space.partial.grow(static_cast<size_t>(routing.slots * hidden_strips) * sizeof(float));
    const size_t low_bytes = static_cast<size_t>(routing.routes() * adapters.columns()) * sizeof(float);
    space.low_gradients.grow(low_bytes);
    if (!kept) space.low.grow(low_bytes);
  }

  void operator()(Turn& turn, const void* dy, void* dx, float* dgate, const AdapterGradients& gradients) const {
    float* const made = reinterpret_cast<float*>(space.low.data());  // T where nothing was kept
    const float* const t =
        kept ? reinterpret_cast<const float*>(kept + 2 * static_cast<size_t>(routing.routes() * hidden) * size_of(type))
             : made;
    const Low low{t, reinterpret_cast<float*>(space.low_gradients.data()), gradients};
    std::fill_n(dgate, call.tokens * call.per_token, 0.0f);
    const Step inner_step{Stage::kInner, hidden_strips}, outer_step{Stage::kOuter, output_strips};
    if (kept) schedule({inner_step}, outer_step);
    else schedule({{Stage::kGateUp, along_strips}, inner_step}, outer_step);
    if (gradients.fresh) space.schedule.add(Stage::kClear, 0, static_cast<int64_t>(routing.idle.size()), 1);
    run(turn, [&](Worker& worker, const Schedule::Task& task, const Strip& next) {
      const auto [stage, item, block] = task;
      switch (stage) {
        case Stage::kGather:
          return fill(worker, item, [&, piece = item] {
            if (!kept) gather_x(worker, x_rows, piece, made);
            gather_dy(worker, dy, piece, low);
          });
        case Stage::kGateUp:
          return gate_up(worker, item, block, next, x_rows, g, u, row_length(hidden), true, nullptr, made,
                         recomputed[item]);
        case Stage::kInner: return inner(worker, item, block, next, low);
        case Stage::kOuter: return outer(worker, item, block, next, dx, dgate, low);
        default: return clear(gradients, *call.adapters, store, routing.idle[item]);
      }
    });
  }

 private:
  // T and dT of the adapters, and where the gradients of their factors go.
  struct Low {
    const float* t;
    float* dt;
    const AdapterGradients& gradients;
  };

  bool begins_expert(int64_t segment) const {
    return segment == 0 || routing.segments[segment - 1].expert != routing.segments[segment].expert;
  }

  // Gathers a piece of dy with dT of down.
  void gather_dy(const Worker& worker, const void* dy, int64_t task, const Low& low) const {
    gather(worker, dy, dy_rows, task, false,
           [&](int expert, int64_t first, int64_t count, const std::byte* from, int64_t length) {
             if (adapters.any()) adapters.project_dy(room(worker), expert, first, count, from, length, type, low.dt);
           });
  }

  // dg and du of one strip, and its part of dgate = dot(W_down^T dy + adapter, silu(g) * u)
  void inner(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const Low& low) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(gathered[segment], static_cast<int32_t>(s.rows));
    if (!kept) worker.wait_for(recomputed[segment], static_cast<int32_t>(along_strips));
    const Strip w = strip(matrix(segment, kDown), hidden, block, gemm.across_width);
    const int64_t ldc = round_up(w.count, kLine), length = row_length(hidden);
    const int64_t size = static_cast<int64_t>(size_of(type));
    float* const c = results(worker, 0);
    multiply_across({row(dy_rows, s.slot, row_length(width)), row_length(width), s.rows, w, next, c, ldc, false,
                     worker.scratch});
    std::byte *const gs = g + (s.slot * length + w.first) * size, *const us = u + (s.slot * length + w.first) * size;
    if (kept) {
      const std::byte* const from = kept + (s.first * hidden + w.first) * size;
      for (int64_t r = 0; r < s.rows; ++r) {
        elementwise.convert(from + r * hidden * size, type, gs + r * length * size, type, w.count, 0);
        elementwise.convert(from + (routing.routes() + r) * hidden * size, type, us + r * length * size, type, w.count,
                            0);
      }
    }
    if (adapters.any()) adapted_inner(worker, segment, block, w, c, ldc, gs, us, length, low);
    else slopes(s, block, w, 0, s.rows, c, ldc, gs, us, length);
    ready[segment].fetch_add(1, std::memory_order_release);
  }

  // swiglu_backward of `count` rows from row `first` of a segment on
  void slopes(const Segment& s, int64_t block, const Strip& w, int64_t first, int64_t count, const float* c,
              int64_t ldc, std::byte* gs, std::byte* us, int64_t length) const {
    const int64_t pad = w.first + w.count == hidden ? length - hidden : 0, step = length * size_of(type);
    float* const partial = reinterpret_cast<float*>(space.partial.data());
    for (int64_t r = first; r < first + count; ++r)
      partial[(s.slot + r) * hidden_strips + block] =
          elementwise.swiglu_backward(c + r * ldc, call.gate[routing.place[s.first + r]], w.count, pad, gs + r * step,
                                      us + r * step, type);
  }

  // The same with adapters, a few rows at a time: their products are made while the rows are in the cache, and added
  // to what strips and segments before this one have made, in this order whatever the number of threads.
  void adapted_inner(const Worker& worker, int64_t segment, int64_t block, const Strip& w, float* c, int64_t ldc,
                     std::byte* gs, std::byte* us, int64_t length, const Low& low) const {
    const Segment& s = routing.segments[segment];
    const AdapterPass::Room at = room(worker);
    float* const parts[] = {at.part, at.part + kMaxRows * adapters.of(kGate).rank};
    float* const sums[] = {adapters.panel(at, 0), adapters.panel(at, 1), adapters.panel(at, 2)};  // dB, dB, dA
    float* const strips[] = {adapters.panel(at, 3), adapters.panel(at, 4)};
    const std::byte* const d[] = {gs, us};
    for (int p = 0; p < kProjections; ++p) adapters.clear(sums[p], p);
    for (int p : {kGate, kUp})
      if (adapters.has(p)) adapters.strip_of_b(s.expert, p, w.first, w.count, strips[p]);
    for (int64_t r = 0, n; r < s.rows; r += n) {
      n = std::min(AdapterPass::kChunk, s.rows - r);
      const int64_t route = s.first + r, skip = r * length * static_cast<int64_t>(size_of(type));
      if (adapters.has(kDown)) {
        adapters.add_a(at, s.expert, kDown, route, n, w.first, w.count, low.dt, c + r * ldc, ldc);
        adapters.widen(gs + skip, length, type, 0, n, w.count, at.x);
        adapters.widen(us + skip, length, type, 0, n, w.count, at.y);
        for (int64_t i = 0; i < n; ++i) {
          float* const h = at.x + i * AdapterPass::kDepth;
          elementwise.swiglu(h, at.y + i * AdapterPass::kDepth, w.count, 0, nullptr, nullptr, h, Dtype::kFp32);
        }
        adapters.drop(kDown, at.x, route, n, w.first, w.count);
        adapters.add_outer(kDown, adapters.weighed(at, kDown, low.dt, route, n), adapters.of(kDown).rank, n, at.x,
                           w.count, sums[kDown]);
      }
      slopes(s, block, w, r, n, c, ldc, gs, us, length);
      for (int p : {kGate, kUp})
        if (adapters.has(p)) {
          adapters.widen(d[p] + skip, length, type, 0, n, w.count, at.x);
          adapters.add_outer(p, adapters.rows(low.t, route, p), adapters.columns(), n, at.x, w.count, sums[p]);
          adapters.dots_b(p, at.x, n, w.count, strips[p], parts[p] + r * adapters.of(p).rank);
        }
    }
    worker.wait_for(ready[segment], static_cast<int32_t>(block));
    const bool begins = begins_expert(segment), fresh = begins && low.gradients.fresh;
    if (!begins)
      worker.wait_for(ready[segment - 1], static_cast<int32_t>(block + 1));
    for (int p : {kGate, kUp})
      if (adapters.has(p)) {
        adapters.add_part(parts[p], adapters.of(p).rank, s, p, block > 0, low.dt);
        adapters.add_to_b(low.gradients, s.expert, p, w.first, w.count, sums[p], fresh);
      }
    if (adapters.has(kDown))
      adapters.add_to_a(low.gradients, s.expert, kDown, w.first, w.count, sums[kDown], fresh);
  }

  // dx of one strip: dg W_gate + du W_up; the first strip of a segment also sums its dgate
  void outer(const Worker& worker, int64_t segment, int64_t block, const Strip& next, void* dx, float* dgate,
             const Low& low) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(ready[segment], static_cast<int32_t>(hidden_strips));
    if (block == 0) {
      const float* partial = reinterpret_cast<const float*>(space.partial.data()) + s.slot * hidden_strips;
      for (int64_t r = 0; r < s.rows; ++r) {
        float sum = 0;
        for (int64_t b = 0; b < hidden_strips; ++b) sum += *partial++;
        dgate[routing.place[s.first + r]] = sum;
      }
    }
    const Strip gate = strip(matrix(segment, kGate), width, block, gemm.across_width);
    const Strip up = strip(matrix(segment, kUp), width, block, gemm.across_width);
    const int64_t ldc = round_up(gate.count, kLine), length = row_length(hidden);
    float* const c = results(worker, 0);
    multiply_across({row(g, s.slot, length), length, s.rows, gate, up, c, ldc, false, worker.scratch});
    multiply_across({row(u, s.slot, length), length, s.rows, up, next, c, ldc, true, worker.scratch});
    if (adapters.any()) adapted_outer(worker, segment, block, gate, c, ldc, low);
    hand_off(worker, turns[block], segment, gate.first, gate.count, c, ldc, nullptr, dx);
  }

  // The adapters' share of dx, and dA of gate and up and dB of down in the strip's columns. Leaves with the strip's turn.
  void adapted_outer(const Worker& worker, int64_t segment, int64_t block, const Strip& w, float* c, int64_t ldc,
                     const Low& low) const {
    const Segment& s = routing.segments[segment];
    const AdapterPass::Room at = room(worker);
    const int64_t length = row_length(width);
    float* const sums[] = {adapters.panel(at, 0), adapters.panel(at, 1), adapters.panel(at, 2)};
    for (int p = 0; p < kProjections; ++p) adapters.clear(sums[p], p);
    for (int64_t r = 0, n; r < s.rows; r += n) {
      n = std::min(AdapterPass::kChunk, s.rows - r);
      const int64_t route = s.first + r;
      for (int p : {kGate, kUp}) {
        if (!adapters.has(p)) continue;
        adapters.add_a(at, s.expert, p, route, n, w.first, w.count, low.dt, c + r * ldc, ldc);
        if (p == kGate || adapters.drops() || !adapters.has(kGate))
          for (int64_t i = 0; i < n; ++i)
            adapters.widen(static_cast<const std::byte*>(call.x) +
                               static_cast<size_t>(routing.token[route + i] * width) * size_of(call.dtype),
                           0, call.dtype, w.first, 1, w.count, at.x + i * AdapterPass::kDepth);
        adapters.drop(p, at.x, route, n, w.first, w.count);
        adapters.add_outer(p, adapters.rows(low.dt, route, p), adapters.columns(), n, at.x, w.count, sums[p]);
      }
      if (adapters.has(kDown)) {
        adapters.widen(row(dy_rows, s.slot + r, length), length, type, w.first, n, w.count, at.x);
        adapters.add_outer(kDown, adapters.weighed(at, kDown, low.t, route, n), adapters.of(kDown).rank, n, at.x,
                           w.count, sums[kDown]);
      }
    }
    worker.wait_for(turns[block], static_cast<int32_t>(segment));
    const bool fresh = begins_expert(segment) && low.gradients.fresh;
    for (int p : {kGate, kUp})
      if (adapters.has(p)) adapters.add_to_a(low.gradients, s.expert, p, w.first, w.count, sums[p], fresh);
    if (adapters.has(kDown)) adapters.add_to_b(low.gradients, s.expert, kDown, w.first, w.count, sums[kDown], fresh);
  }

  const std::byte* const kept;  // g, u and T, or null
  const int64_t along_strips, hidden_strips;
  std::byte *const dy_rows, *const x_rows;  // rows by slot; x only where nothing was kept
  std::byte *const g, *const u;             // the same, then dg and du
  Counter* const recomputed;
};

}  // namespace

void backward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                   const std::byte* kept, const void* dy, void* dx, float* dgate, const AdapterGradients& gradients) {
  Backward(call, store, kernels, space, kept)(turn, dy, dx, dgate, gradients);
}

}  // namespace kjax
