// The adapters' side of a pass. With scale and 1 / (1 - dropout) in `scale`, every projection adds T B^T to its output,
// T = scale * kept(x) A^T. Backward: dT = scale * dout B, dB = dout^T T, dA = dT^T kept(x), dx += kept(dT A). T and dT
// have a row per route and a column per rank of each projection.
#pragma once
#include <algorithm>
#include <cmath>

#include "adapters.h"
#include "dispatch.h"
#include "experts.h"
#include "routing.h"
#include "threads.h"
#include "workspace.h"

namespace kjax {

class AdapterPass {
 public:
  static constexpr int64_t kChunk = kRowTile;  // rows as fp32 at a time: with kDepth columns 64 KB, in L2
  static constexpr int64_t kDepth = 512;       // at least the widest strip

  AdapterPass(const Call& call, const Store& store, const Kernels& kernels, const Routing& routing)
      : adapters_(call.adapters ? *call.adapters : Adapters{}),
        seed_{adapters_.seed[0], adapters_.seed[1]},
        drops_(adapters_.dropout > 0),
        threshold_(static_cast<uint32_t>(std::min(std::nearbyint(adapters_.dropout * 4294967296.0), 4294967295.0))),
        columns_(adapters_.rank()),
        kernels_(*kernels.low_rank),
        elementwise_(*kernels.elementwise),
        routing_(routing),
        width_(store.width),
        hidden_(store.hidden),
        gate_(call.gate) {
    int64_t column = 0;
    for (int p = 0; p < kProjections; ++p) {
      at_[p] = column;
      column += of(p).rank;
      widest_ = std::max(widest_, of(p).rank);
      scale_[p] = of(p).scale / static_cast<float>(1 - adapters_.dropout);
    }
  }

  int64_t columns() const { return columns_; }  // of T and dT
  bool any() const { return columns_ > 0; }
  bool has(int projection) const { return of(projection).rank > 0; }
  size_t scratch_bytes() const {
    return any() ? sizeof(float) * (2 * kChunk * kDepth + kPanels * widest_ * kDepth + (kMaxRows + kChunk) * columns_)
                 : 0;
  }

  // Scratch of one worker.
  struct Room {
    float *x, *y;    // [kChunk, kDepth], numbers of operand rows as fp32
    float* panel;    // [kPanels, widest rank, kDepth]
    float* part;     // [kMaxRows, columns]
    float* weighed;  // [kChunk, columns], rows of T or dT times their route's gate
  };
  Room room(std::byte* scratch) const {
    Room r;
    r.x = reinterpret_cast<float*>(scratch);
    r.y = r.x + kChunk * kDepth;
    r.panel = r.y + kChunk * kDepth;
    r.part = r.panel + kPanels * widest_ * kDepth;
    r.weighed = r.part + kMaxRows * columns_;
    return r;
  }
  float* panel(const Room& room, int which) const { return room.panel + which * widest_ * kDepth; }

  // T of gate and up for operand rows of the routes [first, first + count), count <= kChunk.
  void project_x(const Room& room, int expert, int64_t first, int64_t count, const std::byte* rows, int64_t length,
                 Dtype type, float* t) const {
    for (int64_t k = 0; (has(kGate) || has(kUp)) && k < width_; k += kDepth) {
      const int64_t depth = std::min(kDepth, width_ - k);
      widen(rows, length, type, k, count, depth, room.x);
      for (int p : {kGate, kUp})
        if (has(p)) {
          const float* x = room.x;
          if (drops_) {
            std::copy_n(room.x, count * kDepth, room.y);
            drop(p, room.y, first, count, k, depth);
            x = room.y;
          }
          kernels_.dots(x, kDepth, count, a(expert, p) + k, width_, of(p).rank, depth, scale_[p],
                        t + first * columns_ + at_[p], columns_, k > 0);
        }
    }
  }

  // dT of down, before the route's gate, for operand rows of dy.
  void project_dy(const Room& room, int expert, int64_t first, int64_t count, const std::byte* rows, int64_t length,
                  Dtype type, float* dt) const {
    for (int64_t k = 0; has(kDown) && k < width_; k += kDepth) {
      const int64_t depth = std::min(kDepth, width_ - k), rank = of(kDown).rank;
      widen(rows, length, type, k, count, depth, room.x);
      kernels_.transpose(b(expert, kDown) + k * rank, rank, depth, rank, room.panel, kDepth, false);
      kernels_.dots(room.x, kDepth, count, room.panel, kDepth, rank, depth, scale_[kDown],
                    dt + first * columns_ + at_[kDown], columns_, k > 0);
    }
  }

  // One strip's part of T of down, from rows of h; the strips of a segment add theirs in order.
  void project_h(const Worker& worker, const Room& room, const Segment& s, int64_t first, int64_t count,
                 const std::byte* rows, int64_t length, Dtype type, const Counter& turn, int64_t block,
                 float* t) const {
    const int64_t rank = of(kDown).rank;
    for (int64_t r = 0; r < s.rows; r += kChunk) {
      const int64_t n = std::min(kChunk, s.rows - r);
      widen(rows + static_cast<size_t>(r * length) * size_of(type), length, type, 0, n, count, room.x);
      if (drops_) drop(kDown, room.x, s.first + r, n, first, count);
      kernels_.dots(room.x, kDepth, n, a(s.expert, kDown) + first, hidden_, rank, count, scale_[kDown],
                    room.part + r * rank, rank, false);
    }
    worker.wait_for(turn, static_cast<int32_t>(block));
    add_part(room.part, rank, s, kDown, block > 0, t);
  }

  // C [s.rows, ldc] += T B^T in columns [first, first + count) of the projection's output.
  void add_b(const Room& room, const Segment& s, int p, int64_t first, int64_t count, const float* t, float* c,
             int64_t ldc) const {
    const int64_t rank = of(p).rank;
    if (!rank) return;
    strip_of_b(s.expert, p, first, count, room.panel);
    kernels_.expand(t + s.first * columns_ + at_[p], columns_, s.rows, rank, room.panel, kDepth, count, c, ldc);
  }

  // Columns [first, first + count) of the projection's B^T, [rank, kDepth].
  void strip_of_b(int expert, int p, int64_t first, int64_t count, float* to) const {
    const int64_t rank = of(p).rank;
    kernels_.transpose(b(expert, p) + first * rank, rank, count, rank, to, kDepth, false);
  }

  // C [count, ldc] += kept(dT A) in columns [first, first + n) of the projection's input, for `count` <= kChunk routes.
  void add_a(const Room& room, int expert, int p, int64_t route, int64_t count, int64_t first, int64_t n,
             const float* dt, float* c, int64_t ldc) const {
    if (!has(p)) return;
    const float* const rows = dt + route * columns_ + at_[p];
    const float* const w = a(expert, p) + first;
    if (!drops_) {
      kernels_.expand(rows, columns_, count, of(p).rank, w, in(p), n, c, ldc);
      return;
    }
    for (int64_t r = 0; r < count; ++r) std::fill_n(room.y + r * kDepth, n, 0.0f);
    kernels_.expand(rows, columns_, count, of(p).rank, w, in(p), n, room.y, kDepth);
    drop(p, room.y, route, count, first, n);
    for (int64_t r = 0; r < count; ++r) elementwise_.add_scaled(1.0f, room.y + r * kDepth, c + r * ldc, n);
  }

  // sum [rank, kDepth] += T^T x over `count` routes, T or dT from `column`-th column of the projection on, x [., kDepth].
  void add_outer(int p, const float* t, int64_t ldt, int64_t count, const float* x, int64_t n, float* sum) const {
    kernels_.outer(t, ldt, count, of(p).rank, x, kDepth, n, sum, kDepth);
  }
  // part [rows, rank] of dT from output gradients x [., kDepth] and a strip of B.
  void dots_b(int p, const float* x, int64_t count, int64_t n, const float* strip, float* part) const {
    kernels_.dots(x, kDepth, count, strip, kDepth, of(p).rank, n, scale_[p], part, of(p).rank, false);
  }
  // Adds a segment's part to its rows of T or dT, or begins them.
  void add_part(const float* part, int64_t rank, const Segment& s, int p, bool add, float* t) const {
    for (int64_t r = 0; r < s.rows; ++r) {
      float* const to = t + (s.first + r) * columns_ + at_[p];
      for (int64_t i = 0; i < rank; ++i) to[i] = (add ? to[i] : 0.0f) + part[r * rank + i];
    }
  }
  // Rows of T or dT of a projection times the gates of their routes.
  const float* weighed(const Room& room, int p, const float* t, int64_t route, int64_t count) const {
    const int64_t rank = of(p).rank;
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < rank; ++i)
        room.weighed[r * rank + i] =
            gate_[routing_.place[route + r]] * t[(route + r) * columns_ + at_[p] + i];
    return room.weighed;
  }
  void drop(int p, float* x, int64_t route, int64_t count, int64_t first, int64_t n) const {
    if (!drops_) return;
    for (int64_t r = 0; r < count; ++r)
      kernels_.drop(x + r * kDepth, first, n, seed_, static_cast<uint32_t>(p),
                    static_cast<uint32_t>(routing_.place[route + r]), threshold_);
  }
  void widen(const std::byte* rows, int64_t length, Dtype type, int64_t first, int64_t count, int64_t n,
             float* to) const {
    for (int64_t r = 0; r < count; ++r)
      elementwise_.convert(rows + static_cast<size_t>(r * length + first) * size_of(type), type, to + r * kDepth,
                           Dtype::kFp32, n, 0);
  }

  // Adds sums [rank, kDepth] of columns [first, first + n) to the gradients, or, `fresh`, begins them.
  void add_to_a(const AdapterGradients& gradients, int expert, int p, int64_t first, int64_t n, const float* sum,
                bool fresh) const {
    float* const to = gradients.a[p] + expert * of(p).rank * in(p) + first;
    for (int64_t r = 0; r < of(p).rank; ++r) {
      if (fresh) std::copy_n(sum + r * kDepth, n, to + r * in(p));
      else elementwise_.add_scaled(1.0f, sum + r * kDepth, to + r * in(p), n);
    }
  }
  void add_to_b(const AdapterGradients& gradients, int expert, int p, int64_t first, int64_t n, const float* sum,
                bool fresh) const {
    const int64_t rank = of(p).rank;
    kernels_.transpose(sum, kDepth, rank, n, gradients.b[p] + (expert * out(p) + first) * rank, rank, !fresh);
  }
  void clear(float* sum, int p) const { std::fill_n(sum, of(p).rank * kDepth, 0.0f); }

  const float* rows(const float* t, int64_t route, int p) const { return t + route * columns_ + at_[p]; }
  const Factors& of(int p) const { return adapters_.of[p]; }
  bool drops() const { return drops_; }

 private:
  static constexpr int kPanels = 5;

  int64_t in(int p) const { return p == kDown ? hidden_ : width_; }
  int64_t out(int p) const { return p == kDown ? width_ : hidden_; }
  const float* a(int expert, int p) const { return of(p).a + expert * of(p).rank * in(p); }
  const float* b(int expert, int p) const { return of(p).b + expert * of(p).rank * out(p); }

  const Adapters adapters_;
  const uint32_t seed_[2];
  const bool drops_;
  const uint32_t threshold_;
  const int64_t columns_;
  const LowRank& kernels_;
  const Elementwise& elementwise_;
  const Routing& routing_;
  const int64_t width_, hidden_;
  const float* const gate_;
  int64_t at_[kProjections] = {}, widest_ = 0;
  float scale_[kProjections] = {};
};

}  // namespace kjax
