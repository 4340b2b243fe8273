// Products of bytes with VNNI. The instruction vpdpbusd adds four products to an int32. The file of an instruction set
// includes this file as it includes functions.h, and defines before:
//   V                vectors of LANES int32, or of four times as many bytes
//   zero, put        0 in all lanes; stores a vector
//   vector, four     a vector of signed bytes from memory; four unsigned bytes, repeated in all lanes
//   dot(c, a, b)     c plus the products of unsigned bytes a and signed bytes b
//   add_dot          c = dot(c, a, b) as assembly: in the loop of groups, GCC copies the intrinsic's sums between registers
//   pairs(a, b)      a0 b0 + a1 b1 for the pairs of int16 in each lane
//   FV               vectors of LANES floats
//   floats, put      load and store them
//   times, fmadd     a vector times a number; a b + c, where a are int32

typedef int32_t four_bytes __attribute__((may_alias, aligned(1)));

// Computes R x 16 P sums in registers.
template <int R, int P>
INLINE void vnni_tile(const uint8_t* a, ptrdiff_t stride, int segments, const ptrdiff_t* offset, int64_t bytes,
                      const int8_t* b, ptrdiff_t panel, int32_t* out, ptrdiff_t out_stride) {
  constexpr int EACH = NR / LANES, N = P * EACH;  // vectors per row in one panel, and in all
  V c[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) c[r][j] = zero();
  for (int s = 0; s < segments; s++) {
    const uint8_t* x = a + offset[s];
    for (int64_t k = 0; k < bytes; k += 4, b += 4 * NR) {
      V w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; j++) w[j] = vector(b + j / EACH * panel + j % EACH * 4 * LANES);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const V v = four(*reinterpret_cast<const four_bytes*>(x + r * stride + k));
#pragma GCC unroll 4
        for (int j = 0; j < N; j++) c[r][j] = dot(c[r][j], v, w[j]);
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < N; j++) put(out + r * out_stride + j * LANES, c[r][j]);
}

template <int P>
void vnni_panels(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
                 const int8_t* b, ptrdiff_t panel, int32_t* out, ptrdiff_t out_stride) {
  for (int n; rows > 0; rows -= n, a += n * stride, out += n * out_stride) {
    n = rows < 7 ? rows : rows < 12 ? (rows + 1) / 2 : 6;  // two tiles of 4 rows are faster than one of 6 and one of 2
    switch (n) {
#define CASE(R) \
  case R: vnni_tile<R, P>(a, stride, segments, offset, bytes, b, panel, out, out_stride); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6)
#undef CASE
    }
  }
}

// Computes R x LANES N products of groups of all segments. Sums of a group and floats are in registers.
template <int R, int N>
INLINE void group_tile(const uint8_t* a, ptrdiff_t stride, int64_t bytes, const int8_t* b, ptrdiff_t panel, const Grouped& g,
                       float* out, ptrdiff_t out_stride) {
  constexpr int EACH = NR / LANES;
  FV sum[R][N];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) sum[r][j] = FV{};
  const int32_t* columns = g.pairs;
  for (int64_t segment = 0; segment < g.segments; segment++) {
    const uint8_t* x = a + g.offset[segment];
    const int32_t* row_pairs = g.row_pairs + g.shift[segment];
    const float *row_scale = g.row_scale + g.shift[segment], *scale = g.scale;
    for (int64_t done = 0, end; done < bytes; done = end) {
      end = done + g.group < bytes ? done + g.group : bytes;
      V c[R][N];
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) {
        const V column = vector(reinterpret_cast<const int8_t*>(columns + LANES * j));
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) c[r][j] = pairs(column, four(row_pairs[r]));
      }
      for (int64_t k = done; k < end; k += 4, b += 4 * NR) {
        V w[N];
#pragma GCC unroll 2
        for (int j = 0; j < N; j++) w[j] = vector(b + j / EACH * panel + j % EACH * 4 * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          const V v = four(*reinterpret_cast<const four_bytes*>(x + r * stride + k));
#pragma GCC unroll 2
          for (int j = 0; j < N; j++) add_dot(c[r][j], v, w[j]);
        }
      }
#pragma GCC unroll 2
      for (int j = 0; j < N; j++) {
        const FV s = floats(scale + LANES * j);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) sum[r][j] = fmadd(c[r][j], times(s, row_scale[r]), sum[r][j]);
      }
      row_pairs += g.row_apart, row_scale += g.scale_apart, columns += g.apart, scale += g.apart;
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int j = 0; j < N; j++) put(out + r * out_stride + j * LANES, sum[r][j]);
}

// The same for any number of rows and for P panels, with as many vectors as registers hold.
template <int P>
void group_panels(const uint8_t* a, ptrdiff_t stride, int rows, int64_t bytes, const int8_t* b, ptrdiff_t panel, Grouped g,
                  float* out, ptrdiff_t out_stride) {
  constexpr int N = P * NR / LANES, MOST = LANES == 16 ? 6 : 3;
  for (int n; rows > 0; rows -= n, a += n * stride, out += n * out_stride, g.row_pairs += n, g.row_scale += n) {
    n = rows < MOST ? rows : MOST;
    switch (n) {
#define CASE(R) \
  case R: group_tile<(R < MOST ? R : MOST), N>(a, stride, bytes, b, panel, g, out, out_stride); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#undef CASE
      default: group_tile<MOST, N>(a, stride, bytes, b, panel, g, out, out_stride);
    }
  }
}

void multiply_groups(const uint8_t* a, ptrdiff_t stride, int rows, int64_t bytes, const int8_t* b, ptrdiff_t panel, int panels,
                     const Grouped& g, float* out, ptrdiff_t out_stride) {
  constexpr int MOST = LANES / 8;  // panels: two vectors
  Grouped here = g;
  for (int p = 0; p < panels; p += MOST, b += MOST * panel, out += MOST * NR, here.pairs += MOST * NR, here.scale += MOST * NR)
    (panels - p < MOST ? group_panels<1> : group_panels<MOST>)(a, stride, rows, bytes, b, panel, here, out, out_stride);
}
