// Every allocation of the program counted, and the one asked for refused: operator new is replaced; what the sources
// call directly is wrapped by the linker (see CMakeLists.txt).
#include "robust_memory.h"

#include <malloc.h>
#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace kjax {
std::atomic<int64_t> allocations{0}, held{0}, most_held{0}, refuse_at{-1};
std::atomic<bool> refuse_files{false};
void (*while_unmapping)() = nullptr;
}

namespace {
bool refused() { return kjax::allocations.fetch_add(1) == kjax::refuse_at.load(); }
void hold(int64_t bytes) {
  const int64_t now = kjax::held.fetch_add(bytes) + bytes;
  for (int64_t most = kjax::most_held.load(); now > most && !kjax::most_held.compare_exchange_weak(most, now);) {
  }
}
void* holding(void* memory) {
  if (memory) hold(static_cast<int64_t>(malloc_usable_size(memory)));
  return memory;
}
}  // namespace

extern "C" {
void* __real_aligned_alloc(size_t, size_t);
void __real_free(void*);
void* __real_mmap(void*, size_t, int, int, int, off_t);
int __real_munmap(void*, size_t);
void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  return refused() ? nullptr : holding(__real_aligned_alloc(alignment, size));
}
void __wrap_free(void* memory) {
  if (memory) hold(-static_cast<int64_t>(malloc_usable_size(memory)));
  __real_free(memory);
}
void* __wrap_mmap(void* at, size_t size, int protection, int flags, int file, off_t offset) {
  if (refused() || (file >= 0 && kjax::refuse_files)) return MAP_FAILED;
  void* const memory = __real_mmap(at, size, protection, flags, file, offset);
  if (memory != MAP_FAILED) hold(static_cast<int64_t>(size));
  return memory;
}
int __wrap_munmap(void* at, size_t size) {
  if (kjax::while_unmapping) kjax::while_unmapping();
  hold(-static_cast<int64_t>(size));
  return __real_munmap(at, size);
}
}

void* operator new(size_t size) {
  void* const memory = refused() ? nullptr : holding(std::malloc(size ? size : 1));
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size) { return operator new(size); }
void* operator new(size_t size, std::align_val_t alignment) {
  const size_t to = static_cast<size_t>(alignment);
  void* const memory = __wrap_aligned_alloc(to, (size + to - 1) / to * to);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size, std::align_val_t alignment) { return operator new(size, alignment); }
void operator delete(void* memory) noexcept { __wrap_free(memory); }
void operator delete[](void* memory) noexcept { __wrap_free(memory); }
void operator delete(void* memory, size_t) noexcept { __wrap_free(memory); }
void operator delete[](void* memory, size_t) noexcept { __wrap_free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { __wrap_free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { __wrap_free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { __wrap_free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { __wrap_free(memory); }
