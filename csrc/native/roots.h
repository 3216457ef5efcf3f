// Where a function turns from positive to non-positive: the arithmetic of ctorch/ode/events.py.
#pragma once

#include "base.h"

namespace ct::native {

// The ITP method (Oliveira and Takahashi, 2020). value(high) <= 0; value(low) is positive or, after
// a departure, zero.
template <class Value>
double bracketed_root(const Value& value, double low, double high, double tolerance) {
  double at_low = value(low), at_high = value(high);
  if (at_low <= 0 && low > 0) return low;
  if (at_high == 0) return high;
  if (!(at_low > 0)) at_low = -at_high;
  const double bisections = std::ceil(std::log2(std::max((high - low) / (2 * tolerance), 1.0)));
  const int most = std::max(0, static_cast<int>(bisections)) + 1;
  const double scale = 0.2 / (high - low);
  for (int count = 0; count <= most; ++count) {
    const double width = high - low;
    if (width <= 2 * tolerance) break;
    const double middle = 0.5 * (low + high);
    const double falsi = (at_high * low - at_low * high) / (at_high - at_low);
    const double shift = std::min(scale * width * width, std::abs(middle - falsi));
    double x = falsi + std::copysign(shift, middle - falsi);
    const double radius = std::ldexp(tolerance, most - count) - 0.5 * width;
    if (std::abs(x - middle) > radius)
      x = middle - std::copysign(std::max(radius, 0.0), middle - falsi);
    const double at_x = value(x);
    if (at_x > 0)
      low = x, at_low = at_x;
    else if (at_x < 0)
      high = x, at_high = at_x;
    else
      return x;
  }
  return 0.5 * (low + high);
}

}  // namespace ct::native
