// The functions on bytes.
#include "packed.h"
#include "product.h"

namespace test {
namespace {

using namespace quest;

void quantize(const Isa& on) {
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
    float least, most, low_end = 0, high_end = 0;
    for (int64_t j = 0; j < n; j++) low_end = std::min(low_end, x[j]), high_end = std::max(high_end, x[j]);
    on.extremes(x, n, &least, &most);
    CHECK(least == low_end && most == high_end);
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

void quantize_rows(const Isa& on) {
  for (int i = 0; i < 100; i++) {
    const int64_t rows = integer(1, 40), n = integer(1, 100), stride = n + integer(0, 9), padded = n + integer(0, 20);
    const Range r = dynamic_range(1);
    const Exactly<float> x((rows - 1) * stride + n, [&] { return input(r); });
    Exactly<uint8_t> out(rows * padded);
    Exactly<float> scale(rows);
    Exactly<int32_t> zero(rows);
    CHECK(!on.quantize_rows(x, stride, rows, n, padded, r, out, padded, scale, zero));
    for (int64_t row = 0; row < rows; row++) {
      const Range own = fitted(r, x + row * stride, 1, 0, n);
      CHECK(scale[row] == own.scale && zero[row] == -own.low);
      for (int64_t j = 0; j < padded; j++)
        CHECK(out[row * padded + j] == (j < n ? code(x[row * stride + j], own) + zero[row] : 0));
    }
    for (float bad : {NAN, INFINITY, -INFINITY}) {
      Exactly<float> wrong(x.size, [&] { return 1; });
      wrong[integer(0, rows - 1) * stride + integer(0, n - 1)] = bad;
      CHECK(on.quantize_rows(wrong, stride, rows, n, padded, r, out, padded, scale, zero));
    }
  }
}

void unpack(const Isa& on) {
  for (int i = 0; i < 100; i++) {
    const int64_t quads = integer(1, 21), half = 2 * NR;
    const Exactly<uint8_t> codes(quads * half, [] { return integer(0, 255); });
    Exactly<int8_t> out(2 * codes.size);
    on.unpack4(codes, quads, out);
    for (int64_t j = 0; j < out.size; j++) {
      const int byte = codes[j / (2 * half) * half + j % half];
      CHECK(out[j] == (j % (2 * half) < half ? byte & 15 : byte >> 4) - 8);
    }
  }
}

void multiply(const Isa& on) {
  for (int i = 0; i < 150; i++) {
    const int rows = static_cast<int>(integer(1, on.rows)), panels = static_cast<int>(integer(1, on.panels));
    const int segments = static_cast<int>(integer(1, 3)), columns = static_cast<int>(integer((panels - 1) * NR + 1, panels * NR));
    const bool groups = chance(.3);
    const int64_t depth = groups ? 16 : on.depth, bytes = depth * (chance(.1) ? integer(60, 140) : integer(1, 3));
    const int64_t stride = integer(1, 40), width = panels * NR, panel = segments * bytes * NR;
    Exactly<ptrdiff_t> offset(segments);
    for (int s = 0; s < segments; s++) offset[s] = s * integer(0, 50);
    const int64_t last = *std::max_element(offset + 0, offset + segments);
    const Exactly<uint8_t> a((on.rows - 1) * stride + last + bytes + SLACK, [] { return integer(0, 255); });
    const Exactly<int8_t> b(panels * panel, [] { return integer(-128, 127); });
    Exactly<int32_t> out(on.rows * width);
    if (on.begin) on.begin();
    (groups ? on.multiply_some : on.multiply)(a, stride, rows, segments, offset, bytes, b, panel, panels, out, width);
    if (on.end) on.end();
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
    const bool more = chance(.5), of_rows = chance(.5);
    const Exactly<float> row_scale(rows, [] { return integer(1, 4); });
    const Exactly<int32_t> row_zero(rows, [] { return integer(-9, 9); });
    on.finish(out, width, rows, sums, zero, constant, scale, bias, columns, to, more ? beside : nullptr, from,
              row_scale.when(of_rows), row_zero.when(of_rows));
    for (int r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) {
        int32_t sum = 0;
        for (int s = 0; s < segments; s++)
          for (int64_t k = 0; k < bytes; k++)
            sum += a[r * stride + offset[s] + k] * b[c / NR * panel + ((s * bytes + k) / 4 * NR + c % NR) * 4 + k % 4];
        CHECK(out[r * width + c] == sum);
        if (c >= columns) continue;
        const int64_t at = r * (from + columns) + from + c;
        const int32_t whole = sum - zero[c] * sums[r] - constant[c] * (of_rows ? row_zero[r] : 1);
        const float product = std::fma(static_cast<float>(whole), of_rows ? row_scale[r] : 1, bias[c]);
        const float expected = product + (more ? residual[at] : 0);
        CHECK(y[at] == (to[r] ? expected : -1.f));
      }
  }
}

void groups(const Isa& on) {
  for (int i = 0; on.multiply_groups && i < 150; i++) {
    const int rows = static_cast<int>(integer(1, on.rows)), panels = static_cast<int>(integer(1, on.panels));
    const int64_t bytes = 4 * integer(1, 60), group = 16 * integer(1, 4), number = ceil_div(bytes, group);
    const int64_t segments = integer(1, 4), of_rows = rows + 7;  // numbers of rows in a group
    const int64_t stride = bytes + integer(0, 9), width = panels * NR, panel = segments * bytes * NR, own = chance(.5) ? of_rows : 0;
    const Exactly<ptrdiff_t> offset(segments, [] { return integer(0, 90); }), shift(segments, [] { return integer(0, 7); });
    const Exactly<uint8_t> a((rows - 1) * stride + bytes + 90, [] { return integer(0, 255); });
    const Exactly<int8_t> b(panels * panel, [] { return integer(-128, 127); });
    const auto some = [] { return pair(static_cast<int32_t>(integer(-300, 300)), static_cast<int32_t>(integer(-300, 300))); };
    const Exactly<int32_t> row_pairs(number * of_rows, some), pairs(segments * number * width, some);
    const Exactly<float> row_scale(own ? number * of_rows : of_rows, [] { return test::number(); }), scale(number * width, [] { return test::number(); });
    Exactly<float> out(rows * width, [] { return NAN; });
    const Grouped g{group, segments, offset, shift, row_pairs, pairs, row_scale, scale, of_rows, own, width};
    on.multiply_groups(a, stride, rows, bytes, b, panel, panels, g, out, width);
    for (int r = 0; r < rows; r++)
      for (int64_t c = 0; c < width; c++) {
        double y = 0, size = 0;
        for (int64_t part = 0; part < segments * number; part++) {
          const int64_t s = part / number, j = part % number, row = r + shift[s];
          const int32_t x = row_pairs[j * of_rows + row], w = pairs[part * width + c];
          int32_t sum = static_cast<int16_t>(x) * static_cast<int16_t>(w) + (x >> 16) * (w >> 16);
          for (int64_t k = j * group; k < std::min(bytes, (j + 1) * group); k++)
            sum += a[r * stride + offset[s] + k] * b[c / NR * panel + s * bytes * NR + (k / 4 * NR + c % NR) * 4 + k % 4];
          const double term = static_cast<double>(sum) * row_scale[j * own + row] * scale[j * width + c];
          y += term, size += std::fabs(term);
        }
        CHECK(close(out[r * width + c], y, 1e-6 * size));
      }
  }
}

void pack(const Isa& on) {
  for (int i = 0; i < 100; i++) {
    const int64_t m = integer(1, 40), d = integer(1, 70), stride = d + integer(0, 30);
    const int64_t depth = round_up(d, on.depth), length = round_up(m, on.depth);
    const Exactly<uint8_t> x((round_up(m, NR) - 1) * stride + d + SLACK, [] { return integer(0, 255); });
    Exactly<int8_t> keys(round_up(m, NR) * depth), values(round_up(d, NR) * length);
    on.pack_keys(x, stride, m, d, depth, keys);
    on.pack_values(x, stride, m, d, length, values);
    for (int64_t j = 0; j < m; j++)
      for (int64_t k = 0; k < depth; k++)
        CHECK(keys[j / NR * depth * NR + (k / 4 * NR + j % NR) * 4 + k % 4] == (k < d ? x[j * stride + k] - 128 : 0));
    for (int64_t e = 0; e < d; e++)
      for (int64_t j = 0; j < length; j++)
        CHECK(values[e / NR * length * NR + (j / 4 * NR + e % NR) * 4 + j % 4] == (j < m ? x[j * stride + e] - 128 : 0));
  }
}

void softmax(const Isa& on) {
  for (int i = 0; i < 100; i++) {
    const int rows = static_cast<int>(integer(1, on.rows));
    const int64_t m = integer(1, 70), width = round_up(m, NR), padded = round_up(m, on.depth);
    const bool floats = chance(.5), dynamic = chance(.5);
    Exactly<int32_t> scores(rows * width, [] { return integer(-20000, 20000); });
    const Exactly<int32_t> column(width, [&] { return floats ? 0 : integer(-5000, 5000); });
    const Exactly<int32_t> before(rows * width, [&, j = int64_t{0}]() mutable { return scores[j++]; });
    for (int64_t j = 0; floats && j < scores.size; j++) {
      const float score = static_cast<float>(before[j]);
      std::memcpy(scores + j, &score, sizeof score);
    }
    const float low = static_cast<float>(integer(-40, 0)), factor = 3e-4f;
    const Range r{dynamic ? .9f : 1.f / 200, low, low + 255, dynamic};
    Exactly<uint8_t> out(rows * padded);
    Exactly<int32_t> totals(rows);
    Exactly<float> own(rows);
    on.softmax(rows, scores, width, m, padded, factor, r, column.when(!floats), out, totals, own);
    for (int row = 0; row < rows; row++) {
      double total = 0;
      int32_t sum = 0;
      const auto raised = [&](int64_t j) { return std::exp(static_cast<double>(before[row * width + j] - column[j]) * factor); };
      double most = 0;
      for (int64_t j = 0; j < m; j++) total += raised(j), most = std::max(most, raised(j));
      const double scale = dynamic ? .9f * most / total / r.high : r.scale;
      if (dynamic) CHECK(close(own[row], scale, 1e-5 * scale));
      for (int64_t j = 0; j < padded; j++) {
        const double p = j < m ? std::min<double>(raised(j) / total / scale, r.high) - low : 0;
        CHECK(close(out[row * padded + j], p, j < m ? .501 : 0));
        sum += out[row * padded + j];
      }
      CHECK(totals[row] == sum);
    }
  }
}

}  // namespace

void test_bytes() {
  quantize(*isa);
  quantize_rows(*isa);
  unpack(*isa);
  multiply(*isa);
  groups(*isa);
  pack(*isa);
  softmax(*isa);
}

}  // namespace test
