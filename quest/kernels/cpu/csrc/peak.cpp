// Measures how many multiply-accumulates per second a kernel can reach at most: it runs the same instructions on registers.
#include "core.h"

#include <cstring>

#if QUEST_X86
#include <immintrin.h>
#elif QUEST_ARM
#include <arm_neon.h>
#endif

#if QUEST_X86 || QUEST_ARM
#if defined(__clang__)
#define QUEST_TARGET(x) __attribute__((target(x)))
#else
#define QUEST_TARGET(x) __attribute__((target(x), noinline))
#endif

namespace quest {
namespace {

constexpr int SUMS = 12;  // with this many sums, no addition has to wait for the one before

// Defines a function that sets each of the sums c[j] to `add`, which multiplies registers a and b, in each iteration. An empty
// asm statement with the constraint `opaque` hides their values, so the compiler cannot compute them beforehand.
#define QUEST_PEAK(name, isa, vector, opaque, factor, other, zero, add)                        \
  QUEST_TARGET(isa) void name(int64_t iterations) {                                            \
    vector a = factor, b = other, c[SUMS];                                                     \
    _Pragma("GCC unroll 12") for (int j = 0; j < SUMS; j++) c[j] = zero;                       \
    for (int64_t i = 0; i < iterations; i++) {                                                 \
      _Pragma("GCC unroll 12") for (int j = 0; j < SUMS; j++) {                                \
        asm volatile("" : opaque(a));                                                          \
        c[j] = add;                                                                            \
      }                                                                                        \
    }                                                                                          \
    _Pragma("GCC unroll 12") for (int j = 0; j < SUMS; j++) asm volatile("" : opaque(c[j]));   \
  }

#if QUEST_X86
QUEST_PEAK(integer_avx2, "avx2,fma", __m256i, "+x", _mm256_set1_epi16(3), _mm256_set1_epi16(5), _mm256_setzero_si256(),
           _mm256_add_epi32(c[j], _mm256_madd_epi16(a, b)))
QUEST_PEAK(float_avx2, "avx2,fma", __m256, "+x", _mm256_set1_ps(1e-3f), _mm256_set1_ps(2e-3f), _mm256_setzero_ps(),
           _mm256_fmadd_ps(a, b, c[j]))
QUEST_PEAK(integer_avx512vnni, "avx512f,avx512bw,avx512vnni", __m512i, "+v", _mm512_set1_epi8(3), _mm512_set1_epi8(5),
           _mm512_setzero_si512(), _mm512_dpbusd_epi32(c[j], a, b))
#ifdef QUEST_NEW_COMPILER
QUEST_PEAK(integer_avxvnni, "avx2,avxvnni", __m256i, "+x", _mm256_set1_epi8(3), _mm256_set1_epi8(5), _mm256_setzero_si256(),
           _mm256_dpbusd_avx_epi32(c[j], a, b))
#endif
QUEST_PEAK(float_avx512, "avx512f", __m512, "+v", _mm512_set1_ps(1e-3f), _mm512_set1_ps(2e-3f), _mm512_setzero_ps(),
           _mm512_fmadd_ps(a, b, c[j]))
#else
QUEST_PEAK(integer_neon, QUEST_DOTPROD, int32x4_t, "+w", vdupq_n_s32(0x03030303), vdupq_n_s32(0x05050505), vdupq_n_s32(0),
           vdotq_s32(c[j], vreinterpretq_s8_s32(a), vreinterpretq_s8_s32(b)))
QUEST_PEAK(float_neon, QUEST_DOTPROD, float32x4_t, "+w", vdupq_n_f32(1e-3f), vdupq_n_f32(2e-3f), vdupq_n_f32(0),
           vfmaq_f32(c[j], a, b))
#endif

}  // namespace
}  // namespace quest
#endif

extern "C" {

int64_t quest_peak(const char* name, int64_t iterations) {
#if QUEST_X86
  using namespace quest;
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = __builtin_cpu_supports("avx512f");
  if (!std::strcmp(name, "float") && avx512) return float_avx512(iterations), iterations * SUMS * 16;
  if (!std::strcmp(name, "float") && avx2) return float_avx2(iterations), iterations * SUMS * 8;
  if (!std::strcmp(name, "avx2") && avx2) return integer_avx2(iterations), iterations * SUMS * 16;
#ifdef QUEST_NEW_COMPILER
  if (!std::strcmp(name, "avxvnni") && avx2 && avxvnni_allowed()) return integer_avxvnni(iterations), iterations * SUMS * 32;
#endif
  if (!std::strcmp(name, "avx512vnni") && avx512 && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vnni"))
    return integer_avx512vnni(iterations), iterations * SUMS * 64;
  if (!std::strcmp(name, "amx") && amx_allowed()) return amx_peak(iterations);
#elif QUEST_ARM
  using namespace quest;
  if (!std::strcmp(name, "float") && neon_allowed()) return float_neon(iterations), iterations * SUMS * 4;
  if (!std::strcmp(name, "neon") && neon_allowed()) return integer_neon(iterations), iterations * SUMS * 16;
#endif
  return 0;
}
}
