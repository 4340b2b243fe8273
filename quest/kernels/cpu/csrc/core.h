// The functions that an instruction set provides for the drivers. Integers are exact; pairs.h and bytes.h explain how.
#pragma once
#include "abi.h"

#include <cstddef>
#include <cstdint>

namespace quest {

constexpr int NR = 16;       // columns of a weight panel
constexpr int MAX_MR = 12;   // largest number of rows of a register tile
constexpr int POINTS = 36;   // products for one 4x4 output tile in the transformed domain, 6x6
constexpr int WINOGRAD_ROWS[3][2] = {{0, 5}, {1, 2}, {3, 4}};  // rows of points that are computed together

// The group norm of one sample [pixels, channels], or of some of its groups:
//   y = normalized(x + shift[c]) * (1 + factor[c]) + offset[c], then SiLU if `silu`.
// x_pixel, y_pixel: pixel strides, in floats. Pointers may be null.
struct GroupNorm {
  int64_t pixels, channels, groups;
  ptrdiff_t x_pixel, y_pixel;
  float eps;
  const float *weight, *bias, *shift, *factor, *offset;
  bool silu;
};

// Products of unsigned and signed bytes. An unsigned byte a is an activation code minus the lowest code. A signed byte w is
// a weight code minus 128, or minus 8 for 4 bits. Let z_a and z_w be the zero points of a row and of an output, minus the
// same numbers. Then a layer computes
//   sum (a - z_a)(w - z_w) = sum a w - z_w sum a - z_a sum (w - z_w)  modulo 2^32.
struct Bytes {
  int rows, panels;  // the largest numbers of rows and panels in one call of multiply
  int64_t depth;     // the length of a row is a multiple of this number of bytes

  // out[0..n) = codes minus the lowest code, out[n..padded) = 0. Returns true if x contains a NaN.
  bool (*quantize)(const float* x, int64_t n, int64_t padded, Range range, uint8_t* out);
  // out[r] = the sum of the n bytes of row r. Rows are `stride` apart.
  void (*sums)(const uint8_t* a, ptrdiff_t stride, int64_t rows, int64_t n, int32_t* out);
  // Unpacks a weight panel of `pairs` channel pairs to signed bytes [ceil(pairs / 2)][NR][4], and adds their sums to
  // sums[NR].
  void (*unpack8)(const uint8_t* codes, int64_t pairs, int8_t* out, int32_t* sums);
  void (*unpack4)(const uint8_t* codes, int64_t pairs, int8_t* out, int32_t* sums);
  // Computes products [rows, panels * NR]. For each segment s, row r consists of the `bytes` bytes at
  // a + r * stride + offset[s]. Panels [segments][bytes / 4][NR][4] are `panel` bytes apart. A whole tile of rows may be
  // read, even if there are fewer rows.
  void (*multiply)(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
                   const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride);
  // out[r][0..columns) = (in - zero * sums[r] - constant) * scale + bias, plus residual[r] if it is not null. Rows of `in`
  // are `stride` apart. A row whose out[r] is null is left out. Columns of out and residual begin at `from`.
  void (*finish)(const int32_t* in, ptrdiff_t stride, int rows, const int32_t* sums, const int32_t* zero,
                 const int32_t* constant, const float* scale, const float* bias, int columns, float* const* out,
                 const float* const* residual, ptrdiff_t from);
  // Pack m rows of d codes, `stride` apart, as the weight of a product. Keys are its outputs,
  // [ceil(m / NR)][depth / 4][NR][4], and values are its inputs, [ceil(d / NR)][length / 4][NR][4]. Unused places are
  // zeros. sums: the sum of each output.
  void (*pack_keys)(const uint8_t* k, ptrdiff_t stride, int64_t m, int64_t d, int64_t depth, int8_t* out, int32_t* sums);
  void (*pack_values)(const uint8_t* v, ptrdiff_t stride, int64_t m, int64_t d, int64_t length, int8_t* out, int32_t* sums);
  // Computes softmax(factor * (scores - column)) over the m scores of each row. out gets its codes minus the lowest code,
  // then zeros up to `padded`, and sums their sums. Rows of scores are `width` apart, a multiple of 16, and are overwritten.
  // Rows of out are `padded` apart.
  void (*softmax)(int rows, int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
                  const int32_t* column, uint8_t* out, int32_t* sums);
  // A thread calls begin before its first and end after its last call of multiply.
  void (*begin)();
  void (*end)();
};

struct Isa {
  const char* name;
  int rows;  // the rows of a register tile, at most MAX_MR

  // out[0..n) = codes minus zero point, out[n..padded) = 0. Returns true if x contains a NaN.
  bool (*quantize)(const float* x, int64_t n, int64_t padded, Range range, int16_t* out);

  // Unpacks a weight panel of `steps` channel pairs to codes minus zero point, int16 [steps][NR][2].
  void (*unpack8)(const uint8_t* codes, const int16_t* zero_point, int64_t steps, int16_t* out);
  void (*unpack4)(const uint8_t* codes, const int16_t* zero_point, int64_t steps, int16_t* out);

  // Computes products [rows, NR]. For each tap t, row r consists of the pairs at a[r] + offset[t]. The panel is
  // [taps * pairs][NR][2].
  void (*tile_int)(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                   const int16_t* panel, int32_t* out, ptrdiff_t stride);
  // Computes the same products, and stores out[r][0..columns) = product * scale + bias.
  void (*tile_float)(int rows, const int16_t* const* a, int taps, const ptrdiff_t* offset, int64_t pairs,
                     const int16_t* panel, const float* scale, const float* bias, int columns, float* const* out);

  // Transforms 3x3 kernels into a third of the transformed domain: two rows of six points. It reads in[tap * numbers + i],
  // where `numbers` is a multiple of 16, and writes out[(6 * (0 or 1) + column) * stride + i].
  void (*winograd_weight)(const int16_t* in, int64_t numbers, int third, int16_t* out, ptrdiff_t stride);
  // Transforms one 6x6 input tile of `channels` channels, a multiple of 16: out[point * stride + channel].
  void (*winograd_input)(const int16_t* in, ptrdiff_t row, ptrdiff_t pixel, int64_t channels, int16_t* out,
                         ptrdiff_t stride);
  // Transforms products in[point * stride + channel] back to a 4x4 output tile, of which only [height, width] is stored.
  void (*winograd_output)(const int32_t* in, ptrdiff_t stride, int64_t channels, const float* scale, const float* bias,
                          float* out, ptrdiff_t row, ptrdiff_t pixel, int height, int width);

  // Computes softmax(factor * scores) over the m scores of each row. out gets its codes minus zero point, then zeros up to
  // `padded`. Rows of scores and of `work` are `width` apart, a multiple of 8; rows of out are `padded` apart.
  void (*softmax)(int rows, const int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
                  float* work, int16_t* out);

  // `work` has room for 4 * channels numbers.
  void (*group_norm)(const GroupNorm& norm, const float* x, float* y, float* work);
  // y = the normalized row x of n numbers.
  void (*layer_norm)(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y);
  // y = hidden * gelu(gate), for rows of n numbers.
  void (*geglu)(const float* hidden, const float* gate, int64_t n, float* y);

  // out = scale * clamp(round(x / scale), low, high). NaN stays NaN.
  void (*fake_quantize)(const float* x, int64_t n, Range range, float* out);
  // Computes its gradients from `grad`: out = grad where x was not clipped, and 0 elsewhere. Returns the gradient of the
  // scale: the sum of grad times round(v) - v with v = x / scale, or times low or high where x was clipped.
  double (*fake_quantize_backward)(const float* x, const float* grad, int64_t n, Range range, float* out);

  const Bytes* bytes;  // null if the instruction set has no products of bytes
};

extern const Isa portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define QUEST_X86 1
extern const Isa avx2;
extern const Bytes vnni_bytes, amx_bytes;
bool amx_allowed();  // whether processor and system allow AMX
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
