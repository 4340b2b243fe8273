// Linear layers, convolutions and attention as products of pairs of int16.
//
// A tensor is quantized to codes minus zero point. For up to 8 bits these are exact in int16. Their products need no
// correction for zero points, and the padding of a convolution is 0. Two neighbouring channels share a 32-bit lane:
//
//     channels of a row       c0 c1 | c2 c3 | ...      int16 pairs
//     channels of an output   w0 w1 | w2 w3 | ...
//     one instruction         c0 w0 + c1 w1 in the first lane, c2 w2 + c3 w3 in the second, ... as int32
//
// So one instruction (vpmaddwd, vpdpwssd) does twice the work of a float multiply-add, and it cannot saturate. Weights are
// stored as 8-bit or 4-bit codes, and unpacked one panel at a time.
//
// 3x3 convolutions with stride 1 use Winograd's F(4x4, 3x3) (arXiv:1509.09308, section 4.1) on integers. The kernel
// transform is multiplied with the smallest integers that remove its fractions. All arithmetic is modulo 2^32. The result is
// 576 times the sum. It is divided by 9, by multiplying with the inverse of 9, and by 64, by a shift. This is exact if the
// sum is below 2^25. The bound of the layer's codes shows beforehand whether it is; otherwise the convolution is computed
// directly. Winograd's algorithm needs a quarter of the products, but on numbers of twice the size, and it needs transforms.
// Where an instruction set has products of bytes, those are faster (see bytes.cpp).
#pragma once
#include "driver.h"

namespace quest {

constexpr int64_t CACHE = 320 << 10;      // bytes of a block of work; it fits into the second cache of a processor core

void add(const float* x, int64_t n, float* out);

// Multiplies quantized rows with all panels of a weight.
void product(const Weight& w, int64_t rows, const int16_t* const* a, const ptrdiff_t* offset, const float* scale,
             const float* bias, float* const* out);

}  // namespace quest
