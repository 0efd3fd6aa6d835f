// The parts of kjax_selftest: a random problem of some shape and format, and what float64 makes of it.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "experts.h"
#include "store.h"

namespace kjax {

struct Case {
  int tokens, width, hidden, experts, per_token;
  bool skewed;  // half of all routes go to one expert
};

using Weights = std::vector<double>[kProjections];
struct Problem {
  std::shared_ptr<Store> store;
  Weights weight, unrounded;  // [experts, rows, cols]; unrounded where kernels may leave scale * code as it is
  std::vector<float> x, dy, gate;
  std::vector<int32_t> idx;
  std::vector<float> a[kProjections], b[kProjections];  // factors of adapters
  Adapters adapters;
};

// selftest_problem.cpp: without adapters, which add_adapters draws, of unequal ranks.
Problem make_problem(const Case& c, Format format, uint64_t seed);
void add_adapters(const Case& c, uint64_t seed, Problem& p);

struct Result {
  std::vector<double> y, dx, dgate;
  std::vector<double> da[kProjections], db[kProjections];
};

// selftest_reference.cpp: in float64, with whatever adapters there are, rounding to `type` where a kernel must: fp32
// for none.
Result reference(const Case& c, const Problem& p, const Weights& weights, Dtype type, bool rounded);

}  // namespace kjax
