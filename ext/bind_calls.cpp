// kjax._ext.forward and backward over numpy arrays, the handlers that XLA calls instead, and the stash between calls.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <optional>
#include <span>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "adapter_call.h"
#include "bind.h"
#include "experts.h"
#include "ffi.h"
#include "stash.h"
#include "threads.h"
#include "workspace.h"

namespace kjax {
namespace {

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

// (arrays, scales, dropout, handle of adapters on the host or -1), or None; results are new arrays.
class Arrays : public AdapterArrays {
 public:
  Arrays(Call& call, nb::handle given) {
    if (given.is_none()) return;
    std::tie(operands_, scales_, dropout_, host_) =
        nb::cast<std::tuple<std::vector<Array>, std::vector<float>, double, int64_t>>(given);
    adapters.emplace(call, AdapterSetting{scales_, dropout_, host_}, *this);
  }

  Tensor operand(size_t i) const override {
    if (i >= operands_.size()) throw std::invalid_argument("adapters: too few arrays");
    const Array& array = operands_[i];
    const bool is_float = array.dtype() == nb::dtype<float>();
    require_contiguous("a factor", array);
    return {array.data(),
            is_float                                 ? Tensor::Type::kFloat32
            : array.dtype() == nb::dtype<uint32_t>() ? Tensor::Type::kUint32
                                                     : Tensor::Type::kOther,
            {array.shape_ptr(), array.ndim()}};
  }
  float* result(size_t, std::span<const int64_t> shape) override {
    const Fresh made = fresh(nb::dtype<float>(), {shape.begin(), shape.end()});
    made_.append(made.array);
    return static_cast<float*>(made.data);
  }
  size_t operand_count() const override { return operands_.size(); }
  size_t result_count() const override { return made_.size(); }
  const nb::list& made() const { return made_; }

  std::optional<AdapterCall> adapters;

 private:
  nb::list made_;
  std::vector<Array> operands_;
  std::vector<float> scales_;
  double dropout_ = 0;
  int64_t host_ = -1;
};

nb::object forward(int64_t store, int64_t layer, const Array& x, const Array& idx, const Array& gate, bool keep,
                   nb::object adapters) {
  Call call = make_call(store, layer, x, idx, gate);
  const Arrays arrays(call, adapters);
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
  Arrays arrays(call, adapters);
  const void* const cotangent = numbers("dy", dy, call.dtype, {call.tokens, call.width});
  const Fresh dx = fresh(dtype_of(call.dtype), {x.shape(0), x.shape(1)});
  const Fresh dgate = fresh(nb::dtype<float>(), {idx.shape(0), idx.shape(1)});
  const AdapterGradients gradients = arrays.adapters ? arrays.adapters->gradients() : AdapterGradients{};
  {
    nb::gil_scoped_release release;
    experts_backward(call, slip, cotangent, dx.data, static_cast<float*>(dgate.data), gradients);
  }
  return nb::make_tuple(dx.array, dgate.array, arrays.made());
}

size_t set_stash_budget(std::optional<int64_t> bytes) {
  if (bytes && *bytes < 0) throw std::invalid_argument(text("stash budget ", *bytes, " is negative"));
  if (bytes) stash_set_budget(static_cast<size_t>(*bytes));
  return stash_budget();
}

}  // namespace

void bind_calls(nb::module_& m) {
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
    out["spare"] = s.spare;
    out["hits"] = s.hits;
    out["misses"] = s.misses;
    out["evicted"] = s.evicted;
    return out;
  });
  m.def(
      "stash_clear", [](std::optional<int> store) { kjax::stash_clear(store); },
      nb::arg("store_id").none() = nb::none());
  m.def(
      "set_row_memory", [](size_t bytes) { row_memory = bytes; }, nb::arg("bytes"),
      "Another bound on the rows a call has in memory, for each thread: for tests, results do not depend on it.");
  m.def("cancel", &cancel, nb::arg("on"), "Running and later calls fail between tasks until it is switched off.");
  m.def("ffi_targets", [] {
    nb::dict out;
    out["kjax_experts_forward"] = nb::capsule(ffi_forward_handler());
    out["kjax_experts_backward"] = nb::capsule(ffi_backward_handler());
    return out;
  });
}

}  // namespace kjax
