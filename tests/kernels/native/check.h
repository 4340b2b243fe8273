// What the native tests share: assertions that name their line, random numbers, and memory of exactly the size that a
// function may touch, so that AddressSanitizer sees the first byte beyond.
#pragma once
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>

#include "driver.h"

namespace test {

extern const char* where;  // instruction set and test that run

#define CHECK(condition)                                                                              \
  do {                                                                                                \
    if (!(condition)) {                                                                               \
      std::fprintf(stderr, "%s:%d: %s: not %s\n", __FILE__, __LINE__, test::where, #condition);       \
      std::exit(1);                                                                                   \
    }                                                                                                 \
  } while (0)

template <class T>
class Exactly {
 public:
  explicit Exactly(int64_t n) : size(n), data_(new T[n]()) {}
  template <class Make>
  Exactly(int64_t n, Make make) : Exactly(n) {
    for (int64_t i = 0; i < n; i++) data_[i] = static_cast<T>(make());
  }
  operator T*() { return data_.get(); }
  operator const T*() const { return data_.get(); }
  T& operator[](int64_t i) { return data_[i]; }
  const T& operator[](int64_t i) const { return data_[i]; }
  // The memory, or null.
  const T* when(bool there) const { return there ? data_.get() : nullptr; }
  int64_t size;

 private:
  std::unique_ptr<T[]> data_;
};

extern std::mt19937 generator;

inline int64_t integer(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }
inline float number(float size = 1) { return std::normal_distribution<float>(0, size)(generator); }
inline bool chance(double p) { return std::bernoulli_distribution(p)(generator); }
inline bool close(double a, double b, double within) { return std::fabs(a - b) <= within; }
inline int code(float x, quest::Range r) {
  return static_cast<int>(std::nearbyint(std::min(std::max(x / r.scale, r.low), r.high)));
}
inline double gelu(double x) { return x / 2 * (1 + std::erf(x / std::sqrt(2.))); }

// The tests: functions on floats, functions on bytes, the drivers, and what must fail.
void test_floats();
void test_bytes();
void test_layers();
void test_attention();
void test_blocks();
void test_failures();

}  // namespace test
