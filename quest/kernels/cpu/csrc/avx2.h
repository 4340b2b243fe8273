// Functions that both files of AVX2 use. Include this only where the compiler's target has these instructions.
#pragma once
#include "core.h"

#include <cstring>

namespace quest {
namespace avx2_float {  // defined in avx2_float.cpp

void softmax(int rows, const int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
             float* work, int16_t* out);
void group_norm(const GroupNorm& norm, const float* x, float* y, float* work);
void layer_norm(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y);
void geglu(const float* hidden, const float* gate, int64_t n, float* y);
void fake_quantize(const float* x, int64_t n, Range range, float* out);
double fake_quantize_backward(const float* x, const float* grad, int64_t n, Range range, float* out);

}  // namespace avx2_float

inline __m256i clamp_round(__m256 x, __m256 low, __m256 high) {
  return _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(x, low), high));
}

inline __m256i to_int16(__m256i a, __m256i b) {
  return _mm256_permute4x64_epi64(_mm256_packs_epi32(a, b), 0xd8);
}

// The rest of a row, as a whole vector.
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

}  // namespace quest
