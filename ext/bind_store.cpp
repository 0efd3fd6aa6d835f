// kjax._ext.Store: where a checkpoint's experts lie.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>
#include <vector>

#include "bind.h"
#include "dispatch.h"
#include "experts.h"
#include "mapped.h"
#include "store.h"
#include "threads.h"

namespace kjax {
namespace {

thread_local bool holds_gil = false;

void release_object(PyObject* object) {
  if (!Py_IsInitialized()) return;
  const auto release = [](void* held) {
    Py_DECREF(static_cast<PyObject*>(held));
    return 0;
  };
  if (holds_gil)
    release(object);
  else
    Py_AddPendingCall(release, object);
}

// Python's side of a store: the open handle.
class Handle {
 public:
  Handle(int layers, int experts, int64_t width, int64_t hidden, const std::string& format) {
    chosen();  // an unusable KJAX_ISA or KJAX_THREADS shows here, before anything is mapped
    thread_count();
    store_ = std::make_shared<Store>(layers, experts, width, hidden, parse_format(format));
    kept_ = keep(nb::list());
    id_ = register_store(store_);
  }
  ~Handle() { close(); }
  Handle(const Handle&) = delete;

  int id() const { return store_ ? id_ : -1; }
  void close() {
    if (!store_) return;
    const Holding gil;
    store_.reset();
    kept_.reset();
    if (close_store(id_)) release_workspace();
  }
  Store& get() const {
    if (!store_) throw std::invalid_argument(text("expert store ", id_, " is closed"));
    return *store_;
  }

  int add_buffer(const Array& bytes) {
    const uint8_t* const at = data<uint8_t>("buffer", bytes, {-1});
    Store& store = get();
    nb::borrow<nb::list>(kept_.get()).append(bytes);
    return store.add_buffer(std::shared_ptr<const uint8_t>(kept_, at), bytes.shape(0));
  }

  int add_file(const std::string& path) { return get().add_file(std::make_shared<MappedFile>(path)); }

  void set_nodes(const Array& nodes) { get().set_nodes(data<int32_t>("nodes", nodes, {get().experts})); }

  void place(int layer, int projection, const Array& buffer, const Array& offset,
             const std::optional<Array>& scale_buffer, const std::optional<Array>& scale_offset) {
    Store& store = get();
    if (scale_buffer.has_value() != scale_offset.has_value())
      throw std::invalid_argument("scale_buffer and scale_offset go together");
    store.place(layer, projection, data<int32_t>("buffer", buffer, {store.experts}),
                data<int64_t>("offset", offset, {store.experts}),
                scale_buffer ? data<int32_t>("scale_buffer", *scale_buffer, {store.experts}) : nullptr,
                scale_offset ? data<int64_t>("scale_offset", *scale_offset, {store.experts}) : nullptr);
  }

  nb::object decode(int layer, int expert, int projection) const {
    const std::shared_ptr<Store> store = (get(), store_);
    const bool down = projection == kDown;
    const Fresh out = fresh(nb::dtype<float>(), {static_cast<size_t>(down ? store->width : store->hidden),
                                                 static_cast<size_t>(down ? store->hidden : store->width)});
    {
      nb::gil_scoped_release release;
      store->decode(layer, expert, projection, static_cast<float*>(out.data));
    }
    return out.array;
  }

  nb::list nonfinite(int layer) const {
    const std::shared_ptr<Store> store = (get(), store_);
    std::vector<std::pair<int, int>> found;
    {
      nb::gil_scoped_release release;
      found = store->nonfinite(layer);
    }
    nb::list out;
    for (const auto& [expert, projection] : found) out.append(nb::make_tuple(expert, projection));
    return out;
  }

  nb::dict stats() const {
    const Stats& s = get().stats;
    nb::dict out;
    out["forward"] = s.forward.load();
    out["backward"] = s.backward.load();
    out["recomputed"] = s.recomputed.load();
    out["tokens"] = s.tokens.load();
    out["routes"] = s.routes.load();
    out["forward_seconds"] = s.forward_ns.load() * 1e-9;
    out["backward_seconds"] = s.backward_ns.load() * 1e-9;
    return out;
  }
  void reset_stats() const {
    Stats& s = get().stats;
    for (auto* counter : {&s.forward, &s.backward, &s.recomputed, &s.tokens, &s.routes, &s.forward_ns, &s.backward_ns})
      *counter = 0;
  }

 private:
  std::shared_ptr<Store> store_;
  std::shared_ptr<PyObject> kept_;  // a list of the buffers, shared with the store's own references to their memory
  int id_ = -1;
};

}  // namespace

std::shared_ptr<PyObject> keep(nb::object object) { return {object.release().ptr(), release_object}; }
Holding::Holding() { holds_gil = true; }
Holding::~Holding() { holds_gil = false; }

void bind_store(nb::module_& m) {
  nb::class_<Handle>(m, "Store",
                     "Where the expert projections of every layer lie; format is bf16, fp32, fp8_block, fp8_channel, "
                     "int4_group32 or int8_group128.")
      .def(nb::init<int, int, int64_t, int64_t, const std::string&>(), nb::arg("layers"), nb::arg("experts"),
           nb::arg("width"), nb::arg("hidden"), nb::arg("format"))
      .def("add_buffer", &Handle::add_buffer, nb::arg("bytes"),
           "Keeps a reference to a uint8 array and returns its number; nothing is copied.")
      .def("add_file", &Handle::add_file, nb::arg("path"),
           "Maps a file and returns its number as a buffer. Calls that read what the file has lost raise an error.")
      .def("set_nodes", &Handle::set_nodes, nb::arg("nodes"),
           "int32 [E]: the memory node of each expert, an index into nodes(); a hint for which thread reads it.")
      .def("place", &Handle::place, nb::arg("layer"), nb::arg("projection"), nb::arg("buffer"), nb::arg("offset"),
           nb::arg("scale_buffer").none() = nb::none(), nb::arg("scale_offset").none() = nb::none(),
           "Projection 0 (gate), 1 (up) or 2 (down) of all experts of a layer: int32 [E] buffers, int64 [E] byte "
           "offsets.")
      .def("decode", &Handle::decode, nb::arg("layer"), nb::arg("expert"), nb::arg("projection"),
           "One projection as float32 [rows, cols].")
      .def("nonfinite", &Handle::nonfinite, nb::arg("layer"), "[(expert, projection)] that hold a NaN or an infinity.")
      .def("stats", &Handle::stats)
      .def("reset_stats", &Handle::reset_stats)
      .def("close", &Handle::close)
      .def_prop_ro("id", &Handle::id);
}

}  // namespace kjax
