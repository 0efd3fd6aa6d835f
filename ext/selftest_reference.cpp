// SwiGLU experts with adapters in float64, forward and backward, a token and a route at a time: the self-test's oracle.
#include <algorithm>
#include <cmath>

#include "selftest.h"

namespace kjax {
namespace {

#include "decode_scalar.h"

double narrow(double x, Dtype type) {
  const float f = static_cast<float>(x);
  return type == Dtype::kBf16 ? bf16_to_float(float_to_bf16(f)) : f;
}

// out [rows] += scale * B (A in), and with t = A in, ready for dB; or in [cols] += scale * A^T (B^T out).
void add_low_rank(const Problem& p, int projection, int expert, const double* in, double* out, int64_t rows,
                  int64_t cols, bool transposed, std::vector<double>* low) {
  const Factors& f = p.adapters.of[projection];
  const float *const a = f.a + expert * f.rank * cols, *const b = f.b + expert * f.rank * rows;
  low->assign(f.rank, 0);
  for (int64_t r = 0; r < f.rank; ++r) {
    for (int64_t i = 0; i < (transposed ? rows : cols); ++i)
      (*low)[r] += f.scale * in[i] * (transposed ? b[i * f.rank + r] : a[r * cols + i]);
    for (int64_t i = 0; i < (transposed ? cols : rows); ++i)
      out[i] += (*low)[r] * (transposed ? a[r * cols + i] : b[i * f.rank + r]);
  }
}

}  // namespace

Result reference(const Case& c, const Problem& p, const Weights& weights, Dtype type, bool rounded) {
  const auto round = [&](double x) { return rounded ? narrow(x, type) : x; };
  const int D = c.width, F = c.hidden;
  Result out;
  out.y.resize(p.x.size());
  out.dx.resize(p.x.size());
  out.dgate.resize(p.gate.size());
  for (int j = 0; j < kProjections; ++j) {
    out.da[j].resize(p.a[j].size());
    out.db[j].resize(p.b[j].size());
  }
  std::vector<double> x(D), dy(D), g(F), u(F), h(F), a(F), low[kProjections], low_gradient, o(D), dg(F), du(F), dx(D);
  for (int t = 0; t < c.tokens; ++t) {
    for (int d = 0; d < D; ++d) {
      x[d] = round(p.x[t * D + d]);
      dy[d] = round(p.dy[t * D + d]);
    }
    for (int k = 0; k < c.per_token; ++k) {
      const int route = t * c.per_token + k, e = p.idx[route];
      if (e < 0) continue;
      const double* W[kProjections];
      for (int j = 0; j < kProjections; ++j) W[j] = weights[j].data() + static_cast<size_t>(e) * D * F;
      for (int f = 0; f < F; ++f) {
        g[f] = u[f] = a[f] = 0;
        for (int d = 0; d < D; ++d) {
          g[f] += W[kGate][f * D + d] * x[d];
          u[f] += W[kUp][f * D + d] * x[d];
          a[f] += W[kDown][d * F + f] * dy[d];
        }
      }
      add_low_rank(p, kGate, e, x.data(), g.data(), F, D, false, &low[kGate]);
      add_low_rank(p, kUp, e, x.data(), u.data(), F, D, false, &low[kUp]);
      for (int f = 0; f < F; ++f) {
        h[f] = round(g[f] / (1 + std::exp(-g[f])) * u[f]);
        g[f] = round(g[f]);
        u[f] = round(u[f]);
      }
      std::fill(o.begin(), o.end(), 0.0);
      add_low_rank(p, kDown, e, h.data(), o.data(), D, F, false, &low[kDown]);
      add_low_rank(p, kDown, e, dy.data(), a.data(), D, F, true, &low_gradient);
      std::fill(dx.begin(), dx.end(), 0.0);
      for (int f = 0; f < F; ++f) {
        const double s = 1 / (1 + std::exp(-g[f]));
        out.dgate[route] += a[f] * g[f] * s * u[f];
        dg[f] = round(p.gate[route] * a[f] * u[f] * (s + g[f] * s * (1 - s)));
        du[f] = round(p.gate[route] * a[f] * g[f] * s);
        for (int d = 0; d < D; ++d) {
          o[d] += W[kDown][d * F + f] * h[f];
          dx[d] += dg[f] * W[kGate][f * D + d] + du[f] * W[kUp][f * D + d];
        }
      }
      const auto gradients = [&](int j, const std::vector<double>& in, const std::vector<double>& made, double by) {
        const int64_t rank = p.adapters.of[j].rank, rows = made.size(), cols = in.size();
        for (int64_t r = 0; r < rank; ++r) {
          for (int64_t i = 0; i < cols; ++i) out.da[j][(e * rank + r) * cols + i] += by * low_gradient[r] * in[i];
          for (int64_t i = 0; i < rows; ++i) out.db[j][(e * rows + i) * rank + r] += by * made[i] * low[j][r];
        }
      };
      gradients(kDown, h, dy, p.gate[route]);
      add_low_rank(p, kGate, e, dg.data(), dx.data(), F, D, true, &low_gradient);
      gradients(kGate, x, dg, 1);
      add_low_rank(p, kUp, e, du.data(), dx.data(), F, D, true, &low_gradient);
      gradients(kUp, x, du, 1);
      for (int d = 0; d < D; ++d) {
        out.y[t * D + d] += p.gate[route] * o[d];
        out.dx[t * D + d] += dx[d];
      }
    }
  }
  return out;
}

}  // namespace kjax
