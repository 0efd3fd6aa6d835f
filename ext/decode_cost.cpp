// Times products of zero rows on every thread at once.
#include "decode_cost.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>

#include "dispatch.h"
#include "memory.h"
#include "threads.h"

namespace kjax {
namespace {

constexpr int64_t kReduction =
    1024;  // with it, the widest strip of the widest format is a MB of fp32 and 512 KB of bf16
constexpr int64_t kWeights = 10000000;  // per thread: some milliseconds

}  // namespace

double decode_cost(Format format, bool across) {
  using Clock = std::chrono::steady_clock;
  const int f = static_cast<int>(format);
  const Gemm& gemm = *chosen().kernels->gemm[f];
  const int64_t width = across ? gemm.across_width : gemm.along_width;
  const int64_t rounds = kWeights / (width * kReduction) + 1;
  std::atomic<int64_t> slowest{0};
  auto job = [&](Worker&) {
    Memory scratch(scratch_bytes(std::max(width, kReduction)));
    // 0x38 is one in e4m3 and a number in every other format; 0x3f80 is one in bf16, and twice that a number in fp32.
    Memory weights(static_cast<size_t>(width * kReduction * kBits[f] / 8)), scales(kReduction * width * 4);
    std::memset(weights.data(), 0x38, weights.size());
    for (size_t i = 0; i < scales.size(); i += 2) std::memcpy(scales.data() + i, "\x80\x3f", 2);
    const Strip strip{{reinterpret_cast<uint8_t*>(weights.data()), reinterpret_cast<uint8_t*>(scales.data()),
                       across ? kReduction : width, across ? width : kReduction},
                      0,
                      width};
    const Product product{weights.data(), kReduction, 0,
                          strip,          {},         reinterpret_cast<float*>(scales.data()),
                          width,          false,      scratch.data()};
    const auto decode = [&] { (across ? gemm.across : gemm.along)[f](product); };
    if (gemm.begin) gemm.begin();
    decode();
    const Clock::time_point begin = Clock::now();
    for (int64_t i = 0; i < rounds; ++i) decode();
    const int64_t ns = std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
    if (gemm.end) gemm.end();
    for (int64_t seen = slowest; seen < ns && !slowest.compare_exchange_weak(seen, ns);) {
    }
  };
  run(job);
  return 1e-9 * static_cast<double>(slowest) / static_cast<double>(rounds * width * kReduction * thread_count());
}

}  // namespace kjax
