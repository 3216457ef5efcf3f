// Logarithm and exponential as good as the length of a step needs them, which hangs on few digits
// of the error: cheaper by half than full ones, whose last digits cost most.
#pragma once

#include "math.h"

namespace ct::native {

// Of lanes in a register. The polynomials are those of least error.
template <class V>
struct Rough {
  using T = Number<V>;
  using I = Mask<V>;
  using Vector = Vectors<V>;
  using Float = ct::jet::Float<T>;
  static constexpr bool kSingle = sizeof(T) == 4;

  // log x for positive normal x, to 2e-6 in single precision and 5e-9 in double: x = 2^n (1 + f)
  // with the last factor about 1.
  CT_LANES static V log(V x) {
    constexpr T kSeries[] = {1.0000127816046203,  -0.4998505134977712, 0.3322587292628004,
                             -0.2547246599830141, 0.22330072110602125, -0.14319846956385504};
    constexpr T kLonger[] = {0.9999998839323435,  -0.4999996925733773,  0.33334987349293493,
                             -0.2500348113696104, 0.19939426911579206,  -0.16529724503606127,
                             0.15060122266896653, -0.14593619880423614, 0.08729739809220848};
    const I bits = (I)x - Float::kRootHalf;
    const V n = Vector::from_int(bits >> Float::kMantissa);
    const V f =
        (V)((bits & ((typename Float::Int(1) << Float::kMantissa) - 1)) + Float::kRootHalf) - 1;
    const V ratio = kSingle ? Vector::polynomial(f, kSeries) : Vector::polynomial(f, kLonger);
    return n * T(0.69314718055994531) + ratio * f;
  }

  // exp x to 1e-7 and 5e-11; of what is larger than 80 that of 80, and the same below.
  CT_LANES static V exp(V x) {
    constexpr T kSeries[] = {1.0000000716562722, 0.9999996920199821,   0.49998894837426955,
                             0.1666757461728338, 0.041915383489398036, 0.0082976628295221};
    constexpr T kLonger[] = {0.9999999999616814,    1.000000000243099,     0.5000000104537417,
                             0.16666665126123043,   0.04166622542199526,   0.008333561091354514,
                             0.0013948183562537447, 0.00019775171724918506};
    I n;
    const V r = Vector::reduce_exp(Vector::limited(x, -80, 80), &n);
    const V part = kSingle ? Vector::polynomial(r, kSeries) : Vector::polynomial(r, kLonger);
    return (V)((I)part + (n << Float::kMantissa));
  }
};

#define CT_ROUGH(name, full)                              \
  template <class V>                                      \
  CT_LANES V rough_##name(V x) {                          \
    if constexpr (kWidth<V> == 1)                         \
      return full(x);                                     \
    else if constexpr (IsWide<V>::value)                  \
      return {rough_##name(x.low), rough_##name(x.high)}; \
    else                                                  \
      return Rough<V>::name(x);                           \
  }
CT_ROUGH(log, log_normal)
CT_ROUGH(exp, exp)
#undef CT_ROUGH

}  // namespace ct::native
