// Squares of numbers in registers, turned round.
#pragma once

#include "lanes.h"

namespace ct::native {

// Rows of a square of numbers become its columns: as many registers as each holds numbers.
template <int kStep = 1, class X, int... P>
CT_LANES void transpose(X* rows, std::integer_sequence<int, P...> places) {
  constexpr int R = kWidth<X>;
  if constexpr (kStep < R) {
    constexpr auto upper = [](int p) { return p & kStep ? R + p - kStep : p; };
    constexpr auto lower = [](int p) { return p & kStep ? R + p : p + kStep; };
    CT_UNROLL(16)
    for (int i = 0; i < R; ++i) {
      if (i & kStep) continue;
      const X a = rows[i], b = rows[i + kStep];
      rows[i] = __builtin_shufflevector(a, b, upper(P)...);
      rows[i + kStep] = __builtin_shufflevector(a, b, lower(P)...);
    }
    transpose<2 * kStep>(rows, places);
  }
}

}  // namespace ct::native
