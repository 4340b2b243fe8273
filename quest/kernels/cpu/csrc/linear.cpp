// Linear layers, and the products of all layers (see product.h).
#include "product.h"

namespace quest {

const int8_t* panel_of(const Weight& w, int64_t panel, const Rows& a, int8_t* memory) {
  const uint8_t* codes = w.panel(panel);
  const int64_t tap = w.padded() * NR, taps = w.taps() / a.segments, whole = taps * a.planes * tap;
  if (w.bits == 8 && a.planes == 1 && whole == a.bytes * NR) return reinterpret_cast<const int8_t*>(codes);
  const int64_t size = a.planes == 1 ? taps * tap : tap;  // bytes that are copied at once
  for (int64_t s = 0; s < a.segments; s++) {
    int8_t* out = memory + s * a.bytes * NR;
    std::memset(out + whole, 0, a.bytes * NR - whole);
    for (int64_t done = 0; done < taps * tap; done += size, codes += size * w.bits / 8)
      for (int64_t p = 0; p < a.planes; p++, out += size) {
        if (w.bits == 4)
          isa->unpack4(codes, size / (4 * NR), out);
        else
          std::memcpy(out, codes, size);
      }
  }
  return memory;
}

namespace {

// Some neighbouring panels as bytes.
struct Panels {
  int64_t first;
  int count;
  const int8_t* codes;
  int64_t size;  // of one panel, in bytes

  Panels(const Weight& w, const Rows& a, int64_t first, int count, int8_t* memory)
      : first(first), count(count), codes(memory), size(a.segments * a.bytes * NR) {
    for (int i = 0; i < count; i++) {
      const int8_t* panel = panel_of(w, first + i, a, memory + i * size);
      if (!i) codes = panel;
    }
  }

  // Computes the outputs of rows r..r + rows and stores them at out[..] + from. `products` is memory for the products. Sums of
  // further groups and taps are added to `out`.
  void multiply(const Weight& w, const Terms& t, const Rows& a, int64_t r, int rows, int32_t* products, float* const* out,
                const float* const* residual, ptrdiff_t from) const {
    const int columns = static_cast<int>(std::min(count * int64_t{NR}, w.outputs - first * NR));
    const int64_t width = count * NR, groups = w.groups();
    if (!t.pairs.empty()) {
      const int64_t at = first * NR, apart = w.panels() * NR;
      const RowTerms& of = *a.terms;
      const Grouped grouped{round_up(w.group, 16), a.segments, a.offset, a.shift, of.pairs.data() + r, t.pairs.data() + at,
                            of.scale.data() + r, t.scale.data() + at, a.apart, of.apart, apart};
      float* sums = reinterpret_cast<float*>(products);
      isa->multiply_groups(a.codes + r * a.stride, a.stride, rows, a.stride, codes, size, count, grouped, sums, width);
      for (int i = 0; i < rows; i++, sums += width)
        for (int c = 0; out[i] && c < columns; c++)
          out[i][from + c] = sums[c] + t.bias[at + c] + (residual ? residual[i][from + c] : 0.f);
      return;
    }
    for (int64_t i = 0; i < t.taps * groups; i++) {
      const int64_t tap = i / groups, g = i % groups, begin = g * w.group, bytes = g < groups - 1 ? w.group : a.bytes - begin;
      const int64_t at = (g * w.panels() + first) * NR, term = (i * w.panels() + first) * NR;
      const int64_t row = r + (a.shift ? a.shift[tap] : 0), of_row = a.terms ? g * a.terms->apart + row : 0;
      (t.taps * groups == 1 ? isa->multiply : isa->multiply_some)(
          a.codes + r * a.stride + begin, a.stride, rows, static_cast<int>(t.taps == 1 ? a.segments : 1), a.offset + tap, bytes,
          codes + (tap * a.bytes + begin) * NR, size, count, products, width);
      isa->finish(products, width, rows, a.sums + g * a.apart + row, t.zero + at, t.constant.data() + term,
                  t.scale.data() + at, t.bias.data() + term, columns, out, i ? out : residual, from,
                  a.terms ? a.terms->scale.data() + of_row : nullptr, a.terms ? a.terms->zero.data() + of_row : nullptr);
    }
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

// The number of rows that are multiplied together from row r on. Rows that are not stored, which lie between the lines of a
// convolution, are left out. But an instruction set with a `begin` multiplies tiles of 16 rows, and half a tile takes as
// long. There they are only left out before and after a tile.
int64_t rows_together(const Rows& a, int64_t r) {
  const int64_t most = std::min<int64_t>(isa->rows, a.count - r);
  if (!a.out) return most;
  int64_t rows = 1;
  if (isa->begin && a.out[r]) {
    for (rows = most; !a.out[r + rows - 1];) rows--;
  } else {
    while (rows < most && !a.out[r + rows] == !a.out[r]) rows++;
  }
  return rows;
}

bool product(const Weight& w, const Terms& t, const Rows& a, int64_t first, int64_t last, bool gated) {
  static thread_local Scratch<int8_t> codes;
  static thread_local Scratch<int32_t> products;
  static thread_local Scratch<float> halves;
  const Isa& on = *isa;
  const int64_t size = on.panels * a.segments * a.bytes * NR, width = on.panels * NR, half = w.panels() / 2;
  // As many panels as fit into the second cache are unpacked together. Rows then stay in the first cache, and each row of
  // the output is written in longer stretches.
  const int64_t calls = std::max<int64_t>(1, std::min<int64_t>(PANELS / (gated ? 2 * size : size), MAX_CALLS));
  int8_t* b = codes.get((gated ? 2 : 1) * calls * size);
  int32_t* m = products.get(on.rows * width);
  float* h = gated || a.next ? halves.get(2 * on.rows * width) : nullptr;
  float *hidden[MAX_ROWS], *gate[MAX_ROWS];
  const int64_t next_row = (gated ? half : w.panels()) * NR;
  std::vector<Panels> panels, others;
  panels.reserve(calls), others.reserve(gated ? calls : 0);  // nothing below throws
  bool nan = false;
  const Multiplying now;
  for (int64_t begin = first; begin < last; begin += calls * on.panels) {
    panels.clear(), others.clear();
    for (int64_t i = 0, p = begin; i < calls && p < last; i++, p += on.panels) {
      const int count = static_cast<int>(std::min<int64_t>(on.panels, last - p));
      panels.emplace_back(w, a, p, count, b + i * size);
      if (gated) others.emplace_back(w, a, half + p, count, b + (calls + i) * size);
    }
    for (int64_t r = 0, rows; r < a.count; r += rows) {
      rows = rows_together(a, r);
      if (a.out && std::none_of(a.out + r, a.out + r + rows, [](const float* out) { return out; })) continue;
      for (size_t i = 0; i < panels.size(); i++) {
        const ptrdiff_t column = panels[i].first * NR;
        if (!gated && !a.next) {
          panels[i].multiply(w, t, a, r, rows, m, a.out + r, a.residual ? a.residual + r : nullptr, column);
          continue;
        }
        const int64_t columns = panels[i].count * NR, numbers = rows * columns;
        for (int j = 0; j < rows; j++) hidden[j] = h + j * columns, gate[j] = hidden[j] + numbers;
        panels[i].multiply(w, t, a, r, rows, m, hidden, nullptr, 0);
        if (gated) others[i].multiply(w, t, a, r, rows, m, gate, nullptr, 0);
        for (int j = 0; !a.next && j < rows; j++) on.geglu(hidden[j], gate[j], columns, a.out[r + j] + column);
        if (!a.next) continue;
        if (gated) on.geglu(h, gate[0], numbers, h);  // of all rows in one call, because a row is short
        nan |= quantize_short_rows(h, rows, columns, a.range, a.next + r * next_row + column, next_row);
      }
    }
  }
  return nan;
}

namespace {

// Computes a linear layer on the codes of source(first row, number of rows, terms of rows, NaN?), which sets terms if the range
// is dynamic.
template <class Source>
bool multiply_rows(const Layer& l, const Planes& planes, int64_t rows, bool gated, const Output& to, int threads,
                   const Source& source) {
  const Weight& w = *l.weight;
  const bool of_rows = l.range.dynamic || w.groups() > 1;
  const Terms t(w, l.bias, planes, of_rows, false);
  const int64_t row = planes.pixel(), tiles = ceil_div(rows, 16), work = rows * w.channels * w.outputs;
  const int64_t width = gated ? w.outputs / 2 : w.outputs;
  // Each block unpacks the whole weight. This only pays if a block has many rows.
  const int64_t blocks = blocks_of(tiles, std::max<int64_t>(16, BLOCK / row / 16), useful(threads, work));
  std::atomic<bool> nan{false};
  share(gated ? w.panels() / 2 : w.panels(), blocks, threads, work, [&](int64_t i, int64_t from, int64_t until) {
    static thread_local Scratch<int32_t> sums;
    static thread_local std::vector<float*> target;
    static thread_local std::vector<const float*> beside;
    static thread_local RowTerms terms;
    const int64_t first = i * tiles / blocks * 16, count = std::min(rows, (i + 1) * tiles / blocks * 16) - first;
    bool wrong = false;
    const int64_t groups = w.groups();
    if (l.range.dynamic < OF_GROUPS) {
      terms.clear(l.range.dynamic ? count : 0);
    } else {
      terms.clear(groups * count, count);
    }
    const uint8_t* q = source(first, count, terms, wrong);
    int32_t* total = sums.get(groups * count);
    for (int64_t g = 0; g < groups; g++)
      isa->sums(q + g * w.group, row, count, g < groups - 1 ? w.group : row - g * w.group, total + g * count);
    const ptrdiff_t none = 0;
    Rows all{q, count, row, 1, &none, round_up(row, isa->depth), planes.count, total, nullptr, nullptr};
    all.shift = &none, all.apart = count;
    if (of_rows) all.terms = &terms;
    if (!l.range.dynamic && of_rows) terms.add(l.range, count);
    if (!t.pairs.empty()) terms.pair_with(total, groups * count);
    if (to.codes) {
      all.next = to.codes + first * width, all.range = to.range;
    } else {
      target.resize(count);
      for (int64_t r = 0; r < count; r++) target[r] = to.out + (first + r) * width;
      all.out = target.data(), all.residual = counterparts(to.residual, to.out, target, beside);
    }
    if (product(w, t, all, from, until, gated) || wrong) nan = true;
  });
  return nan;
}

// Returns a source that quantizes rows of floats, which are `stride` apart. samples: the ranges of samples of `tokens` rows;
// a dynamic range without samples is that of each row.
auto quantizing(const Planes& planes, const float* x, int64_t stride, const std::vector<Range>& samples, int64_t tokens) {
  return [&, x, stride, tokens](int64_t first, int64_t count, RowTerms& terms, bool& nan) -> const uint8_t* {
    static thread_local Scratch<uint8_t> codes;
    const int64_t row = planes.pixel();
    uint8_t* q = rows_of(codes, count, row);
    if (planes.range.dynamic && samples.empty()) {
      nan = quantize_tokens(planes, x + first * stride, stride, count, nullptr, q, terms, 0);
    } else if (planes.range.dynamic) {
      for (int64_t r = 0; r < count; r++)
        nan |= quantize_tokens(planes, x + (first + r) * stride, stride, 1, &samples[(first + r) / tokens], q + r * row, terms, r);
    } else {
      nan = planes.quantize_rows(x + first * stride, stride, count, q, row);
    }
    return q;
  };
}

}  // namespace

Status linear(const Layer& l, const Input& in, bool gated, const Output& to, int threads) {
  const Clock clock(LAYERS);
  const int64_t rows = in.rows, tokens = in.tokens;
  if (!rows) return OK;
  const Weight& w = *l.weight;
  if (!fits(w, l.range)) return OUT_OF_RANGE;
  const Planes planes(l.range, w.channels, false);
  const Conv all{in.x, rows / tokens, tokens, 1, tokens * in.stride, in.stride, in.stride};
  const bool whole = l.range.dynamic == OF_SAMPLES && tokens > 1;
  const std::vector<Range> samples = whole ? of_samples(all, w.channels, l.range, threads) : std::vector<Range>();
  if (whole && samples.empty()) return HAS_NAN;
  const auto there = [&](int64_t first, int64_t, RowTerms&, bool&) { return in.codes + first * planes.pixel(); };
  const auto compute = [&](bool gated, const Output& to) {
    const bool nan = in.codes ? multiply_rows(l, planes, rows, gated, to, threads, there)
                              : multiply_rows(l, planes, rows, gated, to, threads,
                                              quantizing(planes, in.x, in.stride, samples, tokens));
    return nan ? HAS_NAN : OK;
  };
  if (!gated || w.outputs % (2 * NR) == 0) return compute(gated, to);
  // If half of the outputs is not a number of whole panels, both halves are computed in memory first.
  static thread_local Scratch<float> memory;
  const int64_t width = w.outputs / 2;
  float* both = memory.get(rows * w.outputs);
  if (Status wrong = compute(false, {both})) return wrong;
  for (int64_t r = 0; r < rows; r++, both += w.outputs) isa->geglu(both, both + width, width, to.out + r * width);
  return OK;
}

Status feed_forward(const Layer& gated, const Layer& last, const Input& in, const Output& to, int threads) {
  static thread_local Scratch<float> floats;
  static thread_local Scratch<uint8_t> codes;
  const int64_t width = last.weight->channels;
  const bool coded = as_codes(last.range) && gated.weight->outputs % (2 * NR) == 0;
  float* hidden = coded ? nullptr : floats.get(in.rows * width);
  uint8_t* between = coded ? rows_of(codes, in.rows, width) : nullptr;
  if (Status wrong = linear(gated, in, true, {hidden, nullptr, between, last.range}, threads)) return wrong;
  return linear(last, {hidden, in.rows, in.tokens, width, between}, false, to, threads);
}

}  // namespace quest
