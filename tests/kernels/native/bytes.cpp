// The functions on bytes, where an instruction set has them.
#include "check.h"

namespace test {
namespace {

using namespace quest;

constexpr int64_t SLACK = 64;  // bytes that may be read after the last row

void quantize(const Bytes& on) {
  for (int i = 0; i < 300; i++) {
    const int64_t n = integer(1, 200), padded = n + integer(0, 40);
    const float low = static_cast<float>(integer(-300, 200));
    const Range r{chance(.5) ? 1.f : .037f, low, low + static_cast<float>(integer(1, 255))};
    const Exactly<float> x(n, [&] { return chance(.2) ? r.scale * (integer(-600, 600) + .5f) : number(200 * r.scale); });
    Exactly<uint8_t> out(padded);
    CHECK(!on.quantize(x, n, padded, r, out));
    for (int64_t j = 0; j < padded; j++) CHECK(out[j] == (j < n ? code(x[j], r) - static_cast<int>(low) : 0));
    Exactly<float> wrong(n, [&] { return x[0]; });
    wrong[integer(0, n - 1)] = NAN;
    CHECK(on.quantize(wrong, n, padded, r, out));
    const int64_t rows = integer(1, 5), stride = integer(1, 150), length = integer(1, stride);
    const Exactly<uint8_t> a((rows - 1) * stride + length, [] { return integer(0, 255); });
    Exactly<int32_t> sums(rows);
    on.sums(a, stride, rows, length, sums);
    for (int64_t k = 0; k < rows; k++) {
      int32_t sum = 0;
      for (int64_t j = 0; j < length; j++) sum += a[k * stride + j];
      CHECK(sums[k] == sum);
    }
  }
}

void unpack(const Bytes& on) {
  for (int i = 0; i < 100; i++) {
    const int64_t pairs = integer(1, 21);
    for (int bits : {4, 8}) {
      const int64_t step = bits == 8 ? 32 : 16;
      const Exactly<uint8_t> codes(pairs * step, [] { return integer(0, 255); });
      Exactly<int8_t> out((pairs + 1) / 2 * NR * 4);
      Exactly<int32_t> sums(NR, [] { return 7; });
      (bits == 8 ? on.unpack8 : on.unpack4)(codes, pairs, out, sums);
      for (int64_t c = 0; c < NR; c++) {
        int32_t sum = 7;
        for (int64_t k = 0; k < (pairs + 1) / 2 * 4; k++) {
          int expected = 0;
          if (k < 2 * pairs && bits == 8) expected = codes[k / 2 * 32 + c * 2 + k % 2] - 128;
          if (k < 2 * pairs && bits == 4) expected = (codes[k / 2 * 16 + c % 8 * 2 + k % 2] >> (c < 8 ? 0 : 4) & 15) - 8;
          CHECK(out[(k / 4 * NR + c) * 4 + k % 4] == expected);
          sum += expected;
        }
        CHECK(sums[c] == sum);
      }
    }
  }
}

void multiply(const Bytes& on) {
  for (int i = 0; i < 150; i++) {
    const int rows = static_cast<int>(integer(1, on.rows)), panels = static_cast<int>(integer(1, on.panels));
    const int segments = static_cast<int>(integer(1, 3)), columns = static_cast<int>(integer((panels - 1) * NR + 1, panels * NR));
    const int64_t bytes = on.depth * integer(1, 3), stride = integer(1, 40), width = panels * NR, panel = segments * bytes * NR;
    Exactly<ptrdiff_t> offset(segments);
    for (int s = 0; s < segments; s++) offset[s] = s * integer(0, 50);
    const int64_t last = *std::max_element(offset + 0, offset + segments);
    const Exactly<uint8_t> a((on.rows - 1) * stride + last + bytes, [] { return integer(0, 255); });
    const Exactly<int8_t> b(panels * panel, [] { return integer(-128, 127); });
    Exactly<int32_t> out(on.rows * width);
    on.begin();
    on.multiply(a, stride, rows, segments, offset, bytes, b, panel, panels, out, width);
    on.end();
    const Exactly<int32_t> sums(rows, [] { return integer(0, 999); }), zero(width, [] { return integer(-99, 99); });
    const Exactly<int32_t> constant(width, [] { return integer(-9999, 9999); });
    const Exactly<float> scale(width, [] { return 1.f; }), bias(width, [] { return integer(-9, 9); });
    const ptrdiff_t from = integer(0, 3);
    const Exactly<float> residual(rows * (from + columns), [] { return integer(-9, 9); });
    Exactly<float> y(rows * (from + columns), [] { return -1.f; });
    float* to[64];
    const float* beside[64];
    for (int r = 0; r < rows; r++) {
      to[r] = chance(.2) ? nullptr : y + r * (from + columns);
      beside[r] = to[r] ? residual + r * (from + columns) : nullptr;
    }
    const bool more = chance(.5);
    on.finish(out, width, rows, sums, zero, constant, scale, bias, columns, to, more ? beside : nullptr, from);
    for (int r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) {
        int32_t sum = 0;
        for (int s = 0; s < segments; s++)
          for (int64_t k = 0; k < bytes; k++)
            sum += a[r * stride + offset[s] + k] * b[c / NR * panel + ((s * bytes + k) / 4 * NR + c % NR) * 4 + k % 4];
        CHECK(out[r * width + c] == sum);
        if (c >= columns) continue;
        const int64_t at = r * (from + columns) + from + c;
        const float expected = static_cast<float>(sum - zero[c] * sums[r] - constant[c]) + bias[c] + (more ? residual[at] : 0);
        CHECK(y[at] == (to[r] ? expected : -1.f));
      }
  }
}

void pack(const Bytes& on) {
  for (int i = 0; i < 100; i++) {
    const int64_t m = integer(1, 40), d = integer(1, 70), stride = d + integer(0, 30);
    const int64_t depth = round_up(d, on.depth), length = round_up(m, on.depth);
    const Exactly<uint8_t> x((m - 1) * stride + d + SLACK, [] { return integer(0, 255); });
    Exactly<int8_t> keys(round_up(m, NR) * depth), values(round_up(d, NR) * length);
    Exactly<int32_t> key_sums(round_up(m, NR)), value_sums(round_up(d, NR));
    on.pack_keys(x, stride, m, d, depth, keys, key_sums);
    on.pack_values(x, stride, m, d, length, values, value_sums);
    for (int64_t j = 0; j < round_up(m, NR); j++) {
      int32_t sum = 0;
      for (int64_t k = 0; k < depth; k++) {
        const int expected = j < m && k < d ? x[j * stride + k] - 128 : 0;
        CHECK(keys[j / NR * depth * NR + (k / 4 * NR + j % NR) * 4 + k % 4] == expected);
        sum += expected;
      }
      if (j < m) CHECK(key_sums[j] == sum);
    }
    for (int64_t e = 0; e < d; e++) {
      int32_t sum = 0;
      for (int64_t j = 0; j < length; j++) {
        const int expected = j < m ? x[j * stride + e] - 128 : 0;
        CHECK(values[e / NR * length * NR + (j / 4 * NR + e % NR) * 4 + j % 4] == expected);
        sum += expected;
      }
      CHECK(value_sums[e] == sum);
    }
  }
}

void softmax(const Bytes& on) {
  for (int i = 0; i < 100; i++) {
    const int rows = static_cast<int>(integer(1, on.rows));
    const int64_t m = integer(1, 70), width = round_up(m, NR), padded = round_up(m, on.depth);
    Exactly<int32_t> scores(rows * width, [] { return integer(-20000, 20000); });
    const Exactly<int32_t> column(width, [] { return integer(-5000, 5000); });
    const Exactly<int32_t> before(rows * width, [&, j = int64_t{0}]() mutable { return scores[j++]; });
    const float low = static_cast<float>(integer(-40, 0)), factor = 3e-4f;
    const Range r{1.f / 200, low, low + 255};
    Exactly<uint8_t> out(rows * padded);
    Exactly<int32_t> totals(rows);
    on.softmax(rows, scores, width, m, padded, factor, r, column, out, totals);
    for (int row = 0; row < rows; row++) {
      double total = 0;
      int32_t sum = 0;
      const auto raised = [&](int64_t j) { return std::exp(static_cast<double>(before[row * width + j] - column[j]) * factor); };
      for (int64_t j = 0; j < m; j++) total += raised(j);
      for (int64_t j = 0; j < padded; j++) {
        const double p = j < m ? std::min<double>(raised(j) / total * 200, r.high) - low : 0;
        CHECK(close(out[row * padded + j], p, j < m ? .501 : 0));
        sum += out[row * padded + j];
      }
      CHECK(totals[row] == sum);
    }
  }
}

}  // namespace

void test_bytes() {
  if (!isa->bytes) return;
  quantize(*isa->bytes);
  unpack(*isa->bytes);
  multiply(*isa->bytes);
  pack(*isa->bytes);
  softmax(*isa->bytes);
}

}  // namespace test
