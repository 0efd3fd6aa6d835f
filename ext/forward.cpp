// y of the experts: gather x, g and u and h = silu(g) * u strip by strip, then W_down h added to the tokens.
#include "pass.h"

namespace kjax {
namespace {

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

  void operator()(Turn& turn, std::byte* kept, void* y) const {
    std::byte* const u = kept ? kept + static_cast<size_t>(routing.routes() * hidden) * size_of(type) : nullptr;
    if (!kept) space.low.grow(static_cast<size_t>(routing.routes() * adapters.columns()) * sizeof(float));
    float* const low = reinterpret_cast<float*>(
        kept ? kept + 2 * static_cast<size_t>(routing.routes() * hidden) * size_of(type) : space.low.data());
    const int64_t up_to_gather = gathers, up_to_gate_up = up_to_gather + segments * hidden_strips;
    const auto segment_of = [&](int64_t t) {
      return t < up_to_gather    ? routing.pieces[t].segment
             : t < up_to_gate_up ? (t - up_to_gather) / hidden_strips
                                 : (t - up_to_gate_up) / width_strips;
    };
    sequence(turn, up_to_gate_up + segments * width_strips, segment_of, [&](Worker& worker, int64_t t, int64_t after) {
      if (t < up_to_gather) return gather_x(worker, space.rows, t, low);
      const Strip next = first_strip(after - up_to_gather);
      if (t < up_to_gate_up) {
        const int64_t segment = (t - up_to_gather) / hidden_strips, block = (t - up_to_gather) % hidden_strips;
        gate_up(worker, segment, block, next, space.rows, kept, u, hidden, false, &space.more_rows, low);
      } else {
        down(worker, (t - up_to_gate_up) / width_strips, (t - up_to_gate_up) % width_strips, next, low, y);
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

  void down(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const float* low,
            void* y) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(ready[segment], static_cast<int32_t>(hidden_strips));
    const Strip w = strip(matrix(segment, kDown), width, block, gemm.along_width);
    const int64_t length = row_length(hidden), ldc = round_up(w.count, kLine);
    float* const c = results(worker, 0);
    multiply_along(
        {row(space.more_rows, s.slot, length), length, s.rows, w, next, c, ldc, false, worker.scratch});
    if (adapters.any()) adapters.add_b(room(worker), s, kDown, w.first, w.count, low, c, ldc);
    hand_off(worker, turns[block], segment, w.first, w.count, c, ldc, call.gate, y);
  }

  const int64_t hidden_strips, width_strips;
  Counter* const turns;
};

}  // namespace

void forward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                  std::byte* kept, void* y) {
  Forward(call, store, kernels, space)(turn, kept, y);
}

}  // namespace kjax
