// Every function of the compiled core against a plain loop, on every instruction set of this machine; built and run by
// `tests/kernels/native/run` with AddressSanitizer and UndefinedBehaviorSanitizer. Prints what it tested.
#include <cstring>

#include "check.h"

namespace test {
const char* where = "";
std::mt19937 generator;
}  // namespace test

int main() {
  using namespace test;
  const struct {
    const char* name;
    void (*run)();
  } tests[] = {{"floats", test_floats},       {"bytes", test_bytes},   {"layers", test_layers},
               {"attention", test_attention}, {"blocks", test_blocks}, {"failures", test_failures}};
  for (const char* name : {"portable", "neon", "avx2", "avxvnni", "avx512vnni", "amx"}) {
    if (quest_use(name)) {
      std::printf("%s: NOT TESTED, this machine lacks it\n", name);
      continue;
    }
    CHECK(!std::strcmp(quest_isa(), name));
    std::printf("%s:", name);
    for (const auto& one : tests) {
      char both[64];
      std::snprintf(both, sizeof both, "%s, %s", name, one.name);
      where = both;
      generator.seed(0);
      one.run();
      std::printf(" %s,", one.name);
      std::fflush(stdout);
    }
    std::printf(" all as plain loops have them\n");
  }
  CHECK(quest_use("avx") && quest_use(""));
}
