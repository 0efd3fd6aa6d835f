// The adapters of one call as its transport brings them: arrays beside x, idx and gate, or a handle of those that stay
// on the host; and where the gradients of a backward call go.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "adapters.h"
#include "experts.h"

namespace kjax {

// A contiguous array of a transport.
struct Tensor {
  enum class Type { kFloat32, kUint32, kOther };
  const void* data = nullptr;
  Type type = Type::kOther;
  std::span<const int64_t> shape;
};

// The arrays of a call that concern its adapters, in order: lora_A [E, R, in] and lora_B [E, out, R] of each adapted
// projection unless they stay on the host, then the seed of dropout, uint32 [2]. Results: a gradient like each factor; or
// one number.
class AdapterArrays {
 public:
  virtual Tensor operand(size_t i) const = 0;  // throws where there are fewer
  virtual float* result(size_t i, std::span<const int64_t> shape) = 0;  // fp32 of this shape, not cleared
  virtual size_t operand_count() const = 0;
  virtual size_t result_count() const = 0;  // of those that are made when asked for: so far

 protected:
  ~AdapterArrays() = default;
};

// What a call says of adapters beside arrays.
struct AdapterSetting {
  std::span<const float> scales;  // per projection; not finite: no adapter
  double dropout;                 // below 1; 0: no seed among the operands
  int64_t host;  // the handle of adapters that stay on the host, or -1
};

class AdapterCall {
 public:
  // Checks everything; the call gets its adapters for as long as this lives.
  AdapterCall(Call& call, const AdapterSetting& setting, AdapterArrays& arrays);
  AdapterCall(const AdapterCall&) = delete;

  // Where the backward call adds or leaves the gradients: in the results, or beside the factors on the host, where the
  // result is by how much the call has made the sum of the squares of the layer's gradients grow.
  AdapterGradients gradients();

 private:
  const std::shared_ptr<const Store> store_;
  const int64_t layer_;
  AdapterArrays& arrays_;
  Adapters adapters_;
  std::shared_ptr<HostAdapters> host_;
};

}  // namespace kjax
