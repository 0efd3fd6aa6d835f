// Large aligned memory that only grows, on huge pages where the system has them.
#pragma once
#include <cstddef>
#include <cstdlib>
#include <new>
#include <utility>
#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace kjax {

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) { grow(bytes); }
  ~Memory() { std::free(data_); }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }

  // At least `bytes` bytes, aligned to 64 or a huge page; what was there before is lost when it grows.
  void grow(size_t bytes) {
    if (bytes <= size_) return;
    std::free(std::exchange(data_, nullptr));
    size_ = 0;
    const size_t alignment = bytes >= kHugePage ? kHugePage : 64;
    const size_t whole = (bytes + alignment - 1) / alignment * alignment;
    data_ = whole < bytes ? nullptr : static_cast<std::byte*>(std::aligned_alloc(alignment, whole));
    if (!data_) throw std::bad_alloc();
    size_ = whole;
#if defined(__linux__)
    if (alignment == kHugePage) madvise(data_, whole, MADV_HUGEPAGE);  // advice: without huge pages it is only slower
#endif
  }
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }

 private:
  static constexpr size_t kHugePage = size_t{2} << 20;
  void swap(Memory& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace kjax
