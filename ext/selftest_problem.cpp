// Random problems for the self-test, the same on every machine: stored weights, activations, routes, adapters.
#include <cmath>
#include <cstring>
#include <memory>

#include "selftest.h"

namespace kjax {
namespace {

#include "decode_scalar.h"

// Numbers that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435761u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 33) * 2u + 1u;
  }
  int below(int n) { return static_cast<int>(bits() / 2 % static_cast<uint32_t>(n)); }
  float uniform() { return static_cast<float>(bits() >> 8) * (2.0f / 16777216.0f) - 1.0f; }  // (-1, 1)

 private:
  uint64_t state_;
};

constexpr int kRanks[kProjections] = {3, 8, 17};

// Random stored bytes: any code but a NaN's, scales that make weights of about 1 / sqrt(cols).
std::shared_ptr<uint8_t> stored_bytes(Format format, int64_t count, double size, Random& random) {
  std::shared_ptr<uint8_t> bytes(new uint8_t[count + 8], std::default_delete<uint8_t[]>());
  for (int64_t i = 0; i < count; ++i) {
    bytes.get()[i] = static_cast<uint8_t>(random.bits() >> 9);
    const bool fp8 = format == Format::kFp8Block || format == Format::kFp8Channel;
    if (fp8 && (bytes.get()[i] & 127) == 127) bytes.get()[i] ^= 1;
  }
  for (int64_t i = 0; format == Format::kBf16 && i < count / 2; ++i) {
    const uint16_t bits = float_to_bf16(random.uniform() * static_cast<float>(size));
    std::memcpy(bytes.get() + 2 * i, &bits, 2);
  }
  for (int64_t i = 0; format == Format::kFp32 && i < count / 4; ++i) {
    const float number = random.uniform() * static_cast<float>(size);
    std::memcpy(bytes.get() + 4 * i, &number, 4);
  }
  return bytes;
}

}  // namespace

Problem make_problem(const Case& c, Format format, uint64_t seed) {
  Random random(seed);
  Problem p;
  p.store = std::make_shared<Store>(1, c.experts, c.width, c.hidden, format);
  const ScaleBlock& block = kScaleBlock[static_cast<int>(format)];
  const double unit = format == Format::kInt4Group32 ? 5 : format == Format::kInt8Group128 ? 74 : 120;  // of a code
  for (int projection = 0; projection < kProjections; ++projection) {
    const Matrix shape = p.store->matrix(0, 0, projection);
    const double size = 1.7 / std::sqrt(static_cast<double>(shape.cols));
    const int64_t one = shape.rows * row_bytes(format, shape.cols);
    const int64_t scales = (shape.rows + block.rows - 1) / block.rows * scales_per_row(block, shape.cols);
    std::vector<int32_t> buffer(c.experts), scale_buffer(c.experts);
    std::vector<int64_t> offset(c.experts, 0);
    for (int e = 0; e < c.experts; ++e) {
      buffer[e] = p.store->add_buffer(stored_bytes(format, one, size, random), one);
      std::shared_ptr<uint8_t> raw(new uint8_t[scales * 4], std::default_delete<uint8_t[]>());
      for (int64_t i = 0; i < scales; ++i) {
        const float scale = static_cast<float>(size / unit) * (1.0f + 0.5f * random.uniform());
        const uint16_t bits = float_to_bf16(scale);
        if (block.bytes == 4) std::memcpy(raw.get() + 4 * i, &scale, 4);
        if (block.bytes == 2) std::memcpy(raw.get() + 2 * i, &bits, 2);
      }
      scale_buffer[e] = p.store->add_buffer(raw, scales * block.bytes);
    }
    p.store->place(0, projection, buffer.data(), offset.data(), block.bytes ? scale_buffer.data() : nullptr,
                   offset.data());
  }
  for (int projection = 0; projection < kProjections; ++projection) {
    const Matrix shape = p.store->matrix(0, 0, projection);
    std::vector<float> decoded(static_cast<size_t>(shape.rows * shape.cols));
    for (int e = 0; e < c.experts; ++e) {
      const Matrix w = p.store->matrix(0, e, projection);
      for (int64_t r = 0; r < w.rows; ++r) decode_row(format, w, r, 0, w.cols, decoded.data() + r * w.cols);
      p.weight[projection].insert(p.weight[projection].end(), decoded.begin(), decoded.end());
      for (int64_t r = 0; block.bytes && r < w.rows; ++r)
        for (int64_t i = 0; i < w.cols; ++i)
          decoded[r * w.cols + i] = scale_at(format, w, r, i) * code_at(format, byte_at(format, w, r, 0), i);
      p.unrounded[projection].insert(p.unrounded[projection].end(), decoded.begin(), decoded.end());
    }
  }
  const int64_t numbers = int64_t{c.tokens} * c.width, routes = int64_t{c.tokens} * c.per_token;
  for (int64_t i = 0; i < numbers; ++i) {
    p.x.push_back(random.uniform() * 1.7f);
    p.dy.push_back(random.uniform() * 1.7f);
  }
  for (int64_t i = 0; i < routes; ++i) {
    const int spread = c.experts > 2 ? c.experts - 1 : c.experts;  // the last of many experts stays empty
    p.idx.push_back(random.below(5) == 0 ? -1 : c.skewed && random.below(2) ? 0 : random.below(spread));
    p.gate.push_back(0.5f + 0.5f * random.uniform());
  }
  return p;
}

void add_adapters(const Case& c, uint64_t seed, Problem& p) {
  Random random(seed);
  for (int j = 0; j < kProjections; ++j) {
    const Matrix shape = p.store->matrix(0, 0, j);
    for (int64_t i = 0; i < int64_t{c.experts} * kRanks[j] * shape.cols; ++i)
      p.a[j].push_back(random.uniform() * 1.7f / std::sqrt(static_cast<float>(shape.cols)));
    for (int64_t i = 0; i < int64_t{c.experts} * kRanks[j] * shape.rows; ++i)
      p.b[j].push_back(random.uniform() / std::sqrt(static_cast<float>(kRanks[j])));
    p.adapters.of[j] = {p.a[j].data(), p.b[j].data(), kRanks[j], 0.5f + static_cast<float>(j)};
  }
}

}  // namespace kjax
