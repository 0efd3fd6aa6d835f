// What kjax._ext tells of the machine, and what tests choose of it: instruction sets, threads, memory nodes.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <vector>

#include "bind.h"
#include "decode_cost.h"
#include "dispatch.h"
#include "memory.h"
#include "numa.h"
#include "store.h"
#include "threads.h"

namespace kjax {
namespace {

nb::dict isa() {
  const Chosen& now = chosen();
  nb::dict available, out;
  for (const auto& [name, reason] : available_isas(cpu_features())) available[name.c_str()] = reason;
  out["name"] = now.kernels->name;
  out["reason"] = now.reason;
  out["available"] = available;
  return out;
}

// Uint8 memory on huge pages, not touched yet, and why it may not lie on the node: "" where nothing speaks against it.
nb::object host_memory(size_t bytes, int node) {
  if (node < 0 || node >= static_cast<int>(nodes().size())) throw std::invalid_argument(text("there is no node ", node));
  auto memory = std::make_unique<Memory>(bytes);
  // Less than a huge page lies on pages of the heap, which belong to others too.
  const std::string refused = memory->huge() ? prefer_node(memory->data(), memory->size(), nodes()[node]) : "";
  void* const data = memory->data();
  nb::capsule owner(memory.release(), [](void* p) noexcept { delete static_cast<Memory*>(p); });
  nb::ndarray<nb::numpy> array(data, {bytes}, owner, {}, nb::dtype<uint8_t>());
  return nb::make_tuple(array, refused);
}

nb::list node_list(const std::vector<Node>& found) {
  nb::list out;
  for (const Node& node : found) out.append(nb::make_tuple(node.id, node.cpus));
  return out;
}

}  // namespace

void bind_machine(nb::module_& m) {
  m.def("isa", &isa, "{name, reason, available: {isa: \"\" or why not}}.");
  m.def(
      "features_of",
      [](uint32_t leaf1_ecx, uint32_t leaf7_ebx, uint32_t leaf7_ecx, uint32_t leaf7_edx, uint32_t leaf7_1_eax,
         uint32_t xcr0, const nb::callable& ask_for_tiles) {
        const CpuWords words{leaf1_ecx, leaf7_ebx, leaf7_ecx, leaf7_edx, leaf7_1_eax, xcr0};
        const auto found = features_of(words, [&] { return nb::cast<bool>(ask_for_tiles()); });
        return std::vector<std::string>(found.begin(), found.end());
      },
      nb::arg("leaf1_ecx"), nb::arg("leaf7_ebx"), nb::arg("leaf7_ecx"), nb::arg("leaf7_edx"), nb::arg("leaf7_1_eax"),
      nb::arg("xcr0"), nb::arg("ask_for_tiles"), "What choose_isa takes, of a CPU with these words of CPUID.");
  m.def(
      "choose_isa",
      [](nb::iterable features, const std::optional<std::string>& override_name) {
        std::set<std::string> names;
        for (nb::handle feature : features) names.insert(nb::cast<std::string>(feature));
        return choose_isa(names, override_name.value_or(""));
      },
      nb::arg("features"), nb::arg("override").none() = nb::none(), "(name, reason) for a CPU with these features.");
  m.def(
      "force_isa", [](const std::optional<std::string>& name) { force_isa(name.value_or("")); },
      nb::arg("name").none() = nb::none(),
      "Other kernels from now on, for comparing them; None returns to the default.");
  m.def(
      "decode_cost",
      [](const std::string& format, bool across) {
        const Format parsed = parse_format(format);
        nb::gil_scoped_release release;
        return decode_cost(parsed, across);
      },
      nb::arg("format"), nb::arg("across"),
      "Seconds per weight, all threads together, to decode what lies in L2 for a forward or, across, a backward call.");
  m.def("threads", &thread_count, "Threads a call runs on.");
  m.def("count_threads", &count_threads, nb::arg("root"), "The same, anew, with the control groups below a root.");
  m.def("host_memory", &host_memory, nb::arg("bytes"), nb::arg("node"),
        "(uint8 [bytes] on huge pages of a node, why the system may place it elsewhere or \"\").");
  m.def("nodes", [] { return node_list(nodes()); }, "[(system's number, CPUs)] of the memory nodes computed on.");
  m.def(
      "read_nodes",
      [](const std::string& root, const std::vector<int>& allowed) { return node_list(read_nodes(root, allowed)); },
      nb::arg("root"), nb::arg("allowed"), "The same for the files below a root and the CPUs allowed.");
  m.def(
      "make_up_nodes",
      [](const std::vector<std::vector<int>>& cpus) {
        std::vector<Node> made_up;
        for (const auto& one : cpus) made_up.push_back({static_cast<int>(made_up.size()), one});
        set_nodes(std::move(made_up));
      },
      nb::arg("cpus"), "Nodes of these CPUs, for tests; before the first store.");
  m.def(
      "spread",
      [](int64_t items) { return spread(items, nodes()); }, nb::arg("items"),
      "For each item the index of a node, in proportion to the nodes' CPUs.");
  m.def("thread_nodes", &thread_nodes, "The node of each kernel thread, an index into nodes().");
  m.def("cgroup_cpu_quota", &cgroup_cpu_quota, nb::arg("root"),
        "Cores granted by the control-group files below a root directory; 0: no limit.");
}

}  // namespace kjax
