// Convolutions on pairs of int16: directly, or for 3x3 kernels by Winograd's algorithm (see pairs.h).
#include "pairs.h"

#include <cstring>

namespace quest {
namespace {

constexpr int64_t TRANSFORM_TILES = 3;    // transforming a weight takes about as long as multiplying this many tiles
constexpr int64_t TRANSFORM_GAIN = 49;    // largest result of the kernel transform for inputs of 1
constexpr int64_t INPUT_GAIN = 100;       // largest result of the input transform for inputs of 1
constexpr int64_t EXACT = int64_t{1} << 25;

// Quantizes input rows first..first + count, with padding on the left and right, to [count, columns, channels].
bool quantize_rows(const Conv& c, int64_t channels, int64_t padded, int64_t sample, int64_t first, int64_t count,
                   int64_t columns, Range range, int16_t* out) {
  bool nan = false;
  int64_t begin = std::min(columns, c.left), end = std::max(begin, std::min(columns, c.width + c.left));
  for (int64_t y = first; y < first + count; y++, out += columns * padded) {
    if (y < 0 || y >= c.height) {
      std::memset(out, 0, columns * padded * sizeof(int16_t));
      continue;
    }
    std::memset(out, 0, begin * padded * sizeof(int16_t));
    std::memset(out + end * padded, 0, (columns - end) * padded * sizeof(int16_t));
    const float* in = c.x + sample * c.sample + y * c.row + (begin - c.left) * c.pixel;
    if (c.pixel == channels && channels == padded)
      nan |= isa->quantize(in, (end - begin) * channels, (end - begin) * channels, range, out + begin * padded);
    else
      for (int64_t x = begin; x < end; x++, in += c.pixel)
        nan |= isa->quantize(in, channels, padded, range, out + x * padded);
  }
  return nan;
}

bool conv_direct(const Weight& w, const Conv& c, Range range, const Epilogue& e, int threads) {
  int64_t padded = round_up(w.channels, 16);
  int64_t columns = (c.out_width - 1) * c.stride_x + (w.width - 1) * c.dilation_x + 1;
  int64_t reach = (w.height - 1) * c.dilation_y + 1;  // input rows that one output row reads
  int64_t lines = (CACHE / (columns * padded * 2) - reach) / c.stride_y + 1;
  lines = std::max(lines, ceil_div(4 * MAX_MR, c.out_width));
  lines = std::min(lines, c.out_height);
  std::vector<ptrdiff_t> offset;
  for (int64_t y = 0; y < w.height; y++)
    for (int64_t x = 0; x < w.width; x++)
      offset.push_back((y * c.dilation_y * columns + x * c.dilation_x) * padded);
  int64_t strips = ceil_div(c.out_height, lines);
  std::atomic<bool> nan{false};
  parallel(c.samples * strips, threads, c.macs(w), [&](int64_t task) {
    static thread_local Scratch<int16_t> codes;
    static thread_local std::vector<const int16_t*> a;
    static thread_local std::vector<float*> out;
    int64_t sample = task / strips, first = task % strips * lines, count = std::min(lines, c.out_height - first);
    int64_t needed = (count - 1) * c.stride_y + reach;
    int16_t* q = codes.get(needed * columns * padded);
    if (quantize_rows(c, w.channels, padded, sample, first * c.stride_y - c.top, needed, columns, range, q)) nan = true;
    a.clear(), out.clear();
    for (int64_t y = 0; y < count; y++)
      for (int64_t x = 0; x < c.out_width; x++) {
        a.push_back(q + (y * c.stride_y * columns + x * c.stride_x) * padded);
        out.push_back(c.out + ((sample * c.out_height + first + y) * c.out_width + x) * w.outputs);
      }
    product(w, static_cast<int64_t>(a.size()), a.data(), offset.data(), e.scale.data(), e.bias.data(), out.data());
    if (c.residual)
      for (float* to : out) add(c.residual + (to - c.out), w.outputs, to);
  });
  return nan;
}

// Each panel of the weight is transformed and then multiplied with all tiles of a block, before the next panel. So it stays
// in the first caches, and no transformed weight is stored.
bool conv_winograd(const Weight& w, const Conv& c, Range range, const Epilogue& e, int threads) {
  int64_t padded = round_up(w.channels, 16);
  int64_t across = ceil_div(c.out_width, 4), down = ceil_div(c.out_height, 4);  // tiles per image
  int64_t tiles = CACHE / (POINTS * (2 * padded + 4 * NR));
  int64_t units = std::max<int64_t>(1, std::max<int64_t>(tiles, MAX_MR) / across);  // rows of tiles per block
  int64_t columns = 4 * across + 2, total = c.samples * down, blocks = ceil_div(total, units);
  // If there are few tiles, outputs are divided among threads too.
  int64_t parts = std::min(w.panels(), ceil_div(useful(threads, c.macs(w) / 4), blocks));
  std::atomic<bool> nan{false};
  parallel(blocks * parts, threads, c.macs(w) / 4, [&](int64_t task) {
    static thread_local Scratch<int16_t> codes, transformed, taps, points;
    static thread_local Scratch<int32_t> products;
    int64_t first = task / parts * units, count = std::min(units, total - first), n = count * across;
    int64_t panel = task % parts * w.panels() / parts, end = (task % parts + 1) * w.panels() / parts;
    int64_t numbers = w.pairs() * NR * 2;  // numbers of a panel per tap
    // Points are an odd number of cache lines apart. Otherwise they would share few sets of the cache.
    int64_t in_stride = round_up(n * padded, 64) + 32, out_stride = round_up(n * NR, 32) + 16;
    int64_t weight_stride = round_up(numbers, 64) + 32;
    int16_t* q = codes.get(6 * columns * padded);
    int16_t* v = transformed.get(POINTS * in_stride);
    int16_t* g = taps.get(9 * numbers);
    int16_t* u = points.get(12 * weight_stride);
    int32_t* m = products.get(POINTS * out_stride);
    for (int64_t i = 0; i < count; i++) {
      int64_t sample = (first + i) / down, y = (first + i) % down * 4;
      if (quantize_rows(c, w.channels, padded, sample, y - 1, 6, columns, range, q)) nan = true;
      for (int64_t x = 0; x < across; x++)
        isa->winograd_input(q + 4 * x * padded, columns * padded, padded, padded, v + (i * across + x) * padded,
                            in_stride);
    }
    const ptrdiff_t none = 0;
    const int16_t* a[MAX_MR];
    const int64_t begin = panel * NR, stored = std::min(end * NR, w.outputs) - begin;
    for (; panel < end; panel++) {
      w.panel(panel, g);
      for (int third = 0; third < 3; third++) {
        isa->winograd_weight(g, numbers, third, u, weight_stride);
        for (int64_t k = 0; k < 12; k++) {
          int64_t i = 6 * WINOGRAD_ROWS[third][k / 6] + k % 6;
          for (int64_t r = 0; r < n; r += isa->rows) {
            int rows = static_cast<int>(std::min<int64_t>(isa->rows, n - r));
            for (int j = 0; j < rows; j++) a[j] = v + i * in_stride + (r + j) * padded;
            isa->tile_int(rows, a, 1, &none, w.pairs(), u + k * weight_stride, m + i * out_stride + r * NR, NR);
          }
        }
      }
      int64_t outputs = std::min<int64_t>(NR, w.outputs - panel * NR);
      for (int64_t i = 0; i < count; i++) {
        int64_t sample = (first + i) / down, y = (first + i) % down * 4;
        for (int64_t x = 0; x < across; x++)
          isa->winograd_output(
              m + (i * across + x) * NR, out_stride, outputs, e.scale.data() + panel * NR, e.bias.data() + panel * NR,
              c.out + ((sample * c.out_height + y) * c.out_width + 4 * x) * w.outputs + panel * NR,
              c.out_width * w.outputs, w.outputs, static_cast<int>(std::min<int64_t>(4, c.out_height - y)),
              static_cast<int>(std::min<int64_t>(4, c.out_width - 4 * x)));
      }
    }
    for (int64_t i = first; c.residual && i < first + count; i++) {
      int64_t line = i / down * c.out_height + i % down * 4, lines = std::min<int64_t>(4, c.out_height - i % down * 4);
      for (int64_t p = line * c.out_width; p < (line + lines) * c.out_width; p++)
        add(c.residual + p * w.outputs + begin, stored, c.out + p * w.outputs + begin);
    }
  });
  return nan;
}

}  // namespace

Status conv2d(const Weight& w, const Conv& c, const float* bias, Range range, int threads) {
  const Clock clock(LAYERS);
  if (!c.samples || !c.out_height || !c.out_width) return OK;
  if (!fits(w, range)) return OUT_OF_RANGE;
  if (isa->bytes && bytes_fit(c, range)) return bytes_conv(w, c, bias, range, threads) ? HAS_NAN : OK;
  int64_t tiles = c.samples * ceil_div(c.height, 4) * ceil_div(c.width, 4);
  bool winograd = w.height == 3 && w.width == 3 && w.largest * TRANSFORM_GAIN <= 32767 && c.stride_y == 1 &&
                  c.stride_x == 1 && c.top == 1 && c.left == 1 && c.dilation_y == 1 && c.dilation_x == 1 &&
                  largest(range) * INPUT_GAIN <= 32767 && largest(range) * w.row_sum < EXACT &&
                  5 * (tiles + TRANSFORM_TILES) * POINTS < 4 * c.samples * c.height * c.width * 9;
  Epilogue e(w, bias, range.scale);
  bool nan = winograd ? conv_winograd(w, c, range, e, threads) : conv_direct(w, c, range, e, threads);
  return nan ? HAS_NAN : OK;
}

}  // namespace quest
