// Computes a whole block of a denoiser in one call. Tensors between its layers are in memory that is used again, and where the
// next layer or product has a static range of one byte, they are only codes. Python also has less to do, which matters because
// the data of a large batch has displaced Python's code from the caches.
#include "product.h"

namespace quest {
namespace {

// Places in the memory of the calling thread. A block and the blocks that it calls use different places. Those of three
// layers follow one another.
enum Place {
  QUERIES, KEYS, VALUES, ATTENDED, NORMED, HIDDEN = NORMED + 3, STREAM, OTHER_STREAM, EMBEDDING, AFFINE, SHORTCUT, INNER, OUTER, PLACES
};

float* memory(int place, int64_t numbers) {
  static thread_local Scratch<float> places[PLACES];
  return places[place].get(numbers);
}

uint8_t* bytes(int place, int64_t rows, int64_t row) {
  static thread_local Scratch<uint8_t> places[PLACES];
  return rows_of(places[place], rows, row);
}

// Bytes of floats between the layers of a block. They stay in the second cache of a processor core, because only so many
// samples are computed at a time. But these have at least so many rows, because each layer unpacks its weight for each part.
constexpr int64_t BETWEEN = 1 << 20, LEAST_ROWS = 256;

// Calls compute(first sample, number of samples, threads) for parts of the samples, which have `rows` rows and `numbers`
// floats between layers each. Returns the status that one call for all samples would return.
template <class Compute>
Status in_parts(int64_t samples, int64_t rows, int64_t numbers, int threads, const Compute& compute) {
  const int64_t some = std::max(ceil_div(LEAST_ROWS, std::max<int64_t>(1, rows)), BETWEEN / (4 * numbers + 1));
  if (ceil_div(samples, some) < std::max(2, threads)) return compute(0, samples, threads);
  const int64_t parts = blocks_of(samples, some, threads);
  std::atomic<int> wrong{FAILED};
  parallel(parts, threads, threads * WAKE, [&](int64_t i) {
    const int64_t first = i * samples / parts;
    const int status = compute(first, (i + 1) * samples / parts - first, 1);
    for (int now = wrong; status && status < now && !wrong.compare_exchange_weak(now, status);) {}
  });
  return wrong == FAILED ? OK : static_cast<Status>(wrong.load());
}

// What a norm of rows gives some layers: its codes if each of them takes codes, otherwise floats.
struct Normed {
  const float* floats = nullptr;
  const uint8_t* codes[3] = {};
  bool nan = false;  // whether a number had to become a code but is NaN
};

// layers: those that read the norm of `samples` of `tokens` rows of n numbers; null ones do not. whole(y) computes the norm of
// all rows, some_rows(sample, x, rows, y) that of some rows of a sample, which become codes while they are in the first cache.
template <class Whole, class Some>
Normed normed_for(const Layer* const (&layers)[3], const float* x, int64_t samples, int64_t tokens, int64_t n, int threads,
                  const Whole& whole, const Some& some_rows) {
  const int64_t rows = samples * tokens, block = std::max<int64_t>(1, NORMED_TOGETHER / n), blocks = ceil_div(tokens, block);
  Normed result;
  std::vector<Planes> planes;
  std::vector<uint8_t*> codes;
  for (int i = 0; i < 3; i++) {
    if (!layers[i]) continue;
    if (!as_codes(layers[i]->range)) {
      float* floats = memory(NORMED, rows * n);
      whole(floats);
      return {floats};
    }
    planes.emplace_back(layers[i]->range, n, false);
    codes.push_back(bytes(NORMED + i, rows, planes.back().pixel()));
    result.codes[i] = codes.back();
  }
  const Clock clock(NORMS);
  std::atomic<bool> nan{false};
  parallel(samples * blocks, threads, 10 * rows * n, [&](int64_t task) {
    static thread_local Scratch<float> memory;
    const int64_t sample = task / blocks, begin = task % blocks * block, first = sample * tokens + begin;
    const int64_t count = std::min(tokens - begin, block);
    float* y = memory.get(block * n);
    bool wrong = false;
    some_rows(sample, x + first * n, count, y);
    for (size_t i = 0; i < planes.size(); i++) {
      const int64_t row = planes[i].pixel();
      wrong |= planes[i].quantize_rows(y, n, count, codes[i] + first * row, row);
    }
    if (wrong) nan = true;
  });
  result.nan = nan;
  return result;
}

Normed layer_norm(const float* x, int64_t rows, const Norm& norm, const Layer* const (&layers)[3], int threads) {
  const int64_t n = norm.channels;
  return normed_for(layers, x, 1, rows, n, threads, [&](float* y) { layer_norm(x, rows, norm, y, threads); },
                    [&](int64_t, const float* from, int64_t count, float* y) {
                      for (int64_t r = 0; r < count; r++)
                        isa->layer_norm(from + r * n, n, norm.eps, norm.weight, norm.bias, y + r * n);
                    });
}

// What a group norm does to x [samples, pixels, channels], and SiLU.
Affine affine_of(const float* x, int64_t samples, int64_t pixels, const Norm& norm, const float* shift, const float* modulation,
                 bool silu, int threads) {
  const int64_t c = norm.channels;
  float *factor = memory(AFFINE, 2 * samples * c), *offset = factor + samples * c;
  group_affine(x, pixels * c, c, samples, pixels, norm, shift, modulation, factor, offset, threads);
  return {factor, offset, silu};
}

Normed group_norm(const float* x, int64_t samples, int64_t pixels, const Norm& norm, const Layer& layer, int threads) {
  const int64_t n = norm.channels, sample = pixels * n;
  Affine by{};
  if (as_codes(layer.range)) by = affine_of(x, samples, pixels, norm, nullptr, nullptr, false, threads);
  return normed_for({&layer}, x, samples, pixels, n, threads,
                    [&](float* y) { group_norm(x, sample, n, samples, pixels, norm, nullptr, nullptr, false, y, threads); },
                    [&](int64_t i, const float* from, int64_t count, float* y) {
                      isa->scale_channels(from, n, count, n, by.factor + i * n, by.offset + i * n, by.silu, y, n);
                    });
}

void check(const Layer& l, int64_t channels, int64_t side, const char* otherwise) {
  const Weight& w = weight_of(l.weight, l.bytes);
  require(w.channels == channels && w.height == side && w.width == side, otherwise);
  check_scales(w, l.range.dynamic);
}

void check(const Norm& norm, int64_t channels, bool groups) {
  require(norm.channels == channels, "a norm has other channels than what it normalizes");
  require(!groups || (norm.groups > 0 && channels % norm.groups == 0), "the channels are no multiple of the groups of a norm");
}

}  // namespace

void check(const AttentionBlock& a, int64_t channels, int64_t context_channels, int64_t outputs) {
  check(a.q, channels, 1, "the queries' layer takes another number of channels");
  check(a.k, context_channels, 1, "the keys' layer takes another number of channels than the context has");
  check(a.v, context_channels, 1, "the values' layer takes another number of channels than the context has");
  const int64_t width = a.q.weight->outputs;
  require(a.k.weight->outputs == width && a.v.weight->outputs == width && a.heads > 0 && width % a.heads == 0,
          "queries, keys and values are not equally wide, or not a multiple of the heads");
  check(a.out, width, 1, "the last layer takes another number of channels than the values have");
  require(a.out.weight->outputs == outputs, "the last layer gives another number of channels than the output has");
  check_scales(a.ranges);
}

void check(const TransformerBlock& t, int64_t channels, int64_t context_channels) {
  require(t.count == 1 || t.count == 2, "a transformer block has one attention or two");
  for (int i = 0; i < t.count; i++) {
    check(t.norms[i], channels, false);
    check(t.attentions[i], channels, context_channels && (i == 1 || t.only_context) ? context_channels : channels, channels);
  }
  check(t.norms[2], channels, false);
  check(t.gated, channels, 1, "the feed-forward's first layer takes another number of channels");
  require(t.gated.weight->outputs % 2 == 0, "the outputs of a gated layer are not even");
  check(t.linear, t.gated.weight->outputs / 2, 1, "the feed-forward's layers do not belong together");
  require(t.linear.weight->outputs == channels, "the feed-forward gives another number of channels");
}

void check(const Transformer& t, int64_t channels, int64_t context_channels) {
  check(t.norm, channels, true);
  check(t.first, channels, 1, "the transformer's first layer takes another number of channels");
  check(t.block, t.first.weight->outputs, context_channels);
  check(t.last, t.first.weight->outputs, 1, "the transformer's last layer takes another number of channels");
  require(t.last.weight->outputs == channels, "the transformer gives another number of channels");
}

void check(const ResnetBlock& b, int64_t channels, int64_t embedding_channels, int64_t outputs) {
  check(b.norms[0], channels, true);
  check(b.first, channels, 3, "the first convolution takes another number of channels, or is not 3x3");
  check(b.norms[1], b.first.weight->outputs, true);
  check(b.second, b.first.weight->outputs, 3, "the second convolution takes another number of channels, or is not 3x3");
  require(b.second.weight->outputs == outputs, "the second convolution gives another number of channels");
  require(b.first.weight->outputs == outputs, "the two convolutions give different numbers of channels");
  if (b.shortcut.weight) {
    check(b.shortcut, channels, 1, "the shortcut takes another number of channels");
    require(b.shortcut.weight->outputs == outputs, "the shortcut gives another number of channels");
  }
  if (!embedding_channels) return;
  check(b.embedding, embedding_channels, 1, "the embedding's layer takes another number of channels");
  require(b.embedding.weight->outputs == (b.modulated ? 2 : 1) * b.first.weight->outputs,
          "the embedding's layer gives another number of channels than the norm takes");
}

Status attention_block(const AttentionBlock& a, const float* x, const float* context, int64_t batch, int64_t n, int64_t m,
                       const float* residual, float* out, int threads, const uint8_t* const (&codes)[3]) {
  const int64_t width = a.q.weight->outputs, d = width / a.heads, outputs = a.out.weight->outputs;
  const int64_t channels = a.q.weight->channels, context_channels = a.k.weight->channels;
  const int64_t numbers = n * (channels + 2 * width + outputs) + m * (context_channels + 2 * width);
  const Layer* layers[3] = {&a.q, &a.k, &a.v};
  const int64_t lengths[3] = {n, m, m};
  // Whether queries, keys and values, and what is attended, are only codes. Without keys, there are no products.
  const bool coded = m && width % NR == 0 && std::all_of(a.ranges, a.ranges + 3, as_codes);
  const bool passed_on = m && width % 4 == 0 && as_codes(a.out.range);
  return in_parts(batch, n, numbers, threads, [&](int64_t b, int64_t some, int threads) {
    float* floats[3] = {};
    uint8_t* as_bytes[3] = {};
    for (int i = 0; i < 3; i++) {
      const Layer& l = *layers[i];
      const int64_t rows = some * lengths[i], first = b * lengths[i];
      Input in{nullptr, rows, lengths[i], l.weight->channels};
      if (codes[i]) {
        in.codes = codes[i] + first * Planes(l.range, in.stride, false).pixel();
      } else {
        in.x = (i ? context : x) + first * in.stride;
      }
      if (coded) {
        as_bytes[i] = bytes(QUERIES + i, rows, width);
      } else {
        floats[i] = memory(QUERIES + i, rows * width);
      }
      if (Status wrong = linear(l, in, false, {floats[i], nullptr, as_bytes[i], a.ranges[i]}, threads)) return wrong;
    }
    float* y = passed_on ? nullptr : memory(ATTENDED, some * n * width);
    uint8_t* next = passed_on ? bytes(ATTENDED, some * n, width) : nullptr;
    const int64_t strides[12] = {n * width, d, width, m * width, d, width, m * width, d, width, n * width, d, width};
    const Attention products{floats[0], floats[1], floats[2], strides, some, a.heads, n, m, d, a.ranges, a.scale, y,
                             {as_bytes[0], as_bytes[1], as_bytes[2]}, next, a.out.range};
    if (Status wrong = attention(products, threads)) return wrong;
    const int64_t at = b * n * outputs;
    return linear(a.out, {y, some * n, n, width, next}, false, {out + at, residual ? residual + at : nullptr}, threads);
  });
}

Status transformer_block(const TransformerBlock& t, const float* all, const float* context, int64_t batch, int64_t n,
                         int64_t m, bool outside, float* out, int threads) {
  const int64_t channels = t.attentions[0].q.weight->channels, context_channels = t.attentions[t.count - 1].k.weight->channels;
  return in_parts(batch, n, 8 * n * channels, threads, [&](int64_t b, int64_t some, int threads) {
    const int64_t rows = some * n, at = b * n * channels;
    const float* x = all + at;
    for (int i = 0; i < t.count; i++) {
      const AttentionBlock& a = t.attentions[i];
      const bool there = outside && (i == 1 || t.only_context);
      const Normed normed = layer_norm(x, rows, t.norms[i], {&a.q, there ? nullptr : &a.k, there ? nullptr : &a.v}, threads);
      if (normed.nan) return HAS_NAN;
      const float* from = there ? context + b * m * context_channels : normed.floats;
      float* to = memory(i ? OTHER_STREAM : STREAM, rows * channels);
      if (Status wrong = attention_block(a, normed.floats, from, some, n, there ? m : n, x, to, threads, normed.codes))
        return wrong;
      x = to;
    }
    const Normed normed = layer_norm(x, rows, t.norms[2], {&t.gated}, threads);
    if (normed.nan) return HAS_NAN;
    return feed_forward(t.gated, t.linear, {normed.floats, rows, n, channels, normed.codes[0]}, {out + at, x}, threads);
  });
}

Status transformer(const Transformer& t, const float* all, const float* context, int64_t batch, int64_t pixels, int64_t m,
                   bool outside, float* out, int threads) {
  const int64_t channels = t.norm.channels, width = t.first.weight->outputs;
  const int64_t context_channels = t.block.attentions[t.block.count - 1].k.weight->channels;
  return in_parts(batch, pixels, pixels * (2 * channels + 8 * width), threads, [&](int64_t b, int64_t some, int threads) {
    const int64_t rows = some * pixels, at = b * pixels * channels;
    const float *x = all + at, *to = outside ? context + b * m * context_channels : nullptr;
    const Normed normed = group_norm(x, some, pixels, t.norm, t.first, threads);
    if (normed.nan) return HAS_NAN;
    float *before = memory(INNER, rows * width), *after = memory(OUTER, rows * width);
    if (Status wrong = linear(t.first, {normed.floats, rows, pixels, channels, normed.codes[0]}, false, {before}, threads))
      return wrong;
    if (Status wrong = transformer_block(t.block, before, to, some, pixels, m, outside, after, threads)) return wrong;
    return linear(t.last, {after, rows, pixels, width}, false, {out + at, x}, threads);
  });
}

Status resnet_block(const ResnetBlock& b, const float* x, int64_t samples, int64_t height, int64_t width,
                    const float* embedding, const float* residual, float* out, int threads) {
  const int64_t pixels = height * width, channels = b.first.weight->channels, outputs = b.first.weight->outputs;
  const int64_t known_width = embedding ? b.embedding.weight->outputs : 0;
  float* known = nullptr;
  if (embedding) {
    known = memory(EMBEDDING, samples * known_width);
    const Input in{embedding, samples, 1, b.embedding.weight->channels};
    if (Status wrong = linear(b.embedding, in, false, {known}, threads)) return wrong;
  }
  const int64_t numbers = pixels * (2 * channels + 3 * outputs);
  return in_parts(samples, pixels, numbers, threads, [&](int64_t first, int64_t some, int threads) {
    // A norm, SiLU and a 3x3 convolution with stride 1 and padding 1. Channels lie innermost.
    const auto layers = [&](const Layer& l, const Norm& norm, const float* from, const float* shift, const float* modulation,
                            const float* residual, float* to) {
      const int64_t c = norm.channels, sample = pixels * c;
      Conv conv{from, some, height, width, sample, width * c, c, 1, 1, 1, 1, 1, 1, residual, to, height, width};
      if (l.range.dynamic == OF_SAMPLES) {  // its ranges are those of all numbers, so these come first
        float* normed = memory(NORMED, some * sample);
        group_norm(from, sample, c, some, pixels, norm, shift, modulation, true, normed, threads);
        conv.x = normed;
        return conv2d(l, conv, threads);
      }
      const Affine by = affine_of(from, some, pixels, norm, shift, modulation, true, threads);
      conv.norm = &by;
      return conv2d(l, conv, threads);
    };
    const float* more = known ? known + first * known_width : nullptr;
    float* hidden = memory(HIDDEN, some * pixels * outputs);
    if (Status wrong = layers(b.first, b.norms[0], x + first * pixels * channels, nullptr, nullptr, nullptr, hidden))
      return wrong;
    const int64_t at = first * pixels * outputs;
    const float* added = residual ? residual + at : nullptr;
    if (b.shortcut.weight) {
      float* shortcut = memory(SHORTCUT, some * pixels * outputs);
      const Input in{x + first * pixels * channels, some * pixels, pixels, channels};
      if (Status wrong = linear(b.shortcut, in, false, {shortcut}, threads)) return wrong;
      added = shortcut;
    }
    return layers(b.second, b.norms[1], hidden, b.modulated ? nullptr : more, b.modulated ? more : nullptr, added, out + at);
  });
}

}  // namespace quest
