// CPU detection and the tables of kernels it leads to.
#include "dispatch.h"

#include <atomic>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>

#include "text.h"
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kjax {
namespace {

constexpr const char* kTilePermission = "amx_permission";

struct Isa {
  const char* name;
  std::vector<std::string> needs;
  const FloatKernels* floats;  // null: those of the ISA below
  const Gemm* bf16;            // replaces the float products for formats computed in bf16
  bool built;
  bool only_asked_for = false;  // a model of hardware, for tests
};

// Best first; each also runs what the ones below it run.
const std::vector<Isa>& isas() {
  using Needs = std::vector<std::string>;
  const auto and_more = [](Needs needs, const Needs& more) {
#if !defined(KJAX_EMULATED)  // emulated.h: what is written for more runs with AVX2
    needs.insert(needs.end(), more.begin(), more.end());
#else
    static_cast<void>(more);
#endif
    return needs;
  };
  static const Needs avx2 = {"avx2", "fma", "f16c"},
                     avx512 = and_more(avx2, {"avx512f", "avx512bw", "avx512dq", "avx512vl"}),
                     avx512bf16 = and_more(avx512, {"avx512_vbmi", "avx512_bf16"}),
                     amx = and_more(avx512bf16, {"amx_tile", "amx_bf16", kTilePermission});
  static const std::vector<Isa> all = {
#if defined(KJAX_AMX)
      {"amx", amx, nullptr, &kAmxGemm, true},
#else
      {"amx", amx, nullptr, nullptr, false},
#endif
#if defined(KJAX_AVX512BF16)
      {"avx512bf16", avx512bf16, nullptr, &kAvx512Bf16Gemm, true},
#else
      {"avx512bf16", avx512bf16, nullptr, nullptr, false},
#endif
#if defined(KJAX_X86)
      {"amx_soft", avx512, nullptr, &kAmxSoftGemm, true, true},
      {"avx512", avx512, &kAvx512Kernels, nullptr, true},
      {"avx2", avx2, &kAvx2Kernels, nullptr, true},
#else
      {"avx512", avx512, nullptr, nullptr, false},
      {"avx2", avx2, nullptr, nullptr, false},
#endif
      {"scalar", {}, &kScalarKernels, nullptr, true},
  };
  return all;
}

bool only_asked_for(const std::string& name) {
  for (const Isa& isa : isas())
    if (name == isa.name) return isa.only_asked_for;
  return false;
}

std::string why_not(const Isa& isa, const std::set<std::string>& features) {
  std::string missing;
  for (const std::string& need : isa.needs)
    if (!features.count(need)) missing += (missing.empty() ? "" : ", ") + need;
  if (missing == kTilePermission) return "Linux does not grant this process the tile registers";
  if (!missing.empty()) return "this CPU lacks " + missing;
  return isa.built ? "" : "left out of this build: the compiler or architecture cannot make it";
}

Kernels assemble(const std::string& name) {
  Kernels kernels{name, {}, nullptr, nullptr};
  bool reached = false;
  for (const Isa& isa : isas()) {
    reached |= name == isa.name;
    if (!reached || (isa.only_asked_for && name != isa.name)) continue;
    if (isa.floats && !kernels.elementwise) {
      kernels.elementwise = &isa.floats->elementwise;
      kernels.low_rank = &isa.floats->low_rank;
    }
    for (const Gemm* gemm : {isa.bf16, isa.floats ? &isa.floats->gemm : nullptr})
      for (int format = 0; gemm && format < kFormats; ++format)
        if (!kernels.gemm[format] && gemm->along[format]) kernels.gemm[format] = gemm;
  }
  return kernels;
}

// Linux hands out the tile registers on request, once and for all threads of the process.
bool tiles_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
#else
  return false;
#endif
}

}  // namespace

std::set<std::string> features_of(const CpuWords& words, const std::function<bool()>& ask_for_tiles) {
  std::set<std::string> found;
  const auto bit = [](uint32_t word, int n) { return static_cast<bool>(word >> n & 1); };
  if (!bit(words.leaf1_ecx, 27)) return found;  // OSXSAVE: without it the operating system saves no vector register
  const auto saved = [&](uint32_t states) { return (words.xcr0 & states) == states; };
  const bool ymm = saved(0x6), zmm = saved(0xe6), tiles = saved(0x60000);
  const struct {
    bool set;
    const char* name;
  } all[] = {{ymm && bit(words.leaf1_ecx, 12), "fma"},
             {ymm && bit(words.leaf1_ecx, 29), "f16c"},
             {ymm && bit(words.leaf7_ebx, 5), "avx2"},
             {zmm && bit(words.leaf7_ebx, 16), "avx512f"},
             {zmm && bit(words.leaf7_ebx, 17), "avx512dq"},
             {zmm && bit(words.leaf7_ebx, 30), "avx512bw"},
             {zmm && bit(words.leaf7_ebx, 31), "avx512vl"},
             {zmm && bit(words.leaf7_ecx, 1), "avx512_vbmi"},
             {zmm && bit(words.leaf7_1_eax, 5), "avx512_bf16"},
             {tiles && bit(words.leaf7_edx, 24), "amx_tile"},
             {tiles && bit(words.leaf7_edx, 22), "amx_bf16"}};
  for (const auto& feature : all)
    if (feature.set) found.insert(feature.name);
  if (found.count("amx_tile") && ask_for_tiles()) found.insert(kTilePermission);
  return found;
}

std::set<std::string> cpu_features() {
  CpuWords words;
#if defined(__x86_64__)
  unsigned a, b, c, d;
  if (__get_cpuid(1, &a, &b, &c, &d)) words.leaf1_ecx = c;
  if (words.leaf1_ecx >> 27 & 1) __asm__ volatile("xgetbv" : "=a"(words.xcr0), "=d"(d) : "c"(0));
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) {
    words.leaf7_ebx = b;
    words.leaf7_ecx = c;
    words.leaf7_edx = d;
  }
  if (__get_cpuid_count(7, 1, &a, &b, &c, &d)) words.leaf7_1_eax = a;
#endif
  return features_of(words, tiles_permitted);
}

std::vector<std::pair<std::string, std::string>> available_isas(const std::set<std::string>& features) {
  std::vector<std::pair<std::string, std::string>> all;
  for (const Isa& isa : isas()) all.emplace_back(isa.name, why_not(isa, features));
  return all;
}

std::pair<std::string, std::string> choose_isa(const std::set<std::string>& features,
                                               const std::string& override_name) {
  std::string usable, passed_over;
  for (const auto& [name, reason] : available_isas(features))
    if (reason.empty()) usable += (usable.empty() ? "" : ", ") + name;
  for (const auto& [name, reason] : available_isas(features)) {
    if (override_name.empty()) {
      if (reason.empty() && !only_asked_for(name))
        return {name, passed_over.empty() ? "the best kjax has" : passed_over};
      if (!reason.empty()) passed_over = text(passed_over, passed_over.empty() ? "" : "; ", name, ": ", reason);
    } else if (override_name == name) {
      if (reason.empty()) return {name, "asked for by KJAX_ISA"};
      throw std::invalid_argument(text("KJAX_ISA=", name, ": ", reason, "; available here: ", usable));
    }
  }
  throw std::invalid_argument(
      text("KJAX_ISA=", override_name, " is not an instruction set kjax knows; available here: ", usable));
}

namespace {

std::mutex chosen_mutex;
std::atomic<const Chosen*> chosen_now{nullptr};

// Choices live for the whole process, because calls in flight may use one that was replaced.
const Chosen* choose(const std::string& override_name) {
  static std::map<std::string, std::unique_ptr<const Kernels>> tables;
  static std::vector<std::unique_ptr<const Chosen>> choices;
  const auto [name, reason] = choose_isa(cpu_features(), override_name);
  auto& table = tables[name];
  if (!table) table = std::make_unique<const Kernels>(assemble(name));
  choices.push_back(std::make_unique<const Chosen>(Chosen{table.get(), reason}));
  return choices.back().get();
}

std::string requested_isa() {
  const char* value = std::getenv("KJAX_ISA");
  return value ? value : "";
}

}  // namespace

const Chosen& chosen() {
  if (const Chosen* now = chosen_now.load(std::memory_order_acquire)) return *now;
  std::lock_guard lock(chosen_mutex);
  if (!chosen_now.load()) chosen_now.store(choose(requested_isa()), std::memory_order_release);
  return *chosen_now.load();
}

void force_isa(const std::string& name) {
  std::lock_guard lock(chosen_mutex);
  chosen_now.store(choose(name.empty() ? requested_isa() : name), std::memory_order_release);
}

}  // namespace kjax
