// AVX-VNNI: the products of AVX-512 VNNI on the vectors of AVX2, for processors without AVX-512. Everything else is that of
// AVX2, Winograd's algorithm too.
#include "core.h"

#if QUEST_X86
#ifdef QUEST_NEW_COMPILER
#include <cpuid.h>
#include <immintrin.h>

namespace quest {
bool avxvnni_allowed() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}
}  // namespace quest

QUEST_TARGET_BEGIN("avx2,fma,avxvnni")
namespace quest {
namespace {

constexpr int LANES = 8;
using V = __m256i;

INLINE V zero() { return _mm256_setzero_si256(); }
INLINE V vector(const int8_t* b) { return _mm256_loadu_si256(reinterpret_cast<const V*>(b)); }
INLINE V four(int32_t bytes) { return _mm256_set1_epi32(bytes); }
INLINE V dot(V c, V a, V b) { return _mm256_dpbusd_avx_epi32(c, a, b); }
INLINE void add_dot(V& c, V a, V b) { __asm__("%{vex%} vpdpbusd %2, %1, %0" : "+x"(c) : "x"(a), "x"(b)); }
INLINE void put(int32_t* out, V c) { _mm256_storeu_si256(reinterpret_cast<V*>(out), c); }

using FV = __m256;
INLINE V pairs(V a, V b) { return _mm256_madd_epi16(a, b); }
INLINE FV floats(const float* x) { return _mm256_loadu_ps(x); }
INLINE FV times(FV a, float b) { return _mm256_mul_ps(a, _mm256_set1_ps(b)); }
INLINE FV fmadd(V a, FV b, FV c) { return _mm256_fmadd_ps(_mm256_cvtepi32_ps(a), b, c); }
INLINE void put(float* out, FV c) { _mm256_storeu_ps(out, c); }

#include "vnni.h"

void multiply(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
              const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride) {
  for (int p = 0; p < panels; p++)
    vnni_panels<1>(a, stride, rows, segments, offset, bytes, b + p * panel, panel, out + p * NR, out_stride);
}

const Winograd winograd = {2, avx2.winograd->input, avx2.winograd->multiply};

}  // namespace

extern const Isa avxvnni = [] {
  Isa one = avx2;
  one.name = "avxvnni";
  one.multiply = one.multiply_some = multiply;
  one.multiply_groups = multiply_groups;
  one.winograd = &winograd;
  return one;
}();

}  // namespace quest
QUEST_TARGET_END

#else
namespace quest {
bool avxvnni_allowed() { return false; }
extern const Isa avxvnni = avx2;
}  // namespace quest
#endif
#endif
