// Runs every instruction set this CPU has, or those named, against float64 over shapes, formats and directions, without
// Python: for machines and emulators where only a program can be taken. One line per case; exit status 1 if any is
// wrong.
//   cmake -S ext -B build -DKJAX_PYTHON=OFF [-DKJAX_STATIC=ON] && cmake --build build && build/kjax_selftest [isa...]
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "experts.h"
#include "selftest.h"
#include "workspace.h"

namespace kjax {
namespace {

// One of everything, odd everywhere, one past a vector, a tile, a panel and a block of the reduction, an empty expert,
// one busy enough for several segments, rows left over after tiles along a reduction of several blocks, many rows along
// one, and two and about twelve rows, a full tile of them, with whole groups of stored rows that end within a line.
constexpr Case kCases[] = {{1, 1, 3, 1, 1, false},     {3, 5, 7, 4, 2, false},    {17, 129, 65, 5, 2, true},
                           {40, 96, 257, 3, 2, false}, {130, 70, 67, 9, 1, true}, {9, 320, 1030, 3, 2, false},
                           {33, 2051, 40, 2, 2, true}, {1100, 40, 33, 2, 1, true},
                           {60, 2304, 48, 1, 1, false},  {248, 2200, 72, 1, 1, false},
                           {2, 320, 136, 1, 1, false},   {15, 320, 136, 1, 1, false}};

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
// on the other side of a rounding boundary does to a short sum, plus fp32 sums; and when a recomputation and segments
// that take turns in the same memory give the same bits.
bool run_case(const std::string& isa, const Case& c, Format format, uint64_t seed, bool adapted) {
  const Dtype type = kOperandType[static_cast<int>(format)];
  Problem p = make_problem(c, format, seed);
  if (adapted) add_adapters(c, seed + 1000, p);
  const int id = register_store(p.store);
  const Call call{id, 0, c.tokens, c.width, c.per_token, Dtype::kFp32, p.x.data(),
                  p.idx.data(), p.gate.data(), &p.adapters};
  std::vector<float> y(p.x.size()), dx(p.x.size()), dgate(p.gate.size()), y_again(p.x.size()),
      again(p.x.size()), dgate_again(p.gate.size());
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
  bool good = true;
  row_memory = 0;
  const int32_t later = experts_forward(call, true, y_again.data());
  for (bool miss : {false, true, true}) {
    experts_backward(call, later, p.dy.data(), again.data(), dgate_again.data(), gradients_again);
    good &= y_again == y && again == dx && dgate_again == dgate;
    for (int j = 0; j < kProjections; ++j) good &= da[j] == da_again[j] && db[j] == db_again[j];
    if (miss) row_memory = kRowMemory;  // and once more with all rows at hand
  }
  close_store(id);
  std::printf("%-10s %-13s %s N%-4d D%-5d F%-5d E%-3d K%d ", isa.c_str(), kFormatInfo[static_cast<int>(format)].name,
              adapted ? "LoRA" : "    ", c.tokens, c.width, c.hidden, c.experts, c.per_token);
  struct Sizes {
    const char* name;
    double error, allowed;
  };
  // Kernels round a weight to bf16, or not (kernels.h); which of the two is nearer decides.
  const auto judge = [&](const Weights& weights) {
    const Result exact = reference(c, p, weights, type, false), rounded = reference(c, p, weights, type, true);
    std::vector<Sizes> all = {{"y", error(y, exact.y), error(rounded.y, exact.y)},
                              {"dx", error(dx, exact.dx), error(rounded.dx, exact.dx)},
                              {"dgate", error(dgate, exact.dgate), error(rounded.dgate, exact.dgate)}};
    for (int j = 0; adapted && j < kProjections; ++j) {
      all.push_back({"dA", error(da[j], exact.da[j]), error(rounded.da[j], exact.da[j])});
      all.push_back({"dB", error(db[j], exact.db[j]), error(rounded.db[j], exact.db[j])});
    }
    return all;
  };
  std::vector<Sizes> all = judge(p.weight);
  if (kScaleBlock[static_cast<int>(format)].bytes)
    if (const std::vector<Sizes> other = judge(p.unrounded); other[0].error < all[0].error) all = other;
  const double flip = type == Dtype::kBf16 ? 0.004 / std::max(1.0, std::sqrt(c.hidden / 8.0)) : 0;
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
    for (int format = 0; format < kFormats; ++format)
      for (const Case& c : kCases)
        for (bool adapted : {false, true}) {
          if (adapted && kBits[format] < 16 && &c != kCases) continue;  // an adapter does not see the format
          const uint64_t seed = 100 * format + 2 * (&c - kCases) + adapted + 1;
          good &= run_case(isa, c, static_cast<Format>(format), seed, adapted);
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
