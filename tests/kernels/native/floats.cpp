// The float passes: norms, gated linear units, fake quantization.
#include "check.h"

namespace test {
namespace {

using namespace quest;

void group_norm() {
  for (int i = 0; i < 60; i++) {
    const int64_t groups = integer(1, 5), per = integer(1, 30), channels = groups * per, pixels = integer(1, 20);
    const ptrdiff_t x_pixel = channels + integer(0, 5), y_pixel = channels + integer(0, 5);
    const Exactly<float> x((pixels - 1) * x_pixel + channels, [] { return number(3) + 20; });
    const Exactly<float> weight(channels, [] { return number(); }), bias(channels, [] { return number(); });
    const Exactly<float> shift(channels, [] { return number(); }), factor(channels, [] { return number(); });
    const Exactly<float> offset(channels, [] { return number(); });
    Exactly<float> y((pixels - 1) * y_pixel + channels), work(4 * round_up(channels, 16));
    const bool affine = chance(.7), shifted = chance(.5), modulated = chance(.5), silu = chance(.5);
    const GroupNorm norm{pixels, channels, groups, x_pixel, y_pixel, 1e-5f, weight.when(affine),
                         bias.when(affine), shift.when(shifted), factor.when(modulated),
                         offset.when(modulated), silu};
    quest::group_norm(norm, x, y, work);
    const auto value = [&](int64_t p, int64_t c) { return x[p * x_pixel + c] + (shifted ? double{shift[c]} : 0.); };
    for (int64_t g = 0; g < groups; g++) {
      double mean = 0, square = 0;
      const double count = static_cast<double>(pixels * per);
      for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = g * per; c < (g + 1) * per; c++) mean += value(p, c) / count;
      for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = g * per; c < (g + 1) * per; c++) square += std::pow(value(p, c) - mean, 2) / count;
      for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = g * per; c < (g + 1) * per; c++) {
          double v = (value(p, c) - mean) / std::sqrt(square + 1e-5) * (affine ? weight[c] : 1) + (affine ? bias[c] : 0);
          if (modulated) v = v * (1 + factor[c]) + offset[c];
          if (silu) v = v / (1 + std::exp(-v));
          // A single value is normalized to what rounding leaves of its distance to itself.
          CHECK(close(y[p * y_pixel + c], v, count > 1 ? 5e-4 * (1 + std::fabs(v)) : .1));
        }
    }
  }
}

void rows() {
  for (int i = 0; i < 100; i++) {
    const int64_t n = integer(1, 90);
    const bool affine = chance(.7);
    const Exactly<float> x(n, [] { return number(2) + 1; }), gate(n, [] { return number(3); });
    const Exactly<float> weight(n, [] { return number(); }), bias(n, [] { return number(); });
    Exactly<float> y(n);
    isa->layer_norm(x, n, 1e-5f, weight.when(affine), bias.when(affine), y);
    double mean = 0, square = 0;
    for (int64_t j = 0; j < n; j++) mean += x[j] / static_cast<double>(n);
    for (int64_t j = 0; j < n; j++) square += std::pow(x[j] - mean, 2) / static_cast<double>(n);
    for (int64_t j = 0; j < n; j++) {
      const double v = (x[j] - mean) / std::sqrt(square + 1e-5) * (affine ? weight[j] : 1) + (affine ? bias[j] : 0);
      CHECK(close(y[j], v, n > 1 ? 5e-4 * (1 + std::fabs(v)) : .1));
    }
    isa->geglu(x, gate, n, y);
    for (int64_t j = 0; j < n; j++) CHECK(close(y[j], x[j] * gelu(gate[j]), 2e-6 * (1 + std::fabs(x[j] * gate[j]))));
  }
}

void fake_quantize() {
  for (int i = 0; i < 200; i++) {
    const int64_t n = integer(1, 90);
    const float low = static_cast<float>(integer(-20, 0));
    const Range r{chance(.5) ? .1f : 1.f, low, low + 15};
    Exactly<float> x(n, [&] { return chance(.2) ? r.scale * (integer(-30, 30) + .5f) : number(12 * r.scale); });
    const Exactly<float> grad(n, [] { return number(); });
    Exactly<float> y(n), back(n);
    isa->fake_quantize(x, n, r, y);
    const double of_scale = isa->fake_quantize_backward(x, grad, n, r, back);
    double expected = 0;
    for (int64_t j = 0; j < n; j++) {
      const float v = x[j] / r.scale, q = std::nearbyint(v), clipped = std::min(std::max(q, r.low), r.high);
      CHECK(y[j] == clipped * r.scale && back[j] == (q == clipped ? grad[j] : 0));
      expected += static_cast<double>(grad[j]) * (q == clipped ? q - v : clipped);
    }
    CHECK(close(of_scale, expected, 1e-3));
    x[n - 1] = NAN;
    isa->fake_quantize(x, n, r, y);
    CHECK(std::isnan(y[n - 1]));
  }
}

}  // namespace

void test_floats() {
  group_norm();
  rows();
  fake_quantize();
}

}  // namespace test
