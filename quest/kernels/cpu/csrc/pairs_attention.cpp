// Attention on pairs of int16 (see pairs.h).
#include "pairs.h"

#include <cstring>

namespace quest {

Status attention(const Attention& a, int threads) {
  const Clock clock(ATTENTION);
  const int64_t batch = a.batch, heads = a.heads, n = a.n, m = a.m, d = a.d;
  const Range* range = a.range;
  if (!batch || !heads || !n || !d) return OK;
  if (!m) {  // without keys the sum is 0
    for (int64_t b = 0; b < batch; b++)
      for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < n; i++)
          std::fill_n(a.out + b * a.strides[9] + h * a.strides[10] + i * a.strides[11], d, 0.f);
    return OK;
  }
  if (!std::all_of(range, range + 4, in_int16) || largest(range[0]) * largest(range[1]) * d > INT32_MAX ||
      largest(range[3]) * largest(range[2]) * m > INT32_MAX)
    return OUT_OF_RANGE;
  if (isa->bytes && std::all_of(range, range + 4, [](Range r) { return bytes_fit(r); }))
    return bytes_attention(a, threads) ? HAS_NAN : OK;
  int64_t depth = round_up(d, 2), length = round_up(m, 2), tail = round_up(m, 16);
  int64_t key_panels = ceil_div(m, NR), value_panels = ceil_div(d, NR), width = key_panels * NR;
  float product_scale[NR], zero[NR] = {};
  std::fill(product_scale, product_scale + NR, range[3].scale * range[2].scale);
  float factor = range[0].scale * range[1].scale * a.scale;
  int64_t parts = std::min(heads, ceil_div(threads, batch));
  std::atomic<bool> nan{false};
  parallel(batch * parts, threads, a.macs(), [&](int64_t task) {
    static thread_local Scratch<int16_t> codes[3], keys, values, probabilities;
    static thread_local Scratch<int32_t> scores;
    static thread_local Scratch<float> work;
    int64_t b = task / parts, first = task % parts * heads / parts, last = (task % parts + 1) * heads / parts;
    int64_t columns = (last - first) * d, lengths[3] = {n, m, m};
    int16_t* c[3];  // codes of q, k and v, [n or m, heads, d]
    for (int i = 0; i < 3; i++) {
      // Rows are read in pairs, so there must be room after the last number.
      c[i] = codes[i].get(lengths[i] * columns + 16);
      std::memset(c[i] + lengths[i] * columns, 0, 16 * sizeof(int16_t));
    }
    if (a.quantize(isa->quantize, b, first, last, c)) nan = true;
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
      float* o = a.out + b * a.strides[9] + h * a.strides[10];
      for (int64_t i = 0; i < n; i += isa->rows) {
        int rows = static_cast<int>(std::min<int64_t>(isa->rows, n - i));
        const int16_t* of[MAX_MR];
        float* to[MAX_MR];
        for (int r = 0; r < rows; r++) of[r] = qh + (i + r) * columns;
        for (int64_t j = 0; j < key_panels; j++)
          isa->tile_int(rows, of, 1, &none, depth / 2, kp + j * depth * NR, s + j * NR, width);
        isa->softmax(rows, s, width, m, tail, factor, range[3], f, p);
        for (int r = 0; r < rows; r++) of[r] = p + r * tail;
        for (int64_t j = 0; j < value_panels; j++) {
          for (int r = 0; r < rows; r++) to[r] = o + (i + r) * a.strides[11] + j * NR;
          isa->tile_float(rows, of, 1, &none, length / 2, vp + j * length * NR, product_scale, zero,
                          static_cast<int>(std::min<int64_t>(NR, d - j * NR)), to);
        }
      }
    }
  });
  return nan ? HAS_NAN : OK;
}

}  // namespace quest
