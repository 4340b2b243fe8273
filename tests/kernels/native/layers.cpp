// Packed weights, linear layers, convolutions, norms and fake quantization, through the functions of the ABI.
#include "packed.h"

namespace test {
namespace {

using namespace quest;

void pack() {
  for (int i = 0; i < 60; i++) {
    const int64_t channels = integer(1, 40), group = some_groups(channels);
    const Packed w(integer(1, 40), channels, integer(1, 3), integer(1, 3), chance(.5) ? 4 : 8, 1, group);
    Exactly<uint8_t> codes(w.codes.size);
    CHECK(!quest_unpack(w.memory, w.memory.size, w.outputs, w.channels, w.height, w.width, codes));
    for (int64_t j = 0; j < codes.size; j++) CHECK(codes[j] == w.codes[j]);
  }
}

void linear() {
  for (int i = 0; i < 250; i++) {
    const int64_t tokens = chance(.5) ? 1 : integer(1, 6), most = chance(.1) ? 400 : 60;
    const int64_t rows = chance(.05) ? 0 : tokens * integer(1, ceil_div(most, tokens));
    const int64_t channels = integer(1, 150), outputs = chance(.3) ? 32 * integer(1, 3) : integer(1, 70);
    const bool gated = chance(.3) && outputs % 2 == 0, biased = chance(.5), more = !gated && chance(.5);
    const int64_t group = some_groups(channels);
    const Packed w(outputs, channels, 1, 1, chance(.5) ? 4 : 8, gated || group ? 0 : 1.f, group);
    Range r = range(gated ? .05f : 1.f);
    if (chance(.4)) r = dynamic_range(static_cast<int>(group && chance(.6) ? group : integer(1, 2)));
    if (group) r.high = std::min(r.high, r.low + 255);
    const int64_t stride = channels + (chance(.5) ? 0 : integer(1, 9)), width = gated ? outputs / 2 : outputs;
    const Exactly<float> x(rows ? (rows - 1) * stride + channels : 0, [&] { return input(r); });
    const Exactly<float> bias(outputs, [] { return integer(-9, 9); }), residual(rows * width, [] { return integer(-9, 9); });
    Exactly<float> out(rows * width, [] { return NAN; });
    CHECK(!quest_linear(x, rows, channels, stride, w.memory, w.memory.size, bias.when(biased), r.scale, r.low, r.high,
                        r.dynamic, tokens, gated, residual.when(more), out, width, static_cast<int>(integer(1, 3))));
    for (int64_t row = 0; row < rows; row++) {
      Exactly<double> y(outputs), size(outputs);  // size: the sum of magnitudes
      for (int64_t o = 0; o < outputs; o++) y[o] = biased ? bias[o] : 0, size[o] = 9 + std::fabs(y[o]);
      const int64_t together = r.dynamic == 2 ? tokens : 1, from = row / together * together * stride;
      for (int64_t g = 0; g < w.groups; g++) {
        const int64_t begin = g * w.group, end = std::min(begin + w.group, channels);
        Range own = r;
        if (r.dynamic >= 16) own = fitted(r, x + from + begin, 1, stride, end - begin);
        else if (r.dynamic) own = fitted(r, x + from, together, stride, channels);
        for (int64_t o = 0; o < outputs; o++) {
          int64_t sum = 0;
          for (int64_t c = begin; c < end; c++) sum += code(x[row * stride + c], own) * w.value(o, c);
          const double term = static_cast<double>(static_cast<float>(sum)) * w.scale[o * w.groups + g] * own.scale;
          y[o] += term, size[o] += std::fabs(term);
        }
      }
      for (int64_t o = 0; o < width; o++) {
        const float found = out[row * width + o];
        if (gated)
          CHECK(close(found, y[o] * gelu(y[width + o]), 1e-5 * (1 + (group ? size[o] * size[width + o] : std::fabs(y[o] * y[width + o])))));
        else
          CHECK(close(found, static_cast<float>(y[o]) + (more ? residual[row * width + o] : 0),
                      r.dynamic || group ? 1e-6 * size[o] : 0));
      }
    }
  }
}

void conv2d(int times) {
  for (int i = 0; i < times; i++) {
    const bool plain = chance(.4);  // of stride 1 and 3x3, as most are
    const int64_t kh = plain ? 3 : integer(1, 5), kw = plain ? 3 : integer(1, 5);
    const bool near = plain || chance(.5);  // a block of stride 1, whose pixels lie in memory as they are
    const int64_t sy = near ? 1 : integer(1, 4), sx = near ? 1 : integer(1, 4);
    const int64_t top = plain ? 1 : integer(0, 6), left = plain ? 1 : integer(0, 6);
    const int64_t dy = near || chance(.5) ? 1 : integer(1, 3), dx = near || chance(.5) ? 1 : integer(1, 3);
    const int64_t samples = chance(.05) ? 0 : integer(1, 3), height = integer(1, 12), width = integer(1, 12);
    const bool wide = plain && chance(.05);  // Winograd's algorithm with AVX-512 needs 64 channels
    const int64_t channels = wide ? integer(64, 150) : integer(1, 40), outputs = wide ? integer(64, 80) : integer(1, 40);
    const int64_t pixel = channels + (chance(.6) ? 0 : integer(1, 9));
    if (height + 2 * top < dy * (kh - 1) + 1 || width + 2 * left < dx * (kw - 1) + 1) continue;
    const int64_t oh = (height + 2 * top - dy * (kh - 1) - 1) / sy + 1, ow = (width + 2 * left - dx * (kw - 1) - 1) / sx + 1;
    const int64_t group = chance(.7) ? 0 : some_groups(channels);
    const Packed w(outputs, channels, kh, kw, chance(.5) ? 4 : 8, group ? 0 : 1.f, group);
    Range r = range();
    if (chance(.6)) r = dynamic_range(static_cast<int>(group && chance(.6) ? group : integer(1, 2)));
    if (group) r.high = std::min(r.high, r.low + 255);
    const int64_t row = width * pixel, sample = height * row;
    const Exactly<float> x(samples ? samples * sample - pixel + channels : 0, [&] { return input(r); });
    const bool biased = chance(.5), more = chance(.5);
    const Exactly<float> bias(outputs, [] { return integer(-9, 9); });
    const Exactly<float> residual(samples * oh * ow * outputs, [] { return integer(-9, 9); });
    Exactly<float> out(samples * oh * ow * outputs, [] { return NAN; });
    CHECK(!quest_conv2d(x, samples, channels, height, width, sample, row, pixel, w.memory, w.memory.size,
                        bias.when(biased), r.scale, r.low, r.high, r.dynamic, sy, sx, top, left, dy, dx, residual.when(more), out,
                        outputs, oh, ow, static_cast<int>(integer(1, 3))));
    // The range of each number; those of a token and group are the same.
    std::vector<Range> own(x.size, r);
    const int64_t input_group = r.dynamic >= 16 ? w.group : channels;
    for (int64_t s = 0; r.dynamic && s < samples; s++) {
      const Range whole = fitted(r, x + s * sample, height * width, pixel, channels);
      for (int64_t p = 0; p < height * width; p++)
        for (int64_t c = 0; c < channels; c++) {
          const int64_t at = s * sample + p * pixel, begin = c / input_group * input_group;
          own[at + c] = r.dynamic == 2 ? whole : fitted(r, x + at + begin, 1, 0, std::min(input_group, channels - begin));
        }
    }
    Exactly<int> codes(x.size);
    for (int64_t j = 0; j < x.size; j++) codes[j] = code(x[j], own[j]);
    const bool parts = group || r.dynamic == 1 || r.dynamic >= 16;
    for (int64_t at = 0; at < out.size; at++) {
      const int64_t o = at % outputs, ox = at / outputs % ow, oy = at / outputs / ow % oh, s = at / outputs / ow / oh;
      int64_t sum = 0;
      double y = 0, size = 9 + std::fabs(bias[o]);
      for (int64_t ky = 0; ky < kh; ky++)
        for (int64_t kx = 0; kx < kw; kx++) {
          const int64_t iy = oy * sy - top + ky * dy, ix = ox * sx - left + kx * dx;
          if (iy < 0 || iy >= height || ix < 0 || ix >= width) continue;
          const int64_t from = s * sample + iy * row + ix * pixel;
          for (int64_t c = 0; c < channels; c++) {
            sum += codes[from + c] * w.value(o, c, ky, kx);
            const double term = static_cast<double>(codes[from + c]) * w.value(o, c, ky, kx) * own[from + c].scale;
            y += term * w.scale[o * w.groups + c / w.group], size += parts ? std::fabs(term * w.scale[o * w.groups + c / w.group]) : 0;
          }
        }
      if (!parts) y = static_cast<double>(static_cast<float>(sum)) * (samples && r.dynamic ? own[s * sample].scale : r.scale);
      y += biased ? bias[o] : 0;
      CHECK(close(out[at], static_cast<float>(y) + (more ? residual[at] : 0),
                  parts ? 1e-6 * size : r.dynamic ? 1e-6 * (9 + std::fabs(y)) : 0));
    }
  }
}

// The drivers of float passes: every row and group as the function of one computes it.
void passes() {
  for (int i = 0; i < 40; i++) {
    const int64_t samples = integer(0, 3), pixels = integer(1, 30), groups = integer(1, 4), channels = groups * integer(1, 20);
    const int64_t pixel = channels + integer(0, 3), sample = pixels * pixel, size = samples * pixels * channels;
    const int threads = static_cast<int>(integer(1, 3));
    const Exactly<float> x(samples * sample, [] { return number(); }), weight(channels, [] { return number(); });
    const Exactly<float> shift(samples * channels, [] { return number(); });
    const Exactly<float> modulation(2 * samples * channels, [] { return number(); });
    Exactly<float> y(size), one(size), work(4 * round_up(channels, 16));
    CHECK(!quest_group_norm(x, sample, pixel, samples, pixels, channels, groups, 1e-5f, weight, nullptr, shift, modulation, 1,
                            y, threads));
    for (int64_t s = 0; s < samples; s++) {
      const float* factor = modulation + 2 * s * channels;
      quest::group_norm({pixels, channels, groups, pixel, channels, 1e-5f, weight, nullptr, shift + s * channels, factor,
                       factor + channels, true},
                      x + s * sample, one + s * pixels * channels, work);
    }
    for (int64_t j = 0; j < size; j++) CHECK(close(y[j], one[j], 1e-5));
    const Exactly<float> rows(size, [] { return number(); });
    CHECK(!quest_layer_norm(rows, samples * pixels, channels, 1e-5f, weight, nullptr, y, threads));
    for (int64_t r = 0; r < samples * pixels; r++)
      isa->layer_norm(rows + r * channels, channels, 1e-5f, weight, nullptr, one + r * channels);
    for (int64_t j = 0; j < size; j++) CHECK(y[j] == one[j]);
  }
  for (int64_t n : {0, 1, 100, 1 << 14, 40000}) {
    const Exactly<float> x(n, [] { return number(5); }), grad(n, [] { return number(); });
    Exactly<float> y(n), one(n);
    const Range r{.5f, -7, 8};
    double of_scale = NAN;
    CHECK(!quest_fake_quantize(x, n, r.scale, r.low, r.high, y, 2));
    isa->fake_quantize(x, n, r, one);
    for (int64_t j = 0; j < n; j++) CHECK(y[j] == one[j]);
    CHECK(!quest_fake_quantize_backward(x, grad, n, r.scale, r.low, r.high, y, &of_scale, 2));
    CHECK(close(of_scale, isa->fake_quantize_backward(x, grad, n, r, one), 1e-4 * static_cast<double>(n + 1)));
    for (int64_t j = 0; j < n; j++) CHECK(y[j] == one[j]);
  }
}

}  // namespace

void test_layers() {
  pack();
  linear();
  conv2d(400);
  // As an instruction set that has to prepare for products, such as AMX.
  const Isa *const own = isa, tiles = [] {
    Isa one = *isa;
    if (!one.begin) one.begin = one.end = [] {};
    return one;
  }();
  isa = &tiles;
  conv2d(100);
  isa = own;
  passes();
}

}  // namespace test
