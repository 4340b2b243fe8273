// The C functions of the compiled core and the structs they take. This is their only description: quest/kernels/cpu/core/abi.py
// makes the signatures of ctypes from it, and its hash, which is compiled into the core, shows a core of older source.
// Each declaration stands on its own; types are those in the table of abi.py; comments do not count.
//
// A function that returns an `int` returns a `Status`; quest_message() says more. `threads` is the most it may use.
#pragma once
#include <stdint.h>

namespace quest {

struct Weight;

// Of one quantized tensor: code - zero point = clamp(round(x / scale), low, high).
struct Range {
  float scale;
  float low;
  float high;
};

// A quantized layer: its packed weight and the size of its memory, a bias for each output or null, the range of its input.
struct Layer {
  const Weight* weight;
  int64_t bytes;
  const float* bias;
  Range range;
};

// A group norm or, where `groups` is not read, a layer norm; `channels` weights and biases, or null.
struct Norm {
  const float* weight;
  const float* bias;
  float eps;
  int64_t groups;
  int64_t channels;
};

// An attention with its four layers. ranges: of queries, keys, values and probabilities.
struct AttentionBlock {
  Layer q;
  Layer k;
  Layer v;
  Layer out;
  Range ranges[4];
  float scale;
  int64_t heads;
};

// count: of attentions. only_context: the first one, too, attends to the context. gated, linear: of the feed-forward.
struct TransformerBlock {
  Norm norms[3];
  AttentionBlock attentions[2];
  int64_t count;
  int64_t only_context;
  Layer gated;
  Layer linear;
};

// Two 3x3 convolutions. embedding: not read where a call has none.
struct ResnetBlock {
  Norm norms[2];
  Layer first;
  Layer embedding;
  Layer second;
  int64_t modulated;
};

}  // namespace quest

extern "C" {

// Hash of this file in the source that the core was built from.
const char* quest_abi();

// Why the last call of this thread that failed did so.
const char* quest_message();

// Names of this machine's instruction sets, the best one last, with commas between; the one in use; use another one.
const char* quest_isas();
const char* quest_isa();
int quest_use(const char* name);

// Compute on the threads of the OpenMP runtime whose GOMP_parallel this is.
void quest_use_openmp(void* parallel);

// From now on add the seconds that each Kind of work takes; null: no more. For one caller at a time.
void quest_time(double* of_kinds);

// Runs `iterations` of multiply-accumulates and returns how many that were: of int16 (AVX2) or bytes into int32 as in the
// register tiles of an instruction set, or of "float" with the widest vectors here. 0 where there are no such instructions.
int64_t quest_peak(const char* name, int64_t iterations);

// Size of a packed weight; 0 for what cannot be packed.
int64_t quest_packed_bytes(int64_t outputs, int64_t channels, int64_t height, int64_t width, int64_t bits);

// codes [outputs, channels, height, width] of `bits` (4 or 8) bits, zero points and scales [outputs].
int quest_pack(const uint8_t* codes, const int32_t* zero_points, const float* scales, int64_t outputs, int64_t channels,
               int64_t height, int64_t width, int64_t bits, void* packed, int64_t bytes);

// The codes that quest_pack was given.
int quest_unpack(const void* packed, int64_t bytes, int64_t outputs, int64_t channels, int64_t height, int64_t width,
                 uint8_t* codes);

// x [rows, channels] with rows `stride` apart -> out [rows, width], width: the outputs; gated: out [rows, outputs / 2],
// the first half of the outputs times gelu of the second. residual: of the layout of out, and added to it, or null; null
// if gated.
int quest_linear(const float* x, int64_t rows, int64_t channels, int64_t stride, const void* packed, int64_t bytes,
                 const float* bias, float scale, float low, float high, int gated, const float* residual, float* out,
                 int64_t width, int threads);

// x [samples, height, width, channels] with strides, channels together -> out [samples, out_height, out_width, outputs].
// residual: as in quest_linear.
int quest_conv2d(const float* x, int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t sample,
                 int64_t row, int64_t pixel, const void* packed, int64_t bytes, const float* bias, float scale, float low,
                 float high, int64_t stride_y, int64_t stride_x, int64_t top, int64_t left, int64_t dilation_y,
                 int64_t dilation_x, const float* residual, float* out, int64_t outputs, int64_t out_height,
                 int64_t out_width, int threads);

// q [batch, heads, n, d], k and v [batch, heads, m, d], d together, other strides given (batch, head, row for each of
// q, k, v, out) -> out. ranges: of q, k, v and the probabilities.
int quest_attention(const float* q, const float* k, const float* v, const int64_t* strides, int64_t batch, int64_t heads,
                    int64_t n, int64_t m, int64_t d, const float* ranges, float scale, float* out, int threads);

// x [samples, pixels, channels] with strides -> y, without gaps. shift [samples, channels] and modulation
// [samples, 2 channels] may be null.
int quest_group_norm(const float* x, int64_t sample, int64_t pixel, int64_t samples, int64_t pixels, int64_t channels,
                     int64_t groups, float eps, const float* weight, const float* bias, const float* shift,
                     const float* modulation, int silu, float* y, int threads);

// x [rows, n] -> y.
int quest_layer_norm(const float* x, int64_t rows, int64_t n, float eps, const float* weight, const float* bias, float* y,
                     int threads);

// out = scale * clamp(round(x / scale), low, high).
int quest_fake_quantize(const float* x, int64_t n, float scale, float low, float high, float* out, int threads);

// From the gradient of that out: to `out` the one of x, to `of_scale` that of the scale.
int quest_fake_quantize_backward(const float* x, const float* grad, int64_t n, float scale, float low, float high,
                                 float* out, double* of_scale, int threads);

// x [batch, n, channels] and context [batch, m, context_channels] -> out [batch, n, outputs]: attention with its four
// layers, plus residual, if there is one.
int quest_attention_block(const quest::AttentionBlock* block, const float* x, const float* context, int64_t batch,
                          int64_t n, int64_t channels, int64_t m, int64_t context_channels, const float* residual,
                          float* out, int64_t outputs, int threads);

// x [batch, n, channels] and context [batch, m, context_channels] -> out, of the shape of x. context_channels: 0 where
// there is no context.
int quest_transformer_block(const quest::TransformerBlock* block, const float* x, const float* context, int64_t batch,
                            int64_t n, int64_t channels, int64_t m, int64_t context_channels, float* out, int threads);

// x [samples, height, width, channels], embedding [samples, embedding_channels] after its activation -> out [samples,
// height, width, outputs], of which residual is a part. embedding_channels: 0 where there is no embedding.
int quest_resnet_block(const quest::ResnetBlock* block, const float* x, int64_t samples, int64_t height, int64_t width,
                       int64_t channels, const float* embedding, int64_t embedding_channels, const float* residual,
                       float* out, int64_t outputs, int threads);

}  // extern "C"
