// AVX2 and FMA, with vectors of eight numbers. core.h says what each function computes.
#include "core.h"

#if QUEST_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

QUEST_TARGET_BEGIN("avx2,fma")
namespace quest {
namespace {

constexpr int L = 8;

struct F { __m256 v; };
struct I { __m256i v; };
struct M { __m256 v; };
struct All {};
struct Part {
  int n;
  __m256i mask;
  explicit Part(int64_t n)
      : n(static_cast<int>(n)), mask(_mm256_cmpgt_epi32(_mm256_set1_epi32(this->n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))) {}
};

INLINE __m256i whole(const void* x) { return _mm256_loadu_si256(static_cast<const __m256i*>(x)); }
INLINE void put(void* x, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(x), v); }

INLINE F set(float x) { return {_mm256_set1_ps(x)}; }
INLINE I set(int32_t x) { return {_mm256_set1_epi32(x)}; }
INLINE F load(const float* x, All = {}) { return {_mm256_loadu_ps(x)}; }
INLINE F load(const float* x, Part p) { return {_mm256_maskload_ps(x, p.mask)}; }
INLINE I load(const int32_t* x) { return {whole(x)}; }
INLINE void store(float* x, F a, All) { _mm256_storeu_ps(x, a.v); }
INLINE void store(float* x, F a, Part p) { _mm256_maskstore_ps(x, p.mask, a.v); }
INLINE void store_bytes(uint8_t* out, I a, I b, I c, I d) {
  const __m256i packed = _mm256_packus_epi16(_mm256_packs_epi32(a.v, b.v), _mm256_packs_epi32(c.v, d.v));
  put(out, _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
}
INLINE int64_t eight_bytes(I a) {
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  return _mm_cvtsi128_si64(_mm_packus_epi16(words, words));
}
INLINE void store_bytes(uint8_t* out, I a, All) {
  const int64_t bytes = eight_bytes(a);
  std::memcpy(out, &bytes, 8);
}
INLINE void store_bytes(uint8_t* out, I a, Part p) {
  const int64_t bytes = eight_bytes(a);
  std::memcpy(out, &bytes, p.n);
}

typedef int16_t W __attribute__((vector_size(32), aligned(1), may_alias));
typedef uint16_t U __attribute__((vector_size(32)));
INLINE void store(int32_t* x, I a) { put(x, a.v); }
INLINE I add_pairs(I sum, I a, W b) { return {_mm256_add_epi32(sum.v, _mm256_madd_epi16(a.v, __m256i(b)))}; }
INLINE I sixty_fourth(I a) { return {_mm256_srai_epi32(a.v, 6)}; }

INLINE F operator+(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
INLINE F operator-(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
INLINE F operator*(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
INLINE F operator/(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
INLINE F fmadd(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F fnmadd(F a, F b, F c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
INLINE F min(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
INLINE F max(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
INLINE F round(F a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE F magnitude(F a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.f), a.v)}; }
INLINE F with_sign(F a, F of) { return {_mm256_or_ps(a.v, _mm256_and_ps(_mm256_set1_ps(-0.f), of.v))}; }
INLINE F times_power(F a, F n) {
  const __m256i power = _mm256_add_epi32(_mm256_cvtps_epi32(max(n, set(-126.f)).v), _mm256_set1_epi32(127));
  return {_mm256_mul_ps(a.v, _mm256_castsi256_ps(_mm256_slli_epi32(power, 23)))};
}
INLINE I operator+(I a, I b) { return {_mm256_add_epi32(a.v, b.v)}; }
INLINE I operator-(I a, I b) { return {_mm256_sub_epi32(a.v, b.v)}; }
INLINE I operator*(I a, I b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
INLINE I max(I a, I b) { return {_mm256_max_epi32(a.v, b.v)}; }
INLINE I to_int(F a) { return {_mm256_cvtps_epi32(a.v)}; }
INLINE F to_float(I a) { return {_mm256_cvtepi32_ps(a.v)}; }
INLINE I add_bytes(I sum, const uint8_t* x) {
  return {_mm256_add_epi32(sum.v, _mm256_sad_epu8(whole(x), _mm256_setzero_si256()))};
}
INLINE I add_bytes(I sum, const uint8_t* x, int64_t n) {
  uint8_t part[4 * L] = {};
  std::memcpy(part, x, n);
  return add_bytes(sum, part);
}

INLINE M is_nan(F a) { return {_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q)}; }
INLINE M equal(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
INLINE M not_below(F a, F b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NLT_UQ)}; }
INLINE M operator|(M a, M b) { return {_mm256_or_ps(a.v, b.v)}; }
INLINE bool any(M a) { return _mm256_movemask_ps(a.v); }
INLINE F select(M which, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, which.v)}; }
template <class V>
INLINE V select(All, V a, V) { return a; }
INLINE F select(Part p, F a, F b) { return {_mm256_blendv_ps(b.v, a.v, _mm256_castsi256_ps(p.mask))}; }
INLINE I select(Part p, I a, I b) { return {_mm256_blendv_epi8(b.v, a.v, p.mask)}; }
INLINE float total(F a) {
  __m128 x = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_add_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_add_ss(x, _mm_shuffle_ps(x, x, 1)));
}
INLINE float highest(F a) {
  __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  x = _mm_max_ps(x, _mm_movehl_ps(x, x));
  return _mm_cvtss_f32(_mm_max_ss(x, _mm_shuffle_ps(x, x, 1)));
}
INLINE int32_t total(I a) {
  __m128i x = _mm_add_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  x = _mm_add_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}
INLINE int32_t highest(I a) {
  __m128i x = _mm_max_epi32(_mm256_castsi256_si128(a.v), _mm256_extracti128_si256(a.v, 1));
  x = _mm_max_epi32(x, _mm_shuffle_epi32(x, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(x, _mm_shuffle_epi32(x, 0xb1)));
}

#include "functions.h"
#include "pairs.h"

constexpr int ROWS = 60;

INLINE void widen_row(const uint8_t* a, int64_t bytes, int32_t* out) {
  for (int64_t k = 0; k < bytes; k += 32) put(out + k / 4, _mm256_and_si256(whole(a + k), _mm256_set1_epi16(255)));
  out += bytes / 4;
  for (int64_t k = 0; k < bytes; k += 32) put(out + k / 4, _mm256_srli_epi16(whole(a + k), 8));
}

// Bytes are widened to int16, because vpmaddubsw, which multiplies bytes, adds two products in an int16 and can saturate.
void multiply(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
              const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride) {
  alignas(32) int32_t wide_a[ROWS * ROW];
  alignas(32) int16_t wide_b[STRETCH * NR];
  for (int64_t done = 0, n; done < segments * bytes; done += n) {
    const int64_t at = done % bytes;
    n = bytes - at < STRETCH ? bytes - at : STRETCH;
    for (int r = 0; r < rows; r++) widen_row(a + r * stride + offset[done / bytes] + at, n, wide_a + r * ROW);
    for (int p = 0; p < panels; p++) {
      widen_panel(b + p * panel + done * NR, n, wide_b);
      tiles(wide_a, rows, wide_b, n / 2, !done, out + p * NR, out_stride);
    }
  }
}

#include "winograd.h"

const Winograd winograd = {1, winograd_input, winograd_multiply};

}  // namespace

void avx2_layer_norm(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y) {
  layer_norm_row(x, n, eps, weight, bias, y);
}

extern const Isa avx2 = {
    "avx2", ROWS, MAX_PANELS, 4, quantize, quantize_rows, extremes, sums, unpack4, multiply, multiply, nullptr, finish, pack_keys,
    pack_values, softmax, channel_sums, scale_channels, avx2_layer_norm, geglu, fake_quantize, fake_quantize_backward,
    nullptr, nullptr, &winograd,
};

}  // namespace quest
QUEST_TARGET_END
#endif
