// A machine for each instruction set, the choice among them, and scratch memory.
#pragma once

#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>

#include "arith.h"
#include "functions.h"
#include "values.h"
#include "vector_math.h"

#define CT_INLINED __attribute__((always_inline))

// Sanitizers see the baseline only, as elsewhere.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(CT_SANITIZE) && !defined(CT_NO_CLONES)
#define CT_X86_LEVELS 1
#endif

namespace ct::jet {
namespace {

constexpr int kRowBytes = 256;  // of one coefficient in a block

namespace base {
constexpr int kBytes = 16;
#define CT_KERNEL __attribute__((noinline)) static
#include "cpu_isa.h"
#undef CT_KERNEL
}  // namespace base

#if defined(CT_X86_LEVELS)
namespace v3 {
constexpr int kBytes = 32;
#define CT_KERNEL __attribute__((noinline, target("arch=x86-64-v3"))) static
#include "cpu_isa.h"
#undef CT_KERNEL
}  // namespace v3

namespace v4 {
constexpr int kBytes = 64;
#define CT_KERNEL __attribute__((noinline, target("arch=x86-64-v4"))) static
#include "cpu_isa.h"
#undef CT_KERNEL
}  // namespace v4
#endif

inline int instruction_set() {
#if defined(CT_X86_LEVELS)
  static const int found = [] {
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    return v4 ? 4 : v3 ? 3 : 2;
  }();
  return found;
#else
  return 2;
#endif
}

// So many aligned numbers, of this thread alone; what is in them is left from the last use.
template <typename T>
T* scratch(size_t count) {
  struct Memory {
    ~Memory() { std::free(data); }
    void* data = nullptr;
    size_t bytes = 0;
  };
  thread_local Memory memory;
  const size_t bytes = (count * sizeof(T) + 4095) / 4096 * 4096;
  if (memory.bytes < bytes) {
    std::free(memory.data);
    memory.data = std::aligned_alloc(4096, bytes), memory.bytes = bytes;
    if (memory.data == nullptr) memory.bytes = 0, throw std::bad_alloc();
  }
  return static_cast<T*>(memory.data);
}

}  // namespace
}  // namespace ct::jet
