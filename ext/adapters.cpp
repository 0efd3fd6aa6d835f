// The registry of adapters that stay on the host, and the places of a layer in them.
#include "adapters.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <stdexcept>

#include "text.h"

namespace kjax {
namespace {

std::mutex mutex;
// Null: open, but nothing is bound. Never destroyed: a call may be in flight at exit.
std::map<int, std::shared_ptr<HostAdapters>>& bound = *new std::map<int, std::shared_ptr<HostAdapters>>;
int next_id = 0;

}  // namespace

void clear(const AdapterGradients& gradients, const Adapters& adapters, const Store& store, int expert) {
  for (int p = 0; p < kProjections; ++p)
    if (const int64_t rank = adapters.of[p].rank) {
      const int64_t in = p == kDown ? store.hidden : store.width, out = p == kDown ? store.width : store.hidden;
      std::fill_n(gradients.a[p] + expert * rank * in, rank * in, 0.0f);
      std::fill_n(gradients.b[p] + expert * rank * out, rank * out, 0.0f);
    }
}

Adapters HostAdapters::of_layer(const Store& store, int64_t layer) const {
  if (layers != store.layers || experts != store.experts || width != store.width || hidden != store.hidden)
    throw std::invalid_argument(text("expert adapters of ", layers, " layers x ", experts, " experts, ", width, " x ",
                                     hidden, " do not belong to expert store ", store.id));
  if (layer < 0 || layer >= layers)
    throw std::invalid_argument(text("expert adapters: layer ", layer, " is not in 0..", layers - 1));
  store.check_layer(static_cast<int>(layer));
  Adapters out;
  for (int p = 0; p < kProjections; ++p) {
    Factors& f = out.of[p] = first[p];
    const int64_t in = p == kDown ? hidden : width, made = p == kDown ? width : hidden;
    if (f.rank) {
      f.a += layer * experts * f.rank * in;
      f.b += layer * experts * f.rank * made;
    }
  }
  return out;
}

AdapterGradients HostAdapters::gradients_of_layer(int64_t layer) {
  AdapterGradients out = gradients;
  for (int p = 0; p < kProjections; ++p)
    if (const int64_t rank = first[p].rank) {
      if (!out.a[p])
        throw std::invalid_argument("expert adapters: a backward call, but no room for gradients is bound");
      out.a[p] += layer * experts * rank * (p == kDown ? hidden : width);
      out.b[p] += layer * experts * rank * (p == kDown ? width : hidden);
    }
  out.squares = &squares[layer];
  return out;
}

int open_host_adapters() {
  std::lock_guard lock(mutex);
  bound.emplace(next_id, nullptr);
  return next_id++;
}

void bind_host_adapters(int id, std::shared_ptr<HostAdapters> adapters) {
  std::lock_guard lock(mutex);
  const auto found = bound.find(id);
  if (found == bound.end()) throw std::invalid_argument(text("expert adapters ", id, " are closed"));
  found->second.swap(adapters);  // what was bound is let go of after the lock
}

std::shared_ptr<HostAdapters> find_host_adapters(int64_t id) {
  std::lock_guard lock(mutex);
  const auto found = id < next_id ? bound.find(static_cast<int>(id)) : bound.end();
  if (found == bound.end()) throw std::invalid_argument(text("expert adapters ", id, " are closed"));
  if (!found->second)
    throw std::invalid_argument(text("expert adapters ", id, ": no arrays are bound; run inside HostLora.bound()"));
  return found->second;
}

void close_host_adapters(int id) {
  std::shared_ptr<HostAdapters> last;
  std::lock_guard lock(mutex);
  if (const auto found = bound.find(id); found != bound.end()) {
    last.swap(found->second);
    bound.erase(found);
  }
}

}  // namespace kjax
