// Memory nodes: which this process computes on, which threads belong to them, and memory bound to one.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace kjax {

// A node with memory, and the CPUs of this process that are nearest to it.
struct Node {
  int id;  // the system's number; -1 where it tells of no nodes
  std::vector<int> cpus;
  bool operator==(const Node&) const = default;
};

std::vector<int> allowed_cpus();  // this process's affinity mask; empty where the system has none
// "0-3,8,10-11" as numbers; what is not a number or a range is left out.
std::vector<int> parse_list(const std::string& text);
// The nodes that the files below `root` describe (sys/devices/system/node, proc/self/status), ascending by id: those
// whose memory this process may use and that have CPUs of `allowed`. CPUs of a node without such memory count for the
// nearest node with it. At least one node.
std::vector<Node> read_nodes(const std::string& root, const std::vector<int>& allowed);

// The nodes of this process, read at the first call.
const std::vector<Node>& nodes();
// Made-up nodes for tests; only before the first kernel call.
void set_nodes(std::vector<Node> made_up);

// For each of `items` the index of its node, in turn and in proportion to the nodes' CPUs.
std::vector<int> spread(int64_t items, const std::vector<Node>& over);
// The node of each kernel thread, an index into nodes().
const std::vector<int>& thread_nodes();
// `node`, or another that has kernel threads where it has none.
int home_of(int node);
// Lets the calling thread run on the CPUs of a node only; ignored where the system refuses.
void pin_thread(const Node& node);
// Asks for the pages of [data, data + bytes), not touched yet, to lie on a node: "" or why the system refuses.
std::string prefer_node(void* data, size_t bytes, const Node& node);

}  // namespace kjax
