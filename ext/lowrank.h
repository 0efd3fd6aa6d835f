// Products with a rank or two dimensions far smaller than the others, in fp32, and dropout, written against the vector
// type V of the including file. Included inside an unnamed namespace by each float kernel file.

inline V load_part(const float* p, int64_t n) { return n >= kLanes ? load(p) : load_n(p, n); }
inline void store_part(float* p, V v, int64_t n) { n >= kLanes ? store(p, v) : store_n(p, v, n); }

// T [M, R] (+)= scale * X [M, depth] W [R, depth]^T for M x R sums at once
template <int M, int R>
void dots_tile(const float* x, int64_t ldx, const float* w, int64_t ldw, int64_t depth, float scale, float* t,
               int64_t ldt, bool add) {
  V sums[M][R];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) sums[m][r] = set1(0.0f);
  for (int64_t k = 0; k < depth; k += kLanes) {
    V y[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) y[r] = load_part(w + r * ldw + k, depth - k);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V v = load_part(x + m * ldx + k, depth - k);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) sums[m][r] = fma(v, y[r], sums[m][r]);
    }
  }
  for (int m = 0; m < M; ++m)
    for (int r = 0; r < R; ++r) {
      const float product = scale * sum(sums[m][r]);
      t[m * ldt + r] = add ? t[m * ldt + r] + product : product;
    }
}

void dots(const float* x, int64_t ldx, int64_t rows, const float* w, int64_t ldw, int64_t rank, int64_t depth,
          float scale, float* t, int64_t ldt, bool add) {
  for (int64_t r = 0; r < rank; r += 4)
    for (int64_t m = 0; m < rows; m += 4) {
      const float *const xm = x + m * ldx, *const wr = w + r * ldw;
      float* const out = t + m * ldt + r;
      if (rows - m >= 4 && rank - r >= 4) {
        dots_tile<4, 4>(xm, ldx, wr, ldw, depth, scale, out, ldt, add);
      } else {
        for (int64_t i = m; i < rows && i < m + 4; ++i)
          for (int64_t j = r; j < rank && j < r + 4; ++j)
            dots_tile<1, 1>(x + i * ldx, ldx, w + j * ldw, ldw, depth, scale, t + i * ldt + j, ldt, add);
      }
    }
}

// C [M, 4 vectors] += sum_k T(m, k) W [k, ...]; T's rows are `row` and its columns `column` numbers apart.
template <int M>
void expand_tile(const float* t, int64_t row, int64_t column, int64_t depth, const float* w, int64_t ldw, int64_t n,
                 float* c, int64_t ldc) {
  const bool whole = n >= 4 * kLanes;
  V sums[M][4];
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      sums[m][j] = whole                ? load(c + m * ldc + j * kLanes)
                   : j * kLanes < n ? load_part(c + m * ldc + j * kLanes, n - j * kLanes)
                                    : set1(0.0f);
  for (int64_t k = 0; k < depth; ++k) {
    V y[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      y[j] = whole                ? load(w + k * ldw + j * kLanes)
             : j * kLanes < n ? load_part(w + k * ldw + j * kLanes, n - j * kLanes)
                              : set1(0.0f);
#pragma GCC unroll 4
    for (int m = 0; m < M; ++m) {
      const V v = set1(t[m * row + k * column]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sums[m][j] = fma(v, y[j], sums[m][j]);
    }
  }
#pragma GCC unroll 4
  for (int m = 0; m < M; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j)
      if (whole || j * kLanes < n) store_part(c + m * ldc + j * kLanes, sums[m][j], n - j * kLanes);
}

void expand_any(const float* t, int64_t row, int64_t column, int64_t rows, int64_t depth, const float* w, int64_t ldw,
                int64_t n, float* c, int64_t ldc) {
  for (int64_t j = 0; j < n; j += 4 * kLanes) {
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)
      expand_tile<4>(t + m * row, row, column, depth, w + j, ldw, n - j, c + m * ldc + j, ldc);
    for (; m < rows; ++m) expand_tile<1>(t + m * row, row, column, depth, w + j, ldw, n - j, c + m * ldc + j, ldc);
  }
}

void expand(const float* t, int64_t ldt, int64_t rows, int64_t rank, const float* w, int64_t ldw, int64_t n, float* c,
            int64_t ldc) {
  expand_any(t, ldt, 1, rows, rank, w, ldw, n, c, ldc);
}

void outer(const float* t, int64_t ldt, int64_t rows, int64_t rank, const float* x, int64_t ldx, int64_t n, float* w,
           int64_t ldw) {
  expand_any(t, 1, ldt, rank, rows, x, ldx, n, w, ldw);
}

void transpose_into(const float* from, int64_t ldf, int64_t rows, int64_t cols, float* to, int64_t ldt, bool adding) {
  for (int64_t r = 0; r < rows; r += kLanes)
    for (int64_t c = 0; c < cols; c += kLanes) {
      V block[kLanes];
      for (int64_t i = 0; i < kLanes; ++i)
        block[i] = r + i < rows ? load_part(from + (r + i) * ldf + c, cols - c) : set1(0.0f);
      transpose(block);
      for (int64_t i = 0; i < kLanes && c + i < cols; ++i) {
        float* const out = to + (c + i) * ldt + r;
        store_part(out, adding ? add(block[i], load_part(out, rows - r)) : block[i], rows - r);
      }
    }
}

inline uint32_t mix(uint32_t h) {
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// As kjax.offload.lora.keep_mask draws it: MurmurHash3's finaliser over the element, keyed by seed, route, projection.
void drop(float* x, int64_t first, int64_t n, const uint32_t* seed, uint32_t projection, uint32_t route,
          uint32_t threshold) {
  const uint32_t one = mix(seed[0] ^ (route * 0x9e3779b9u + projection));
  const uint32_t two = mix(seed[1] ^ (route * 0xc2b2ae3du + projection + 3));
  for (int64_t i = 0; i < n; ++i) {
    uint32_t h = static_cast<uint32_t>(first + i) * 0x9e3779b9u + one;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = ((h ^ (h >> 13)) + two) * 0xc2b2ae35u;
    x[i] = (h ^ (h >> 16)) >= threshold ? x[i] : 0.0f;
  }
}
