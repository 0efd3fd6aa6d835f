// Large aligned memory that only grows, on huge pages where the system has them; given back to the system when freed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <new>
#include <utility>
#if defined(__linux__) && !defined(__SANITIZE_ADDRESS__)  // that sanitizer watches the heap, not mappings
#define KJAX_MAPS_MEMORY
#include <sys/mman.h>
#endif

namespace kjax {

class Memory {
 public:
  Memory() = default;
  explicit Memory(size_t bytes) { grow(bytes); }
  ~Memory() { release(); }
  Memory(Memory&& other) noexcept { swap(other); }
  Memory& operator=(Memory&& other) noexcept {
    swap(other);
    return *this;
  }

  // The size of memory for `bytes` bytes: whole cache lines, or whole huge pages from one of them on.
  static constexpr size_t whole(size_t bytes) {
    const size_t unit = bytes > kHugePage - kCacheLine ? kHugePage : kCacheLine;
    return (bytes + unit - 1) / unit * unit;
  }
  // At least `bytes` bytes, aligned to a cache line or a huge page; what was there before is lost when it grows.
  void grow(size_t bytes) {
    if (bytes <= size_) return;
    release();
    const size_t size = whole(bytes);
    if (size < bytes) throw std::bad_alloc();
    data_ = static_cast<std::byte*>(size >= kHugePage ? map(size) : std::aligned_alloc(kCacheLine, size));
    if (!data_) throw std::bad_alloc();
    size_ = size;
  }
  void release() {
    if (!data_) return;
    if (huge()) unmap(data_, size_);
    else std::free(data_);
    data_ = nullptr;
    size_ = 0;
  }
  std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  bool huge() const { return size_ >= kHugePage; }  // a mapping of its own

 private:
  static constexpr size_t kHugePage = size_t{2} << 20, kCacheLine = 64;
#if defined(KJAX_MAPS_MEMORY)
  // A mapping one huge page longer than asked for, cut to whole ones.
  static void* map(size_t bytes) {
    void* const raw = mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (raw == MAP_FAILED) return nullptr;
    const uintptr_t begin = reinterpret_cast<uintptr_t>(raw), at = (begin + kHugePage - 1) / kHugePage * kHugePage;
    if (at > begin) munmap(raw, at - begin);
    if (at < begin + kHugePage) munmap(reinterpret_cast<void*>(at + bytes), begin + kHugePage - at);
    madvise(reinterpret_cast<void*>(at), bytes, MADV_HUGEPAGE);  // advice: without huge pages it is only slower
    return reinterpret_cast<void*>(at);
  }
  static void unmap(void* data, size_t bytes) { munmap(data, bytes); }
#else
  static void* map(size_t bytes) { return std::aligned_alloc(kHugePage, bytes); }
  static void unmap(void* data, size_t) { std::free(data); }
#endif
  void swap(Memory& other) {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
  }
  std::byte* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace kjax
