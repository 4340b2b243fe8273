// Group norm of one sample for the instruction sets that compute its three passes over pixels.
#pragma once
#include "core.h"

#include <cmath>

namespace quest {

// Of `pixels` pixels of `channels` channels, `pixel` apart.
struct Passes {
  // out[c] = the sum of x.
  void (*sums)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, float* out);
  // out[c] = the sum of (x - mean[c])^2.
  void (*squares)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean, float* out);
  // y = x a[c] + b[c], then SiLU if asked for; y without gaps.
  void (*scale)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* a, const float* b,
                bool silu, float* y);
};

inline void group_norm(const Passes& passes, const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels,
                       int64_t groups, float eps, const float* weight, const float* bias, const float* shift,
                       const float* modulation, bool silu, float* y, float* work) {
  const int64_t per = channels / groups, width = (channels + 15) / 16 * 16;
  float *sums = work, *mean = work + width, *a = work + 2 * width, *b = work + 3 * width;
  const double count = static_cast<double>(pixels) * per;
  passes.sums(x, pixel, pixels, channels, sums);
  for (int64_t g = 0; g < groups; g++) {
    double total = 0;
    for (int64_t c = g * per; c < (g + 1) * per; c++) total += sums[c] + static_cast<double>(shift ? shift[c] : 0.f) * pixels;
    // From here on relative to x itself: its own shift is taken off the mean.
    for (int64_t c = g * per; c < (g + 1) * per; c++) mean[c] = static_cast<float>(total / count - (shift ? shift[c] : 0.f));
  }
  passes.squares(x, pixel, pixels, channels, mean, sums);
  for (int64_t g = 0; g < groups; g++) {
    double total = 0;
    for (int64_t c = g * per; c < (g + 1) * per; c++) total += sums[c];
    const double scale = 1 / std::sqrt(total / count + eps);
    for (int64_t c = g * per; c < (g + 1) * per; c++) {
      a[c] = static_cast<float>(scale * (weight ? weight[c] : 1.f));
      b[c] = (bias ? bias[c] : 0.f) - mean[c] * a[c];
      if (modulation) {
        a[c] *= 1.f + modulation[c];
        b[c] = b[c] * (1.f + modulation[c]) + modulation[channels + c];
      }
    }
  }
  passes.scale(x, pixel, pixels, channels, a, b, silu, y);
}

}  // namespace quest
