// Blocks in one call: to the bit what their layers give one by one.
#include "packed.h"

namespace test {
namespace {

using namespace quest;

Exactly<float> numbers(int64_t n) {
  return Exactly<float>(n, [] { return number(); });
}

Exactly<float> linear(const Packed& w, const float* bias, Range r, const float* x, int64_t rows, bool gated,
                      const float* residual, int64_t tokens = 1) {
  const int64_t width = gated ? w.outputs / 2 : w.outputs;
  Exactly<float> out(rows * width);
  CHECK(!quest_linear(x, rows, w.channels, w.channels, w.memory, w.memory.size, bias, r.scale, r.low, r.high,
                      r.dynamic, tokens, gated, residual, out, width, 1));
  return out;
}

Exactly<float> conv(const Packed& w, const float* bias, Range r, const float* x, int64_t n, int64_t height, int64_t width,
                    const float* residual) {
  Exactly<float> out(n * height * width * w.outputs);
  const int64_t pixel = w.channels, row = width * pixel;
  CHECK(!quest_conv2d(x, n, pixel, height, width, height * row, row, pixel, w.memory, w.memory.size, bias, r.scale, r.low,
                      r.high, r.dynamic, 1, 1, 1, 1, 1, 1, residual, out, w.outputs, height, width, 1));
  return out;
}

void same(const Exactly<float>& a, const Exactly<float>& b) {
  for (int64_t i = 0; i < a.size; i++) CHECK(a[i] == b[i]);
}

// The range of a block's inputs, static or dynamic.
Range any_range() { return chance(.6) ? Range{.05f, -128, 127} : dynamic_range(static_cast<int>(integer(1, 2))); }

struct Attention {
  Packed q, k, v, out;
  Exactly<float> bias;
  Range fixed{.05f, -128, 127}, range{any_range()};
  AttentionBlock block;

  Attention(int64_t channels, int64_t context, int64_t heads, int64_t d)
      : q(heads * d, channels, 1, 1, 4, 0), k(heads * d, context, 1, 1, 8, 0), v(heads * d, context, 1, 1, 8, 0),
        out(channels, heads * d, 1, 1, 4, 0), bias(numbers(channels)),
        block{q.layer(nullptr, range), k.layer(nullptr, range), v.layer(nullptr, range), out.layer(bias, range),
              {fixed, fixed, fixed, {1.f / 255, 0, 255}}, .3f, heads} {
    for (int i = 0; i < 4; i++)
      if (chance(.4)) block.ranges[i] = dynamic_range(1);
    block.ranges[3].low = 0;
  }

  Exactly<float> apart(const float* x, const float* context, int64_t batch, int64_t n, int64_t m, const float* residual) const {
    const int64_t width = q.outputs, d = width / block.heads;
    const auto queries = linear(q, nullptr, range, x, batch * n, false, nullptr, n);
    const auto keys = linear(k, nullptr, range, context, batch * m, false, nullptr, m);
    const auto values = linear(v, nullptr, range, context, batch * m, false, nullptr, m);
    Exactly<float> y(batch * n * width);
    const int64_t strides[12] = {n * width, d, width, m * width, d, width, m * width, d, width, n * width, d, width};
    CHECK(!quest_attention(queries, keys, values, strides, batch, block.heads, n, m, d, block.ranges, block.scale,
                           y, 1));
    return linear(out, bias, range, y, batch * n, false, residual, n);
  }
};

Norm norm(const Exactly<float>& weight, int64_t groups) { return {weight, weight, 1e-5f, groups, weight.size}; }

Exactly<float> layer_norm(const Norm& n, const float* x, int64_t rows) {
  Exactly<float> y(rows * n.channels);
  CHECK(!quest_layer_norm(x, rows, n.channels, n.eps, n.weight, n.bias, y, 1));
  return y;
}

Exactly<float> group_norm(const Norm& n, const float* x, int64_t samples, int64_t pixels, bool silu,
                          const float* shift = nullptr, const float* modulation = nullptr) {
  const int64_t c = n.channels;
  Exactly<float> y(samples * pixels * c);
  CHECK(!quest_group_norm(x, pixels * c, c, samples, pixels, c, n.groups, n.eps, n.weight, n.bias, shift, modulation, silu, y, 1));
  return y;
}

int64_t some_width() { return chance(.3) ? 16 * integer(1, 2) : integer(1, 20); }

void transformer(int64_t batch, int64_t n, int64_t m) {
  const int64_t heads = integer(1, 3), d = some_width(), channels = integer(1, 40), context_channels = integer(1, 40);
  const bool two = chance(.7), only = two && chance(.3), outside = two && chance(.8);
  const Attention first(channels, only && outside ? context_channels : channels, heads, d);
  const Attention second(channels, outside ? context_channels : channels, heads, d);
  const int64_t inner = chance(.5) ? 32 * integer(1, 2) : integer(1, 50);
  const Range r = any_range();
  const Packed gated(2 * inner, channels, 1, 1, 8, 0), last(channels, inner, 1, 1, 4, 0);
  const auto x = numbers(batch * n * channels), context = numbers(batch * m * context_channels);
  const auto w1 = numbers(channels), w2 = numbers(channels), w3 = numbers(channels), b = numbers(2 * inner);
  const TransformerBlock block{{norm(w1, 0), norm(w2, 0), norm(w3, 0)}, {first.block, second.block}, two ? 2 : 1, only,
                               gated.layer(b, r), last.layer(nullptr, r)};
  Exactly<float> y(x.size);
  CHECK(!quest_transformer_block(&block, x, context, batch, n, channels, m, outside ? context_channels : 0, y,
                                 static_cast<int>(integer(1, 3))));
  const int64_t rows = batch * n;
  const auto attend = [&](const Attention& a, const Norm& by, const Exactly<float>& from, bool there) {
    const auto normed = layer_norm(by, from, rows);
    return a.apart(normed, there ? context : normed, batch, n, there ? m : n, from);
  };
  auto stream = attend(first, block.norms[0], x, outside && only);
  if (two) stream = attend(second, block.norms[1], stream, outside);
  const auto normed = layer_norm(block.norms[2], stream, rows);
  const auto hidden = linear(gated, b, r, normed, rows, true, nullptr, n);
  same(y, linear(last, nullptr, r, hidden, rows, false, stream, n));
  // The same with a group norm and layers around it.
  const int64_t groups = integer(1, 3), outer = groups * integer(1, 15);
  const Packed into(channels, outer, 1, 1, 8, 0), from(outer, channels, 1, 1, 4, 0);
  const auto w = numbers(outer), pixels = numbers(rows * outer), bias = numbers(channels);
  const Transformer whole{norm(w, groups), into.layer(bias, r), block, from.layer(nullptr, r)};
  Exactly<float> z(pixels.size);
  CHECK(!quest_transformer(&whole, pixels, context, batch, n, outer, m, outside ? context_channels : 0, z,
                           static_cast<int>(integer(1, 3))));
  const auto before = linear(into, bias, r, group_norm(whole.norm, pixels, batch, n, false), rows, false, nullptr, n);
  CHECK(!quest_transformer_block(&block, before, context, batch, n, channels, m, outside ? context_channels : 0, y, 1));
  same(z, linear(from, nullptr, r, y, rows, false, pixels, n));
}

void resnet(int64_t samples, int64_t height, int64_t width) {
  const int64_t groups = integer(1, 3), channels = groups * integer(1, 12), outputs = groups * integer(1, 12), e = integer(1, 30);
  const bool modulated = chance(.5), embedded = chance(.8);
  const Range r = any_range();
  const Packed first(outputs, channels, 3, 3, 8, 0), second(outputs, outputs, 3, 3, 4, 0);
  const Packed embedding(modulated ? 2 * outputs : outputs, e, 1, 1, 8, 0), shortcut(outputs, channels, 1, 1, 8, 0);
  const bool short_cut = chance(.5);
  const auto w1 = numbers(channels), w2 = numbers(outputs), bias = numbers(outputs), known = numbers(samples * e);
  const int64_t pixels = height * width;
  const auto x = numbers(samples * pixels * channels), residual = numbers(samples * pixels * outputs);
  const ResnetBlock block{{norm(w1, groups), norm(w2, groups)}, first.layer(bias, r), embedding.layer(nullptr, r),
                          second.layer(nullptr, r), short_cut ? shortcut.layer(bias, r) : Layer{}, modulated};
  Exactly<float> y(residual.size);
  CHECK(!quest_resnet_block(&block, x, samples, height, width, channels, known, embedded ? e : 0, residual.when(!short_cut), y,
                            outputs, static_cast<int>(integer(1, 3))));
  const auto normed = group_norm(block.norms[0], x, samples, pixels, true);
  const auto hidden = conv(first, bias, r, normed, samples, height, width, nullptr);
  const auto shift = linear(embedding, nullptr, r, known, samples, false, nullptr);
  const float* given = shift.when(embedded);
  const auto again = group_norm(block.norms[1], hidden, samples, pixels, true, modulated ? nullptr : given,
                                modulated ? given : nullptr);
  const auto added = linear(shortcut, bias, r, x, samples * pixels, false, nullptr, pixels);
  same(y, conv(second, nullptr, r, again, samples, height, width, short_cut ? added : residual));
}

}  // namespace

void test_blocks() {
  for (int i = 0; i < 3; i++) {  // more samples than are computed at a time
    transformer(100, 20, integer(1, 3));
    resnet(100, 7, 6);
  }
  for (int i = 0; i < 30; i++) {
    const int64_t batch = chance(.1) ? 0 : integer(1, 3), n = integer(1, 20), m = integer(1, 20);
    transformer(batch, n, m);
    resnet(batch, integer(1, 7), integer(1, 7));
    const int64_t channels = integer(1, 40), context_channels = integer(1, 40);
    const Attention a(channels, context_channels, integer(1, 3), some_width());
    const auto x = numbers(batch * n * channels), context = numbers(batch * m * context_channels), more = numbers(x.size);
    Exactly<float> y(x.size);
    const float* residual = more.when(chance(.5));
    CHECK(!quest_attention_block(&a.block, x, context, batch, n, channels, m, context_channels, residual, y, channels, 2));
    same(y, a.apart(x, context, batch, n, m, residual));
  }
}

}  // namespace test
