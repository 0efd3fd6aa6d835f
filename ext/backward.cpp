// dx and dgate of the experts: gather dy, dg and du strip by strip, then dg W_gate + du W_up added to the tokens.
#include "pass.h"

namespace kjax {
namespace {

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

  void operator()(Turn& turn, const std::byte* kept, const void* dy, void* dx, float* dgate,
                  const AdapterGradients& gradients) const {
    // g and u become dg and du, operands with padded rows.
    const int64_t length = row_length(hidden);
    const size_t low_bytes = static_cast<size_t>(routing.routes() * adapters.columns()) * sizeof(float);
    space.activations.grow(2 * operand_bytes(hidden));
    space.low_gradients.grow(low_bytes);
    std::byte *const g = space.activations.data(), *const u = g + operand_bytes(hidden);
    const float* t = reinterpret_cast<const float*>(
        kept ? kept + 2 * static_cast<size_t>(routing.routes() * hidden) * size_of(type) : nullptr);
    float* const dt = reinterpret_cast<float*>(space.low_gradients.data());
    if (!kept) {
      space.more_rows.grow(operand_bytes(width));
      space.low.grow(low_bytes);
      float* const low = reinterpret_cast<float*>(space.low.data());
      const int64_t tasks = segments * along_strips;
      const auto segment_of = [&](int64_t task) {
        return task < gathers ? routing.pieces[task].segment : (task - gathers) / along_strips;
      };
      sequence(turn, gathers + tasks, segment_of, [&](Worker& worker, int64_t task, int64_t after) {
        if (task < gathers) return gather_x(worker, space.more_rows, task, low);
        task -= gathers;
        const int64_t later = after - gathers;
        const Strip next =
            later < tasks ? strip(matrix(later / along_strips, kGate), hidden, later % along_strips, gemm.along_width)
                          : Strip{};
        gate_up(worker, task / along_strips, task % along_strips, next, space.more_rows, g, u, length, true, nullptr,
                low);
      });
      space.gathered.reset(segments);
      space.ready.reset(segments);
      t = low;
    }
    std::fill_n(dgate, call.tokens * call.per_token, 0.0f);
    const Low low{t, dt, gradients};
    const int64_t up_to_gather = gathers, up_to_inner = up_to_gather + segments * hidden_strips;
    const int64_t up_to_outer = up_to_inner + segments * width_strips;
    const int64_t idle = gradients.fresh ? static_cast<int64_t>(routing.idle.size()) : 0;
    const auto segment_of = [&](int64_t task) {
      return task < up_to_gather  ? routing.pieces[task].segment
             : task < up_to_inner ? (task - up_to_gather) / hidden_strips
             : task < up_to_outer ? (task - up_to_inner) / width_strips
                                  : 0;
    };
    sequence(turn, up_to_outer + idle, segment_of, [&](Worker& worker, int64_t task, int64_t after) {
      if (task >= up_to_outer) return clear(gradients, *call.adapters, store, routing.idle[task - up_to_outer]);
      if (task < up_to_gather)
        return gather(worker, dy, space.rows, task, false,
                      [&](int expert, int64_t first, int64_t count, const std::byte* rows, int64_t row_length) {
                        if (adapters.any())
                          adapters.project_dy(room(worker), expert, first, count, rows, row_length, type, dt);
                      });
      const Strip next = first_strip(after - up_to_gather);
      if (task < up_to_inner) {
        const int64_t segment = (task - up_to_gather) / hidden_strips;
        inner(worker, segment, (task - up_to_gather) % hidden_strips, next, kept, g, u, length, low);
        ready[segment].fetch_add(1, std::memory_order_release);
      } else {
        outer(worker, (task - up_to_inner) / width_strips, (task - up_to_inner) % width_strips, next, g, u, length, dx,
              dgate, low);
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

  Strip first_strip(int64_t t) const {
    if (t < 0) return {};
    if (t < segments * hidden_strips)
      return strip(matrix(t / hidden_strips, kDown), hidden, t % hidden_strips, gemm.across_width);
    t -= segments * hidden_strips;
    if (t < segments * width_strips)
      return strip(matrix(t / width_strips, kGate), width, t % width_strips, gemm.across_width);
    return {};
  }

  // dg and du of one strip, and its part of dgate = dot(W_down^T dy + adapter, silu(g) * u)
  void inner(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const std::byte* kept,
             std::byte* g, std::byte* u, int64_t length, const Low& low) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(gathered[segment], static_cast<int32_t>(s.rows));
    const Strip w = strip(matrix(segment, kDown), hidden, block, gemm.across_width);
    const int64_t ldc = round_up(w.count, kLine), size = static_cast<int64_t>(size_of(type));
    float* const c = results(worker, 0);
    multiply_across({row(space.rows, s.slot, row_length(width)), row_length(width), s.rows, w, next, c, ldc, false,
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
    if (adapters.any()) return adapted_inner(worker, segment, block, w, c, ldc, gs, us, length, low);
    slopes(s, block, w, 0, s.rows, c, ldc, gs, us, length);
  }

  // swiglu_backward of `count` rows from row `first` of a segment on
  void slopes(const Segment& s, int64_t block, const Strip& w, int64_t first, int64_t count, const float* c,
              int64_t ldc, std::byte* gs, std::byte* us, int64_t length) const {
    const int64_t pad = w.first + w.count == hidden ? length - hidden : 0, step = length * size_of(type);
    float* const partial = reinterpret_cast<float*>(space.partial.data());
    for (int64_t r = first; r < first + count; ++r)
      partial[(s.first + r) * hidden_strips + block] =
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
  void outer(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const std::byte* g,
             const std::byte* u, int64_t length, void* dx, float* dgate, const Low& low) const {
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
    multiply_across({g + at, length, s.rows, gate, up, c, ldc, false, worker.scratch});
    multiply_across({u + at, length, s.rows, up, next, c, ldc, true, worker.scratch});
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
        adapters.widen(row(space.rows, s.slot + r, length), length, type, w.first, n, w.count, at.x);
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

  const int64_t along_strips, hidden_strips, width_strips;
  Counter* const turns;
};

}  // namespace

void backward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                   const std::byte* kept, const void* dy, void* dx, float* dgate, const AdapterGradients& gradients) {
  Backward(call, store, kernels, space)(turn, kept, dy, dx, dgate, gradients);
}

}  // namespace kjax
