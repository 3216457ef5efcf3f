// Values of elementary functions of one number, for the GPU and for what the CPU does not
// vectorize.
#pragma once

#include <cmath>

#include "functions.h"

namespace ct::jet {

// exp(-|x|), 1 / (1 + exp(-|x|))
template <typename T>
CT_HD void logistic_value(T x, T* value, T* slope) {
  using std::exp;
  using std::fabs;
  const T e = exp(-fabs(x)), above = T(1) / (T(1) + e), below = e * above;
  *slope = below * above;
  *value = x < T(0) ? below : above;
}

// tanh, and 4 exp(-2 |x|) / (1 + exp(-2 |x|))^2, which does not cancel
template <typename T>
CT_HD void tanh_value(T x, T* value, T* slope) {
  using std::exp;
  using std::fabs;
  using std::tanh;
  const T e = exp(T(-2) * fabs(x)), t = T(2) / (T(1) + e);
  *slope = t * (t * e);
  *value = tanh(x);
}

// x^exponent, where half of a small whole number as exponent needs no logarithm
template <typename T>
CT_HD T power_value(T x, T exponent) {
  using std::pow;
  using std::sqrt;
  const int twice = exponent >= T(-8) && exponent < T(0) ? int(T(-2) * exponent) : 0;
  if (twice == 0 || T(twice) != T(-2) * exponent) return pow(x, exponent);
  T product = twice % 2 == 1 ? sqrt(x) : T(1);
  for (int i = 0; i < twice / 2; ++i) product *= x;
  return T(1) / product;
}

template <typename T>
CT_HD void scalar_values(Value value, T param, T* out, T* out2, T x) {
  using namespace std;
  switch (value) {
    case Value::kSoftplus:
      *out = (x > T(0) ? x : x - x) + log1p(exp(-fabs(x)));
      return;
    case Value::kExp:
      *out = exp(x);
      return;
    case Value::kLog:
      *out = log(x);
      return;
    case Value::kExpm1:
      *out = expm1(x);
      return;
    case Value::kLog1p:
      *out = log1p(x);
      return;
    case Value::kSqrt:
      *out = sqrt(x);
      return;
    case Value::kRsqrt:
      *out = T(1) / sqrt(x);
      return;
    case Value::kReciprocal:
      *out = T(1) / x;
      return;
    case Value::kPower:
      *out = power_value(x, param);
      return;
    case Value::kErf:
      *out = erf(x);
      return;
    case Value::kNormalCdf:
      *out = T(0.5) * erfc(x * T(-0.707106781186547524401));
      return;
    case Value::kAtan:
      *out = atan(x);
      return;
    case Value::kAsin:
      *out = asin(x);
      return;
    case Value::kAcos:
      *out = acos(x);
      return;
    case Value::kAsinh:
      *out = asinh(x);
      return;
    case Value::kAcosh:
      *out = acosh(x);
      return;
    case Value::kAtanh:
      *out = atanh(x);
      return;
    case Value::kTanh:
      return tanh_value(x, out, out2);
    case Value::kSigmoid:
      return logistic_value(x, out, out2);
    case Value::kTan: {
      const T y = tan(x);
      *out = y, *out2 = T(1) + y * y;
      return;
    }
    case Value::kSinCos: {
      const T c = cos(x);
      *out = sin(x), *out2 = c;
      return;
    }
    case Value::kSinhCosh: {
      const T c = cosh(x);
      *out = sinh(x), *out2 = c;
      return;
    }
  }
}

}  // namespace ct::jet
