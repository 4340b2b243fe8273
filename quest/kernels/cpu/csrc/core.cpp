// The C functions of abi.h. They check their arguments, and no exception leaves them. Whether an address really has enough
// numbers behind it cannot be checked here; the Python callers are responsible for that (quest/kernels/cpu/core).
#include "driver.h"

#include <cstdio>

#ifndef QUEST_ABI
#error "setup.py gives the hash of abi.h as QUEST_ABI"
#endif

namespace quest {

double* seconds = nullptr;

namespace {

thread_local char message[256] = "";

int failed(Status status, const char* why) {
  std::snprintf(message, sizeof message, "%s", why);
  return status;
}

// Returns the result of `compute`, or the status for the exception that it throws.
template <class Compute>
int guarded(const Compute& compute) noexcept {
  try {
    const Status status = compute();
    if (status == HAS_NAN) return failed(status, "the input holds NaN, or infinity or too large numbers where its scales are dynamic");
    if (status == OUT_OF_RANGE)
      return failed(status, "codes less zero point, or their sums, exceed the integers of the kernel");
    return status;
  } catch (const std::bad_alloc&) {
    return failed(NO_MEMORY, "there is not enough memory");
  } catch (const std::invalid_argument& error) {
    return failed(INVALID, error.what());
  } catch (const std::exception& error) {
    return failed(FAILED, error.what());
  } catch (...) {
    return failed(FAILED, "an exception of unknown kind");
  }
}

// Checks that sizes are not negative.
template <class... Sizes>
void check_sizes(int threads, Sizes... sizes) {
  require(((sizes >= 0) && ...), "a size is negative");
  require(threads > 0, "there must be at least one thread");
}

int64_t span(int64_t size, int64_t padding, int64_t dilation, int64_t kernel, int64_t stride) {
  const int64_t last = size + 2 * padding - dilation * (kernel - 1) - 1;
  return last < 0 ? 0 : last / stride + 1;
}

}  // namespace
}  // namespace quest

using namespace quest;

extern "C" {

const char* quest_abi() { return QUEST_ABI; }

const char* quest_message() { return message; }

const char* quest_isas() { return instruction_sets(); }

const char* quest_isa() { return isa->name; }

int quest_use(const char* name) { return use(name) ? OK : failed(INVALID, "no instruction set of this machine"); }

void quest_use_openmp(void* parallel) { use_region(parallel); }

void quest_time(double* of_kinds) { seconds = of_kinds; }

int64_t quest_packed_bytes(int64_t outputs, int64_t channels, int64_t height, int64_t width, int64_t bits, int64_t group) {
  int64_t bytes = 0;
  guarded([&] { return bytes = layout(outputs, channels, height, width, bits, group).bytes, OK; });
  return bytes;
}

int quest_pack(const uint8_t* codes, const int32_t* zero_points, const float* scales, int64_t outputs, int64_t channels,
               int64_t height, int64_t width, int64_t bits, int64_t group, void* packed, int64_t bytes) {
  return guarded([&] {
    const Weight given = layout(outputs, channels, height, width, bits, group);
    require(packed && given.bytes <= bytes, "there is too little room for the packed weight");
    pack(codes, zero_points, scales, given, *static_cast<Weight*>(packed));
    return OK;
  });
}

int quest_unpack(const void* packed, int64_t bytes, int64_t outputs, int64_t channels, int64_t height, int64_t width,
                 uint8_t* codes) {
  return guarded([&] {
    const Weight& w = weight_of(packed, bytes);
    require(w.outputs == outputs && w.channels == channels && w.height == height && w.width == width,
            "the weight was packed in another shape");
    unpack(w, codes);
    return OK;
  });
}

int quest_linear(const float* x, int64_t rows, int64_t channels, int64_t stride, const void* packed, int64_t bytes,
                 const float* bias, float scale, float low, float high, int dynamic, int64_t tokens, int gated,
                 const float* residual, float* out, int64_t width, int threads) {
  return guarded([&] {
    const Weight& w = weight_of(packed, bytes);
    check_sizes(threads, rows, channels, stride);
    require(w.taps() == 1, "the weight is that of a convolution");
    require(w.channels == channels, "the weight was packed for another number of channels");
    require(!gated || (w.outputs % 2 == 0 && !residual), "a gated layer has an even number of outputs and no residual");
    require((gated ? w.outputs / 2 : w.outputs) == width, "the weight gives another number of outputs");
    require(tokens > 0 && rows % tokens == 0, "the rows are no multiple of the tokens of a sample");
    const Range range{scale, low, high, dynamic};
    check_scales(w, dynamic);
    return linear({&w, bytes, bias, range}, {x, rows, tokens, stride}, gated, {out, residual}, threads);
  });
}

int quest_conv2d(const float* x, int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t sample,
                 int64_t row, int64_t pixel, const void* packed, int64_t bytes, const float* bias, float scale, float low,
                 float high, int dynamic, int64_t stride_y, int64_t stride_x, int64_t padding_y, int64_t padding_x,
                 int64_t dilation_y, int64_t dilation_x, const float* residual, float* out, int64_t outputs,
                 int64_t out_height, int64_t out_width, int threads) {
  return guarded([&] {
    const Weight& w = weight_of(packed, bytes);
    check_sizes(threads, samples, channels, height, width, sample, row, pixel, padding_y, padding_x);
    require(w.channels == channels, "the weight was packed for another number of channels");
    require(w.outputs == outputs, "the weight gives another number of outputs");
    require(stride_y > 0 && stride_x > 0 && dilation_y > 0 && dilation_x > 0, "strides and dilations must be positive");
    require(out_height == span(height, padding_y, dilation_y, w.height, stride_y) &&
                out_width == span(width, padding_x, dilation_x, w.width, stride_x) && out_height > 0 && out_width > 0,
            "the output has another size than the convolution gives, or none");
    check_scales(w, dynamic);
    const Conv c{x,         samples,   height,     width,      sample,   row, pixel,      stride_y, stride_x,
                 padding_y, padding_x, dilation_y, dilation_x, residual, out, out_height, out_width};
    return conv2d({&w, bytes, bias, {scale, low, high, dynamic}}, c, threads);
  });
}

int quest_attention(const float* q, const float* k, const float* v, const int64_t* strides, int64_t batch, int64_t heads,
                    int64_t n, int64_t m, int64_t d, const Range* ranges, float scale, float* out, int threads) {
  return guarded([&] {
    check_sizes(threads, batch, heads, n, m, d);
    check_scales(ranges);
    const Attention a{q, k, v, strides, batch, heads, n, m, d, ranges, scale, out};
    return attention(a, threads);
  });
}

int quest_group_norm(const float* x, int64_t sample, int64_t pixel, int64_t samples, int64_t pixels, int64_t channels,
                     int64_t groups, float eps, const float* weight, const float* bias, const float* shift,
                     const float* modulation, int silu, float* y, int threads) {
  return guarded([&] {
    check_sizes(threads, sample, pixel, samples, pixels, channels);
    require(groups > 0 && channels % groups == 0, "the channels are no multiple of the groups");
    group_norm(x, sample, pixel, samples, pixels, {weight, bias, eps, groups, channels}, shift, modulation, silu, y, threads);
    return OK;
  });
}

int quest_layer_norm(const float* x, int64_t rows, int64_t n, float eps, const float* weight, const float* bias, float* y,
                     int threads) {
  return guarded([&] {
    check_sizes(threads, rows, n);
    layer_norm(x, rows, {weight, bias, eps, 0, n}, y, threads);
    return OK;
  });
}

int quest_fake_quantize(const float* x, int64_t n, float scale, float low, float high, float* out, int threads) {
  return guarded([&] {
    check_sizes(threads, n);
    fake_quantize(x, n, {scale, low, high}, out, threads);
    return OK;
  });
}

int quest_fake_quantize_backward(const float* x, const float* grad, int64_t n, float scale, float low, float high,
                                 float* out, double* of_scale, int threads) {
  return guarded([&] {
    check_sizes(threads, n);
    *of_scale = fake_quantize_backward(x, grad, n, {scale, low, high}, out, threads);
    return OK;
  });
}

int quest_attention_block(const AttentionBlock* block, const float* x, const float* context, int64_t batch, int64_t n,
                          int64_t channels, int64_t m, int64_t context_channels, const float* residual, float* out,
                          int64_t outputs, int threads) {
  return guarded([&] {
    check_sizes(threads, batch, n, m);
    check(*block, channels, context_channels, outputs);
    return attention_block(*block, x, context, batch, n, m, residual, out, threads);
  });
}

int quest_transformer_block(const TransformerBlock* block, const float* x, const float* context, int64_t batch, int64_t n,
                            int64_t channels, int64_t m, int64_t context_channels, float* out, int threads) {
  return guarded([&] {
    check_sizes(threads, batch, n, m);
    check(*block, channels, context_channels);
    return transformer_block(*block, x, context, batch, n, m, context_channels > 0, out, threads);
  });
}

int quest_transformer(const Transformer* transformer, const float* x, const float* context, int64_t batch, int64_t pixels,
                      int64_t channels, int64_t m, int64_t context_channels, float* out, int threads) {
  return guarded([&] {
    check_sizes(threads, batch, pixels, m);
    check(*transformer, channels, context_channels);
    return quest::transformer(*transformer, x, context, batch, pixels, m, context_channels > 0, out, threads);
  });
}

int quest_resnet_block(const ResnetBlock* block, const float* x, int64_t samples, int64_t height, int64_t width,
                       int64_t channels, const float* embedding, int64_t embedding_channels, const float* residual,
                       float* out, int64_t outputs, int threads) {
  return guarded([&] {
    check_sizes(threads, samples, height, width);
    check(*block, channels, embedding_channels, outputs);
    return resnet_block(*block, x, samples, height, width, embedding_channels ? embedding : nullptr, residual, out,
                        threads);
  });
}

}  // extern "C"
