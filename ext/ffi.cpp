// XLA FFI handlers: buffers in, shapes and types checked, no Python, no copy.
#include "ffi.h"

#include <algorithm>
#include <span>
#include <stdexcept>

#include "adapter_call.h"
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

Tensor tensor(const ffi::AnyBuffer& buffer) {
  const auto dims = buffer.dimensions();
  const ffi::DataType type = buffer.element_type();
  return {buffer.untyped_data(),
          type == ffi::F32   ? Tensor::Type::kFloat32
          : type == ffi::U32 ? Tensor::Type::kUint32
                             : Tensor::Type::kOther,
          {dims.begin(), dims.size()}};
}

class Arrays : public AdapterArrays {
 public:
  explicit Arrays(const ffi::RemainingArgs& operands, ffi::RemainingRets* results = nullptr)
      : operands_(operands), results_(results) {}

  Tensor operand(size_t i) const override {
    const auto found = operands_.get<ffi::AnyBuffer>(i);
    if (!found.has_value()) refuse("adapters", "two operands for each adapted projection, and the seed of dropout");
    return tensor(*found);
  }
  float* result(size_t i, std::span<const int64_t> shape) override {
    auto found = results_->get<ffi::AnyBuffer>(i);
    const Tensor given = found.has_value() ? tensor(**found) : Tensor{};
    if (given.type != Tensor::Type::kFloat32 || !std::ranges::equal(given.shape, shape))
      refuse("the adapters' results", "float32, a gradient like each factor or one number");
    return static_cast<float*>(const_cast<void*>(given.data));
  }
  size_t operand_count() const override { return operands_.size(); }
  size_t result_count() const override { return results_->size(); }

 private:
  const ffi::RemainingArgs& operands_;
  ffi::RemainingRets* const results_;
};

AdapterSetting setting(ffi::Span<const float> scales, double dropout, int64_t host) {
  return {{scales.begin(), scales.size()}, dropout, host};
}

ffi::Error forward(int64_t store, int64_t keep, ffi::Span<const float> scales, double dropout, int64_t host,
                   ffi::AnyBuffer layer, ffi::AnyBuffer x, ffi::AnyBuffer idx, ffi::AnyBuffer gate,
                   ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> y, ffi::Result<ffi::AnyBuffer> slip) {
  return guarded([&] {
    Call call = make_call(store, layer, x, idx, gate);
    check("y", *y, x.element_type(), {call.tokens, call.width}, "like x");
    check("slip", *slip, ffi::S32, {}, "an int32 scalar");
    Arrays arrays(more);
    const AdapterCall adapters(call, setting(scales, dropout, host), arrays);
    *slip->typed_data<int32_t>() = experts_forward(call, keep != 0, y->untyped_data());
  });
}

ffi::Error backward(int64_t store, ffi::Span<const float> scales, double dropout, int64_t host, ffi::AnyBuffer layer,
                    ffi::AnyBuffer slip, ffi::AnyBuffer x, ffi::AnyBuffer idx, ffi::AnyBuffer gate, ffi::AnyBuffer dy,
                    ffi::RemainingArgs more, ffi::Result<ffi::AnyBuffer> dx, ffi::Result<ffi::AnyBuffer> dgate,
                    ffi::RemainingRets results) {
  return guarded([&] {
    Call call = make_call(store, layer, x, idx, gate);
    check("dy", dy, x.element_type(), {call.tokens, call.width}, "like x");
    check("dx", *dx, x.element_type(), {call.tokens, call.width}, "like x");
    check("dgate", *dgate, ffi::F32, {call.tokens, call.per_token}, "float32 with idx's shape");
    Arrays arrays(more, &results);
    AdapterCall adapters(call, setting(scales, dropout, host), arrays);
    const AdapterGradients gradients = adapters.gradients();
    experts_backward(call, scalar("slip", slip), dy.untyped_data(), dx->untyped_data(), dgate->typed_data<float>(),
                     gradients);
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
