// Kernels are compiled for each number of operand rows, so that sums lie in registers.
// Included inside an unnamed namespace, after <utility>.

// Calls f<R> for a number of rows from `least` to `most`.
template <int least, int most, class F>
inline void with_rows(int64_t rows, F f) {
  [&]<int... R>(std::integer_sequence<int, R...>) {
    ((rows == least + R ? f.template operator()<least + R>() : void()), ...);
  }(std::make_integer_sequence<int, most - least + 1>());
}
