// Places, checks and the registry of expert stores.
#include "store.h"

#include <cmath>
#include <map>
#include <mutex>
#include <stdexcept>

#include "mapped.h"
#include "numa.h"
#include "stash.h"
#include "text.h"
#include "threads.h"

namespace kjax {

const FormatInfo kFormatInfo[kFormats] = {{"bf16", 2},        {"fp32", 4},         {"fp8_block", 1},
                                          {"fp8_channel", 1}, {"int4_group32", 1}, {"int8_group128", 1}};

namespace {

#include "decode_scalar.h"

int64_t data_bytes(Format format, const Matrix& w) { return w.rows * row_bytes(format, w.cols); }
int64_t scale_bytes(Format format, const Matrix& w) {
  const ScaleBlock& block = kScaleBlock[static_cast<int>(format)];
  return (w.rows + block.rows - 1) / block.rows * scales_per_row(block, w.cols) * block.bytes;
}

std::mutex registry_mutex;
std::map<int, std::shared_ptr<Store>>& registry =
    *new std::map<int, std::shared_ptr<Store>>;  // a call may outlive exit
int next_id = 0;

}  // namespace

Format parse_format(const std::string& name) {
  std::string known;
  for (int i = 0; i < kFormats; ++i) {
    if (name == kFormatInfo[i].name) return static_cast<Format>(i);
    known += text(i ? ", " : "", kFormatInfo[i].name);
  }
  throw std::invalid_argument(text("unknown expert format \"", name, "\"; known: ", known));
}

Store::Store(int layers, int experts, int64_t width, int64_t hidden, Format format)
    : layers(layers), experts(experts), width(width), hidden(hidden), format(format) {
  constexpr int64_t kMost = 1 << 24;  // of any size; products of two of them and a few bytes stay far below 2^63
  const struct {
    const char* name;
    int64_t value;
  } sizes[] = {{"layers", layers}, {"experts", experts}, {"width", width}, {"hidden", hidden}};
  for (const auto& size : sizes)
    if (size.value < 1 || size.value > kMost)
      throw std::invalid_argument(
          text("expert store: ", size.name, " = ", size.value, " is not between 1 and ", kMost));
  places_.resize(static_cast<size_t>(layers) * experts * kProjections);
  placed_ = std::make_unique<std::atomic<uint8_t>[]>(layers);
}

size_t Store::index(int layer, int expert, int projection) const {
  return (static_cast<size_t>(layer) * experts + expert) * kProjections + projection;
}

void Store::check_indices(int layer, int expert, int projection) const {
  if (layer < 0 || layer >= layers)
    throw std::invalid_argument(text("expert store ", id, ": layer ", layer, " is not in 0..", layers - 1));
  if (expert < 0 || expert >= experts)
    throw std::invalid_argument(text("expert store ", id, ": expert ", expert, " is not in 0..", experts - 1));
  if (projection < 0 || projection >= kProjections)
    throw std::invalid_argument(
        text("expert store ", id, ": projection ", projection, " is not 0 (gate_proj), 1 (up_proj) or 2 (down_proj)"));
}

int Store::add_buffer(std::shared_ptr<const uint8_t> bytes, size_t size) {
  buffers_.push_back({std::move(bytes), size});
  return static_cast<int>(buffers_.size()) - 1;
}

int Store::add_file(std::shared_ptr<const MappedFile> file) {
  const int number = add_buffer({file, file->data()}, file->size());
  files_.push_back(std::move(file));
  return number;
}

void Store::require_whole() const {
  for (const auto& file : files_) file->require_whole();
}

const uint8_t* Store::range(const std::string& what, int32_t buffer, int64_t offset, int64_t bytes,
                            int64_t alignment) const {
  if (buffer < 0 || static_cast<size_t>(buffer) >= buffers_.size())
    throw std::invalid_argument(text(what, "buffer ", buffer, " is not one of the ", buffers_.size(), " added"));
  const Buffer& b = buffers_[buffer];
  if (offset < 0 || static_cast<uint64_t>(bytes) > b.size || static_cast<uint64_t>(offset) > b.size - bytes)
    throw std::invalid_argument(
        text(what, "bytes ", offset, " to ", offset, " + ", bytes, " are not within the buffer's ", b.size));
  const uint8_t* const data = b.bytes.get() + offset;
  if (reinterpret_cast<uintptr_t>(data) % alignment)
    throw std::invalid_argument(text(what, "offset ", offset, " is not aligned to ", alignment, " bytes in memory"));
  return data;
}

void Store::place(int layer, int projection, const int32_t* buffer, const int64_t* offset, const int32_t* scale_buffer,
                  const int64_t* scale_offset) {
  check_indices(layer, 0, projection);
  const std::string name = text("expert store ", id, ": ", kProjectionNames[projection], " of layer ", layer);
  if (placed_[layer] >> projection & 1) throw std::invalid_argument(text(name, " is already placed"));
  const FormatInfo& info = kFormatInfo[static_cast<int>(format)];
  const int64_t scale_alignment = kScaleBlock[static_cast<int>(format)].bytes;
  if (scale_alignment && !scale_buffer)
    throw std::invalid_argument(text(name, ": format ", info.name, " needs scales"));
  if (!scale_alignment && scale_buffer)
    throw std::invalid_argument(text(name, ": format ", info.name, " has no scales"));
  const Matrix w = matrix(layer, 0, projection);
  for (int e = 0; e < experts; ++e) {
    Place& place = places_[index(layer, e, projection)];
    place.data = range(text(name, ", expert ", e, ": "), buffer[e], offset[e], data_bytes(format, w), info.alignment);
    if (scale_buffer)
      place.scales = range(text(name, ", expert ", e, ", scales: "), scale_buffer[e], scale_offset[e],
                           scale_bytes(format, w), scale_alignment);
  }
  placed_[layer].fetch_or(static_cast<uint8_t>(1 << projection), std::memory_order_release);
}

void Store::set_nodes(const int32_t* node_of_expert) {
  const int known = static_cast<int>(nodes().size());
  std::vector<int> given(node_of_expert, node_of_expert + experts);
  for (int node : given)
    if (node < 0 || node >= known)
      throw std::invalid_argument(text("expert store ", id, ": node ", node, " is not in 0..", known - 1));
  node_of_.clear();
  if (known > 1) node_of_ = std::move(given);
}

void Store::check_layer(int layer) const {
  check_indices(layer, 0, 0);
  const int placed = placed_[layer].load(std::memory_order_acquire);
  for (int p = 0; p < kProjections; ++p)
    if (!(placed >> p & 1))
      throw std::invalid_argument(
          text("expert store ", id, ": ", kProjectionNames[p], " of layer ", layer, " is not placed yet"));
}

Matrix Store::matrix(int layer, int expert, int projection) const {
  const Place& place = places_[index(layer, expert, projection)];
  const bool down = projection == kDown;
  return {place.data, place.scales, down ? width : hidden, down ? hidden : width};
}

void Store::read_ahead(int layer, int expert) const {
  for (int projection = 0; projection < kProjections; ++projection) {
    const Matrix w = matrix(layer, expert, projection);
    kjax::read_ahead(w.data, static_cast<size_t>(data_bytes(format, w)));
    if (w.scales) kjax::read_ahead(w.scales, static_cast<size_t>(scale_bytes(format, w)));
  }
}

void Store::decode(int layer, int expert, int projection, float* out) const {
  check_indices(layer, expert, projection);
  check_layer(layer);
  const Matrix w = matrix(layer, expert, projection);
  const Turn turn;
  require_whole();
  for (int64_t r = 0; r < w.rows; ++r) decode_row(format, w, r, 0, w.cols, out + r * w.cols);
  require_files();
}

std::vector<std::pair<int, int>> Store::nonfinite(int layer) const {
  check_layer(layer);
  const int tasks = experts * kProjections;
  std::vector<uint8_t> bad(tasks);
  std::atomic<int> next{0};
  auto job = [&](Worker& worker) {
    std::vector<float> line;
    for (int t; (t = next.fetch_add(1)) < tasks;) {
      worker.check();
      const Matrix w = matrix(layer, t / kProjections, t % kProjections);
      line.resize(w.cols);
      float sum = 0;  // x * 0 is zero for every finite x and NaN for the others
      for (int64_t r = 0; r < w.rows; ++r) {
        decode_row(format, w, r, 0, w.cols, line.data());
        for (float x : line) sum += x * 0.0f;
      }
      bad[t] = sum != 0.0f;
    }
  };
  Turn turn;
  require_whole();
  turn.run(job);
  std::vector<std::pair<int, int>> found;
  for (int t = 0; t < tasks; ++t)
    if (bad[t]) found.emplace_back(t / kProjections, t % kProjections);
  return found;
}

int register_store(std::shared_ptr<Store> store) {
  std::lock_guard lock(registry_mutex);
  store->id = next_id++;
  registry.emplace(store->id, store);
  return store->id;
}

std::shared_ptr<const Store> find_store(int64_t id) {
  std::lock_guard lock(registry_mutex);
  if (const auto found = registry.find(static_cast<int>(id)); found != registry.end() && found->first == id)
    return found->second;
  if (id >= 0 && id < next_id) throw std::invalid_argument(text("expert store ", id, " is closed"));
  throw std::invalid_argument(text("there is no expert store ", id));
}

bool is_open(int id) {
  std::lock_guard lock(registry_mutex);
  return registry.count(id) > 0;
}

bool close_store(int id) {
  std::shared_ptr<Store> last;  // destroyed after the lock is released
  bool none;
  {
    std::lock_guard lock(registry_mutex);
    if (const auto found = registry.find(id); found != registry.end()) {
      last = std::move(found->second);
      registry.erase(found);
    }
    none = registry.empty();
  }
  stash_clear(id);
  return none;
}

}  // namespace kjax
