// Plain C++ for every machine. core.h says what each function computes.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "core.h"

namespace quest {
namespace {

int16_t code(float v, Range range) {
  return static_cast<int16_t>(std::nearbyint(std::min(std::max(v, range.low), range.high)));
}

bool quantize(const float* x, int64_t n, int64_t padded, Range range, int16_t* out) {
  bool nan = false;
  for (int64_t i = 0; i < n; i++) {
    float v = x[i] / range.scale;
    nan |= std::isnan(v);
    out[i] = std::isnan(v) ? 0 : code(v, range);
  }
  for (int64_t i = n; i < padded; i++) out[i] = 0;
  return nan;
}

void unpack8(const uint8_t* codes, const int16_t* zero_point, int64_t steps, int16_t* out) {
  for (int64_t s = 0; s < steps; s++)
    for (int i = 0; i < 2 * NR; i++) *out++ = static_cast<int16_t>(*codes++ - zero_point[i / 2]);
}

void unpack4(const uint8_t* codes, const int16_t* zero_point, int64_t steps, int16_t* out) {
  for (int64_t s = 0; s < steps; s++, codes += NR, out += 2 * NR)
    for (int i = 0; i < NR; i++) {
      out[i] = static_cast<int16_t>((codes[i] & 15) - zero_point[i / 2]);
      out[NR + i] = static_cast<int16_t>((codes[i] >> 4) - zero_point[(NR + i) / 2]);
    }
}

// Numbers are unsigned, because the transformed domain computes modulo 2^32.
void accumulate(const int16_t* a, int taps, const ptrdiff_t* offset, int64_t pairs, const int16_t* panel,
                uint32_t* sums) {
  std::fill(sums, sums + NR, 0u);
  for (int t = 0; t < taps; t++)
    for (int64_t k = 0; k < pairs; k++, panel += 2 * NR) {
      const int32_t first = a[offset[t] + 2 * k], second = a[offset[t] + 2 * k + 1];
      for (int j = 0; j < NR; j++)
        sums[j] += static_cast<uint32_t>(first * panel[2 * j]) + static_cast<uint32_t>(second * panel[2 * j + 1]);
    }
}

void tile_int(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs, const int16_t* panel,
              int32_t* out, ptrdiff_t stride) {
  uint32_t sums[NR];
  for (int r = 0; r < rows; r++) {
    accumulate(a[r], taps, offset, pairs, panel, sums);
    std::memcpy(out + r * stride, sums, sizeof(sums));
  }
}

void tile_float(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                const int16_t* panel, const float* scale, const float* bias, int columns, float* const* out) {
  uint32_t sums[NR];
  for (int r = 0; r < rows; r++) {
    accumulate(a[r], taps, offset, pairs, panel, sums);
    for (int j = 0; j < columns; j++)
      out[r][j] = static_cast<float>(static_cast<int32_t>(sums[j])) * scale[j] + bias[j];
  }
}

// G of F(4x4, 3x3) with rows scaled to integers: {1,0,0}, {1,1,1}, {1,-1,1}, {1,2,4}, {1,-2,4}, {0,0,1}.
void weight_transform(const int32_t g[3], int32_t out[6]) {
  out[0] = g[0];
  out[1] = g[0] + g[1] + g[2];
  out[2] = g[0] - g[1] + g[2];
  out[3] = g[0] + 2 * g[1] + 4 * g[2];
  out[4] = g[0] - 2 * g[1] + 4 * g[2];
  out[5] = g[2];
}

void winograd_weight(const int16_t* in, int64_t numbers, int third, int16_t* out, ptrdiff_t stride) {
  for (int64_t n = 0; n < numbers; n++) {
    int32_t half[2][3], column[3], full[6];
    for (int x = 0; x < 3; x++) {
      for (int y = 0; y < 3; y++) column[y] = in[(3 * y + x) * numbers + n];
      weight_transform(column, full);
      for (int i = 0; i < 2; i++) half[i][x] = full[WINOGRAD_ROWS[third][i]];
    }
    for (int i = 0; i < 2; i++) {
      weight_transform(half[i], full);
      for (int j = 0; j < 6; j++) out[(6 * i + j) * stride + n] = static_cast<int16_t>(full[j]);
    }
  }
}

// B^T of F(4x4, 3x3).
void input_transform(const int32_t d[6], int32_t out[6]) {
  out[0] = 4 * d[0] - 5 * d[2] + d[4];
  out[1] = (d[4] - 4 * d[2]) + (d[3] - 4 * d[1]);
  out[2] = (d[4] - 4 * d[2]) - (d[3] - 4 * d[1]);
  out[3] = (d[4] - d[2]) + 2 * (d[3] - d[1]);
  out[4] = (d[4] - d[2]) - 2 * (d[3] - d[1]);
  out[5] = 4 * d[1] - 5 * d[3] + d[5];
}

void winograd_input(const int16_t* in, ptrdiff_t row, ptrdiff_t pixel, int64_t channels, int16_t* out, ptrdiff_t stride) {
  for (int64_t c = 0; c < channels; c++) {
    int32_t half[6][6], column[6], full[6];
    for (int x = 0; x < 6; x++) {
      for (int y = 0; y < 6; y++) column[y] = in[y * row + x * pixel + c];
      input_transform(column, full);
      for (int i = 0; i < 6; i++) half[i][x] = full[i];
    }
    for (int i = 0; i < 6; i++) {
      input_transform(half[i], full);
      for (int j = 0; j < 6; j++) out[(6 * i + j) * stride + c] = static_cast<int16_t>(full[j]);
    }
  }
}

// 24 A^T of F(4x4, 3x3), divided by the scales of the integer kernel transform, modulo 2^32.
void output_transform(const uint32_t m[6], uint32_t out[4]) {
  out[0] = 6 * m[0] - 4 * (m[1] + m[2]) + (m[3] + m[4]);
  out[1] = 2 * (m[3] - m[4]) - 4 * (m[1] - m[2]);
  out[2] = 4 * (m[3] + m[4]) - 4 * (m[1] + m[2]);
  out[3] = 8 * (m[3] - m[4]) - 4 * (m[1] - m[2]) + 24 * m[5];
}

void winograd_output(const int32_t* in, ptrdiff_t stride, int64_t channels, const float* scale, const float* bias,
                     float* out, ptrdiff_t row, ptrdiff_t pixel, int height, int width) {
  for (int64_t c = 0; c < channels; c++) {
    uint32_t half[4][6], column[6], y[4];
    for (int j = 0; j < 6; j++) {
      for (int i = 0; i < 6; i++) column[i] = static_cast<uint32_t>(in[(6 * i + j) * stride + c]);
      output_transform(column, y);
      for (int i = 0; i < 4; i++) half[i][j] = y[i];
    }
    for (int i = 0; i < height; i++) {
      output_transform(half[i], y);
      for (int j = 0; j < width; j++) {
        // 9 * 954437177 = 1 modulo 2^32. The number is a multiple of 64 then, so the shift divides exactly.
        const int32_t product = static_cast<int32_t>(y[j] * 954437177u) >> 6;
        out[i * row + j * pixel + c] = static_cast<float>(product) * scale[c] + bias[c];
      }
    }
  }
}

void softmax(int rows, const int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
             float* work, int16_t* out) {
  for (int r = 0; r < rows; r++, scores += width, out += padded) {
    float top = -INFINITY, total = 0;
    for (int64_t i = 0; i < m; i++) top = std::max(top, work[i] = static_cast<float>(scores[i]) * factor);
    for (int64_t i = 0; i < m; i++) total += work[i] = std::exp(work[i] - top);
    for (int64_t i = 0; i < m; i++) out[i] = code(work[i] / (total * range.scale), range);
    for (int64_t i = m; i < padded; i++) out[i] = 0;
  }
}

float silu(float x) { return x / (1 + std::exp(-x)); }

void group_norm(const GroupNorm& n, const float* x, float* y, float*) {
  const int64_t per = n.channels / n.groups;
  const double count = static_cast<double>(n.pixels) * per;
  for (int64_t g = 0; g < n.groups; g++) {
    auto value = [&](int64_t p, int64_t c) {
      return static_cast<double>(x[p * n.x_pixel + c]) + (n.shift ? n.shift[c] : 0.f);
    };
    double total = 0, squares = 0;
    for (int64_t p = 0; p < n.pixels; p++)
      for (int64_t c = g * per; c < (g + 1) * per; c++) total += value(p, c);
    const double mean = total / count;
    for (int64_t p = 0; p < n.pixels; p++)
      for (int64_t c = g * per; c < (g + 1) * per; c++) squares += (value(p, c) - mean) * (value(p, c) - mean);
    const double scale = 1 / std::sqrt(squares / count + n.eps);
    for (int64_t p = 0; p < n.pixels; p++)
      for (int64_t c = g * per; c < (g + 1) * per; c++) {
        double v = (value(p, c) - mean) * scale * (n.weight ? n.weight[c] : 1.f) + (n.bias ? n.bias[c] : 0.f);
        if (n.factor) v = v * (1.f + n.factor[c]) + n.offset[c];
        y[p * n.y_pixel + c] = n.silu ? silu(static_cast<float>(v)) : static_cast<float>(v);
      }
  }
}

void layer_norm(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y) {
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < n; i++) mean += x[i];
  mean /= static_cast<double>(n);
  for (int64_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
  const double scale = 1 / std::sqrt(squares / static_cast<double>(n) + eps);
  for (int64_t i = 0; i < n; i++)
    y[i] = static_cast<float>((x[i] - mean) * scale * (weight ? weight[i] : 1.f) + (bias ? bias[i] : 0.f));
}

void geglu(const float* hidden, const float* gate, int64_t n, float* y) {
  for (int64_t i = 0; i < n; i++) y[i] = hidden[i] * (gate[i] / 2 * (1 + std::erf(gate[i] * 0.70710678f)));
}

// Comparisons with NaN are false, so NaN stays NaN.
float clamped(float q, Range range) {
  q = q < range.low ? range.low : q;
  return q > range.high ? range.high : q;
}

void fake_quantize(const float* x, int64_t n, Range range, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] = clamped(std::nearbyint(x[i] / range.scale), range) * range.scale;
}

double fake_quantize_backward(const float* x, const float* grad, int64_t n, Range range, float* out) {
  double sum = 0;
  for (int64_t i = 0; i < n; i++) {
    const float v = x[i] / range.scale, q = std::nearbyint(v), code = clamped(q, range);
    out[i] = code == q ? grad[i] : 0.f;
    sum += grad[i] * (code == q ? q - v : code);
  }
  return sum;
}

}  // namespace

extern const Isa portable = {
    "portable",      6,
    quantize,        unpack8,        unpack4,         tile_int, tile_float,
    winograd_weight, winograd_input, winograd_output, softmax,  group_norm, layer_norm, geglu,
    fake_quantize, fake_quantize_backward, nullptr,
};

}  // namespace quest
