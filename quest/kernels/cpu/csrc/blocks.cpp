// Computes a whole block of a denoiser in one call. Tensors between its layers are in memory that is used again. Python also
// has less to do, which matters because the data of a large batch has displaced Python's code from the caches.
#include "product.h"

namespace quest {
namespace {

// Places in the memory of the calling thread. A block and the blocks that it calls use different places.
enum Place { QUERIES, KEYS, VALUES, ATTENDED, NORMED, HIDDEN, STREAM, OTHER_STREAM, EMBEDDING, PLACES };

float* memory(Place place, int64_t numbers) {
  static thread_local Scratch<float> places[PLACES];
  return places[place].get(numbers);
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

Status linear(const Layer& l, const float* x, int64_t samples, int64_t tokens, const float* residual, float* out,
              int threads) {
  return linear(l, x, samples * tokens, tokens, l.weight->channels, false, residual, out, threads);
}

// A 3x3 convolution with stride 1 and padding 1. Channels of input and output lie innermost.
Status conv(const Layer& l, const float* x, int64_t samples, int64_t height, int64_t width, const float* residual,
            float* out, int threads) {
  const int64_t pixel = l.weight->channels, row = width * pixel;
  const Conv c{x, samples, height, width, height * row, row, pixel, 1, 1, 1, 1, 1, 1, residual, out, height, width};
  return conv2d(l, c, threads);
}

void check(const Layer& l, int64_t channels, int64_t side, const char* otherwise) {
  const Weight& w = weight_of(l.weight, l.bytes);
  require(w.channels == channels && w.height == side && w.width == side, otherwise);
  check_scales(w, l.range.dynamic);
}

void check(const Norm& norm, int64_t channels, bool groups) {
  require(norm.channels == channels && (!groups || (norm.groups > 0 && channels % norm.groups == 0)),
          "a norm has other channels than what it normalizes");
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

void check(const ResnetBlock& b, int64_t channels, int64_t embedding_channels, int64_t outputs) {
  check(b.norms[0], channels, true);
  check(b.first, channels, 3, "the first convolution takes another number of channels, or is not 3x3");
  check(b.norms[1], b.first.weight->outputs, true);
  check(b.second, b.first.weight->outputs, 3, "the second convolution takes another number of channels, or is not 3x3");
  require(b.second.weight->outputs == outputs, "the second convolution gives another number of channels");
  require(b.first.weight->outputs == outputs, "the two convolutions give different numbers of channels");
  if (!embedding_channels) return;
  check(b.embedding, embedding_channels, 1, "the embedding's layer takes another number of channels");
  require(b.embedding.weight->outputs == (b.modulated ? 2 : 1) * b.first.weight->outputs,
          "the embedding's layer gives another number of channels than the norm takes");
}

Status attention_block(const AttentionBlock& a, const float* x, const float* context, int64_t batch, int64_t n, int64_t m,
                       const float* residual, float* out, int threads) {
  const int64_t width = a.q.weight->outputs, d = width / a.heads, value_width = a.v.weight->outputs;
  const int64_t channels = a.q.weight->channels, context_channels = a.k.weight->channels, outputs = a.out.weight->outputs;
  const int64_t numbers = n * (channels + width + value_width + outputs) + m * (context_channels + width + value_width);
  return in_parts(batch, n, numbers, threads, [&](int64_t b, int64_t some, int threads) {
    float *q = memory(QUERIES, some * n * width), *k = memory(KEYS, some * m * width);
    float *v = memory(VALUES, some * m * value_width), *y = memory(ATTENDED, some * n * value_width);
    const float *from = x + b * n * channels, *to = context + b * m * context_channels;
    if (Status wrong = linear(a.q, from, some, n, nullptr, q, threads)) return wrong;
    if (Status wrong = linear(a.k, to, some, m, nullptr, k, threads)) return wrong;
    if (Status wrong = linear(a.v, to, some, m, nullptr, v, threads)) return wrong;
    const int64_t strides[12] = {n * width, d, width, m * width, d, width, m * width, d, width, n * width, d, width};
    const Attention products{q, k, v, strides, some, a.heads, n, m, d, a.ranges, a.scale, y};
    if (Status wrong = attention(products, threads)) return wrong;
    const int64_t at = b * n * outputs;
    return linear(a.out, y, some, n, residual ? residual + at : nullptr, out + at, threads);
  });
}

Status transformer_block(const TransformerBlock& t, const float* all, const float* context, int64_t batch, int64_t n,
                         int64_t m, bool outside, float* out, int threads) {
  const int64_t channels = t.attentions[0].q.weight->channels, context_channels = t.attentions[t.count - 1].k.weight->channels;
  return in_parts(batch, n, 8 * n * channels, threads, [&](int64_t b, int64_t some, int threads) {
    const int64_t rows = some * n, at = b * n * channels;
    const float* x = all + at;
    float* normed = memory(NORMED, rows * channels);
    for (int i = 0; i < t.count; i++) {
      const bool there = outside && (i == 1 || t.only_context);
      layer_norm(x, rows, t.norms[i], normed, threads);
      float* to = memory(i ? OTHER_STREAM : STREAM, rows * channels);
      if (Status wrong = attention_block(t.attentions[i], normed, there ? context + b * m * context_channels : normed, some, n,
                                         there ? m : n, x, to, threads))
        return wrong;
      x = to;
    }
    layer_norm(x, rows, t.norms[2], normed, threads);
    return feed_forward(t.gated, t.linear, normed, rows, n, x, out + at, threads);
  });
}

Status resnet_block(const ResnetBlock& b, const float* x, int64_t samples, int64_t height, int64_t width,
                    const float* embedding, const float* residual, float* out, int threads) {
  const int64_t pixels = height * width, channels = b.first.weight->channels, outputs = b.first.weight->outputs;
  const int64_t known_width = embedding ? b.embedding.weight->outputs : 0;
  float* known = nullptr;
  if (embedding) {
    known = memory(EMBEDDING, samples * known_width);
    if (Status wrong = linear(b.embedding, embedding, samples, 1, nullptr, known, threads)) return wrong;
  }
  const int64_t numbers = pixels * (2 * channels + 3 * outputs);
  return in_parts(samples, pixels, numbers, threads, [&](int64_t first, int64_t some, int threads) {
    const float* more = known ? known + first * known_width : nullptr;
    const auto norm = [&](int i, const float* from, const float* shift, const float* modulation, float* to) {
      const int64_t c = b.norms[i].channels;
      group_norm(from, pixels * c, c, some, pixels, b.norms[i], shift, modulation, true, to, threads);
    };
    float* normed = memory(NORMED, some * pixels * std::max(channels, outputs));
    float* hidden = memory(HIDDEN, some * pixels * outputs);
    norm(0, x + first * pixels * channels, nullptr, nullptr, normed);
    if (Status wrong = conv(b.first, normed, some, height, width, nullptr, hidden, threads)) return wrong;
    norm(1, hidden, b.modulated ? nullptr : more, b.modulated ? more : nullptr, normed);
    const int64_t at = first * pixels * outputs;
    return conv(b.second, normed, some, height, width, residual ? residual + at : nullptr, out + at, threads);
  });
}

}  // namespace quest
