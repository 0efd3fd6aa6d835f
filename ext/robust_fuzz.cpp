// Every decode over random bytes, shapes and places between unmapped pages, through whole products: the fuzz of
// kjax_robust.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "dispatch.h"
#include "kernels.h"
#include "memory.h"
#include "robust_data.h"
#include "text.h"

namespace kjax {
namespace {

// A weight as kernels have it, times an operand of one: rounded to bf16, or scale * code, or bf16(operand * scale) *
// code (kernels.h); in one product all are the same of these.
struct Meant {
  float rounded, scale, code;
  bool exact(float got, float before) const {
    return got == before + scale * code || got == __builtin_fmaf(scale, code, before);
  }
  bool of_operand(float got, float before) const { return got == before + bf16_to_float(float_to_bf16(scale)) * code; }
};
Meant meant(Format format, const Matrix& w, int64_t row, int64_t col) {
  Meant weight;
  decode_row(format, w, row, col, 1, &weight.rounded);
  const bool scaled = kScaleBlock[static_cast<int>(format)].bytes > 0;
  weight.scale = scaled ? scale_at(format, w, row, col) : 1.0f;
  weight.code = scaled ? code_at(format, byte_at(format, w, row, 0), col) : weight.rounded;
  return weight;
}

// One product with rows that are zero but for a single one: C holds decoded weights, to the bit.
std::string fuzz_product(const Kernels& kernels, uint64_t seed) {
  Random random(seed);
  const Format format = static_cast<Format>(random.between(0, kFormats - 1));
  const int which = static_cast<int>(format);
  const Gemm& gemm = *kernels.gemm[which];
  const bool along = random.one_in(2), tame = !random.one_in(4), at_end = !random.one_in(3), add = random.one_in(4);
  const Dtype type = kOperandType[which];
  const int64_t size = type == Dtype::kBf16 ? 2 : 4;
  const auto extent = [&] { return random.one_in(3) ? random.between(1, 700) : random.between(1, 160); };
  const int64_t rows = extent(), cols = extent(), m = random.one_in(3) ? random.between(1, 130) : random.between(1, 9);
  const int64_t depth = along ? cols : rows, across = along ? rows : cols;
  const int64_t widest = along ? gemm.along_width : gemm.across_width;
  const int64_t first = random.between(0, (across - 1) / kLine) * kLine;
  const int64_t count = std::min(across - first, random.one_in(2) ? widest : random.between(1, widest));
  const int64_t bytes = rows * row_bytes(format, cols), scales = scale_count(format, rows, cols);
  const Fenced codes(bytes, at_end), scale_memory(scales * kScaleBlock[which].bytes, at_end);
  fill(format, codes.data(), bytes, scale_memory.data(), scales, tame, random);
  const Matrix w{codes.data(), scales ? scale_memory.data() : nullptr, rows, cols};

  // Operands as a pass lays them out: padded rows, whole tiles of them.
  const int64_t lda = (depth + kPad - 1) / kPad * kPad + kPad, slots = (m + kRowTile - 1) / kRowTile * kRowTile;
  Memory plain(static_cast<size_t>((slots + kRowTile) * lda * size)), packed(plain.size());
  const Fenced scratch(scratch_bytes(cols), true);
  // NaN, which what other calls leave there may be, but for the numbers of a row and zeros to a multiple of kPad.
  std::memset(plain.data(), 0xff, plain.size());
  std::memset(packed.data(), 0xff, packed.size());
  for (int64_t r = 0; r < m; ++r)
    std::memset(plain.data() + r * lda * size, 0, static_cast<size_t>((lda - kPad) * size));
  std::vector<int64_t> hot(m);
  for (int64_t r = 0; r < m; ++r) {
    hot[r] = random.between(0, depth - 1);
    const uint16_t one = 0x3f80;
    const float whole = 1;
    std::memcpy(plain.data() + (r * lda + hot[r]) * size, size == 2 ? static_cast<const void*>(&one) : &whole, size);
  }
  const bool takes_packed = along && gemm.pack[which];
  if (takes_packed) gemm.pack[which](plain.data(), lda, m, 0, m, 0, depth, packed.data(), lda);

  const int64_t ldc = (count + kLine - 1) / kLine * kLine;
  Memory c(static_cast<size_t>((m + 15) / 16 * 16 * ldc) * 4);
  float* const out = reinterpret_cast<float*>(c.data());
  for (int64_t i = 0; i < m * ldc; ++i) out[i] = add ? 2.0f : -77.0f;
  const Strip strip{w, first, count}, next = random.one_in(2) ? strip : Strip{};
  if (gemm.begin) gemm.begin();
  (along ? gemm.along : gemm.across)[which]({takes_packed ? packed.data() : plain.data(), lda, m, strip, next, out, ldc,
                                             add, reinterpret_cast<std::byte*>(scratch.data())});
  if (gemm.end) gemm.end();
  if (!tame) return "";  // NaN and Inf, which loading refuses, may end up anywhere
  const float before = add ? 2.0f : 0.0f;
  // Kernels that pack multiply in bf16.
  bool rounded = true, exact = true, of_operand = !along && format == Format::kFp8Channel && gemm.pack[which];
  for (int64_t r = 0; r < m; ++r)
    for (int64_t n = 0; n < count; ++n) {
      const Meant weight = along ? meant(format, w, first + n, hot[r]) : meant(format, w, hot[r], first + n);
      const float got = out[r * ldc + n], expected = before + weight.rounded;
      rounded &= got == expected;
      exact &= weight.exact(got, before);
      of_operand &= weight.of_operand(got, before);
      if (!rounded && !exact && !of_operand)
        return text(gemm.name, " ", kFormatInfo[which].name, along ? " along" : " across", " W [", rows, ", ", cols,
                    "], strip ", first, " + ", count, ", ", m, " rows: C[", r, ", ", n, "] = ", got, ", not ",
                    expected);
    }
  return "";
}

}  // namespace

int fuzz(double seconds, uint64_t seed) {
  std::vector<std::string> isas;
  for (const auto& [isa, why_not] : available_isas(cpu_features()))
    if (why_not.empty()) isas.push_back(isa);
  const auto end = std::chrono::steady_clock::now() + std::chrono::duration<double>(seconds);
  uint64_t done = 0;
  do {
    for (const std::string& isa : isas) {
      force_isa(isa);
      if (const std::string wrong = fuzz_product(*chosen().kernels, seed + done); !wrong.empty()) {
        std::printf("%s: %s\nagain by: kjax_robust fuzz 0 %llu\n", isa.c_str(), wrong.c_str(),
                    static_cast<unsigned long long>(seed + done));
        return 1;
      }
    }
    ++done;
  } while (std::chrono::steady_clock::now() < end);
  std::printf("fuzz: %llu products on each of %zu instruction sets, seed %llu\n", static_cast<unsigned long long>(done),
              isas.size(), static_cast<unsigned long long>(seed));
  return 0;
}

}  // namespace kjax
