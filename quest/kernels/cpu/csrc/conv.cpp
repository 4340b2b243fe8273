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

// The lines of some samples, or some lines of one sample, with padding between them.
struct Block {
  int64_t stride;               // pixels from one line to the next
  int64_t lines;                // lines from one sample to the next
  int64_t sample, samples;      // the first sample, and their number
  int64_t first, count;         // output lines of each sample
};

// Quantizes `rows` lines of a block with their padding. Returns true if they contain a NaN.
bool quantize(const Conv& c, const Block& b, const AllPlanes& all, int64_t rows, uint8_t* out) {
  const int64_t pixel = all[0].pixel();
  const bool together = c.pixel == all[0].channels && pixel == c.pixel;
  bool nan = false;
  for (int64_t r = 0; r < rows; r++, out += b.stride * pixel) {
    const int64_t sample = std::min(r / b.lines, b.samples - 1), y = b.first + r - sample * b.lines - c.top;
    const Planes& planes = of(all, b.sample + sample);
    if (y < 0 || y >= c.height) {
      planes.pad(out, b.stride);
      continue;
    }
    const int64_t end = std::min(b.stride, c.left + c.width);
    planes.pad(out, c.left);
    planes.pad(out + end * pixel, b.stride - end);
    const float* in = c.x + (b.sample + sample) * c.sample + y * c.row;
    uint8_t* to = out + c.left * pixel;
    if (together)
      nan |= isa->quantize(in, (end - c.left) * pixel, (end - c.left) * pixel, planes.range, to);
    else
      for (int64_t x = c.left; x < end; x++, in += c.pixel, to += pixel) nan |= planes.quantize(in, to);
  }
  return nan;
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
  for (size_t o = 0; !a.terms && o < constant.size(); o++) constant[o] -= middle * w.sum()[o];
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

// Convolutions with stride 1 and dilation 1, see product.h. The padding after the last line of a block is the beginning of one
// more line.
bool conv_stretches(const Weight& w, const Conv& c, const Terms& t, const AllPlanes& all_planes, bool dynamic, int threads) {
  const Planes& planes = all_planes[0];
  const int64_t pixel = planes.pixel();
  const int64_t columns = c.out_width + w.width - 1, needed = c.out_height + w.height - 1;
  Block all;
  // If padding is wider than the kernel, some outputs see only padding. They need places of their own too.
  all.stride = std::max({c.width + c.left, columns - c.left, c.out_width});
  all.lines = std::max({c.height + c.top, needed - c.top, c.out_height});
  const int64_t line = all.stride * pixel;
  int64_t samples = BLOCK / (all.lines * line);  // samples per block
  // Samples of one block share the padding between them, so it must be the same byte for both.
  for (const Planes& one : all_planes)
    if (one.low != planes.low) samples = std::min<int64_t>(samples, 1);
  const bool winograd = by_winograd(w, c, planes);
  const int64_t unit = winograd ? 4 : 1, units = ceil_div(c.out_height, unit);  // lines that are computed together
  const int64_t strips = samples ? 1 : blocks_of(units, (BLOCK / line - (w.height - 1)) / unit, threads);
  const int64_t groups = samples ? blocks_of(c.samples, samples, threads) : c.samples;
  std::vector<ptrdiff_t> offset;
  for (int64_t y = 0; y < w.height; y++) offset.push_back(y * line);
  const int64_t bytes = round_up(w.width * pixel, isa->depth);
  std::atomic<bool> nan{false};
  share(w.panels(), groups * strips, threads, c.macs(w), [&](int64_t block, int64_t from, int64_t to) {
    static thread_local Scratch<uint8_t> codes;
    static thread_local Scratch<int32_t> pixel_sums, sums;
    static thread_local std::vector<float*> out;
    static thread_local std::vector<const float*> residual;
    static thread_local RowTerms terms;
    Block b = all;
    const int64_t group = block / strips, strip = block % strips;
    b.sample = group * c.samples / groups, b.samples = (group + 1) * c.samples / groups - b.sample;
    b.first = strip * units / strips * unit;
    b.count = std::min(c.out_height, (strip + 1) * units / strips * unit) - b.first;
    const int64_t rows = (b.samples - 1) * b.lines + b.count + w.height - 1;
    const int64_t positions = ((b.samples - 1) * b.lines + b.count - 1) * b.stride + c.out_width;
    const int64_t pixels = rows * b.stride + w.width;
    uint8_t* q = rows_of(codes, pixels + 4 * b.stride, pixel);  // whole tiles are read
    if (quantize(c, b, all_planes, rows, q)) nan = true;
    of(all_planes, b.sample + b.samples - 1).pad(q + rows * line, w.width);
    int32_t* each = pixel_sums.get(pixels);
    int32_t* total = sums.get(positions);
    isa->sums(q, pixel, pixels, pixel, each);
    std::memset(total, 0, positions * sizeof(int32_t));
    for (int64_t y = 0; y < w.height; y++)
      for (int64_t x = 0; x < w.width; x++) {
        const int32_t* from_here = each + y * b.stride + x;
        for (int64_t p = 0; p < positions; p++) total[p] += from_here[p];
      }
    out.assign(positions, nullptr);
    for (int64_t s = 0; s < b.samples; s++)
      for (int64_t y = 0; y < b.count; y++) {
        float* to_line = c.out + (((b.sample + s) * c.out_height + b.first + y) * c.out_width) * w.outputs;
        for (int64_t x = 0; x < c.out_width; x++) out[(s * b.lines + y) * b.stride + x] = to_line + x * w.outputs;
      }
    const float* const* added = counterparts(c.residual, c.out, out, residual);
    terms.clear();
    for (int64_t s = 0; dynamic && s < b.samples; s++) terms.add(of(all_planes, b.sample + s).range, b.lines * b.stride);
    const Rows all_rows{q,     positions,          pixel, w.height,   offset.data(), bytes,
                        planes.count, total, out.data(), added, dynamic ? &terms : nullptr};
    if (!winograd) {
      product(w, t, all_rows, from, to);
      return;
    }
    std::vector<int64_t> starts;
    for (int64_t s = 0; s < b.samples; s++)
      for (int64_t y = 0; y < b.count; y += 4)
        for (int64_t x = 0; x < c.out_width; x += 4) starts.push_back((s * b.lines + y) * b.stride + x);
    winograd_product(w, t, all_rows, middle_of(planes), line, starts, from, to);
  });
  return nan;
}

// Other strides: the taps of each output pixel are copied to one row.
bool conv_gathered(const Weight& w, const Conv& c, const Terms& t, const AllPlanes& planes, bool dynamic, int threads) {
  const int64_t pixel = planes[0].pixel(), row = w.taps() * pixel, total = c.out_height * c.samples;
  const int64_t blocks = blocks_of(total, BLOCK / (row * c.out_width), threads);
  const int64_t bytes = round_up(row, isa->depth);
  std::atomic<bool> nan{false};
  share(w.panels(), blocks, threads, c.macs(w), [&](int64_t block, int64_t from, int64_t to) {
    static thread_local Scratch<uint8_t> lines, codes;
    static thread_local Scratch<int32_t> sums;
    static thread_local std::vector<float*> out;
    static thread_local std::vector<const float*> residual;
    static thread_local RowTerms terms;
    const int64_t first = block * total / blocks, last = (block + 1) * total / blocks;
    const int64_t count = (last - first) * c.out_width, columns = (c.out_width - 1) * c.stride_x + (w.width - 1) * c.dilation_x + 1;
    uint8_t* q = rows_of(codes, count, row);
    Block line{};
    line.stride = std::max(columns, c.left + c.width), line.lines = 1, line.samples = 1;
    uint8_t* pixels = lines.get(line.stride * pixel);
    out.clear(), terms.clear();
    for (int64_t i = first; i < last; i++) {
      line.sample = i / c.out_height;
      for (int64_t y = 0; y < w.height; y++) {
        line.first = i % c.out_height * c.stride_y + y * c.dilation_y;
        if (quantize(c, line, planes, 1, pixels)) nan = true;
        for (int64_t x = 0; x < c.out_width; x++)
          for (int64_t k = 0; k < w.width; k++)
            std::memcpy(q + ((i - first) * c.out_width + x) * row + (y * w.width + k) * pixel,
                        pixels + (x * c.stride_x + k * c.dilation_x) * pixel, pixel);
      }
      for (int64_t x = 0; x < c.out_width; x++) out.push_back(c.out + (i * c.out_width + x) * w.outputs);
      if (dynamic) terms.add(of(planes, line.sample).range, c.out_width);
    }
    int32_t* total_of = sums.get(count);
    isa->sums(q, row, count, row, total_of);
    const ptrdiff_t none = 0;
    const float* const* added = counterparts(c.residual, c.out, out, residual);
    product(w, t, {q, count, row, 1, &none, bytes, planes[0].count, total_of, out.data(), added, dynamic ? &terms : nullptr},
            from, to);
  });
  return nan;
}

}  // namespace

Status conv2d(const Layer& l, const Conv& c, int threads) {
  const Clock clock(LAYERS);
  if (!c.samples || !c.out_height || !c.out_width) return OK;
  const Weight& w = *l.weight;
  if (!fits(w, l.range)) return OUT_OF_RANGE;
  const bool padding = c.top || c.left;
  AllPlanes planes;
  if (l.range.dynamic) {
    for (Range r : of_samples(c, w.channels, l.range, threads)) planes.emplace_back(r, w.channels, padding);
  } else {
    planes.emplace_back(l.range, w.channels, padding);
  }
  if (planes.empty()) return HAS_NAN;
  const Terms t(w, l.bias, planes[0], l.range.dynamic);
  const bool stretches = c.stride_y == 1 && c.stride_x == 1 && c.dilation_y == 1 && c.dilation_x == 1;
  return (stretches ? conv_stretches : conv_gathered)(w, c, t, planes, l.range.dynamic, threads) ? HAS_NAN : OK;
}

}  // namespace quest
