// Linear layers, convolutions and attention as products of unsigned by signed bytes (see Bytes in core.h).
//
// A row of the product is a stretch of codes in memory and the next row lies a fixed distance further. For a convolution
// of stride 1 that is so for all pixels of a block at once, if the padding lies between its lines: a kernel's line of taps
// is then one segment. What begins in the padding is computed with the rest and not stored.
#include "driver.h"

#include <cstring>

namespace quest {
namespace {

constexpr int64_t BLOCK = 512 << 10;   // bytes of codes that stay in a core's second cache
constexpr int64_t PANELS = 256 << 10;  // bytes of unpacked panels beside them
constexpr int64_t MAX_CALLS = 16;
constexpr int MAX_PANELS = 4, MAX_ROWS = 32;  // of one call of multiply
constexpr int64_t SLACK = 64;         // bytes that may be read after the last row of a tile

int32_t zero_of(Range r) { return -static_cast<int32_t>(r.low); }  // of codes less the lowest

// Rows of codes, with room for a whole tile after the last.
uint8_t* rows_of(Scratch<uint8_t>& memory, int64_t rows, int64_t stride) {
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

// A panel as bytes, [segments][bytes / 4][NR][4]; zeros fill up a segment. `sums` are those of each output.
void unpack(const Weight& w, int64_t panel, int64_t segments, int64_t bytes, int8_t* out, int32_t* sums) {
  const auto unpack = w.bits == 4 ? isa->bytes->unpack4 : isa->bytes->unpack8;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(w.base() + w.codes) + panel * w.panel_codes();
  // Where quadruples of channels are full, all taps of a segment are one stretch.
  const int64_t taps = w.taps() / segments, together = w.pairs() % 2 ? 1 : taps, pairs = w.pairs() * together;
  for (int64_t s = 0; s < segments; s++, out += bytes * NR) {
    int64_t at = 0;
    for (int64_t t = 0; t < taps; t += together, codes += pairs * NR * 2 * w.bits / 8, at += (pairs + 1) / 2 * 4 * NR)
      unpack(codes, pairs, out + at, sums);
    std::memset(out + at, 0, bytes * NR - at);
  }
}

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
                                 std::vector<const float*>& rows) {
  if (!residual) return nullptr;
  rows.resize(out.size());
  for (size_t r = 0; r < out.size(); r++) rows[r] = out[r] ? residual + (out[r] - base) : nullptr;
  return rows.data();
}

// Some neighbouring panels as bytes, and what is taken off their products.
struct Panels {
  int64_t first;
  int count;
  int8_t* codes;
  int64_t size;  // of one
  int32_t constant[MAX_PANELS * NR];

  Panels(const Weight& w, const Terms& t, const Rows& a, int64_t first, int count, int8_t* memory)
      : first(first), count(count), codes(memory), size(a.segments * a.bytes * NR), constant{} {
    const uint32_t terms = static_cast<uint32_t>(w.channels * w.taps());
    for (int i = 0; i < count; i++) unpack(w, first + i, a.segments, a.bytes, codes + i * size, constant + i * NR);
    for (int i = 0; i < count * NR; i++)  // zero_a times the sum of codes less zero point, modulo 2^32
      constant[i] = static_cast<int32_t>(t.zero_a * (constant[i] - terms * static_cast<uint32_t>(t.zero[first * NR + i])));
  }

  // Outputs of rows r..r + rows, `products` between; they go to out[..] + from.
  void multiply(const Weight& w, const Terms& t, const Rows& a, int64_t r, int rows, int32_t* products, float* const* out,
                const float* const* residual, ptrdiff_t from) const {
    const int columns = static_cast<int>(std::min(count * int64_t{NR}, w.outputs - first * NR));
    const int64_t width = count * NR, at = first * NR;
    isa->bytes->multiply(a.codes + r * a.stride, a.stride, rows, static_cast<int>(a.segments), a.offset, a.bytes, codes,
                         size, count, products, width);
    isa->bytes->finish(products, width, rows, a.sums + r, t.zero.data() + at, constant, t.scale.data() + at,
                       t.bias.data() + at, columns, out, residual, from);
  }
};

// Multiplies rows with panels first..last of a weight; `gated`: with those of the first half of the outputs, and of the
// second, whose gelu they are multiplied with. True where a gated output that became a code is a NaN.
bool product(const Weight& w, const Terms& t, const Rows& a, int64_t first, int64_t last, bool gated = false) {
  static thread_local Scratch<int8_t> codes;
  static thread_local Scratch<int32_t> products;
  static thread_local Scratch<float> halves;
  const Bytes& on = *isa->bytes;
  const int64_t size = on.panels * a.segments * a.bytes * NR, width = on.panels * NR, half = w.panels() / 2;
  // So many panels are unpacked together as a second cache holds: rows then lie in the first one, and what is written of
  // each is a longer stretch.
  const int64_t calls = std::max<int64_t>(1, std::min<int64_t>(PANELS / (gated ? 2 * size : size), MAX_CALLS));
  int8_t* b = codes.get((gated ? 2 : 1) * calls * size);
  int32_t* m = products.get(on.rows * width);
  float* h = gated ? halves.get(2 * on.rows * width) : nullptr;
  float *hidden[MAX_ROWS], *gate[MAX_ROWS];
  for (int r = 0; r < on.rows; r++) hidden[r] = h + r * width, gate[r] = h + (on.rows + r) * width;
  std::vector<Panels> panels, others;
  bool nan = false;
  on.begin();
  for (int64_t begin = first; begin < last; begin += calls * on.panels) {
    panels.clear(), others.clear();
    for (int64_t i = 0, p = begin; i < calls && p < last; i++, p += on.panels) {
      const int count = static_cast<int>(std::min<int64_t>(on.panels, last - p));
      panels.emplace_back(w, t, a, p, count, b + i * size);
      if (gated) others.emplace_back(w, t, a, half + p, count, b + (calls + i) * size);
    }
    for (int64_t r = 0; r < a.count; r += on.rows) {
      const int rows = static_cast<int>(std::min<int64_t>(on.rows, a.count - r));
      for (size_t i = 0; i < panels.size(); i++) {
        const ptrdiff_t column = panels[i].first * NR;
        if (!gated) {
          panels[i].multiply(w, t, a, r, rows, m, a.out + r, a.residual ? a.residual + r : nullptr, column);
          continue;
        }
        panels[i].multiply(w, t, a, r, rows, m, hidden, nullptr, 0);
        others[i].multiply(w, t, a, r, rows, m, gate, nullptr, 0);
        const int64_t columns = panels[i].count * NR;
        for (int j = 0; j < rows; j++) {
          isa->geglu(hidden[j], gate[j], columns, a.next ? hidden[j] : a.out[r + j] + column);
          if (a.next) nan |= on.quantize(hidden[j], columns, columns, a.range, a.next + (r + j) * half * NR + column);
        }
      }
    }
  }
  on.end();
  return nan;
}

// A number of blocks of at most `most` units, the same for every thread where there are several.
int64_t blocks_of(int64_t units, int64_t most, int64_t threads) {
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

// Codes of the lines of a block of samples, or of a part of the lines of one, with the padding between them.
struct Block {
  int64_t stride;               // pixels from one line to the next
  int64_t lines;                // from one sample to the next
  int64_t sample, samples;      // whole samples, or one
  int64_t first, count;         // output lines of each
};

// Pixels of the code of zero, zeros in what fills up their channels.
void pad(uint8_t* to, int64_t pixels, int64_t channels, int64_t padded, Range range) {
  std::memset(to, zero_of(range), pixels * padded);
  for (int64_t i = 0; channels < padded && i < pixels; i++) std::memset(to + i * padded + channels, 0, padded - channels);
}

bool quantize(const Conv& c, const Block& b, int64_t channels, int64_t padded, int64_t rows, Range range, uint8_t* out) {
  const bool together = c.pixel == channels && channels == padded;
  bool nan = false;
  for (int64_t r = 0; r < rows; r++, out += b.stride * padded) {
    const int64_t sample = std::min(r / b.lines, b.samples - 1), y = b.first + r - sample * b.lines - c.top;
    if (y < 0 || y >= c.height) {
      pad(out, b.stride, channels, padded, range);
      continue;
    }
    const int64_t end = std::min(b.stride, c.left + c.width);
    pad(out, c.left, channels, padded, range);
    pad(out + end * padded, b.stride - end, channels, padded, range);
    const float* in = c.x + (b.sample + sample) * c.sample + y * c.row;
    uint8_t* to = out + c.left * padded;
    if (together)
      nan |= isa->bytes->quantize(in, (end - c.left) * channels, (end - c.left) * channels, range, to);
    else
      for (int64_t x = c.left; x < end; x++, in += c.pixel, to += padded)
        nan |= isa->bytes->quantize(in, channels, padded, range, to);
  }
  return nan;
}

// The padding of a block ends with the first pixels of a line that there is not.
bool conv_stretches(const Weight& w, const Conv& c, const Terms& t, Range range, int threads) {
  const int64_t padded = round_up(w.channels, 4);
  const int64_t columns = c.out_width + w.width - 1, needed = c.out_height + w.height - 1;
  Block all;
  all.stride = std::max(c.width + c.left, columns - c.left);
  all.lines = std::max(c.height + c.top, needed - c.top);
  const int64_t line = all.stride * padded;
  const int64_t samples = BLOCK / (all.lines * line);  // of a block
  const int64_t strips = samples ? 1 : blocks_of(c.out_height, BLOCK / line - (w.height - 1), threads);
  const int64_t groups = samples ? blocks_of(c.samples, samples, threads) : c.samples;
  std::vector<ptrdiff_t> offset;
  for (int64_t y = 0; y < w.height; y++) offset.push_back(y * line);
  const int64_t bytes = round_up(w.width * padded, isa->bytes->depth);
  std::atomic<bool> nan{false};
  share(w.panels(), groups * strips, threads, c.macs(w), [&](int64_t block, int64_t from, int64_t to) {
    static thread_local Scratch<uint8_t> codes;
    static thread_local Scratch<int32_t> pixel_sums, sums;
    static thread_local std::vector<float*> out;
    static thread_local std::vector<const float*> residual;
    Block b = all;
    const int64_t group = block / strips, strip = block % strips;
    b.sample = group * c.samples / groups, b.samples = (group + 1) * c.samples / groups - b.sample;
    b.first = strip * c.out_height / strips, b.count = (strip + 1) * c.out_height / strips - b.first;
    const int64_t rows = (b.samples - 1) * b.lines + b.count + w.height - 1;
    const int64_t positions = ((b.samples - 1) * b.lines + b.count - 1) * b.stride + c.out_width;
    const int64_t pixels = rows * b.stride + w.width;
    uint8_t* q = rows_of(codes, pixels, padded);
    if (quantize(c, b, w.channels, padded, rows, range, q)) nan = true;
    pad(q + rows * line, w.width, w.channels, padded, range);
    int32_t* each = pixel_sums.get(pixels);
    int32_t* total = sums.get(positions);
    isa->bytes->sums(q, padded, pixels, padded, each);
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
    product(w, t, {q, positions, padded, w.height, offset.data(), bytes, total, out.data(), added}, from, to);
  });
  return nan;
}

// For other strides: the taps of each output pixel are copied into a row of their own.
bool conv_gathered(const Weight& w, const Conv& c, const Terms& t, Range range, int threads) {
  const int64_t padded = round_up(w.channels, 4), row = w.taps() * padded, total = c.out_height * c.samples;
  const int64_t blocks = blocks_of(total, BLOCK / (row * c.out_width), threads);
  const int64_t bytes = round_up(row, isa->bytes->depth);
  std::atomic<bool> nan{false};
  share(w.panels(), blocks, threads, c.macs(w), [&](int64_t block, int64_t from, int64_t to) {
    static thread_local Scratch<uint8_t> lines, codes;
    static thread_local Scratch<int32_t> sums;
    static thread_local std::vector<float*> out;
    static thread_local std::vector<const float*> residual;
    const int64_t first = block * total / blocks, last = (block + 1) * total / blocks;
    const int64_t count = (last - first) * c.out_width, columns = (c.out_width - 1) * c.stride_x + (w.width - 1) * c.dilation_x + 1;
    uint8_t* q = rows_of(codes, count, row);
    Block line{};
    line.stride = std::max(columns, c.left + c.width), line.lines = 1, line.samples = 1;
    uint8_t* pixels = lines.get(line.stride * padded);
    out.clear();
    for (int64_t i = first; i < last; i++) {
      line.sample = i / c.out_height;
      for (int64_t y = 0; y < w.height; y++) {
        line.first = i % c.out_height * c.stride_y + y * c.dilation_y;
        if (quantize(c, line, w.channels, padded, 1, range, pixels)) nan = true;
        for (int64_t x = 0; x < c.out_width; x++)
          for (int64_t k = 0; k < w.width; k++)
            std::memcpy(q + ((i - first) * c.out_width + x) * row + (y * w.width + k) * padded,
                        pixels + (x * c.stride_x + k * c.dilation_x) * padded, padded);
      }
      for (int64_t x = 0; x < c.out_width; x++) out.push_back(c.out + (i * c.out_width + x) * w.outputs);
    }
    int32_t* total_of = sums.get(count);
    isa->bytes->sums(q, row, count, row, total_of);
    const ptrdiff_t none = 0;
    const float* const* added = counterparts(c.residual, c.out, out, residual);
    product(w, t, {q, count, row, 1, &none, bytes, total_of, out.data(), added}, from, to);
  });
  return nan;
}

}  // namespace

bool bytes_fit(Range range) { return range.high - range.low <= 255.f; }

bool bytes_fit(const Conv& c, Range range) {
  const bool padded = c.top || c.left;  // with a code for zero
  return bytes_fit(range) && (!padded || (range.low <= 0 && range.high >= 0));
}

bool bytes_conv(const Weight& w, const Conv& c, const float* bias, Range range, int threads) {
  const Terms t(w, bias, range);
  const bool stretches = c.stride_y == 1 && c.stride_x == 1 && c.dilation_y == 1 && c.dilation_x == 1;
  return stretches ? conv_stretches(w, c, t, range, threads) : conv_gathered(w, c, t, range, threads);
}

namespace {

// A linear layer on codes that source(first row, how many, NaN?) gives. next: as in Rows, of all rows.
template <class Source>
bool linear(const Weight& w, const float* bias, Range range, int64_t rows, bool gated, const float* residual, float* out,
            uint8_t* next, Range next_range, int threads, const Source& source) {
  const Terms t(w, bias, range);
  const int64_t padded = round_up(w.channels, 4), tiles = ceil_div(rows, 16), work = rows * w.channels * w.outputs;
  const int64_t width = gated ? w.outputs / 2 : w.outputs;
  // Each block unpacks the whole weight, which few rows would not repay.
  const int64_t blocks = blocks_of(tiles, std::max<int64_t>(16, BLOCK / padded / 16), useful(threads, work));
  std::atomic<bool> nan{false};
  share(gated ? w.panels() / 2 : w.panels(), blocks, threads, work, [&](int64_t i, int64_t from, int64_t to) {
    static thread_local Scratch<int32_t> sums;
    static thread_local std::vector<float*> target;
    static thread_local std::vector<const float*> beside;
    const int64_t first = i * tiles / blocks * 16, count = std::min(rows, (i + 1) * tiles / blocks * 16) - first;
    bool wrong = false;
    const uint8_t* q = source(first, count, wrong);
    int32_t* total = sums.get(count);
    isa->bytes->sums(q, padded, count, padded, total);
    const ptrdiff_t none = 0;
    Rows all{q, count, padded, 1, &none, round_up(padded, isa->bytes->depth), total, nullptr, nullptr};
    if (next) {
      all.next = next + first * width, all.range = next_range;
    } else {
      target.resize(count);
      for (int64_t r = 0; r < count; r++) target[r] = out + (first + r) * width;
      all.out = target.data(), all.residual = counterparts(residual, out, target, beside);
    }
    if (product(w, t, all, from, to, gated) || wrong) nan = true;
  });
  return nan;
}

// The codes of rows of floats, `stride` apart.
auto quantizing(const Weight& w, const float* x, int64_t stride, Range range) {
  return [channels = w.channels, x, stride, range](int64_t first, int64_t count, bool& nan) -> const uint8_t* {
    static thread_local Scratch<uint8_t> codes;
    const int64_t padded = round_up(channels, 4);
    uint8_t* q = rows_of(codes, count, padded);
    if (padded == channels && stride == channels) {
      nan = isa->bytes->quantize(x + first * stride, count * padded, count * padded, range, q);
    } else {
      for (int64_t r = 0; r < count; r++)
        nan |= isa->bytes->quantize(x + (first + r) * stride, channels, padded, range, q + r * padded);
    }
    return q;
  };
}

}  // namespace

bool bytes_linear(const Weight& w, const float* x, int64_t rows, int64_t stride, const float* bias, Range range,
                  bool gated, const float* residual, float* out, int threads) {
  return linear(w, bias, range, rows, gated, residual, out, nullptr, {}, threads, quantizing(w, x, stride, range));
}

bool bytes_fit(const Layer& gated, const Layer& linear) {
  return isa->bytes && bytes_fit(gated.range) && bytes_fit(linear.range) && gated.weight->outputs % (2 * NR) == 0 &&
         linear.weight->channels % 4 == 0;
}

bool bytes_feed_forward(const Layer& gated, const Layer& last, const float* x, int64_t rows, const float* residual,
                        float* out, int threads) {
  static thread_local Scratch<uint8_t> memory;
  const int64_t width = last.weight->channels;
  uint8_t* codes = rows_of(memory, rows, width);
  const bool nan = linear(*gated.weight, gated.bias, gated.range, rows, true, nullptr, nullptr, codes, last.range, threads,
                          quantizing(*gated.weight, x, gated.weight->channels, gated.range));
  const auto there = [&](int64_t first, int64_t, bool&) -> const uint8_t* { return codes + first * width; };
  return linear(*last.weight, last.bias, last.range, rows, false, residual, out, nullptr, {}, threads, there) || nan;
}

bool bytes_attention(const Attention& a, int threads) {
  const Bytes& on = *isa->bytes;
  const int64_t n = a.n, m = a.m, d = a.d, heads = a.heads;
  const int64_t depth = round_up(d, on.depth), length = round_up(m, on.depth);  // bytes of a row of each product
  const int64_t key_panels = ceil_div(m, NR), value_panels = ceil_div(d, NR), width = round_up(key_panels, on.panels) * NR;
  const int64_t value_width = round_up(value_panels, on.panels) * NR;
  const std::vector<float> scale(value_width, a.range[3].scale * a.range[2].scale), none(value_width, 0.f);
  const std::vector<int32_t> zero_v(value_width, zero_of(a.range[2]) - 128);
  const int32_t zero_q = zero_of(a.range[0]), zero_k = zero_of(a.range[1]) - 128, zero_p = zero_of(a.range[3]);
  const float factor = a.range[0].scale * a.range[1].scale * a.scale;
  const int64_t parts = std::min(heads, ceil_div(threads, a.batch));
  std::atomic<bool> nan{false};
  parallel(a.batch * parts, threads, a.macs(), [&](int64_t task) {
    static thread_local Scratch<uint8_t> codes[3], probabilities;
    static thread_local Scratch<int8_t> keys, values;
    static thread_local Scratch<int32_t> scores, key_terms, value_terms, p_sums, products;
    const int64_t b = task / parts, first = task % parts * heads / parts, last = (task % parts + 1) * heads / parts;
    const int64_t columns = (last - first) * d, lengths[3] = {n, m, m};
    uint8_t* c[3];
    for (int i = 0; i < 3; i++) c[i] = rows_of(codes[i], lengths[i], columns);
    if (a.quantize(on.quantize, b, first, last, c)) nan = true;
    int8_t* kp = keys.get(key_panels * depth * NR);
    int8_t* vp = values.get(value_panels * length * NR);
    uint8_t* p = rows_of(probabilities, on.rows, length);
    int32_t* s = scores.get(on.rows * width);
    int32_t* of_keys = key_terms.get(width);
    int32_t* of_values = value_terms.get(value_width);
    int32_t* of_p = p_sums.get(on.rows);
    int32_t* sums = products.get(on.rows * on.panels * NR);
    const ptrdiff_t start = 0;
    on.begin();
    for (int64_t h = first; h < last; h++) {
      const uint8_t *qh = c[0] + (h - first) * d, *kh = c[1] + (h - first) * d, *vh = c[2] + (h - first) * d;
      on.pack_keys(kh, columns, m, d, depth, kp, of_keys);
      for (int64_t j = 0; j < m; j++) of_keys[j] = zero_q * (of_keys[j] - static_cast<int32_t>(d) * zero_k);
      on.pack_values(vh, columns, m, d, length, vp, of_values);
      for (int64_t e = 0; e < d; e++) of_values[e] = zero_p * (of_values[e] - static_cast<int32_t>(m) * zero_v[0]);
      float* o = a.out + b * a.strides[9] + h * a.strides[10];
      for (int64_t i = 0; i < n; i += on.rows) {
        const int rows = static_cast<int>(std::min<int64_t>(on.rows, n - i));
        for (int64_t j = 0; j < key_panels; j += on.panels)
          on.multiply(qh + i * columns, columns, rows, 1, &start, depth, kp + j * depth * NR, depth * NR,
                      static_cast<int>(std::min<int64_t>(on.panels, key_panels - j)), s + j * NR, width);
        on.softmax(rows, s, width, m, length, factor, a.range[3], of_keys, p, of_p);
        float* to[MAX_ROWS];
        for (int r = 0; r < rows; r++) to[r] = o + (i + r) * a.strides[11];
        for (int64_t j = 0; j < value_panels; j += on.panels) {
          const int count = static_cast<int>(std::min<int64_t>(on.panels, value_panels - j));
          on.multiply(p, length, rows, 1, &start, length, vp + j * length * NR, length * NR, count, sums, on.panels * NR);
          on.finish(sums, on.panels * NR, rows, of_p, zero_v.data(), of_values + j * NR, scale.data(), none.data(),
                    static_cast<int>(std::min<int64_t>(count * NR, d - j * NR)), to, nullptr, j * NR);
        }
      }
    }
    on.end();
  });
  return nan;
}

}  // namespace quest
