// The module kjax._ext: arguments in, GIL released, exceptions out; no arithmetic.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <set>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "adapters.h"
#include "decode_cost.h"
#include "dispatch.h"
#include "experts.h"
#include "ffi.h"
#include "mapped.h"
#include "memory.h"
#include "numa.h"
#include "stash.h"
#include "store.h"
#include "text.h"
#include "threads.h"

namespace nb = nanobind;

namespace kjax {
namespace {

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Writable = nb::ndarray<nb::device::cpu>;

// The array's memory after checking its type, shape (-1: any) and contiguity.
template <class T>
const T* data(const char* name, const Array& array, std::initializer_list<int64_t> shape) {
  if (array.dtype() != nb::dtype<T>())
    throw std::invalid_argument(
        text(name, " must be ",
             nb::dtype<T>().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)  ? "float"
             : nb::dtype<T>().code == static_cast<uint8_t>(nb::dlpack::dtype_code::UInt) ? "uint"
                                                                                         : "int",
             sizeof(T) * 8));
  bool fits = array.ndim() == shape.size();
  int64_t stride = 1;
  for (size_t i = array.ndim(); fits && i-- > 0;) {
    const int64_t want = *(shape.begin() + i);
    fits = want < 0 || static_cast<int64_t>(array.shape(i)) == want;
    if (array.size() > 0 && array.shape(i) > 1 && array.stride(i) != stride)
      throw std::invalid_argument(text(name, " must be C-contiguous"));
    stride *= static_cast<int64_t>(array.shape(i));
  }
  if (!fits) {
    std::string wanted, got;
    for (int64_t n : shape) wanted += text(wanted.empty() ? "" : ", ", n < 0 ? std::string("any") : std::to_string(n));
    for (size_t i = 0; i < array.ndim(); ++i) got += text(i ? ", " : "", array.shape(i));
    throw std::invalid_argument(text(name, " has shape [", got, "], expected [", wanted, "]"));
  }
  return static_cast<const T*>(array.data());
}

// bf16 travels as uint16.
Dtype number_type(const char* name, const Array& array) {
  if (array.dtype() == nb::dtype<uint16_t>()) return Dtype::kBf16;
  if (array.dtype() == nb::dtype<float>()) return Dtype::kFp32;
  throw std::invalid_argument(text(name, " must be uint16 (the bits of bfloat16) or float32"));
}

const void* numbers(const char* name, const Array& array, Dtype type, std::initializer_list<int64_t> shape) {
  if (type == Dtype::kBf16) return data<uint16_t>(name, array, shape);
  return data<float>(name, array, shape);
}

// A new numpy array and its memory.
struct Fresh {
  nb::object array;
  void* data;
};
Fresh fresh(nb::dlpack::dtype type, std::initializer_list<size_t> shape) {
  size_t bytes = type.bits / 8;
  for (size_t n : shape) bytes *= n;
  auto memory = std::make_unique<uint8_t[]>(bytes);
  void* const data = memory.get();
  nb::capsule owner(memory.release(), [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  nb::ndarray<nb::numpy> array(data, shape, owner, {}, type);
  return {nb::cast(array), data};
}
nb::dlpack::dtype dtype_of(Dtype type) { return type == Dtype::kBf16 ? nb::dtype<uint16_t>() : nb::dtype<float>(); }

Call make_call(int64_t store, int64_t layer, const Array& x, const Array& idx, const Array& gate) {
  const Dtype type = number_type("x", x);
  const void* rows = numbers("x", x, type, {-1, -1});
  const int64_t tokens = static_cast<int64_t>(x.shape(0));
  const int32_t* routes = data<int32_t>("idx", idx, {tokens, -1});
  const int64_t per_token = static_cast<int64_t>(idx.shape(1));
  return {store,
          layer,
          tokens,
          static_cast<int64_t>(x.shape(1)),
          per_token,
          type,
          rows,
          routes,
          data<float>("gate", gate, {tokens, per_token})};
}

// The adapters of a call: (factors per projection, None or (lora_A, lora_B); scales; dropout; seed or None; the handle of
// adapters on the host or -1), or None.
struct Operands {
  Adapters adapters;
  std::shared_ptr<HostAdapters> host;
  std::vector<Array> held;  // the factors

  Operands(const Call& call, nb::handle given) {
    if (given.is_none()) return;
    const std::shared_ptr<const Store> store = find_store(call.store);
    const auto [factors, scales, dropout, seed, handle] =
        nb::cast<std::tuple<nb::list, std::vector<float>, double, nb::object, int64_t>>(given);
    if (nb::len(factors) != kProjections || scales.size() != kProjections)
      throw std::invalid_argument("adapters: expected factors and scales of three projections");
    if (handle >= 0) {
      host = find_host_adapters(handle);
      adapters = host->of_layer(*store, call.layer);
    }
    for (int p = 0; p < kProjections; ++p) {
      Factors& f = adapters.of[p];
      f.scale = scales[p];
      if (handle >= 0 || factors[p].is_none()) continue;
      const auto [a, b] = nb::cast<std::pair<Array, Array>>(factors[p]);
      const int64_t in = p == kDown ? store->hidden : store->width, out = p == kDown ? store->width : store->hidden;
      f.a = data<float>("lora_A", a, {store->experts, -1, in});
      f.rank = static_cast<int64_t>(a.shape(1));
      if (f.rank < 1) throw std::invalid_argument("lora_A has rank 0");
      f.b = data<float>("lora_B", b, {store->experts, out, f.rank});
      held.insert(held.end(), {a, b});
    }
    if (dropout > 0) {
      adapters.dropout = dropout;
      std::copy_n(data<uint32_t>("seed", nb::cast<Array>(seed), {2}), 2, adapters.seed);
    }
  }
};

nb::object forward(int64_t store, int64_t layer, const Array& x, const Array& idx, const Array& gate, bool keep,
                   nb::object adapters) {
  Call call = make_call(store, layer, x, idx, gate);
  const Operands operands(call, adapters);
  call.adapters = &operands.adapters;
  const Fresh y = fresh(dtype_of(call.dtype), {x.shape(0), x.shape(1)});
  int32_t slip;
  {
    nb::gil_scoped_release release;
    slip = experts_forward(call, keep, y.data);
  }
  return nb::make_tuple(y.array, slip);
}

nb::object backward(int64_t store, int64_t layer, int32_t slip, const Array& x, const Array& idx, const Array& gate,
                    const Array& dy, nb::object adapters) {
  Call call = make_call(store, layer, x, idx, gate);
  const Operands operands(call, adapters);
  call.adapters = &operands.adapters;
  const void* const cotangent = numbers("dy", dy, call.dtype, {call.tokens, call.width});
  const Fresh dx = fresh(dtype_of(call.dtype), {x.shape(0), x.shape(1)});
  const Fresh dgate = fresh(nb::dtype<float>(), {idx.shape(0), idx.shape(1)});
  nb::list more;
  AdapterGradients gradients;
  double before = 0;
  if (operands.host) {
    gradients = operands.host->gradients_of_layer(call.layer);
    before = *gradients.squares;
  } else {
    size_t next = 0;
    for (int p = 0; p < kProjections; ++p)
      if (operands.adapters.of[p].rank)
        for (float** const at : {&gradients.a[p], &gradients.b[p]}) {
          const Array& like = operands.held[next++];
          const Fresh made = fresh(nb::dtype<float>(), {like.shape(0), like.shape(1), like.shape(2)});
          *at = static_cast<float*>(made.data);
          std::fill_n(*at, like.size(), 0.0f);
          more.append(made.array);
        }
  }
  {
    nb::gil_scoped_release release;
    experts_backward(call, slip, cotangent, dx.data, static_cast<float*>(dgate.data), gradients);
  }
  if (operands.host) more.append(nb::float_(*gradients.squares - before));
  return nb::make_tuple(dx.array, dgate.array, more);
}

thread_local bool holds_gil = false;  // set where a store's Python objects may be let go of at once

// Lets go of a Python object from any thread: the last call over a closed store may end on one of XLA's.
void release_object(PyObject* object) {
  if (!Py_IsInitialized()) return;
  const auto release = [](void* held) {
    Py_DECREF(static_cast<PyObject*>(held));
    return 0;
  };
  if (holds_gil) release(object);
  else Py_AddPendingCall(release, object);
}

// Python's side of a store: the open handle.
class Handle {
 public:
  Handle(int layers, int experts, int64_t width, int64_t hidden, const std::string& format) {
    chosen();  // an unusable KJAX_ISA or KJAX_THREADS shows here, before anything is mapped
    thread_count();
    store_ = std::make_shared<Store>(layers, experts, width, hidden, parse_format(format));
    kept_ = std::shared_ptr<PyObject>(nb::list().release().ptr(), release_object);
    id_ = register_store(store_);
  }
  ~Handle() { close(); }
  Handle(const Handle&) = delete;

  int id() const { return store_ ? id_ : -1; }
  void close() {
    if (!store_) return;
    holds_gil = true;
    store_.reset();
    kept_.reset();
    if (close_store(id_)) release_workspace();
    holds_gil = false;
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

  int add_file(const std::string& path) {
    const auto file = std::make_shared<MappedFile>(path);
    return get().add_buffer(std::shared_ptr<const uint8_t>(file, file->data()), file->size());
  }

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

// Python's side of adapters that stay on the host.
class HostHandle {
 public:
  HostHandle(int layers, int experts, int64_t width, int64_t hidden)
      : layers_(layers), experts_(experts), width_(width), hidden_(hidden), id_(open_host_adapters()) {}
  ~HostHandle() { close(); }
  HostHandle(const HostHandle&) = delete;

  int id() const { return id_; }
  void close() {
    holds_gil = true;
    close_host_adapters(id_);
    holds_gil = false;
  }
  void release() { rebind(nullptr); }

  // arrays: per projection None or (lora_A [L, E, R, in], lora_B [L, E, out, R], and their gradients, writable).
  void bind(nb::list arrays) {
    if (nb::len(arrays) != kProjections) throw std::invalid_argument("expected the arrays of three projections");
    auto made = std::make_shared<HostAdapters>();
    made->layers = layers_;
    made->experts = experts_;
    made->width = width_;
    made->hidden = hidden_;
    made->squares.assign(layers_, 0.0);
    for (int p = 0; p < kProjections; ++p) {
      if (arrays[p].is_none()) continue;
      const auto [a, b, da, db] = nb::cast<std::tuple<Array, Array, std::optional<Writable>, std::optional<Writable>>>(arrays[p]);
      const int64_t in = p == kDown ? hidden_ : width_, out = p == kDown ? width_ : hidden_;
      Factors& f = made->first[p];
      f.a = data<float>("lora_A", a, {layers_, experts_, -1, in});
      f.rank = static_cast<int64_t>(a.shape(2));
      if (f.rank < 1) throw std::invalid_argument("lora_A has rank 0");
      f.b = data<float>("lora_B", b, {layers_, experts_, out, f.rank});
      if (!da || !db) continue;
      made->gradients.a[p] = const_cast<float*>(data<float>("dA", Array(*da), {layers_, experts_, f.rank, in}));
      made->gradients.b[p] = const_cast<float*>(data<float>("dB", Array(*db), {layers_, experts_, out, f.rank}));
    }
    made->kept = std::shared_ptr<PyObject>(arrays.inc_ref().ptr(), release_object);
    rebind(std::move(made));
  }

 private:
  void rebind(std::shared_ptr<HostAdapters> adapters) {
    holds_gil = true;
    bind_host_adapters(id_, std::move(adapters));
    holds_gil = false;
  }

  const int layers_, experts_;
  const int64_t width_, hidden_;
  const int id_;
};

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
  const std::string refused = prefer_node(memory->data(), memory->size(), nodes()[node]);
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

size_t set_stash_budget(std::optional<int64_t> bytes) {
  if (bytes && *bytes < 0) throw std::invalid_argument(text("stash budget ", *bytes, " is negative"));
  if (bytes) stash_set_budget(static_cast<size_t>(*bytes));
  return stash_budget();
}

}  // namespace

NB_MODULE(_ext, m) {
  nb::register_exception_translator([](const std::exception_ptr& error, void*) {
    try {
      std::rethrow_exception(error);
    } catch (const FileLost& lost) {
      PyErr_SetString(nb::module_::import_("kjax.errors").attr("CheckpointError").ptr(), lost.what());
    }
  });
  m.doc() = "SwiGLU experts on the host over checkpoint bytes. Arrays are C-contiguous; bfloat16 travels as uint16.";

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

  nb::class_<HostHandle>(m, "HostAdapters", "Adapters of all routed experts that stay on the host.")
      .def(nb::init<int, int, int64_t, int64_t>(), nb::arg("layers"), nb::arg("experts"), nb::arg("width"),
           nb::arg("hidden"))
      .def("bind", &HostHandle::bind, nb::arg("arrays"),
           "Per projection None or (lora_A [L, E, R, in], lora_B [L, E, out, R], dA or None, dB or None), float32: read, "
           "and added to, "
           "in place until release.")
      .def("release", &HostHandle::release)
      .def("close", &HostHandle::close)
      .def_prop_ro("id", &HostHandle::id);

  m.def("forward", &forward, nb::arg("store"), nb::arg("layer"), nb::arg("x"), nb::arg("idx"), nb::arg("gate"),
        nb::arg("keep"), nb::arg("adapters").none() = nb::none(),
        "x [N, D], idx int32 [N, K] (-1: none), gate float32 [N, K] -> (y [N, D], slip; 0 without keep).");
  m.def("backward", &backward, nb::arg("store"), nb::arg("layer"), nb::arg("slip"), nb::arg("x"), nb::arg("idx"),
        nb::arg("gate"), nb::arg("dy"), nb::arg("adapters").none() = nb::none(),
        "-> (dx [N, D], dgate float32 [N, K], [dA, dB, ...] or [growth of the squares]).");
  m.def("stash_budget", &set_stash_budget, nb::arg("bytes").none() = nb::none(),
        "The stash's limit in bytes, after setting it if given.");
  m.def("stash_stats", [] {
    const StashStats s = kjax::stash_stats();
    nb::dict out;
    out["entries"] = s.entries;
    out["bytes"] = s.bytes;
    out["hits"] = s.hits;
    out["misses"] = s.misses;
    out["evicted"] = s.evicted;
    return out;
  });
  m.def(
      "stash_clear", [](std::optional<int> store) { kjax::stash_clear(store); },
      nb::arg("store_id").none() = nb::none());
  m.def("isa", &isa, "{name, reason, available: {isa: \"\" or why not}}.");
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
  m.def("cancel", &cancel, nb::arg("on"), "Running and later calls fail between tasks until it is switched off.");
  m.def("ffi_targets", [] {
    nb::dict out;
    out["kjax_experts_forward"] = nb::capsule(ffi_forward_handler());
    out["kjax_experts_backward"] = nb::capsule(ffi_backward_handler());
    return out;
  });
}

}  // namespace kjax
