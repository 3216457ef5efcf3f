// The loops of the kernels, compiled once for each instruction set; the best one is chosen at the
// first use.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "tasks.h"

#define CT_MLP_INLINE __attribute__((always_inline)) inline

#define CT_MLP_EACH _Pragma("GCC unroll 16")

#if defined(__GNUC__)  // these vectors are never passed between functions that are not inlined
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // of series whose order it does not know
#endif

#if defined(CT_SANITIZE)  // one level and plain loops: compilers take minutes to check all others
#define CT_MLP_UNROLL 0
#else
#define CT_MLP_UNROLL 1
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__)
#define CT_MLP_HAS_LEVELS 1
#endif
#endif

#if !defined(CT_MLP_HAS_LEVELS)

#define CT_MLP_LEVEL baseline
#define CT_MLP_BYTES 16
#include "loops.h"
#undef CT_MLP_LEVEL
#undef CT_MLP_BYTES

#else  // and no code for the few machines that know no AVX2: they have the references

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

namespace ct::mlp {
namespace {

// Whether products are our own where they can be: the loops for any machine, which know little of
// it, leave them to the BLAS, but for tests of both.
#if defined(CT_MLP_HAS_LEVELS) || defined(CT_SANITIZE)
constexpr bool kOwnProducts = true;
#else
constexpr bool kOwnProducts = false;
#endif

// Whether there are loops for this machine.
inline bool has_loops() {
#if defined(CT_MLP_HAS_LEVELS)
  return __builtin_cpu_supports("x86-64-v3");
#else
  return true;
#endif
}

template <typename T>
Loops<T> choose_loops() {
#if defined(CT_MLP_HAS_LEVELS)
  return __builtin_cpu_supports("x86-64-v4") ? v4::loops<T>() : v3::loops<T>();
#else
  return baseline::loops<T>();
#endif
}

template <typename T>
const Loops<T>& loops() {
  static const Loops<T> chosen = choose_loops<T>();
  return chosen;
}

}  // namespace
}  // namespace ct::mlp
