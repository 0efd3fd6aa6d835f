// Every allocation of the program counted, and the one asked for refused: operator new is replaced; what the sources
// call directly is wrapped by the linker (see CMakeLists.txt).
#include "robust_memory.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace kjax {
std::atomic<int64_t> allocations{0}, allocated{0}, refuse_at{-1};
}

namespace {
bool refused(size_t size) {
  kjax::allocated += static_cast<int64_t>(size);
  return kjax::allocations.fetch_add(1) == kjax::refuse_at.load();
}
}  // namespace

extern "C" {
void* __real_aligned_alloc(size_t, size_t);
void* __real_mmap(void*, size_t, int, int, int, off_t);
void* __wrap_aligned_alloc(size_t alignment, size_t size) {
  return refused(size) ? nullptr : __real_aligned_alloc(alignment, size);
}
void* __wrap_mmap(void* at, size_t size, int protection, int flags, int file, off_t offset) {
  return refused(size) ? MAP_FAILED : __real_mmap(at, size, protection, flags, file, offset);
}
}

void* operator new(size_t size) {
  void* const memory = refused(size) ? nullptr : std::malloc(size ? size : 1);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size) { return operator new(size); }
void* operator new(size_t size, std::align_val_t alignment) {
  const size_t to = static_cast<size_t>(alignment);
  void* const memory = refused(size) ? nullptr : __real_aligned_alloc(to, (size + to - 1) / to * to);
  if (!memory) throw std::bad_alloc();
  return memory;
}
void* operator new[](size_t size, std::align_val_t alignment) { return operator new(size, alignment); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
