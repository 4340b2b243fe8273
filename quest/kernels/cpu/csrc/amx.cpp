// AMX: products of bytes in tiles of 16 rows of 64 bytes, with tiles of 16 x 16 sums. Everything else is that of AVX-512.
#include "core.h"

#if QUEST_X86
#if defined(__linux__) && defined(QUEST_NEW_COMPILER)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

QUEST_TARGET_BEGIN("amx-int8,amx-tile")
namespace quest {

// The system gives a process the registers of tiles when it asks for them.
bool amx_allowed() {
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 24 & 1) || !(d >> 25 & 1)) return false;
  constexpr int REQUEST = 0x1023, TILES = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
}

// The configuration of eight tiles, each of 16 rows of 64 bytes.
static const struct {
  uint8_t palette, start, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} TILES = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};

static void begin() { _tile_loadconfig(&TILES); }

static void end() { _tile_release(); }

int64_t amx_peak(int64_t iterations) {
  begin();
  for (int64_t i = 0; i < iterations; i++) {
    _tile_dpbusd(0, 4, 6);
    _tile_dpbusd(1, 4, 7);
    _tile_dpbusd(2, 5, 6);
    _tile_dpbusd(3, 5, 7);
  }
  end();
  return iterations * 4 * 16 * 16 * 64;
}

// Computes up to four tiles of sums. Each tile of rows and each tile of the weight is used for two products.
static void multiply(const uint8_t* a, ptrdiff_t stride, int rows, int segments, const ptrdiff_t* offset, int64_t bytes,
                     const int8_t* b, ptrdiff_t panel, int panels, int32_t* out, ptrdiff_t out_stride) {
  const bool low = rows > 16, right = panels > 1;
  const ptrdiff_t size = out_stride * sizeof(int32_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < segments; s++) {
    const uint8_t *x = a + offset[s], *y = x + 16 * stride;
    for (int64_t k = 0; k < bytes; k += 64, b += 64 * NR) {
      _tile_loadd(4, x + k, stride);
      _tile_loadd(6, b, 64);
      _tile_dpbusd(0, 4, 6);
      if (right) {
        _tile_loadd(7, b + panel, 64);
        _tile_dpbusd(1, 4, 7);
      }
      if (low) {
        _tile_loadd(5, y + k, stride);
        _tile_dpbusd(2, 5, 6);
        if (right) _tile_dpbusd(3, 5, 7);
      }
    }
  }
  _tile_stored(0, out, size);
  if (right) _tile_stored(1, out + NR, size);
  if (low) {
    _tile_stored(2, out + 16 * out_stride, size);
    if (right) _tile_stored(3, out + 16 * out_stride + NR, size);
  }
}

extern const Isa amx = [] {
  Isa one = avx512vnni;
  one.name = "amx";
  one.rows = 32, one.panels = 2, one.depth = 64;
  one.multiply = multiply, one.begin = begin, one.end = end;
  one.winograd = nullptr;
  return one;
}();

}  // namespace quest
QUEST_TARGET_END

#else
namespace quest {
bool amx_allowed() { return false; }
int64_t amx_peak(int64_t) { return 0; }
extern const Isa amx = avx512vnni;
}  // namespace quest
#endif
#endif
