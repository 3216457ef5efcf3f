// Elementary functions on vectors of the CPU, of any width, without calls: GCC's vector types, so
// that one source serves every instruction set. Errors are a few units in the last place; infinity
// and NaN come out as they should, and small arguments keep their relative accuracy.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#include "polynomials.h"

// Vectors wider than the registers of the baseline are passed between functions that are all
// inlined.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace ct::jet {

#define CT_VECTOR __attribute__((always_inline)) static inline

template <typename T>
struct Float;
template <>
struct Float<float> {
  using Int = int32_t;
  static constexpr int kMantissa = 23, kExpTerms = 7, kLogTerms = 5, kSinTerms = 4, kCosTerms = 5;
  static constexpr Int kBias = 127, kRootHalf = 0x3f3504f3, kOne = 0x3f800000;
  static constexpr float kMagic = 0x1.8p23f, kLn2High = 0x1.62e4p-1f, kLn2Low = 0x1.7f7d1cp-20f;
  static constexpr float kExpMax = 89, kExpMin = -104.5f, kTanhMax = 88, kHuge = 12000;
  static constexpr float kTiny = 0x1p-126f, kScale = 0x1p24f;
  static constexpr int kScaleBits = 24;
  static constexpr float kHalfPi[] = {0x1.92p0f, 0x1.fb4p-12f, 0x1.444p-24f, 0x1.68c234p-39f};
  static constexpr Int kHighPart = static_cast<Int>(0xfffff000);
};
template <>
struct Float<double> {
  using Int = int64_t;
  static constexpr int kMantissa = 52, kExpTerms = 13, kLogTerms = 11, kSinTerms = 8, kCosTerms = 9;
  static constexpr Int kBias = 1023, kRootHalf = 0x3fe6a09e667f3bcd, kOne = 0x3ff0000000000000;
  static constexpr double kMagic = 0x1.8p52, kLn2High = 0x1.62e42fefp-1,
                          kLn2Low = 0x1.473de6af278ecp-34;
  static constexpr double kExpMax = 710, kExpMin = -746, kTanhMax = 708, kHuge = 1e6;
  static constexpr double kTiny = 0x1p-1022, kScale = 0x1p54;
  static constexpr int kScaleBits = 54;
  static constexpr double kHalfPi[] = {0x1.921fb544p0, 0x1.0b4611a6p-34, 0x1.3198a2ep-69,
                                       0x1.b839a252049c1p-104};
  static constexpr Int kHighPart = static_cast<Int>(0xfffffffff8000000);
};

// The functions for vectors of kBytes.
template <typename T, int kBytes>
struct VectorMath {
  using F = Float<T>;
  using Int = typename F::Int;
  typedef T V __attribute__((vector_size(kBytes)));
  using UInt = std::make_unsigned_t<Int>;
  typedef Int I __attribute__((vector_size(kBytes)));
  typedef UInt U __attribute__((vector_size(kBytes)));

  static constexpr T kInf = std::numeric_limits<T>::infinity();

  CT_VECTOR V all(T x) { return x - V{}; }

  CT_VECTOR V absolute(V x) { return (V)((I)x & std::numeric_limits<Int>::max()); }

  CT_VECTOR V with_sign(V magnitude, V sign) {
    return (V)((I)magnitude | ((I)sign & std::numeric_limits<Int>::min()));
  }

  CT_VECTOR I shifted_down(I x, int by) { return x >> by; }

  // The bits of NaN and infinity overflow in these, and what comes of it is thrown away.
  CT_VECTOR I plus(I a, I b) { return (I)((U)a + (U)b); }
  CT_VECTOR I minus(I a, I b) { return (I)((U)a - (U)b); }

  // 2^n for exponents of normal numbers.
  CT_VECTOR V power_of_two(I n) { return (V)((U)plus(n, I{} + F::kBias) << F::kMantissa); }

  // Whole numbers far below 2^kMantissa, and back.
  CT_VECTOR V from_int(I n) { return (V)plus(n, (I)all(F::kMagic)) - F::kMagic; }

  template <int kTerms>
  CT_VECTOR V polynomial(V x, const T (&c)[kTerms]) {
    V sum = all(c[kTerms - 1]);
#pragma GCC unroll 32
    for (int k = kTerms - 2; k >= 0; --k) sum = sum * x + c[k];
    return sum;
  }

  // x = n ln 2 + r with |r| <= ln(2) / 2; x is within the range of exp.
  CT_VECTOR V reduce_exp(V x, I* n) {
    const V shifted = x * T(1.44269504088896340736) + F::kMagic;
    *n = minus((I)shifted, (I)all(F::kMagic));
    const V whole = shifted - F::kMagic;
    return (x - whole * F::kLn2High) - whole * F::kLn2Low;
  }

  // exp(r) - 1 for |r| <= ln(2) / 2, by Taylor's series.
  CT_VECTOR V small_expm1(V r) {
    constexpr double kInverse[] = {1.,
                                   1. / 2,
                                   1. / 6,
                                   1. / 24,
                                   1. / 120,
                                   1. / 720,
                                   1. / 5040,
                                   1. / 40320,
                                   1. / 362880,
                                   1. / 3628800,
                                   1. / 39916800,
                                   1. / 479001600,
                                   1. / 6227020800};
    V sum = all(T(kInverse[F::kExpTerms - 1]));
#pragma GCC unroll 16
    for (int k = F::kExpTerms - 2; k >= 1; --k) sum = sum * r + T(kInverse[k]);
    return sum * r * r + r;
  }

  CT_VECTOR V limited(V x, T low, T high) {
    x = x > high ? all(high) : x;
    return x < low ? all(low) : x;
  }

  // exp(x + rest), where the rest is small.
  CT_VECTOR V exp_of_sum(V x, V rest) {
    I n;
    const V r = reduce_exp(limited(x, F::kExpMin, F::kExpMax), &n) + rest;
    const I half = shifted_down(n, 1);
    return (small_expm1(r) + T(1)) * power_of_two(half) * power_of_two(n - half);
  }

  CT_VECTOR V exp(V x) { return exp_of_sum(x, V{}); }

  // exp(x) - 1 where exp(x) is a normal number.
  CT_VECTOR V normal_expm1(V x) {
    I n;
    const V small = small_expm1(reduce_exp(x, &n)), scale = power_of_two(n);
    return small * scale + (scale - T(1));
  }

  CT_VECTOR V expm1(V x) {
    const V near = normal_expm1(limited(x, T(-40), T(40)));
    return absolute(x) < T(40) ? near : exp(x) - T(1);
  }

  // tanh, and its derivative 4 exp(2 |x|) / (exp(2 |x|) + 1)^2, which does not cancel.
  CT_VECTOR V tanh(V x, V* slope) {
    const V twice = T(2) * absolute(x), bounded = twice > F::kTanhMax ? all(F::kTanhMax) : twice;
    const V em = normal_expm1(bounded), t = T(2) / (em + T(2));
    const V s = t * (t * (em + T(1)));
    *slope = twice > F::kTanhMax ? V{} : s;
    return with_sign(em * (T(0.5) * t), x);
  }

  // The logistic function, and its derivative.
  CT_VECTOR V sigmoid(V x, V* slope) {
    const V e = exp(-absolute(x)), above = T(1) / (T(1) + e), below = e * above;
    *slope = below * above;
    return x < T(0) ? below : above;
  }

  CT_VECTOR V softplus(V x) { return (x > T(0) ? x : V{}) + log1p(exp(-absolute(x))); }

  // log for positive normal numbers.
  CT_VECTOR V log_normal(V x, V exponent) {
    const I bits = plus((I)x, I{} + (F::kOne - F::kRootHalf));
    exponent += from_int(shifted_down(bits, F::kMantissa) - F::kBias);
    const V m = (V)((bits & ((Int(1) << F::kMantissa) - 1)) + F::kRootHalf);
    const V f = m - T(1), s = f / (T(2) + f), z = s * s, half = T(0.5) * f * f;
    V sum = all(T(2.0 / (2 * F::kLogTerms + 1)));
#pragma GCC unroll 16
    for (int k = F::kLogTerms - 1; k >= 1; --k) sum = sum * z + T(2.0 / (2 * k + 1));
    return exponent * F::kLn2High - ((half - (s * (half + sum * z) + exponent * F::kLn2Low)) - f);
  }

  CT_VECTOR V log(V x) {
    const I small = x < F::kTiny;
    const V exponent = small ? all(-F::kScaleBits) : V{};
    V y = log_normal(small ? x * F::kScale : x, exponent);
    y = x == T(0) ? all(-kInf) : y;
    y = x < T(0) ? all(std::numeric_limits<T>::quiet_NaN()) : y;
    return x < kInf ? y : x;  // infinity and NaN are their own
  }

  CT_VECTOR V log1p(V x) {
    const V u = T(1) + x, y = log(u), lost = (x - (u - T(1))) / u;
    return absolute(y) < kInf ? y + lost : y;  // at -1 and infinity nothing was lost
  }

  // Sine and cosine of arguments up to kHuge.
  CT_VECTOR void sin_cos(V x, V* sine, V* cosine) {
    const V shifted = x * T(0.636619772367581343076) + F::kMagic, n = shifted - F::kMagic;
    const I quadrant = minus((I)shifted, (I)all(F::kMagic));
    V r = x - n * F::kHalfPi[0];
    r = r - n * F::kHalfPi[1];
    r = r - n * F::kHalfPi[2];
    r = r - n * F::kHalfPi[3];
    const V z = r * r;
    constexpr double kSin[] = {
        -1. / 6,        1. / 120,        -1. / 5040,           1. / 362880,
        -1. / 39916800, 1. / 6227020800, -1. / 1307674368000., 1. / 355687428096000.};
    constexpr double kCos[] = {1. / 24,
                               -1. / 720,
                               1. / 40320,
                               -1. / 3628800,
                               1. / 479001600,
                               -1. / 87178291200.,
                               1. / 20922789888000.,
                               -1. / 6402373705728000.,
                               1. / 2432902008176640000.};
    V p = all(T(kSin[F::kSinTerms - 1])), q = all(T(kCos[F::kCosTerms - 1]));
#pragma GCC unroll 16
    for (int k = F::kSinTerms - 2; k >= 0; --k) p = p * z + T(kSin[k]);
#pragma GCC unroll 16
    for (int k = F::kCosTerms - 2; k >= 0; --k) q = q * z + T(kCos[k]);
    const V s = r + r * z * p, half = T(0.5) * z, w = T(1) - half;
    const V c = w + (((T(1) - w) - half) + z * z * q);
    const I swap = (quadrant & 1) != 0;
    const V s1 = swap ? c : s, c1 = swap ? s : c;
    *sine = (quadrant & 2) != 0 ? -s1 : s1;
    *cosine = ((quadrant + 1) & 2) != 0 ? -c1 : c1;
  }

  // exp(-scale x^2), with the square to twice the precision; the scale is 1 or 1/2.
  CT_VECTOR V gaussian(V x, T scale) {
    const V high = (V)((I)x & F::kHighPart), low = x - high, square = x * x;
    const V rest = ((high * high - square) + T(2) * high * low) + low * low;
    return exp_of_sum(-square * scale, absolute(x) < T(60) ? -rest * scale : V{});
  }

  // exp(x^2) erfc(x) for x >= 0
  CT_VECTOR V scaled_erfc(V x) {
    const V t = x < T(1e9) ? (x - T(3)) / (x + T(3)) : all(1);
    V p;
    if constexpr (sizeof(T) == 4)
      p = polynomial(t, kErfcFloat);
    else
      p = polynomial(t, kErfcDouble);
    return p / (T(1) + T(2) * x);
  }

  // The normal distribution function. Its tail depends on x^2, and so not on a rounded x / sqrt(2).
  CT_VECTOR V normal_cdf(V x) {
    const V magnitude = absolute(x);
    const V tail =
        T(0.5) * gaussian(x, T(0.5)) * scaled_erfc(magnitude * T(0.707106781186547524401));
    return x < T(0) ? tail : T(1) - tail;
  }

  CT_VECTOR V erf(V x) {
    const V magnitude = absolute(x), z = x * x;
    V p;
    if constexpr (sizeof(T) == 4)
      p = polynomial(z, kErfFloat);
    else
      p = polynomial(z, kErfDouble);
    return magnitude < T(1) ? x * p
                            : with_sign(T(1) - gaussian(x, T(1)) * scaled_erfc(magnitude), x);
  }
};

}  // namespace ct::jet
