// Register tiles with AVX-512 VNNI, and float passes with AVX-512. The instruction vpdpwssd multiplies pairs of int16 and
// adds both products to an int32.
#include "core.h"
#include "group_norm.h"

#if QUEST_X86
#include <algorithm>
#include <cmath>
#include <cstring>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
#endif
#include <immintrin.h>
#include "avx512.h"

namespace quest {

static inline __m512 silu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f);
  return _mm512_div_ps(x, _mm512_add_ps(one, exp(_mm512_sub_ps(_mm512_setzero_ps(), x))));
}

static inline __m512 gelu(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.f), sign = _mm512_set1_ps(-0.f);
  const __m512 z = _mm512_mul_ps(x, _mm512_set1_ps(0.70710678f)), a = _mm512_andnot_ps(sign, z);
  const __m512 t = _mm512_div_ps(one, _mm512_fmadd_ps(a, _mm512_set1_ps(0.3275911f), one));
  __m512 p = _mm512_set1_ps(1.061405429f);
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-1.453152027f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(1.421413741f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(-0.284496736f));
  p = _mm512_fmadd_ps(p, t, _mm512_set1_ps(0.254829592f));
  const __m512 tail = _mm512_mul_ps(_mm512_mul_ps(p, t), exp(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_mul_ps(z, z))));
  const __m512 erf = _mm512_or_ps(_mm512_sub_ps(one, tail), _mm512_and_ps(sign, z));
  return _mm512_mul_ps(_mm512_mul_ps(_mm512_set1_ps(0.5f), x), _mm512_add_ps(one, erf));
}


void avx512_geglu(const float* hidden, const float* gate, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = first(n - i);
    const __m512 g = gelu(_mm512_maskz_loadu_ps(there, gate + i));
    _mm512_mask_storeu_ps(y + i, there, _mm512_mul_ps(_mm512_maskz_loadu_ps(there, hidden + i), g));
  }
}

// Sums of x over pixels, or with MEAN of (x - mean)^2, for four vectors of channels at once.
template <bool MEAN>
static void pixel_sums(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean, float* out) {
  for (int64_t c = 0; c < channels; c += 64) {
    __mmask16 there[4];
    __m512 total[4], m[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      there[v] = first(std::max<int64_t>(0, channels - c - 16 * v));
      total[v] = _mm512_setzero_ps();
      m[v] = MEAN ? _mm512_maskz_loadu_ps(there[v], mean + c + 16 * v) : total[v];
    }
    const float* from = x + c;
    for (int64_t p = 0; p < pixels; p++, from += pixel)
#pragma GCC unroll 4
      for (int v = 0; v < 4; v++) {
        __m512 value = _mm512_maskz_loadu_ps(there[v], from + 16 * v);
        if (MEAN) {
          value = _mm512_sub_ps(value, m[v]);
          value = _mm512_mul_ps(value, value);
        }
        total[v] = _mm512_add_ps(total[v], value);
      }
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) _mm512_mask_storeu_ps(out + c + 16 * v, there[v], total[v]);
  }
}

static void sums(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, float* out) {
  pixel_sums<false>(x, pixel, pixels, channels, nullptr, out);
}

static void squares(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean, float* out) {
  pixel_sums<true>(x, pixel, pixels, channels, mean, out);
}

static void scale(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* a, const float* b,
                  bool silu_too, float* y, ptrdiff_t y_pixel) {
  for (int64_t p = 0; p < pixels; p++, x += pixel, y += y_pixel)
    for (int64_t c = 0; c < channels; c += 16) {
      const __mmask16 there = first(channels - c);
      const __m512 v = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(there, x + c), _mm512_maskz_loadu_ps(there, a + c),
                                       _mm512_maskz_loadu_ps(there, b + c));
      _mm512_mask_storeu_ps(y + c, there, silu_too ? silu(v) : v);
    }
}

void avx512_group_norm(const GroupNorm& norm, const float* x, float* y, float* work) {
  group_norm({sums, squares, scale}, norm, x, y, work);
}

typedef int32_t pair_of_int16 __attribute__((may_alias, aligned(2)));

// Computes R x 16 sums in R registers. With twelve rows, no addition has to wait for the one before.
template <int R>
static inline void accumulate(const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                              const int16_t* panel, __m512i (&c)[R]) {
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) c[r] = _mm512_setzero_si512();
  for (int t = 0; t < taps; t++) {
    const pair_of_int16* row[R];
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) row[r] = reinterpret_cast<const pair_of_int16*>(a[r] + offset[t]);
    for (int64_t k = 0; k < pairs; k++, panel += 2 * NR) {
      const __m512i b = _mm512_loadu_si512(panel);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) c[r] = _mm512_dpwssd_epi32(c[r], _mm512_set1_epi32(row[r][k]), b);
    }
  }
}

template <int R>
static void int_tile(const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs, const int16_t* panel,
                     int32_t* out, ptrdiff_t stride) {
  __m512i c[R];
  accumulate<R>(a, taps, offset, pairs, panel, c);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) _mm512_storeu_si512(out + r * stride, c[r]);
}

template <int R>
static void float_tile(const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs, const int16_t* panel,
                       const float* scale, const float* bias, int columns, float* const* out) {
  __m512i c[R];
  accumulate<R>(a, taps, offset, pairs, panel, c);
  const __m512 s = _mm512_loadu_ps(scale), b = _mm512_loadu_ps(bias);
  const __mmask16 there = static_cast<__mmask16>((1u << columns) - 1);
#pragma GCC unroll 12
  for (int r = 0; r < R; r++) _mm512_mask_storeu_ps(out[r], there, _mm512_fmadd_ps(_mm512_cvtepi32_ps(c[r]), s, b));
}

void vnni_tile_int(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                   const int16_t* panel, int32_t* out, ptrdiff_t stride) {
  switch (rows) {
#define CASE(R) \
  case R:       \
    return int_tile<R>(a, taps, offset, pairs, panel, out, stride);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
  }
}

void vnni_tile_float(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                     const int16_t* panel, const float* scale, const float* bias, int columns, float* const* out) {
  switch (rows) {
#define CASE(R) \
  case R:       \
    return float_tile<R>(a, taps, offset, pairs, panel, scale, bias, columns, out);
    CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) CASE(9) CASE(10) CASE(11) CASE(12)
#undef CASE
  }
}

bool avx512_quantize(const float* x, int64_t n, int64_t padded, Range range, int16_t* out) {
  const Encoder encode(range);
  __mmask16 nan = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = first(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(there, x + i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    _mm512_mask_cvtepi32_storeu_epi16(out + i, there, encode(v));
  }
  if (n < padded) std::memset(out + n, 0, (padded - n) * sizeof(int16_t));
  return nan;
}

// If one operand is NaN, min and max return the second one. So x comes second, and its NaN stays.
static inline __m512 clamp(__m512 q, __m512 low, __m512 high) { return _mm512_min_ps(high, _mm512_max_ps(low, q)); }
static inline __m512 rounded(__m512 v) {
  return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

void avx512_fake_quantize(const float* x, int64_t n, Range range, float* out) {
  const __m512 scale = _mm512_set1_ps(range.scale), low = _mm512_set1_ps(range.low), high = _mm512_set1_ps(range.high);
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = first(n - i);
    const __m512 code = clamp(rounded(_mm512_div_ps(_mm512_maskz_loadu_ps(there, x + i), scale)), low, high);
    _mm512_mask_storeu_ps(out + i, there, _mm512_mul_ps(code, scale));
  }
}

double avx512_fake_quantize_backward(const float* x, const float* grad, int64_t n, Range range, float* out) {
  const __m512 scale = _mm512_set1_ps(range.scale), low = _mm512_set1_ps(range.low), high = _mm512_set1_ps(range.high);
  __m512 total = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 there = first(n - i);
    const __m512 v = _mm512_div_ps(_mm512_maskz_loadu_ps(there, x + i), scale), q = rounded(v);
    const __m512 code = clamp(q, low, high), g = _mm512_maskz_loadu_ps(there, grad + i);
    const __mmask16 inside = _mm512_cmp_ps_mask(code, q, _CMP_EQ_OQ);
    total = _mm512_fmadd_ps(g, _mm512_mask_sub_ps(code, inside, q, v), total);
    _mm512_mask_storeu_ps(out + i, there, _mm512_maskz_mov_ps(inside, g));
  }
  return _mm512_reduce_add_ps(total);
}

}  // namespace quest

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
