// A packed weight with the codes that it was made of.
#pragma once
#include "check.h"

namespace test {

struct Packed {
  int64_t outputs, channels, height, width;
  Exactly<uint8_t> codes;
  Exactly<int32_t> zero;
  Exactly<float> scale;
  Exactly<char> memory;

  Packed(int64_t outputs, int64_t channels, int64_t height, int64_t width, int bits, float scale_of_all)
      : outputs(outputs), channels(channels), height(height), width(width),
        codes(outputs * channels * height * width, [&] { return integer(0, bits == 4 ? 15 : 255); }),
        zero(outputs, [&] { return integer(-20, bits == 4 ? 35 : 275); }),
        scale(outputs, [&] { return scale_of_all ? scale_of_all : 1e-3f + std::fabs(number(.01f)); }),
        memory(quest_packed_bytes(outputs, channels, height, width, bits)) {
    CHECK(!quest_pack(codes, zero, scale, outputs, channels, height, width, bits, memory, memory.size));
  }
  int value(int64_t output, int64_t channel, int64_t y = 0, int64_t x = 0) const {
    return codes[((output * channels + channel) * height + y) * width + x] - zero[output];
  }
  quest::Layer layer(const float* bias, quest::Range range) const {
    return {reinterpret_cast<const quest::Weight*>(static_cast<const char*>(memory)), memory.size, bias, range};
  }
};

// Of bytes or, less often, of more than bytes; zero inside or outside.
inline quest::Range range(float scale = 1) {
  const float low = static_cast<float>(chance(.8) ? -integer(0, 255) : integer(-300, 100));
  return {scale, low, low + static_cast<float>(chance(.8) ? integer(1, 255) : 400)};
}

inline float input(quest::Range r) { return r.scale * ((r.low + r.high) / 2 + number((r.high - r.low) / 3)); }

}  // namespace test
