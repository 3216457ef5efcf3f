// The hyperbolic tangent of a register of numbers, to about two units in the last place: what
// networks spend their time on.
#pragma once

#include "tanh_table.h"

#if !defined(CT_CUDA)
#include "../jet/vector_math.h"

namespace ct::native {

// (s coth s - 1) / s^2 as a polynomial in s^2 for |s| <= ln(2) / 4, by the exchange algorithm of
// Remez: errors below a quarter of a unit.
template <class T>
struct TanhTerms;
template <>
struct TanhTerms<float> {
  static constexpr int count = 2;
  static constexpr float all[] = {0x1.55551ep-2f, -0x1.6aa42ep-6f};
  static constexpr float bound = 10;  // from here on tanh is one
};
template <>
struct TanhTerms<double> {
  static constexpr int count = 5;
  static constexpr double all[] = {0x1.555555555553ep-2, -0x1.6c16c16beb84dp-6,
                                   0x1.1566aaf13a33bp-9, -0x1.bbd4193c84796p-13,
                                   0x1.63751db19504ap-16};
  static constexpr double bound = 20;
};

// tanh x = h / (h + 1) with h = expm1(2 x) / 2 = 2^n (expm1(2 s) / 2) + (2^n - 1) / 2, where
// x = n ln(2) / 2 + s. Of expm1(2 s) / 2 = s / u with u = s coth s - s, a series of few terms, the
// divisor goes to that of the whole.
template <class V>
CT_LANES V tanh_of_register(V x) {
  using T = Number<V>;
  using M = ct::jet::VectorMath<T, static_cast<int>(sizeof(V))>;
  using F = ct::jet::Float<T>;
  using Terms = TanhTerms<T>;
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, tanh_detail::Floats>) return tanh_detail::tanh_by_table(x);
#endif
  V size = M::absolute(x);
  size = size > Terms::bound ? all<V>(Terms::bound) : size;
  // the lowest bits of this are those of an exponent
  constexpr T kMagic = F::kMagic + F::kBias;
  const V shifted = size * T(2.88539008177792681472) + kMagic, n = shifted - kMagic;
  const V scale = (V)((typename M::U)shifted << F::kMantissa);
  const V s = (size - n * (F::kLn2High / 2)) - n * (F::kLn2Low / 2), z = s * s;
  V sum = all<V>(Terms::all[Terms::count - 1]);
  CT_UNROLL(8)
  for (int k = Terms::count - 2; k >= 0; --k) sum = sum * z + Terms::all[k];
  const V u = (sum * z + T(1)) - s;
  const V h = (scale * T(0.5) - T(0.5)) * u + scale * s;
  return M::with_sign(h / (h + u), x);
}

}  // namespace ct::native
#endif
