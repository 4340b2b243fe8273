// Products of bytes with VNNI. The instruction vpdpbusd adds four products to an int32. The file of an instruction set
// includes this file as it includes functions.h, and defines before:
//   V                vectors of LANES int32, or of four times as many bytes
//   zero, put        0 in all lanes; stores a vector
//   vector, four     a vector of signed bytes from memory; four unsigned bytes, repeated in all lanes
//   dot(c, a, b)     c plus the products of unsigned bytes a and signed bytes b

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
  for (; rows > 0; rows -= 6, a += 6 * stride, out += 6 * out_stride) switch (rows) {
#define CASE(R) \
  case R: vnni_tile<R, P>(a, stride, segments, offset, bytes, b, panel, out, out_stride); break;
      CASE(1) CASE(2) CASE(3) CASE(4) CASE(5)
#undef CASE
      default: vnni_tile<6, P>(a, stride, segments, offset, bytes, b, panel, out, out_stride);
    }
}
