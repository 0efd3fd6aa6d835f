// Factors in, gradients out, the same for every transport.
#include "adapter_call.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <string>

#include "text.h"

namespace kjax {
namespace {

using Shape = std::array<int64_t, 3>;

std::string listed(std::span<const int64_t> shape) {
  std::string out;
  for (int64_t n : shape) out += text(out.empty() ? "" : ", ", n);
  return out;
}

void check(const char* name, const Tensor& tensor, Tensor::Type type, std::span<const int64_t> shape) {
  const char* const wanted = type == Tensor::Type::kFloat32 ? "float32" : "uint32";
  if (tensor.type != type) throw std::invalid_argument(text("kjax experts: ", name, " must be ", wanted));
  if (!std::ranges::equal(tensor.shape, shape))
    throw std::invalid_argument(
        text("kjax experts: ", name, " has shape [", listed(tensor.shape), "], expected [", listed(shape), "]"));
}

Shape shape_of_a(const Store& store, int p, int64_t rank) {
  return {store.experts, rank, p == kDown ? store.hidden : store.width};
}
Shape shape_of_b(const Store& store, int p, int64_t rank) {
  return {store.experts, p == kDown ? store.width : store.hidden, rank};
}

}  // namespace

AdapterCall::AdapterCall(Call& call, const AdapterSetting& setting, AdapterArrays& arrays)
    : store_(find_store(call.store)), layer_(call.layer), arrays_(arrays) {
  if (setting.scales.size() != kProjections)
    throw std::invalid_argument("kjax experts: the adapters' scales must be three numbers");
  if (!(setting.dropout >= 0 && setting.dropout < 1))
    throw std::invalid_argument(text("kjax experts: dropout ", setting.dropout, " is not in [0, 1)"));
  if (setting.host >= 0) {
    host_ = find_host_adapters(setting.host);
    adapters_ = host_->of_layer(*store_, call.layer);
  }
  size_t next = 0;
  for (int p = 0; p < kProjections; ++p) {
    Factors& f = adapters_.of[p];
    f.scale = setting.scales[p];
    if (host_ && (f.rank > 0) != std::isfinite(f.scale))
      throw std::invalid_argument(text("kjax experts: of the adapters on the host, that of ", kProjectionNames[p],
                                       " has ", f.rank ? "no scale" : "a scale but no factors"));
    if (host_ || !std::isfinite(f.scale)) continue;
    const Tensor a = arrays.operand(next++), b = arrays.operand(next++);
    f.rank = a.shape.size() == 3 ? a.shape[1] : 1;
    if (f.rank < 1) throw std::invalid_argument("kjax experts: lora_A has rank 0");
    check("lora_A", a, Tensor::Type::kFloat32, shape_of_a(*store_, p, f.rank));
    check("lora_B", b, Tensor::Type::kFloat32, shape_of_b(*store_, p, f.rank));
    f.a = static_cast<const float*>(a.data);
    f.b = static_cast<const float*>(b.data);
  }
  if (setting.dropout > 0) {
    const Tensor seed = arrays.operand(next++);
    check("the seed of dropout", seed, Tensor::Type::kUint32, std::array<int64_t, 1>{2});
    adapters_.dropout = setting.dropout;
    std::copy_n(static_cast<const uint32_t*>(seed.data), 2, adapters_.seed);
  }
  if (const size_t given = arrays.operand_count(); given != next)
    throw std::invalid_argument(text("kjax experts: ", given, " arrays for the adapters instead of ", next));
  call.adapters = &adapters_;
}

AdapterGradients AdapterCall::gradients() {
  AdapterGradients gradients;
  size_t next = 0;
  if (host_) {
    gradients = host_->gradients_of_layer(layer_);
    gradients.grown = arrays_.result(next++, {});
  } else {
    gradients.fresh = true;
    for (int p = 0; p < kProjections; ++p)
      if (const int64_t rank = adapters_.of[p].rank) {
        gradients.a[p] = arrays_.result(next++, shape_of_a(*store_, p, rank));
        gradients.b[p] = arrays_.result(next++, shape_of_b(*store_, p, rank));
      }
  }
  if (const size_t given = arrays_.result_count(); given != next)
    throw std::invalid_argument(text("kjax experts: ", given, " results of the adapters instead of ", next));
  return gradients;
}

}  // namespace kjax
