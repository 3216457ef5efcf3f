// The loops of the kernels, compiled once for each instruction set; the best one is chosen at the
// first use.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "../jet/vector_math.h"
#include "task.h"

#define CT_MLP_INLINE __attribute__((always_inline)) inline
#define CT_MLP_EACH _Pragma("GCC unroll 16")
#define CT_MLP_LOOP _Pragma("GCC unroll 1")

#if defined(__GNUC__)  // these vectors are never passed between functions that are not inlined
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of series whose order it does not know
#endif

#if defined(CT_SANITIZE)  // one level and plain loops: compilers take minutes to check all others
#define CT_MLP_UNROLL 0
#elif defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__)
#define CT_MLP_HAS_LEVELS 1
#define CT_MLP_UNROLL 0  // not for the few machines that know no AVX2
#else
#define CT_MLP_UNROLL 1
#endif

namespace ct::hollow {

template <typename T>
struct Loops {
  void (*forward)(const Task<T>&, int64_t first, int64_t last);
  void (*gradient)(const Task<T>&, int64_t first, int64_t last, T* partial);
};

}  // namespace ct::hollow

#define CT_MLP_LEVEL baseline
#define CT_MLP_BYTES 16
#include "loops.h"
#undef CT_MLP_LEVEL
#undef CT_MLP_BYTES

#if defined(CT_MLP_HAS_LEVELS)
#undef CT_MLP_UNROLL
#define CT_MLP_UNROLL 1

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
#define CT_MLP_LEVEL v3
#define CT_MLP_BYTES 32
#include "loops.h"
#undef CT_MLP_LEVEL
#undef CT_MLP_BYTES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
#define CT_MLP_LEVEL v4
#define CT_MLP_BYTES 64
#include "loops.h"
#undef CT_MLP_LEVEL
#undef CT_MLP_BYTES
#pragma GCC pop_options

#endif

namespace ct::hollow {
namespace {

template <typename T>
Loops<T> choose_loops() {
#if defined(CT_MLP_HAS_LEVELS)
  if (__builtin_cpu_supports("x86-64-v4")) return v4::loops<T>();
  if (__builtin_cpu_supports("x86-64-v3")) return v3::loops<T>();
#endif
  return baseline::loops<T>();
}

template <typename T>
const Loops<T>& loops() {
  static const Loops<T> chosen = choose_loops<T>();
  return chosen;
}

}  // namespace
}  // namespace ct::hollow
