// Float passes: norms, and fake quantization.
#include "driver.h"

namespace quest {

namespace {

// Computes factor a and offset b of each channel. `work` has room for twice the channels, rounded up to a multiple of 16.
void affine_of(const GroupNorm& n, const float* x, float* a, float* b, float* work) {
  const int64_t per = n.channels / n.groups;
  float *sums = work, *mean = work + round_up(n.channels, 16);
  const double count = static_cast<double>(n.pixels) * per;
  const auto shift = [&](int64_t c) { return n.shift ? n.shift[c] : 0.f; };
  isa->channel_sums(x, n.x_pixel, n.pixels, n.channels, nullptr, sums);
  for (int64_t g = 0; g < n.groups; g++) {
    double total = 0;
    for (int64_t c = g * per; c < (g + 1) * per; c++) total += sums[c] + static_cast<double>(shift(c)) * n.pixels;
    // The passes read x without its shift, so the shift is subtracted from the mean.
    for (int64_t c = g * per; c < (g + 1) * per; c++) mean[c] = static_cast<float>(total / count - shift(c));
  }
  isa->channel_sums(x, n.x_pixel, n.pixels, n.channels, mean, sums);
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
}

// Calls compute(norm, sample, first channel, memory of `group_norm`) for each sample, or for parts of its groups.
template <class Compute>
void each_norm(int64_t pixel, int64_t samples, int64_t pixels, const Norm& norm, const float* shift, const float* modulation,
               bool silu, int threads, const Compute& compute) {
  const Clock clock(NORMS);
  if (!samples || !pixels || !norm.channels) return;
  const int64_t channels = norm.channels, groups = norm.groups, per = channels / groups;
  const int64_t work = 10 * samples * pixels * channels;
  // If there are few samples, their groups are divided among threads too.
  const int64_t parts = std::min(groups, ceil_div(useful(threads, work), samples));
  parallel(samples * parts, threads, work, [&](int64_t task) {
    static thread_local Scratch<float> memory;
    const int64_t i = task / parts, part = task % parts;
    const int64_t first = part * groups / parts, last = (part + 1) * groups / parts, c = first * per;
    const auto from = [&](const float* array, int64_t sample_at) { return array ? array + sample_at + c : nullptr; };
    const GroupNorm one{pixels, (last - first) * per, last - first, pixel, static_cast<ptrdiff_t>(channels), norm.eps,
                        from(norm.weight, 0), from(norm.bias, 0), from(shift, i * channels),
                        from(modulation, 2 * i * channels), from(modulation, (2 * i + 1) * channels), silu};
    compute(one, i, c, memory.get(4 * round_up(one.channels, 16)));
  });
}

}  // namespace

void group_norm(const GroupNorm& n, const float* x, float* y, float* work) {
  const int64_t width = round_up(n.channels, 16);
  float *a = work + 2 * width, *b = work + 3 * width;
  affine_of(n, x, a, b, work);
  isa->scale_channels(x, n.x_pixel, n.pixels, n.channels, a, b, n.silu, y, n.y_pixel);
}

void group_norm(const float* x, int64_t sample, int64_t pixel, int64_t samples, int64_t pixels, const Norm& norm,
                const float* shift, const float* modulation, bool silu, float* y, int threads) {
  each_norm(pixel, samples, pixels, norm, shift, modulation, silu, threads,
            [&](const GroupNorm& one, int64_t i, int64_t c, float* work) {
              group_norm(one, x + i * sample + c, y + i * pixels * norm.channels + c, work);
            });
}

void group_affine(const float* x, int64_t sample, int64_t pixel, int64_t samples, int64_t pixels, const Norm& norm,
                  const float* shift, const float* modulation, float* factor, float* offset, int threads) {
  each_norm(pixel, samples, pixels, norm, shift, modulation, false, threads,
            [&](const GroupNorm& one, int64_t i, int64_t c, float* work) {
              const int64_t at = i * norm.channels + c;
              affine_of(one, x + i * sample + c, factor + at, offset + at, work);
            });
}

void layer_norm(const float* x, int64_t rows, const Norm& norm, float* y, int threads) {
  const Clock clock(NORMS);
  constexpr int64_t block = 64;
  const int64_t n = norm.channels;
  parallel(ceil_div(rows, block), threads, 10 * rows * n, [&](int64_t task) {
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); r++)
      isa->layer_norm(x + r * n, n, norm.eps, norm.weight, norm.bias, y + r * n);
  });
}

namespace {
constexpr int64_t CHUNK = 1 << 14;  // numbers per task
}

void fake_quantize(const float* x, int64_t n, Range range, float* out, int threads) {
  parallel(ceil_div(n, CHUNK), threads, 10 * n, [&](int64_t i) {
    isa->fake_quantize(x + i * CHUNK, std::min(CHUNK, n - i * CHUNK), range, out + i * CHUNK);
  });
}

double fake_quantize_backward(const float* x, const float* grad, int64_t n, Range range, float* out, int threads) {
  std::vector<double> sums(ceil_div(n, CHUNK));
  parallel(ceil_div(n, CHUNK), threads, 10 * n, [&](int64_t i) {
    sums[i] = isa->fake_quantize_backward(x + i * CHUNK, grad + i * CHUNK, std::min(CHUNK, n - i * CHUNK), range,
                                          out + i * CHUNK);
  });
  double all = 0;
  for (double s : sums) all += s;
  return all;
}

}  // namespace quest
