// The register tiles of AVX-512 with VNNI: vpdpwssd multiplies pairs of int16 and adds them to int32 in one instruction.
#include "core.h"

#if QUEST_X86
#include <cstring>

#ifdef __clang__
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512vnni,avx2,fma")
#endif
#include <immintrin.h>

namespace quest {

typedef int32_t pair_of_int16 __attribute__((may_alias, aligned(2)));

// R x 16 sums in R registers; twelve rows hide the latency of the sums.
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

}  // namespace quest

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
