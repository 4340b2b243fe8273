// AVX2 and FMA. See core.h for what each function computes.
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

namespace quest {
namespace {

typedef int32_t pair_of_int16 __attribute__((may_alias, aligned(2)));

inline __m256i clamp_round(__m256 x, __m256 low, __m256 high) {
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(x, low), high));
}

inline __m256i to_int16(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}

// Rest of a row, as a whole vector.
inline __m256 load_part(const float* x, int64_t n) {
  alignas(32) float part[8] = {};
  std::memcpy(part, x, n * sizeof(float));
  return _mm256_load_ps(part);
}

inline void store_part(float* x, int64_t n, __m256 v) {
  alignas(32) float part[8];
  _mm256_store_ps(part, v);
  std::memcpy(x, part, n * sizeof(float));
}

inline float sum(__m256 v) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}

// exp to about one unit in the last place: exp(x) = 2^n exp(r), |r| <= ln(2) / 2, exp(r) by the polynomial of Cephes.
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

// x (1 + erf(x / sqrt 2)) / 2, erf by Abramowitz and Stegun 7.1.26: absolute error of erf 1.5e-7.
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

bool quantize(const float* x, int64_t n, int64_t padded, Range range, int16_t* out) {
  const __m256 scale = _mm256_set1_ps(range.scale), low = _mm256_set1_ps(range.low), high = _mm256_set1_ps(range.high);
  __m256 nan = _mm256_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    __m256 a = _mm256_div_ps(_mm256_loadu_ps(x + i), scale), b = _mm256_div_ps(_mm256_loadu_ps(x + i + 8), scale);
    nan = _mm256_or_ps(nan, _mm256_cmp_ps(a, b, _CMP_UNORD_Q));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i),
                        to_int16(clamp_round(a, low, high), clamp_round(b, low, high)));
  }
  if (i < n) {
    const __m256i left = _mm256_set1_epi32(static_cast<int>(n - i));
    const __m256i index = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i first = _mm256_cmpgt_epi32(left, index);
    const __m256i second = _mm256_cmpgt_epi32(left, _mm256_add_epi32(index, _mm256_set1_epi32(8)));
    __m256 a = _mm256_div_ps(_mm256_maskload_ps(x + i, first), scale);
    __m256 b = _mm256_div_ps(_mm256_maskload_ps(x + i + 8, second), scale);
    nan = _mm256_or_ps(nan, _mm256_and_ps(_mm256_cmp_ps(a, a, _CMP_UNORD_Q), _mm256_castsi256_ps(first)));
    nan = _mm256_or_ps(nan, _mm256_and_ps(_mm256_cmp_ps(b, b, _CMP_UNORD_Q), _mm256_castsi256_ps(second)));
    const __m256i codes = to_int16(_mm256_and_si256(clamp_round(a, low, high), first),
                                   _mm256_and_si256(clamp_round(b, low, high), second));
    if (padded - i >= 16) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i), codes);
      n = i + 16;
    } else {
      alignas(32) int16_t part[16];
      _mm256_store_si256(reinterpret_cast<__m256i*>(part), codes);
      std::memcpy(out + i, part, (n - i) * sizeof(int16_t));
    }
  }
  if (n < padded) std::memset(out + n, 0, (padded - n) * sizeof(int16_t));
  return _mm256_movemask_ps(nan);
}

void unpack8(const uint8_t* codes, const int16_t* zero_point, int64_t steps, int16_t* out) {
  alignas(32) int16_t z[32];
  for (int i = 0; i < 32; i++) z[i] = zero_point[i / 2];
  const __m256i z0 = _mm256_load_si256(reinterpret_cast<__m256i*>(z)),
                z1 = _mm256_load_si256(reinterpret_cast<__m256i*>(z + 16));
  for (int64_t s = 0; s < steps; s++, codes += 32, out += 32) {
    __m256i a = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    __m256i b = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_sub_epi16(a, z0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_sub_epi16(b, z1));
  }
}

void unpack4(const uint8_t* codes, const int16_t* zero_point, int64_t steps, int16_t* out) {
  alignas(32) int16_t z[32];
  for (int i = 0; i < 32; i++) z[i] = zero_point[i / 2];
  const __m256i z0 = _mm256_load_si256(reinterpret_cast<__m256i*>(z)),
                z1 = _mm256_load_si256(reinterpret_cast<__m256i*>(z + 16)), mask = _mm256_set1_epi16(15);
  for (int64_t s = 0; s < steps; s++, codes += 16, out += 32) {
    __m256i both = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_sub_epi16(_mm256_and_si256(both, mask), z0));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 16), _mm256_sub_epi16(_mm256_srli_epi16(both, 4), z1));
  }
}

// R x 16 sums in 2 R registers. vpmaddwd multiplies pairs of int16 and adds them in int32: nothing saturates.
template <int R>
inline void accumulate(const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs, const int16_t* panel,
                       __m256i (&c)[R][2]) {
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) c[r][0] = c[r][1] = _mm256_setzero_si256();
  for (int t = 0; t < taps; t++) {
    const pair_of_int16* row[R];
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) row[r] = reinterpret_cast<const pair_of_int16*>(a[r] + offset[t]);
    for (int64_t k = 0; k < pairs; k++, panel += 2 * NR) {
      const __m256i b0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel));
      const __m256i b1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(panel + 16));
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const __m256i v = _mm256_set1_epi32(row[r][k]);
        c[r][0] = _mm256_add_epi32(c[r][0], _mm256_madd_epi16(v, b0));
        c[r][1] = _mm256_add_epi32(c[r][1], _mm256_madd_epi16(v, b1));
      }
    }
  }
}

template <int R>
void tile_int(const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs, const int16_t* panel,
              int32_t* out, ptrdiff_t stride) {
  __m256i c[R][2];
  accumulate<R>(a, taps, offset, pairs, panel, c);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * stride), c[r][0]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + r * stride + 8), c[r][1]);
  }
}

template <int R>
void tile_float(const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs, const int16_t* panel,
                const float* scale, const float* bias, int columns, float* const* out) {
  __m256i c[R][2];
  accumulate<R>(a, taps, offset, pairs, panel, c);
  const __m256 s0 = _mm256_loadu_ps(scale), s1 = _mm256_loadu_ps(scale + 8);
  const __m256 b0 = _mm256_loadu_ps(bias), b1 = _mm256_loadu_ps(bias + 8);
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    const __m256 y0 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(c[r][0]), s0, b0);
    const __m256 y1 = _mm256_fmadd_ps(_mm256_cvtepi32_ps(c[r][1]), s1, b1);
    if (columns == NR) {
      _mm256_storeu_ps(out[r], y0);
      _mm256_storeu_ps(out[r] + 8, y1);
    } else {
      alignas(32) float part[NR];
      _mm256_store_ps(part, y0);
      _mm256_store_ps(part + 8, y1);
      std::memcpy(out[r], part, columns * sizeof(float));
    }
  }
}

template <class... Rest>
void tiles_int(int rows, Rest... rest) {
  switch (rows) {
    case 1: return tile_int<1>(rest...);
    case 2: return tile_int<2>(rest...);
    case 3: return tile_int<3>(rest...);
    case 4: return tile_int<4>(rest...);
    case 5: return tile_int<5>(rest...);
    default: return tile_int<6>(rest...);
  }
}

template <class... Rest>
void tiles_float(int rows, Rest... rest) {
  switch (rows) {
    case 1: return tile_float<1>(rest...);
    case 2: return tile_float<2>(rest...);
    case 3: return tile_float<3>(rest...);
    case 4: return tile_float<4>(rest...);
    case 5: return tile_float<5>(rest...);
    default: return tile_float<6>(rest...);
  }
}

inline __m256i shl(__m256i x, int by) { return _mm256_slli_epi16(x, by); }
inline __m256i add(__m256i a, __m256i b) { return _mm256_add_epi16(a, b); }
inline __m256i sub(__m256i a, __m256i b) { return _mm256_sub_epi16(a, b); }

// G of F(4x4, 3x3) with rows scaled to integers: {1,0,0}, {1,1,1}, {1,-1,1}, {1,2,4}, {1,-2,4}, {0,0,1}.
inline void weight_transform(const __m256i g[3], __m256i out[6]) {
  const __m256i near = add(g[0], g[2]), far = add(g[0], shl(g[2], 2)), twice = shl(g[1], 1);
  out[0] = g[0];
  out[1] = add(near, g[1]);
  out[2] = sub(near, g[1]);
  out[3] = add(far, twice);
  out[4] = sub(far, twice);
  out[5] = g[2];
}

template <int Third>
void third_of_weight(const int16_t* in, int64_t numbers, int16_t* out, ptrdiff_t stride) {
  for (int64_t n = 0; n < numbers; n += 16) {
    __m256i half[2][3], v[6];
    for (int x = 0; x < 3; x++) {
      __m256i g[3];
      for (int y = 0; y < 3; y++)
        g[y] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + (3 * y + x) * numbers + n));
      weight_transform(g, v);
      for (int i = 0; i < 2; i++) half[i][x] = v[WINOGRAD_ROWS[Third][i]];  // the compiler drops the others
    }
    for (int i = 0; i < 2; i++) {
      weight_transform(half[i], v);
      for (int j = 0; j < 6; j++)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (6 * i + j) * stride + n), v[j]);
    }
  }
}

void winograd_weight(const int16_t* in, int64_t numbers, int third, int16_t* out, ptrdiff_t stride) {
  switch (third) {
    case 0: return third_of_weight<0>(in, numbers, out, stride);
    case 1: return third_of_weight<1>(in, numbers, out, stride);
    default: return third_of_weight<2>(in, numbers, out, stride);
  }
}

// B^T of F(4x4, 3x3).
inline void input_transform(const __m256i d[6], __m256i out[6]) {
  out[0] = add(sub(shl(d[0], 2), add(shl(d[2], 2), d[2])), d[4]);
  __m256i even = sub(d[4], shl(d[2], 2)), odd = sub(d[3], shl(d[1], 2));
  out[1] = add(even, odd);
  out[2] = sub(even, odd);
  even = sub(d[4], d[2]), odd = shl(sub(d[3], d[1]), 1);
  out[3] = add(even, odd);
  out[4] = sub(even, odd);
  out[5] = add(sub(shl(d[1], 2), add(shl(d[3], 2), d[3])), d[5]);
}

void winograd_input(const int16_t* in, ptrdiff_t row, ptrdiff_t pixel, int64_t channels, int16_t* out, ptrdiff_t stride) {
  for (int64_t c = 0; c < channels; c += 16) {
    __m256i half[6][6], v[6];
    for (int x = 0; x < 6; x++) {
      __m256i d[6];
      for (int y = 0; y < 6; y++)
        d[y] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + y * row + x * pixel + c));
      input_transform(d, v);
      for (int i = 0; i < 6; i++) half[i][x] = v[i];
    }
    for (int i = 0; i < 6; i++) {
      input_transform(half[i], v);
      for (int j = 0; j < 6; j++)
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (6 * i + j) * stride + c), v[j]);
    }
  }
}

// 24 A^T of F(4x4, 3x3) over the integer kernel transform's scales, modulo 2^32.
inline void output_transform(const __m256i m[6], __m256i out[4]) {
  const __m256i s12 = _mm256_add_epi32(m[1], m[2]), d12 = _mm256_sub_epi32(m[1], m[2]);
  const __m256i s34 = _mm256_add_epi32(m[3], m[4]), d34 = _mm256_sub_epi32(m[3], m[4]);
  const __m256i m0 = _mm256_add_epi32(_mm256_slli_epi32(m[0], 1), m[0]);  // 3 m0
  const __m256i m5 = _mm256_add_epi32(_mm256_slli_epi32(m[5], 2), _mm256_slli_epi32(m[5], 1));  // 6 m5
  const __m256i twice = _mm256_slli_epi32(d34, 1);
  out[0] = _mm256_add_epi32(_mm256_slli_epi32(_mm256_sub_epi32(m0, _mm256_slli_epi32(s12, 1)), 1), s34);
  out[1] = _mm256_sub_epi32(twice, _mm256_slli_epi32(d12, 2));
  out[2] = _mm256_slli_epi32(_mm256_sub_epi32(s34, s12), 2);
  out[3] = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(twice, d12), m5), 2);
}

void winograd_output(const int32_t* in, ptrdiff_t stride, int64_t channels, const float* scale, const float* bias,
                     float* out, ptrdiff_t row, ptrdiff_t pixel, int height, int width) {
  const __m256i ninth = _mm256_set1_epi32(static_cast<int32_t>(954437177u));  // 9 * 954437177 = 1 modulo 2^32
  for (int64_t c = 0; c < channels; c += 8) {
    __m256i half[4][6], y[4];
    for (int j = 0; j < 6; j++) {
      __m256i m[6];
      for (int i = 0; i < 6; i++)
        m[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(in + (6 * i + j) * stride + c));
      output_transform(m, y);
      for (int i = 0; i < 4; i++) half[i][j] = y[i];
    }
    const __m256 s = _mm256_loadu_ps(scale + c), b = _mm256_loadu_ps(bias + c);
    for (int i = 0; i < height; i++) {
      output_transform(half[i], y);
      for (int j = 0; j < width; j++) {
        const __m256i product = _mm256_srai_epi32(_mm256_mullo_epi32(y[j], ninth), 6);
        const __m256 value = _mm256_fmadd_ps(_mm256_cvtepi32_ps(product), s, b);
        float* to = out + i * row + j * pixel + c;
        if (channels - c >= 8)
          _mm256_storeu_ps(to, value);
        else
          store_part(to, channels - c, value);
      }
    }
  }
}

// In three passes over all rows, so that the end of one row's sum need not be waited for.
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
    if (whole < m) {  // the row goes on, with columns of a panel that no key fills
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

// Sums over pixels of x, or with MEAN of (x - mean)^2, for V vectors of channels.
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

// The operand that may be NaN comes second: it passes.
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

}  // namespace

extern const Isa avx2 = {
    "avx2",          6,
    quantize,        unpack8,        unpack4,         tiles_int, tiles_float,
    winograd_weight, winograd_input, winograd_output, softmax,   group_norm,  layer_norm, geglu,
    fake_quantize,   fake_quantize_backward, nullptr,
};

}  // namespace quest

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
