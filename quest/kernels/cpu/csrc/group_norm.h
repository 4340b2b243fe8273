// The group norm of one sample, for instruction sets that provide its three passes over pixels.
#pragma once
#include "core.h"

#include <cmath>

namespace quest {

// The passes over `pixels` pixels of `channels` channels; pixels are `pixel` apart.
struct Passes {
  // out[c] = the sum of x[c] over pixels.
  void (*sums)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, float* out);
  // out[c] = the sum of (x[c] - mean[c])^2 over pixels.
  void (*squares)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean, float* out);
  // y = x a[c] + b[c], then SiLU if `silu`. Pixels of y are y_pixel apart.
  void (*scale)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* a, const float* b,
                bool silu, float* y, ptrdiff_t y_pixel);
};

inline void group_norm(const Passes& passes, const GroupNorm& n, const float* x, float* y, float* work) {
  const int64_t per = n.channels / n.groups, width = (n.channels + 15) / 16 * 16;
  float *sums = work, *mean = work + width, *a = work + 2 * width, *b = work + 3 * width;
  const double count = static_cast<double>(n.pixels) * per;
  const auto shift = [&](int64_t c) { return n.shift ? n.shift[c] : 0.f; };
  passes.sums(x, n.x_pixel, n.pixels, n.channels, sums);
  for (int64_t g = 0; g < n.groups; g++) {
    double total = 0;
    for (int64_t c = g * per; c < (g + 1) * per; c++) total += sums[c] + static_cast<double>(shift(c)) * n.pixels;
    // The passes read x without its shift, so the shift is subtracted from the mean.
    for (int64_t c = g * per; c < (g + 1) * per; c++) mean[c] = static_cast<float>(total / count - shift(c));
  }
  passes.squares(x, n.x_pixel, n.pixels, n.channels, mean, sums);
  for (int64_t g = 0; g < n.groups; g++) {
    double total = 0;
    for (int64_t c = g * per; c < (g + 1) * per; c++) total += sums[c];
    const double scale = 1 / std::sqrt(total / count + n.eps);
    for (int64_t c = g * per; c < (g + 1) * per; c++) {
      a[c] = static_cast<float>(scale * (n.weight ? n.weight[c] : 1.f));
      b[c] = (n.bias ? n.bias[c] : 0.f) - mean[c] * a[c];
      if (n.factor) {
        a[c] *= 1.f + n.factor[c];
        b[c] = b[c] * (1.f + n.factor[c]) + n.offset[c];
      }
    }
  }
  passes.scale(x, n.x_pixel, n.pixels, n.channels, a, b, n.silu, y, n.y_pixel);
}

}  // namespace quest
