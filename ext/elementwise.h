// SwiGLU, its derivative, rounding and scaled sums, written against the vector type V of the including file.
// Included inside an unnamed namespace by each float kernel file.

// exp(x) to about 2 ulp (Cephes expf: r = x - n ln2 in two parts, degree-5 polynomial, scaled by 2^n).
inline V exp_v(V x) {
  x = min_v(max_v(x, set1(-87.0f)), set1(88.0f));
  const V n = round_v(mul(x, set1(1.44269504088896341f)));
  V r = fma(n, set1(-0.693359375f), x);
  r = fma(n, set1(2.12194440e-4f), r);
  V p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  return scale_by_power_of_two(add(fma(mul(r, r), p, r), set1(1.0f)), n);
}

inline V sigmoid(V x) { return div(set1(1.0f), add(set1(1.0f), exp_v(sub(set1(0.0f), x)))); }

inline V load_number(const void* p, Dtype type, int64_t i, int64_t n) {
  if (type == Dtype::kBf16) {
    const uint16_t* q = static_cast<const uint16_t*>(p) + i;
    return n >= kLanes ? load_bf16(q) : load_bf16_n(q, n);
  }
  const float* q = static_cast<const float*>(p) + i;
  return n >= kLanes ? load(q) : load_n(q, n);
}

inline void store_number(void* p, Dtype type, int64_t i, int64_t n, V v) {
  if (type == Dtype::kBf16) {
    uint16_t* q = static_cast<uint16_t*>(p) + i;
    n >= kLanes ? store_bf16(q, v) : store_bf16_n(q, v, n);
  } else {
    float* q = static_cast<float*>(p) + i;
    n >= kLanes ? store(q, v) : store_n(q, v, n);
  }
}

inline int64_t number_size(Dtype type) { return type == Dtype::kBf16 ? 2 : 4; }

inline void zero_pad(void* p, Dtype type, int64_t n, int64_t pad) {
  if (pad > 0)
    __builtin_memset(static_cast<uint8_t*>(p) + n * number_size(type), 0, static_cast<size_t>(pad * number_size(type)));
}

void convert(const void* from, Dtype from_type, void* to, Dtype to_type, int64_t n, int64_t pad) {
  if (from_type == to_type) {
    __builtin_memcpy(to, from, static_cast<size_t>(n * number_size(to_type)));
  } else {
    for (int64_t i = 0; i < n; i += kLanes) store_number(to, to_type, i, n - i, load_number(from, from_type, i, n - i));
  }
  zero_pad(to, to_type, n, pad);
}

void swiglu(const float* g, const float* u, int64_t n, int64_t pad, void* saved_g, void* saved_u, void* h, Dtype type) {
  for (int64_t i = 0; i < n; i += kLanes) {
    const V gv = load_number(g, Dtype::kFp32, i, n - i), uv = load_number(u, Dtype::kFp32, i, n - i);
    if (saved_g) {
      store_number(saved_g, type, i, n - i, gv);
      store_number(saved_u, type, i, n - i, uv);
    }
    if (h) store_number(h, type, i, n - i, mul(mul(gv, sigmoid(gv)), uv));
  }
  if (h) zero_pad(h, type, n, pad);
}

float swiglu_backward(const float* a, float gate, int64_t n, int64_t pad, void* g, void* u, Dtype type) {
  V dot = set1(0.0f);
  const V scale = set1(gate), one = set1(1.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    const V gv = load_number(g, type, i, n - i), uv = load_number(u, type, i, n - i);
    V av = load_number(a, Dtype::kFp32, i, n - i);
    const V s = sigmoid(gv), silu = mul(gv, s);
    dot = fma(av, mul(silu, uv), dot);
    av = mul(av, scale);
    const V slope = fma(silu, sub(one, s), s);  // d silu(g) / dg
    store_number(g, type, i, n - i, mul(mul(av, uv), slope));
    store_number(u, type, i, n - i, mul(av, silu));
  }
  zero_pad(g, type, n, pad);
  zero_pad(u, type, n, pad);
  return sum(dot);
}

void add_scaled(float scale, const float* from, float* to, int64_t n) {
  const V s = set1(scale);
  for (int64_t i = 0; i < n; i += kLanes) {
    const V v = fma(s, load_number(from, Dtype::kFp32, i, n - i), load_number(to, Dtype::kFp32, i, n - i));
    store_number(to, Dtype::kFp32, i, n - i, v);
  }
}
