// Winograd's convolutions (see core.h), for files that include pairs.h, after that file. Tiles are widened as rows are, and
// the weight as panels are. Transformed tiles are ordered [stretch][point][tile][pairs].

// B^T of F(4x4, 3x3).
INLINE void input_transform(const W d[6], W out[6]) {
  W even = d[4] - (d[2] << 2), odd = d[3] - (d[1] << 2);
  out[0] = (d[0] << 2) - d[2] + even;
  out[1] = even + odd;
  out[2] = even - odd;
  out[5] = (d[1] << 2) - (d[3] << 2) - d[3] + d[5];
  even = d[4] - d[2], odd = (d[3] - d[1]) << 1;
  out[3] = even + odd;
  out[4] = even - odd;
}

// Pairs from one point of transformed tiles to the next. Points are an odd number of cache lines apart; otherwise they would
// share few sets of the cache.
INLINE ptrdiff_t point_of(int64_t tiles) { return tiles * ROW + 16; }

template <bool ODD>
INLINE void input_tile(const uint8_t* a, ptrdiff_t line, ptrdiff_t pixel, int16_t middle, int32_t* out, ptrdiff_t point) {
  W half[6][6], v[6], d[6];
  for (int x = 0; x < 6; x++) {
    for (int y = 0; y < 6; y++) {
      const W four = words(a + y * line + x * pixel);
      d[y] = (ODD ? W(U(four) >> 8) : four & 255) - middle;
    }
    input_transform(d, v);
    for (int i = 0; i < 6; i++) half[i][x] = v[i];
  }
  for (int i = 0; i < 6; i++) {
    input_transform(half[i], v);
    for (int j = 0; j < 6; j++) put(out + (6 * i + j) * point, v[j]);
  }
}

void winograd_input(const uint8_t* a, ptrdiff_t line, ptrdiff_t pixel, int64_t channels, int middle,
                    const ptrdiff_t* offset, int64_t tiles, int16_t* out) {
  const int16_t off = static_cast<int16_t>(middle);
  const ptrdiff_t point = point_of(tiles);
  int32_t* v = reinterpret_cast<int32_t*>(out);
  for (int64_t k = 0; k < channels; k += STRETCH, v += POINTS * point) {
    const int64_t n = channels - k < STRETCH ? channels - k : STRETCH;
    for (int64_t t = 0; t < tiles; t++) {
      const uint8_t* from = a + offset[t] + k;
      int32_t* to = v + t * ROW;
      for (int64_t c = 0; c < n; c += 4 * L) input_tile<false>(from + c, line, pixel, off, to + c / 4, point);
      for (int64_t c = 0; c < n; c += 4 * L) input_tile<true>(from + c, line, pixel, off, to + (n + c) / 4, point);
    }
  }
}

// G of F(4x4, 3x3) with rows scaled to integers: {1,0,0}, {1,1,1}, {1,-1,1}, {1,2,4}, {1,-2,4}, {0,0,1}.
INLINE void weight_transform(const W g[3], W out[6]) {
  const W near = g[0] + g[2], far = g[0] + (g[2] << 2), twice = g[1] << 1;
  out[0] = g[0];
  out[1] = near + g[1];
  out[2] = near - g[1];
  out[3] = far + twice;
  out[4] = far - twice;
  out[5] = g[2];
}

constexpr int PANEL = STRETCH * NR + 32;  // numbers of a panel per tap, and per point, an odd number of cache lines
constexpr int THIRDS[3][2] = {{0, 5}, {1, 2}, {3, 4}};  // rows of six points that are computed together

// Transforms the taps of a panel into two rows of points. A third of the points fits into the first cache.
template <int Third>
void third_of_weight(const int16_t* taps, int64_t numbers, int16_t* out) {
  for (int64_t n = 0; n < numbers; n += 2 * L) {
    W half[2][3], v[6];
    for (int x = 0; x < 3; x++) {
      W g[3];
      for (int y = 0; y < 3; y++) g[y] = words(taps + (3 * y + x) * PANEL + n);
      weight_transform(g, v);
      for (int i = 0; i < 2; i++) half[i][x] = v[THIRDS[Third][i]];  // the compiler removes the other rows
    }
    for (int i = 0; i < 2; i++) {
      weight_transform(half[i], v);
      for (int j = 0; j < 6; j++) put(out + (6 * i + j) * PANEL + n, v[j]);
    }
  }
}

// 24 A^T of F(4x4, 3x3), divided by the scales of the integer kernel transform, modulo 2^32.
INLINE void output_transform(const I m[6], I out[4]) {
  const I s12 = m[1] + m[2], d12 = m[1] - m[2], s34 = m[3] + m[4], d34 = m[3] - m[4];
  out[0] = set(6) * m[0] - set(4) * s12 + s34;
  out[1] = set(2) * d34 - set(4) * d12;
  out[2] = set(4) * (s34 - s12);
  out[3] = set(8) * d34 - set(4) * d12 + set(24) * m[5];
}

void winograd_multiply(const int16_t* a, int64_t channels, int64_t count, const int8_t* panel, int32_t* points, int32_t* out) {
  alignas(32) int16_t taps[9 * PANEL], some[12 * PANEL];
  const int32_t* v = reinterpret_cast<const int32_t*>(a);
  const int64_t line = count | 1;  // rows from one point to the next, an odd number of cache lines
  for (int64_t k = 0; k < channels; k += STRETCH) {
    const int64_t n = channels - k < STRETCH ? channels - k : STRETCH;
    for (int t = 0; t < 9; t++) widen_panel(panel + (t * channels + k) * NR, n, taps + t * PANEL);
    for (int third = 0; third < 3; third++) {
      (third == 0 ? third_of_weight<0> : third == 1 ? third_of_weight<1> : third_of_weight<2>)(taps, n * NR, some);
      for (int i = 0; i < 12; i++) {
        const int64_t point = 6 * THIRDS[third][i / 6] + i % 6;
        tiles(v + (k / STRETCH * POINTS + point) * point_of(count), count, some + i * PANEL, n / 2, !k,
              points + point * line * NR, NR);
      }
    }
  }
  const I ninth = set(static_cast<int32_t>(954437177u));  // 9 * 954437177 = 1 modulo 2^32
  for (int64_t t = 0; t < count; t++, out += 16 * NR)
    for (int c = 0; c < NR; c += L) {
      I half[4][6], m[6], y[4];
      for (int j = 0; j < 6; j++) {
        for (int i = 0; i < 6; i++) m[i] = load(points + ((6 * i + j) * line + t) * NR + c);
        output_transform(m, y);
        for (int i = 0; i < 4; i++) half[i][j] = y[i];
      }
      for (int i = 0; i < 4; i++) {
        output_transform(half[i], y);
        for (int j = 0; j < 4; j++) store(out + (4 * i + j) * NR + c, sixty_fourth(y[j] * ninth));
      }
    }
}
