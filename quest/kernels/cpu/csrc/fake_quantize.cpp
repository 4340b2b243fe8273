// Fake quantization with one scale and its gradients, one pass over memory each; what quest/affine.py defines.
#include "driver.h"

namespace {
constexpr int64_t CHUNK = 1 << 14;
}

using namespace quest;

extern "C" {

// out = scale * clamp(round(x / scale), low, high).
void quest_fake_quantize(const float* x, int64_t n, float scale, float low, float high, float* out, int threads) {
  parallel(ceil_div(n, CHUNK), threads, 10 * n, [&](int64_t i) {
    isa->fake_quantize(x + i * CHUNK, std::min(CHUNK, n - i * CHUNK), {scale, low, high}, out + i * CHUNK);
  });
}

// From the gradient of that out: to `out` the one of x, as the result that of the scale.
double quest_fake_quantize_backward(const float* x, const float* grad, int64_t n, float scale, float low, float high,
                                    float* out, int threads) {
  std::vector<double> sums(ceil_div(n, CHUNK));
  parallel(ceil_div(n, CHUNK), threads, 10 * n, [&](int64_t i) {
    sums[i] = isa->fake_quantize_backward(x + i * CHUNK, grad + i * CHUNK, std::min(CHUNK, n - i * CHUNK),
                                          {scale, low, high}, out + i * CHUNK);
  });
  double all = 0;
  for (double s : sums) all += s;
  return all;
}

}  // extern "C"
