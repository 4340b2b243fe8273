// A packed weight with the codes that it was made of.
#pragma once
#include "check.h"

namespace test {

struct Packed {
  int64_t outputs, channels, height, width, group, groups;
  Exactly<uint8_t> codes;
  Exactly<int32_t> zero;
  Exactly<float> scale;
  Exactly<char> memory;

  Packed(int64_t outputs, int64_t channels, int64_t height, int64_t width, int bits, float scale_of_all, int64_t of = 0)
      : outputs(outputs), channels(channels), height(height), width(width), group(of ? of : channels),
        groups(quest::ceil_div(channels, group)),
        codes(outputs * channels * height * width, [&] { return integer(0, bits == 4 ? 15 : 255); }),
        zero(outputs * groups, [&] { return integer(-20, bits == 4 ? 35 : 275); }),
        scale(outputs * groups, [&] { return scale_of_all ? scale_of_all : 1e-3f + std::fabs(number(.01f)); }),
        memory(quest_packed_bytes(outputs, channels, height, width, bits, group)) {
    CHECK(!quest_pack(codes, zero, scale, outputs, channels, height, width, bits, group, memory, memory.size));
  }
  int value(int64_t output, int64_t channel, int64_t y = 0, int64_t x = 0) const {
    return codes[((output * channels + channel) * height + y) * width + x] -
           zero[output * groups + channel / group];
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

// Groups of a linear layer's channels: some, or 0 for all channels together.
inline int64_t some_groups(int64_t channels) { return channels > 16 && chance(.4) ? 16 * integer(1, (channels - 1) / 16) : 0; }

// One whose scales come from tokens (1), samples (2) or groups (16 and more), with signed codes or without.
inline quest::Range dynamic_range(int of) {
  const bool four = chance(.5), sign = chance(.5);
  const float high = static_cast<float>(four ? 15 >> sign : 255 >> sign);
  return {chance(.5) ? 1.f : .7f, sign ? -high : 0, high, of};
}

// What a dynamic range makes of `count` rows of n numbers.
inline quest::Range fitted(quest::Range r, const float* x, int64_t count, int64_t stride, int64_t n) {
  float least = 0, most = 0;
  for (int64_t i = 0; i < count; i++)
    for (int64_t j = 0; j < n; j++) least = std::min(least, x[i * stride + j]), most = std::max(most, x[i * stride + j]);
  least *= r.scale, most *= r.scale;
  const float reach = r.low ? std::max(-least, most) : most - least, scale = std::max(reach / r.high, 1e-10f);
  const float zero = r.low ? 0 : std::nearbyint(-least / scale);
  return {scale, r.low - zero, r.high - zero, 0};
}

inline float input(quest::Range r) {
  if (r.dynamic) return chance(.1) ? 0 : number(3) + 1;
  return r.scale * ((r.low + r.high) / 2 + number((r.high - r.low) / 3));
}

}  // namespace test
