// Which kernels run on this CPU, and why.
#pragma once
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"

namespace kjax {

struct Kernels {
  std::string name;
  const Gemm* gemm[kFormats];  // the best this ISA or a lower one has for the format
  const Elementwise* elementwise;
  const LowRank* low_rank;
};

// What the CPU and the operating system together let this process use, by the names of /proc/cpuinfo.
std::set<std::string> cpu_features();

// (name, reason). An unknown or unsupported override throws, listing what is available.
std::pair<std::string, std::string> choose_isa(const std::set<std::string>& features, const std::string& override_name);

// Every ISA in order of preference, with "" or why it is not available.
std::vector<std::pair<std::string, std::string>> available_isas(const std::set<std::string>& features);

struct Chosen {
  const Kernels* kernels;
  std::string reason;
};
// The kernels of this process: KJAX_ISA or the best available; decided at the first call, throws as choose_isa does.
const Chosen& chosen();
// Another choice from now on, for tests that compare ISAs; empty returns to the default.
void force_isa(const std::string& name);

}  // namespace kjax
