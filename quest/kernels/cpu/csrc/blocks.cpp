// Computes a whole block of a denoiser in one call. Tensors between its layers are in memory that is used again. Python also
// has less to do, which matters because the data of a large batch has displaced Python's code from the caches.
#include "driver.h"

namespace quest {
namespace {

// Places in the memory of the calling thread. A block and the blocks that it calls use different places.
enum Place { QUERIES, KEYS, VALUES, ATTENDED, NORMED, HIDDEN, STREAM, OTHER_STREAM, EMBEDDING, PLACES };

float* memory(Place place, int64_t numbers) {
  static thread_local Scratch<float> places[PLACES];
  return places[place].get(numbers);
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
  float *q = memory(QUERIES, batch * n * width), *k = memory(KEYS, batch * m * width);
  float *v = memory(VALUES, batch * m * value_width), *y = memory(ATTENDED, batch * n * value_width);
  if (Status wrong = linear(a.q, x, batch, n, nullptr, q, threads)) return wrong;
  if (Status wrong = linear(a.k, context, batch, m, nullptr, k, threads)) return wrong;
  if (Status wrong = linear(a.v, context, batch, m, nullptr, v, threads)) return wrong;
  const int64_t strides[12] = {n * width, d, width, m * width, d, width, m * width, d, width, n * width, d, width};
  const Attention products{q, k, v, strides, batch, a.heads, n, m, d, a.ranges, a.scale, y};
  if (Status wrong = attention(products, threads)) return wrong;
  return linear(a.out, y, batch, n, residual, out, threads);
}

Status transformer_block(const TransformerBlock& t, const float* x, const float* context, int64_t batch, int64_t n,
                         int64_t m, bool outside, float* out, int threads) {
  const int64_t rows = batch * n, channels = t.attentions[0].q.weight->channels;
  float* normed = memory(NORMED, rows * channels);
  for (int i = 0; i < t.count; i++) {
    const bool there = outside && (i == 1 || t.only_context);
    layer_norm(x, rows, t.norms[i], normed, threads);
    float* to = memory(i ? OTHER_STREAM : STREAM, rows * channels);
    if (Status wrong = attention_block(t.attentions[i], normed, there ? context : normed, batch, n, there ? m : n, x, to,
                                       threads))
      return wrong;
    x = to;
  }
  layer_norm(x, rows, t.norms[2], normed, threads);
  return feed_forward(t.gated, t.linear, normed, rows, n, x, out, threads);
}

Status resnet_block(const ResnetBlock& b, const float* x, int64_t samples, int64_t height, int64_t width,
                    const float* embedding, const float* residual, float* out, int threads) {
  const int64_t pixels = height * width, channels = b.first.weight->channels, outputs = b.first.weight->outputs;
  const auto norm = [&](int i, const float* from, const float* shift, const float* modulation, float* to) {
    const int64_t c = b.norms[i].channels;
    group_norm(from, pixels * c, c, samples, pixels, b.norms[i], shift, modulation, true, to, threads);
  };
  float* normed = memory(NORMED, samples * pixels * std::max(channels, outputs));
  float* hidden = memory(HIDDEN, samples * pixels * outputs);
  float* known = nullptr;
  norm(0, x, nullptr, nullptr, normed);
  if (Status wrong = conv(b.first, normed, samples, height, width, nullptr, hidden, threads)) return wrong;
  if (embedding) {
    known = memory(EMBEDDING, samples * b.embedding.weight->outputs);
    if (Status wrong = linear(b.embedding, embedding, samples, 1, nullptr, known, threads)) return wrong;
  }
  norm(1, hidden, b.modulated ? nullptr : known, b.modulated ? known : nullptr, normed);
  return conv(b.second, normed, samples, height, width, residual, out, threads);
}

}  // namespace quest
