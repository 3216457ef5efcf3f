// Elementary functions of lanes, with the behavior at infinity and NaN that they have in libm.
//
// Common ones are computed in registers (errors of a few units in the last place); the rest, and
// single numbers, go to libm lane by lane.
#pragma once

#include "lanes.h"
#include "tanh.h"

#if defined(CT_CUDA)
namespace ct::jet {
template <typename T, int kBytes>
struct VectorMath;
template <typename T>
struct Float;
}  // namespace ct::jet
#endif

namespace ct::native {

template <class V>
using Vectors = ct::jet::VectorMath<Number<V>, static_cast<int>(sizeof(V))>;

// f for every lane by itself.
template <class V, class F, class... In>
CT_LANES V lanewise(const F& f, V x, In... more) {
  if constexpr (kWidth<V> == 1) {
    return f(x, more...);
  } else if constexpr (IsWide<V>::value) {
    return {lanewise(f, x.low, more.low...), lanewise(f, x.high, more.high...)};
  } else {
    V y;
    for (int i = 0; i < kWidth<V>; ++i) y[i] = f(x[i], more[i]...);
    return y;
  }
}

// ---- rounding, signs, order
// ----------------------------------------------------------------------------------------

template <class V>
CT_LANES V abs(V x) {
  if constexpr (kWidth<V> == 1)
    return std::fabs(x);
  else if constexpr (IsWide<V>::value)
    return {abs(x.low), abs(x.high)};
  else
    return Vectors<V>::absolute(x);
}

template <class V>
CT_LANES V copysign(V size, V sign) {
  if constexpr (kWidth<V> == 1)
    return std::copysign(size, sign);
  else if constexpr (IsWide<V>::value)
    return {copysign(size.low, sign.low), copysign(size.high, sign.high)};
  else
    return Vectors<V>::with_sign(Vectors<V>::absolute(size), sign);
}

template <class V>
CT_LANES V sqrt(V x) {
  return lanewise([](auto v) { return std::sqrt(v); }, x);
}

template <class V>
CT_LANES V rsqrt(V x) {
  return all<V>(1) / sqrt(x);
}

#define CT_LANEWISE(name)                                    \
  template <class V>                                         \
  CT_LANES V name(V x) {                                     \
    return lanewise([](auto v) { return std::name(v); }, x); \
  }
CT_LANEWISE(floor)
CT_LANEWISE(ceil)
CT_LANEWISE(trunc)
CT_LANEWISE(nearbyint)  // halves to even, as torch.round
CT_LANEWISE(exp2)
CT_LANEWISE(log2)
CT_LANEWISE(log10)
CT_LANEWISE(tan)
CT_LANEWISE(asin)
CT_LANEWISE(acos)
CT_LANEWISE(atan)
CT_LANEWISE(sinh)
CT_LANEWISE(cosh)
CT_LANEWISE(asinh)
CT_LANEWISE(acosh)
CT_LANEWISE(atanh)
CT_LANEWISE(lgamma)
#undef CT_LANEWISE

// The smaller and the larger one; NaN if either is NaN.
template <class V>
CT_LANES V minimum(V a, V b) {
  return select(a != a, a, select(b < a, b, select(b != b, b, a)));
}
template <class V>
CT_LANES V maximum(V a, V b) {
  return select(a != a, a, select(b > a, b, select(b != b, b, a)));
}

// 0 or 1 or -1; of NaN 0, as torch.sign.
template <class V>
CT_LANES V sign(V x) {
  return select(x > V{}, all<V>(1), select(x < V{}, all<V>(-1), V{}));
}

template <class V>
CT_LANES V atan2(V y, V x) {
  return lanewise([](auto a, auto b) { return std::atan2(a, b); }, y, x);
}
template <class V>
CT_LANES V fmod(V x, V y) {
  return lanewise([](auto a, auto b) { return std::fmod(a, b); }, x, y);
}
template <class V>
CT_LANES V hypot(V x, V y) {
  return lanewise([](auto a, auto b) { return std::hypot(a, b); }, x, y);
}

// ---- exponentials
// ------------------------------------------------------------------------------------------------

#define CT_IN_REGISTERS(name)             \
  template <class V>                      \
  CT_LANES V name(V x) {                  \
    if constexpr (kWidth<V> == 1)         \
      return std::name(x);                \
    else if constexpr (IsWide<V>::value)  \
      return {name(x.low), name(x.high)}; \
    else                                  \
      return Vectors<V>::name(x);         \
  }
CT_IN_REGISTERS(exp)
CT_IN_REGISTERS(expm1)
CT_IN_REGISTERS(log)
CT_IN_REGISTERS(log1p)
CT_IN_REGISTERS(erf)
#undef CT_IN_REGISTERS

// log of positive normal numbers; of infinity and NaN it is anything.
template <class V>
CT_LANES V log_normal(V x) {
  if constexpr (kWidth<V> == 1)
    return std::log(x);
  else if constexpr (IsWide<V>::value)
    return {log_normal(x.low), log_normal(x.high)};
  else
    return Vectors<V>::log_normal(x, V{});
}

template <class V>
CT_LANES V tanh(V x) {
  if constexpr (kWidth<V> == 1)
    return std::tanh(x);
  else
    return tanh_in_registers(x);
}

template <class V>
CT_LANES V sigmoid(V x) {
  const V e = exp(-abs(x)), above = all<V>(1) / (all<V>(1) + e);
  return select(x < V{}, e * above, above);
}

// log(1 + exp(x))
template <class V>
CT_LANES V softplus(V x) {
  return select(x > V{}, x, select(x != x, x, V{})) + log1p(exp(-abs(x)));
}

template <class V>
CT_LANES V erfc(V x) {
  return lanewise([](auto v) { return std::erfc(v); }, x);
}

// The normal distribution function: x normal_cdf(x) is gelu.
template <class V>
CT_LANES V normal_cdf(V x) {
  if constexpr (kWidth<V> == 1)
    return Number<V>(0.5) * std::erfc(x * Number<V>(-0.707106781186547524401));
  else if constexpr (IsWide<V>::value)
    return {normal_cdf(x.low), normal_cdf(x.high)};
  else
    return Vectors<V>::normal_cdf(x);
}

// ---- trigonometry
// ------------------------------------------------------------------------------------------------

template <class V>
CT_LANES void sin_cos(V x, V* sine, V* cosine) {
  if constexpr (kWidth<V> == 1) {
    *sine = std::sin(x), *cosine = std::cos(x);
  } else if constexpr (IsWide<V>::value) {
    sin_cos(x.low, &sine->low, &cosine->low);
    sin_cos(x.high, &sine->high, &cosine->high);
  } else {
    Vectors<V>::sin_cos(x, sine, cosine);
    const auto huge = negated(abs(x) <= all<V>(ct::jet::Float<Number<V>>::kHuge));
    if (any(huge)) {
      *sine = select(huge, lanewise([](auto v) { return std::sin(v); }, x), *sine);
      *cosine = select(huge, lanewise([](auto v) { return std::cos(v); }, x), *cosine);
    }
  }
}

template <class V>
CT_LANES V sin(V x) {
  V s, c;
  sin_cos(x, &s, &c);
  return s;
}

template <class V>
CT_LANES V cos(V x) {
  V s, c;
  sin_cos(x, &s, &c);
  return c;
}

// ---- powers
// --------------------------------------------------------------------------------------------------------

template <class V>
CT_LANES V pow(V x, V y) {
  return lanewise([](auto a, auto b) { return std::pow(a, b); }, x, y);
}

// x to a whole power, by squaring.
template <int kPower, class V>
CT_LANES V power(V x) {
  if constexpr (kPower < 0)
    return all<V>(1) / power<-kPower>(x);
  else if constexpr (kPower == 0)
    return all<V>(1);
  else if constexpr (kPower == 1)
    return x;
  else if constexpr (kPower % 2 == 0)
    return power<kPower / 2>(x * x);
  else
    return x * power<kPower - 1>(x);
}

}  // namespace ct::native
