// Logarithm and exponential as good as the length of a step needs them: of float, whose error norms
// have few digits themselves, to some 1e-6, at half the price of the full ones.
#pragma once

#include "math.h"

namespace ct::native {

// Of lanes of float, in a register.
template <class V>
struct Rough {
  using I = Mask<V>;
  using Float = ct::jet::Float<float>;

  // log x for positive normal x, to 2e-6: x = 2^n (1 + f) with the last factor about 1.
  CT_LANES static V log(V x) {
    const I bits = (I)x - Float::kRootHalf;
    const V n = __builtin_convertvector(bits >> Float::kMantissa, V);
    const V f = (V)((bits & 0x7fffff) + Float::kRootHalf) - 1;
    // the polynomial of least error
    V sum = 0.22330072f - 0.14319847f * f;
    sum = sum * f - 0.25472466f;
    sum = sum * f + 0.33225873f;
    sum = sum * f - 0.49985051f;
    sum = sum * f + 1.00001278f;
    return n * 0.69314718f + sum * f;
  }

  // exp x to 1e-7; beyond 80 that of 80, and the same below.
  CT_LANES static V exp(V x) {
    x = x > 80 ? all<V>(80) : x;
    x = x < -80 ? all<V>(-80) : x;
    const V shifted = x * 1.44269504f + Float::kMagic, r = x * 1.44269504f - (shifted - Float::kMagic);
    V sum = 0.0096755414f + 0.0013276475f * r;
    sum = sum * r + 0.0555071326f;
    sum = sum * r + 0.2402211972f;
    sum = sum * r + 0.6931469671f;
    sum = sum * r + 1.0000000717f;
    return (V)((I)sum + ((I)shifted << Float::kMantissa));
  }
};

#define CT_ROUGH(name, full)                                                               \
  template <class V>                                                                       \
  CT_LANES V rough_##name(V x) {                                                           \
    if constexpr (kWidth<V> > 1 && IsWide<V>::value)                                       \
      return {rough_##name(x.low), rough_##name(x.high)};                                  \
    else if constexpr (kWidth<V> > 1 && std::is_same_v<Number<V>, float>)                  \
      return Rough<V>::name(x);                                                            \
    else                                                                                   \
      return full(x);                                                                      \
  }
CT_ROUGH(log, log_normal)
CT_ROUGH(exp, exp)
#undef CT_ROUGH

}  // namespace ct::native
