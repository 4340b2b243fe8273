// Chooses the instruction set that computes.
#include "driver.h"

#include <cstring>
#include <string>

namespace quest {
namespace {

// The instruction sets of this machine, the best one last.
std::vector<const Isa*> available() {
  std::vector<const Isa*> all{&portable};
#if QUEST_X86
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return all;
  all.push_back(&avx2);
  if (avxvnni_allowed()) all.push_back(&avxvnni);
  if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    all.push_back(&avx512vnni);
    if (amx_allowed()) all.push_back(&amx);
  }
#elif QUEST_ARM
  if (neon_allowed()) all.push_back(&neon);
#endif
  return all;
}

const std::vector<const Isa*> all = available();

}  // namespace

const Isa* isa = all.back();

const char* instruction_sets() {
  static const std::string names = [] {  // not before the instruction sets of other files are initialized
    std::string joined;
    for (const Isa* one : all) joined += (joined.empty() ? "" : ",") + std::string(one->name);
    return joined;
  }();
  return names.c_str();
}

bool use(const char* name) {
  for (const Isa* one : all)
    if (!std::strcmp(one->name, name)) return isa = one, true;
  return false;
}

}  // namespace quest
