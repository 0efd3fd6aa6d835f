// Where every expert's three projections lie, in mapped files or in memory, and the registry through which calls find a
// store.
#pragma once
#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"

namespace kjax {

enum Projection : int { kGate, kUp, kDown, kProjections };
inline constexpr const char* kProjectionNames[kProjections] = {"gate_proj", "up_proj", "down_proj"};

// What kernels need not know of a format.
struct FormatInfo {
  const char* name;
  int64_t alignment;  // of the weights, in bytes
};
extern const FormatInfo kFormatInfo[kFormats];
Format parse_format(const std::string& name);

class MappedFile;

struct Stats {
  std::atomic<int64_t> forward{0}, backward{0}, recomputed{0}, tokens{0}, routes{0}, forward_ns{0}, backward_ns{0};
};

class Store {
 public:
  // gate_proj and up_proj are [hidden, width], down_proj is [width, hidden].
  Store(int layers, int experts, int64_t width, int64_t hidden, Format format);

  int add_buffer(std::shared_ptr<const uint8_t> bytes, size_t size);  // kept until the last call in flight is done
  int add_file(std::shared_ptr<const MappedFile> file);
  // Where one projection of all experts of a layer lies; every range and alignment is checked, once.
  void place(int layer, int projection, const int32_t* buffer, const int64_t* offset, const int32_t* scale_buffer,
             const int64_t* scale_offset);

  // The node in whose memory each expert of every layer lies, indices into nodes(); for placement of tasks only.
  void set_nodes(const int32_t* node_of_expert);
  int node(int expert) const { return node_of_.empty() ? 0 : node_of_[expert]; }
  bool split() const { return !node_of_.empty(); }  // over more than one node

  void check_layer(int layer) const;  // in range and with all three projections placed
  void require_whole() const;         // MappedFile::require_whole of its files; within a turn
  Matrix matrix(int layer, int expert, int projection) const;
  void read_ahead(int layer, int expert) const;  // starts reading what mapped files have not in memory
  void decode(int layer, int expert, int projection, float* out) const;  // out [rows, cols]
  std::vector<std::pair<int, int>> nonfinite(int layer) const;  // (expert, projection) with a NaN or an infinity

  const int layers, experts;
  const int64_t width, hidden;
  const Format format;
  int id = -1;
  mutable Stats stats;

 private:
  struct Buffer {
    std::shared_ptr<const uint8_t> bytes;
    size_t size;
  };
  struct Place {
    const uint8_t *data, *scales;
  };
  // The memory of one expert's weights or scales, after checking that it lies in a buffer and is aligned.
  const uint8_t* range(const std::string& what, int32_t buffer, int64_t offset, int64_t bytes, int64_t alignment) const;
  void check_indices(int layer, int expert, int projection) const;
  size_t index(int layer, int expert, int projection) const;

  std::vector<Buffer> buffers_;
  std::vector<std::shared_ptr<const MappedFile>> files_;
  std::vector<Place> places_;
  std::vector<int> node_of_;
  std::unique_ptr<std::atomic<uint8_t>[]> placed_;  // per layer, one bit per projection; set after its places
};

// Handles of stores. Calls hold the store itself, so closing one never pulls memory from under a call.
int register_store(std::shared_ptr<Store> store);
std::shared_ptr<const Store> find_store(int64_t id);  // throws when it is closed or never was
bool is_open(int id);
bool close_store(int id);  // also drops what the stash holds of it; true when no store is open any more

}  // namespace kjax
