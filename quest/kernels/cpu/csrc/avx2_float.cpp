// Float passes with AVX2 and FMA. core.h says what each function computes.
#include "core.h"
#include "group_norm.h"

#if QUEST_X86
#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#include <immintrin.h>
#include "avx2.h"

namespace quest {
namespace avx2_float {

inline float sum(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// exp with an error of about one unit in the last place: exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, where exp(r) is the
// polynomial of Cephes.
inline __m256 exp(__m256 x) {
  x = _mm256_min_ps(_mm256_max_ps(x, _mm256_set1_ps(-87.3f)), _mm256_set1_ps(88.3f));
  __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 p = _mm256_set1_ps(1.9875691500e-4f);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.3981999507e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(8.3334519073e-3f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(4.1665795894e-2f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.6666665459e-1f));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(5.0000001201e-1f));
  p = _mm256_add_ps(_mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.f));
  __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(p, _mm256_castsi256_ps(power));
}

inline __m256 silu(__m256 x) {
  __m256 one = _mm256_set1_ps(1.f);
  return _mm256_div_ps(x, _mm256_add_ps(one, exp(_mm256_sub_ps(_mm256_setzero_ps(), x))));
}

// gelu(x) = x (1 + erf(x / sqrt 2)) / 2. erf is Abramowitz and Stegun 7.1.26, with an absolute error of 1.5e-7.
inline __m256 gelu(__m256 x) {
  const __m256 one = _mm256_set1_ps(1.f), sign = _mm256_set1_ps(-0.f);
  __m256 z = _mm256_mul_ps(x, _mm256_set1_ps(0.70710678f)), a = _mm256_andnot_ps(sign, z);
  __m256 t = _mm256_div_ps(one, _mm256_fmadd_ps(a, _mm256_set1_ps(0.3275911f), one));
  __m256 p = _mm256_set1_ps(1.061405429f);
  p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-1.453152027f));
  p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(1.421413741f));
  p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(-0.284496736f));
  p = _mm256_fmadd_ps(p, t, _mm256_set1_ps(0.254829592f));
  __m256 tail = _mm256_mul_ps(_mm256_mul_ps(p, t), exp(_mm256_sub_ps(_mm256_setzero_ps(), _mm256_mul_ps(z, z))));
  __m256 erf = _mm256_or_ps(_mm256_sub_ps(one, tail), _mm256_and_ps(sign, z));
  return _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.5f), x), _mm256_add_ps(one, erf));
}

// Each of the three passes runs over all rows. So the processor need not wait for the end of one row's sum.
void softmax(int rows, const int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
             float* work, int16_t* out) {
  const __m256 by = _mm256_set1_ps(factor), least = _mm256_set1_ps(-INFINITY);
  const __m256 low = _mm256_set1_ps(range.low), high = _mm256_set1_ps(range.high);
  const int64_t whole = m / 8 * 8;
  const __m256i there = _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(m - whole)),
                                           _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  __m256 top[MAX_MR], total[MAX_MR];
  for (int r = 0; r < rows; r++) {
    const int32_t* in = scores + r * width;
    __m256 most = least;
    for (int64_t i = 0; i < whole; i += 8) {
      const __m256 f = _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + i)));
      const __m256 scaled = _mm256_mul_ps(f, by);
      _mm256_storeu_ps(work + r * width + i, scaled);
      most = _mm256_max_ps(most, scaled);
    }
    if (whole < m) {  // the vector also contains columns of the panel without a key
      const __m256 f = _mm256_cvtepi32_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + whole)));
      const __m256 scaled = _mm256_blendv_ps(least, _mm256_mul_ps(f, by), _mm256_castsi256_ps(there));
      _mm256_storeu_ps(work + r * width + whole, scaled);
      most = _mm256_max_ps(most, scaled);
    }
    most = _mm256_max_ps(most, _mm256_permute2f128_ps(most, most, 1));
    most = _mm256_max_ps(most, _mm256_permute_ps(most, 0x4e));
    top[r] = _mm256_max_ps(most, _mm256_permute_ps(most, 0xb1));
  }
  for (int r = 0; r < rows; r++) {
    float* row = work + r * width;
    __m256 all = _mm256_setzero_ps();
    for (int64_t i = 0; i < m; i += 8) {
      __m256 e = exp(_mm256_sub_ps(_mm256_loadu_ps(row + i), top[r]));
      if (i >= whole) e = _mm256_and_ps(e, _mm256_castsi256_ps(there));
      _mm256_storeu_ps(row + i, e);
      all = _mm256_add_ps(all, e);
    }
    all = _mm256_add_ps(all, _mm256_permute2f128_ps(all, all, 1));
    all = _mm256_add_ps(all, _mm256_permute_ps(all, 0x4e));
    total[r] = _mm256_add_ps(all, _mm256_permute_ps(all, 0xb1));
  }
  for (int r = 0; r < rows; r++) {
    const float* row = work + r * width;
    const __m256 scale = _mm256_div_ps(_mm256_set1_ps(1.f), _mm256_mul_ps(total[r], _mm256_set1_ps(range.scale)));
    int16_t* to = out + r * padded;
    for (int64_t i = 0; i < m; i += 8) {
      __m256i c = clamp_round(_mm256_mul_ps(_mm256_loadu_ps(row + i), scale), low, high);
      if (i >= whole) c = _mm256_and_si256(c, there);
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm256_castsi256_si128(to_int16(c, c)));
    }
    const int64_t filled = (m + 7) / 8 * 8;
    if (filled < padded) std::memset(to + filled, 0, (padded - filled) * sizeof(int16_t));
  }
}

// Sums of x over pixels, or with MEAN of (x - mean)^2, for V vectors of channels.
template <int V, bool MEAN>
inline void pixel_sums(const float* x, ptrdiff_t pixel, int64_t pixels, const float* mean, float* out) {
  __m256 total[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) total[v] = _mm256_setzero_ps();
  for (int64_t p = 0; p < pixels; p++, x += pixel)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) {
      __m256 value = _mm256_loadu_ps(x + 8 * v);
      if (MEAN) {
        value = _mm256_sub_ps(value, _mm256_loadu_ps(mean + 8 * v));
        value = _mm256_mul_ps(value, value);
      }
      total[v] = _mm256_add_ps(total[v], value);
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; v++) _mm256_storeu_ps(out + 8 * v, total[v]);
}

template <bool MEAN>
inline void channel_sums(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean,
                         float* out) {
  int64_t c = 0;
  for (; c + 32 <= channels; c += 32) pixel_sums<4, MEAN>(x + c, pixel, pixels, mean + c, out + c);
  for (; c + 8 <= channels; c += 8) pixel_sums<1, MEAN>(x + c, pixel, pixels, mean + c, out + c);
  for (; c < channels; c++) {
    out[c] = 0;
    for (int64_t p = 0; p < pixels; p++) {
      const float value = x[p * pixel + c] - (MEAN ? mean[c] : 0.f);
      out[c] += MEAN ? value * value : value;
    }
  }
}

void sums(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, float* out) {
  channel_sums<false>(x, pixel, pixels, channels, nullptr, out);
}

void squares(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean, float* out) {
  channel_sums<true>(x, pixel, pixels, channels, mean, out);
}

void scale(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* a, const float* b,
           bool silu_too, float* y, ptrdiff_t y_pixel) {
  const int64_t whole = channels / 8 * 8;
  for (int64_t p = 0; p < pixels; p++, x += pixel, y += y_pixel) {
    for (int64_t c = 0; c < whole; c += 8) {
      const __m256 v = _mm256_fmadd_ps(_mm256_loadu_ps(x + c), _mm256_loadu_ps(a + c), _mm256_loadu_ps(b + c));
      _mm256_storeu_ps(y + c, silu_too ? silu(v) : v);
    }
    if (whole < channels) {
      const __m256 v = _mm256_fmadd_ps(load_part(x + whole, channels - whole), load_part(a + whole, channels - whole),
                                       load_part(b + whole, channels - whole));
      store_part(y + whole, channels - whole, silu_too ? silu(v) : v);
    }
  }
}

void group_norm(const GroupNorm& norm, const float* x, float* y, float* work) {
  quest::group_norm({sums, squares, scale}, norm, x, y, work);
}

void layer_norm(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y) {
  const int64_t whole = n / 8 * 8;
  __m256 total = whole < n ? load_part(x + whole, n - whole) : _mm256_setzero_ps();
  for (int64_t i = 0; i < whole; i += 8) total = _mm256_add_ps(total, _mm256_loadu_ps(x + i));
  const float mean = sum(total) / static_cast<float>(n);
  const __m256 m = _mm256_set1_ps(mean);
  __m256 squares = _mm256_setzero_ps();
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 d = _mm256_sub_ps(_mm256_loadu_ps(x + i), m);
    squares = _mm256_fmadd_ps(d, d, squares);
  }
  float rest = sum(squares);
  for (int64_t i = whole; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
  const __m256 scale = _mm256_set1_ps(1.f / std::sqrt(rest / static_cast<float>(n) + eps));
  const __m256 one = _mm256_set1_ps(1.f), zero = _mm256_setzero_ps();
  for (int64_t i = 0; i < whole; i += 8) {
    const __m256 v = _mm256_mul_ps(_mm256_sub_ps(_mm256_loadu_ps(x + i), m), scale);
    _mm256_storeu_ps(y + i, _mm256_fmadd_ps(v, weight ? _mm256_loadu_ps(weight + i) : one,
                                            bias ? _mm256_loadu_ps(bias + i) : zero));
  }
  if (whole < n) {
    const int64_t left = n - whole;
    const __m256 v = _mm256_mul_ps(_mm256_sub_ps(load_part(x + whole, left), m), scale);
    store_part(y + whole, left, _mm256_fmadd_ps(v, weight ? load_part(weight + whole, left) : one,
                                                bias ? load_part(bias + whole, left) : zero));
  }
}

void geglu(const float* hidden, const float* gate, int64_t n, float* y) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    _mm256_storeu_ps(y + i, _mm256_mul_ps(_mm256_loadu_ps(hidden + i), gelu(_mm256_loadu_ps(gate + i))));
  if (i < n) store_part(y + i, n - i, _mm256_mul_ps(load_part(hidden + i, n - i), gelu(load_part(gate + i, n - i))));
}

// If one operand is NaN, min and max return the second one. So x comes second, and its NaN stays.
inline __m256 clamp(__m256 q, __m256 low, __m256 high) { return _mm256_min_ps(high, _mm256_max_ps(low, q)); }
inline __m256 rounded(__m256 v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

void fake_quantize(const float* x, int64_t n, Range range, float* out) {
  const __m256 scale = _mm256_set1_ps(range.scale), low = _mm256_set1_ps(range.low), high = _mm256_set1_ps(range.high);
  auto one = [&](__m256 v) { return _mm256_mul_ps(clamp(rounded(_mm256_div_ps(v, scale)), low, high), scale); };
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) _mm256_storeu_ps(out + i, one(_mm256_loadu_ps(x + i)));
  if (i < n) store_part(out + i, n - i, one(load_part(x + i, n - i)));
}

double fake_quantize_backward(const float* x, const float* grad, int64_t n, Range range, float* out) {
  const __m256 scale = _mm256_set1_ps(range.scale), low = _mm256_set1_ps(range.low), high = _mm256_set1_ps(range.high);
  __m256 total[2] = {_mm256_setzero_ps(), _mm256_setzero_ps()};
  auto one = [&](__m256 x, __m256 g, __m256& sum) {
    const __m256 v = _mm256_div_ps(x, scale), q = rounded(v), code = clamp(q, low, high);
    const __m256 inside = _mm256_cmp_ps(code, q, _CMP_EQ_OQ);
    sum = _mm256_fmadd_ps(g, _mm256_blendv_ps(code, _mm256_sub_ps(q, v), inside), sum);
    return _mm256_and_ps(g, inside);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
    for (int j = 0; j < 2; j++)
      _mm256_storeu_ps(out + i + 8 * j, one(_mm256_loadu_ps(x + i + 8 * j), _mm256_loadu_ps(grad + i + 8 * j), total[j]));
  for (; i < n; i += 8) {
    const int64_t left = std::min<int64_t>(8, n - i);
    store_part(out + i, left, one(load_part(x + i, left), load_part(grad + i, left), total[0]));
  }
  return static_cast<double>(sum(total[0])) + sum(total[1]);
}

}  // namespace avx2_float

}  // namespace quest

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
