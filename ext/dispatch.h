// Which kernels run on this CPU, and why.
#pragma once
#include <cstdint>
#include <functional>
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

// What CPUID and the register of enabled states answer, as far as kjax asks; 0 where the CPU has no such leaf.
struct CpuWords {
  uint32_t leaf1_ecx = 0, leaf7_ebx = 0, leaf7_ecx = 0, leaf7_edx = 0, leaf7_1_eax = 0, xcr0 = 0;
};
// What such a CPU and the operating system together let this process use, by the names of /proc/cpuinfo. Only where the
// CPU has tile registers is the system asked for them, by `ask_for_tiles`.
std::set<std::string> features_of(const CpuWords& words, const std::function<bool()>& ask_for_tiles);
// Those of this process.
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
