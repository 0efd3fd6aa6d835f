// Peaks of this machine: arithmetic from registers, instructions a second and
// reads of memory larger than any cache, with a given number of threads. c++ -O2 -std=c++20 -shared
// -fPIC -pthread probe.cpp -o probe.so   (x86-64 with AVX2; experts.py builds
// it)
#include <immintrin.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;

// Seconds from the first thread's start to the last one's end.
template <class Work>
double parallel(int threads, Work work) {
  std::atomic<int> ready{0};
  std::atomic<bool> go{false};
  std::vector<std::thread> team;
  std::vector<Clock::time_point> begin(threads), end(threads);
  for (int i = 0; i < threads; ++i)
    team.emplace_back([&, i] {
      ++ready;
      while (!go) _mm_pause();
      begin[i] = Clock::now();
      work(i);
      end[i] = Clock::now();
    });
  while (ready < threads) std::this_thread::yield();
  go = true;
  for (auto& thread : team) thread.join();
  Clock::time_point first = begin[0], last = end[0];
  for (int i = 1; i < threads; ++i) {
    if (begin[i] < first) first = begin[i];
    if (end[i] > last) last = end[i];
  }
  return std::chrono::duration<double>(last - first).count();
}

// Twelve independent chains hide a latency of up to six cycles on two ports.
#define TWELVE(op) op(0) op(1) op(2) op(3) op(4) op(5) op(6) op(7) op(8) op(9) op(10) op(11)
#define HALF(i) "vfmadd231ps %%ymm15, %%ymm14, %%ymm" #i "\n"
#define FMA(i) "vfmadd231ps %%zmm31, %%zmm30, %%zmm" #i "\n"
#define DOT(i) "vdpbf16ps %%zmm31, %%zmm30, %%zmm" #i "\n"
#define ZMMS                                                                                                          \
  "zmm0", "zmm1", "zmm2", "zmm3", "zmm4", "zmm5", "zmm6", "zmm7", "zmm8", "zmm9", "zmm10", "zmm11", "zmm30", "zmm31", \
      "cc"
void __attribute__((target("avx2,fma"))) half_fma(long n) {
  __asm__ volatile("1:\n" TWELVE(HALF) "dec %0\njnz 1b\n"
                   : "+r"(n)::"ymm0", "ymm1", "ymm2", "ymm3", "ymm4", "ymm5", "ymm6", "ymm7", "ymm8", "ymm9", "ymm10",
                     "ymm11", "ymm14", "ymm15", "cc");
}
void __attribute__((target("avx512f"))) fma(long n) {
  __asm__ volatile("1:\n" TWELVE(FMA) "dec %0\njnz 1b\n" : "+r"(n)::ZMMS);
}
void __attribute__((target("avx512f"))) dot(long n) {
  __asm__ volatile("1:\n" TWELVE(DOT) "dec %0\njnz 1b\n" : "+r"(n)::ZMMS);
}
void tiles(long n) {
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  // Operands are loaded: products of tiles that were never written took half the time here.
  alignas(64) static const auto numbers = [] {
    std::array<uint16_t, 512> all{};
    for (int i = 0; i < 512; ++i) all[i] = static_cast<uint16_t>(0x3f80 + i % 128);
    return all;
  }();
  __asm__ volatile(
      "ldtilecfg %0\n tileloadd (%1,%2,1), %%tmm4\n tileloadd (%1,%2,1), %%tmm5\n"
      "tileloadd (%1,%2,1), %%tmm6\n tileloadd (%1,%2,1), %%tmm7\n" ::"m"(config),
      "r"(numbers.data()), "r"(64L)
      : "memory");
  __asm__ volatile(
      "1:\n tdpbf16ps %%tmm6, %%tmm4, %%tmm0\n tdpbf16ps %%tmm7, %%tmm4, "
      "%%tmm1\n tdpbf16ps %%tmm6, %%tmm5, %%tmm2\n"
      "tdpbf16ps %%tmm7, %%tmm5, %%tmm3\n dec %0\n jnz 1b\n tilerelease\n"
      : "+r"(n)::"cc");
}

// As many instructions at a time as a core starts: loads and additions that wait for nothing.
void wide(long n) {
  static const long word = 1;
  __asm__ volatile(
      "1:\n mov (%1), %%r8\n lea 1(%1), %%r9\n lea 2(%1), %%r10\n mov (%1), %%r11\n lea 3(%1), %%r12\n lea 4(%1), %%r13\n"
      "mov (%1), %%r8\n lea 1(%1), %%r9\n lea 2(%1), %%r10\n mov (%1), %%r11\n lea 3(%1), %%r12\n dec %0\n jnz 1b\n"
      : "+r"(n)
      : "r"(&word)
      : "r8", "r9", "r10", "r11", "r12", "r13", "cc");
}

}  // namespace

// 10^9 rounds of instructions a second. A guest on the other half of a core takes of these whatever it runs, of the
// arithmetic peak only if it computes the same.
extern "C" double issue(int threads, double milliseconds) {
  const long rounds = static_cast<long>(milliseconds * 1e-3 * 1.3e9);
  return threads * rounds / parallel(threads, [&](int) { wide(rounds); }) * 1e-9;
}

// GFLOP/s of kind 0 and 1 (fp32 FMA of 256 and 512 bits), 2 (bf16 dot), 3 (AMX
// bf16); 0 where Linux refuses the tiles.
extern "C" double peak(int kind, int threads, double milliseconds) {
  if (kind == 3 && syscall(SYS_arch_prctl, 0x1023, 18) != 0) return 0;
  const struct {
    void (*run)(long);
    double operations, rounds_per_second;
  } kinds[] = {{half_fma, 12 * 16.0, 5e8}, {fma, 12 * 32.0, 5e8}, {dot, 12 * 64.0, 2.5e8}, {tiles, 4 * 16384.0, 4e7}};
  const long rounds = static_cast<long>(milliseconds * 1e-3 * kinds[kind].rounds_per_second);
  const double seconds = parallel(threads, [&](int) { kinds[kind].run(rounds); });
  return threads * rounds * kinds[kind].operations / seconds * 1e-9;
}

// GB/s of reading `bytes` once, on huge pages.
extern "C" double bandwidth(int threads, size_t bytes) {
  static char* buffer = nullptr;
  static size_t size = 0;
  if (bytes > size) {
    std::free(buffer);
    buffer = static_cast<char*>(std::aligned_alloc(size_t{2} << 20, size = bytes));
    madvise(buffer, size, MADV_HUGEPAGE);
    std::memset(buffer, 1, size);
  }
  const size_t part = bytes / threads / 4096 * 4096;
  std::atomic<long> sink{0};
  const double seconds = parallel(threads, [&](int i) __attribute__((target("avx2"))) {
    __m256i sum[4] = {};
    for (const char *p = buffer + i * part, *last = p + part; p < last; p += 128)
      for (int j = 0; j < 4; ++j)
        sum[j] = _mm256_xor_si256(sum[j], _mm256_load_si256(reinterpret_cast<const __m256i*>(p + 32 * j)));
    const __m256i all = _mm256_xor_si256(_mm256_xor_si256(sum[0], sum[1]), _mm256_xor_si256(sum[2], sum[3]));
    sink += _mm256_extract_epi64(all, 0);
  });
  return part * threads / seconds * 1e-9;
}
