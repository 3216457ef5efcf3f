// What an operator reads and writes. No torch here.
#pragma once

#include <cstdint>

#include "arith.h"

namespace ct::sortlet {

enum Op : int {
  kLog,            // -> sign, logabs
  kTerm,           // shift, v: sign, u: logabs -> value (in sign)
  kGradient,       // g -> of_scores
  kHessian,        // g, v -> of_g, of_scores
  kLaplacian,      // rows, lap -> slopes, of_log, of_ratio
  kTermGradient,   // shift, g -> of_scores, of_shift
  kTermHessian,    // shift, g, v, u -> of_scores, of_shift, of_g
  kTermLaplacian,  // shift, rows, lap -> value (in sign), slopes, of_ratio
};

// Pointers that an operator has no use for are null.
template <typename T>
struct Task {
  Op op;
  int kind;
  int64_t lists, n, rows;
  const T *scores, *shift, *g, *v, *u, *jacobian, *lap;
  T *sign, *logabs, *of_scores, *of_shift, *of_g, *slopes, *of_log, *of_ratio;
};

// The value of a term whose sortlet is known: no list is looked at.
template <typename T>
CT_HD T known_term(const Task<T>& task, int64_t list) {
  const double size = static_cast<double>(task.shift[list]) + static_cast<double>(task.u[list]);
  return static_cast<T>(static_cast<double>(task.v[list]) * exp(size));
}

}  // namespace ct::sortlet
