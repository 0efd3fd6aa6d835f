// One step of a tile's reduction, in registers of the compiler's choice: sum[i][j] += x[i * kDepth] * w[j].
// Included inside an unnamed namespace by float kernel files that have none of their own.

template <int R>
inline void add_step(V (&sum)[R][kVectors], const float* x, const float* w) {
  V y[kVectors];
#pragma GCC unroll 8
  for (int j = 0; j < kVectors; ++j) y[j] = load(w + j * kLanes);
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < kVectors; ++j) add_product(sum[i][j], set1(x[i * kDepth]), y[j]);
}
