// NEON with dot products, an extension of ARMv8.2, with vectors of four numbers. core.h says what each function computes.
#include "core.h"

#if QUEST_ARM
#include <arm_neon.h>
#ifdef __linux__
#include <sys/auxv.h>
#endif

#include <cmath>
#include <cstring>

QUEST_TARGET_BEGIN(QUEST_DOTPROD)
namespace quest {
namespace {

constexpr int L = 4;

struct F { float32x4_t v; };
struct I { int32x4_t v; };
struct M { uint32x4_t v; };
struct All {};
struct Part {
  int n;
  explicit Part(int64_t n) : n(static_cast<int>(n < L ? n : L)) {}
  uint32x4_t mask() const {
    const int32_t places[L] = {0, 1, 2, 3};
    return vcltq_s32(vld1q_s32(places), vdupq_n_s32(n));
  }
};

INLINE F set(float x) { return {vdupq_n_f32(x)}; }
INLINE I set(int32_t x) { return {vdupq_n_s32(x)}; }
INLINE F load(const float* x, All = {}) { return {vld1q_f32(x)}; }
INLINE F load(const float* x, Part p) {
  float part[L] = {};
  std::memcpy(part, x, p.n * sizeof(float));
  return load(part);
}
INLINE I load(const int32_t* x) { return {vld1q_s32(x)}; }
INLINE void store(float* x, F a, All) { vst1q_f32(x, a.v); }
INLINE void store(float* x, F a, Part p) {
  float part[L];
  vst1q_f32(part, a.v);
  std::memcpy(x, part, p.n * sizeof(float));
}
INLINE void store_bytes(uint8_t* out, I a, I b, I c, I d) {
  const int16x8_t low = vcombine_s16(vmovn_s32(a.v), vmovn_s32(b.v)), high = vcombine_s16(vmovn_s32(c.v), vmovn_s32(d.v));
  vst1q_s8(reinterpret_cast<int8_t*>(out), vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}
INLINE void store_bytes(uint8_t* out, I a, Part p) {
  const int16x4_t words = vmovn_s32(a.v);
  int8_t part[2 * L];
  vst1_s8(part, vmovn_s16(vcombine_s16(words, words)));
  std::memcpy(out, part, p.n);
}
INLINE void store_bytes(uint8_t* out, I a, All) { store_bytes(out, a, Part(L)); }

INLINE F operator+(F a, F b) { return {vaddq_f32(a.v, b.v)}; }
INLINE F operator-(F a, F b) { return {vsubq_f32(a.v, b.v)}; }
INLINE F operator*(F a, F b) { return {vmulq_f32(a.v, b.v)}; }
INLINE F operator/(F a, F b) { return {vdivq_f32(a.v, b.v)}; }
INLINE F fmadd(F a, F b, F c) { return {vfmaq_f32(c.v, a.v, b.v)}; }
INLINE F fnmadd(F a, F b, F c) { return {vfmsq_f32(c.v, a.v, b.v)}; }
INLINE F min(F a, F b) { return {vbslq_f32(vcltq_f32(a.v, b.v), a.v, b.v)}; }
INLINE F max(F a, F b) { return {vbslq_f32(vcgtq_f32(a.v, b.v), a.v, b.v)}; }
INLINE F round(F a) { return {vrndnq_f32(a.v)}; }
INLINE F magnitude(F a) { return {vabsq_f32(a.v)}; }
INLINE F with_sign(F a, F of) { return {vbslq_f32(vdupq_n_u32(0x80000000u), of.v, a.v)}; }
INLINE F times_power(F a, F n) {
  const int32x4_t power = vaddq_s32(vcvtnq_s32_f32(max(n, set(-126.f)).v), vdupq_n_s32(127));
  return {vmulq_f32(a.v, vreinterpretq_f32_s32(vshlq_n_s32(power, 23)))};
}
INLINE I operator+(I a, I b) { return {vaddq_s32(a.v, b.v)}; }
INLINE I operator-(I a, I b) { return {vsubq_s32(a.v, b.v)}; }
INLINE I operator*(I a, I b) { return {vmulq_s32(a.v, b.v)}; }
INLINE I max(I a, I b) { return {vmaxq_s32(a.v, b.v)}; }
INLINE I to_int(F a) { return {vcvtnq_s32_f32(a.v)}; }
INLINE F to_float(I a) { return {vcvtq_f32_s32(a.v)}; }
INLINE I add_bytes(I sum, const uint8_t* x) {
  return {vreinterpretq_s32_u32(vdotq_u32(vreinterpretq_u32_s32(sum.v), vld1q_u8(x), vdupq_n_u8(1)))};
}
INLINE I add_bytes(I sum, const uint8_t* x, int64_t n) {
  uint8_t part[4 * L] = {};
  std::memcpy(part, x, n);
  return add_bytes(sum, part);
}

INLINE M is_nan(F a) { return {vmvnq_u32(vceqq_f32(a.v, a.v))}; }
INLINE M equal(F a, F b) { return {vceqq_f32(a.v, b.v)}; }
INLINE M not_below(F a, F b) { return {vmvnq_u32(vcltq_f32(a.v, b.v))}; }
INLINE M operator|(M a, M b) { return {vorrq_u32(a.v, b.v)}; }
INLINE bool any(M a) { return vmaxvq_u32(a.v); }
INLINE F select(M which, F a, F b) { return {vbslq_f32(which.v, a.v, b.v)}; }
template <class V>
INLINE V select(All, V a, V) { return a; }
INLINE F select(Part p, F a, F b) { return {vbslq_f32(p.mask(), a.v, b.v)}; }
INLINE I select(Part p, I a, I b) { return {vbslq_s32(p.mask(), a.v, b.v)}; }
INLINE float total(F a) { return vaddvq_f32(a.v); }
INLINE float highest(F a) { return vmaxvq_f32(a.v); }
INLINE int32_t total(I a) { return vaddvq_s32(a.v); }
INLINE int32_t highest(I a) { return vmaxvq_s32(a.v); }

#include "functions.h"

// The instruction sdot adds four products of signed bytes to an int32. So 128 is subtracted from the unsigned bytes of rows,
// by changing their highest bit, and 128 times the sum of an output's bytes is added to its products. The same four bytes of
// a row are multiplied with four outputs: sdot takes them from one lane of a vector with 16 bytes of the row.
constexpr int DEPTH = 16;

INLINE int8x16_t row_bytes(const uint8_t* a) { return vreinterpretq_s8_u8(veorq_u8(vld1q_u8(a), vdupq_n_u8(128))); }

// Computes R x 16 sums in 4 R registers, which begin with `constant`.
template <int R>
INLINE void tile(const uint8_t* a, ptrdiff_t stride, int segments, const ptrdiff_t* offset, int64_t bytes, const int8_t* b,
                 const int32x4_t (&constant)[4], int32_t* out, ptrdiff_t out_stride) {
  int32x4_t c[R][4];
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) c[r][j] = constant[j];
  for (int s = 0; s < segments; s++)
    for (int64_t k = 0; k < bytes; k += DEPTH, b += DEPTH * NR) {
      int8x16_t row[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; r++) row[r] = row_bytes(a + r * stride + offset[s] + k);
#define QUAD(lane)                                                                                           \
  _Pragma("GCC unroll 4") for (int j = 0; j < 4; j++) {                                                      \
    const int8x16_t w = vld1q_s8(b + lane * 4 * NR + 16 * j);                                                \
    _Pragma("GCC unroll 4") for (int r = 0; r < R; r++) c[r][j] = vdotq_laneq_s32(c[r][j], w, row[r], lane); \
  }
      QUAD(0) QUAD(1) QUAD(2) QUAD(3)
#undef QUAD
    }
#pragma GCC unroll 4
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) vst1q_s32(out + r * out_stride + 4 * j, c[r][j]);
}

void multiply(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
              const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride) {
  for (int p = 0; p < panels; p++, b += panel, out += NR) {
    int32x4_t constant[4] = {};
    for (int64_t k = 0; k < segments * bytes * NR; k += 4 * NR)
      for (int j = 0; j < 4; j++) constant[j] = vdotq_s32(constant[j], vld1q_s8(b + k + 16 * j), vdupq_n_s8(1));
    for (int j = 0; j < 4; j++) constant[j] = vshlq_n_s32(constant[j], 7);
    for (int r = 0; r < rows; r += 4) {
      const uint8_t* from = a + r * stride;
      int32_t* to = out + r * out_stride;
      switch (rows - r) {
        case 1: tile<1>(from, stride, segments, offset, bytes, b, constant, to, out_stride); break;
        case 2: tile<2>(from, stride, segments, offset, bytes, b, constant, to, out_stride); break;
        case 3: tile<3>(from, stride, segments, offset, bytes, b, constant, to, out_stride); break;
        default: tile<4>(from, stride, segments, offset, bytes, b, constant, to, out_stride);
      }
    }
  }
}

void layer_norm(const float* x, int64_t n, float eps, const float* weight, const float* bias, float* y) {
  layer_norm_row(x, n, eps, weight, bias, y);
}

}  // namespace

extern const Isa neon = {
    "neon", 32, MAX_PANELS, DEPTH, quantize, quantize_rows, extremes, sums, unpack4, multiply, multiply, nullptr, finish, pack_keys,
    pack_values, softmax, channel_sums, scale_channels, layer_norm, geglu, fake_quantize, fake_quantize_backward, nullptr,
    nullptr, nullptr,
};

bool neon_allowed() {
#ifdef __linux__
  return getauxval(AT_HWCAP) & HWCAP_ASIMDDP;
#elif defined(__ARM_FEATURE_DOTPROD)
  return true;
#else
  return false;
#endif
}

}  // namespace quest
QUEST_TARGET_END
#endif
