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
  const auto coded = [&](const Rows& t, int j, int64_t b, int64_t h, int64_t i, int64_t e) {
    return code(t.at(b, h, i, e), ranges[j]);
  };
  for (int64_t b = 0; b < batch; b++)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t i = 0; i < n; i++) {
        Exactly<double> p(m);
        double total = 0, largest = -INFINITY;
        for (int64_t j = 0; j < m; j++) {
          int64_t sum = 0;
          for (int64_t e = 0; e < d; e++) sum += coded(q, 0, b, h, i, e) * coded(k, 1, b, h, j, e);
          p[j] = static_cast<double>(sum) * ranges[0].scale * ranges[1].scale * scale;
          largest = std::max(largest, p[j]);
        }
        for (int64_t j = 0; j < m; j++) total += p[j] = std::exp(p[j] - largest);
        for (int64_t e = 0; e < d; e++) {
          double sum = 0, ties = 1e-4;
          for (int64_t j = 0; j < m; j++) {
            const double share = p[j] / total * 255, value = coded(v, 2, b, h, j, e) * static_cast<double>(ranges[2].scale);
            sum += std::nearbyint(share) / 255 * value;
            // A probability in the middle of two codes may take either.
            if (close(share - std::floor(share), .5, 2e-3)) ties += std::fabs(value) / 255;
          }
          CHECK(close(out.at(b, h, i, e), sum, ties + 1e-5 * std::fabs(sum)));
        }
      }
}

}  // namespace

void test_attention() {
  for (int i = 0; i < 60; i++) one();
}

}  // namespace test
