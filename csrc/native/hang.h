// What the times of steps hang on, for the gradient.
#pragma once

#include "task.h"

namespace ct::native {

// Hands the cotangents of a step's start and length to what they hang on.
//
// anchor, before: of the step's end, and of the end of the step before.
// start, length: the cotangents.
// after: what is left of the step after: the cotangent of this one's end.
// to: of the times.
// Returns what is left for the step before.
CT_BOTH inline double hang(int64_t anchor, int64_t before, double start, double length,
                           double after, double* to) {
  length += after;
  if (anchor >= 0) to[anchor] += length;
  start += after - (anchor == kFree ? 0 : length);
  if (before >= 0) to[before] += start;
  return before >= 0 ? 0 : start;
}

// Where in a step a time lies.
template <class Step>
CT_BOTH double theta_of(const Step& taken, double at) {
  return std::min((at - taken.t) / (taken.stop - taken.t), 1.0);
}

}  // namespace ct::native
