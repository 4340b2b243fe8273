// What cannot be computed: every refusal is a status, and so is every allocation that fails, on any thread.
#include <cstring>
#include <new>
#include <thread>

#include "packed.h"

namespace {
std::atomic<int64_t> left{-1};  // allocations until one fails; negative: none does

void* allocate(std::size_t size, std::size_t alignment) {
  if (left >= 0 && left-- == 0) throw std::bad_alloc();
  const std::size_t whole = (std::max<std::size_t>(size, 1) + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, whole);
  if (!memory) throw std::bad_alloc();
  return memory;
}
}  // namespace

void* operator new(std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) { return allocate(size, static_cast<std::size_t>(alignment)); }
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace test {
namespace {

using namespace quest;

// Lets the first, the second, the third ... allocation of a call fail, each time on a thread whose memory is new, until
// none is left: then the result is right.
template <class Call>
void starve(const Exactly<float>& out, const Call& call) {
  Exactly<float> expected(out.size);
  CHECK(!call(static_cast<float*>(expected)));
  int64_t failed = 0;
  for (int status = NO_MEMORY; status; failed++) {
    Exactly<float> found(out.size, [] { return NAN; });
    std::thread caller([&] {
      left = failed;
      status = call(static_cast<float*>(found));
      left = -1;
    });
    caller.join();
    CHECK(status == NO_MEMORY || status == OK);
    CHECK(failed < 1000);
    if (status == OK)
      for (int64_t i = 0; i < out.size; i++) CHECK(found[i] == expected[i]);
  }
  CHECK(failed > 1);
}

void memory() {
  const Range r{.05f, -128, 127};
  for (int threads : {1, 3}) {
    const int64_t rows = 300, channels = 70, outputs = 128;  // enough for three threads
    const Packed w(outputs, channels, 1, 1, 8, 0);
    const Exactly<float> x(rows * channels, [&] { return input(r); });
    for (int gated : {0, 1})
      starve(Exactly<float>(rows * (gated ? outputs / 2 : outputs)), [&](float* out) {
        return quest_linear(x, rows, channels, channels, w.memory, w.memory.size, nullptr, r.scale, r.low, r.high, 0, 1,
                            gated, nullptr, out, gated ? outputs / 2 : outputs, threads);
      });
    const int64_t side = 16, size = side * side;
    const Packed kernel(32, 20, 3, 3, 4, 0);
    const Exactly<float> image(3 * size * 20, [&] { return input(r); }), residual(3 * size * 32, [] { return number(); });
    for (int dynamic : {0, 1})
      for (int64_t stride : {1, 2})
        starve(Exactly<float>(3 * size * 32 / stride / stride), [&](float* out) {
          return quest_conv2d(image, 3, 20, side, side, size * 20, side * 20, 20, kernel.memory, kernel.memory.size, nullptr,
                              r.scale, -127, 127, dynamic, stride, stride, 1, 1, 1, 1, residual.when(stride == 1), out, 32,
                              side / stride, side / stride, threads);
        });
    const int64_t n = 120, d = 24;
    const Exactly<float> q(4 * n * d, [&] { return input(r); });
    const int64_t strides[12] = {2 * n * d, d, 2 * d, 2 * n * d, d, 2 * d, 2 * n * d, d, 2 * d, 2 * n * d, d, 2 * d};
    const Range own{1, -127, 127, 1};
    const Range fixed[4] = {r, r, r, {1.f / 255, 0, 255}}, dynamic[4] = {own, own, own, {1, 0, 255, 1}};
    for (const Range* ranges : {fixed, dynamic})
      starve(Exactly<float>(4 * n * d), [&](float* out) {
        return quest_attention(q, q, q, strides, 2, 2, n, n, d, ranges, .2f, out, threads);
      });
    const Exactly<float> affine(20, [] { return number(); });
    starve(Exactly<float>(3 * size * 20), [&](float* out) {
      return quest_group_norm(image, size * 20, 20, 3, size, 20, 5, 1e-5f, affine, affine, nullptr, nullptr, 1, out, threads);
    });
    const Packed first(32, 20, 3, 3, 4, 0), second(32, 32, 3, 3, 4, 0), embedding(32, 9, 1, 1, 4, 0);
    const Exactly<float> wide(32, [] { return number(); }), known(3 * 9, [] { return number(); });
    const ResnetBlock block{{{affine, affine, 1e-5f, 5, 20}, {wide, wide, 1e-5f, 4, 32}}, first.layer(nullptr, r),
                            embedding.layer(nullptr, r), second.layer(nullptr, r), 0};
    starve(residual, [&](float* out) {
      return quest_resnet_block(&block, image, 3, side, side, 20, known, 9, residual, out, 32, threads);
    });
  }
}

void refused(int status, const char* why) {
  CHECK(status == INVALID);
  if (!std::strstr(quest_message(), why)) std::fprintf(stderr, "message: %s\n", quest_message());
  CHECK(std::strstr(quest_message(), why));
}

void refusals() {
  const Packed w(6, 10, 1, 1, 8, 1), kernel(6, 10, 3, 3, 8, 1);
  const Exactly<float> x(2000);
  Exactly<float> out(2000);
  const auto linear = [&](const void* packed, int64_t bytes, int64_t rows, int64_t channels, int64_t width, int threads,
                          int gated = 0, int64_t tokens = 1) {
    return quest_linear(x, rows, channels, channels, packed, bytes, nullptr, 1, 0, 255, 0, tokens, gated, nullptr, out, width,
                        threads);
  };
  CHECK(!linear(w.memory, w.memory.size, 3, 10, 6, 1));
  refused(linear(w.memory, w.memory.size, 3, 11, 6, 1), "another number of channels");
  refused(linear(w.memory, w.memory.size, 3, 10, 7, 1), "another number of outputs");
  refused(linear(w.memory, w.memory.size, -3, 10, 6, 1), "negative");
  refused(linear(w.memory, w.memory.size, 3, 10, 6, 0), "thread");
  refused(linear(w.memory, w.memory.size - 1, 3, 10, 6, 1), "damaged");
  refused(linear(w.memory, 8, 3, 10, 6, 1), "no packed weight");
  refused(linear(nullptr, 0, 3, 10, 6, 1), "no packed weight");
  refused(linear(x, 2000 * 4, 3, 10, 6, 1), "no packed weight");
  refused(linear(kernel.memory, kernel.memory.size, 3, 10, 6, 1), "convolution");
  for (int64_t tokens : {0, 2}) refused(linear(w.memory, w.memory.size, 3, 10, 6, 1, 0, tokens), "tokens of a sample");
  const Packed odd(5, 10, 1, 1, 8, 1);
  refused(linear(odd.memory, odd.memory.size, 3, 10, 2, 1, 1), "gated");
  for (int64_t field = 0; field < 14; field++) {  // of the header: whatever changes is noticed, or of no account
    Exactly<char> changed(w.memory.size);
    std::memcpy(changed, w.memory, w.memory.size);
    int64_t value;
    std::memcpy(&value, changed + 8 * field, 8);
    for (int64_t other : {value + 1, int64_t{-1}, int64_t{1} << 40}) {
      std::memcpy(changed + 8 * field, &other, 8);
      const int status = linear(changed, changed.size, 3, 10, 6, 1);
      CHECK(status == INVALID || field == 6 || field == 7);
    }
  }
  const auto conv = [&](int64_t samples, int64_t channels, int64_t height, int64_t stride, int64_t padding, int64_t out_height,
                        int dynamic = 0) {
    return quest_conv2d(x, samples, channels, height, 4, 4 * 4 * 10, 40, 10, kernel.memory, kernel.memory.size, nullptr, 1, 0,
                        255, dynamic, stride, stride, padding, padding, 1, 1, nullptr, out, 6, out_height, 4, 1);
  };
  CHECK(!conv(2, 10, 4, 1, 1, 4));
  CHECK(!conv(0, 10, 4, 1, 1, 4));
  CHECK(!conv(2, 10, 4, 1, 1, 4, 1));
  refused(conv(2, 10, 4, 1, 1, 4, 16), "other groups");
  for (int dynamic : {-1, 3, 15}) refused(conv(2, 10, 4, 1, 1, 4, dynamic), "no such dynamic scales");
  refused(conv(2, 9, 4, 1, 1, 4), "another number of channels");
  refused(conv(2, 10, 4, 1, 1, 5), "another size");
  refused(conv(2, 10, 1, 1, 0, 0), "another size");
  refused(conv(2, 10, 4, 0, 1, 4), "strides");
  refused(conv(2, 10, 4, 1, -1, 2), "negative");
  refused(conv(-2, 10, 4, 1, 1, 4), "negative");
  refused(quest_group_norm(x, 40, 10, 2, 4, 10, 3, 1e-5f, nullptr, nullptr, nullptr, nullptr, 0, out, 1), "groups");
  refused(quest_layer_norm(x, -1, 10, 1e-5f, nullptr, nullptr, out, 1), "negative");
  refused(quest_use("avx"), "no instruction set");
  CHECK(!quest_packed_bytes(0, 4, 1, 1, 8, 4) && !quest_packed_bytes(4, 4, 1, 1, 5, 4) && !quest_packed_bytes(4, -4, 1, 1, 8, -4));
  for (int64_t group : {0, -16, 8, 33, 64}) CHECK(!quest_packed_bytes(4, 40, 1, 1, 8, group));
  CHECK(quest_packed_bytes(4, 40, 1, 1, 8, 16) && quest_packed_bytes(4, 40, 3, 3, 8, 16));
  Exactly<float> wrong(30);
  wrong[17] = NAN;
  const auto of = [&](const float* from, float high, int dynamic) {
    return quest_linear(from, 3, 10, 10, w.memory, w.memory.size, nullptr, 1, 0, high, dynamic, 3, 0, nullptr, out, 6, 1);
  };
  for (float bad : {NAN, INFINITY})
    for (int dynamic : {0, 1, 2}) {
      wrong[17] = bad;
      const int expected = std::isnan(bad) || dynamic ? HAS_NAN : OK;
      CHECK(of(wrong, 255, dynamic) == expected);
      CHECK(expected == OK || std::strstr(quest_message(), "NaN"));
      for (int of_conv : {1, 2})
        CHECK(quest_conv2d(wrong, 1, 10, 3, 1, 30, 10, 10, kernel.memory, kernel.memory.size, nullptr, 1, 0, 255, of_conv, 1, 1,
                           1, 1, 1, 1, nullptr, out, 6, 3, 1, 1) == HAS_NAN);
      const Range own{1, 0, 255, dynamic}, ranges[4] = {own, own, own, {1, 0, 255, dynamic}};
      const int64_t strides[12] = {30, 10, 10, 30, 10, 10, 30, 10, 10, 30, 10, 10};
      for (int i = 0; i < 3; i++) {
        const float* rows[3] = {x, x, x};
        rows[i] = wrong;
        const int status = quest_attention(rows[0], rows[1], rows[2], strides, 1, 1, 3, 3, 10, ranges, 1, out, 1);
        CHECK(status == (dynamic == 2 ? INVALID : expected));
      }
    }
  for (float high : {4e4f, NAN, INFINITY}) CHECK(of(x, high, 0) == OUT_OF_RANGE);
  refused(of(x, 255, 16), "other groups");
  for (int dynamic : {-1, 3, 15}) refused(of(x, 255, dynamic), "no such dynamic scales");
  for (float high : {-1.f, 0.f, 256.f, NAN, INFINITY}) CHECK(of(x, high, 1) == OUT_OF_RANGE && of(x, high, 2) == OUT_OF_RANGE);
  const Range byte{1, 0, 255}, wide{1, 0, 256}, ranges[4] = {byte, wide, byte, byte};
  const int64_t strides[12] = {10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10, 10};
  CHECK(quest_attention(x, x, x, strides, 1, 1, 1, 1, 10, ranges, 1, out, 1) == OUT_OF_RANGE);
  const Range samples{1, 0, 255, 2}, wrong_ranges[4] = {byte, byte, samples, byte};
  refused(quest_attention(x, x, x, strides, 1, 1, 1, 1, 10, wrong_ranges, 1, out, 1), "or those of tokens");
}

}  // namespace

void test_failures() {
  refusals();
  memory();
}

}  // namespace test
