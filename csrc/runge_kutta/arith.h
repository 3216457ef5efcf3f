// The arithmetic of one element of a Runge-Kutta step, for CPU and GPU alike.
#pragma once

#include <cstdint>

#include "../core/hd.h"

namespace ct::rk {

// Terms with a nonzero coefficient in one combination; the largest tableau in use has 16 stages.
constexpr int kMaxTerms = 32;

// sum_j coefficient[j] row[j][i], over the rows of the slopes that have a nonzero coefficient.
// Skipping the others keeps 0 * NaN, of a stage not computed yet, out of the sum.
template <typename T, typename A>
struct Terms {
  const T* row[kMaxTerms];
  A coefficient[kMaxTerms];
  int count = 0;
};

// The sum in the order of the stages, so that every device and every block size rounds alike.
template <typename T, typename A>
CT_HD A add_terms(A sum, const T* const* row, const A* coefficient, int count, int64_t i) {
  for (int j = 0; j < count; ++j) sum += coefficient[j] * static_cast<A>(row[j][i]);
  return sum;
}

// The step: a number, or one per sample (or one for all, where it lives on the GPU).
struct Step {
  const double* data = nullptr;  // null: `value` holds it
  int64_t stride = 0;            // 0: one for all samples
  double value = 0;
};

// A tolerance: a number, or one per element of the state.
template <typename T>
struct Tolerance {
  const T* data = nullptr;  // null: `value` holds it
  T value = 0;
};

template <typename A>
CT_HD A magnitude(A x) {
  return x < A(0) ? -x : x;
}

// The larger one, or NaN if either is NaN: a norm must not hide it.
template <typename A>
CT_HD A larger(A a, A b) {
  return (a > b || a != a) ? a : b;
}

// The error in units of the tolerance.
template <typename A>
CT_HD A scaled_error(A error, A y, A y1, A rtol, A atol) {
  return error / (atol + rtol * larger(magnitude(y), magnitude(y1)));
}

// Weight of one stage in the dense output: sum_{m=1..degree} p[m-1] theta^m.
CT_HD double dense_weight(const double* p, int degree, double theta) {
  double sum = 0;
  for (int m = degree - 1; m >= 0; --m) sum = sum * theta + p[m];
  return sum * theta;
}

}  // namespace ct::rk
