// Topology from sysfs; placement by system calls, so that no library is needed.
#include "numa.h"

#include <sched.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <stdexcept>

#include "text.h"
#include "threads.h"
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace kjax {
namespace {

constexpr int kMostCpus = 8192;
constexpr int kMostNodes = 1024;

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// "Node 3 MemTotal:  1024 kB"
bool has_memory(const std::string& directory) {
  std::ifstream file(directory + "/meminfo");
  for (std::string line; std::getline(file, line);)
    if (const size_t at = line.find("MemTotal:"); at != std::string::npos) return std::atoll(line.c_str() + at + 9) > 0;
  return false;
}

// The nodes whose memory a cpuset grants; empty: all.
std::vector<int> granted_nodes(const std::string& root) {
  std::ifstream status(root + "/proc/self/status");
  const std::string key = "Mems_allowed_list:";
  for (std::string line; std::getline(status, line);)
    if (line.rfind(key, 0) == 0) return parse_list(line.substr(key.size()));
  return {};
}

}  // namespace

std::vector<int> parse_list(const std::string& text) {
  std::vector<int> numbers;
  std::istringstream fields(text);
  for (std::string field; std::getline(fields, field, ',');) {
    int first, last;
    std::istringstream range(field);
    char dash;
    if (!(range >> first)) continue;
    if (!(range >> dash >> last)) last = first;
    for (int n = std::max(first, 0); n <= std::min(last, kMostCpus - 1); ++n) numbers.push_back(n);
  }
  return numbers;
}

std::vector<int> allowed_cpus() {
  std::vector<int> found;
#if defined(__linux__)
  const size_t size = CPU_ALLOC_SIZE(kMostCpus);
  if (cpu_set_t* set = CPU_ALLOC(kMostCpus)) {
    if (sched_getaffinity(0, size, set) == 0)
      for (int cpu = 0; cpu < kMostCpus; ++cpu)
        if (CPU_ISSET_S(cpu, size, set)) found.push_back(cpu);
    CPU_FREE(set);
  }
#endif
  return found;
}

std::vector<Node> read_nodes(const std::string& root, const std::vector<int>& allowed) {
  const std::string base = root + "/sys/devices/system/node";
  const std::vector<int> granted = granted_nodes(root);
  const std::set<int> mine(allowed.begin(), allowed.end());
  std::vector<Node> found;
  std::vector<std::pair<int, int>> homeless;  // (CPU, its node, which has no memory for this process)
  for (int id : parse_list(first_line(base + "/online"))) {
    const std::string directory = text(base, "/node", id);
    const bool usable = has_memory(directory) &&
                        (granted.empty() || std::find(granted.begin(), granted.end(), id) != granted.end());
    Node node{id, {}};
    for (int cpu : parse_list(first_line(directory + "/cpulist"))) {
      if (!mine.count(cpu)) continue;
      if (usable) node.cpus.push_back(cpu);
      else homeless.emplace_back(cpu, id);
    }
    if (usable) found.push_back(node);
  }
  for (const auto& [cpu, id] : homeless) {
    std::istringstream fields(first_line(text(base, "/node", id, "/distance")));
    std::map<int, int> distance;  // of the online nodes in their order
    for (int to : parse_list(first_line(base + "/online")))
      if (!(fields >> distance[to])) distance[to] = 255;
    const auto nearest = std::min_element(found.begin(), found.end(), [&](const Node& a, const Node& b) {
      return distance[a.id] < distance[b.id];
    });
    if (nearest != found.end()) nearest->cpus.push_back(cpu);
  }
  found.erase(std::remove_if(found.begin(), found.end(), [](const Node& node) { return node.cpus.empty(); }),
              found.end());
  if (found.empty()) found.push_back({-1, allowed});
  return found;
}

namespace {

std::mutex nodes_mutex;
std::vector<Node> the_nodes;  // empty: not read yet; never changed once threads run

}  // namespace

const std::vector<Node>& nodes() {
  std::lock_guard lock(nodes_mutex);
  if (the_nodes.empty()) the_nodes = read_nodes("", allowed_cpus());
  return the_nodes;
}

void set_nodes(std::vector<Node> made_up) {
  std::lock_guard lock(nodes_mutex);
  if (!the_nodes.empty()) throw std::logic_error("nodes are made up before the first kernel call, or not at all");
  the_nodes = std::move(made_up);
}

std::vector<int> spread(int64_t items, const std::vector<Node>& over) {
  int64_t total = 0;
  for (const Node& node : over) total += static_cast<int64_t>(node.cpus.size());
  std::vector<int> found;
  std::vector<int64_t> got(over.size());
  for (int64_t i = 0; i < items; ++i) {  // to the node that is furthest behind its share
    size_t best = 0;
    int64_t most = INT64_MIN;
    for (size_t n = 0; n < over.size(); ++n) {
      const int64_t behind = static_cast<int64_t>(over[n].cpus.size()) * (i + 1) - got[n] * total;
      if (behind > most) {
        most = behind;
        best = n;
      }
    }
    ++got[best];
    found.push_back(static_cast<int>(best));
  }
  return found;
}

const std::vector<int>& thread_nodes() {
  static const std::vector<int> homes = spread(thread_count(), nodes());
  return homes;
}

int home_of(int node) {
  static const std::vector<int> table = [] {
    const std::vector<int>& homes = thread_nodes();
    std::vector<int> found;
    for (int n = 0; n < static_cast<int>(nodes().size()); ++n)
      found.push_back(std::find(homes.begin(), homes.end(), n) != homes.end() ? n : homes[0]);
    return found;
  }();
  return table[node];
}

void pin_thread(const Node& node) {
#if defined(__linux__)
  const size_t size = CPU_ALLOC_SIZE(kMostCpus);
  if (cpu_set_t* set = CPU_ALLOC(kMostCpus)) {
    CPU_ZERO_S(size, set);
    for (int cpu : node.cpus) CPU_SET_S(cpu, size, set);
    sched_setaffinity(0, size, set);  // refused in some sandboxes: only slower
    CPU_FREE(set);
  }
#else
  (void)node;
#endif
}

std::string prefer_node(void* data, size_t bytes, const Node& node) {
  if (node.id < 0) return "";
#if defined(__linux__) && defined(SYS_mbind)
  constexpr int kPreferred = 1;  // MPOL_PREFERRED: another node where this one is full, instead of no memory
  unsigned long mask[kMostNodes / (8 * sizeof(unsigned long))] = {};
  if (node.id >= kMostNodes) return text("node ", node.id, " is beyond the ", kMostNodes, " that are known");
  mask[node.id / (8 * sizeof(unsigned long))] |= 1ul << node.id % (8 * sizeof(unsigned long));
  if (syscall(SYS_mbind, data, bytes, kPreferred, mask, kMostNodes, 0) == 0) return "";
  return text("mbind: ", std::strerror(errno));
#else
  (void)data, (void)bytes;
  return "this system cannot place memory";
#endif
}

}  // namespace kjax
