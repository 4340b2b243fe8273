// What the drivers ask of an instruction set. All integers are exact; see pairs.h and bytes.h for the methods.
#pragma once
#include "abi.h"

#include <cstddef>
#include <cstdint>

namespace quest {

constexpr int NR = 16;       // columns of a weight panel
constexpr int MAX_MR = 12;   // most rows of a register tile
constexpr int POINTS = 36;   // products of one 4x4 output tile in the transformed domain, 6x6
constexpr int WINOGRAD_ROWS[3][2] = {{0, 5}, {1, 2}, {3, 4}};  // of the points, those that are computed together

// The group norm of one sample [pixels, channels], or of some of its groups: y = normalized(x + shift[c]), times 1 + factor[c],
// plus offset[c], then SiLU if asked for. Pixels of x and y are so far apart; pointers may be null.
struct GroupNorm {
  int64_t pixels, channels, groups;
  ptrdiff_t x_pixel, y_pixel;
  float eps;
  const float *weight, *bias, *shift, *factor, *offset;
  bool silu;
};

// Products of unsigned by signed bytes: codes of activations less the lowest one, codes of weights less 128 or, of four
// bits, less 8. With zero points less the same, of a row z_a and of an output z_w, the sum of a layer is
//   sum (a - z_a)(w - z_w) = sum a w - z_w sum a - z_a sum (w - z_w)  modulo 2^32.
struct Bytes {
  int rows, panels;  // most of one call of multiply
  int64_t depth;     // rows are multiplied by multiples of this many bytes

  // out[0..n) = codes less the lowest, out[n..padded) = 0. True where x holds a NaN.
  bool (*quantize)(const float* x, int64_t n, int64_t padded, Range range, uint8_t* out);
  // Sums of n bytes each of rows `stride` apart.
  void (*sums)(const uint8_t* a, ptrdiff_t stride, int64_t rows, int64_t n, int32_t* out);
  // Weight panel of `pairs` channel pairs, as signed bytes [ceil(pairs / 2)][NR][4]; their sums are added to sums[NR].
  void (*unpack8)(const uint8_t* codes, int64_t pairs, int8_t* out, int32_t* sums);
  void (*unpack4)(const uint8_t* codes, int64_t pairs, int8_t* out, int32_t* sums);
  // [rows, panels * NR] products: row r reads, for every segment s, `bytes` of them from a + r * stride + offset[s].
  // Panels [segments][bytes / 4][NR][4], `panel` bytes apart. Up to a whole tile of rows is read, whatever it holds.
  void (*multiply)(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
                   const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride);
  // out[r][0..columns) = (in - zero * sums[r] - constant) * scale + bias, rows of `in` `stride` apart and those that
  // `out` lacks left out; plus residual[r], if there is one. Columns are read and stored from `from` on.
  void (*finish)(const int32_t* in, ptrdiff_t stride, int rows, const int32_t* sums, const int32_t* zero,
                 const int32_t* constant, const float* scale, const float* bias, int columns, float* const* out,
                 const float* const* residual, ptrdiff_t from);
  // m rows of d codes, `stride` apart, as the weight of a product: those of keys as its outputs, [ceil(m / NR)][depth / 4]
  // [NR][4], of values as its inputs, [ceil(d / NR)][length / 4][NR][4]; zeros fill up. Sums of each output.
  void (*pack_keys)(const uint8_t* k, ptrdiff_t stride, int64_t m, int64_t d, int64_t depth, int8_t* out, int32_t* sums);
  void (*pack_values)(const uint8_t* v, ptrdiff_t stride, int64_t m, int64_t d, int64_t length, int8_t* out, int32_t* sums);
  // Codes less the lowest of softmax(factor * (scores - column)) over the m scores of each row, zeros to `padded`, and
  // their sums. Rows of scores are `width` apart, a multiple of 16, and overwritten; those of out `padded`.
  void (*softmax)(int rows, int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
                  const int32_t* column, uint8_t* out, int32_t* sums);
  // Before the first and after the last call of multiply of a thread.
  void (*begin)();
  void (*end)();
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

  // `work` holds 4 * channels.
  void (*group_norm)(const GroupNorm& norm, const float* x, float* y, float* work);
  // y = normalized x of one row of n.
  void (*layer_norm)(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y);
  // y = hidden * gelu(gate), one row of n each.
  void (*geglu)(const float* hidden, const float* gate, int64_t n, float* y);

  // out = scale * clamp(round(x / scale), low, high); a NaN stays one.
  void (*fake_quantize)(const float* x, int64_t n, Range range, float* out);
  // Of its gradient `grad`: out = grad where nothing was clipped, else 0. Returns the sum of grad times what the scale is
  // multiplied with there: round(v) - v, v = x / scale, or low or high.
  double (*fake_quantize_backward)(const float* x, const float* grad, int64_t n, Range range, float* out);

  const Bytes* bytes;  // null where there is nothing faster
};

extern const Isa portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define QUEST_X86 1
extern const Isa avx2;
extern const Bytes vnni_bytes, amx_bytes;
bool amx_allowed();  // by the processor and the system
int64_t amx_peak(int64_t iterations);  // see peak.cpp
void avx512_fake_quantize(const float* x, int64_t n, Range range, float* out);
double avx512_fake_quantize_backward(const float* x, const float* grad, int64_t n, Range range, float* out);
void avx512_geglu(const float* hidden, const float* gate, int64_t n, float* y);
void avx512_group_norm(const GroupNorm& norm, const float* x, float* y, float* work);
bool avx512_quantize(const float* x, int64_t n, int64_t padded, Range range, int16_t* out);
void vnni_tile_int(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                   const int16_t* panel, int32_t* out, ptrdiff_t stride);
void vnni_tile_float(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                     const int16_t* panel, const float* scale, const float* bias, int columns, float* const* out);
#endif

}  // namespace quest
