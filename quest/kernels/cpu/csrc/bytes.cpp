// Linear layers on bytes, and the products of all layers (see bytes.h).
#include "bytes.h"

#include <cstring>

namespace quest {
namespace {

// Unpacks a panel to bytes [segments][bytes / 4][NR][4]; the rest of a segment is zeros. sums gets the sum of each output.
void unpack(const Weight& w, int64_t panel, int64_t segments, int64_t bytes, int8_t* out, int32_t* sums) {
  const auto unpack = w.bits == 4 ? isa->bytes->unpack4 : isa->bytes->unpack8;
  const uint8_t* codes = reinterpret_cast<const uint8_t*>(w.base() + w.codes) + panel * w.panel_codes();
  // If the number of channels is a multiple of four, all taps of a segment are contiguous and are unpacked together.
  const int64_t taps = w.taps() / segments, together = w.pairs() % 2 ? 1 : taps, pairs = w.pairs() * together;
  for (int64_t s = 0; s < segments; s++, out += bytes * NR) {
    int64_t at = 0;
    for (int64_t t = 0; t < taps; t += together, codes += pairs * NR * 2 * w.bits / 8, at += (pairs + 1) / 2 * 4 * NR)
      unpack(codes, pairs, out + at, sums);
    std::memset(out + at, 0, bytes * NR - at);
  }
}

// Some neighbouring panels as bytes, and the constants that are subtracted from their products.
struct Panels {
  int64_t first;
  int count;
  int8_t* codes;
  int64_t size;  // of one panel, in bytes
  int32_t constant[MAX_PANELS * NR];

  Panels(const Weight& w, const Terms& t, const Rows& a, int64_t first, int count, int8_t* memory)
      : first(first), count(count), codes(memory), size(a.segments * a.bytes * NR), constant{} {
    const uint32_t terms = static_cast<uint32_t>(w.channels * w.taps());
    for (int i = 0; i < count; i++) unpack(w, first + i, a.segments, a.bytes, codes + i * size, constant + i * NR);
    for (int i = 0; i < count * NR; i++)  // zero_a times the sum of codes minus zero point, modulo 2^32
      constant[i] = static_cast<int32_t>(t.zero_a * (constant[i] - terms * static_cast<uint32_t>(t.zero[first * NR + i])));
  }

  // Computes the outputs of rows r..r + rows and stores them at out[..] + from. `products` is memory for the products.
  void multiply(const Weight& w, const Terms& t, const Rows& a, int64_t r, int rows, int32_t* products, float* const* out,
                const float* const* residual, ptrdiff_t from) const {
    const int columns = static_cast<int>(std::min(count * int64_t{NR}, w.outputs - first * NR));
    const int64_t width = count * NR, at = first * NR;
    isa->bytes->multiply(a.codes + r * a.stride, a.stride, rows, static_cast<int>(a.segments), a.offset, a.bytes, codes,
                         size, count, products, width);
    isa->bytes->finish(products, width, rows, a.sums + r, t.zero.data() + at, constant, t.scale.data() + at,
                       t.bias.data() + at, columns, out, residual, from);
  }
};

}  // namespace

const float* const* counterparts(const float* residual, const float* base, const std::vector<float*>& out,
                                 std::vector<const float*>& rows) {
  if (!residual) return nullptr;
  rows.resize(out.size());
  for (size_t r = 0; r < out.size(); r++) rows[r] = out[r] ? residual + (out[r] - base) : nullptr;
  return rows.data();
}

bool product(const Weight& w, const Terms& t, const Rows& a, int64_t first, int64_t last, bool gated) {
  static thread_local Scratch<int8_t> codes;
  static thread_local Scratch<int32_t> products;
  static thread_local Scratch<float> halves;
  const Bytes& on = *isa->bytes;
  const int64_t size = on.panels * a.segments * a.bytes * NR, width = on.panels * NR, half = w.panels() / 2;
  // As many panels as fit into the second cache are unpacked together. Rows then stay in the first cache, and each row of
  // the output is written in longer stretches.
  const int64_t calls = std::max<int64_t>(1, std::min<int64_t>(PANELS / (gated ? 2 * size : size), MAX_CALLS));
  int8_t* b = codes.get((gated ? 2 : 1) * calls * size);
  int32_t* m = products.get(on.rows * width);
  float* h = gated ? halves.get(2 * on.rows * width) : nullptr;
  float *hidden[MAX_ROWS], *gate[MAX_ROWS];
  for (int r = 0; r < on.rows; r++) hidden[r] = h + r * width, gate[r] = h + (on.rows + r) * width;
  std::vector<Panels> panels, others;
  panels.reserve(calls), others.reserve(gated ? calls : 0);  // nothing below throws
  bool nan = false;
  on.begin();
  for (int64_t begin = first; begin < last; begin += calls * on.panels) {
    panels.clear(), others.clear();
    for (int64_t i = 0, p = begin; i < calls && p < last; i++, p += on.panels) {
      const int count = static_cast<int>(std::min<int64_t>(on.panels, last - p));
      panels.emplace_back(w, t, a, p, count, b + i * size);
      if (gated) others.emplace_back(w, t, a, half + p, count, b + (calls + i) * size);
    }
    for (int64_t r = 0; r < a.count; r += on.rows) {
      const int rows = static_cast<int>(std::min<int64_t>(on.rows, a.count - r));
      for (size_t i = 0; i < panels.size(); i++) {
        const ptrdiff_t column = panels[i].first * NR;
        if (!gated) {
          panels[i].multiply(w, t, a, r, rows, m, a.out + r, a.residual ? a.residual + r : nullptr, column);
          continue;
        }
        panels[i].multiply(w, t, a, r, rows, m, hidden, nullptr, 0);
        others[i].multiply(w, t, a, r, rows, m, gate, nullptr, 0);
        const int64_t columns = panels[i].count * NR;
        for (int j = 0; j < rows; j++) {
          isa->geglu(hidden[j], gate[j], columns, a.next ? hidden[j] : a.out[r + j] + column);
          if (a.next) nan |= on.quantize(hidden[j], columns, columns, a.range, a.next + (r + j) * half * NR + column);
        }
      }
    }
  }
  on.end();
  return nan;
}

bool bytes_fit(Range range) { return range.high - range.low <= 255.f; }

namespace {

// Computes a linear layer on the codes of source(first row, number of rows, NaN?). next: as in Rows, for all rows.
template <class Source>
bool multiply_rows(const Weight& w, const float* bias, Range range, int64_t rows, bool gated, const float* residual, float* out,
                   uint8_t* next, Range next_range, int threads, const Source& source) {
  const Terms t(w, bias, range);
  const int64_t padded = round_up(w.channels, 4), tiles = ceil_div(rows, 16), work = rows * w.channels * w.outputs;
  const int64_t width = gated ? w.outputs / 2 : w.outputs;
  // Each block unpacks the whole weight. This only pays if a block has many rows.
  const int64_t blocks = blocks_of(tiles, std::max<int64_t>(16, BLOCK / padded / 16), useful(threads, work));
  std::atomic<bool> nan{false};
  share(gated ? w.panels() / 2 : w.panels(), blocks, threads, work, [&](int64_t i, int64_t from, int64_t to) {
    static thread_local Scratch<int32_t> sums;
    static thread_local std::vector<float*> target;
    static thread_local std::vector<const float*> beside;
    const int64_t first = i * tiles / blocks * 16, count = std::min(rows, (i + 1) * tiles / blocks * 16) - first;
    bool wrong = false;
    const uint8_t* q = source(first, count, wrong);
    int32_t* total = sums.get(count);
    isa->bytes->sums(q, padded, count, padded, total);
    const ptrdiff_t none = 0;
    Rows all{q, count, padded, 1, &none, round_up(padded, isa->bytes->depth), total, nullptr, nullptr};
    if (next) {
      all.next = next + first * width, all.range = next_range;
    } else {
      target.resize(count);
      for (int64_t r = 0; r < count; r++) target[r] = out + (first + r) * width;
      all.out = target.data(), all.residual = counterparts(residual, out, target, beside);
    }
    if (product(w, t, all, from, to, gated) || wrong) nan = true;
  });
  return nan;
}

// Returns a source that quantizes rows of floats, which are `stride` apart.
auto quantizing(const Weight& w, const float* x, int64_t stride, Range range) {
  return [channels = w.channels, x, stride, range](int64_t first, int64_t count, bool& nan) -> const uint8_t* {
    static thread_local Scratch<uint8_t> codes;
    const int64_t padded = round_up(channels, 4);
    uint8_t* q = rows_of(codes, count, padded);
    if (padded == channels && stride == channels) {
      nan = isa->bytes->quantize(x + first * stride, count * padded, count * padded, range, q);
    } else {
      for (int64_t r = 0; r < count; r++)
        nan |= isa->bytes->quantize(x + (first + r) * stride, channels, padded, range, q + r * padded);
    }
    return q;
  };
}

}  // namespace

bool bytes_linear(const Weight& w, const float* x, int64_t rows, int64_t stride, const float* bias, Range range,
                  bool gated, const float* residual, float* out, int threads) {
  return multiply_rows(w, bias, range, rows, gated, residual, out, nullptr, {}, threads, quantizing(w, x, stride, range));
}

bool bytes_fit(const Layer& gated, const Layer& last) {
  return isa->bytes && bytes_fit(gated.range) && bytes_fit(last.range) && gated.weight->outputs % (2 * NR) == 0 &&
         last.weight->channels % 4 == 0;
}

bool bytes_feed_forward(const Layer& gated, const Layer& last, const float* x, int64_t rows, const float* residual,
                        float* out, int threads) {
  static thread_local Scratch<uint8_t> memory;
  const int64_t width = last.weight->channels;
  uint8_t* codes = rows_of(memory, rows, width);
  const bool nan = multiply_rows(*gated.weight, gated.bias, gated.range, rows, true, nullptr, nullptr, codes, last.range,
                                 threads, quantizing(*gated.weight, x, gated.weight->channels, gated.range));
  const auto there = [&](int64_t first, int64_t, bool&) -> const uint8_t* { return codes + first * width; };
  return multiply_rows(*last.weight, last.bias, last.range, rows, false, residual, out, nullptr, {}, threads, there) || nan;
}

Status feed_forward(const Layer& gated, const Layer& last, const float* x, int64_t rows, const float* residual, float* out,
                    int threads) {
  const Clock clock(LAYERS);
  if (!rows) return OK;
  if (!fits(*gated.weight, gated.range) || !fits(*last.weight, last.range)) return OUT_OF_RANGE;
  return bytes_feed_forward(gated, last, x, rows, residual, out, threads) ? HAS_NAN : OK;
}

}  // namespace quest
