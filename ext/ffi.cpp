// XLA FFI handlers: buffers in, shapes and types checked, no Python, no copy.
#include "ffi.h"

#include <algorithm>
#include <memory>
#include <stdexcept>

#include "adapters.h"
#include "experts.h"
#include "text.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace kjax {
namespace {

namespace ffi = xla::ffi;

[[noreturn]] void refuse(const char* name, const char* wanted) {
  throw std::invalid_argument(text("kjax experts: ", name, " must be ", wanted));
}

void check(const char* name, const ffi::AnyBuffer& buffer, ffi::DataType type, std::initializer_list<int64_t> shape,
           const char* wanted) {
  const auto dims = buffer.dimensions();
  if (buffer.element_type() != type || dims.size() != shape.size() ||
      !std::equal(shape.begin(), shape.end(), dims.begin()))
    refuse(name, wanted);
}

int32_t scalar(const char* name, const ffi::AnyBuffer& buffer) {
  check(name, buffer, ffi::S32, {}, "an int32 scalar");
  return *buffer.typed_data<int32_t>();
}

Call make_call(int64_t store, const ffi::AnyBuffer& layer, const ffi::AnyBuffer& x, const ffi::AnyBuffer& idx,
               const ffi::AnyBuffer& gate) {
  const auto rows = x.dimensions(), routes = idx.dimensions();
  const ffi::DataType type = x.element_type();
  if (rows.size() != 2 || (type != ffi::BF16 && type != ffi::F32)) refuse("x", "bfloat16 or float32 [N, D]");
  if (routes.size() != 2) refuse("idx", "int32 [N, K] with x's N");
  check("idx", idx, ffi::S32, {rows[0], routes[1]}, "int32 [N, K] with x's N");
  check("gate", gate, ffi::F32, {rows[0], routes[1]}, "float32 with idx's shape");
  return {store,
          scalar("layer", layer),
          rows[0],
          rows[1],
          routes[1],
          type == ffi::F32 ? Dtype::kFp32 : Dtype::kBf16,
          x.untyped_data(),
          idx.typed_data<int32_t>(),
          gate.typed_data<float>()};
}

// Exceptions end here: beyond lies XLA, which knows none.
template <class F>
ffi::Error guarded(F body) {
  try {
    body();
    return ffi::Error::Success();
  } catch (const std::invalid_argument& error) {
    return ffi::Error(ffi::ErrorCode::kInvalidArgument, error.what());
  } catch (const Cancelled& error) {
    return ffi::Error(ffi::ErrorCode::kCancelled, error.what());
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "kjax experts: out of memory");
  } catch (const std::exception& error) {
    return ffi::Error(ffi::ErrorCode::kInternal, error.what());
  }
}

// What a call says of adapters beside its factors: attributes of the compiled function.
struct Setting {
  ffi::Span<const float> scales;  // per projection; 0: no adapter
  double dropout;
  int64_t host;  // the handle of adapters that stay on the host, or -1: the factors are operands
};

// Factors [E, R, in] and [E, out, R] of each adapted projection, or nothing for those on the host, then the seed.
struct Operands {
  Adapters adapters;
  std::shared_ptr<HostAdapters> host;

  Operands(const Call& call, const Setting& setting, const ffi::RemainingArgs& more) {
    const std::shared_ptr<const Store> store = find_store(call.store);
    if (setting.scales.size() != kProjections) refuse("scales", "three numbers");
    size_t next = 0;
    if (setting.host >= 0) {
      host = find_host_adapters(setting.host);
      adapters = host->of_layer(*store, call.layer);
    }
    for (int p = 0; p < kProjections; ++p) {
      Factors& f = adapters.of[p];
      if (setting.host < 0 && setting.scales[p] != 0) {
        const ffi::AnyBuffer a = operand(more, next++), b = operand(more, next++);
        const int64_t in = p == kDown ? store->hidden : store->width, out = p == kDown ? store->width : store->hidden;
        f.rank = a.dimensions().size() == 3 ? a.dimensions()[1] : 0;
        if (f.rank < 1) refuse("lora_A", "float32 [E, R, in]");
        check("lora_A", a, ffi::F32, {store->experts, f.rank, in}, "float32 [E, R, in]");
        check("lora_B", b, ffi::F32, {store->experts, out, f.rank}, "float32 [E, out, R] with the rank of lora_A");
        f.a = a.typed_data<float>();
        f.b = b.typed_data<float>();
      }
      f.scale = setting.scales[p];
    }
    if (setting.dropout > 0) {
      const ffi::AnyBuffer seed = operand(more, next);
      check("seed", seed, ffi::U32, {2}, "uint32 [2]");
      adapters.dropout = setting.dropout;
      std::copy_n(seed.typed_data<uint32_t>(), 2, adapters.seed);
    }
  }

  static ffi::AnyBuffer operand(const ffi::RemainingArgs& more, size_t i) {
    const auto found = more.get<ffi::AnyBuffer>(i);
    if (!found.has_value()) refuse("adapters", "two operands for each adapted projection, and the seed of dropout");
    return *found;
  }
};

ffi::Error forward(int64_t store, int64_t keep, ffi::Span<const float> scales, double dropout, int64_t host,
                   ffi::AnyBuffer layer, ffi::AnyBuffer x, ffi::AnyBuffer idx, ffi::AnyBuffer gate,
                   ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> slip) {
  return guarded([&] {
    Call call = make_call(store, layer, x, idx, gate);
    check("y", *y, x.element_type(), {call.tokens, call.width}, "like x");
    check("slip", *slip, ffi::S32, {}, "an int32 scalar");
    const Operands operands(call, {scales, dropout, host}, more);
    call.adapters = &operands.adapters;
    *slip->typed_data<int32_t>() = experts_forward(call, keep != 0, y->untyped_data());
  });
}

// Results after dx and dgate: dA and dB of each adapted projection; or, of adapters on the host, by how much the call has
// made the sum of the squares of the layer's gradients grow.
ffi::Error backward(int64_t store, ffi::Span<const float> scales, double dropout, int64_t host, ffi::AnyBuffer layer,
                    ffi::AnyBuffer slip, ffi::AnyBuffer x, ffi::AnyBuffer idx, ffi::AnyBuffer gate, ffi::AnyBuffer dy,
                    ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dgate,
                    ffi::RemainingRets results) {
  return guarded([&] {
    Call call = make_call(store, layer, x, idx, gate);
    check("dy", dy, x.element_type(), {call.tokens, call.width}, "like x");
    check("dx", *dx, x.element_type(), {call.tokens, call.width}, "like x");
    check("dgate", *dgate, ffi::F32, {call.tokens, call.per_token}, "float32 with idx's shape");
    const Operands operands(call, {scales, dropout, host}, more);
    call.adapters = &operands.adapters;
    const auto result = [&](size_t i) {
      auto found = results.get<ffi::AnyBuffer>(i);
      if (!found.has_value() || (**found).element_type() != ffi::F32) refuse("the adapters' gradients", "float32");
      return ffi::AnyBuffer(**found);
    };
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
            ffi::AnyBuffer given = result(next++);
            const auto wanted = Operands::operand(more, next - 1).dimensions();
            if (!std::equal(wanted.begin(), wanted.end(), given.dimensions().begin(), given.dimensions().end()))
              refuse("the adapters' gradients", "like the factors");
            *at = given.typed_data<float>();
            std::fill_n(*at, given.element_count(), 0.0f);
          }
    }
    experts_backward(call, scalar("slip", slip), dy.untyped_data(), dx->untyped_data(), dgate->typed_data<float>(),
                     gradients);
    if (operands.host) {
      ffi::AnyBuffer grown = result(0);
      if (grown.element_count() != 1) refuse("the squares' growth", "a float32 scalar");
      *grown.typed_data<float>() = static_cast<float>(*gradients.squares - before);
    }
  });
}

XLA_FFI_DEFINE_HANDLER(kForward, forward,
                       ffi::Ffi::Bind()
                           .Attr<int64_t>("store")
                           .Attr<int64_t>("keep")
                           .Attr<ffi::Span<const float>>("scales")
                           .Attr<double>("dropout")
                           .Attr<int64_t>("host")
                           .Arg<ffi::AnyBuffer>()    // layer
                           .Arg<ffi::AnyBuffer>()    // x
                           .Arg<ffi::AnyBuffer>()    // idx
                           .Arg<ffi::AnyBuffer>()    // gate
                           .RemainingArgs()          // adapters
                           .Ret<ffi::AnyBuffer>()    // y
                           .Ret<ffi::AnyBuffer>());  // slip

XLA_FFI_DEFINE_HANDLER(kBackward, backward,
                       ffi::Ffi::Bind()
                           .Attr<int64_t>("store")
                           .Attr<ffi::Span<const float>>("scales")
                           .Attr<double>("dropout")
                           .Attr<int64_t>("host")
                           .Arg<ffi::AnyBuffer>()  // layer
                           .Arg<ffi::AnyBuffer>()  // slip
                           .Arg<ffi::AnyBuffer>()  // x
                           .Arg<ffi::AnyBuffer>()  // idx
                           .Arg<ffi::AnyBuffer>()  // gate
                           .Arg<ffi::AnyBuffer>()  // dy
                           .RemainingArgs()        // adapters
                           .Ret<ffi::AnyBuffer>()  // dx
                           .Ret<ffi::AnyBuffer>()  // dgate
                           .RemainingRets());      // of the adapters

}  // namespace

void* ffi_forward_handler() { return reinterpret_cast<void*>(+kForward); }
void* ffi_backward_handler() { return reinterpret_cast<void*>(+kBackward); }

}  // namespace kjax
