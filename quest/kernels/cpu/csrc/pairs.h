// Linear layers, convolutions and attention as products of pairs of int16.
//
// A tensor is quantized to codes less zero point, which are exact in int16 for up to 8 bits whatever the zero point: a
// product of such numbers needs no correction for either zero point, and the zero of a convolution's padding is 0.
// Two neighbouring channels fill one 32-bit lane, so one multiply-add instruction of pairs (vpmaddwd, vpdpwssd) does
// twice the work of a float one and cannot saturate. Weights are stored as 8-bit or packed 4-bit codes and unpacked panel
// by panel.
//
// 3x3 convolutions of stride 1 use Winograd's F(4x4, 3x3) (arXiv:1509.09308, section 4.1) on integers: the kernel's
// transform is scaled by the least integers that clear its denominators, all arithmetic is modulo 2^32, and the result,
// 576 times the sum, is divided by 9 (by its inverse) and 64 (by a shift). It is the exact sum where that is below 2^25,
// which the bound on the layer's codes shows beforehand; else the direct way is taken. A quarter of the products, on numbers
// of twice the size, with transforms: where there are products of bytes, those are faster (see bytes.cpp).
#pragma once
#include "driver.h"

namespace quest {

constexpr int64_t CACHE = 320 << 10;      // bytes of a block of work, below what a core's second cache holds

void add(const float* x, int64_t n, float* out);

// Multiplies quantized rows with every panel of a weight.
void product(const Weight& w, int64_t rows, const int16_t* const* a, const ptrdiff_t* offset, const float* scale,
             const float* bias, float* const* out);

}  // namespace quest
