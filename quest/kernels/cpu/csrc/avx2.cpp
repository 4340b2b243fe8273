// Integer functions with AVX2 and FMA. core.h says what each function computes.
#include "core.h"

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
namespace {

typedef int32_t pair_of_int16 __attribute__((may_alias, aligned(2)));

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

// Computes R x 16 sums in 2 R registers. vpmaddwd multiplies pairs of int16 and adds both products in int32, so nothing
// saturates.
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
      for (int i = 0; i < 2; i++) half[i][x] = v[WINOGRAD_ROWS[Third][i]];  // the compiler removes the other rows
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

// 24 A^T of F(4x4, 3x3), divided by the scales of the integer kernel transform, modulo 2^32.
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

}  // namespace

extern const Isa avx2 = {
    "avx2",
    6,
    quantize,
    unpack8,
    unpack4,
    tiles_int,
    tiles_float,
    winograd_weight,
    winograd_input,
    winograd_output,
    avx2_float::softmax,
    avx2_float::group_norm,
    avx2_float::layer_norm,
    avx2_float::geglu,
    avx2_float::fake_quantize,
    avx2_float::fake_quantize_backward,
    nullptr,
};

}  // namespace quest

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
