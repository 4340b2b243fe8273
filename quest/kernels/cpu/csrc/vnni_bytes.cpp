// Products of bytes with AVX-512 VNNI (see Bytes in core.h). The instruction vpdpbusd adds four products to an int32.
#include "core.h"

#if QUEST_X86
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

static bool quantize(const float* x, int64_t n, int64_t padded, Range range, uint8_t* out) {
  const Encoder encode(range);
  const __m512i lowest = _mm512_cvtps_epi32(encode.low);
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __mmask16 nan = 0;
  int64_t i = 0;
  for (; i + 64 <= n; i += 64) {
    __m512i c[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
      const __m512 v = _mm512_loadu_ps(x + i + 16 * j);
      nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
      c[j] = _mm512_sub_epi32(encode(v), lowest);
    }
    const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(c[0], c[1]), _mm512_packs_epi32(c[2], c[3]));
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi32(order, packed));
  }
  for (; i < n; i += 16) {
    const __mmask16 there = first(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(there, x + i);
    nan |= _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    _mm512_mask_cvtepi32_storeu_epi8(out + i, there, _mm512_sub_epi32(encode(v), lowest));
  }
  if (n < padded) std::memset(out + n, 0, padded - n);
  return nan;
}

static void sums(const uint8_t* a, ptrdiff_t stride, int64_t rows, int64_t n, int32_t* out) {
  const __m512i one = _mm512_set1_epi8(1);
  const int64_t whole = n / 64 * 64;
  const __mmask64 rest = (__mmask64{1} << (n - whole)) - 1;
  for (int64_t r = 0; r < rows; r++, a += stride) {
    __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), _mm512_maskz_loadu_epi8(rest, a + whole), one);
    for (int64_t i = 0; i < whole; i += 64) sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(a + i), one);
    out[r] = _mm512_reduce_add_epi32(sum);
  }
}

// Puts two channels of each output next to the following two.
static inline __m512i interleave(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

static void unpack8(const uint8_t* codes, int64_t pairs, int8_t* out, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  const __m256i* from = reinterpret_cast<const __m256i*>(codes);
  __m512i total = _mm512_loadu_si512(sums);
  auto put = [&](__m256i odd, int sign) {
    const __m512i v = _mm512_xor_si512(interleave(_mm256_loadu_si256(from), odd), _mm512_set1_epi32(sign));
    _mm512_storeu_si512(out, v);
    total = _mm512_dpbusd_epi32(total, ones, v);
  };
  for (; pairs > 1; pairs -= 2, from += 2, out += 64) put(_mm256_loadu_si256(from + 1), static_cast<int>(0x80808080u));
  if (pairs) put(_mm256_setzero_si256(), 0x8080);
  _mm512_storeu_si512(sums, total);
}

static void unpack4(const uint8_t* codes, int64_t pairs, int8_t* out, int32_t* sums) {
  alignas(64) static const uint16_t order[32] = {0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15,
                                                 0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15};
  const __m512i index = _mm512_load_si512(order), mask = _mm512_set1_epi8(15), ones = _mm512_set1_epi8(1);
  const __m512i shift = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi32(4), 1);
  __m512i total = _mm512_loadu_si512(sums);
  auto put = [&](__m256i both, int eight) {
    const __m512i codes = _mm512_srlv_epi32(_mm512_permutexvar_epi16(index, _mm512_castsi256_si512(both)), shift);
    const __m512i v = _mm512_sub_epi8(_mm512_and_si512(codes, mask), _mm512_set1_epi32(eight));
    _mm512_storeu_si512(out, v);
    total = _mm512_dpbusd_epi32(total, ones, v);
  };
  for (; pairs > 1; pairs -= 2, codes += 32, out += 64)
    put(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)), 0x08080808);
  if (pairs)
    put(_mm256_inserti128_si256(_mm256_setzero_si256(), _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)), 0), 0x0808);
  _mm512_storeu_si512(sums, total);
}

typedef int32_t four_bytes __attribute__((may_alias, aligned(1)));

// Computes R x 16 P sums in registers.
template <int R, int P>
static void multiply_tile(const uint8_t* a, ptrdiff_t stride, int segments, const ptrdiff_t* offset, int64_t bytes,
                          const int8_t* b, ptrdiff_t panel, int32_t* out, ptrdiff_t out_stride) {
  __m512i c[R][P];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) c[r][p] = _mm512_setzero_si512();
  for (int s = 0; s < segments; s++) {
    const uint8_t* x = a + offset[s];
    for (int64_t k = 0; k < bytes; k += 4, b += 64) {
      __m512i w[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; p++) w[p] = _mm512_loadu_si512(b + p * panel);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const __m512i v = _mm512_set1_epi32(*reinterpret_cast<const four_bytes*>(x + r * stride + k));
#pragma GCC unroll 4
        for (int p = 0; p < P; p++) c[r][p] = _mm512_dpbusd_epi32(c[r][p], v, w[p]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int p = 0; p < P; p++) _mm512_storeu_si512(out + r * out_stride + p * NR, c[r][p]);
}

template <int P>
static void multiply_panels(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset,
                            int64_t bytes, const int8_t* b, ptrdiff_t panel, int32_t* out, ptrdiff_t out_stride) {
  for (; rows > 0; rows -= 6, a += 6 * stride, out += 6 * out_stride) switch (rows) {
#define CASE(R) \
  case R:       \
    multiply_tile<R, P>(a, stride, segments, offset, bytes, b, panel, out, out_stride); \
    break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#undef CASE
      default: multiply_tile<6, P>(a, stride, segments, offset, bytes, b, panel, out, out_stride);
    }
}

static void multiply(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset,
                           int64_t bytes, const int8_t* b, ptrdiff_t panel, int panels, int32_t* out,
                           ptrdiff_t out_stride) {
  switch (panels) {
#define CASE(P) \
  case P:       \
    return multiply_panels<P>(a, stride, rows, segments, offset, bytes, b, panel, out, out_stride);
    CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
  }
}

static void finish(const int32_t* in, ptrdiff_t stride, int rows, const int32_t* sums, const int32_t* zero,
                         const int32_t* constant, const float* scale, const float* bias, int columns, float* const* out,
                         const float* const* residual, ptrdiff_t from) {
  for (int c = 0; c < columns; c += NR) {
    const __m512i z = _mm512_loadu_si512(zero + c), less = _mm512_loadu_si512(constant + c);
    const __m512 s = _mm512_loadu_ps(scale + c), b = _mm512_loadu_ps(bias + c);
    const __mmask16 there = first(columns - c);
    for (int r = 0; r < rows; r++) {
      if (!out[r]) continue;
      const __m512i product = _mm512_sub_epi32(_mm512_loadu_si512(in + r * stride + c), less);
      const __m512i sum = _mm512_sub_epi32(product, _mm512_mullo_epi32(z, _mm512_set1_epi32(sums[r])));
      __m512 y = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), s, b);
      if (residual) y = _mm512_add_ps(y, _mm512_maskz_loadu_ps(there, residual[r] + from + c));
      _mm512_mask_storeu_ps(out[r] + from + c, there, y);
    }
  }
}

static void pack_keys(const uint8_t* k, ptrdiff_t stride, int64_t m, int64_t d, int64_t depth, int8_t* out, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1), sign = _mm512_set1_epi8(-128), zero = _mm512_setzero_si512();
  const __m512i rows = _mm512_mullo_epi32(_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
                                          _mm512_set1_epi32(static_cast<int>(stride)));
  const int last = static_cast<int>((1u << 8 * (d % 4)) - 1);  // mask of the bytes that exist in the last quadruple
  for (int64_t j = 0; j < m; j += NR, k += NR * stride, sums += NR) {
    const __mmask16 there = first(m - j);
    __m512i total = zero;
    for (int64_t e = 0; e < depth; e += 4, out += 4 * NR) {
      __m512i v = zero;
      if (e < d) v = _mm512_maskz_xor_epi32(there, _mm512_mask_i32gather_epi32(zero, there, rows, k + e, 1), sign);
      if (e + 4 > d && e < d) v = _mm512_and_si512(v, _mm512_set1_epi32(last));
      _mm512_storeu_si512(out, v);
      total = _mm512_dpbusd_epi32(total, ones, v);
    }
    _mm512_storeu_si512(sums, total);
  }
}

static void pack_values(const uint8_t* v, ptrdiff_t stride, int64_t m, int64_t d, int64_t length, int8_t* out,
                        int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  const __m128i sign = _mm_set1_epi8(-128);
  for (int64_t i = 0; i < d; i += NR, v += NR, sums += NR) {
    const __mmask16 there = first(d - i);
    __m512i total = _mm512_setzero_si512();
    for (int64_t j = 0; j < length; j += 4, out += 4 * NR) {
      __m128i row[4];
      for (int64_t k = 0; k < 4; k++)
        row[k] = j + k < m ? _mm_xor_si128(_mm_maskz_loadu_epi8(there, v + (j + k) * stride), sign) : _mm_setzero_si128();
      const __m128i low = _mm_unpacklo_epi8(row[0], row[1]), low2 = _mm_unpacklo_epi8(row[2], row[3]);
      const __m128i high = _mm_unpackhi_epi8(row[0], row[1]), high2 = _mm_unpackhi_epi8(row[2], row[3]);
      const __m256i begin = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(low, low2)),
                                                    _mm_unpackhi_epi16(low, low2), 1);
      const __m256i rest = _mm256_inserti128_si256(_mm256_castsi128_si256(_mm_unpacklo_epi16(high, high2)),
                                                   _mm_unpackhi_epi16(high, high2), 1);
      const __m512i all = _mm512_inserti64x4(_mm512_castsi256_si512(begin), rest, 1);
      _mm512_storeu_si512(out, all);
      total = _mm512_dpbusd_epi32(total, ones, all);
    }
    _mm512_storeu_si512(sums, total);
  }
}

// 2^x for x <= 0, with an error of about one unit in the last place. The polynomial is that of exp in avx2_float.cpp, scaled.
static inline __m512 exp2(__m512 x) {
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.5403530e-4f);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.3333558e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.6181291e-3f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.5504109e-2f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.4022651e-1f));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(6.9314718e-1f));
  return _mm512_scalef_ps(_mm512_fmadd_ps(p, r, _mm512_set1_ps(1.f)), n);
}

// Each of the three passes runs over some rows. So the processor need not wait for the end of one row's sum. The first pass
// finds the largest score, among integers.
static void softmax(int rows, int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
                    const int32_t* column, uint8_t* out, int32_t* totals) {
  constexpr int TOGETHER = 4;
  const __m512 by = _mm512_set1_ps(factor * 1.44269504f);
  const __m512 low = _mm512_set1_ps(range.low), high = _mm512_set1_ps(range.high);
  const __m512i lowest = _mm512_cvtps_epi32(low);
  const int64_t whole = m / 16 * 16;
  const __mmask16 rest = first(m - whole);
  for (; rows > 0; rows -= TOGETHER, scores += TOGETHER * width, out += TOGETHER * padded, totals += TOGETHER) {
    const int some = rows < TOGETHER ? rows : TOGETHER;
    __m512i top[TOGETHER];
    __m512 scale[TOGETHER];
    for (int r = 0; r < some; r++) {
      const int32_t* in = scores + r * width;
      __m512i most = _mm512_set1_epi32(INT32_MIN);
      for (int64_t i = 0; i < whole; i += 16)
        most = _mm512_max_epi32(most, _mm512_sub_epi32(_mm512_loadu_si512(in + i), _mm512_loadu_si512(column + i)));
      if (rest) {
        const __m512i last = _mm512_sub_epi32(_mm512_loadu_si512(in + whole), _mm512_loadu_si512(column + whole));
        most = _mm512_mask_max_epi32(most, rest, most, last);
      }
      top[r] = _mm512_set1_epi32(_mm512_reduce_max_epi32(most));
    }
    for (int r = 0; r < some; r++) {
      const int32_t* in = scores + r * width;
      float* work = reinterpret_cast<float*>(scores + r * width);
      __m512 all = _mm512_setzero_ps();
      auto one = [&](int64_t i) {
        const __m512i below = _mm512_sub_epi32(_mm512_sub_epi32(_mm512_loadu_si512(in + i), _mm512_loadu_si512(column + i)),
                                               top[r]);
        const __m512 e = exp2(_mm512_mul_ps(_mm512_cvtepi32_ps(below), by));
        _mm512_storeu_ps(work + i, e);
        return e;
      };
      for (int64_t i = 0; i < whole; i += 16) all = _mm512_add_ps(all, one(i));
      if (rest) all = _mm512_add_ps(all, _mm512_maskz_mov_ps(rest, one(whole)));
      scale[r] = _mm512_set1_ps(1.f / (_mm512_reduce_add_ps(all) * range.scale));
    }
    for (int r = 0; r < some; r++) {
      const float* work = reinterpret_cast<const float*>(scores + r * width);
      uint8_t* to = out + r * padded;
      auto one = [&](int64_t i) {
        const __m512 y = _mm512_min_ps(_mm512_max_ps(_mm512_mul_ps(_mm512_loadu_ps(work + i), scale[r]), low), high);
        return _mm512_sub_epi32(_mm512_cvtps_epi32(y), lowest);
      };
      for (int64_t i = 0; i < whole; i += 16)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtepi32_epi8(one(i)));
      if (rest) _mm512_mask_cvtepi32_storeu_epi8(to + whole, rest, one(whole));
      if (m < padded) std::memset(to + m, 0, padded - m);
    }
    sums(out, padded, some, padded, totals);
  }
}

static void nothing() {}

extern const Bytes vnni_bytes = {
    24, 4, 4, quantize, sums, unpack8, unpack4, multiply, finish, pack_keys, pack_values, softmax, nothing, nothing,
};

}  // namespace quest

#ifdef __clang__
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
