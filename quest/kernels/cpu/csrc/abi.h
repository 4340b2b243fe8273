// The C functions of the compiled core, and their structs. This is their only description. quest/kernels/cpu/core/abi.py
// makes the ctypes signatures from it. Its hash is compiled into the core, so that a core of older source is recognized.
// Only types in the table of abi.py are allowed here. Comments do not change the hash.
//
// A function that returns an `int` returns a `Status`, and quest_message() explains it. `threads` is the largest number of
// threads that it may use.
#pragma once
#include <stdint.h>

namespace quest {

struct Weight;

// The range of a quantized tensor: code - zero point = clamp(round(x / scale), low, high). dynamic: not 0 if scales come from
// the tensor itself, one for each token (1; of a convolution, each pixel), for each sample (2), or for each group of so many
// channels of a token (16 and more). Then `scale` is the share of the numbers' range that codes reach, and low and high are
// the lowest and the highest code.
struct Range {
  float scale;
  float low;
  float high;
  int dynamic;
};

// A quantized layer: its packed weight and the size of that memory, a bias for each output or null, the range of its input.
struct Layer {
  const Weight* weight;
  int64_t bytes;
  const float* bias;
  Range range;
};

// A group norm, or a layer norm, which does not read `groups`. weight and bias have `channels` numbers, or are null.
struct Norm {
  const float* weight;
  const float* bias;
  float eps;
  int64_t groups;
  int64_t channels;
};

// An attention with its four layers. ranges: those of queries, keys, values and probabilities.
struct AttentionBlock {
  Layer q;
  Layer k;
  Layer v;
  Layer out;
  Range ranges[4];
  float scale;
  int64_t heads;
};

// count: number of attentions. only_context: the first one also attends to the context. gated, linear: the layers of the
// feed-forward.
struct TransformerBlock {
  Norm norms[3];
  AttentionBlock attentions[2];
  int64_t count;
  int64_t only_context;
  Layer gated;
  Layer linear;
};

// A transformer on pixels: a group norm, a layer, a transformer block and a layer, plus the input.
struct Transformer {
  Norm norm;
  Layer first;
  TransformerBlock block;
  Layer last;
};

// A residual block with two 3x3 convolutions. embedding: not read if a call has no embedding. modulated: the embedding
// gives a factor and an offset; otherwise it is added. shortcut: a 1x1 convolution of the input, which is added to the output;
// its weight is null if there is none.
struct ResnetBlock {
  Norm norms[2];
  Layer first;
  Layer embedding;
  Layer second;
  Layer shortcut;
  int64_t modulated;
};

}  // namespace quest

extern "C" {

// The hash of this file in the source from which the core was built.
const char* quest_abi();

// Why the last failed call of this thread failed.
const char* quest_message();

// The names of this machine's instruction sets with commas between them, the best one last; the name of the one in use.
// quest_use changes the one in use.
const char* quest_isas();
const char* quest_isa();
int quest_use(const char* name);

// Computes on the threads of an OpenMP runtime from now on. parallel: the address of its GOMP_parallel.
void quest_use_openmp(void* parallel);

// From now on adds the seconds that each Kind of work takes to of_kinds; null ends this. For one caller at a time.
void quest_time(double* of_kinds);

// Runs `iterations` of multiply-accumulates, and returns their number. name: an instruction set, with int16 (AVX2) or bytes
// and sums in int32 as in its register tiles, or "float" with the widest vectors of this machine. Returns 0 if this machine
// has no such instructions.
int64_t quest_peak(const char* name, int64_t iterations);

// The size of a packed weight; 0 if it cannot be packed.
int64_t quest_packed_bytes(int64_t outputs, int64_t channels, int64_t height, int64_t width, int64_t bits, int64_t group);

// Packs codes [outputs, channels, height, width] of 4 or 8 bits, with zero points and scales [outputs, groups]. group: how many
// channels share a scale, of the weight or of its input; a multiple of 16, or all channels. The last group can be smaller.
int quest_pack(const uint8_t* codes, const int32_t* zero_points, const float* scales, int64_t outputs, int64_t channels,
               int64_t height, int64_t width, int64_t bits, int64_t group, void* packed, int64_t bytes);

// Returns the codes that quest_pack packed.
int quest_unpack(const void* packed, int64_t bytes, int64_t outputs, int64_t channels, int64_t height, int64_t width,
                 uint8_t* codes);

// x [rows, channels] -> out [rows, width], where width is the number of outputs. Rows of x are `stride` apart. gated:
// width is half of the outputs, and out is the first half of the outputs times gelu of the second. residual: null, or added
// to out, in its layout; null if gated. scale, low, high and dynamic: the range of x. A sample is `tokens` rows.
int quest_linear(const float* x, int64_t rows, int64_t channels, int64_t stride, const void* packed, int64_t bytes,
                 const float* bias, float scale, float low, float high, int dynamic, int64_t tokens, int gated,
                 const float* residual, float* out, int64_t width, int threads);

// x [samples, height, width, channels] -> out [samples, out_height, out_width, outputs]. sample, row and pixel are the
// strides of x; its channels lie side by side. residual, range: as in quest_linear.
int quest_conv2d(const float* x, int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t sample,
                 int64_t row, int64_t pixel, const void* packed, int64_t bytes, const float* bias, float scale, float low,
                 float high, int dynamic, int64_t stride_y, int64_t stride_x, int64_t padding_y, int64_t padding_x,
                 int64_t dilation_y, int64_t dilation_x, const float* residual, float* out, int64_t outputs,
                 int64_t out_height, int64_t out_width, int threads);

// q [batch, heads, n, d], k and v [batch, heads, m, d] -> out, of the shape of q. strides: of batch, head and row, for q,
// k, v and out; the numbers of a row lie side by side. ranges: those of q, k, v and the probabilities. A dynamic one has a
// scale for each token of each head, but that of v one for each of the d channels of each head.
int quest_attention(const float* q, const float* k, const float* v, const int64_t* strides, int64_t batch, int64_t heads,
                    int64_t n, int64_t m, int64_t d, const quest::Range* ranges, float scale, float* out, int threads);

// x [samples, pixels, channels] -> y, without gaps. sample and pixel are the strides of x. shift [samples, channels] and
// modulation [samples, 2 channels] may be null.
int quest_group_norm(const float* x, int64_t sample, int64_t pixel, int64_t samples, int64_t pixels, int64_t channels,
                     int64_t groups, float eps, const float* weight, const float* bias, const float* shift,
                     const float* modulation, int silu, float* y, int threads);

// Normalizes each row of x [rows, n].
int quest_layer_norm(const float* x, int64_t rows, int64_t n, float eps, const float* weight, const float* bias, float* y,
                     int threads);

// out = scale * clamp(round(x / scale), low, high).
int quest_fake_quantize(const float* x, int64_t n, float scale, float low, float high, float* out, int threads);

// Computes gradients of quest_fake_quantize from that of its result, grad: out gets that of x, of_scale that of the scale.
int quest_fake_quantize_backward(const float* x, const float* grad, int64_t n, float scale, float low, float high,
                                 float* out, double* of_scale, int threads);

// x [batch, n, channels] and context [batch, m, context_channels] -> out [batch, n, outputs]: attention with its four
// layers, plus residual if it is not null.
int quest_attention_block(const quest::AttentionBlock* block, const float* x, const float* context, int64_t batch,
                          int64_t n, int64_t channels, int64_t m, int64_t context_channels, const float* residual,
                          float* out, int64_t outputs, int threads);

// x [batch, n, channels] and context [batch, m, context_channels] -> out, of the shape of x. context_channels: 0 if there
// is no context.
int quest_transformer_block(const quest::TransformerBlock* block, const float* x, const float* context, int64_t batch,
                            int64_t n, int64_t channels, int64_t m, int64_t context_channels, float* out, int threads);

// x [batch, pixels, channels] and context [batch, m, context_channels] -> out, of the shape of x. context_channels: 0 if
// there is no context.
int quest_transformer(const quest::Transformer* transformer, const float* x, const float* context, int64_t batch,
                      int64_t pixels, int64_t channels, int64_t m, int64_t context_channels, float* out, int threads);

// x [samples, height, width, channels], embedding [samples, embedding_channels] after its activation -> out [samples,
// height, width, outputs], to which residual is added if the block has no shortcut. embedding_channels: 0 if there is no
// embedding.
int quest_resnet_block(const quest::ResnetBlock* block, const float* x, int64_t samples, int64_t height, int64_t width,
                       int64_t channels, const float* embedding, int64_t embedding_channels, const float* residual,
                       float* out, int64_t outputs, int threads);

}  // extern "C"
