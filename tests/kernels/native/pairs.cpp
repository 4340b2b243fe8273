// The functions on pairs of int16: quantizing, unpacking, register tiles, Winograd's transforms.
#include "check.h"

namespace test {
namespace {

using namespace quest;

void quantize() {
  for (int i = 0; i < 300; i++) {
    const int64_t n = integer(1, 90), padded = n + integer(0, 40);
    const float low = static_cast<float>(integer(-300, 200));
    const Range r{chance(.5) ? 1.f : .037f, low, low + 255};
    const Exactly<float> x(n, [&] { return chance(.2) ? r.scale * (integer(-600, 600) + .5f) : number(200 * r.scale); });
    Exactly<int16_t> out(padded);
    CHECK(!isa->quantize(x, n, padded, r, out));
    for (int64_t j = 0; j < padded; j++) CHECK(out[j] == (j < n ? code(x[j], r) : 0));
    Exactly<float> wrong(n, [&] { return x[0]; });
    wrong[integer(0, n - 1)] = NAN;
    CHECK(isa->quantize(wrong, n, padded, r, out));
  }
}

void unpack() {
  for (int i = 0; i < 50; i++) {
    const int64_t steps = integer(1, 20);
    const Exactly<int16_t> zero(NR, [] { return integer(-400, 400); });
    const Exactly<uint8_t> codes(steps * 32, [] { return integer(0, 255); }), halves(steps * 16, [] { return integer(0, 255); });
    Exactly<int16_t> out(steps * 32);
    isa->unpack8(codes, zero, steps, out);
    for (int64_t j = 0; j < steps * 32; j++) CHECK(out[j] == codes[j] - zero[j % 32 / 2]);
    isa->unpack4(halves, zero, steps, out);
    for (int64_t j = 0; j < steps * 32; j++) {
      const int byte = halves[j / 32 * 16 + j % 16];
      CHECK(out[j] == (j % 32 < 16 ? byte & 15 : byte >> 4) - zero[j % 32 / 2]);
    }
  }
}

void tiles() {
  for (int i = 0; i < 200; i++) {
    const int rows = static_cast<int>(integer(1, isa->rows)), taps = static_cast<int>(integer(1, 9));
    const int64_t pairs = integer(1, 20), columns = integer(1, NR), row = 2 * pairs * taps;
    const Exactly<int16_t> a(rows * row, [] { return integer(-255, 255); });
    const Exactly<int16_t> panel(row * NR, [] { return integer(-255, 255); });
    Exactly<ptrdiff_t> offset(taps);
    for (int t = 0; t < taps; t++) offset[t] = 2 * pairs * (taps - 1 - t);
    const Exactly<float> scale(NR, [] { return 1.f; }), bias(NR, [] { return integer(-9, 9); });
    Exactly<int32_t> sums(rows * (NR + 3));
    Exactly<float> products(rows * columns);
    const int16_t* from[MAX_MR];
    float* to[MAX_MR];
    for (int r = 0; r < rows; r++) from[r] = a + r * row, to[r] = products + r * columns;
    isa->tile_int(rows, from, taps, offset, pairs, panel, sums, NR + 3);
    isa->tile_float(rows, from, taps, offset, pairs, panel, scale, bias, static_cast<int>(columns), to);
    for (int r = 0; r < rows; r++)
      for (int64_t c = 0; c < NR; c++) {
        int64_t sum = 0;
        for (int t = 0; t < taps; t++)
          for (int64_t k = 0; k < 2 * pairs; k++)
            sum += a[r * row + offset[t] + k] * panel[((t * pairs + k / 2) * NR + c) * 2 + k % 2];
        CHECK(sums[r * (NR + 3) + c] == sum);
        if (c < columns) CHECK(products[r * columns + c] == static_cast<float>(sum) + bias[c]);
      }
  }
}

// Of every channel by itself: its kernel times its tile in the transformed domain, and back.
void winograd() {
  for (int i = 0; i < 30; i++) {
    const int64_t channels = 16 * integer(1, 4), stride = channels + 16, outputs = integer(1, channels);
    const int height = static_cast<int>(integer(1, 4)), width = static_cast<int>(integer(1, 4));
    const Exactly<int16_t> kernel(9 * channels, [] { return integer(-255, 255); });
    const Exactly<int16_t> tile(36 * channels, [] { return integer(-255, 255); });
    Exactly<int16_t> u(12 * stride), v(POINTS * stride);
    Exactly<int32_t> m(POINTS * stride);
    isa->winograd_input(tile, 6 * channels, channels, channels, v, stride);
    for (int third = 0; third < 3; third++) {
      isa->winograd_weight(kernel, channels, third, u, stride);
      for (int k = 0; k < 12; k++) {
        const int64_t point = 6 * WINOGRAD_ROWS[third][k / 6] + k % 6;
        for (int64_t c = 0; c < channels; c++) m[point * stride + c] = u[k * stride + c] * v[point * stride + c];
      }
    }
    const int64_t padded = round_up(outputs, 8);
    const Exactly<float> scale(padded, [] { return 1.f; }), bias(padded, [] { return integer(-9, 9); });
    const ptrdiff_t pixel = outputs, row = width * pixel;
    Exactly<float> out(height * row);
    isa->winograd_output(m, stride, outputs, scale, bias, out, row, pixel, height, width);
    for (int y = 0; y < height; y++)
      for (int x = 0; x < width; x++)
        for (int64_t c = 0; c < outputs; c++) {
          int64_t sum = 0;
          for (int t = 0; t < 9; t++) sum += kernel[t * channels + c] * tile[((y + t / 3) * 6 + x + t % 3) * channels + c];
          CHECK(out[y * row + x * pixel + c] == static_cast<float>(sum) + bias[c]);
        }
  }
}

}  // namespace

void test_pairs() {
  quantize();
  unpack();
  tiles();
  winograd();
}

}  // namespace test
