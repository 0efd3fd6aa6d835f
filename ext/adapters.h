// Low-rank adapters of a layer's routed experts: W x + scale * B (A dropout(x)) in place of W x.
#pragma once
#include <cstdint>
#include <memory>
#include <vector>

#include "store.h"

namespace kjax {

// The adapters of one projection of all experts; rank 0: none.
struct Factors {
  const float* a = nullptr;  // [experts, rank, in]
  const float* b = nullptr;  // [experts, out, rank]
  int64_t rank = 0;
  float scale = 0;
};

struct Adapters {
  Factors of[kProjections];
  double dropout = 0;  // the share of elements of an adapter's input that count as zero; the rest grow by 1 / (1 - it)
  uint32_t seed[2] = {};

  int64_t rank() const { return of[kGate].rank + of[kUp].rank + of[kDown].rank; }
  bool any() const { return rank() > 0; }
};

// Where the gradients of the factors go: the same shapes; null where there is no adapter.
struct AdapterGradients {
  float* a[kProjections] = {};
  float* b[kProjections] = {};
  bool fresh = false;         // they replace what is there; otherwise they are added to it
  double* squares = nullptr;  // if not null, becomes the sum of the squares of them all
  float* grown = nullptr;     // beside squares: by how much the call has made it grow
};

// Zeroes the gradients of one expert.
void clear(const AdapterGradients& gradients, const Adapters& adapters, const Store& store, int expert);

// The adapters of all layers, in arrays that a program keeps on the host: read in place, gradients added beside them.
struct HostAdapters {
  std::shared_ptr<void> kept;  // what owns the arrays
  int layers = 0, experts = 0;
  int64_t width = 0, hidden = 0;
  Factors first[kProjections];  // of layer 0; the others follow
  AdapterGradients gradients;   // likewise
  std::vector<double> squares;  // per layer, of the gradients so far

  // The layer's part, after checking that it belongs to a store; scale, dropout and seed are the caller's.
  Adapters of_layer(const Store& store, int64_t layer) const;
  AdapterGradients gradients_of_layer(int64_t layer);
};

// Handles, as those of stores. Nothing is bound at first and while no step runs.
int open_host_adapters();
void bind_host_adapters(int id, std::shared_ptr<HostAdapters> adapters);
std::shared_ptr<HostAdapters> find_host_adapters(int64_t id);  // throws where nothing is bound
void close_host_adapters(int id);

}  // namespace kjax
