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

namespace tanh_detail {

// a / b for 0 <= a <= b, b >= 1. Many registers would wait for the one that divides: for these by
// multiplying, which rounds otherwise once in a billion times.
template <bool kMany, class V>
CT_LANES V quotient(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (kMany && sizeof(V) == 64 && sizeof(Number<V>) == 8) {
    typedef double Eight __attribute__((vector_size(64)));
    const V about = (V)__builtin_ia32_rcp14pd512_mask((Eight)b, (Eight)b, 0xff);
    const V off = Number<V>(1) - b * about, inverse = about + about * (off + off * off);
    const V first = a * inverse;
    return first + (a - b * first) * inverse;
  }
#endif
  return a / b;
}

}  // namespace tanh_detail

// Of K registers, in place. tanh x = h / (h + 1) with h = expm1(2 x) / 2
// = 2^n (expm1(2 s) / 2) + (2^n - 1) / 2, where x = n ln(2) / 2 + s. Of expm1(2 s) / 2 = s / u with
// u = s coth s - s, a series of few terms, the divisor goes to that of the whole.
template <int K, class V>
CT_LANES void tanh_of_registers(V (&x)[K]) {
  using T = Number<V>;
  using M = ct::jet::VectorMath<T, static_cast<int>(sizeof(V))>;
  using F = ct::jet::Float<T>;
  using Terms = TanhTerms<T>;
  const auto each = [](const auto& f) __attribute__((always_inline)) {
    CT_UNROLL(8)
    for (int k = 0; k < K; ++k) f(k);
  };
#define CT_EACH(body) each([&](int k) __attribute__((always_inline)) { body; })
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<V, tanh_detail::Floats>) {
    CT_EACH(x[k] = tanh_detail::tanh_by_table(x[k]));
    return;
  }
#endif
  // the lowest bits of this are those of an exponent
  constexpr T kMagic = F::kMagic + F::kBias;
  V s[K], scale[K], z[K], u[K], h[K];
  CT_EACH(s[k] = M::absolute(x[k]));
  CT_EACH(s[k] = s[k] > Terms::bound ? all<V>(Terms::bound) : s[k]);
  CT_EACH(h[k] = s[k] * T(2.88539008177792681472) + kMagic);
  CT_EACH(scale[k] = (V)((typename M::U)h[k] << F::kMantissa));
  CT_EACH(h[k] = h[k] - kMagic);
  CT_EACH(s[k] = s[k] - h[k] * (F::kLn2High / 2));
  CT_EACH(s[k] = s[k] - h[k] * (F::kLn2Low / 2));
  CT_EACH(z[k] = s[k] * s[k]);
  CT_EACH(u[k] = all<V>(Terms::all[Terms::count - 1]));
  CT_UNROLL(8)
  for (int term = Terms::count - 2; term >= 0; --term)
    CT_EACH(u[k] = u[k] * z[k] + Terms::all[term]);
  CT_EACH(u[k] = (u[k] * z[k] + T(1)) - s[k]);
  CT_EACH(h[k] = (scale[k] * T(0.5) - T(0.5)) * u[k] + scale[k] * s[k]);
  CT_EACH(x[k] = M::with_sign(tanh_detail::quotient<(K > 2)>(h[k], h[k] + u[k]), x[k]));
#undef CT_EACH
}

namespace tanh_detail {

template <class V>
CT_LANES auto first_of(const V& x) {
  if constexpr (IsWide<V>::value)
    return first_of(x.low);
  else
    return x;
}

// Between lanes and their registers.
template <bool kOut, class V, class X>
CT_LANES void pass(V& x, X* registers) {
  if constexpr (IsWide<V>::value) {
    pass<kOut>(x.low, registers);
    pass<kOut>(x.high, registers + kWidth<V> / kWidth<X> / 2);
  } else if constexpr (kOut) {
    *registers = x;
  } else {
    x = *registers;
  }
}

}  // namespace tanh_detail

template <class V>
CT_LANES V tanh_in_registers(V x) {
  using X = decltype(tanh_detail::first_of(x));
  constexpr int kCount = kWidth<V> / kWidth<X>, kStep = std::min(kCount, kSideBySide<Number<V>>);
  X registers[kCount / kStep][kStep];
  tanh_detail::pass<true>(x, &registers[0][0]);
  CT_UNROLL(8)
  for (auto& some : registers) tanh_of_registers(some);
  tanh_detail::pass<false>(x, &registers[0][0]);
  return x;
}

}  // namespace ct::native
#endif
