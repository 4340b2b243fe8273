// Linear layers, convolutions and attention as products of unsigned by signed bytes (see Bytes in core.h).
//
// A row of the product is a stretch of codes in memory and the next row lies a fixed distance further. For a convolution
// of stride 1 that is so for all pixels of a block at once, if the padding lies between its lines: a kernel's line of taps
// is then one segment. What begins in the padding is computed with the rest and not stored.
#pragma once
#include "driver.h"

namespace quest {

constexpr int64_t BLOCK = 512 << 10;   // bytes of codes that stay in a core's second cache
constexpr int64_t PANELS = 256 << 10;  // bytes of unpacked panels beside them
constexpr int64_t MAX_CALLS = 16;
constexpr int MAX_PANELS = 4, MAX_ROWS = 32;  // of one call of multiply
constexpr int64_t SLACK = 64;         // bytes that may be read after the last row of a tile

inline int32_t zero_of(Range r) { return -static_cast<int32_t>(r.low); }  // of codes less the lowest

// Rows of codes, with room for a whole tile after the last.
inline uint8_t* rows_of(Scratch<uint8_t>& memory, int64_t rows, int64_t stride) {
  return memory.get((rows + isa->bytes->rows) * stride + SLACK);
}

// What is taken off the products of every output, and its scale and bias, padded to whole calls of multiply.
struct Terms {
  std::vector<int32_t> zero;
  std::vector<float> scale, bias;
  int32_t zero_a;
  Terms(const Weight& w, const float* given, Range range) : zero_a(zero_of(range)) {
    const int64_t size = round_up(w.panels(), isa->bytes->panels) * NR;
    zero.assign(size, 0), scale.assign(size, 0.f), bias.assign(size, 0.f);
    for (int64_t o = 0; o < w.outputs; o++) {
      zero[o] = w.zero_point()[o] - (w.bits == 4 ? 8 : 128);
      scale[o] = w.scale()[o] * range.scale;
    }
    if (given) std::copy(given, given + w.outputs, bias.begin());
  }
};

struct Rows {
  const uint8_t* codes;
  int64_t count;
  ptrdiff_t stride;
  int64_t segments;
  const ptrdiff_t* offset;
  int64_t bytes;        // of a segment
  const int32_t* sums;  // of all segments
  float* const* out;    // null: not stored
  const float* const* residual;  // of each of `out`, what is added to it; null: nothing to any
  uint8_t* next = nullptr;       // of gated outputs: instead of `out`, their codes in the range of the next layer,
  Range range{};                 // without gaps
};

// For every row of `out`, its counterpart in `residual`, which is laid out as what begins at `base`.
const float* const* counterparts(const float* residual, const float* base, const std::vector<float*>& out,
                                 std::vector<const float*>& rows);

// Multiplies rows with panels first..last of a weight; `gated`: with those of the first half of the outputs, and of the
// second, whose gelu they are multiplied with. True where a gated output that became a code is a NaN.
bool product(const Weight& w, const Terms& t, const Rows& a, int64_t first, int64_t last, bool gated = false);

// A number of blocks of at most `most` units, the same for every thread where there are several.
inline int64_t blocks_of(int64_t units, int64_t most, int64_t threads) {
  const int64_t blocks = ceil_div(units, std::max<int64_t>(1, most));
  return std::min(units, round_up(blocks, std::min(threads, units)));
}

// Calls task(block, first panel, last panel); outputs are shared out, too, where there are fewer blocks than threads.
template <class Task>
void share(int64_t panels, int64_t blocks, int threads, int64_t work, const Task& task) {
  const int64_t each = isa->bytes->panels, whole = ceil_div(panels, each);
  const int64_t parts = std::min(whole, ceil_div(useful(threads, work), blocks));
  parallel(blocks * parts, threads, work, [&](int64_t i) {
    const int64_t part = i % parts;
    task(i / parts, part * whole / parts * each, std::min(panels, (part + 1) * whole / parts * each));
  });
}

}  // namespace quest
