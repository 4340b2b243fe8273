// Chooses the instruction set that computes.
#include "driver.h"

#include <cstring>

namespace quest {
namespace {

#if QUEST_X86
// The functions of AVX2, but with wider register tiles and products of bytes.
Isa with(const char* name, const Bytes& bytes) {
  Isa one = avx2;
  one.name = name;
  one.rows = 12;
  one.quantize = avx512_quantize;
  one.geglu = avx512_geglu;
  one.group_norm = avx512_group_norm;
  one.fake_quantize = avx512_fake_quantize;
  one.fake_quantize_backward = avx512_fake_quantize_backward;
  one.tile_int = vnni_tile_int;
  one.tile_float = vnni_tile_float;
  one.bytes = &bytes;
  return one;
}
const Isa avx512vnni = with("avx512vnni", vnni_bytes), amx = with("amx", amx_bytes);
#endif

const Isa* best() {
#if QUEST_X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") &&
      __builtin_cpu_supports("fma"))
    return amx_allowed() ? &amx : &avx512vnni;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return &avx2;
#endif
  return &portable;
}

}  // namespace

const Isa* isa = best();

const char* instruction_sets() {
#if QUEST_X86
  const Isa* top = best();
  return top == &amx          ? "portable,avx2,avx512vnni,amx"
         : top == &avx512vnni ? "portable,avx2,avx512vnni"
         : top == &avx2       ? "portable,avx2"
                              : "portable";
#else
  return "portable";
#endif
}

bool use(const char* name) {
  const Isa* all[] = {
      &portable,
#if QUEST_X86
      &avx2,
      &avx512vnni,
      &amx,
#endif
  };
  for (const Isa* one : all) {
    if (!std::strcmp(one->name, name)) {
      isa = one;
      return true;
    }
    if (one == best()) break;
  }
  return false;
}

}  // namespace quest
