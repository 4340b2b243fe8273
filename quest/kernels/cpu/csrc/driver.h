// Declarations that the drivers share: packed weights, convolutions, threads and their memory.
#pragma once
#include "core.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <exception>
#include <functional>
#include <mutex>
#include <new>
#include <stdexcept>
#include <thread>
#include <vector>

namespace quest {

extern const Isa* isa;  // the instruction set in use
const char* instruction_sets();
// Computes with this instruction set from now on. Returns false if the machine does not have it.
bool use(const char* name);

// The result of a function of the ABI. INVALID: the arguments do not fit together, and nothing was computed.
enum Status { OK = 0, HAS_NAN = 1, OUT_OF_RANGE = 2, INVALID = 3, NO_MEMORY = 4, FAILED = 5 };

inline void require(bool condition, const char* otherwise) {
  if (!condition) throw std::invalid_argument(otherwise);
}

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t ceil_div(int64_t n, int64_t by) { return (n + by - 1) / by; }

// Memory that a thread keeps between calls. If there is not enough, get throws std::bad_alloc and the object is empty.
template <class T>
class Scratch {
 public:
  ~Scratch() { release(); }
  T* get(int64_t n) {
    if (n > size_) {
      release();
      data_ = static_cast<T*>(::operator new(round_up(n * sizeof(T), ALIGNMENT), std::align_val_t(ALIGNMENT)));
      size_ = n;
    }
    return data_;
  }

 private:
  static constexpr int64_t ALIGNMENT = 64;
  void release() {
    ::operator delete(data_, std::align_val_t(ALIGNMENT));
    data_ = nullptr, size_ = 0;
  }
  T* data_ = nullptr;
  int64_t size_ = 0;
};

// Calls work(), which must not throw, on this thread and on up to `others` other threads if they are free. The runtime may
// use `threads` threads altogether.
void run(int others, int threads, const std::function<void()>& work);
// Uses the threads of an OpenMP runtime from now on. entry: the address of its GOMP_parallel.
void use_region(void* entry);

// The number of multiply-accumulates that a thread computes while another one wakes up. Other operations count tenfold.
constexpr int64_t WAKE = 1 << 20;

// How many of the allowed threads are worth waking up for this much work.
inline int64_t useful(int threads, int64_t work) { return std::min<int64_t>(threads, 1 + work / WAKE); }

inline thread_local bool helps = false;  // whether this thread computes a part for another one

// Calls task(0), ..., task(tasks - 1) on up to `threads` threads, on fewer for little `work` (multiply-accumulates). Each
// task writes to its own memory, so their order does not matter. If a task throws, no further task begins, and the
// exception is thrown again here.
template <class Task>
void parallel(int64_t tasks, int threads, int64_t work, const Task& task) {
  const int busy = static_cast<int>(std::min(tasks, useful(threads, work)));
  if (busy <= 1) {
    for (int64_t i = 0; i < tasks; i++) task(i);
    return;
  }
  std::atomic<int64_t> next{0};
  std::mutex mutex;
  std::exception_ptr first;  // an exception must not leave its thread
  const auto caller = std::this_thread::get_id();
  run(busy - 1, threads, [&] {
    helps = std::this_thread::get_id() != caller;
    try {
      for (int64_t i; (i = next++) < tasks;) task(i);
    } catch (...) {
      std::lock_guard<std::mutex> lock(mutex);
      if (!first) first = std::current_exception();
      next = tasks;
    }
  });
  if (first) std::rethrow_exception(first);
}

// A packed weight: this header, then zero points, scales and sums, and the codes of each panel of NR outputs. `pack` writes
// it, and `weight_of` checks it.
//
//   header | zero points, int32 | scales, float | sums, int32 | codes of outputs 0..15 | codes of outputs 16..31 | ...
//
// Zero points and scales are ordered [group of channels][output], sums [tap][group of channels][output].
// Within a panel, codes are ordered [tap][four channels][output][channel of the four]. With 8 bits they are stored as the
// signed bytes of a product (see core.h), so they need no unpacking. With 4 bits they are stored as unpack4 reads them.
struct Weight {
  int64_t magic, outputs, channels, height, width, bits;
  int64_t row_sum;   // the sum of |code - zero point| over the weights of an output; the largest of all outputs
  int64_t byte_sum;  // the same of |signed byte|
  int64_t zero_points, scales, sums, codes, bytes;  // offsets
  int64_t group;     // channels that share a scale

  const char* base() const { return reinterpret_cast<const char*>(this); }
  char* base() { return reinterpret_cast<char*>(this); }
  int64_t panels() const { return ceil_div(outputs, NR); }
  int64_t groups() const { return ceil_div(channels, group); }
  int64_t numbers() const { return groups() * panels() * NR; }  // of all groups and outputs
  int64_t padded() const { return round_up(channels, 4); }
  int64_t taps() const { return height * width; }
  int64_t panel_codes() const { return taps() * padded() * NR * bits / 8; }  // bytes
  int offset() const { return bits == 8 ? 128 : 8; }  // a signed byte is a code minus this number
  const uint8_t* panel(int64_t p) const { return reinterpret_cast<const uint8_t*>(base() + codes) + p * panel_codes(); }
  // For each group and output its zero point minus offset(), its scale, and for each tap its sum of codes minus zero point.
  // Zeros fill up the last panel.
  const int32_t* zero_point() const { return reinterpret_cast<const int32_t*>(base() + zero_points); }
  const float* scale() const { return reinterpret_cast<const float*>(base() + scales); }
  const int32_t* sum() const { return reinterpret_cast<const int32_t*>(base() + sums); }
  int32_t sum_of_taps(int64_t i) const {
    int32_t all = 0;
    for (int64_t tap = 0; tap < taps(); tap++) all += sum()[tap * numbers() + i];
    return all;
  }
};

enum Dynamic { STATIC, OF_TOKENS, OF_SAMPLES, OF_GROUPS = 16 };  // Range::dynamic

inline int64_t largest(Range r) { return static_cast<int64_t>(std::max(std::fabs(r.low), std::fabs(r.high))); }

// Throw std::invalid_argument if a weight cannot have these sizes, and if `packed` is no packed weight of `bytes` bytes.
Weight layout(int64_t outputs, int64_t channels, int64_t height, int64_t width, int64_t bits, int64_t group);
const Weight& weight_of(const void* packed, int64_t bytes);
void pack(const uint8_t* codes, const int32_t* zero_points, const float* scales, const Weight& given, Weight& w);
void unpack(const Weight& w, uint8_t* codes);

// Throw std::invalid_argument if a layer or an attention cannot have scales as `dynamic` says (Range::dynamic).
inline void check_scales(const Weight& w, int dynamic) {
  require(dynamic == STATIC || dynamic == OF_TOKENS || dynamic == OF_SAMPLES || dynamic >= OF_GROUPS,
          "no such dynamic scales");
  require(dynamic < OF_GROUPS || dynamic == w.group, "the weight was packed for other groups");
}
inline void check_scales(const Range* of_attention) {
  for (int i = 0; i < 4; i++)
    require(of_attention[i].dynamic == STATIC || of_attention[i].dynamic == OF_TOKENS,
            "the products of an attention have static scales, or those of tokens");
}

enum Kind { LAYERS, ATTENTION, NORMS };  // kinds of work that quest_time measures

extern double* seconds;  // for each Kind; null if nobody measures

// Adds the time of its life to the seconds of a kind of work, on the thread that was called.
class Clock {
 public:
  explicit Clock(Kind kind) : kind_(kind) {
    if (seconds && !helps) start_ = std::chrono::steady_clock::now();
  }
  ~Clock() {
    if (seconds && !helps) seconds[kind_] += std::chrono::duration<double>(std::chrono::steady_clock::now() - start_).count();
  }

 private:
  Kind kind_;
  std::chrono::steady_clock::time_point start_;
};

inline bool in_int16(Range r) { return std::fabs(r.low) <= 32767.f && std::fabs(r.high) <= 32767.f; }

// Whether codes fit into bytes and include those of zero, if the range is dynamic.
inline bool zero_in_bytes(Range r) { return !r.dynamic || (r.low <= 0 && r.high > 0 && r.high - r.low <= 255); }

inline bool fits(const Weight& w, Range r) {
  if (w.groups() > 1 && r.high - r.low > 255) return false;  // in several bytes, channels would not lie group by group
  return in_int16(r) && zero_in_bytes(r) && largest(r) * w.row_sum <= INT32_MAX;
}

// y = x factor[c] + offset[c], then SiLU if `silu`, for the channels c of each sample: [samples, channels].
struct Affine {
  const float *factor, *offset;
  bool silu;
};

// The input of a linear layer: `rows` rows of floats, `stride` apart, in samples of `tokens` rows. Or, if `codes` is not null,
// what they became with the layer's range: codes minus the lowest code, Planes::pixel() bytes a row.
struct Input {
  const float* x;
  int64_t rows, tokens, stride;
  const uint8_t* codes = nullptr;
};

// Where the outputs of a linear layer go. Or, if `codes` is not null, only their codes minus the lowest code in `range`.
struct Output {
  float* out;
  const float* residual = nullptr;  // null, or added to the outputs, in their layout
  uint8_t* codes = nullptr;
  Range range{};
};

struct Conv {
  const float* x;
  int64_t samples, height, width, sample, row, pixel;  // shape and strides of x
  int64_t stride_y, stride_x, top, left, dilation_y, dilation_x;
  const float* residual;  // null, or added to the output, in its layout
  float* out;
  int64_t out_height, out_width;
  const Affine* norm = nullptr;  // null, or what is done to x before it is quantized

  int64_t macs(const Weight& w) const {
    return samples * out_height * out_width * w.outputs * w.channels * w.taps();
  }
};

// The range of each sample of c. Returns none if a number is infinite.
std::vector<Range> of_samples(const Conv& c, int64_t channels, Range r, int threads);

// If `codes` are not null, they take the place of q, k and v: codes minus the lowest code [batch, n or m, heads * d]. If
// `next` is not null, only codes minus the lowest code in next_range go there, [batch, n, heads * d].
struct Attention {
  const float *q, *k, *v;
  const int64_t* strides;  // of batch, head and row, for q, k, v and out
  int64_t batch, heads, n, m, d;
  const Range* range;  // those of q, k, v and the probabilities
  float scale;
  float* out;
  const uint8_t* codes[3] = {};
  uint8_t* next = nullptr;
  Range next_range{};

  int64_t macs() const { return 2 * batch * heads * n * m * d; }
};

// The group norm of one sample [pixels, channels], or of some of its groups:
//   y = normalized(x + shift[c]) * (1 + factor[c]) + offset[c], then SiLU if `silu`.
// x_pixel, y_pixel: pixel strides, in floats. Pointers may be null.
struct GroupNorm {
  int64_t pixels, channels, groups;
  ptrdiff_t x_pixel, y_pixel;
  float eps;
  const float *weight, *bias, *shift, *factor, *offset;
  bool silu;
};
// `work` has room for four times the channels, rounded up to a multiple of 16.
void group_norm(const GroupNorm& n, const float* x, float* y, float* work);

// The drivers compute what the functions of the ABI with these names compute. Their arguments are already checked. They
// compute nothing if there are no rows.
Status linear(const Layer& l, const Input& in, bool gated, const Output& to, int threads);
Status conv2d(const Layer& l, const Conv& c, int threads);
Status attention(const Attention& a, int threads);
// A gated layer, then another layer.
Status feed_forward(const Layer& gated, const Layer& last, const Input& in, const Output& to, int threads);
void group_norm(const float* x, int64_t sample, int64_t pixel, int64_t samples, int64_t pixels, const Norm& norm,
                const float* shift, const float* modulation, bool silu, float* y, int threads);
// Computes the factor and offset (see Affine) of the same norm.
void group_affine(const float* x, int64_t sample, int64_t pixel, int64_t samples, int64_t pixels, const Norm& norm,
                  const float* shift, const float* modulation, float* factor, float* offset, int threads);
void layer_norm(const float* x, int64_t rows, const Norm& norm, float* y, int threads);
void fake_quantize(const float* x, int64_t n, Range range, float* out, int threads);
double fake_quantize_backward(const float* x, const float* grad, int64_t n, Range range, float* out, int threads);
// codes: those of x for the three layers where they are not null, as in Input. Then x and context are not read there.
Status attention_block(const AttentionBlock& a, const float* x, const float* context, int64_t batch, int64_t n, int64_t m,
                       const float* residual, float* out, int threads, const uint8_t* const (&codes)[3] = {});
Status transformer_block(const TransformerBlock& t, const float* x, const float* context, int64_t batch, int64_t n,
                         int64_t m, bool outside, float* out, int threads);
Status transformer(const Transformer& t, const float* x, const float* context, int64_t batch, int64_t pixels, int64_t m,
                   bool outside, float* out, int threads);
Status resnet_block(const ResnetBlock& b, const float* x, int64_t samples, int64_t height, int64_t width,
                    const float* embedding, const float* residual, float* out, int threads);
// Throw std::invalid_argument if the layers of a block, or its inputs, do not fit together. A missing context or embedding
// has 0 channels.
void check(const AttentionBlock& a, int64_t channels, int64_t context_channels, int64_t outputs);
void check(const TransformerBlock& t, int64_t channels, int64_t context_channels);
void check(const Transformer& t, int64_t channels, int64_t context_channels);
void check(const ResnetBlock& b, int64_t channels, int64_t embedding_channels, int64_t outputs);

}  // namespace quest
