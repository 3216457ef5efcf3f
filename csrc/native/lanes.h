// Lanes: one number of W samples at a time. A lane type is a vector of the compiler, and for W = 1
// the number itself, so that one source gives vector code and straight scalar code.
#pragma once

#include "base.h"
#include "wide.h"

#if !defined(__CUDACC__)
// Vectors wider than the registers of the baseline pass between functions that are all inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#pragma GCC diagnostic ignored "-Wignored-attributes"
#endif

namespace ct::native {

#if defined(CT_CUDA)
constexpr int kRegisterBytes = 1;
#elif defined(__AVX512F__)
constexpr int kRegisterBytes = 64;
#elif defined(__AVX__)
constexpr int kRegisterBytes = 32;
#else
constexpr int kRegisterBytes = 16;
#endif

// Numbers in one register: the usual W.
template <class T>
constexpr int kRegister = kRegisterBytes > 1 ? kRegisterBytes / static_cast<int>(sizeof(T)) : 1;

// How many registers go through a long chain of operators side by side, which one by one would wait
// for itself: as many as there is room for.
#if defined(__AVX512F__) && !defined(CT_CUDA)
template <class T>
constexpr int kSideBySide = sizeof(T) == 8 ? 8 : 1;  // (of float the chains are short)
#else
template <class T>
constexpr int kSideBySide = 1;
#endif

template <class T, int W, bool kFits = (W == 1 || sizeof(T) * W <= kRegisterBytes)>
struct LaneType;
#if !defined(CT_CUDA)
template <class T, int W>
struct LaneType<T, W, true> {
  typedef T type __attribute__((vector_size(sizeof(T) * W)));
};
#endif
template <class T>
struct LaneType<T, 1, true> {
  using type = T;
};
template <class T, int W>
struct LaneType<T, W, false> {
  using type = Wide<typename LaneType<T, W / 2>::type, T, W>;
};

template <class T, int W>
using Lanes = typename LaneType<T, W>::type;

// A set of lanes: bit i is lane i.
using LaneSet = uint32_t;

template <class V, bool kScalar = std::is_arithmetic_v<V>>
struct LaneTraits {
  using Number = std::remove_cvref_t<decltype(std::declval<V&>()[0])>;
  static constexpr int width = sizeof(V) / sizeof(Number);
  using Mask = std::remove_cvref_t<decltype(std::declval<V>() == std::declval<V>())>;
};
template <class H, class T, int W>
struct LaneTraits<Wide<H, T, W>, false> {
  using Number = T;
  static constexpr int width = W;
  using Mask = decltype(std::declval<Wide<H, T, W>>() == std::declval<Wide<H, T, W>>());
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
  else if constexpr (IsWide<V>::value)
    return {all<typename V::Half>(x), all<typename V::Half>(x)};
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

// Lanes of what is in memory in any case.
template <class V>
CT_LANES Number<V> peek(const V& x, int lane) {
  Number<V> value;
  std::memcpy(&value, reinterpret_cast<const char*>(&x) + lane * sizeof(value), sizeof(value));
  return value;
}

template <class V>
CT_LANES void put(V& x, int lane, Number<V> value) {
  if constexpr (kWidth<V> == 1)
    x = value;
  else
    std::memcpy(reinterpret_cast<char*>(&x) + lane * sizeof(value), &value, sizeof(value));
}

template <class V>
CT_LANES void set(V& x, int lane, Number<V> value) {
  if constexpr (kWidth<V> == 1) {
    x = value;
  } else if constexpr (IsWide<V>::value) {
    set(x.low, lane, value);
    set(x.high, lane - kWidth<V> / 2, value);
  } else {
    Mask<V> number;
    for (int i = 0; i < kWidth<V>; ++i) number[i] = i;
    x = number == (Mask<V>{} + lane) ? all<V>(value) : x;
  }
}

// The lanes in two halves, and these put together; in registers, for a load of what was just stored
// in halves waits for both.
template <int kFirst, class V, int... P>
CT_LANES auto lanes_from(const V& x, const V& y, std::integer_sequence<int, P...>) {
#if defined(CT_CUDA)
  return x;
#else
  return __builtin_shufflevector(x, y, (kFirst + P)...);
#endif
}

template <class V>
CT_LANES auto low_half(const V& x) {
  if constexpr (IsWide<V>::value)
    return x.low;
  else if constexpr (kWidth<V> == 2)
    return x[0];
  else
    return lanes_from<0>(x, x, std::make_integer_sequence<int, kWidth<V> / 2>{});
}

template <class V>
CT_LANES auto high_half(const V& x) {
  if constexpr (IsWide<V>::value)
    return x.high;
  else if constexpr (kWidth<V> == 2)
    return x[1];
  else
    return lanes_from<kWidth<V> / 2>(x, x, std::make_integer_sequence<int, kWidth<V> / 2>{});
}

template <class V, class Half>
CT_LANES V joined(Half low, Half high) {
  if constexpr (IsWide<V>::value)
    return V{low, high};
  else if constexpr (kWidth<V> == 2)
    return V{low, high};
  else
    return lanes_from<0>(low, high, std::make_integer_sequence<int, kWidth<V>>{});
}

// kCount numbers from any address, and zeros; and the first kCount numbers to any address. In
// pieces of whole powers of two: a register loaded from where a part of it was just stored would
// wait.
template <int kCount, class V>
CT_LANES V load_part(const Number<V>* from) {
  if constexpr (kCount == kWidth<V>) {
    return load<V>(from);
  } else if constexpr (kCount == 1) {
    return V{from[0]};
  } else {
    constexpr int kHalf = kWidth<V> / 2;
    using Half = Lanes<Number<V>, kHalf>;
    if constexpr (kCount <= kHalf)
      return joined<V>(load_part<kCount, Half>(from), Half{});
    else
      return joined<V>(load<Half>(from), load_part<kCount - kHalf, Half>(from + kHalf));
  }
}

template <int kCount, class V>
CT_LANES void store_part(Number<V>* to, const V& x) {
  if constexpr (kCount == kWidth<V>) {
    store<V>(to, x);
  } else {
    constexpr int kHalf = kWidth<V> / 2;
    using Half = Lanes<Number<V>, kHalf>;
    if constexpr (kCount <= kHalf) {
      store_part<kCount, Half>(to, low_half(x));
    } else {
      store<Half>(to, low_half(x));
      store_part<kCount - kHalf, Half>(to + kHalf, high_half(x));
    }
  }
}

// Lanes of another number type.
template <class To, class V>
CT_LANES To convert(V x) {
  if constexpr (std::is_same_v<To, V>)
    return x;
  else if constexpr (kWidth<V> == 1)
    return static_cast<To>(x);
  else if constexpr (IsWide<To>::value || IsWide<V>::value)
    return joined<To>(convert<Lanes<Number<To>, kWidth<V> / 2>>(low_half(x)),
                      convert<Lanes<Number<To>, kWidth<V> / 2>>(high_half(x)));
#if !defined(CT_CUDA)
  else
    return __builtin_convertvector(x, To);
#endif
}

// ---- masks
// --------------------------------------------------------------------------------------------------------

template <class M, class V>
CT_LANES V select(M mask, V yes, V no) {
  if constexpr (IsWide<V>::value)
    return {select(mask.low, yes.low, no.low), select(mask.high, yes.high, no.high)};
  else
    return mask ? yes : no;
}

// The mask for lanes of numbers of another size.
template <class V, class M>
CT_LANES Mask<V> mask_for(M mask) {
  if constexpr (std::is_same_v<M, bool> || std::is_same_v<M, Mask<V>>)
    return mask;
  else if constexpr (IsWide<M>::value || IsWide<V>::value)
    return joined<Mask<V>>(mask_for<Lanes<Number<V>, kWidth<V> / 2>>(low_half(mask)),
                           mask_for<Lanes<Number<V>, kWidth<V> / 2>>(high_half(mask)));
#if !defined(CT_CUDA)
  else
    return __builtin_convertvector(mask, Mask<V>);
#endif
}

CT_LANES bool negated(bool mask) { return !mask; }
template <class M>
CT_LANES M negated(M mask) {
  return ~mask;
}

// The set of the lanes of a mask.
CT_LANES LaneSet bits_of(bool mask) { return mask; }
template <class M>
CT_LANES LaneSet bits_of(M mask) {
  if constexpr (IsWide<M>::value) {
    return bits_of(mask.low) | bits_of(mask.high) << kWidth<M> / 2;
  } else {
#if defined(__AVX512DQ__)
    typedef int Words __attribute__((vector_size(64)));
    typedef long long Pairs __attribute__((vector_size(64)));
    if constexpr (sizeof(M) == 64 && sizeof(Number<M>) == 8)
      return __builtin_ia32_cvtq2mask512((Pairs)mask);
    else if constexpr (sizeof(M) == 64 && sizeof(Number<M>) == 4)
      return __builtin_ia32_cvtd2mask512((Words)mask);
#endif
    LaneSet bits = 0;
    for (int i = 0; i < kWidth<M>; ++i) bits |= LaneSet{mask[i] != 0} << i;
    return bits;
  }
}

// The other way round.
template <class M>
CT_LANES M mask_of(LaneSet bits) {
  if constexpr (kWidth<M> == 1) {
    return static_cast<M>(bits & 1);
  } else if constexpr (IsWide<M>::value) {
    using Half = decltype(M::low);
    return {mask_of<Half>(bits), mask_of<Half>(bits >> kWidth<Half>)};
  } else {
    M number;
    for (int i = 0; i < kWidth<M>; ++i) number[i] = i;
    return (M)(((M{} + static_cast<Number<M>>(bits)) >> number & 1) != 0);
  }
}

template <class V>
CT_LANES V select(LaneSet lanes, V yes, V no) {
  if constexpr (IsWide<V>::value) {
    return {select(lanes, yes.low, no.low), select(lanes >> kWidth<V> / 2, yes.high, no.high)};
  } else {
#if defined(__AVX512F__) && !defined(__clang__)
    if constexpr (std::is_same_v<V, Lanes<double, 8>>)
      return __builtin_ia32_blendmpd_512_mask(no, yes, lanes);
    else if constexpr (std::is_same_v<V, Lanes<float, 16>>)
      return __builtin_ia32_blendmps_512_mask(no, yes, lanes);
    else
#endif
      return select(mask_of<Mask<V>>(lanes), yes, no);
  }
}

// body(lane) for the lanes whose bits are set.
template <class Body>
CT_LANES void for_lanes(LaneSet bits, const Body& body) {
#if defined(CT_CUDA)
  if (bits != 0) body(0);
#else
  for (; bits != 0; bits &= bits - 1) body(__builtin_ctz(bits));
#endif
}

// Whether any lane is set.
#if defined(CT_TOGETHER)
__device__ inline bool any(bool mask) { return __syncthreads_or(mask); }
#else
CT_LANES bool any(bool mask) { return mask; }
#endif
CT_LANES bool any(LaneSet lanes) { return any(lanes != 0); }
template <class M>
CT_LANES bool any(M mask) {
  return bits_of(mask) != 0;
}

// ---- lanes into one
// ------------------------------------------------------------------------------------------------

// The sum, by halves.
template <class V>
CT_LANES Number<V> sum(V x) {
  if constexpr (kWidth<V> == 1) {
    return x;
  } else {
    return sum(low_half(x) + high_half(x));
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
