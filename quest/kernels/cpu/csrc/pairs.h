// Products of pairs of int16. AVX2 and Winograd's algorithm widen bytes to int16. The file of an instruction set includes this
// file after functions.h, and defines before:
//   W, U               vectors of int16 and of uint16, with as many bytes as I
//   add_pairs(c, a, b) c plus a0 b0 + a1 b1 for the pairs in each lane; sums are int32, so nothing saturates
//
// The four bytes of an int32 lane become two pairs, because even and odd bytes are separated by a mask or a shift only:
//
//     bytes of a row      a0 a1 a2 a3 | a4 a5 a6 a7 | ...
//     even pairs          a0    a2    | a4    a6    | ...
//     odd pairs              a1    a3 |    a5    a7 | ...
//
// Bytes of a weight panel are widened in the same way. Both operands are widened one stretch at a time. A stretch stays in the
// first cache of a processor core.
constexpr int STRETCH = WINOGRAD_CHANNELS;  // bytes per row
constexpr int ROW = STRETCH / 2;            // pairs per row: first the even ones, then the odd ones

INLINE W words(const void* x) { return *static_cast<const W*>(x); }
INLINE void put(void* x, W v) { *static_cast<W*>(x) = v; }

// Widens a panel to pairs [even, odd][bytes / 4][NR].
INLINE void widen_panel(const int8_t* b, int64_t bytes, int16_t* out) {
  int16_t* odd = out + bytes * NR / 2;
  for (const int8_t* end = b + bytes * NR; b < end; b += 4 * L, out += 2 * L, odd += 2 * L) {
    const W four = words(b);
    put(out, four << 8 >> 8);
    put(odd, four >> 8);
  }
}

// Computes R x 16 sums in registers. begin: the sums start at 0; otherwise they are added to `out`.
template <int R>
INLINE void tile(const int32_t* a, const int16_t* b, int64_t pairs, bool begin, int32_t* out, ptrdiff_t stride) {
  constexpr int EACH = NR / L;
  I c[R][EACH];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int h = 0; h < EACH; h++) c[r][h] = begin ? set(0) : load(out + r * stride + L * h);
#pragma GCC unroll 1
  for (int64_t k = 0; k < pairs; k++, b += 2 * NR) {
    W w[EACH];
#pragma GCC unroll 2
    for (int h = 0; h < EACH; h++) w[h] = words(b + 2 * L * h);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const I v = set(a[r * ROW + k]);
#pragma GCC unroll 2
      for (int h = 0; h < EACH; h++) c[r][h] = add_pairs(c[r][h], v, w[h]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int h = 0; h < EACH; h++) store(out + r * stride + L * h, c[r][h]);
}

constexpr int MOST = 12 * L / NR;  // rows of a tile: twelve sums hide the latency of a product

template <int R = MOST, class... Rest>
INLINE void tile_of(int64_t rows, Rest... rest) {
  if (rows >= R) return tile<R>(rest...);
  if constexpr (R > 1) tile_of<R - 1>(rows, rest...);
}

// The same for any number of rows, which are ROW pairs apart.
void tiles(const int32_t* a, int64_t rows, const int16_t* b, int64_t pairs, bool begin, int32_t* out, ptrdiff_t stride) {
  for (int64_t n; rows > 0; rows -= n, a += n * ROW, out += n * stride) {
    const int64_t calls = (rows + MOST - 1) / MOST;
    n = (rows + calls - 1) / calls;
    tile_of(n, a, b, pairs, begin, out, stride);
  }
}
