// What mlp/arith.h asks of numbers, as it does of the CPU's vectors: a vector is one number here.
#pragma once

#include <cmath>

#include "../jet/values.h"
#include "task.h"

#define CT_MLP_LEVEL device
#if defined(__CUDACC__)
#define CT_MLP_INLINE __device__ __forceinline__
#define CT_MLP_EACH _Pragma("unroll")
#define CT_MLP_LOOP _Pragma("unroll 1")
#else
#define CT_MLP_INLINE inline
#define CT_MLP_EACH
#define CT_MLP_LOOP
#endif

namespace ct::mlp::device {
namespace {

template <typename T>
using Vector = T;
template <typename T>
struct SinCos {
  T sin, cos;
};

template <typename T>
CT_MLP_INLINE T splat(T value) {
  return value;
}

template <typename T>
CT_MLP_INLINE T exponential(T x) {
  using std::exp;
  return exp(x);
}

template <typename T>
CT_MLP_INLINE T hyperbolic_tangent(T x) {
  using std::tanh;
  return tanh(x);
}

template <typename T>
CT_MLP_INLINE T logistic(T x) {
  T value, slope;
  jet::logistic_value(x, &value, &slope);
  return value;
}

template <typename T>
CT_MLP_INLINE T log_of_one_plus_exp(T x) {
  using std::exp;
  using std::fabs;
  using std::log1p;
  return (x > T(0) ? x : x - x) + log1p(exp(-fabs(x)));
}

template <typename T>
CT_MLP_INLINE SinCos<T> sine_and_cosine(T x) {
  using std::cos;
  using std::sin;
  return {sin(x), cos(x)};
}

template <typename T>
CT_MLP_INLINE T normal_cdf(T x) {
  using std::erfc;
  return T(0.5) * erfc(x * T(-0.707106781186547524401));
}

template <typename T>
CT_MLP_INLINE T normal_pdf(T x) {
  using std::exp;
  return exp(T(-0.5) * x * x) * T(0.3989422804014326779);
}

}  // namespace
}  // namespace ct::mlp::device

// clang-format off: each builds on those before
#include "../mlp/arith.h"
#include "arith.h"
// clang-format on
