// Attention (see product.h).
#include "product.h"

namespace quest {
namespace {

// Quantizes heads first..last of sample b: to[0], to[1] and to[2] get codes [n or m, heads, d] of q, k and v, and terms what a
// dynamic range determines for each head and token. A dynamic range of v is that of a channel over all tokens, so v becomes
// codes [heads, d, m]. Returns true if there is a NaN, or infinity where ranges are dynamic.
bool quantize(const Attention& a, int64_t b, int64_t first, int64_t last, uint8_t* const* to, RowTerms* terms) {
  static thread_local Scratch<float> memory;
  bool wrong = false;
  const float* from[3] = {a.q, a.k, a.v};
  const int64_t d = a.d, columns = (last - first) * d, lengths[3] = {a.n, a.m, a.m};
  for (int i = 0; i < 3; i++) {
    const int64_t *s = a.strides + 3 * i, length = lengths[i];
    const float* x = from[i] + b * s[0] + first * s[1];
    const Range range = a.range[i];
    if (range.dynamic) {
      const bool turned = i == 2;
      terms[i].clear((last - first) * (turned ? d : length));
      float* columns_of_head = turned ? memory.get(d * length) : nullptr;
      for (int64_t h = 0; h < last - first; h++, x += s[1]) {
        if (!turned) {
          wrong |= isa->quantize_rows(x, s[2], length, d, d, range, to[i] + h * d, columns, &terms[i].scale[h * length],
                                      &terms[i].zero[h * length]);
          continue;
        }
        for (int64_t r = 0; r < length; r++)
          for (int64_t e = 0; e < d; e++) columns_of_head[e * length + r] = x[r * s[2] + e];
        wrong |= isa->quantize_rows(columns_of_head, length, d, length, length, range, to[i] + h * d * length, length,
                                    &terms[i].scale[h * d], &terms[i].zero[h * d]);
      }
    } else if (s[1] == d && s[2] == columns) {
      wrong |= isa->quantize(x, length * columns, length * columns, range, to[i]);
    } else {
      // Neighbouring heads are quantized together, because longer rows are faster.
      const int64_t together = s[1] == d ? columns : d;
      for (int64_t r = 0; r < length; r++)
        for (int64_t h = 0; h < columns / together; h++)
          wrong |= isa->quantize(x + r * s[2] + h * s[1], together, together, range, to[i] + r * columns + h * d);
    }
  }
  return wrong;
}

// Bytes from one row to the next. Rows at a multiple of a kilobyte would have few places in the first cache.
int64_t spread(int64_t bytes) { return bytes % 1024 ? bytes : bytes + 64; }

}  // namespace

Status attention(const Attention& a, int threads) {
  const Clock clock(ATTENTION);
  const Isa& on = *isa;
  const int64_t batch = a.batch, n = a.n, m = a.m, d = a.d, heads = a.heads;
  const Range* range = a.range;
  if (!batch || !heads || !n || !d) return OK;
  if (!m) {  // without keys the sum is 0
    for (int64_t b = 0; b < batch; b++)
      for (int64_t h = 0; h < heads; h++)
        for (int64_t i = 0; i < n; i++)
          std::fill_n(a.out + b * a.strides[9] + h * a.strides[10] + i * a.strides[11], d, 0.f);
    return OK;
  }
  if (!std::all_of(range, range + 4, [](Range r) { return in_int16(r) && one_byte(r) && zero_in_bytes(r); }) ||
      largest(range[0]) * largest(range[1]) * d > INT32_MAX || largest(range[3]) * largest(range[2]) * m > INT32_MAX)
    return OUT_OF_RANGE;
  const int64_t depth = round_up(d, on.depth), length = round_up(m, on.depth);  // bytes per row of the two products
  const int64_t key_panels = ceil_div(m, NR), value_panels = ceil_div(d, NR);
  const int64_t width = spread(4 * round_up(key_panels, on.panels) * NR) / 4, apart = spread(length);  // of scores and codes
  const int64_t value_width = round_up(value_panels, on.panels) * NR;
  const std::vector<float> none(std::max(width, value_width), 0.f);
  const int32_t zero_q = zero_of(range[0]), zero_k = zero_of(range[1]) - 128, zero_p = zero_of(range[3]);
  const float factor = range[0].scale * range[1].scale * a.scale;
  // If queries or keys have scales of their own, scores become floats before the softmax.
  const bool floats = range[0].dynamic || range[1].dynamic, of_rows = range[3].dynamic;
  const std::vector<int32_t> rows_zero(on.rows, zero_p);
  const int64_t parts = std::min(heads, ceil_div(threads, batch));
  std::atomic<bool> nan{false};
  parallel(batch * parts, threads, a.macs(), [&](int64_t task) {
    static thread_local Scratch<uint8_t> codes[3], probabilities, one_row;
    static thread_local Scratch<int8_t> keys, values;
    static thread_local Scratch<int32_t> scores, key_terms, value_terms, p_sums, products, q_sums;
    static thread_local Scratch<float> float_scores, outputs;
    static thread_local std::vector<int32_t> zeros_k, zero_v;
    static thread_local std::vector<float> scale_k, scale_q, scale, p_scale;
    static thread_local RowTerms terms[3];
    const int64_t b = task / parts, first = task % parts * heads / parts, last = (task % parts + 1) * heads / parts;
    const bool coded = a.codes[0];
    const int64_t own = (last - first) * d, columns = coded ? heads * d : own, lengths[3] = {n, m, m};
    const uint8_t* c[3];
    uint8_t* into[3];
    for (int i = 0; i < 3; i++) {
      c[i] = coded ? a.codes[i] + b * lengths[i] * columns + first * d : nullptr;
      if (!coded) c[i] = into[i] = i == 2 && range[2].dynamic ? rows_of(codes[i], own, m) : rows_of(codes[i], lengths[i], own);
    }
    if (!coded && quantize(a, b, first, last, into, terms)) nan = true;
    for (int i = 0; floats && i < 2; i++) {
      if (!range[i].dynamic) terms[i].clear(), terms[i].add(range[i], (last - first) * lengths[i]);
    }
    zero_v.assign(value_width, zero_of(range[2]) - 128);
    scale.assign(value_width, (of_rows ? 1.f : range[3].scale) * range[2].scale);
    zeros_k.assign(width, 0), scale_k.assign(width, 0.f), scale_q.resize(n), p_scale.resize(on.rows);
    int8_t* kp = keys.get(key_panels * depth * NR);
    int8_t* vp = values.get(value_panels * length * NR);
    uint8_t* p = rows_of(probabilities, on.rows, apart);
    int32_t* s = scores.get(on.rows * width);
    float* fs = floats ? float_scores.get(on.rows * width) : nullptr;
    int32_t* of_q = q_sums.get(n);
    int32_t* of_keys = key_terms.get(width);
    int32_t* of_values = value_terms.get(value_width);
    int32_t* of_p = p_sums.get(on.rows);
    int32_t* sums = products.get(on.rows * on.panels * NR);
    // Products with a row of ones are the sums of the outputs of packed keys and values.
    uint8_t* ones = rows_of(one_row, 0, std::max(depth, length));
    std::memset(ones, 1, std::max(depth, length));
    const ptrdiff_t start = 0;
    const Multiplying now;
    const auto sum = [&](const int8_t* panels, int64_t number, int64_t bytes, int32_t* out) {
      for (int64_t j = 0; j < number; j += on.panels) {
        const int count = static_cast<int>(std::min<int64_t>(on.panels, number - j));
        on.multiply(ones, 0, 1, 1, &start, bytes, panels + j * bytes * NR, bytes * NR, count, sums, on.panels * NR);
        std::copy(sums, sums + count * NR, out + j * NR);
      }
    };
    for (int64_t h = first; h < last; h++) {
      const int64_t head = h - first;
      const uint8_t *qh = c[0] + head * d, *kh = c[1] + head * d, *vh = c[2] + head * d;
      on.pack_keys(kh, columns, m, d, depth, kp);
      sum(kp, key_panels, depth, of_keys);
      if (floats) {
        for (int64_t j = 0; j < m; j++) {
          zeros_k[j] = terms[1].zero[head * m + j] - 128, scale_k[j] = terms[1].scale[head * m + j];
          of_keys[j] -= static_cast<int32_t>(d) * zeros_k[j];
        }
        for (int64_t i = 0; i < n; i++) scale_q[i] = terms[0].scale[head * n + i] * a.scale;
        on.sums(qh, columns, n, d, of_q);
      } else {
        for (int64_t j = 0; j < m; j++) of_keys[j] = zero_q * (of_keys[j] - static_cast<int32_t>(d) * zero_k);
      }
      if (range[2].dynamic) {  // a row of codes is a channel, as a row of keys is an output
        on.pack_keys(c[2] + head * d * m, m, d, m, length, vp);
        for (int64_t e = 0; e < d; e++) {
          zero_v[e] = terms[2].zero[head * d + e] - 128;
          scale[e] = (of_rows ? 1.f : range[3].scale) * terms[2].scale[head * d + e];
        }
      } else {
        on.pack_values(vh, columns, m, d, length, vp);
      }
      sum(vp, value_panels, length, of_values);
      for (int64_t e = 0; e < d; e++)
        of_values[e] = (of_rows ? 1 : zero_p) * (of_values[e] - static_cast<int32_t>(m) * zero_v[e]);
      float* o = a.next ? outputs.get(on.rows * d) : a.out + b * a.strides[9] + h * a.strides[10];
      for (int64_t i = 0; i < n; i += on.rows) {
        const int rows = static_cast<int>(std::min<int64_t>(on.rows, n - i));
        for (int64_t j = 0; j < key_panels; j += on.panels)
          on.multiply(qh + i * columns, columns, rows, 1, &start, depth, kp + j * depth * NR, depth * NR,
                      static_cast<int>(std::min<int64_t>(on.panels, key_panels - j)), s + j * NR, width);
        float* to[MAX_ROWS];
        if (floats) {
          for (int r = 0; r < rows; r++) to[r] = fs + r * width;
          on.finish(s, width, rows, of_q + i, zeros_k.data(), of_keys, scale_k.data(), none.data(), static_cast<int>(m), to,
                    nullptr, 0, scale_q.data() + i, terms[0].zero.data() + head * n + i);
        }
        if (on.softmax(rows, floats ? reinterpret_cast<int32_t*>(fs) : s, width, m, apart, floats ? 1.f : factor, range[3],
                       floats ? nullptr : of_keys, p, of_p, p_scale.data()))
          nan = true;
        for (int r = 0; r < rows; r++) to[r] = a.next ? o + r * d : o + (i + r) * a.strides[11];
        for (int64_t j = 0; j < value_panels; j += on.panels) {
          const int count = static_cast<int>(std::min<int64_t>(on.panels, value_panels - j));
          on.multiply(p, apart, rows, 1, &start, length, vp + j * length * NR, length * NR, count, sums, on.panels * NR);
          on.finish(sums, on.panels * NR, rows, of_p, zero_v.data() + j * NR, of_values + j * NR, scale.data() + j * NR,
                    none.data(), static_cast<int>(std::min<int64_t>(count * NR, d - j * NR)), to, nullptr, j * NR,
                    of_rows ? p_scale.data() : nullptr, rows_zero.data());
        }
        if (a.next && quantize_short_rows(o, rows, d, a.next_range, a.next + ((b * n + i) * heads + h) * d, heads * d)) nan = true;
      }
    }
  });
  return nan ? HAS_NAN : OK;
}

}  // namespace quest
