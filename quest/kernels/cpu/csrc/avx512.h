// Functions that the AVX-512 files use. Include this only where the compiler's target has these instructions.
#pragma once
#include "core.h"

#include <cmath>

namespace quest {

static inline __mmask16 first(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1); }

// The same exp as in avx2_float.cpp.
static inline __m512 exp(__m512 x) {
  x = _mm512_min_ps(_mm512_max_ps(x, _mm512_set1_ps(-87.3f)), _mm512_set1_ps(88.3f));
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)),
                                        _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 p = _mm512_set1_ps(1.9875691500e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3981999507e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(8.3334519073e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(4.1665795894e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.6666665459e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.0000001201e-1f));
  p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.f));
  return _mm512_scalef_ps(p, n);
}

// Codes of 16 numbers minus zero point: clamp(round(x / scale)). Multiplying with 1 / scale is much faster than dividing.
// The relative difference of the two results is at most 2^-22. So both round to the same integer, unless the product is this
// close to the middle between two integers. Only then this divides.
struct Encoder {
  __m512 scale, inverse, low, high, tie;
  explicit Encoder(Range r)
      : scale(_mm512_set1_ps(r.scale)), inverse(_mm512_set1_ps(1.f / r.scale)), low(_mm512_set1_ps(r.low)),
        high(_mm512_set1_ps(r.high)),
        tie(_mm512_set1_ps(.5f - std::fmax(1.f, std::fmax(std::fabs(r.low), std::fabs(r.high))) * 0x1p-21f)) {}
  __m512i operator()(__m512 x) const {
    __m512 y = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(x, inverse), low), high);
    const __m512 away = _mm512_sub_ps(y, _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
    if (__builtin_expect(_mm512_cmp_ps_mask(_mm512_abs_ps(away), tie, _CMP_GE_OQ), 0))
      y = _mm512_min_ps(_mm512_max_ps(_mm512_div_ps(x, scale), low), high);
    return _mm512_cvtps_epi32(y);
  }
};

}  // namespace quest
