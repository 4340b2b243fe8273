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
//
// If each pixel has a scale of its own, each tap is a segment, and its sum is a group of channels: such sums are added as
// floats.
#pragma once
#include "driver.h"

#include <cstring>

namespace quest {

constexpr int64_t BLOCK = 512 << 10;   // bytes of codes, which stay in the second cache of a processor core
constexpr int64_t PANELS = 256 << 10;  // bytes of unpacked panels in the same cache
constexpr int64_t MAX_CALLS = 16;
constexpr int64_t NORMED_TOGETHER = 4096;  // numbers that a norm leaves in the first cache until they are codes

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
// Whether numbers can be passed on to what has this range as codes of one byte, which are all it needs to know.
inline bool as_codes(Range r) { return !r.dynamic && one_byte(r); }
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

  // padding: zero gets bytes too. unit: bytes of a plane are a multiple of it.
  Planes(Range range, int64_t channels, bool padding, int64_t unit = 4)
      : range(range), channels(channels), padded(round_up(channels, unit)) {
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
  // The same for rows, `stride` numbers apart; their bytes are `step` apart. Rows without gaps are quantized in one call.
  bool quantize_rows(const float* x, ptrdiff_t stride, int64_t rows, uint8_t* out, ptrdiff_t step) const {
    if (pixel() == channels && stride == channels && step == channels)
      return isa->quantize(x, rows * channels, rows * channels, range, out);
    bool nan = false;
    for (int64_t r = 0; r < rows; r++) nan |= quantize(x + r * stride, out + r * step);
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

// Quantizes rows of n numbers without gaps, in one call because they are short; their bytes are `step` apart. Returns true if
// there is a NaN.
inline bool quantize_short_rows(const float* x, int64_t rows, int64_t n, Range range, uint8_t* out, ptrdiff_t step) {
  static thread_local Scratch<uint8_t> memory;
  uint8_t* bytes = memory.get(rows * n);
  const bool nan = isa->quantize(x, rows * n, rows * n, range, bytes);
  for (int64_t r = 0; r < rows; r++) std::memcpy(out + r * step, bytes + r * n, n);
  return nan;
}

inline bool in_int16(int64_t n) { return n == static_cast<int16_t>(n); }
inline int32_t pair(int32_t a, int32_t b) { return (a & 0xffff) | static_cast<int32_t>(static_cast<uint32_t>(b) << 16); }

// The scale and zero point of each row. Those of the next group of channels begin `apart` numbers later; 0 if groups share
// them. Where there are no RowTerms, all rows have one scale and zero point, and Terms contains them.
struct RowTerms {
  std::vector<float> scale;
  std::vector<int32_t> zero, pairs;
  int64_t apart = 0;
  // Makes n terms of what is only padding: codes of 0, which are zero.
  void clear(int64_t n = 0, int64_t apart_ = 0) {
    scale.assign(n, 0.f), zero.assign(n, 0), pairs.clear();
    apart = apart_;
  }
  void add(Range r, int64_t rows) {
    scale.insert(scale.end(), rows, r.scale);
    zero.insert(zero.end(), rows, zero_of(r));
  }
  void set(int64_t i, Range r) { scale[i] = r.scale, zero[i] = zero_of(r); }
  // Makes the pairs of Grouped. sums: n of them, group by group.
  void pair_with(const int32_t* sums, int64_t n) {
    const int64_t own = zero.size();
    for (int64_t i = 0; i < n; i++) pairs.push_back(pair(-sums[i], -zero[i % own]));
  }
};

// Quantizes the numbers of `count` tokens, `stride` apart, and sets their terms, in each group from i on. known: null if ranges
// come from the numbers, or the range of all. Returns true if there is a NaN, or infinity where ranges come from the numbers.
inline bool quantize_tokens(const Planes& planes, const float* x, ptrdiff_t stride, int64_t count, const Range* known,
                            uint8_t* out, RowTerms& terms, int64_t i) {
  const int64_t group = planes.range.dynamic < OF_GROUPS ? planes.channels : planes.range.dynamic, row = planes.pixel();
  bool wrong = false;
  for (int64_t r = 0; known && r < count; r++) {
    wrong |= isa->quantize(x + r * stride, planes.channels, row, *known, out + r * row);
    terms.set(i + r, *known);
  }
  for (int64_t begin = 0; !known && begin < planes.channels; begin += group, i += terms.apart) {
    const int64_t n = std::min(group, planes.channels - begin);
    const int64_t padded = begin + n < planes.channels ? n : row - begin;
    wrong |= isa->quantize_rows(x + begin, stride, count, n, padded, planes.range, out + begin, row, &terms.scale[i],
                                &terms.zero[i]);
  }
  return wrong;
}

// The arguments of Isa::finish for every output, padded to whole panels; zero and scale for each group of channels, constant
// and bias for each sum. Each group has a sum, and if taps_apart, each group of each tap; the bias is added with the first
// one. of_rows: scales and zero points of the input are left out, because RowTerms has them. pairs: those of Grouped, or none
// if numbers of a pair can exceed 16 bits.
struct Terms {
  const int32_t* zero;
  int64_t taps;  // with sums of their own
  std::vector<int32_t> constant, pairs;
  std::vector<float> scale, bias;
  Terms(const Weight& w, const float* given, const Planes& planes, bool of_rows, bool taps_apart)
      : zero(w.zero_point()), taps(taps_apart ? w.taps() : 1), constant(taps * w.numbers()), scale(w.numbers()),
        bias(constant.size()) {
    const int64_t numbers = w.numbers(), sums = constant.size();
    for (int64_t i = 0; i < sums; i++) {
      const int32_t sum = taps_apart ? w.sum()[i] : w.sum_of_taps(i);
      constant[i] = of_rows ? sum : static_cast<int32_t>(-planes.low * sum);
    }
    for (int64_t o = 0; o < numbers; o++) scale[o] = of_rows ? w.scale()[o] : w.scale()[o] * planes.range.scale;
    if (given) std::copy(given, given + w.outputs, bias.begin());
    const int64_t largest_sum = static_cast<int64_t>(planes.range.high - planes.range.low) * w.group;
    if (sums == w.panels() * NR || !isa->multiply_groups || largest_sum > INT16_MAX) return;
    bool fit = true;
    for (int64_t i = 0; i < sums; i++) {
      fit = fit && in_int16(zero[i % numbers]) && in_int16(constant[i]);
      pairs.push_back(pair(zero[i % numbers], constant[i]));
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
  const int32_t* sums;  // the sum of all segments of each row, or as RowTerms if groups or taps have sums of their own
  float* const* out;    // where each row goes; null: it is not stored
  const float* const* residual;  // null, or for each row what is added to it
  const RowTerms* terms = nullptr;
  uint8_t* next = nullptr;       // in place of `out`, the codes of whole panels of outputs in `range`, without gaps
  Range range{};                 // the range of the next layer
  const ptrdiff_t* shift = nullptr;  // if taps have sums of their own: how far apart their terms and those of the row are
  int64_t apart = 0;                 // from the sums of a group to those of the next one
};

// Returns for every row of `out` the place in `residual` that corresponds to it. residual has the layout of `base`.
const float* const* counterparts(const float* residual, const float* base, const std::vector<float*>& out,
                                 std::vector<const float*>& rows);

// Returns a panel as signed bytes [segments][bytes / 4][NR][4]; the rest of a segment is zeros. It is in `memory`, unless the
// weight stores it in exactly this form.
const int8_t* panel_of(const Weight& w, int64_t panel, const Rows& a, int8_t* memory);

// Multiplies rows with panels first..last of a weight. gated: the panels are those of the first half of the outputs, and each
// output is multiplied with gelu of the same output in the second half. Returns true if an output is NaN but had to become a
// code.
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
