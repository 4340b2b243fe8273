// Convolutions on bytes (see bytes.h).
#include "bytes.h"

#include <cstring>

namespace quest {
namespace {

// The lines of some samples, or some lines of one sample, with padding between them.
struct Block {
  int64_t stride;               // pixels from one line to the next
  int64_t lines;                // lines from one sample to the next
  int64_t sample, samples;      // the first sample, and their number
  int64_t first, count;         // output lines of each sample
};

// Writes pixels with the code of zero. Channels after the last one get 0.
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

// Convolutions with stride 1 and dilation 1, see bytes.h. The padding after the last line of a block is the beginning of one
// more line.
bool conv_stretches(const Weight& w, const Conv& c, const Terms& t, Range range, int threads) {
  const int64_t padded = round_up(w.channels, 4);
  const int64_t columns = c.out_width + w.width - 1, needed = c.out_height + w.height - 1;
  Block all;
  // If padding is wider than the kernel, some outputs see only padding. They need places of their own too.
  all.stride = std::max({c.width + c.left, columns - c.left, c.out_width});
  all.lines = std::max({c.height + c.top, needed - c.top, c.out_height});
  const int64_t line = all.stride * padded;
  const int64_t samples = BLOCK / (all.lines * line);  // samples per block
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

// Other strides: the taps of each output pixel are copied to one row.
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

bool bytes_fit(const Conv& c, Range range) {
  const bool padded = c.top || c.left;  // padding needs a code for zero
  return bytes_fit(range) && (!padded || (range.low <= 0 && range.high >= 0));
}

bool bytes_conv(const Weight& w, const Conv& c, const float* bias, Range range, int threads) {
  const Terms t(w, bias, range);
  const bool stretches = c.stride_y == 1 && c.stride_x == 1 && c.dilation_y == 1 && c.dilation_x == 1;
  return stretches ? conv_stretches(w, c, t, range, threads) : conv_gathered(w, c, t, range, threads);
}

}  // namespace quest
