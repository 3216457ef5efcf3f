// The little of the standard library that the kernels name, for NVRTC, which has none of it.
#pragma once

using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long;
using uint64_t = unsigned long;

namespace std {

using ::acos, ::acosh, ::asin, ::asinh, ::atan, ::atan2, ::atanh, ::ceil, ::copysign, ::cos, ::cosh;
using ::erf, ::erfc, ::exp, ::exp2, ::expm1, ::fabs, ::floor, ::fmod, ::hypot, ::isfinite, ::lgamma;
using ::log, ::log10, ::log1p, ::log2, ::memcpy, ::nearbyint, ::nextafter, ::pow, ::sin, ::sinh;
using ::sqrt, ::tan, ::tanh, ::trunc;

template <class T, T kValue>
struct integral_constant {
  static constexpr T value = kValue;
  constexpr operator T() const { return kValue; }
};
using true_type = integral_constant<bool, true>;
using false_type = integral_constant<bool, false>;

template <class A, class B>
constexpr bool is_same_v = false;
template <class A>
constexpr bool is_same_v<A, A> = true;

template <bool kFirst, class A, class B>
struct conditional {
  using type = A;
};
template <class A, class B>
struct conditional<false, A, B> {
  using type = B;
};
template <bool kFirst, class A, class B>
using conditional_t = typename conditional<kFirst, A, B>::type;

template <class T>
struct remove_cvref {
  using type = T;
};
template <class T>
struct remove_cvref<const T> : remove_cvref<T> {};
template <class T>
struct remove_cvref<T&> : remove_cvref<T> {};
template <class T>
using remove_cvref_t = typename remove_cvref<T>::type;
template <class T>
using remove_cv_t = remove_cvref_t<T>;

template <class T>
struct type_identity {
  using type = T;
};
template <class T>
using type_identity_t = typename type_identity<T>::type;

// of the types that lanes are made of
template <class T>
constexpr bool is_arithmetic_v = is_same_v<T, float> || is_same_v<T, double> ||
                                 is_same_v<T, bool> || is_same_v<T, int> || is_same_v<T, long>;

template <class T>
T&& declval();

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}

template <class T, T... I>
struct integer_sequence {};
template <class T, long kCount, T... I>
struct count_up : count_up<T, kCount - 1, kCount - 1, I...> {};
template <class T, T... I>
struct count_up<T, 0, I...> {
  using type = integer_sequence<T, I...>;
};
template <class T, T kCount>
using make_integer_sequence = typename count_up<T, kCount>::type;

template <class T>
struct numeric_limits {
  static constexpr T infinity() { return __builtin_bit_cast(double, 0x7ff0000000000000ull); }
  static constexpr T quiet_NaN() { return __builtin_bit_cast(double, 0x7ff8000000000000ull); }
};

}  // namespace std
