// Blocks of a denoiser in one call each: what lies between their layers stays in memory that is used again, and a caller in
// Python, whose code the data of a large batch has driven out of the caches, has less to do. The structs are those of
// quest/kernels/cpu/fused.py.
#include "driver.h"

using namespace quest;

namespace {

struct Norm {
  const float *weight, *bias;
  float eps;
  int64_t groups;
};

struct AttentionBlock {
  Layer q, k, v, out;
  float ranges[12];
  float scale;
  int64_t heads;
};

struct TransformerBlock {
  Norm norms[3];
  AttentionBlock attentions[2];
  int64_t count;         // of attentions
  int64_t only_context;  // the first one, too, attends to the context
  Layer gated, linear;   // of the feed-forward
};

struct ResnetBlock {
  Norm norms[2];
  Layer first, embedding, second;
  int64_t modulated;
};

// Places in the memory of the calling thread; a block that calls another one uses others.
enum Place { QUERIES, KEYS, VALUES, ATTENDED, NORMED, HIDDEN, STREAM, OTHER_STREAM, EMBEDDING, PLACES };

float* memory(Place place, int64_t numbers) {
  static thread_local Scratch<float> places[PLACES];
  return places[place].get(numbers);
}

int linear(const Layer& l, const float* x, int64_t rows, bool gated, const float* residual, float* out, int threads) {
  const auto [scale, low, high] = l.range;
  return quest_linear(x, rows, l.weight->channels, l.weight, l.bias, scale, low, high, gated, residual, out, threads);
}

// A 3x3 convolution of stride 1 with its padding, between images whose channels lie innermost.
int conv(const Layer& l, const float* x, int64_t samples, int64_t height, int64_t width, const float* residual, float* out,
         int threads) {
  const int64_t pixel = l.weight->channels, row = width * pixel;
  const auto [scale, low, high] = l.range;
  return quest_conv2d(x, samples, height, width, height * row, row, pixel, l.weight, l.bias, scale, low, high, 1, 1, 1, 1, 1,
                      1, residual, out, height, width, threads);
}

}  // namespace

extern "C" {

// x [batch, n, channels] and context [batch, m, its channels] -> out [batch, n, outputs]: attention with its four layers,
// plus residual, if there is one.
int quest_attention_block(const AttentionBlock* a, const float* x, const float* context, int64_t batch, int64_t n,
                          int64_t m, const float* residual, float* out, int threads) {
  const int64_t width = a->q.weight->outputs, d = width / a->heads, value_width = a->v.weight->outputs;
  float *q = memory(QUERIES, batch * n * width), *k = memory(KEYS, batch * m * width);
  float *v = memory(VALUES, batch * m * value_width), *y = memory(ATTENDED, batch * n * value_width);
  if (int wrong = linear(a->q, x, batch * n, false, nullptr, q, threads)) return wrong;
  if (int wrong = linear(a->k, context, batch * m, false, nullptr, k, threads)) return wrong;
  if (int wrong = linear(a->v, context, batch * m, false, nullptr, v, threads)) return wrong;
  const int64_t strides[12] = {n * width, d, width, m * width, d, width, m * width, d, width, n * width, d, width};
  if (int wrong = quest_attention(q, k, v, strides, batch, a->heads, n, m, d, a->ranges, a->scale, y, threads)) return wrong;
  return linear(a->out, y, batch * n, false, residual, out, threads);
}

// x [batch, n, channels] and context [batch, m, its channels], or null -> out, of the shape of x.
int quest_transformer_block(const TransformerBlock* t, const float* x, const float* context, int64_t batch, int64_t n,
                            int64_t m, float* out, int threads) {
  const int64_t rows = batch * n, channels = t->attentions[0].q.weight->channels;
  float* normed = memory(NORMED, rows * channels);
  const auto norm = [&](int i) {
    quest_layer_norm(x, rows, channels, t->norms[i].eps, t->norms[i].weight, t->norms[i].bias, normed, threads);
  };
  for (int i = 0; i < t->count; i++) {
    const bool outside = context && (i == 1 || t->only_context);
    norm(i);
    float* to = memory(i ? OTHER_STREAM : STREAM, rows * channels);
    if (int wrong = quest_attention_block(t->attentions + i, normed, outside ? context : normed, batch, n,
                                          outside ? m : n, x, to, threads))
      return wrong;
    x = to;
  }
  norm(2);
  if (bytes_fit(t->gated, t->linear)) return quest_feed_forward(&t->gated, &t->linear, normed, rows, x, out, threads);
  float* hidden = memory(HIDDEN, rows * t->linear.weight->channels);
  if (int wrong = linear(t->gated, normed, rows, true, nullptr, hidden, threads)) return wrong;
  return linear(t->linear, hidden, rows, false, x, out, threads);
}

// x [samples, height, width, channels], embedding [samples, its channels], or null, after its activation -> out, of which
// residual is a part. Two 3x3 convolutions.
int quest_resnet_block(const ResnetBlock* b, const float* x, int64_t samples, int64_t height, int64_t width,
                       const float* embedding, const float* residual, float* out, int threads) {
  const int64_t pixels = height * width, channels = b->first.weight->channels, outputs = b->first.weight->outputs;
  const auto norm = [&](int i, const float* from, int64_t c, const float* shift, const float* modulation, float* to) {
    const Norm& n = b->norms[i];
    quest_group_norm(from, pixels * c, c, samples, pixels, c, n.groups, n.eps, n.weight, n.bias, shift, modulation, true,
                     to, threads);
  };
  float* normed = memory(NORMED, samples * pixels * std::max(channels, outputs));
  float* hidden = memory(HIDDEN, samples * pixels * outputs);
  float* known = nullptr;
  norm(0, x, channels, nullptr, nullptr, normed);
  if (int wrong = conv(b->first, normed, samples, height, width, nullptr, hidden, threads)) return wrong;
  if (embedding) {
    known = memory(EMBEDDING, samples * b->embedding.weight->outputs);
    if (int wrong = linear(b->embedding, embedding, samples, false, nullptr, known, threads)) return wrong;
  }
  norm(1, hidden, outputs, b->modulated ? nullptr : known, b->modulated ? known : nullptr, normed);
  return conv(b->second, normed, samples, height, width, residual, out, threads);
}

}  // extern "C"
