// The two products of an attention, with any strides.
#include "packed.h"

namespace test {
namespace {

using namespace quest;

struct Rows {
  int64_t batch, head, row;
  Exactly<float> memory;
  // [batch, heads, n, d] or [batch, n, heads, d], with gaps or without.
  Rows(int64_t batches, int64_t heads, int64_t n, int64_t d, Range r)
      : Rows(batches, heads, n, d, r, chance(.7), chance(.7) ? 0 : integer(1, 5)) {}
  const float& at(int64_t b, int64_t h, int64_t i, int64_t e) const { return memory[b * batch + h * head + i * row + e]; }

 private:
  Rows(int64_t batches, int64_t heads, int64_t n, int64_t d, Range r, bool together, int64_t gap)
      : batch(heads * n * (d + gap)), head(together ? d + gap : n * (d + gap)), row(together ? heads * (d + gap) : d + gap),
        memory(batches * batch, [&] { return input(r); }) {}
};

void one() {
  const int64_t batch = integer(1, 2), heads = integer(1, 3), d = integer(1, 40), n = integer(1, 30);
  const int64_t m = chance(.05) ? 0 : integer(1, 40);
  Range ranges[4];
  for (int j = 0; j < 3; j++)
    do ranges[j] = range(.02f);
    while (ranges[j].high - ranges[j].low > 255);
  ranges[3] = {1.f / 255, 0, 255};
  const float clip = .9f;
  for (int j = 0; j < 4; j++) {
    if (chance(.5)) ranges[j] = dynamic_range(1), ranges[j].scale = clip;
    if (j == 3 && ranges[3].dynamic) ranges[3].low = 0, ranges[3].high = 255;
  }
  const Rows q(batch, heads, n, d, ranges[0]), k(batch, heads, m, d, ranges[1]), v(batch, heads, m, d, ranges[2]);
  Rows out(batch, heads, n, d, ranges[0]);
  for (int64_t j = 0; j < out.memory.size; j++) out.memory[j] = NAN;
  int64_t strides[12];
  const Rows* all[4] = {&q, &k, &v, &out};
  for (int j = 0; j < 4; j++) {
    strides[3 * j] = all[j]->batch;
    strides[3 * j + 1] = all[j]->head;
    strides[3 * j + 2] = all[j]->row;
  }
  const float scale = .1f;
  CHECK(!quest_attention(q.memory, k.memory, v.memory, strides, batch, heads, n, m, d, ranges, scale, out.memory,
                         static_cast<int>(integer(1, 3))));
  // The range of a number: its own if static, that of its token, or of v that of its channel.
  const auto of = [&](const Rows& t, int j, int64_t b, int64_t h, int64_t i, int64_t e) {
    if (!ranges[j].dynamic) return ranges[j];
    return j == 2 ? fitted(ranges[j], &t.at(b, h, 0, e), m, t.row, 1) : fitted(ranges[j], &t.at(b, h, i, 0), 1, 0, d);
  };
  const auto value = [&](const Rows& t, int j, int64_t b, int64_t h, int64_t i, int64_t e) {
    const Range r = of(t, j, b, h, i, e);
    return code(t.at(b, h, i, e), r) * static_cast<double>(r.scale);
  };
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < n; i++) {
        Exactly<double> p(m);
        double total = 0, largest = -INFINITY;
        for (int64_t j = 0; j < m; j++) {
          double sum = 0;
          for (int64_t e = 0; e < d; e++) sum += value(q, 0, b, h, i, e) * value(k, 1, b, h, j, e);
          p[j] = sum * scale;
          largest = std::max(largest, p[j]);
        }
        for (int64_t j = 0; j < m; j++) total += p[j] = std::exp(p[j] - largest);
        const double step = ranges[3].dynamic ? clip / total / 255 : 1. / 255;  // the largest probability is 1 / total
        for (int64_t e = 0; e < d; e++) {
          double sum = 0, ties = 1e-4;
          for (int64_t j = 0; j < m; j++) {
            const double share = std::min(p[j] / total / step, 255.), of_v = value(v, 2, b, h, j, e);
            sum += std::nearbyint(share) * step * of_v;
            // A probability in the middle of two codes may take either.
            if (close(share - std::floor(share), .5, 2e-3)) ties += std::fabs(of_v) * step;
          }
          CHECK(close(out.at(b, h, i, e), sum, ties + 1e-5 * std::fabs(sum)));
        }
      }
}

}  // namespace

void test_attention() {
  for (int i = 0; i < 100; i++) one();
}

}  // namespace test
