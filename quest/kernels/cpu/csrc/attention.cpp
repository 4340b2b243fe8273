// Attention (see product.h).
#include "product.h"

namespace quest {

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
  if (!std::all_of(range, range + 4, [](Range r) { return in_int16(r) && one_byte(r) && !r.dynamic; }) ||
      largest(range[0]) * largest(range[1]) * d > INT32_MAX || largest(range[3]) * largest(range[2]) * m > INT32_MAX)
    return OUT_OF_RANGE;
  const int64_t depth = round_up(d, on.depth), length = round_up(m, on.depth);  // bytes per row of the two products
  const int64_t key_panels = ceil_div(m, NR), value_panels = ceil_div(d, NR), width = round_up(key_panels, on.panels) * NR;
  const int64_t value_width = round_up(value_panels, on.panels) * NR;
  const std::vector<float> scale(value_width, range[3].scale * range[2].scale), none(value_width, 0.f);
  const std::vector<int32_t> zero_v(value_width, zero_of(range[2]) - 128);
  const int32_t zero_q = zero_of(range[0]), zero_k = zero_of(range[1]) - 128, zero_p = zero_of(range[3]);
  const float factor = range[0].scale * range[1].scale * a.scale;
  const int64_t parts = std::min(heads, ceil_div(threads, batch));
  std::atomic<bool> nan{false};
  parallel(batch * parts, threads, a.macs(), [&](int64_t task) {
    static thread_local Scratch<uint8_t> codes[3], probabilities, one_row;
    static thread_local Scratch<int8_t> keys, values;
    static thread_local Scratch<int32_t> scores, key_terms, value_terms, p_sums, products;
    const int64_t b = task / parts, first = task % parts * heads / parts, last = (task % parts + 1) * heads / parts;
    const int64_t columns = (last - first) * d, lengths[3] = {n, m, m};
    uint8_t* c[3];
    for (int i = 0; i < 3; i++) c[i] = rows_of(codes[i], lengths[i], columns);
    if (a.quantize(b, first, last, c)) nan = true;
    int8_t* kp = keys.get(key_panels * depth * NR);
    int8_t* vp = values.get(value_panels * length * NR);
    uint8_t* p = rows_of(probabilities, on.rows, length);
    int32_t* s = scores.get(on.rows * width);
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
      const uint8_t *qh = c[0] + (h - first) * d, *kh = c[1] + (h - first) * d, *vh = c[2] + (h - first) * d;
      on.pack_keys(kh, columns, m, d, depth, kp);
      sum(kp, key_panels, depth, of_keys);
      for (int64_t j = 0; j < m; j++) of_keys[j] = zero_q * (of_keys[j] - static_cast<int32_t>(d) * zero_k);
      on.pack_values(vh, columns, m, d, length, vp);
      sum(vp, value_panels, length, of_values);
      for (int64_t e = 0; e < d; e++) of_values[e] = zero_p * (of_values[e] - static_cast<int32_t>(m) * zero_v[0]);
      float* o = a.out + b * a.strides[9] + h * a.strides[10];
      for (int64_t i = 0; i < n; i += on.rows) {
        const int rows = static_cast<int>(std::min<int64_t>(on.rows, n - i));
        for (int64_t j = 0; j < key_panels; j += on.panels)
          on.multiply(qh + i * columns, columns, rows, 1, &start, depth, kp + j * depth * NR, depth * NR,
                      static_cast<int>(std::min<int64_t>(on.panels, key_panels - j)), s + j * NR, width);
        on.softmax(rows, s, width, m, length, factor, range[3], of_keys, p, of_p);
        float* to[MAX_ROWS];
        for (int r = 0; r < rows; r++) to[r] = o + (i + r) * a.strides[11];
        for (int64_t j = 0; j < value_panels; j += on.panels) {
          const int count = static_cast<int>(std::min<int64_t>(on.panels, value_panels - j));
          on.multiply(p, length, rows, 1, &start, length, vp + j * length * NR, length * NR, count, sums, on.panels * NR);
          on.finish(sums, on.panels * NR, rows, of_p, zero_v.data(), of_values + j * NR, scale.data(), none.data(),
                    static_cast<int>(std::min<int64_t>(count * NR, d - j * NR)), to, nullptr, j * NR, nullptr, nullptr);
        }
      }
    }
  });
  return nan ? HAS_NAN : OK;
}

}  // namespace quest
