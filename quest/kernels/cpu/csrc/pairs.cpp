// Linear layers on pairs of int16 (see pairs.h).
#include "pairs.h"

namespace quest {

void add(const float* x, int64_t n, float* out) {
  for (int64_t i = 0; i < n; i++) out[i] += x[i];
}

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

Status linear(const Weight& w, const float* x, int64_t rows, int64_t stride, const float* bias, Range range, bool gated,
              const float* residual, float* out, int threads) {
  const Clock clock(LAYERS);
  if (!rows) return OK;
  if (!fits(w, range)) return OUT_OF_RANGE;
  if (isa->bytes && bytes_fit(range) && (!gated || w.outputs % (2 * NR) == 0))
    return bytes_linear(w, x, rows, stride, bias, range, gated, residual, out, threads) ? HAS_NAN : OK;
  Epilogue e(w, bias, range.scale);
  int64_t padded = round_up(w.channels, 16);
  int64_t row = 2 * padded + (gated ? 4 * w.outputs : 0);  // bytes per row that stay in the cache
  // Each block unpacks the whole weight. This only pays if a block has many rows, so long rows may leave this cache.
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

}  // namespace quest
