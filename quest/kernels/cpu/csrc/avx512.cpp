// AVX-512 with VNNI, with vectors of sixteen numbers. core.h says what each function computes.
#include "core.h"

#if QUEST_X86
#include <immintrin.h>

#include <cmath>
#include <cstring>

QUEST_TARGET_BEGIN("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma")
namespace quest {
namespace {

constexpr int L = 16, LANES = 16;
using V = __m512i;

struct F { __m512 v; };
struct I { __m512i v; };
struct M { __mmask16 v; };
struct All {};
struct Part {
  __mmask16 mask;
  explicit Part(int64_t n) : mask(static_cast<__mmask16>(n >= 16 ? 0xffff : (1u << n) - 1)) {}
};

INLINE F set(float x) { return {_mm512_set1_ps(x)}; }
INLINE I set(int32_t x) { return {_mm512_set1_epi32(x)}; }
INLINE F load(const float* x, All = {}) { return {_mm512_loadu_ps(x)}; }
INLINE F load(const float* x, Part p) { return {_mm512_maskz_loadu_ps(p.mask, x)}; }
INLINE I load(const int32_t* x) { return {_mm512_loadu_si512(x)}; }
INLINE void store(float* x, F a, All) { _mm512_storeu_ps(x, a.v); }
INLINE void store(float* x, F a, Part p) { _mm512_mask_storeu_ps(x, p.mask, a.v); }
INLINE void store_bytes(uint8_t* out, I a, I b, I c, I d) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const __m512i packed = _mm512_packus_epi16(_mm512_packs_epi32(a.v, b.v), _mm512_packs_epi32(c.v, d.v));
  _mm512_storeu_si512(out, _mm512_permutexvar_epi32(order, packed));
}
INLINE void store_bytes(uint8_t* out, I a, All) { _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm512_cvtepi32_epi8(a.v)); }
INLINE void store_bytes(uint8_t* out, I a, Part p) { _mm512_mask_cvtepi32_storeu_epi8(out, p.mask, a.v); }

typedef int16_t W __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t U __attribute__((vector_size(64)));
INLINE void store(int32_t* x, I a) { _mm512_storeu_si512(x, a.v); }
INLINE I add_pairs(I sum, I a, W b) { return {_mm512_dpwssd_epi32(sum.v, a.v, __m512i(b))}; }
INLINE I sixty_fourth(I a) { return {_mm512_srai_epi32(a.v, 6)}; }

INLINE F operator+(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
INLINE F operator-(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
INLINE F operator*(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
INLINE F operator/(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
INLINE F fmadd(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
INLINE F fnmadd(F a, F b, F c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
INLINE F min(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
INLINE F max(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
INLINE F round(F a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
INLINE F magnitude(F a) { return {_mm512_abs_ps(a.v)}; }
INLINE F with_sign(F a, F of) { return {_mm512_or_ps(a.v, _mm512_and_ps(_mm512_set1_ps(-0.f), of.v))}; }
INLINE F times_power(F a, F n) { return {_mm512_scalef_ps(a.v, n.v)}; }
INLINE I operator+(I a, I b) { return {_mm512_add_epi32(a.v, b.v)}; }
INLINE I operator-(I a, I b) { return {_mm512_sub_epi32(a.v, b.v)}; }
INLINE I operator*(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
INLINE I max(I a, I b) { return {_mm512_max_epi32(a.v, b.v)}; }
INLINE I to_int(F a) { return {_mm512_cvtps_epi32(a.v)}; }
INLINE F to_float(I a) { return {_mm512_cvtepi32_ps(a.v)}; }

INLINE V zero() { return _mm512_setzero_si512(); }
INLINE V vector(const int8_t* b) { return _mm512_loadu_si512(b); }
INLINE V four(int32_t bytes) { return _mm512_set1_epi32(bytes); }
INLINE V dot(V c, V a, V b) { return _mm512_dpbusd_epi32(c, a, b); }
INLINE void add_dot(V& c, V a, V b) { __asm__("vpdpbusd %2, %1, %0" : "+v"(c) : "v"(a), "v"(b)); }
INLINE void put(int32_t* out, V c) { _mm512_storeu_si512(out, c); }

using FV = __m512;
INLINE V pairs(V a, V b) { return _mm512_madd_epi16(a, b); }
INLINE FV floats(const float* x) { return _mm512_loadu_ps(x); }
INLINE FV times(FV a, float b) { return _mm512_mul_ps(a, _mm512_set1_ps(b)); }
INLINE FV fmadd(V a, FV b, FV c) { return _mm512_fmadd_ps(_mm512_cvtepi32_ps(a), b, c); }
INLINE void put(float* out, FV c) { _mm512_storeu_ps(out, c); }

INLINE I add_bytes(I sum, const uint8_t* x) { return {dot(sum.v, _mm512_loadu_si512(x), _mm512_set1_epi8(1))}; }
INLINE I add_bytes(I sum, const uint8_t* x, int64_t n) {
  return {dot(sum.v, _mm512_maskz_loadu_epi8((__mmask64{1} << n) - 1, x), _mm512_set1_epi8(1))};
}

INLINE M is_nan(F a) { return {_mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q)}; }
INLINE M equal(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
INLINE M not_below(F a, F b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NLT_UQ)}; }
INLINE M operator|(M a, M b) { return {static_cast<__mmask16>(a.v | b.v)}; }
INLINE bool any(M a) { return a.v; }
INLINE F select(M which, F a, F b) { return {_mm512_mask_mov_ps(b.v, which.v, a.v)}; }
template <class W>
INLINE W select(All, W a, W) { return a; }
INLINE F select(Part p, F a, F b) { return {_mm512_mask_mov_ps(b.v, p.mask, a.v)}; }
INLINE I select(Part p, I a, I b) { return {_mm512_mask_mov_epi32(b.v, p.mask, a.v)}; }
INLINE float total(F a) { return _mm512_reduce_add_ps(a.v); }
INLINE float highest(F a) { return _mm512_reduce_max_ps(a.v); }
INLINE int32_t total(I a) { return _mm512_reduce_add_epi32(a.v); }
INLINE int32_t highest(I a) { return _mm512_reduce_max_epi32(a.v); }

#include "functions.h"
#include "vnni.h"
#include "pairs.h"
#include "winograd.h"

const Winograd winograd = {2, winograd_input, winograd_multiply};

void multiply(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
              const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride) {
  switch (panels) {
#define CASE(P) \
  case P: return vnni_panels<P>(a, stride, rows, segments, offset, bytes, b, panel, out, out_stride);
    CASE(1) CASE(2) CASE(3) CASE(4)
#undef CASE
  }
}

}  // namespace

// Layer norms are those of AVX2. Vectors of sixteen numbers would add in another order and change last bits.
extern const Isa avx512vnni = {
    "avx512vnni", 24, MAX_PANELS, 4, quantize, quantize_rows, extremes, sums, unpack4, multiply, multiply, multiply_groups, finish,
    pack_keys, pack_values, softmax, channel_sums, scale_channels, avx2_layer_norm, geglu, fake_quantize,
    fake_quantize_backward, nullptr, nullptr, &winograd,
};

}  // namespace quest
QUEST_TARGET_END
#endif
