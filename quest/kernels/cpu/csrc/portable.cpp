// Plain C++ for every machine, with arrays as vectors. core.h says what each function computes.
#include "core.h"

#include <cmath>
#include <cstring>

#undef INLINE  // the compiler decides
#undef INLINE_LAMBDA
#define INLINE static inline
#define INLINE_LAMBDA

namespace quest {
namespace {

constexpr int L = 8;

struct F { float v[L]; };
struct I { int32_t v[L]; };
struct M { bool v[L]; };
struct All { int n = L; };
struct Part {
  int n;
  explicit Part(int64_t n) : n(static_cast<int>(n < L ? n : L)) {}
};

// Returns a vector whose number i is of(i).
template <class V, class Of>
INLINE V made(const Of& of) {
  V out;
  for (int i = 0; i < L; i++) out.v[i] = of(i);
  return out;
}

INLINE F set(float x) { return made<F>([&](int) { return x; }); }
INLINE I set(int32_t x) { return made<I>([&](int) { return x; }); }
INLINE F load(const float* x) { return made<F>([&](int i) { return x[i]; }); }
INLINE I load(const int32_t* x) { return made<I>([&](int i) { return x[i]; }); }
template <class Which>
INLINE F load(const float* x, Which which) {
  return made<F>([&](int i) { return i < which.n ? x[i] : 0.f; });
}
template <class Which>
INLINE void store(float* x, F a, Which which) {
  for (int i = 0; i < which.n; i++) x[i] = a.v[i];
}
template <class Which>
INLINE void store_bytes(uint8_t* out, I a, Which which) {
  for (int i = 0; i < which.n; i++) out[i] = static_cast<uint8_t>(a.v[i]);
}
INLINE void store_bytes(uint8_t* out, I a, I b, I c, I d) {
  store_bytes(out, a, All{}), store_bytes(out + L, b, All{}), store_bytes(out + 2 * L, c, All{}), store_bytes(out + 3 * L, d, All{});
}

INLINE F operator+(F a, F b) { return made<F>([&](int i) { return a.v[i] + b.v[i]; }); }
INLINE F operator-(F a, F b) { return made<F>([&](int i) { return a.v[i] - b.v[i]; }); }
INLINE F operator*(F a, F b) { return made<F>([&](int i) { return a.v[i] * b.v[i]; }); }
INLINE F operator/(F a, F b) { return made<F>([&](int i) { return a.v[i] / b.v[i]; }); }
INLINE F fmadd(F a, F b, F c) { return a * b + c; }
INLINE F fnmadd(F a, F b, F c) { return c - a * b; }
INLINE F min(F a, F b) { return made<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
INLINE F max(F a, F b) { return made<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
INLINE F round(F a) { return made<F>([&](int i) { return std::nearbyint(a.v[i]); }); }
INLINE F magnitude(F a) { return made<F>([&](int i) { return std::fabs(a.v[i]); }); }
INLINE F with_sign(F a, F of) { return made<F>([&](int i) { return std::copysign(a.v[i], of.v[i]); }); }
INLINE F times_power(F a, F n) {
  return made<F>([&](int i) { return std::ldexp(a.v[i], static_cast<int>(n.v[i] > -200 ? n.v[i] : -200)); });
}
INLINE I operator+(I a, I b) { return made<I>([&](int i) { return a.v[i] + b.v[i]; }); }
INLINE I operator-(I a, I b) { return made<I>([&](int i) { return a.v[i] - b.v[i]; }); }
INLINE I operator*(I a, I b) { return made<I>([&](int i) { return a.v[i] * b.v[i]; }); }
INLINE I max(I a, I b) { return made<I>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
INLINE I to_int(F a) { return made<I>([&](int i) { return static_cast<int32_t>(std::nearbyint(a.v[i])); }); }
INLINE F to_float(I a) { return made<F>([&](int i) { return static_cast<float>(a.v[i]); }); }
// Adds the four bytes of each lane to its number.
INLINE I add_bytes(I sum, const uint8_t* x, int64_t n = 4 * L) {
  for (int i = 0; i < n; i++) sum.v[i / 4] += x[i];
  return sum;
}

INLINE M is_nan(F a) { return made<M>([&](int i) { return std::isnan(a.v[i]); }); }
INLINE M equal(F a, F b) { return made<M>([&](int i) { return a.v[i] == b.v[i]; }); }
INLINE M not_below(F a, F b) { return made<M>([&](int i) { return !(a.v[i] < b.v[i]); }); }
INLINE M operator|(M a, M b) { return made<M>([&](int i) { return a.v[i] || b.v[i]; }); }
INLINE bool any(M a) {
  bool one = false;
  for (bool v : a.v) one |= v;
  return one;
}
INLINE F select(M which, F a, F b) { return made<F>([&](int i) { return which.v[i] ? a.v[i] : b.v[i]; }); }
template <class Which, class V>
INLINE V select(Which which, V a, V b) {
  return made<V>([&](int i) { return i < which.n ? a.v[i] : b.v[i]; });
}
INLINE float total(F a) {
  float sum = 0;
  for (float v : a.v) sum += v;
  return sum;
}
INLINE int32_t total(I a) {
  int32_t sum = 0;
  for (int32_t v : a.v) sum += v;
  return sum;
}
INLINE float highest(F a) {
  float most = a.v[0];
  for (float v : a.v) most = most < v ? v : most;
  return most;
}
INLINE int32_t highest(I a) {
  int32_t most = a.v[0];
  for (int32_t v : a.v) most = most < v ? v : most;
  return most;
}

#include "functions.h"

void multiply(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
              const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride) {
  for (int r = 0; r < rows; r++, a += stride, out += out_stride)
    for (int p = 0; p < panels; p++) {
      const int8_t* w = b + p * panel;
      int32_t sum[NR] = {};
      for (int s = 0; s < segments; s++)
        for (int64_t k = 0; k < bytes; k += 4)
          for (int c = 0; c < NR; c++, w += 4)
            for (int i = 0; i < 4; i++) sum[c] += a[offset[s] + k + i] * w[i];
      std::memcpy(out + p * NR, sum, sizeof sum);
    }
}

void layer_norm(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y) {
  layer_norm_row(x, n, eps, weight, bias, y);
}

}  // namespace

extern const Isa portable = {
    "portable", NR, MAX_PANELS, 4, quantize, quantize_rows, extremes, sums, unpack4, multiply, multiply, nullptr, finish, pack_keys,
    pack_values, softmax, channel_sums, scale_channels, layer_norm, geglu, fake_quantize, fake_quantize_backward, nullptr,
    nullptr, nullptr,
};

}  // namespace quest
