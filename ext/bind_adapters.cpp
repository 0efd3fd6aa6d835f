// kjax._ext.HostAdapters: adapters of all layers' routed experts in arrays that stay on the host.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>

#include <optional>
#include <stdexcept>
#include <tuple>

#include "adapters.h"
#include "bind.h"

namespace kjax {
namespace {

// Python's side of adapters that stay on the host.
class HostHandle {
 public:
  HostHandle(int layers, int experts, int64_t width, int64_t hidden)
      : layers_(layers), experts_(experts), width_(width), hidden_(hidden), id_(open_host_adapters()) {}
  ~HostHandle() { close(); }
  HostHandle(const HostHandle&) = delete;

  int id() const { return id_; }
  void close() {
    const Holding gil;
    close_host_adapters(id_);
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
    made->kept = keep(arrays);
    rebind(std::move(made));
  }

 private:
  void rebind(std::shared_ptr<HostAdapters> adapters) {
    const Holding gil;
    bind_host_adapters(id_, std::move(adapters));
  }

  const int layers_, experts_;
  const int64_t width_, hidden_;
  const int id_;
};

}  // namespace

void bind_adapters(nb::module_& m) {
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
}

}  // namespace kjax
