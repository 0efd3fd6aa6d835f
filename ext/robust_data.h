// Random bytes in memory that ends at an unmapped page, for the parts of kjax_robust.
#pragma once
#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <new>
#include <random>

#include "store.h"

extern "C" void* __real_mmap(void*, size_t, int, int, int, off_t);  // what the linker wraps for robust.cpp
extern "C" int __real_munmap(void*, size_t);

namespace kjax {
namespace {

#include "decode_scalar.h"

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint64_t bits() { return engine_(); }
  int64_t between(int64_t low, int64_t high) { return low + static_cast<int64_t>(bits() % (high - low + 1)); }
  bool one_in(int64_t n) { return between(1, n) == 1; }

 private:
  std::mt19937_64 engine_;
};

// Bytes that end, or begin, where an unmapped page begins, or ends: one byte too far is a crash in any build.
class Fenced {
 public:
  Fenced(int64_t bytes, bool at_end) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), size = static_cast<size_t>(bytes);
    const size_t inner = (size + page - 1) / page * page + page;
    whole_ = inner + 2 * page;
    raw_ =
        static_cast<uint8_t*>(__real_mmap(nullptr, whole_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (raw_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(raw_, page, PROT_NONE);
    mprotect(raw_ + page + inner, page, PROT_NONE);
    data_ = at_end ? raw_ + page + inner - size : raw_ + page;
  }
  Fenced(const Fenced&) = delete;
  ~Fenced() { __real_munmap(raw_, whole_); }
  uint8_t* data() const { return data_; }

 private:
  uint8_t *raw_, *data_;
  size_t whole_;
};

inline int64_t scale_count(Format format, int64_t rows, int64_t cols) {
  const ScaleBlock& block = kScaleBlock[static_cast<int>(format)];
  return block.bytes ? (rows + block.rows - 1) / block.rows * scales_per_row(block, cols) : 0;
}

// Any bytes; `tame` ones mean finite numbers.
inline void fill(Format format, uint8_t* codes, int64_t bytes, uint8_t* scales, int64_t count, bool tame,
                 Random& random) {
  const int64_t scale_bytes = kScaleBlock[static_cast<int>(format)].bytes;
  for (int64_t i = 0; i < bytes; ++i) codes[i] = static_cast<uint8_t>(random.bits());
  for (int64_t i = 0; i < count * scale_bytes; ++i) scales[i] = static_cast<uint8_t>(random.bits());
  if (!tame) return;
  const int64_t wide = format == Format::kBf16 ? 2 : format == Format::kFp32 ? 4 : 0;
  for (int64_t i = wide - 1; wide && i < bytes; i += wide) codes[i] = static_cast<uint8_t>((codes[i] & 0x80) | 0x3e);
  if (format == Format::kFp8Block || format == Format::kFp8Channel)
    for (int64_t i = 0; i < bytes; ++i)
      if ((codes[i] & 127) == 127) codes[i] ^= 1;
  for (int64_t i = scale_bytes - 1; scale_bytes && i < count * scale_bytes; i += scale_bytes)
    scales[i] = static_cast<uint8_t>((scales[i] & 0x80) | 0x3c);
}

}  // namespace

// robust_fuzz.cpp: products for some seconds, the first with this seed; the exit status.
int fuzz(double seconds, uint64_t seed);
// robust_nodes.cpp: which threads read which experts; the exit status.
int nodes_first();
// robust_files.cpp: files that are cold or lost; the exit status.
int files();

}  // namespace kjax
