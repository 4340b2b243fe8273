// The functions that an instruction set provides for the drivers. Integers are exact.
//
// Layers and attention are products of unsigned and signed bytes. An unsigned byte a is an activation code minus the lowest
// code. A signed byte w is a weight code minus 128, or minus 8 for 4 bits. Let z_a and z_w be the zero points of the
// activations and of an output, minus the same numbers. Then a layer computes
//   sum (a - z_a)(w - z_w) = sum a w - z_w sum a - z_a sum (w - z_w)  modulo 2^32.
// The drivers check beforehand that this sum is below 2^31.
//
// Weights are packed in panels of 16 outputs. Four neighbouring bytes of an output lie together:
//
//     a row of the input     a0 a1 a2 a3                                   | a4 a5 a6 a7 ...
//     a weight panel         w0 w1 w2 w3 of output 0, ..., of output 15    | w4 w5 w6 w7 of output 0, ..., of output 15 | ...
//     16 sums, int32         a0 w0 + a1 w1 + a2 w2 + a3 w3 of output 0, ..., of output 15
//
// The instruction vpdpbusd of VNNI adds four such products to each sum. It cannot saturate, because sums are int32.
#pragma once
#include "abi.h"

#include <cstddef>
#include <cstdint>
#include <type_traits>

// Functions between these two lines are compiled for an instruction set, which the rest of the core need not have.
#define QUEST_PRAGMA(x) _Pragma(#x)
#ifdef __clang__
#define QUEST_TARGET_BEGIN(isa) QUEST_PRAGMA(clang attribute push(__attribute__((target(isa))), apply_to = function))
#define QUEST_TARGET_END _Pragma("clang attribute pop")
#else
#define QUEST_TARGET_BEGIN(isa) _Pragma("GCC push_options") QUEST_PRAGMA(GCC target(isa))
#define QUEST_TARGET_END _Pragma("GCC pop_options")
#endif

namespace quest {

constexpr int NR = 16;                        // columns of a weight panel
constexpr int MAX_ROWS = 64, MAX_PANELS = 4;  // in one call of multiply
constexpr int64_t SLACK = 64;                 // bytes that may be read after the last row of codes

#define INLINE static inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

// 3x3 convolutions with stride 1 by Winograd's F(4x4, 3x3) (arXiv:1509.09308, section 4.1) on integers. The kernel transform
// is multiplied with the smallest integers that remove its fractions. All arithmetic is modulo 2^32. The result is 576 times
// the sum. It is divided by 9, by multiplying with the inverse of 9, and by 64, by a shift. This is exact if the sum is below
// 2^25. Winograd's algorithm needs a quarter of the products, but on int16, and it needs transforms.
struct Winograd {
  int products;  // one of its products takes as long as this many products of bytes
  // Transforms tiles of 6x6 pixels, with `channels` bytes per pixel, a multiple of 4. Tile t begins at a + offset[t]. Lines
  // and pixels are `line` and `pixel` bytes apart. `middle` is subtracted from each byte. Only `multiply` knows the order of
  // the transformed numbers. `out` has room for POINTS * (tiles + 1) pixels, each of WINOGRAD_CHANNELS or a multiple.
  void (*input)(const uint8_t* a, ptrdiff_t line, ptrdiff_t pixel, int64_t channels, int middle, const ptrdiff_t* offset,
                int64_t tiles, int16_t* out);
  // Computes sums [tiles][4][4][NR] from transformed tiles and a panel of nine taps. `points` has room for
  // POINTS * (tiles + 1) * NR numbers.
  void (*multiply)(const int16_t* a, int64_t channels, int64_t tiles, const int8_t* panel, int32_t* points, int32_t* out);
};
constexpr int POINTS = 36;              // products for one 4x4 output tile in the transformed domain, 6x6
constexpr int WINOGRAD_CHANNELS = 128;  // transformed tiles have room for a multiple of this number of channels

// What the sums of groups of channels are corrected by and multiplied with, for the rows and columns of one tile. Each segment
// of a row (see `multiply`) has groups of its own. The numbers of row r, segment s and group g are at r + shift[s] in
// row_pairs and row_scale, plus g * row_apart or g * scale_apart. Those of a column are at (s * groups + g) * apart in pairs,
// and at g * apart in scale. A pair holds two int16: of a column its zero point and its constant, of a row its sum and its
// zero point, both negative. Their product is what `finish` subtracts.
struct Grouped {
  int64_t group, segments;  // bytes of a group, and number of segments
  const ptrdiff_t *offset, *shift;
  const int32_t *row_pairs, *pairs;
  const float *row_scale, *scale;
  int64_t row_apart, scale_apart, apart;
};

// The static range of numbers from least to most, both including 0, as a dynamic range determines it: so that the largest
// code reaches the end of their range. Codes that can be negative have the zero point 0. If a number is infinite, so is the
// scale.
INLINE Range measured(Range r, float least, float most) {
  // Products on both sides of a difference could become another operation, with other last bits.
  least *= r.scale, most *= r.scale;
  least = least < 0.f ? least : 0.f, most = most > 0.f ? most : 0.f;
  const bool symmetric = r.low < 0;
  const float reach = symmetric ? (-least < most ? most : -least) : most - least, scale = reach / r.high;
  const float own = scale < 1e-10f ? 1e-10f : scale;
  const float zero = symmetric || !(own <= __FLT_MAX__) ? 0.f : __builtin_nearbyintf(-least / own);
  return {own, r.low - zero, r.high - zero, 0};
}

struct Isa {
  const char* name;
  int rows, panels;  // the largest numbers of rows and panels in one call of multiply; rows is at least NR
  int64_t depth;     // the length of a segment of a row is a multiple of this number of bytes

  // out[0..n) = codes minus the lowest code, out[n..padded) = 0. The range has at most 256 codes. Returns true if x contains
  // a NaN.
  bool (*quantize)(const float* x, int64_t n, int64_t padded, Range range, uint8_t* out);
  // Quantizes rows of n numbers, each by the range that a dynamic one determines for it (see `measured`). Rows of x are
  // `stride` apart, and those of out, which `padded` zeros fill up, out_stride. scale and zero get the scale of each row and
  // the zero point of its codes minus the lowest one. Returns true if there is a NaN or infinity.
  bool (*quantize_rows)(const float* x, ptrdiff_t stride, int64_t rows, int64_t n, int64_t padded, Range range, uint8_t* out,
                        ptrdiff_t out_stride, float* scale, int32_t* zero);
  // least and most of n numbers and 0; a NaN is left out.
  void (*extremes)(const float* x, int64_t n, float* least, float* most);
  // out[r] = the sum of the n bytes of row r. Rows are `stride` apart.
  void (*sums)(const uint8_t* a, ptrdiff_t stride, int64_t rows, int64_t n, int32_t* out);
  // Unpacks 4-bit codes to signed bytes [quads][NR][4], the codes minus 8. In codes [quads][NR / 2][4], the first half of the
  // outputs is in the low halves of bytes, and the second half in the high ones.
  void (*unpack4)(const uint8_t* codes, int64_t quads, int8_t* out);
  // Computes products [rows, panels * NR]. For each segment s, row r consists of the `bytes` bytes at
  // a + r * stride + offset[s]. Panels [segments][bytes / 4][NR][4] are `panel` bytes apart. Even if there are fewer rows, all
  // rows of a tile may be read, with SLACK bytes after them, and written.
  void (*multiply)(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
                   const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride);
  // The same for any number of bytes that is a multiple of 16.
  decltype(multiply) multiply_some;
  // Null, or out[rows, panels * NR] = the sum over segments and groups of (product + pairs) * scale * row_scale.
  void (*multiply_groups)(const uint8_t* a, ptrdiff_t stride, int rows, int64_t bytes, const int8_t* b, ptrdiff_t panel,
                          int panels, const Grouped& g, float* out, ptrdiff_t out_stride);
  // out[r][0..columns) = (in - zero * sums[r] - constant) * scale + bias, plus residual[r] if it is not null. Rows of `in`
  // are `stride` apart. A row whose out[r] is null is left out. Columns of out and residual begin at `from`. row_scale,
  // row_zero: null, or factors of scale and of constant for each row.
  void (*finish)(const int32_t* in, ptrdiff_t stride, int rows, const int32_t* sums, const int32_t* zero,
                 const int32_t* constant, const float* scale, const float* bias, int columns, float* const* out,
                 const float* const* residual, ptrdiff_t from, const float* row_scale, const int32_t* row_zero);
  // Pack m rows of d codes, `stride` apart, as the weight of a product: as signed bytes, the codes minus 128. Keys are its
  // outputs, [ceil(m / NR)][depth / 4][NR][4], and values are its inputs, [ceil(d / NR)][length / 4][NR][4]. Unused places of
  // depth and length are zeros. Those of outputs are not: whole panels are read there.
  void (*pack_keys)(const uint8_t* k, ptrdiff_t stride, int64_t m, int64_t d, int64_t depth, int8_t* out);
  void (*pack_values)(const uint8_t* v, ptrdiff_t stride, int64_t m, int64_t d, int64_t length, int8_t* out);
  // Computes softmax(factor * (scores - column)) over the m scores of each row; if column is null, the scores are floats, and
  // nothing is subtracted. out gets its codes minus the lowest code, then zeros up to `padded`, and sums their sums. If the
  // range is dynamic, row_scale gets the scale of each row. Rows of scores are `width` apart, a multiple of NR, and are
  // overwritten. Rows of out are `padded` apart. Returns true if scores are NaN or infinite, or too far apart for floats.
  bool (*softmax)(int rows, int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
                  const int32_t* column, uint8_t* out, int32_t* sums, float* row_scale);

  // out[c] = the sum of x[c] over pixels, or of (x[c] - mean[c])^2 if mean is not null. Pixels of x are `pixel` apart.
  void (*channel_sums)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean, float* out);
  // y = x a[c] + b[c], then SiLU if `silu`. Pixels of y are y_pixel apart.
  void (*scale_channels)(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* a, const float* b,
                         bool silu, float* y, ptrdiff_t y_pixel);
  // y = the normalized row x of n numbers.
  void (*layer_norm)(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y);
  // y = hidden * gelu(gate), for rows of n numbers.
  void (*geglu)(const float* hidden, const float* gate, int64_t n, float* y);
  // out = scale * clamp(round(x / scale), low, high). NaN stays NaN.
  void (*fake_quantize)(const float* x, int64_t n, Range range, float* out);
  // Computes its gradients from `grad`: out = grad where x was not clipped, and 0 elsewhere. Returns the gradient of the
  // scale: the sum of grad times round(v) - v with v = x / scale, or times low or high where x was clipped.
  double (*fake_quantize_backward)(const float* x, const float* grad, int64_t n, Range range, float* out);

  // A thread calls begin before its first and end after its last call of multiply, if they are not null.
  void (*begin)();
  void (*end)();
  const Winograd* winograd;  // null if products of bytes are faster
};

extern const Isa portable;
#if defined(__x86_64__) && defined(__GNUC__)
#define QUEST_X86 1
extern const Isa avx2, avxvnni, avx512vnni, amx;
bool avxvnni_allowed(), amx_allowed();  // whether compiler, processor and system allow them
int64_t amx_peak(int64_t iterations);   // see peak.cpp
void avx2_layer_norm(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y);
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define QUEST_NEW_COMPILER 1  // knows AVX-VNNI and AMX
#endif
#elif defined(__aarch64__) && defined(__GNUC__)
#define QUEST_ARM 1
#ifdef __clang__
#define QUEST_DOTPROD "dotprod"
#else
#define QUEST_DOTPROD "arch=armv8.2-a+dotprod"
#endif
extern const Isa neon;
bool neon_allowed();  // whether the processor has dot products
#endif

}  // namespace quest
