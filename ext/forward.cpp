// y of the experts, by groups: gather x, g and u and h = silu(g) * u strip by strip, then W_down h added to the tokens.
#include "pass.h"

namespace kjax {
namespace {

class Forward : Pass {
 public:
  Forward(const Call& call, const Store& store, const Kernels& kernels, Workspace& space)
      : Pass(call, store, kernels, space, &Gemm::along_width, 1, 1),
        hidden_strips(strips(hidden, gemm.along_width)),
        x(rows(0, 0)),
        h(rows(1, 0)) {}

  void operator()(Turn& turn, std::byte* kept, void* y) const {
    std::byte* const u = kept ? kept + static_cast<size_t>(routing.routes() * hidden) * size_of(type) : nullptr;
    if (!kept) space.low.grow(static_cast<size_t>(routing.routes() * adapters.columns()) * sizeof(float));
    float* const low = reinterpret_cast<float*>(
        kept ? kept + 2 * static_cast<size_t>(routing.routes() * hidden) * size_of(type) : space.low.data());
    schedule({{Stage::kGateUp, hidden_strips}}, {Stage::kDown, output_strips});
    run(turn, [&](Worker& worker, const Schedule::Task& task, const Strip& next) {
      const auto [stage, item, block] = task;
      if (stage == Stage::kGather)
        fill(worker, item, [&, piece = item] { gather_x(worker, x, piece, low); });
      else if (stage == Stage::kGateUp)
        gate_up(worker, item, block, next, x, kept, u, hidden, false, h, low, ready[item]);
      else
        down(worker, item, block, next, low, y);
    });
  }

 private:
  void down(const Worker& worker, int64_t segment, int64_t block, const Strip& next, const float* low,
            void* y) const {
    const Segment& s = routing.segments[segment];
    worker.wait_for(ready[segment], static_cast<int32_t>(hidden_strips));
    const Strip w = strip(matrix(segment, kDown), width, block, gemm.along_width);
    const int64_t length = row_length(hidden), ldc = round_up(w.count, kLine);
    float* const c = results(worker, 0);
    multiply_along(
        {row(h, s.slot, length), length, s.rows, w, next, c, ldc, false, worker.scratch});
    if (adapters.any()) adapters.add_b(room(worker), s, kDown, w.first, w.count, low, c, ldc);
    hand_off(worker, turns[block], segment, w.first, w.count, c, ldc, call.gate, y);
  }

  const int64_t hidden_strips;
  std::byte *const x, *const h;  // rows by slot
};

}  // namespace

void forward_pass(const Call& call, const Store& store, const Kernels& kernels, Workspace& space, Turn& turn,
                  std::byte* kept, void* y) {
  Forward(call, store, kernels, space)(turn, kept, y);
}

}  // namespace kjax
