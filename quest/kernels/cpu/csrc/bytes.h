// Linear layers, convolutions and attention as products of unsigned and signed bytes (see Bytes in core.h).
//
// A product reads rows of codes that lie at equal distances in memory. For a convolution with stride 1, these are the pixels
// of a block, if there is padding between its lines (o):
//
//     o o o o o o
//     o a b c d o      The row of pixel a, for a 3x3 kernel, has three segments, one per line of the kernel: "o o o",
//     o e f g h o      "o a b" and "o e f". The row of pixel b begins one pixel later: "o o o", "a b c" and "e f g".
//
// Rows that begin in the padding are computed too, but their results are not stored.
#pragma once
#include "driver.h"

namespace quest {

constexpr int64_t BLOCK = 512 << 10;   // bytes of codes, which stay in the second cache of a processor core
constexpr int64_t PANELS = 256 << 10;  // bytes of unpacked panels in the same cache
constexpr int64_t MAX_CALLS = 16;
constexpr int MAX_PANELS = 4, MAX_ROWS = 32;  // in one call of multiply
constexpr int64_t SLACK = 64;         // bytes that may be read after the last row of a tile

inline int32_t zero_of(Range r) { return -static_cast<int32_t>(r.low); }  // the zero point of codes minus the lowest code

// Memory for rows of codes, with room for a whole tile after the last one.
inline uint8_t* rows_of(Scratch<uint8_t>& memory, int64_t rows, int64_t stride) {
  return memory.get((rows + isa->bytes->rows) * stride + SLACK);
}

// Zero point, scale and bias of every output, padded to whole calls of multiply, and the zero point of the input.
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
  int64_t bytes;        // the length of a segment
  const int32_t* sums;  // the sum of all segments of each row
  float* const* out;    // where each row goes; null: it is not stored
  const float* const* residual;  // null, or for each row what is added to it
  uint8_t* next = nullptr;       // for gated outputs: in place of `out`, their codes in `range`, without gaps
  Range range{};                 // the range of the next layer
};

// Returns for every row of `out` the place in `residual` that corresponds to it. residual has the layout of `base`.
const float* const* counterparts(const float* residual, const float* base, const std::vector<float*>& out,
                                 std::vector<const float*>& rows);

// Multiplies rows with panels first..last of a weight. gated: the panels are those of the first half of the outputs, and each
// output is multiplied with gelu of the same output in the second half. Returns true if a gated output is NaN but had to
// become a code.
bool product(const Weight& w, const Terms& t, const Rows& a, int64_t first, int64_t last, bool gated = false);

// Returns a number of blocks of at most `most` units; with several threads each gets the same number.
inline int64_t blocks_of(int64_t units, int64_t most, int64_t threads) {
  const int64_t blocks = ceil_div(units, std::max<int64_t>(1, most));
  return std::min(units, round_up(blocks, std::min(threads, units)));
}

// Calls task(block, first panel, last panel). If there are fewer blocks than threads, outputs are divided too.
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
