// Lanes: one number of W samples at a time. A lane type is a vector of the compiler, and for W = 1
// the number itself, so that one source gives vector code and straight scalar code.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

// Vectors wider than the registers of the baseline pass between functions that are all inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wignored-attributes"

#define CT_LANES __attribute__((always_inline)) inline

namespace ct::native {

#if defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// Numbers in one register: the usual W.
template <class T>
constexpr int kRegister = kRegisterBytes / static_cast<int>(sizeof(T));

template <class T, int W>
struct LaneType {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};
template <class T>
struct LaneType<T, 1> {
  using type = T;
};

template <class T, int W>
using Lanes = typename LaneType<T, W>::type;

template <class V, bool kScalar = std::is_arithmetic_v<V>>
struct LaneTraits {
  using Number = std::remove_cvref_t<decltype(std::declval<V&>()[0])>;
  static constexpr int width = sizeof(V) / sizeof(Number);
  using Mask = std::remove_cvref_t<decltype(std::declval<V>() == std::declval<V>())>;
};
template <class V>
struct LaneTraits<V, true> {
  using Number = V;
  static constexpr int width = 1;
  using Mask = bool;
};

template <class V>
using Number = typename LaneTraits<V>::Number;
template <class V>
constexpr int kWidth = LaneTraits<V>::width;
template <class V>
using Mask = typename LaneTraits<V>::Mask;

// ---- numbers to lanes and back
// ------------------------------------------------------------------------------------

// The same number in every lane.
template <class V>
CT_LANES V all(Number<V> x) {
  if constexpr (kWidth<V> == 1)
    return x;
  else
    return x - V{};
}

// From and to kWidth<V> numbers at any address.
template <class V>
CT_LANES V load(const Number<V>* from) {
  V x;
  std::memcpy(&x, from, sizeof(V));
  return x;
}

template <class V>
CT_LANES void store(Number<V>* to, const V& x) {
  std::memcpy(to, &x, sizeof(V));
}

// One lane. Neither names a lane of x itself, which would keep x out of the registers.
template <class V>
CT_LANES Number<V> get(V x, int lane) {
  Number<V> each[kWidth<V>];
  store<V>(each, x);
  return each[lane];
}

template <class V>
CT_LANES void set(V& x, int lane, Number<V> value) {
  if constexpr (kWidth<V> == 1) {
    x = value;
  } else {
    Mask<V> number;
    for (int i = 0; i < kWidth<V>; ++i) number[i] = i;
    x = number == (Mask<V>{} + lane) ? all<V>(value) : x;
  }
}

// Lanes of another number type.
template <class To, class V>
CT_LANES To convert(V x) {
  if constexpr (std::is_same_v<To, V>)
    return x;
  else if constexpr (kWidth<V> == 1)
    return static_cast<To>(x);
  else
    return __builtin_convertvector(x, To);
}

// ---- masks
// --------------------------------------------------------------------------------------------------------

template <class M, class V>
CT_LANES V select(M mask, V yes, V no) {
  return mask ? yes : no;
}

// The mask for lanes of numbers of another size.
template <class V, class M>
CT_LANES Mask<V> mask_for(M mask) {
  if constexpr (std::is_same_v<M, bool> || std::is_same_v<M, Mask<V>>)
    return mask;
  else
    return __builtin_convertvector(mask, Mask<V>);
}

CT_LANES bool negated(bool mask) { return !mask; }
template <class M>
CT_LANES M negated(M mask) {
  return ~mask;
}

// Whether any lane is set.
CT_LANES bool any(bool mask) { return mask; }
template <class M>
CT_LANES bool any(M mask) {
  Number<M> found = 0;
  for (int i = 0; i < kWidth<M>; ++i) found |= mask[i];
  return found != 0;
}

// Bit i is lane i.
CT_LANES uint32_t bits_of(bool mask) { return mask; }
template <class M>
CT_LANES uint32_t bits_of(M mask) {
  uint32_t bits = 0;
  for (int i = 0; i < kWidth<M>; ++i) bits |= (mask[i] != 0 ? 1u : 0u) << i;
  return bits;
}

// ---- lanes into one
// ------------------------------------------------------------------------------------------------

// The sum, by halves.
template <class V>
CT_LANES Number<V> sum(V x) {
  if constexpr (kWidth<V> == 1) {
    return x;
  } else {
    using Half = Lanes<Number<V>, kWidth<V> / 2>;
    if constexpr (kWidth<V> == 2) {
      return x[0] + x[1];
    } else {
      Half low, high;
      std::memcpy(&low, &x, sizeof(Half));
      std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof(Half), sizeof(Half));
      return sum(low + high);
    }
  }
}

// ---- elementwise over the elements of one sample
// ------------------------------------------------------------

// out[j] = f(in[j]...) for j < n. With W = 1 the elements themselves go in registers, whole ones:
// what f gives for an element does not depend on where it stands.
template <class V, class F, class... In>
CT_LANES void map(long n, V* out, const F& f, const In*... in) {
  if constexpr (kWidth<V> > 1) {
    for (long j = 0; j < n; ++j) out[j] = f(in[j]...);
  } else {
    constexpr int R = kRegister<V>;
    using X = Lanes<V, R>;
    long j = 0;
    for (; j + R <= n; j += R) store<X>(out + j, f(load<X>(in + j)...));
    if (j == n) return;
    const auto part = [&](const V* from) {
      X x{};
      std::memcpy(&x, from + j, (n - j) * sizeof(V));
      return x;
    };
    const X last = f(part(in)...);
    std::memcpy(out + j, &last, (n - j) * sizeof(V));
  }
}

}  // namespace ct::native
