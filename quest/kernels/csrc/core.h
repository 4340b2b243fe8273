// What the drivers in core.cpp ask of an instruction set. All integers are exact; see core.cpp for the method.
#pragma once
#include <cstddef>
#include <cstdint>

namespace quest {

constexpr int NR = 16;       // columns of a weight panel
constexpr int MAX_MR = 12;   // most rows of a register tile
constexpr int POINTS = 36;   // products of one 4x4 output tile in the transformed domain, 6x6
constexpr int WINOGRAD_ROWS[3][2] = {{0, 5}, {1, 2}, {3, 4}};  // of the points, those that are computed together

struct Range {  // of one quantized tensor: code - zero point = clamp(round(x / scale), low, high)
  float scale, low, high;
};

struct Isa {
  const char* name;
  int rows;  // of a register tile, at most MAX_MR

  // out[0..n) = codes less zero point, out[n..padded) = 0. True where x holds a NaN.
  bool (*quantize)(const float* x, int64_t n, int64_t padded, Range range, int16_t* out);

  // Weight panel of `steps` channel pairs: codes - zero point as int16, [steps][NR][2].
  void (*unpack8)(const uint8_t* codes, const int16_t* zero_point, int64_t steps, int16_t* out);
  void (*unpack4)(const uint8_t* codes, const int16_t* zero_point, int64_t steps, int16_t* out);

  // [rows, NR] products: row r reads pairs at a[r] + offset[t] for every tap t; panel [taps * pairs][NR][2].
  void (*tile_int)(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                   const int16_t* panel, int32_t* out, ptrdiff_t stride);
  // The same, out[r][0..columns) = product * scale + bias.
  void (*tile_float)(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                     const int16_t* panel, const float* scale, const float* bias, int columns, float* const* out);

  // 3x3 kernels into a third of the transformed domain, two rows of six points: in[tap * numbers + i], `numbers` a
  // multiple of 16, to out[(6 * (0 or 1) + column) * stride + i].
  void (*winograd_weight)(const int16_t* in, int64_t numbers, int third, int16_t* out, ptrdiff_t stride);
  // One 6x6 input tile of `channels` (a multiple of 16) into the transformed domain: out[point * stride + channel].
  void (*winograd_input)(const int16_t* in, ptrdiff_t row, ptrdiff_t pixel, int64_t channels, int16_t* out,
                         ptrdiff_t stride);
  // Back: in[point * stride + channel] to a 4x4 output tile of which [height, width] exists.
  void (*winograd_output)(const int32_t* in, ptrdiff_t stride, int64_t channels, const float* scale, const float* bias,
                          float* out, ptrdiff_t row, ptrdiff_t pixel, int height, int width);

  // Codes less zero point of softmax(factor * scores) over the m scores of each row, zeros to `padded`. Rows of scores
  // and of `work` are `width` apart, a multiple of 8; those of out `padded`.
  void (*softmax)(int rows, const int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
                  float* work, int16_t* out);

  // y = normalized(x + shift[c]) of one sample [pixels, channels], times 1 + modulation[c], plus modulation[channels + c],
  // then SiLU if asked for. `work` holds 4 * channels.
  void (*group_norm)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, int64_t groups, float eps,
                     const float* weight, const float* bias, const float* shift, const float* modulation, bool silu,
                     float* y, float* work);
  // y = normalized x of one row of n.
  void (*layer_norm)(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y);
  // y = hidden * gelu(gate), one row of n each.
  void (*geglu)(const float* hidden, const float* gate, int64_t n, float* y);
};

extern const Isa portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define QUEST_X86 1
extern const Isa avx2;
void vnni_tile_int(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                   const int16_t* panel, int32_t* out, ptrdiff_t stride);
void vnni_tile_float(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                     const int16_t* panel, const float* scale, const float* bias, int columns, float* const* out);
#endif

}  // namespace quest
