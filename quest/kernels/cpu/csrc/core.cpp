// Linear layers, convolutions and attention on integers; a plain C ABI (see quest/kernels/cpu/integer.py).
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
#include "driver.h"

#include <chrono>
#include <cstring>

namespace quest {
namespace {

#if QUEST_X86
// AVX2's functions with wider register tiles, and products of bytes.
Isa with(const char* name, const Bytes& bytes) {
  Isa one = avx2;
  one.name = name;
  one.rows = 12;
  one.quantize = avx512_quantize;
  one.geglu = avx512_geglu;
  one.group_norm = avx512_group_norm;
  one.fake_quantize = avx512_fake_quantize;
  one.fake_quantize_backward = avx512_fake_quantize_backward;
  one.tile_int = vnni_tile_int;
  one.tile_float = vnni_tile_float;
  one.bytes = &bytes;
  return one;
}
const Isa avx512vnni = with("avx512vnni", vnni_bytes), amx = with("amx", amx_bytes);
#endif

const Isa* best() {
#if QUEST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma"))
    return amx_allowed() ? &amx : &avx512vnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2;
#endif
  return &portable;
}

}  // namespace

const Isa* isa = best();

namespace {

constexpr int64_t MAGIC = 0x31304b5155455354;
constexpr int64_t TRANSFORM_TILES = 3;    // to transform a weight takes about as long as to multiply so many tiles with it
constexpr int64_t TRANSFORM_GAIN = 49;    // of the kernel's transform: largest result for inputs of 1
constexpr int64_t INPUT_GAIN = 100;       // of the input's
constexpr int64_t EXACT = int64_t{1} << 25;
constexpr int64_t CACHE = 320 << 10;      // bytes of a block of work, below what a core's second cache holds

double* seconds = nullptr;

// While it lives, time counts as spent on a kind of work.
class Clock {
 public:
  explicit Clock(Kind kind) : kind_(kind) {
    if (seconds) start_ = std::chrono::steady_clock::now();
  }
  ~Clock() {
    if (seconds) seconds[kind_] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  Kind kind_;
  std::chrono::steady_clock::time_point start_;
};

Weight layout(int64_t outputs, int64_t channels, int64_t height, int64_t width, int64_t bits) {
  Weight w{MAGIC, outputs, channels, height, width, bits, 0, 0, 0, 0, 0, 0};
  int64_t at = round_up(sizeof(Weight), 64);
  auto take = [&](int64_t bytes) {
    int64_t start = at;
    at += round_up(bytes, 64);
    return start;
  };
  w.zero_points = take(w.panels() * NR * sizeof(int16_t));
  w.scales = take(w.panels() * NR * sizeof(float));
  w.codes = take(w.panels() * w.panel_codes());
  w.bytes = at;
  return w;
}

void add(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] += x[i];
}

// Multiplies quantized rows with every panel of a weight.
void product(const Weight& w, int64_t rows, const int16_t* const* a, const ptrdiff_t* offset, const float* scale,
             const float* bias, float* const* out) {
  static thread_local Scratch<int16_t> unpacked;
  int16_t* space = unpacked.get(w.taps() * w.pairs() * NR * 2);
  float* shifted[MAX_MR];
  for (int64_t p = 0; p < w.panels(); p++) {
    const int16_t* panel = w.panel(p, space);
    int columns = static_cast<int>(std::min<int64_t>(NR, w.outputs - p * NR));
    for (int64_t r = 0; r < rows; r += isa->rows) {
      int count = static_cast<int>(std::min<int64_t>(isa->rows, rows - r));
      for (int i = 0; i < count; i++) shifted[i] = out[r + i] + p * NR;
      isa->tile_float(count, a + r, static_cast<int>(w.taps()), offset, w.pairs(), panel, scale + p * NR, bias + p * NR,
                      columns, shifted);
    }
  }
}

// Quantizes input rows first..first + count, with the padding left and right of them, to [count, columns, channels].
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
  int64_t reach = (w.height - 1) * c.dilation_y + 1;  // input rows of one output row
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

// One panel of the weight after another is taken to the transformed domain, and multiplied with all tiles of a block
// before the next: it lies in the first caches and is nowhere kept.
bool conv_winograd(const Weight& w, const Conv& c, Range range, const Epilogue& e, int threads) {
  int64_t padded = round_up(w.channels, 16);
  int64_t across = ceil_div(c.out_width, 4), down = ceil_div(c.out_height, 4);  // tiles of an image
  int64_t tiles = CACHE / (POINTS * (2 * padded + 4 * NR));
  int64_t units = std::max<int64_t>(1, std::max<int64_t>(tiles, MAX_MR) / across);  // rows of tiles in a block
  int64_t columns = 4 * across + 2, total = c.samples * down, blocks = ceil_div(total, units);
  // Where there are few tiles the outputs are shared out, too.
  int64_t parts = std::min(w.panels(), ceil_div(useful(threads, c.macs(w) / 4), blocks));
  std::atomic<bool> nan{false};
  parallel(blocks * parts, threads, c.macs(w) / 4, [&](int64_t task) {
    static thread_local Scratch<int16_t> codes, transformed, taps, points;
    static thread_local Scratch<int32_t> products;
    int64_t first = task / parts * units, count = std::min(units, total - first), n = count * across;
    int64_t panel = task % parts * w.panels() / parts, end = (task % parts + 1) * w.panels() / parts;
    int64_t numbers = w.pairs() * NR * 2;  // of a panel, for each tap
    // An odd number of cache lines apart, or the points would meet in few sets of the cache.
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
}  // namespace quest

using namespace quest;

extern "C" {

// The instruction set in use, or after a call of quest_use the one asked for; null if this machine lacks it.
const char* quest_isa() { return isa->name; }

int quest_use(const char* name) {
  const Isa* top = best();
  const Isa* all[] = {
      &portable,
#if QUEST_X86
      &avx2,
      &avx512vnni,
      &amx,
#endif
  };
  for (const Isa* one : all) {
    if (!std::strcmp(one->name, name)) {
      isa = one;
      return 0;
    }
    if (one == top) break;
  }
  return 1;
}

// From now on add the seconds that each Kind of work takes; null: no more. For one caller at a time.
void quest_time(double* of_kinds) { seconds = of_kinds; }

// Compute on the threads of the OpenMP runtime whose GOMP_parallel this is.
void quest_use_openmp(void* parallel) { use_region(parallel); }

int64_t quest_packed_bytes(int64_t outputs, int64_t channels, int64_t height, int64_t width, int64_t bits) {
  return layout(outputs, channels, height, width, bits).bytes;
}

// codes [outputs, channels, height, width] of `bits` (4 or 8) bits, zero points and scales [outputs].
void quest_pack(const uint8_t* codes, const int32_t* zero_points, const float* scales, int64_t outputs, int64_t channels,
                int64_t height, int64_t width, int64_t bits, void* packed) {
  int64_t taps = height * width;
  Weight& w = *static_cast<Weight*>(packed);
  Weight given = layout(outputs, channels, height, width, bits);
  // What fills up pairs and panels meets the zeros that fill up the quantized input, or gives an output that is not
  // stored; it is the code that counts as a byte of 0 (see Bytes).
  const uint8_t fill = bits == 8 ? 128 : 8;
  std::memset(packed, 0, given.codes);
  w = given;
  std::memset(w.base() + w.codes, bits == 8 ? fill : fill << 4 | fill, given.bytes - given.codes);
  int16_t* z = reinterpret_cast<int16_t*>(w.base() + w.zero_points);
  float* s = reinterpret_cast<float*>(w.base() + w.scales);
  for (int64_t o = 0; o < outputs; o++) {
    int64_t sum = 0;
    z[o] = static_cast<int16_t>(zero_points[o]);
    s[o] = scales[o];
    for (int64_t t = 0; t < taps; t++) {
      const Row row(w, o, t);
      for (int64_t k = 0; k < channels; k++) {
        uint8_t code = codes[(o * channels + k) * taps + t];
        char& at = w.base()[row.byte(k)];
        at = static_cast<char>(at ^ (code ^ fill) << row.shift);
        int64_t value = std::abs(code - zero_points[o]);
        sum += value;
        w.largest = std::max(w.largest, value);
      }
    }
    w.row_sum = std::max(w.row_sum, sum);
  }
}

// The codes that quest_pack was given.
void quest_unpack(const void* packed, uint8_t* codes) {
  const Weight& w = *static_cast<const Weight*>(packed);
  const int64_t channels = w.channels, taps = w.taps();
  const int mask = (1 << w.bits) - 1;
  for (int64_t o = 0; o < w.outputs; o++)
    for (int64_t t = 0; t < taps; t++) {
      const Row row(w, o, t);
      for (int64_t k = 0; k < channels; k++)
        codes[(o * channels + k) * taps + t] =
            static_cast<uint8_t>(static_cast<uint8_t>(w.base()[row.byte(k)]) >> row.shift & mask);
    }
}

// x [rows, channels] with rows `stride` apart -> out [rows, outputs]; gated: out [rows, outputs / 2], the first half of
// the outputs times gelu of the second. residual: of the layout of out, and added to it, or null; null if gated. 0, or
// what went wrong (Result).
int quest_linear(const float* x, int64_t rows, int64_t stride, const void* packed, const float* bias, float scale,
                 float low, float high, int gated, const float* residual, float* out, int threads) {
  const Clock clock(LAYERS);
  const Weight& w = *static_cast<const Weight*>(packed);
  Range range{scale, low, high};
  if (!fits(w, range)) return OUT_OF_RANGE;
  if (isa->bytes && bytes_fit(range) && (!gated || w.outputs % (2 * NR) == 0))
    return bytes_linear(w, x, rows, stride, bias, range, gated, residual, out, threads) ? HAS_NAN : OK;
  Epilogue e(w, bias, scale);
  int64_t padded = round_up(w.channels, 16);
  int64_t row = 2 * padded + (gated ? 4 * w.outputs : 0);  // bytes that stay in the cache
  // Each block unpacks the whole weight, which few rows would not repay: long ones lie in a larger cache instead.
  int64_t block = std::max<int64_t>(8 * MAX_MR, std::min<int64_t>(CACHE / 2 / row, 960) / MAX_MR * MAX_MR);
  std::atomic<bool> nan{false};
  block = std::min(block, round_up(ceil_div(rows, threads), MAX_MR));
  parallel(ceil_div(rows, block), threads, rows * w.channels * w.outputs, [&](int64_t task) {
    static thread_local Scratch<int16_t> codes;
    static thread_local std::vector<const int16_t*> a;
    static thread_local std::vector<float*> to;
    static thread_local Scratch<float> both;
    int64_t first = task * block, count = std::min(block, rows - first);
    int16_t* q = codes.get(count * padded);
    a.resize(count), to.resize(count);
    if (padded == w.channels && stride == w.channels) {
      if (isa->quantize(x + first * stride, count * padded, count * padded, range, q)) nan = true;
    } else {
      for (int64_t r = 0; r < count; r++)
        if (isa->quantize(x + (first + r) * stride, w.channels, padded, range, q + r * padded)) nan = true;
    }
    float* y = gated ? both.get(count * w.outputs) : out + first * w.outputs;
    for (int64_t r = 0; r < count; r++) {
      a[r] = q + r * padded;
      to[r] = y + r * w.outputs;
    }
    const ptrdiff_t none = 0;
    product(w, count, a.data(), &none, e.scale.data(), e.bias.data(), to.data());
    if (residual) add(residual + first * w.outputs, count * w.outputs, y);
    if (gated)
      for (int64_t r = 0, n = w.outputs / 2; r < count; r++)
        isa->geglu(to[r], to[r] + n, n, out + (first + r) * n);
  });
  return nan ? HAS_NAN : OK;
}

// x [samples, height, width, channels] with strides, channels together -> out [samples, out_height, out_width, outputs].
// residual: as in quest_linear.
int quest_conv2d(const float* x, int64_t samples, int64_t height, int64_t width, int64_t sample, int64_t row,
                 int64_t pixel, const void* packed, const float* bias, float scale, float low, float high,
                 int64_t stride_y, int64_t stride_x, int64_t top, int64_t left, int64_t dilation_y, int64_t dilation_x,
                 const float* residual, float* out, int64_t out_height, int64_t out_width, int threads) {
  const Clock clock(LAYERS);
  const Weight& w = *static_cast<const Weight*>(packed);
  Range range{scale, low, high};
  if (!fits(w, range)) return OUT_OF_RANGE;
  Conv c{x,    samples,    height,     width,    sample, row,        pixel,    stride_y, stride_x, top,
         left, dilation_y, dilation_x, residual, out,    out_height, out_width};
  if (isa->bytes && bytes_fit(c, range)) return bytes_conv(w, c, bias, range, threads) ? HAS_NAN : OK;
  int64_t tiles = samples * ceil_div(height, 4) * ceil_div(width, 4);
  bool winograd = w.height == 3 && w.width == 3 && w.largest * TRANSFORM_GAIN <= 32767 && stride_y == 1 &&
                  stride_x == 1 && top == 1 && left == 1 && dilation_y == 1 && dilation_x == 1 &&
                  out_height == height && out_width == width &&
                  largest(range) * INPUT_GAIN <= 32767 && largest(range) * w.row_sum < EXACT &&
                  5 * (tiles + TRANSFORM_TILES) * POINTS < 4 * samples * height * width * 9;
  Epilogue e(w, bias, scale);
  bool nan = winograd ? conv_winograd(w, c, range, e, threads) : conv_direct(w, c, range, e, threads);
  return nan ? HAS_NAN : OK;
}

// q [batch, heads, n, d], k and v [batch, heads, m, d], d together, other strides given (batch, head, row for each of
// q, k, v, out) -> out. ranges: scale, low, high of q, k, v and the probabilities.
int quest_attention(const float* q, const float* k, const float* v, const int64_t* strides, int64_t batch, int64_t heads,
                    int64_t n, int64_t m, int64_t d, const float* ranges, float scale, float* out, int threads) {
  const Clock clock(ATTENTION);
  Range range[4];
  for (int i = 0; i < 4; i++) range[i] = {ranges[3 * i], ranges[3 * i + 1], ranges[3 * i + 2]};
  for (const Range& r : range)
    if (!(std::max(std::fabs(r.low), std::fabs(r.high)) <= 32767.f)) return OUT_OF_RANGE;
  if (largest(range[0]) * largest(range[1]) * d > INT32_MAX || largest(range[3]) * largest(range[2]) * m > INT32_MAX)
    return OUT_OF_RANGE;
  const Attention given{q, k, v, strides, batch, heads, n, m, d, range, scale, out};
  if (isa->bytes && std::all_of(range, range + 4, [](Range r) { return bytes_fit(r); }))
    return bytes_attention(given, threads) ? HAS_NAN : OK;
  int64_t depth = round_up(d, 2), length = round_up(m, 2), tail = round_up(m, 16);
  int64_t key_panels = ceil_div(m, NR), value_panels = ceil_div(d, NR), width = key_panels * NR;
  float product_scale[NR], zero[NR] = {};
  std::fill(product_scale, product_scale + NR, range[3].scale * range[2].scale);
  float factor = range[0].scale * range[1].scale * scale;
  int64_t parts = std::min(heads, ceil_div(threads, batch));
  std::atomic<bool> nan{false};
  parallel(batch * parts, threads, given.macs(), [&](int64_t task) {
    static thread_local Scratch<int16_t> codes[3], keys, values, probabilities;
    static thread_local Scratch<int32_t> scores;
    static thread_local Scratch<float> work;
    int64_t b = task / parts, first = task % parts * heads / parts, last = (task % parts + 1) * heads / parts;
    int64_t columns = (last - first) * d, lengths[3] = {n, m, m};
    int16_t* c[3];  // [n or m, heads, d] codes of q, k, v
    for (int i = 0; i < 3; i++) {
      // Some numbers more than there are: rows are read in pairs.
      c[i] = codes[i].get(lengths[i] * columns + 16);
      std::memset(c[i] + lengths[i] * columns, 0, 16 * sizeof(int16_t));
    }
    if (given.quantize(isa->quantize, b, first, last, c)) nan = true;
    int16_t* kp = keys.get(key_panels * depth * NR);
    int16_t* vp = values.get(value_panels * length * NR);
    int16_t* p = probabilities.get(MAX_MR * tail);
    int32_t* s = scores.get(MAX_MR * width);
    float* f = work.get(MAX_MR * width);
    const ptrdiff_t none = 0;
    for (int64_t h = first; h < last; h++) {
      const int16_t *qh = c[0] + (h - first) * d, *kh = c[1] + (h - first) * d, *vh = c[2] + (h - first) * d;
      std::memset(kp, 0, key_panels * depth * NR * sizeof(int16_t));
      for (int64_t j = 0; j < m; j++) {  // [panel][d / 2][key][2]
        const int16_t* row = kh + j * columns;
        int16_t* to = kp + j / NR * depth * NR + j % NR * 2;
        for (int64_t i = 0; i + 1 < d; i += 2, to += NR * 2) std::memcpy(to, row + i, 4);
        if (d % 2) to[0] = row[d - 1];
      }
      std::memset(vp, 0, value_panels * length * NR * sizeof(int16_t));
      for (int64_t j = 0; j < m; j += 2)  // [panel][m / 2][d][2]
        for (int64_t i = 0; i < d; i += NR) {
          int16_t* __restrict to = vp + i / NR * length * NR + j * NR;
          const int16_t *even = vh + j * columns + i, *odd = even + columns;
          const int64_t there = std::min<int64_t>(NR, d - i);
          if (j + 1 < m)
            for (int64_t e = 0; e < there; e++) to[2 * e] = even[e], to[2 * e + 1] = odd[e];
          else
            for (int64_t e = 0; e < there; e++) to[2 * e] = even[e];
        }
      float* o = out + b * strides[9] + h * strides[10];
      for (int64_t i = 0; i < n; i += isa->rows) {
        int rows = static_cast<int>(std::min<int64_t>(isa->rows, n - i));
        const int16_t* a[MAX_MR];
        float* to[MAX_MR];
        for (int r = 0; r < rows; r++) a[r] = qh + (i + r) * columns;
        for (int64_t j = 0; j < key_panels; j++)
          isa->tile_int(rows, a, 1, &none, depth / 2, kp + j * depth * NR, s + j * NR, width);
        isa->softmax(rows, s, width, m, tail, factor, range[3], f, p);
        for (int r = 0; r < rows; r++) a[r] = p + r * tail;
        for (int64_t j = 0; j < value_panels; j++) {
          for (int r = 0; r < rows; r++) to[r] = o + (i + r) * strides[11] + j * NR;
          isa->tile_float(rows, a, 1, &none, length / 2, vp + j * length * NR, product_scale, zero,
                          static_cast<int>(std::min<int64_t>(NR, d - j * NR)), to);
        }
      }
    }
  });
  return nan ? HAS_NAN : OK;
}

int quest_feed_forward(const Layer* gated, const Layer* linear, const float* x, int64_t rows, const float* residual,
                       float* out, int threads) {
  const Clock clock(LAYERS);
  if (!fits(*gated->weight, gated->range) || !fits(*linear->weight, linear->range)) return OUT_OF_RANGE;
  return bytes_feed_forward(*gated, *linear, x, rows, residual, out, threads) ? HAS_NAN : OK;
}

// x [samples, pixels, channels] with strides -> y, without gaps. shift [samples, channels] and modulation
// [samples, 2 channels] may be null.
void quest_group_norm(const float* x, int64_t sample, int64_t pixel, int64_t samples, int64_t pixels, int64_t channels,
                      int64_t groups, float eps, const float* weight, const float* bias, const float* shift,
                      const float* modulation, int silu, float* y, int threads) {
  const Clock clock(NORMS);
  const int64_t per = channels / groups, work = 10 * samples * pixels * channels;
  // Where there are few samples their groups are shared out, too.
  const int64_t parts = std::min(groups, ceil_div(useful(threads, work), samples));
  parallel(samples * parts, threads, work, [&](int64_t task) {
    static thread_local Scratch<float> memory;
    const int64_t i = task / parts, part = task % parts;
    const int64_t first = part * groups / parts, last = (part + 1) * groups / parts, c = first * per;
    const auto from = [&](const float* array, int64_t sample_at) { return array ? array + sample_at + c : nullptr; };
    const GroupNorm norm{pixels, (last - first) * per, last - first, pixel, static_cast<ptrdiff_t>(channels), eps,
                         from(weight, 0), from(bias, 0), from(shift, i * channels), from(modulation, 2 * i * channels),
                         from(modulation, (2 * i + 1) * channels), silu != 0};
    isa->group_norm(norm, x + i * sample + c, y + i * pixels * channels + c, memory.get(4 * round_up(norm.channels, 16)));
  });
}

// x [rows, n] -> y.
void quest_layer_norm(const float* x, int64_t rows, int64_t n, float eps, const float* weight, const float* bias,
                      float* y, int threads) {
  const Clock clock(NORMS);
  constexpr int64_t block = 64;
  parallel(ceil_div(rows, block), threads, 10 * rows * n, [&](int64_t task) {
    for (int64_t r = task * block; r < std::min(rows, (task + 1) * block); r++)
      isa->layer_norm(x + r * n, n, eps, weight, bias, y + r * n);
  });
}

}  // extern "C"
