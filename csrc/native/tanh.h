// The hyperbolic tangent of a register of numbers, to about two units in the last place: what
// networks spend their time on.
#pragma once

#include "tanh_table.h"

#if !defined(CT_CUDA)
#include "../jet/vector_math.h"

namespace ct::native {

// (expm1(2 s) / 2 - s) / s^2 for |s| <= ln(2) / 4, by the exchange algorithm of Remez: the errors
// of expm1 are below a quarter of a unit.
template <class T>
struct TanhTerms;
template <>
struct TanhTerms<float> {
  static constexpr int count = 5;
  static constexpr float all[] = {0.9999999629f, 0.6666617276f, 0.3333376129f, 0.1338652594f,
                                  0.0444240588f};
  static constexpr float bound = 10;  // from here on tanh is one
};
template <>
struct TanhTerms<double> {
  static constexpr int count = 10;
  static constexpr double all[] = {
      0x1.0000000000005p+0,  0x1.5555555555539p-1, 0x1.555555555225dp-2, 0x1.1111111119096p-3,
      0x1.6c16c17ef4c36p-5,  0x1.a01a0174d70aep-7, 0x1.a019a71eced1bp-9, 0x1.71de885786f07p-11,
      0x1.28a2344beb47cp-13, 0x1.ae6b96ad1ac6cp-16};
  static constexpr double bound = 20;
};

// tanh x = h / (h + 1) with h = expm1(2 x) / 2 = 2^n (expm1(2 s) / 2) + (2^n - 1) / 2, where
// x = n ln(2) / 2 + s.
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
  // two sums side by side: what follows waits for them
  constexpr int kLast = Terms::count - 1, kEven = kLast - kLast % 2, kOdd = kLast - 1 + kLast % 2;
  V even = all<V>(Terms::all[kEven]), odd = all<V>(Terms::all[kOdd]);
  CT_UNROLL(8)
  for (int k = kEven - 2; k >= 0; k -= 2) even = even * z + Terms::all[k];
  CT_UNROLL(8)
  for (int k = kOdd - 2; k >= 1; k -= 2) odd = odd * z + Terms::all[k];
  const V near = (even + s * odd) * z + s;
  const V h = near * scale + (scale * T(0.5) - T(0.5));
  return M::with_sign(h / (h + T(1)), x);
}

}  // namespace ct::native
#endif
