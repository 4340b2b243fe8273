// Linear layers, convolutions and attention as products of unsigned and signed bytes (see core.h).
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

#include <cstring>

namespace quest {

constexpr int64_t BLOCK = 512 << 10;   // bytes of codes, which stay in the second cache of a processor core
constexpr int64_t PANELS = 256 << 10;  // bytes of unpacked panels in the same cache
constexpr int64_t MAX_CALLS = 16;

// Exists while a thread multiplies, because some instruction sets have to prepare for it.
struct Multiplying {
  Multiplying() {
    if (isa->begin) isa->begin();
  }
  ~Multiplying() {
    if (isa->end) isa->end();
  }
};

inline bool one_byte(Range r) { return r.high - r.low <= 255.f; }
inline int32_t zero_of(Range r) { return -static_cast<int32_t>(r.low); }  // the zero point of codes minus the lowest code

// The bytes of a layer's input. Usually there are at most 256 codes, and if the input is padded, zero is one of them. Then
// there is one plane: each byte is a code minus the lowest code. Otherwise there are several planes. They repeat the channels,
// the weight is repeated for each of them, and a code minus the lowest code is the sum of its bytes:
//
//     codes minus the lowest of c0 c1 c2 c3      600 300  20   0
//     plane 0                                    255 255  20   0
//     plane 1                                    255  45   0   0
//     plane 2                                     90   0   0   0
//
// If zero is below the lowest code, padding becomes the bytes 0, and further planes hold the constant lowest code.
struct Planes {
  Range range;
  int64_t low;               // the number for which all bytes are 0: a code minus zero point
  int64_t coded, count;      // planes that depend on the code, and all planes
  int64_t channels, padded;  // numbers per pixel, and bytes of a plane

  Planes(Range range, int64_t channels, bool padding) : range(range), channels(channels), padded(round_up(channels, 4)) {
    const int64_t lowest = static_cast<int64_t>(range.low), highest = static_cast<int64_t>(range.high);
    low = padding ? std::min<int64_t>(lowest, 0) : lowest;
    coded = std::max<int64_t>(1, ceil_div(highest - lowest, 255));
    count = std::max(coded + ceil_div(lowest - low, 255), padding ? ceil_div(-low, 255) : 0);
  }
  int64_t pixel() const { return count * padded; }  // bytes of all channels

  // Quantizes the numbers of a pixel. Returns true if x contains a NaN.
  bool quantize(const float* x, uint8_t* out) const {
    bool nan = false;
    for (int64_t p = 0; p < coded; p++, out += padded) {
      const float from = range.low + 255.f * p;
      nan |= isa->quantize(x, channels, padded, {range.scale, from, std::min(range.high, from + 255.f)}, out);
    }
    fill(static_cast<int64_t>(range.low) - low, count - coded, out);
    return nan;
  }
  // Writes pixels that represent zero.
  void pad(uint8_t* out, int64_t pixels) const {
    for (int64_t i = 0; i < pixels; i++, out += pixel()) fill(-low, count, out);
  }

 private:
  // Writes planes whose bytes have this sum, for each channel.
  void fill(int64_t sum, int64_t planes, uint8_t* out) const {
    for (; planes > 0; planes--, out += padded, sum -= 255) {
      std::memset(out, static_cast<int>(std::clamp<int64_t>(sum, 0, 255)), channels);
      std::memset(out + channels, 0, padded - channels);
    }
  }
};

// Memory for rows of codes, with room for a whole tile after the last one.
inline uint8_t* rows_of(Scratch<uint8_t>& memory, int64_t rows, int64_t stride) {
  return memory.get((rows + isa->rows) * stride + SLACK);
}

// The scale and zero point of each row. Those of the next group of channels begin `apart` numbers later; 0 if groups share
// them. Where there are no RowTerms, all rows have one scale and zero point, and Terms contains them.
struct RowTerms {
  std::vector<float> scale;
  std::vector<int32_t> zero, pairs;
  int64_t apart = 0;
  void clear() { scale.clear(), zero.clear(), pairs.clear(); }
  void add(Range r) { scale.push_back(r.scale), zero.push_back(zero_of(r)); }
  void add(Range r, int64_t rows) {
    scale.insert(scale.end(), rows, r.scale);
    zero.insert(zero.end(), rows, zero_of(r));
  }
};

inline bool in_int16(int64_t n) { return n == static_cast<int16_t>(n); }
inline int32_t pair(int32_t a, int32_t b) { return (a & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(b) << 16); }

// The arguments of Isa::finish for every group and output, padded to whole panels. dynamic: scales and zero points of the
// input are left out, because RowTerms has them. The bias is added with the first group. pairs: those of Grouped, or none if
// numbers of a pair can exceed 16 bits.
struct Terms {
  const int32_t* zero;
  std::vector<int32_t> constant, pairs;
  std::vector<float> scale, bias;
  Terms(const Weight& w, const float* given, const Planes& planes, int dynamic)
      : zero(w.zero_point()), constant(w.groups() * w.panels() * NR), scale(constant.size()), bias(constant.size()) {
    for (size_t o = 0; o < constant.size(); o++) {
      constant[o] = static_cast<int32_t>(dynamic ? w.sum()[o] : -planes.low * w.sum()[o]);
      scale[o] = dynamic ? w.scale()[o] : w.scale()[o] * planes.range.scale;
    }
    if (given) std::copy(given, given + w.outputs, bias.begin());
    if (w.groups() == 1 || !isa->multiply_groups || 255 * w.group > INT16_MAX) return;
    bool fit = true;
    for (size_t o = 0; o < constant.size(); o++) {
      fit = fit && in_int16(zero[o]) && in_int16(constant[o]);
      pairs.push_back(pair(zero[o], constant[o]));
    }
    if (!fit) pairs.clear();
  }
};

struct Rows {
  const uint8_t* codes;
  int64_t count;
  ptrdiff_t stride;
  int64_t segments;
  const ptrdiff_t* offset;
  int64_t bytes;        // the length of a segment
  int64_t planes;       // how often the weights of each tap are repeated in it
  const int32_t* sums;  // the sum of all segments of each row; those of further groups follow
  float* const* out;    // where each row goes; null: it is not stored
  const float* const* residual;  // null, or for each row what is added to it
  const RowTerms* terms = nullptr;
  uint8_t* next = nullptr;       // for gated outputs: in place of `out`, their codes in `range`, without gaps
  Range range{};                 // the range of the next layer
};

// Returns for every row of `out` the place in `residual` that corresponds to it. residual has the layout of `base`.
const float* const* counterparts(const float* residual, const float* base, const std::vector<float*>& out,
                                 std::vector<const float*>& rows);

// Returns a panel as signed bytes [segments][bytes / 4][NR][4]; the rest of a segment is zeros. It is in `memory`, unless the
// weight stores it in exactly this form.
const int8_t* panel_of(const Weight& w, int64_t panel, const Rows& a, int8_t* memory);

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
  const int64_t each = isa->panels, whole = ceil_div(panels, each);
  const int64_t parts = std::min(whole, ceil_div(useful(threads, work), blocks));
  parallel(blocks * parts, threads, work, [&](int64_t i) {
    const int64_t part = i % parts;
    task(i / parts, part * whole / parts * each, std::min(panels, (part + 1) * whole / parts * each));
  });
}

}  // namespace quest
