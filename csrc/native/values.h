// Functions of time and state that are no slopes: events, and norms of the user's own. They are
// written as fields are, with `count` results in place of a slope.
#pragma once

#include "lanes.h"

namespace ct::native {

// In the place of one that is not there.
struct NoValues {
  static constexpr long count = 0, work = 0;
};

// The results, of V lanes.
template <class Values, class V>
CT_LANES void evaluate_values(V t, const V* y, const void* const* shared, V* results) {
  V work[Values::work + 1];
  Values::eval(t, y, static_cast<const V*>(nullptr),
               reinterpret_cast<const typename Values::real* const*>(shared), work, results);
}

// For the test of the compiled functions.
template <class Values>
void evaluate_values(double t, const void* y, const void* const* shared, void* results) {
  if constexpr (Values::count > 0) {
    using real = typename Values::real;
    evaluate_values<Values, real>(static_cast<real>(t), static_cast<const real*>(y), shared,
                                  static_cast<real*>(results));
  }
}

}  // namespace ct::native
