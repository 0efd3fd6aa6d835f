// Runs every instruction set this CPU has, or those named, against float64 over shapes, formats and directions, without
// Python: for machines and emulators where only a program can be taken. One line per case; exit status 1 if any is
// wrong.
//   cmake -S ext -B build -DKJAX_PYTHON=OFF [-DKJAX_STATIC=ON] && cmake --build build && build/kjax_selftest [isa...]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "experts.h"
#include "store.h"
#include "stash.h"
#include "threads.h"

namespace kjax {
namespace {

#include "decode_scalar.h"

// Numbers that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33) * 2u + 1u;
  }
  int below(int n) { return static_cast<int>(bits() / 2 % static_cast<uint32_t>(n)); }
  float uniform() { return static_cast<float>(bits() >> 8) * (2.0f / 16777216.0f) - 1.0f; }  // (-1, 1)

 private:
  uint64_t state_;
};

struct Case {
  int tokens, width, hidden, experts, per_token;
  bool skewed;  // half of all routes go to one expert
};
// One of everything, odd everywhere, one past a vector, a tile, a panel and a block of the reduction, an empty expert,
// one busy enough for several segments.
constexpr Case kCases[] = {{1, 1, 3, 1, 1, false},     {3, 5, 7, 4, 2, false},    {17, 129, 65, 5, 2, true},
                           {40, 96, 257, 3, 2, false}, {130, 70, 67, 9, 1, true}, {9, 320, 1030, 3, 2, false},
                           {33, 2051, 40, 2, 2, true}, {700, 40, 33, 2, 1, true}};

struct Problem {
  std::shared_ptr<Store> store;
  std::vector<double> weight[kProjections];  // [experts, rows, cols]
  std::vector<float> x, dy, gate;
  std::vector<int32_t> idx;
  std::vector<float> a[kProjections], b[kProjections];  // factors of adapters
  Adapters adapters;
};

constexpr int kRanks[kProjections] = {3, 8, 17};

// Adapters of unequal ranks.
void add_adapters(const Case& c, Problem& p, Random& random) {
  for (int j = 0; j < kProjections; ++j) {
    const Matrix shape = p.store->matrix(0, 0, j);
    for (int64_t i = 0; i < int64_t{c.experts} * kRanks[j] * shape.cols; ++i)
      p.a[j].push_back(random.uniform() * 1.7f / std::sqrt(static_cast<float>(shape.cols)));
    for (int64_t i = 0; i < int64_t{c.experts} * kRanks[j] * shape.rows; ++i)
      p.b[j].push_back(random.uniform() / std::sqrt(static_cast<float>(kRanks[j])));
    p.adapters.of[j] = {p.a[j].data(), p.b[j].data(), kRanks[j], 0.5f + static_cast<float>(j)};
  }
}

double narrow(double x, Dtype type) {
  const float f = static_cast<float>(x);
  return type == Dtype::kBf16 ? bf16_to_float(float_to_bf16(f)) : f;
}

// Random stored bytes: any code but a NaN's, scales that make weights of about 1 / sqrt(cols).
std::shared_ptr<uint8_t> stored_bytes(Format format, int64_t count, double size, Random& random) {
  std::shared_ptr<uint8_t> bytes(new uint8_t[count + 8], std::default_delete<uint8_t[]>());
  for (int64_t i = 0; i < count; ++i) {
    bytes.get()[i] = static_cast<uint8_t>(random.bits() >> 9);
    const bool fp8 = format == Format::kFp8Block || format == Format::kFp8Channel;
    if (fp8 && (bytes.get()[i] & 127) == 127) bytes.get()[i] ^= 1;
  }
  for (int64_t i = 0; format == Format::kBf16 && i < count / 2; ++i) {
    const uint16_t bits = float_to_bf16(random.uniform() * static_cast<float>(size));
    std::memcpy(bytes.get() + 2 * i, &bits, 2);
  }
  for (int64_t i = 0; format == Format::kFp32 && i < count / 4; ++i) {
    const float number = random.uniform() * static_cast<float>(size);
    std::memcpy(bytes.get() + 4 * i, &number, 4);
  }
  return bytes;
}

Problem make_problem(const Case& c, Format format, uint64_t seed) {
  Random random(seed);
  Problem p;
  p.store = std::make_shared<Store>(1, c.experts, c.width, c.hidden, format);
  const ScaleBlock& block = kScaleBlock[static_cast<int>(format)];
  const double unit = format == Format::kInt4Group32 ? 5 : format == Format::kInt8Group128 ? 74 : 120;  // of a code
  for (int projection = 0; projection < kProjections; ++projection) {
    const Matrix shape = p.store->matrix(0, 0, projection);
    const double size = 1.7 / std::sqrt(static_cast<double>(shape.cols));
    const int64_t one = shape.rows * row_bytes(format, shape.cols);
    const int64_t scales = (shape.rows + block.rows - 1) / block.rows * scales_per_row(block, shape.cols);
    std::vector<int32_t> buffer(c.experts), scale_buffer(c.experts);
    std::vector<int64_t> offset(c.experts, 0);
    for (int e = 0; e < c.experts; ++e) {
      buffer[e] = p.store->add_buffer(stored_bytes(format, one, size, random), one);
      std::shared_ptr<uint8_t> raw(new uint8_t[scales * 4], std::default_delete<uint8_t[]>());
      for (int64_t i = 0; i < scales; ++i) {
        const float scale = static_cast<float>(size / unit) * (1.0f + 0.5f * random.uniform());
        const uint16_t bits = float_to_bf16(scale);
        if (block.bytes == 4) std::memcpy(raw.get() + 4 * i, &scale, 4);
        if (block.bytes == 2) std::memcpy(raw.get() + 2 * i, &bits, 2);
      }
      scale_buffer[e] = p.store->add_buffer(raw, scales * block.bytes);
    }
    p.store->place(0, projection, buffer.data(), offset.data(), block.bytes ? scale_buffer.data() : nullptr,
                   offset.data());
  }
  for (int projection = 0; projection < kProjections; ++projection) {
    const Matrix shape = p.store->matrix(0, 0, projection);
    std::vector<float> decoded(static_cast<size_t>(shape.rows * shape.cols));
    for (int e = 0; e < c.experts; ++e) {
      const Matrix w = p.store->matrix(0, e, projection);
      for (int64_t r = 0; r < w.rows; ++r) decode_row(format, w, r, 0, w.cols, decoded.data() + r * w.cols);
      p.weight[projection].insert(p.weight[projection].end(), decoded.begin(), decoded.end());
    }
  }
  const int64_t numbers = int64_t{c.tokens} * c.width, routes = int64_t{c.tokens} * c.per_token;
  for (int64_t i = 0; i < numbers; ++i) {
    p.x.push_back(random.uniform() * 1.7f);
    p.dy.push_back(random.uniform() * 1.7f);
  }
  for (int64_t i = 0; i < routes; ++i) {
    const int spread = c.experts > 2 ? c.experts - 1 : c.experts;  // the last of many experts stays empty
    p.idx.push_back(random.below(5) == 0 ? -1 : c.skewed && random.below(2) ? 0 : random.below(spread));
    p.gate.push_back(0.5f + 0.5f * random.uniform());
  }
  return p;
}

struct Result {
  std::vector<double> y, dx, dgate;
  std::vector<double> da[kProjections], db[kProjections];
};

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

// In float64, with whatever adapters there are, rounding to `type` where a kernel must: fp32 for none.
Result reference(const Case& c, const Problem& p, Dtype type, bool rounded) {
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
      for (int j = 0; j < kProjections; ++j) W[j] = p.weight[j].data() + static_cast<size_t>(e) * D * F;
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

double error(const std::vector<float>& got, const std::vector<double>& exact) {
  double difference = 0, size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    difference += (got[i] - exact[i]) * (got[i] - exact[i]);
    size += exact[i] * exact[i];
  }
  return std::sqrt(size > 0 ? difference / size : difference);
}
double error(const std::vector<double>& got, const std::vector<double>& exact) {
  return error(std::vector<float>(got.begin(), got.end()), exact);
}

// True when y, dx and dgate are within twice the error of rounding the operands alone, plus what one value that falls
// on the other side of a rounding boundary does to a short sum, plus fp32 sums.
bool run_case(const std::string& isa, const Case& c, Format format, uint64_t seed, bool adapted) {
  const Dtype type = kOperandType[static_cast<int>(format)];
  Problem p = make_problem(c, format, seed);
  Random random(seed + 1000);
  if (adapted) add_adapters(c, p, random);
  const int id = register_store(p.store);
  const Call call{id, 0, c.tokens, c.width, c.per_token, Dtype::kFp32, p.x.data(),
                  p.idx.data(), p.gate.data(), &p.adapters};
  std::vector<float> y(p.x.size()), dx(p.x.size()), dgate(p.gate.size()), again(p.x.size()), dgate_again(p.gate.size());
  std::vector<float> da[kProjections], db[kProjections], da_again[kProjections], db_again[kProjections];
  AdapterGradients gradients, gradients_again;
  for (int j = 0; j < kProjections; ++j) {
    da[j].resize(p.a[j].size());
    db[j].resize(p.b[j].size());
    da_again[j].assign(p.a[j].size(), 77.0f);  // to be replaced, not added to
    db_again[j].assign(p.b[j].size(), 77.0f);
    gradients.a[j] = da[j].data();
    gradients.b[j] = db[j].data();
    gradients_again.a[j] = da_again[j].data();
    gradients_again.b[j] = db_again[j].data();
  }
  gradients_again.fresh = true;
  const int32_t slip = experts_forward(call, true, y.data());
  experts_backward(call, slip, p.dy.data(), dx.data(), dgate.data(), gradients);
  experts_backward(call, slip, p.dy.data(), again.data(), dgate_again.data(), gradients_again);  // now a miss
  close_store(id);
  const Result exact = reference(c, p, type, false), rounded = reference(c, p, type, true);
  const double flip = type == Dtype::kBf16 ? 0.004 / std::max(1.0, std::sqrt(c.hidden / 8.0)) : 0;
  bool good = again == dx && dgate_again == dgate;
  for (int j = 0; j < kProjections; ++j) good &= da[j] == da_again[j] && db[j] == db_again[j];
  std::printf("%-10s %-13s %s N%-4d D%-5d F%-5d E%-3d K%d ", isa.c_str(), kFormatInfo[static_cast<int>(format)].name,
              adapted ? "LoRA" : "    ", c.tokens, c.width, c.hidden, c.experts, c.per_token);
  struct One {
    const char* name;
    double error, allowed;
  };
  std::vector<One> all = {{"y", error(y, exact.y), error(rounded.y, exact.y)},
                          {"dx", error(dx, exact.dx), error(rounded.dx, exact.dx)},
                          {"dgate", error(dgate, exact.dgate), error(rounded.dgate, exact.dgate)}};
    for (int j = 0; adapted && j < kProjections; ++j) {
    all.push_back({"dA", error(da[j], exact.da[j]), error(rounded.da[j], exact.da[j])});
    all.push_back({"dB", error(db[j], exact.db[j]), error(rounded.db[j], exact.db[j])});
  }
  for (const auto& one : all) {
    good &= one.error <= 2 * one.allowed + flip + 40 * 6e-8;
    std::printf(" %s %.1e", one.name, one.error);
  }
  std::printf("  %s\n", good ? "ok" : "WRONG");
  return good;
}

int main(int argc, char** argv) {
  bool good = true;
  std::string ran;
  int cases = 0;
  const auto isas = available_isas(cpu_features());
  for (int i = 1; i < argc; ++i) {
    if (std::any_of(isas.begin(), isas.end(), [&](const auto& isa) { return isa.first == argv[i]; })) continue;
    std::printf("%s is no instruction set of this program; it has", argv[i]);
    for (const auto& [isa, why_not] : isas) std::printf(" %s", isa.c_str());
    std::puts("");
    return 2;
  }
  for (const auto& [isa, why_not] : isas) {
    bool asked = argc < 2;
    for (int i = 1; i < argc; ++i) asked |= isa == argv[i];
    if (!asked) continue;
    if (!why_not.empty()) {
      std::printf("%-10s %s\n", isa.c_str(), why_not.c_str());
      good &= argc < 2;  // an ISA asked for must run
      continue;
    }
    force_isa(isa);
    ran += (ran.empty() ? "" : ", ") + isa;
    uint64_t seed = 0;
    for (int format = 0; format < kFormats; ++format)
      for (const Case& c : kCases)
        for (bool adapted : {false, true}) {
          if (adapted && kBits[format] < 16 && &c != kCases) continue;  // an adapter does not see the format
          good &= run_case(isa, c, static_cast<Format>(format), ++seed, adapted);
          ++cases;
        }
  }
  std::printf("%d cases on %s: %s\n", cases, ran.c_str(), good ? "all as float64 says" : "FAILED");
  return good ? 0 : 1;
}

}  // namespace
}  // namespace kjax

int main(int argc, char** argv) {
  try {
    return kjax::main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 2;
  }
}
