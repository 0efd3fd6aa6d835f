// Portable kernels: groups of four floats in plain C++, for CPUs without AVX2 and for other architectures.
#include <utility>

#include "kernels.h"

namespace kjax {
namespace {

constexpr int kLanes = 4, kRows = 4, kVectors = 2;
constexpr int64_t kDepth = 256, kWidth = kLine;
struct V {
  float lane[kLanes];
};

template <class Op>
inline V map(Op op) {
  V out;
  for (int i = 0; i < kLanes; ++i) out.lane[i] = op(i);
  return out;
}
inline V set1(float x) {
  return map([&](int) { return x; });
}
inline V load(const float* p) {  // from any address: pairs of bf16 pass as floats
  V out;
  __builtin_memcpy(out.lane, p, sizeof out.lane);
  return out;
}
inline V load_n(const float* p, int64_t n) {
  return map([&](int i) { return i < n ? p[i] : 0.0f; });
}
inline void store_n(float* p, V v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v.lane[i];
}
inline void store(float* p, V v) { store_n(p, v, kLanes); }
inline V add(V a, V b) {
  return map([&](int i) { return a.lane[i] + b.lane[i]; });
}
inline V sub(V a, V b) {
  return map([&](int i) { return a.lane[i] - b.lane[i]; });
}
inline V mul(V a, V b) {
  return map([&](int i) { return a.lane[i] * b.lane[i]; });
}
inline V div(V a, V b) {
  return map([&](int i) { return a.lane[i] / b.lane[i]; });
}
inline V fma(V a, V b, V c) {
  return map([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
}
inline void add_product(V& sum, V a, V b) { sum = fma(a, b, sum); }
inline V min_v(V a, V b) {
  return map([&](int i) { return a.lane[i] < b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline V max_v(V a, V b) {
  return map([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
}
inline float sum(V v) { return (v.lane[0] + v.lane[2]) + (v.lane[1] + v.lane[3]); }
// Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds to nearest even (|x| < 2^22 here).
inline V round_v(V v) {
  return map([&](int i) { return (v.lane[i] + 12582912.0f) - 12582912.0f; });
}
inline V scale_by_power_of_two(V v, V n) {
  return map([&](int i) {
    const uint32_t bits = static_cast<uint32_t>(static_cast<int32_t>(n.lane[i]) + 127) << 23;
    float power;
    __builtin_memcpy(&power, &bits, 4);
    return v.lane[i] * power;
  });
}
inline void transpose(V (&b)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    for (int j = 0; j < i; ++j) {
      const float x = b[i].lane[j];
      b[i].lane[j] = b[j].lane[i];
      b[j].lane[i] = x;
    }
}

// Four columns of 32 bits of four rows that lie `step` bytes apart.
inline void load_columns(const uint8_t* p, int64_t step, V (&out)[4]) {
  for (int i = 0; i < 4; ++i) __builtin_memcpy(out[i].lane, p + i * step, sizeof out[i].lane);
  transpose(out);
}

#include "decode_scalar.h"

inline uint32_t lane_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return bits;
}
inline float lane_of(uint32_t bits) {
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}
inline V shift_left(V v, int n) {
  return map([&](int i) { return lane_of(lane_bits(v.lane[i]) << n); });
}
inline V shift_right(V v, int n) {
  return map([&](int i) { return lane_of(static_cast<uint32_t>(static_cast<int32_t>(lane_bits(v.lane[i])) >> n)); });
}
inline V and_bits(V v, int mask) {
  return map([&](int i) { return lane_of(lane_bits(v.lane[i]) & static_cast<uint32_t>(mask)); });
}
inline V ints_as_floats(V v) {
  return map([&](int i) { return static_cast<float>(static_cast<int32_t>(lane_bits(v.lane[i]))); });
}
inline V load_int8(const uint8_t* p) {
  return map([&](int i) { return code_at(Format::kInt8Group128, p, i); });
}
inline V load_int4(const uint8_t* p) {
  return map([&](int i) { return code_at(Format::kInt4Group32, p, i); });
}
inline V load_e4m3(const uint8_t* p) {
  return map([&](int i) { return e4m3_to_float(p[i]) * 0x1p-8f; });
}

inline V int4_scales(const uint8_t* p) { return set1(load_scale(Format::kInt4Group32, p)); }
inline void by_eights(const float* p, V (&out)[8]) {
  for (int i = 0; i < 8; ++i) out[i] = map([&](int l) { return p[8 * l + i]; });
}

inline V load_bf16_n(const uint16_t* p, int64_t n) {
  return map([&](int i) { return i < n ? bf16_to_float(p[i]) : 0.0f; });
}
inline V load_bf16(const uint16_t* p) { return load_bf16_n(p, kLanes); }
inline void store_bf16_n(uint16_t* p, V v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = float_to_bf16(v.lane[i]);
}
inline void store_bf16(uint16_t* p, V v) { store_bf16_n(p, v, kLanes); }

#include "decode_f32.h"
#include "prefetch.h"
#include "elementwise.h"
#include "lowrank.h"
#include "with_rows.h"
#include "pieces_f32.h"
#include "few_f32.h"
#include "add_step.h"
#include "gemm_f32.h"

}  // namespace

const FloatKernels kScalarKernels = {
    {"scalar", kWidth, kWidth, KJAX_FORMATS(along), KJAX_FORMATS(across), {}, nullptr, nullptr},
    {convert, swiglu, swiglu_backward, add_scaled},
    {dots, expand, outer, transpose_into, drop}};

}  // namespace kjax
