// Packed weights.
#include "driver.h"

#include <cstring>

namespace quest {

namespace {

constexpr int64_t MAGIC = 0x32304b5155455354;

// The place of the codes of one output and tap: channel k is in byte(k), shifted by `shift`. With 4 bits, the first half of
// a panel's outputs is in the low halves of bytes, and the second half in the high ones.
struct Row {
  int64_t first, together;
  int shift;
  Row(const Weight& w, int64_t output, int64_t tap) : together(w.bits == 8 ? NR : NR / 2) {
    const int64_t column = output % NR;
    first = w.codes + output / NR * w.panel_codes() + tap * w.padded() * together + column % together * 4;
    shift = column < together ? 0 : 4;
  }
  int64_t byte(int64_t channel) const { return first + channel / 4 * 4 * together + channel % 4; }
};

}  // namespace

Weight layout(int64_t outputs, int64_t channels, int64_t height, int64_t width, int64_t bits, int64_t group) {
  require(outputs > 0 && channels > 0 && height > 0 && width > 0 && (bits == 4 || bits == 8), "no shape of a packed weight");
  require(group == channels || (0 < group && group < channels && group % 16 == 0),
          "groups are of all channels, or of a multiple of 16");
  Weight w{MAGIC, outputs, channels, height, width, bits, 0, 0, 0, 0, 0, 0, 0, group};
  int64_t at = round_up(sizeof(Weight), 64);
  auto take = [&](int64_t bytes) {
    int64_t start = at;
    at += round_up(bytes, 64);
    return start;
  };
  w.zero_points = take(w.numbers() * sizeof(int32_t));
  w.scales = take(w.numbers() * sizeof(float));
  w.sums = take(w.taps() * w.numbers() * sizeof(int32_t));
  w.codes = take(w.panels() * w.panel_codes());
  w.bytes = at;
  return w;
}

const Weight& weight_of(const void* packed, int64_t bytes) {
  const char* const none = "this is no packed weight";
  require(packed && bytes >= static_cast<int64_t>(sizeof(Weight)), none);
  const Weight& w = *static_cast<const Weight*>(packed);
  require(w.magic == MAGIC, none);
  const Weight same = layout(w.outputs, w.channels, w.height, w.width, w.bits, w.group);
  require(w.bytes == same.bytes && w.codes == same.codes && w.sums == same.sums && w.scales == same.scales &&
              w.zero_points == same.zero_points && w.bytes <= bytes,
          "this packed weight is damaged");
  return w;
}

// Packs a weight. given: its layout.
void pack(const uint8_t* codes, const int32_t* zero_points, const float* scales, const Weight& given, Weight& w) {
  const int64_t outputs = given.outputs, channels = given.channels, taps = given.taps(), bits = given.bits;
  // Unused places of channels and panels are multiplied with the zeros at unused places of the quantized input, or belong to
  // outputs that are not stored. They become signed bytes of 0. Codes of 8 bits are stored as signed bytes, and those of 4
  // bits as codes.
  const int fill = bits == 8 ? 0 : 8, sign = bits == 8 ? 128 : 0;
  std::memset(static_cast<void*>(&w), 0, given.codes);
  w = given;
  std::memset(w.base() + w.codes, fill << 4 | fill, given.bytes - given.codes);
  int32_t* z = reinterpret_cast<int32_t*>(w.base() + w.zero_points);
  int32_t* sums = reinterpret_cast<int32_t*>(w.base() + w.sums);
  float* s = reinterpret_cast<float*>(w.base() + w.scales);
  const int64_t groups = w.groups(), width = w.panels() * NR;
  for (int64_t o = 0; o < outputs; o++) {
    int64_t magnitude = 0, bytes = 0;
    for (int64_t g = 0; g < groups; g++) {
      z[g * width + o] = zero_points[o * groups + g] - w.offset();
      s[g * width + o] = scales[o * groups + g];
    }
    for (int64_t t = 0; t < taps; t++) {
      const Row row(w, o, t);
      for (int64_t k = 0; k < channels; k++) {
        const uint8_t code = codes[(o * channels + k) * taps + t];
        char& at = w.base()[row.byte(k)];
        at = static_cast<char>(at ^ (code ^ sign ^ fill) << row.shift);
        const int32_t centred = code - zero_points[o * groups + k / w.group];
        sums[(t * groups + k / w.group) * width + o] += centred;
        magnitude += std::abs(centred), bytes += std::abs(code - w.offset());
      }
    }
    w.row_sum = std::max(w.row_sum, magnitude), w.byte_sum = std::max(w.byte_sum, bytes);
  }
}

void unpack(const Weight& w, uint8_t* codes) {
  const int64_t channels = w.channels, taps = w.taps();
  const int mask = (1 << w.bits) - 1, sign = w.bits == 8 ? 128 : 0;
  for (int64_t o = 0; o < w.outputs; o++)
    for (int64_t t = 0; t < taps; t++) {
      const Row row(w, o, t);
      for (int64_t k = 0; k < channels; k++)
        codes[(o * channels + k) * taps + t] =
            static_cast<uint8_t>((static_cast<uint8_t>(w.base()[row.byte(k)]) >> row.shift & mask) ^ sign);
    }
}

}  // namespace quest
