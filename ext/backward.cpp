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

  void operator()(Turn& turn, const std::byte* kept, const void* dy, void* dx, float* dgate) const {
    // g and u become dg and du, operands with padded rows.
    const int64_t length = row_length(hidden);
    space.activations.grow(2 * operand_bytes(hidden));
    std::byte *const g = space.activations.data(), *const u = g + operand_bytes(hidden);
    if (!kept) {
      space.more_rows.grow(operand_bytes(width));
      const int64_t tasks = segments * along_strips;
      const auto segment_of = [&](int64_t t) {
        return t < gathers ? routing.pieces[t].segment : (t - gathers) / along_strips;
      };
      sequence(turn, gathers + tasks, segment_of, [&](Worker& worker, int64_t t, int64_t after) {
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
    const auto segment_of = [&](int64_t t) {
      return t < up_to_gather  ? routing.pieces[t].segment
             : t < up_to_inner ? (t - up_to_gather) / hidden_strips
                               : (t - up_to_inner) / width_strips;
    };
    sequence(turn, up_to_inner + segments * width_strips, segment_of, [&](Worker& worker, int64_t t, int64_t after) {
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

}  // namespace

void backward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                   const std::byte* kept, const void* dy, void* dx, float* dgate) {
  Backward(call, store, kernels, space)(turn, kept, dy, dx, dgate);
}

}  // namespace kjax
