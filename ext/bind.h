// What the parts of kjax._ext share: numpy arrays in and out, and Python objects that C++ keeps alive.
#pragma once
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "text.h"

namespace kjax {

namespace nb = nanobind;

void bind_store(nb::module_& m);
void bind_calls(nb::module_& m);
void bind_adapters(nb::module_& m);
void bind_machine(nb::module_& m);

// A Python object that is let go of from any thread: the last call over a closed store may end on one of XLA's.
std::shared_ptr<PyObject> keep(nb::object object);
// While it lives, this thread has the GIL and lets go of kept objects at once.
class Holding {
 public:
  Holding();
  ~Holding();
  Holding(const Holding&) = delete;
};

using Array = nb::ndarray<nb::ro, nb::device::cpu>;
using Writable = nb::ndarray<nb::device::cpu>;

inline void require_contiguous(const char* name, const Array& array) {
  int64_t stride = 1;
  for (size_t i = array.ndim(); i-- > 0;) {
    if (array.size() > 0 && array.shape(i) > 1 && array.stride(i) != stride)
      throw std::invalid_argument(text(name, " must be C-contiguous"));
    stride *= static_cast<int64_t>(array.shape(i));
  }
}

// The array's memory after checking its type, shape (-1: any) and contiguity.
template <class T>
const T* data(const char* name, const Array& array, std::initializer_list<int64_t> shape) {
  if (array.dtype() != nb::dtype<T>())
    throw std::invalid_argument(
        text(name, " must be ",
             nb::dtype<T>().code == static_cast<uint8_t>(nb::dlpack::dtype_code::Float)  ? "float"
             : nb::dtype<T>().code == static_cast<uint8_t>(nb::dlpack::dtype_code::UInt) ? "uint"
                                                                                         : "int",
             sizeof(T) * 8));
  bool fits = array.ndim() == shape.size();
  for (size_t i = 0; fits && i < array.ndim(); ++i) {
    const int64_t want = *(shape.begin() + i);
    fits = want < 0 || array.shape(i) == static_cast<size_t>(want);
  }
  if (!fits) {
    std::string wanted, got;
    for (int64_t n : shape) wanted += text(wanted.empty() ? "" : ", ", n < 0 ? std::string("any") : std::to_string(n));
    for (size_t i = 0; i < array.ndim(); ++i) got += text(i ? ", " : "", array.shape(i));
    throw std::invalid_argument(text(name, " has shape [", got, "], expected [", wanted, "]"));
  }
  require_contiguous(name, array);
  return static_cast<const T*>(array.data());
}

// bf16 travels as uint16.
inline Dtype number_type(const char* name, const Array& array) {
  if (array.dtype() == nb::dtype<uint16_t>()) return Dtype::kBf16;
  if (array.dtype() == nb::dtype<float>()) return Dtype::kFp32;
  throw std::invalid_argument(text(name, " must be uint16 (the bits of bfloat16) or float32"));
}

inline const void* numbers(const char* name, const Array& array, Dtype type, std::initializer_list<int64_t> shape) {
  if (type == Dtype::kBf16) return data<uint16_t>(name, array, shape);
  return data<float>(name, array, shape);
}

// A new numpy array and its memory.
struct Fresh {
  nb::object array;
  void* data;
};
inline Fresh fresh(nb::dlpack::dtype type, const std::vector<size_t>& shape) {
  size_t bytes = type.bits / 8;
  for (size_t n : shape) bytes *= n;
  auto memory = std::make_unique<uint8_t[]>(bytes);
  void* const data = memory.get();
  nb::capsule owner(memory.release(), [](void* p) noexcept { delete[] static_cast<uint8_t*>(p); });
  nb::ndarray<nb::numpy> array(data, shape.size(), shape.data(), owner, nullptr, type);
  return {nb::cast(array), data};
}
inline nb::dlpack::dtype dtype_of(Dtype type) { return type == Dtype::kBf16 ? nb::dtype<uint16_t>() : nb::dtype<float>(); }


}  // namespace kjax
