// All functions of Isa except `multiply`, written once over the vectors of an instruction set. core.h says what each of them
// computes. The file of an instruction set includes this file inside its target and its anonymous namespace, and defines
// before:
//   F, I       vectors of L floats and of L int32
//   M          the result of comparing two F
//   All, Part  which numbers of a vector an operation reads or writes: all of them, or with Part(n) the first n
//   and the operations on them. If one operand of min or max is NaN, the result is the second operand.
// The order in which floats are added depends on L. So last bits can differ between instruction sets.

// Calls body(i, which) for the vector of numbers from i on. The last vector of the n numbers can be a part.
template <class Body>
INLINE void each(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + L <= n; i += L) body(i, All{});
  if (i < n) body(i, Part(n - i));
}

// exp with an error of about one unit in the last place: exp(x) = 2^n exp(r) with |r| <= ln(2) / 2, where exp(r) is the
// polynomial of Cephes.
INLINE F exp(F x) {
  x = min(max(x, set(-87.3f)), set(88.3f));
  const F n = round(x * set(1.44269504f));
  const F r = fnmadd(n, set(-2.12194440e-4f), fnmadd(n, set(0.693359375f), x));
  F p = fmadd(set(1.9875691500e-4f), r, set(1.3981999507e-3f));
  p = fmadd(p, r, set(8.3334519073e-3f));
  p = fmadd(p, r, set(4.1665795894e-2f));
  p = fmadd(p, r, set(1.6666665459e-1f));
  p = fmadd(p, r, set(5.0000001201e-1f));
  return times_power(fmadd(p, r * r, r) + set(1.f), n);
}

// 2^x for x <= 0, with an error of about one unit in the last place. The polynomial is that of exp, scaled.
INLINE F exp2(F x) {
  const F n = round(x), r = x - n;
  F p = fmadd(set(1.5403530e-4f), r, set(1.3333558e-3f));
  p = fmadd(p, r, set(9.6181291e-3f));
  p = fmadd(p, r, set(5.5504109e-2f));
  p = fmadd(p, r, set(2.4022651e-1f));
  p = fmadd(p, r, set(6.9314718e-1f));
  return times_power(fmadd(p, r, set(1.f)), n);
}

INLINE F silu(F x) { return x / (set(1.f) + exp(set(0.f) - x)); }

// gelu(x) = x (1 + erf(x / sqrt 2)) / 2. erf is Abramowitz and Stegun 7.1.26, with an absolute error of 1.5e-7.
INLINE F gelu(F x) {
  const F one = set(1.f), z = x * set(0.70710678f), a = magnitude(z);
  const F t = one / fmadd(a, set(0.3275911f), one);
  F p = fmadd(set(1.061405429f), t, set(-1.453152027f));
  p = fmadd(p, t, set(1.421413741f));
  p = fmadd(p, t, set(-0.284496736f));
  p = fmadd(p, t, set(0.254829592f));
  const F erf = with_sign(one - p * t * exp(set(0.f) - z * z), z);
  return set(0.5f) * x * (one + erf);
}

// Codes minus zero point: clamp(round(x / scale)). Multiplying with 1 / scale is much faster than dividing. The relative
// difference of the two results is at most 2^-22. So both round to the same integer, unless the product is this close to the
// middle between two integers. Only then `exact` divides.
struct Encoder {
  F scale, inverse, low, high, tie;
  explicit Encoder(Range r)
      : scale(set(r.scale)), inverse(set(1.f / r.scale)), low(set(r.low)), high(set(r.high)),
        tie(set(.5f) - max(max(magnitude(low), magnitude(high)), set(1.f)) * set(0x1p-21f)) {}
  INLINE_LAMBDA F near(F x) const { return min(high, max(low, x * inverse)); }  // NaN stays
  INLINE_LAMBDA M unsure(F y) const { return not_below(magnitude(y - round(y)), tie); }  // also NaN
  INLINE_LAMBDA F exact(F x) const { return min(max(x / scale, low), high); }
};

// out[i] = code(i, which), for n numbers; code gives a vector of them.
template <class Code>
INLINE void bytes_of(int64_t n, uint8_t* out, const Code& code) {
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    I c[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) c[j] = code(i + L * j, All{});
    store_bytes(out + i, c[0], c[1], c[2], c[3]);
  }
  each(n - i, [&](int64_t j, auto there) INLINE_LAMBDA { store_bytes(out + i + j, code(i + j, there), there); });
}

bool quantize(const float* x, int64_t n, int64_t padded, Range range, uint8_t* out) {
  const Encoder encode(range);
  const I lowest = to_int(encode.low);
  M nan{};
  const auto again = [&](F v) INLINE_LAMBDA {
    nan = nan | is_nan(v);
    return encode.exact(v);
  };
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {  // four vectors are asked together
    F y[4];
    M unsure{};
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) y[j] = encode.near(load(x + i + L * j)), unsure = unsure | encode.unsure(y[j]);
    if (__builtin_expect(any(unsure), 0))
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) y[j] = again(load(x + i + L * j));
    store_bytes(out + i, to_int(y[0]) - lowest, to_int(y[1]) - lowest, to_int(y[2]) - lowest, to_int(y[3]) - lowest);
  }
  each(n - i, [&](int64_t j, auto there) INLINE_LAMBDA {
    const F v = load(x + i + j, there), y = encode.near(v);
    store_bytes(out + i + j, to_int(any(encode.unsure(y)) ? again(v) : y) - lowest, there);
  });
  if (n < padded) std::memset(out + n, 0, padded - n);
  return any(nan);
}

void extremes(const float* x, int64_t n, float* least, float* most) {
  F low[4], high[4];
  for (int j = 0; j < 4; j++) low[j] = high[j] = set(0.f);
  const auto see = [&](int j, F v) INLINE_LAMBDA { low[j] = min(v, low[j]), high[j] = max(v, high[j]); };
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) see(j, load(x + i + L * j));
  each(n - i, [&](int64_t j, auto there) INLINE_LAMBDA { see(0, load(x + i + j, there)); });
  *least = -highest(set(0.f) - min(min(low[0], low[1]), min(low[2], low[3])));
  *most = highest(max(max(high[0], high[1]), max(high[2], high[3])));
}

bool quantize_rows(const float* x, ptrdiff_t stride, int64_t rows, int64_t n, int64_t padded, Range range, uint8_t* out,
                   ptrdiff_t out_stride, float* scale, int32_t* zero) {
  constexpr int64_t TOGETHER = 16;  // rows, so that the processor need not wait for the end of one row
  float least[TOGETHER], most[TOGETHER];
  Range own[TOGETHER];
  bool wrong = false;
  for (; rows > 0; rows -= TOGETHER, scale += TOGETHER, zero += TOGETHER) {
    const int64_t some = rows < TOGETHER ? rows : TOGETHER;
    for (int64_t r = 0; r < some; r++) extremes(x + r * stride, n, least + r, most + r);
    for (int64_t r = 0; r < some; r++) {
      own[r] = measured(range, least[r], most[r]);
      wrong |= !(own[r].scale <= __FLT_MAX__);
      scale[r] = own[r].scale, zero[r] = -static_cast<int32_t>(own[r].low);
    }
    for (int64_t r = 0; r < some; r++, x += stride, out += out_stride) wrong |= quantize(x, n, padded, own[r], out);
  }
  return wrong;
}

void sums(const uint8_t* a, ptrdiff_t stride, int64_t rows, int64_t n, int32_t* out) {
  const int64_t whole = n / (4 * L) * (4 * L);
  for (int64_t r = 0; r < rows; r++, a += stride) {
    I sum = set(0);
    if (whole < n) sum = add_bytes(sum, a + whole, n - whole);
    for (int64_t i = 0; i < whole; i += 4 * L) sum = add_bytes(sum, a + i);
    out[r] = total(sum);
  }
}

void unpack4(const uint8_t* __restrict codes, int64_t quads, int8_t* __restrict out) {
  constexpr int BYTES = 2 * NR;
  for (int64_t q = 0; q < quads; q++, codes += BYTES, out += 2 * BYTES) {
    for (int i = 0; i < BYTES; i++) out[i] = static_cast<int8_t>((codes[i] & 15) - 8);
    for (int i = 0; i < BYTES; i++) out[BYTES + i] = static_cast<int8_t>((codes[i] >> 4) - 8);
  }
}

template <bool OF_ROWS>
INLINE void finished(const int32_t* in, ptrdiff_t stride, int rows, const int32_t* sums, const int32_t* zero,
                     const int32_t* constant, const float* scale, const float* bias, int columns, float* const* out,
                     const float* const* residual, ptrdiff_t from, const float* row_scale, const int32_t* row_zero) {
  each(columns, [&](int64_t c, auto there) INLINE_LAMBDA {
    const I z = load(zero + c), less = load(constant + c);
    const F s = load(scale + c), b = load(bias + c);
    for (int r = 0; r < rows; r++) {
      if (!out[r]) continue;
      const I sum = load(in + r * stride + c) - (OF_ROWS ? less * set(row_zero[r]) : less) - z * set(sums[r]);
      F y = fmadd(to_float(sum), OF_ROWS ? s * set(row_scale[r]) : s, b);
      if (residual) y = y + load(residual[r] + from + c, there);
      store(out[r] + from + c, y, there);
    }
  });
}

void finish(const int32_t* in, ptrdiff_t stride, int rows, const int32_t* sums, const int32_t* zero, const int32_t* constant,
            const float* scale, const float* bias, int columns, float* const* out, const float* const* residual,
            ptrdiff_t from, const float* row_scale, const int32_t* row_zero) {
  (row_scale ? finished<true> : finished<false>)(in, stride, rows, sums, zero, constant, scale, bias, columns, out, residual,
                                                 from, row_scale, row_zero);
}

void pack_keys(const uint8_t* k, ptrdiff_t stride, int64_t m, int64_t d, int64_t depth, int8_t* out) {
  for (int64_t j = 0; j < m; j += NR, k += NR * stride, out += depth * NR) {
    std::memset(out + d / 4 * 4 * NR, 0, (depth - d / 4 * 4) * NR);
    for (int64_t e = 0; e + 4 <= d; e += 4)
      for (int r = 0; r < NR; r++) {
        uint32_t four;
        std::memcpy(&four, k + r * stride + e, 4);
        four ^= 0x80808080u;
        std::memcpy(out + e * NR + 4 * r, &four, 4);
      }
    for (int64_t e = d / 4 * 4; e < d; e++)
      for (int r = 0; r < NR; r++) out[d / 4 * 4 * NR + 4 * r + e % 4] = static_cast<int8_t>(k[r * stride + e] ^ 128);
  }
}

void pack_values(const uint8_t* v, ptrdiff_t stride, int64_t m, int64_t d, int64_t length, int8_t* out) {
  for (int64_t i = 0; i < d; i += NR, v += NR, out += length * NR) {
    std::memset(out + m / 4 * 4 * NR, 0, (length - m / 4 * 4) * NR);
    for (int64_t j = 0; j + 4 <= m; j += 4) {
      const uint8_t *r0 = v + j * stride, *r1 = r0 + stride, *r2 = r1 + stride, *r3 = r2 + stride;
      uint8_t* __restrict to = reinterpret_cast<uint8_t*>(out + j * NR);
      for (int e = 0; e < NR; e++)
        to[4 * e] = r0[e] ^ 128, to[4 * e + 1] = r1[e] ^ 128, to[4 * e + 2] = r2[e] ^ 128, to[4 * e + 3] = r3[e] ^ 128;
    }
    for (int64_t j = m / 4 * 4; j < m; j++)
      for (int e = 0; e < NR; e++) out[m / 4 * 4 * NR + 4 * e + j % 4] = static_cast<int8_t>(v[j * stride + e] ^ 128);
  }
}

// Each of the three passes runs over some rows. So the processor need not wait for the end of one row's sum. The first pass
// finds the largest score, among integers if scores are integers (INTEGERS). Its probability is 1 / total. A dynamic range
// takes its scale from this probability, so no pass is needed to find it.
template <bool INTEGERS>
INLINE bool softmax_of(int rows, int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
                       const int32_t* column, uint8_t* out, int32_t* totals, float* row_scale) {
  using Score = std::conditional_t<INTEGERS, I, F>;
  constexpr int TOGETHER = 4;
  const auto score = [&](const int32_t* in, int64_t i) INLINE_LAMBDA {
    if constexpr (INTEGERS) return load(in + i) - load(column + i);
    else return load(reinterpret_cast<const float*>(in) + i);
  };
  const auto least = []() INLINE_LAMBDA {
    if constexpr (INTEGERS) return set(INT32_MIN);
    else return set(-INFINITY);
  };
  const auto floats = [](Score x) INLINE_LAMBDA {
    if constexpr (INTEGERS) return to_float(x);
    else return x;
  };
  const F by = set(factor * 1.44269504f), low = set(range.low), high = set(range.high);
  const I lowest = to_int(low);
  const bool from_zero = range.low == 0.f;  // as usual; probabilities are not below
  bool wrong = false;
  for (; rows > 0; rows -= TOGETHER, scores += TOGETHER * width, out += TOGETHER * padded, totals += TOGETHER) {
    const int some = rows < TOGETHER ? rows : TOGETHER;
    Score top[TOGETHER];
    F scale[TOGETHER];
    for (int r = 0; r < some; r++) {
      const int32_t* in = scores + r * width;
      Score most = least();
      each(m, [&](int64_t i, auto there) INLINE_LAMBDA { most = select(there, max(most, score(in, i)), most); });
      top[r] = set(highest(most));
    }
    for (int r = 0; r < some; r++) {
      const int32_t* in = scores + r * width;
      float* work = reinterpret_cast<float*>(scores + r * width);
      F all = set(0.f);
      each(m, [&](int64_t i, auto there) INLINE_LAMBDA {
        const F e = exp2(floats(score(in, i) - top[r]) * by);
        store(work + i, e, All{});
        all = all + select(there, e, set(0.f));
      });
      const float sum = total(all);
      wrong |= !(sum <= __FLT_MAX__);
      scale[r] = set(range.dynamic ? range.high / range.scale : 1.f / (sum * range.scale));
      if (range.dynamic) *row_scale++ = range.scale / (sum * range.high);
    }
    for (int r = 0; r < some; r++) {
      const float* work = reinterpret_cast<const float*>(scores + r * width);
      uint8_t* to = out + r * padded;
      bytes_of(m, to, [&](int64_t i, auto) INLINE_LAMBDA {
        const F code = min(load(work + i) * scale[r], high);
        return from_zero ? to_int(code) : to_int(max(code, low)) - lowest;
      });
      if (m < padded) std::memset(to + m, 0, padded - m);
    }
    sums(out, padded, some, padded, totals);
  }
  return wrong;
}

bool softmax(int rows, int32_t* scores, int64_t width, int64_t m, int64_t padded, float factor, Range range,
             const int32_t* column, uint8_t* out, int32_t* totals, float* row_scale) {
  return (column ? softmax_of<true> : softmax_of<false>)(rows, scores, width, m, padded, factor, range, column, out, totals,
                                                         row_scale);
}

// Sums of x over pixels, or with MEAN of (x - mean)^2, for four vectors of channels at once.
template <bool MEAN, class Which>
INLINE void pixel_sums(const float* x, ptrdiff_t pixel, int64_t pixels, const float* mean, float* out, const Which (&there)[4]) {
  F sum[4], m[4];
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) sum[v] = set(0.f), m[v] = MEAN ? load(mean + L * v, there[v]) : sum[v];
  for (int64_t p = 0; p < pixels; p++, x += pixel)
#pragma GCC unroll 4
    for (int v = 0; v < 4; v++) {
      F value = load(x + L * v, there[v]);
      if (MEAN) value = value - m[v], value = value * value;
      sum[v] = sum[v] + value;
    }
#pragma GCC unroll 4
  for (int v = 0; v < 4; v++) store(out + L * v, sum[v], there[v]);
}

template <bool MEAN>
INLINE void of_channels(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean, float* out) {
  int64_t c = 0;
  for (; c + 4 * L <= channels; c += 4 * L)
    pixel_sums<MEAN>(x + c, pixel, pixels, mean + c, out + c, {All{}, All{}, All{}, All{}});
  if (const int64_t left = channels - c) {
    const auto part = [&](int v) { return Part(left < L * v ? 0 : left - L * v); };
    pixel_sums<MEAN>(x + c, pixel, pixels, mean + c, out + c, {part(0), part(1), part(2), part(3)});
  }
}

void channel_sums(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* mean, float* out) {
  mean ? of_channels<true>(x, pixel, pixels, channels, mean, out) : of_channels<false>(x, pixel, pixels, channels, out, out);
}

void scale_channels(const float* x, ptrdiff_t pixel, int64_t pixels, int64_t channels, const float* a, const float* b,
                    bool silu_too, float* y, ptrdiff_t y_pixel) {
  for (int64_t p = 0; p < pixels; p++, x += pixel, y += y_pixel)
    each(channels, [&](int64_t c, auto there) INLINE_LAMBDA {
      const F v = fmadd(load(x + c, there), load(a + c, there), load(b + c, there));
      store(y + c, silu_too ? silu(v) : v, there);
    });
}

INLINE void layer_norm_row(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y) {
  const int64_t whole = n / L * L;
  F sum = whole < n ? load(x + whole, Part(n - whole)) : set(0.f);
  for (int64_t i = 0; i < whole; i += L) sum = sum + load(x + i);
  const float mean = total(sum) / static_cast<float>(n);
  const F m = set(mean);
  F squares = set(0.f);
  for (int64_t i = 0; i < whole; i += L) {
    const F d = load(x + i) - m;
    squares = fmadd(d, d, squares);
  }
  float rest = total(squares);
  for (int64_t i = whole; i < n; i++) rest += (x[i] - mean) * (x[i] - mean);
  const F scale = set(1.f / std::sqrt(rest / static_cast<float>(n) + eps));
  each(n, [&](int64_t i, auto there) INLINE_LAMBDA {
    const F v = (load(x + i, there) - m) * scale;
    store(y + i, fmadd(v, weight ? load(weight + i, there) : set(1.f), bias ? load(bias + i, there) : set(0.f)), there);
  });
}

void geglu(const float* hidden, const float* gate, int64_t n, float* y) {
  each(n, [&](int64_t i, auto there) INLINE_LAMBDA { store(y + i, load(hidden + i, there) * gelu(load(gate + i, there)), there); });
}

// If one operand is NaN, min and max return the second one. So q comes second, and its NaN stays.
INLINE F clamp(F q, F low, F high) { return min(high, max(low, q)); }

void fake_quantize(const float* x, int64_t n, Range range, float* out) {
  const F scale = set(range.scale), low = set(range.low), high = set(range.high);
  each(n, [&](int64_t i, auto there) INLINE_LAMBDA {
    store(out + i, clamp(round(load(x + i, there) / scale), low, high) * scale, there);
  });
}

double fake_quantize_backward(const float* x, const float* grad, int64_t n, Range range, float* out) {
  constexpr int TOGETHER = 16 / L;
  const F scale = set(range.scale), low = set(range.low), high = set(range.high);
  F sum[TOGETHER];
  for (F& s : sum) s = set(0.f);
  const auto one = [&](int64_t i, F& s, auto there) INLINE_LAMBDA {
    const F v = load(x + i, there) / scale, q = round(v), code = clamp(q, low, high), g = load(grad + i, there);
    const M inside = equal(code, q);
    s = fmadd(g, select(inside, q - v, code), s);
    store(out + i, select(inside, g, set(0.f)), there);
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16)
#pragma GCC unroll 2
    for (int j = 0; j < TOGETHER; j++) one(i + L * j, sum[j], All{});
  each(n - i, [&](int64_t j, auto there) INLINE_LAMBDA { one(i + j, sum[0], there); });
  double all = 0;
  for (F& s : sum) all += total(s);
  return all;
}
