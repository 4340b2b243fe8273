// The most multiply-accumulates a second that the instructions of a kernel allow: the same ones, on registers alone.
#include "core.h"

#include <cstring>

#if QUEST_X86
#include <immintrin.h>

#if defined(__clang__)
#define QUEST_TARGET(x) __attribute__((target(x)))
#else
#define QUEST_TARGET(x) __attribute__((target(x), noinline))
#endif

namespace quest {
namespace {

constexpr int SUMS = 12;  // enough to hide the latency of each

// The compiler may not foresee what an iteration multiplies.
#define OPAQUE(v) asm volatile("" : "+x"(v))

QUEST_TARGET("avx2,fma") void integer_avx2(int64_t iterations) {
  __m256i a = _mm256_set1_epi16(3), b = _mm256_set1_epi16(5), c[SUMS];
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) c[j] = _mm256_setzero_si256();
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; j++) {
      OPAQUE(a);
      c[j] = _mm256_add_epi32(c[j], _mm256_madd_epi16(a, b));
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) OPAQUE(c[j]);
}

QUEST_TARGET("avx2,fma") void float_avx2(int64_t iterations) {
  __m256 a = _mm256_set1_ps(1e-3f), b = _mm256_set1_ps(2e-3f), c[SUMS];
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) c[j] = _mm256_setzero_ps();
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; j++) {
      OPAQUE(a);
      c[j] = _mm256_fmadd_ps(a, b, c[j]);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) OPAQUE(c[j]);
}

#undef OPAQUE
#define OPAQUE(v) asm volatile("" : "+v"(v))

QUEST_TARGET("avx512f,avx512bw,avx512vnni") void integer_avx512vnni(int64_t iterations) {
  __m512i a = _mm512_set1_epi16(3), b = _mm512_set1_epi16(5), c[SUMS];
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) c[j] = _mm512_setzero_si512();
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; j++) {
      OPAQUE(a);
      c[j] = _mm512_dpwssd_epi32(c[j], a, b);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) OPAQUE(c[j]);
}

QUEST_TARGET("avx512f") void float_avx512(int64_t iterations) {
  __m512 a = _mm512_set1_ps(1e-3f), b = _mm512_set1_ps(2e-3f), c[SUMS];
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) c[j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < iterations; i++) {
#pragma GCC unroll 12
    for (int j = 0; j < SUMS; j++) {
      OPAQUE(a);
      c[j] = _mm512_fmadd_ps(a, b, c[j]);
    }
  }
#pragma GCC unroll 12
  for (int j = 0; j < SUMS; j++) OPAQUE(c[j]);
}

}  // namespace
}  // namespace quest
#endif

extern "C" {

// Runs `iterations` of multiply-accumulates and returns how many that were: of int16 into int32 as in the register tiles
// of an instruction set, or of "float" with the widest vectors here. 0 where there are no such instructions.
int64_t quest_peak(const char* name, int64_t iterations) {
#if QUEST_X86
  using namespace quest;
  __builtin_cpu_init();
  bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  bool avx512 = __builtin_cpu_supports("avx512f");
  if (!std::strcmp(name, "float") && avx512) return float_avx512(iterations), iterations * SUMS * 16;
  if (!std::strcmp(name, "float") && avx2) return float_avx2(iterations), iterations * SUMS * 8;
  if (!std::strcmp(name, "avx2") && avx2) return integer_avx2(iterations), iterations * SUMS * 16;
  if (!std::strcmp(name, "avx512vnni") && avx512 && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vnni"))
    return integer_avx512vnni(iterations), iterations * SUMS * 32;
#endif
  return 0;
}
}
