// Convolutions (see product.h).
#include "product.h"

namespace quest {

std::vector<Range> of_samples(const Conv& c, int64_t channels, Range r, int threads) {
  const int64_t lines = c.samples * c.height, pixels = c.pixel == channels ? 1 : c.width;
  const int64_t numbers = pixels == 1 ? c.width * channels : channels;  // side by side
  std::vector<float> least(lines), most(lines);
  parallel(lines, threads, 10 * lines * c.width * channels, [&](int64_t i) {
    for (int64_t x = 0; x < pixels; x++) {
      float low, high;
      isa->extremes(c.x + i / c.height * c.sample + i % c.height * c.row + x * c.pixel, numbers, &low, &high);
      least[i] = std::min(least[i], low), most[i] = std::max(most[i], high);
    }
  });
  std::vector<Range> ranges;
  for (auto low = least.begin(), high = most.begin(); low < least.end(); low += c.height, high += c.height) {
    ranges.push_back(measured(r, *std::min_element(low, low + c.height), *std::max_element(high, high + c.height)));
    if (!std::isfinite(ranges.back().scale)) return {};
  }
  return ranges;
}

namespace {

// The planes of each sample, or those of all samples.
using AllPlanes = std::vector<Planes>;
const Planes& of(const AllPlanes& planes, int64_t sample) { return planes[planes.size() == 1 ? 0 : sample]; }

// How the pixels of a block lie in memory, so that the rows of neighbouring outputs are neighbours (see product.h). With a
// stride of 2, these are the pixels of every second line, and every second one of them. So the block has four planes:
//
//     a b c d      lines 0, 2:  a c   b d     lines 1, 3:  e g   f h
//     e f g h                   i k   j l                  m o   n p
//     i j k l
//     m n o p
//
// Padding is part of them. Where the stride is 1, the padding after a line is that before the next one.
struct Layout {
  struct Plane {
    int64_t y, x;  // its first pixel
    bool operator==(const Plane& other) const { return y == other.y && x == other.x; }
  };
  std::vector<Plane> planes;  // those that taps read
  int64_t stride, lines;      // pixels from one line to the next, lines from one sample to the next
  int64_t lower, beside;      // how many lines lower, and how many pixels beside its row, the last tap is

  Layout(const Weight& w, const Conv& c) {
    const int64_t reach_y = (w.height - 1) * c.dilation_y, reach_x = (w.width - 1) * c.dilation_x;
    const int64_t needed = (c.out_height - 1) * c.stride_y + reach_y + 1, columns = (c.out_width - 1) * c.stride_x + reach_x + 1;
    // If padding is wider than the kernel, some outputs see only padding. They need places of their own too.
    stride = c.stride_x == 1 ? std::max(columns - c.left, c.out_width) : ceil_div(columns, c.stride_x);
    lines = c.stride_y == 1 ? std::max(needed - c.top, c.out_height) : ceil_div(needed, c.stride_y);
    lower = reach_y / c.stride_y, beside = reach_x / c.stride_x;
    for (int64_t tap = 0; tap < w.taps(); tap++)
      if (std::find(planes.begin(), planes.end(), plane_of(w, c, tap)) == planes.end()) planes.push_back(plane_of(w, c, tap));
  }
  // Returns how many places after the pixel of a row its tap lies, in planes of `size` places, if neighbouring pixels are
  // `mixed` places apart.
  int64_t shift(const Weight& w, const Conv& c, int64_t tap, int64_t size, int64_t mixed) const {
    const int64_t plane = std::find(planes.begin(), planes.end(), plane_of(w, c, tap)) - planes.begin();
    const int64_t pixels = tap / w.width * c.dilation_y / c.stride_y * stride + tap % w.width * c.dilation_x / c.stride_x;
    return plane * size + pixels * mixed;
  }

 private:
  static Plane plane_of(const Weight& w, const Conv& c, int64_t tap) {
    return {tap / w.width * c.dilation_y % c.stride_y, tap % w.width * c.dilation_x % c.stride_x};
  }
};

// The lines of some samples, or some lines of one sample, with padding between them. Samples follow one another, and `mixed`
// is 1. Or the same pixel of all samples lies together, and `mixed` is their number. Then rows in the padding are neighbours,
// and are left out also where rows are multiplied in large tiles.
struct Block {
  int64_t sample, samples;  // the first sample, and their number
  int64_t first, count;     // output lines of each sample
  int64_t mixed;
  int64_t rows, size;  // lines and places of a plane
  // The place of a pixel, from the first one on.
  int64_t place(const Layout& l, int64_t s, int64_t y, int64_t x) const {
    return ((s / mixed * l.lines + y) * l.stride + x) * mixed + s % mixed;
  }
};

// Calls real(place, number of pixels, sample, address) for each stretch of pixels of a block, and padding(place, number of
// places) for what lies between.
template <class Real, class Padding>
void each_stretch(const Conv& c, const Layout& l, const Block& b, const Real& real, const Padding& padding) {
  int64_t plane = 0;
  for (const auto [first_y, first_x] : l.planes) {
    for (int64_t r = 0, at = plane; r < b.rows; r++, at += l.stride * b.mixed) {
      const int64_t sample = std::min(r / l.lines, b.samples / b.mixed - 1);
      const int64_t y = (b.first + r - sample * l.lines) * c.stride_y + first_y - c.top;
      if (y < 0 || y >= c.height) {
        padding(at, l.stride * b.mixed);
        continue;
      }
      const int64_t begin = std::clamp<int64_t>(ceil_div(c.left - first_x, c.stride_x), 0, l.stride);
      const int64_t end = std::clamp<int64_t>(ceil_div(c.left + c.width - first_x, c.stride_x), begin, l.stride);
      const float* from = c.x + (b.sample + sample) * c.sample + y * c.row;
      padding(at, begin * b.mixed);
      for (int64_t i = 0; begin < end && i < b.mixed; i++, from += c.sample)
        real(at + begin * b.mixed + i, end - begin, b.sample + sample + i,
             from + (begin * c.stride_x + first_x - c.left) * c.pixel);
      padding(at + end * b.mixed, (l.stride - end) * b.mixed);
    }
    padding(plane + b.rows * l.stride * b.mixed, b.size - b.rows * l.stride * b.mixed);
    plane += b.size;
  }
}

// Calls use(first, count, numbers, pixel stride) for the pixels of a stretch: once, or, if there is a norm, for as many as
// stay in the first cache after it.
template <class Use>
void each_part(const Conv& c, int64_t channels, int64_t sample, const float* in, int64_t n, const Use& use) {
  const ptrdiff_t pixel = c.stride_x * c.pixel;
  if (!c.norm) return use(0, n, in, pixel);
  static thread_local Scratch<float> memory;
  const int64_t most = std::max<int64_t>(1, NORMED_TOGETHER / channels);
  float* normed = memory.get(most * channels);
  for (int64_t i = 0; i < n; i += most) {
    const int64_t some = std::min(most, n - i), at = sample * channels;
    isa->scale_channels(in + i * pixel, pixel, some, channels, c.norm->factor + at, c.norm->offset + at, c.norm->silu, normed,
                        channels);
    use(i, some, normed, channels);
  }
}

// Quantizes a block with its padding. Returns true if it contains a NaN.
bool quantize(const Conv& c, const Layout& l, const Block& b, const AllPlanes& all, uint8_t* out) {
  const int64_t pixel = all[0].pixel();
  bool nan = false;
  each_stretch(
      c, l, b,
      [&](int64_t at, int64_t n, int64_t of_sample, const float* in) {
        const Planes& planes = of(all, of_sample);
        each_part(c, planes.channels, of_sample, in, n, [&](int64_t first, int64_t some, const float* x, ptrdiff_t stride) {
          nan |= planes.quantize_rows(x, stride, some, out + (at + first * b.mixed) * pixel, pixel * b.mixed);
        });
      },
      [&](int64_t at, int64_t n) { of(all, b.sample).pad(out + at * pixel, n); });
  return nan;
}

// The same where each pixel has terms of its own. Padding is the bytes 0.
bool quantize(const Conv& c, const Layout& l, const Block& b, const AllPlanes& all, uint8_t* out, RowTerms& terms) {
  const int64_t pixel = all[0].pixel();
  bool wrong = false;
  each_stretch(
      c, l, b,
      [&](int64_t at, int64_t n, int64_t sample, const float* in) {
        const Planes& planes = of(all, sample);
        const bool fixed = planes.range.dynamic == STATIC;
        each_part(c, planes.channels, sample, in, n, [&](int64_t first, int64_t some, const float* x, ptrdiff_t stride) {
          const int64_t from = at + first;
          wrong |= quantize_tokens(planes, x, stride, some, fixed ? &planes.range : nullptr, out + from * pixel, terms, from);
        });
      },
      [&](int64_t at, int64_t n) { std::memset(out + at * pixel, 0, n * pixel); });
  return wrong;
}

constexpr int64_t TILES = 320 << 10;  // bytes of transformed tiles, times `products`, in the second cache of a processor core
constexpr int64_t TRANSFORM = 3;      // transforming a weight takes about as long as multiplying this many tiles

// Winograd's algorithm subtracts this number from bytes, because it needs small numbers.
int middle_of(const Planes& planes) { return static_cast<int>(planes.range.high - planes.range.low + 1) / 2; }

// Returns true if Winograd's algorithm is exact (see core.h) and saves at least a fifth of the time of the products. If these
// are fast, it also needs many channels, over which its transforms are divided.
bool by_winograd(const Weight& w, const Conv& c, const Planes& planes) {
  const int64_t tiles = c.samples * ceil_div(c.out_height, 4) * ceil_div(c.out_width, 4);
  if (!isa->winograd || w.height != 3 || w.width != 3 || planes.count != 1) return false;
  const int64_t products = isa->winograd->products;
  return (products == 1 || std::min(w.channels, w.outputs) >= 64) &&
         middle_of(planes) * w.byte_sum < int64_t{1} << 25 &&
         5 * (tiles + TRANSFORM) * POINTS * products < 4 * c.samples * c.out_height * c.out_width * 9;
}

// Computes what `product` computes, by Winograd's algorithm. starts: the rows at which 4x4 tiles of outputs begin.
void winograd_product(const Weight& w, const Terms& t, const Rows& a, int middle, ptrdiff_t line,
                      const std::vector<int64_t>& starts, int64_t from, int64_t to) {
  static thread_local Scratch<int16_t> transformed;
  static thread_local Scratch<int32_t> points, products, sums;
  static thread_local Scratch<int8_t> memory;
  const int64_t each = POINTS * round_up(a.stride, WINOGRAD_CHANNELS);
  const int64_t fitting = isa->winograd->products * TILES / (POINTS * (2 * a.stride + 4 * NR));
  const int64_t most = std::min<int64_t>(starts.size(), std::clamp<int64_t>(fitting, 18, 48));
  int16_t* v = transformed.get((most + 1) * each);
  int32_t* m = points.get((most + 1) * POINTS * NR);
  int32_t* y = products.get(most * 16 * NR);
  int32_t* sum = sums.get(most * 16);
  int8_t* b = memory.get(9 * a.stride * NR);
  std::vector<int32_t> constant = t.constant;
  for (size_t o = 0; !a.terms && o < constant.size(); o++) constant[o] -= middle * w.sum_of_taps(o);
  RowTerms terms;
  std::vector<ptrdiff_t> offset(most);
  std::vector<float*> out(16 * most);
  std::vector<const float*> residual(16 * most);
  for (size_t first = 0; first < starts.size(); first += most) {
    const int64_t n = std::min<int64_t>(most, starts.size() - first);
    terms.clear();
    for (int64_t i = 0; i < 16 * n; i++) {
      const int64_t row = starts[first + i / 16] + i % 16 / 4 * (line / a.stride) + i % 4;
      // A tile can reach beyond its line. Such rows do not exist, are null in `out`, or are computed by other tiles too.
      const bool there = row < a.count;
      offset[i / 16] = starts[first + i / 16] * a.stride;
      out[i] = there ? a.out[row] : nullptr;
      residual[i] = there && a.residual ? a.residual[row] : nullptr;
      sum[i] = there ? a.sums[row] - middle * static_cast<int32_t>(9 * w.channels) : 0;
      if (a.terms) {
        terms.scale.push_back(there ? a.terms->scale[row] : 0);
        terms.zero.push_back(there ? a.terms->zero[row] - middle : 0);
      }
    }
    isa->winograd->input(a.codes, line, a.stride, a.stride, middle, offset.data(), n, v);
    for (int64_t p = from; p < to; p++) {
      isa->winograd->multiply(v, a.stride, n, panel_of(w, p, a, b), m, y);
      const int64_t at = p * NR;
      isa->finish(y, NR, static_cast<int>(16 * n), sum, t.zero + at, constant.data() + at, t.scale.data() + at,
                  t.bias.data() + at, static_cast<int>(std::min<int64_t>(NR, w.outputs - at)), out.data(),
                  a.residual ? residual.data() : nullptr, at, a.terms ? terms.scale.data() : nullptr, terms.zero.data());
    }
  }
}

// Returns whether a block of several samples should be `mixed`: whether that saves a fifth of the tiles. Then each tap is a
// segment of its own, whose length the depth of a tile rounds up. Instruction sets without tiles leave out rows anyway.
bool worth_mixing(const Weight& w, const Conv& c, const Layout& l, bool near, int64_t pixel) {
  const int64_t taps = w.taps() * round_up(pixel, isa->depth);
  const int64_t lines = near ? w.height * round_up(w.width * pixel, isa->depth) : taps;
  return isa->begin && 5 * taps * c.out_height * c.out_width < 4 * lines * l.lines * l.stride;
}

// apart: each pixel has a scale of its own, so each tap has sums of its own. dynamic: each sample has a scale.
bool convolve(const Weight& w, const Conv& c, const Terms& t, const AllPlanes& all_planes, bool apart, bool dynamic,
              int threads) {
  const Planes& planes = all_planes[0];
  const int64_t pixel = planes.pixel();
  const Layout l(w, c);
  const bool near = c.stride_y == 1 && c.stride_x == 1 && c.dilation_y == 1 && c.dilation_x == 1;
  const int64_t line = l.planes.size() * l.stride * pixel;
  int64_t samples = BLOCK / (l.lines * line);  // samples per block
  // Samples of one block share the padding between them, so it must be the same byte for both.
  for (const Planes& one : all_planes)
    if (!apart && one.low != planes.low) samples = std::min<int64_t>(samples, 1);
  const bool winograd = near && !apart && by_winograd(w, c, planes);
  const int64_t unit = winograd ? 4 : 1, units = ceil_div(c.out_height, unit);  // lines that are computed together
  const int64_t strips = samples ? 1 : blocks_of(units, (BLOCK / line - l.lower) / unit, threads);
  const int64_t groups = samples ? blocks_of(c.samples, samples, threads) : c.samples;
  const bool mixed = samples > 1 && !apart && !dynamic && !winograd && worth_mixing(w, c, l, near, pixel);
  const int64_t together = near && !apart && !mixed ? w.width : 1;  // taps of a segment
  const int64_t bytes = round_up(together * pixel, apart && w.taps() > 1 ? planes.padded : isa->depth);
  std::atomic<bool> nan{false};
  share(w.panels(), groups * strips, threads, c.macs(w), [&](int64_t block, int64_t from, int64_t to) {
    static thread_local Scratch<uint8_t> codes;
    static thread_local Scratch<int32_t> pixel_sums, sums;
    static thread_local std::vector<float*> out;
    static thread_local std::vector<const float*> residual;
    static thread_local std::vector<ptrdiff_t> shift, offset;
    static thread_local RowTerms terms;
    Block b;
    const int64_t group = block / strips, strip = block % strips;
    b.sample = group * c.samples / groups, b.samples = (group + 1) * c.samples / groups - b.sample;
    b.first = strip * units / strips * unit;
    b.count = std::min(c.out_height, (strip + 1) * units / strips * unit) - b.first;
    b.mixed = mixed ? b.samples : 1;
    b.rows = (b.samples / b.mixed - 1) * l.lines + b.count + l.lower;
    b.size = (b.rows * l.stride + l.beside) * b.mixed;
    const int64_t positions = b.place(l, b.samples - 1, b.count - 1, c.out_width - 1) + 1;
    const int64_t pixels = l.planes.size() * b.size;
    uint8_t* q = rows_of(codes, pixels + 4 * l.stride, pixel);  // whole tiles are read
    shift.clear(), offset.clear();
    for (int64_t tap = 0; tap < w.taps(); tap++) {
      shift.push_back(l.shift(w, c, tap, b.size, b.mixed));
      if (tap % together == 0) offset.push_back(shift.back() * pixel);
    }
    out.assign(positions, nullptr);
    for (int64_t s = 0; s < b.samples; s++)
      for (int64_t y = 0; y < b.count; y++) {
        float* to_line = c.out + (((b.sample + s) * c.out_height + b.first + y) * c.out_width) * w.outputs;
        for (int64_t x = 0; x < c.out_width; x++) out[b.place(l, s, y, x)] = to_line + x * w.outputs;
      }
    const float* const* added = counterparts(c.residual, c.out, out, residual);
    Rows rows{q,           positions, pixel,      static_cast<int64_t>(offset.size()), offset.data(), bytes, planes.count,
              nullptr, out.data(), added};
    if (apart) {
      const int64_t sums_of_pixel = w.groups();
      const bool of_groups = planes.range.dynamic >= OF_GROUPS;
      terms.clear((of_groups ? sums_of_pixel : 1) * pixels, of_groups ? pixels : 0);
      if (quantize(c, l, b, all_planes, q, terms)) nan = true;
      int32_t* each = pixel_sums.get(sums_of_pixel * pixels);
      for (int64_t g = 0; g < sums_of_pixel; g++)
        isa->sums(q + g * w.group, pixel, pixels, std::min(w.group, pixel - g * w.group), each + g * pixels);
      if (!t.pairs.empty()) terms.pair_with(each, sums_of_pixel * pixels);
      rows.sums = each, rows.terms = &terms, rows.shift = shift.data(), rows.apart = pixels;
      product(w, t, rows, from, to);
      return;
    }
    if (quantize(c, l, b, all_planes, q)) nan = true;
    int32_t* each = pixel_sums.get(pixels);
    int32_t* total = sums.get(positions);
    isa->sums(q, pixel, pixels, pixel, each);
    std::memset(total, 0, positions * sizeof(int32_t));
    for (const ptrdiff_t from_here : shift)
      for (int64_t p = 0; p < positions; p++) total[p] += each[from_here + p];
    terms.clear();
    for (int64_t s = 0; dynamic && s < b.samples; s++) terms.add(of(all_planes, b.sample + s).range, l.lines * l.stride);
    rows.sums = total;
    if (dynamic) rows.terms = &terms;
    if (!winograd) {
      product(w, t, rows, from, to);
      return;
    }
    std::vector<int64_t> starts;
    for (int64_t s = 0; s < b.samples; s++)
      for (int64_t y = 0; y < b.count; y += 4)
        for (int64_t x = 0; x < c.out_width; x += 4) starts.push_back((s * l.lines + y) * l.stride + x);
    winograd_product(w, t, rows, middle_of(planes), l.stride * pixel, starts, from, to);
  });
  return nan;
}

}  // namespace

Status conv2d(const Layer& l, const Conv& c, int threads) {
  const Clock clock(LAYERS);
  if (!c.samples || !c.out_height || !c.out_width) return OK;
  const Weight& w = *l.weight;
  if (!fits(w, l.range)) return OUT_OF_RANGE;
  const bool apart = l.range.dynamic == OF_TOKENS || l.range.dynamic >= OF_GROUPS || w.groups() > 1;
  const bool padding = !apart && (c.top || c.left);
  const int64_t unit = apart ? 16 : 4;
  AllPlanes planes;
  if (l.range.dynamic == OF_SAMPLES) {
    for (Range r : of_samples(c, w.channels, l.range, threads)) planes.emplace_back(r, w.channels, padding, unit);
  } else {
    planes.emplace_back(l.range, w.channels, padding, unit);
  }
  if (planes.empty()) return HAS_NAN;
  const Terms t(w, l.bias, planes[0], apart || l.range.dynamic, apart);
  return convolve(w, c, t, planes, apart, l.range.dynamic, threads) ? HAS_NAN : OK;
}

}  // namespace quest
