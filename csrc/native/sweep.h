// One loop over the elements of a sample, for a chain of elementwise operators: what lies between
// its inputs and its results stays in registers.
#pragma once

#include "lanes.h"

namespace ct::native {

// Where such a loop is. X is what is computed with: the lanes of one element or, where a sample has
// a lane of its own, several elements, of which kCount are there.
template <class V, class X_, int kCount = kWidth<X_>>
struct Place {
  using X = X_;
  static constexpr int count = kCount;
  long j;  // the first element

  // Elements j, j + 1, .. of an array, kStride numbers apart; numbers go to all lanes.
  template <long kStride, class P>
  CT_LANES X read(const P* from) const {
    if constexpr (std::is_same_v<X, V>) {
      if constexpr (std::is_same_v<P, V>)
        return from[j * kStride];
      else
        return all<X>(from[j * kStride]);
    } else if constexpr (kStride == 0) {
      return all<X>(from[0]);
    } else if constexpr (kStride == 1) {
      return load_part<kCount, X>(from + j);
    } else {
      X x{};
      for (int i = 0; i < count; ++i) put(x, i, from[(j + i) * kStride]);
      return x;
    }
  }

  // Elements whose places a table holds.
  template <class P>
  CT_LANES X pick(const P* from, const int* table) const {
    if constexpr (std::is_same_v<X, V>) {
      if constexpr (std::is_same_v<P, V>)
        return from[table[j]];
      else
        return all<X>(from[table[j]]);
    } else {
      X x{};
      for (int i = 0; i < count; ++i) put(x, i, from[table[j + i]]);
      return x;
    }
  }

  // The same value for all elements.
  template <class P>
  CT_LANES X wide(P value) const {
    if constexpr (std::is_same_v<P, X>)
      return value;
    else
      return all<X>(value);
  }

  template <long kStride>
  CT_LANES void write(V* to, const X& x) const {
    if constexpr (std::is_same_v<X, V>) {
      to[j * kStride] = x;
    } else if constexpr (kStride == 1) {
      store_part<kCount>(to + j, x);
    } else {
      for (int i = 0; i < count; ++i) to[(j + i) * kStride] = peek(x, i);
    }
  }
};

// f(place) for all of n elements; of one sample up to kMost registers at a time.
template <class V, long n, int kMost = 1, class F>
CT_LANES void sweep(const F& f) {
  if constexpr (kWidth<V> > 1 || kRegister<V> == 1) {
    for (long j = 0; j < n; ++j) f(Place<V, V>{j});
  } else if constexpr (kMost > 1 && kMost * kRegister<V> > n) {
    sweep<V, n, kMost / 2>(f);
  } else {
    constexpr int R = kRegister<V>, kMany = kMost * R;
    long j = 0;
    for (; j + kMany <= n; j += kMany) f(Place<V, Lanes<V, kMany>>{j});
    if constexpr (kMost > 1)
      for (; j + R <= n; j += R) f(Place<V, Lanes<V, R>>{j});
    if constexpr (n % R != 0) f(Place<V, Lanes<V, R>, n % R>{j});
  }
}

// out[r] = combination of in[r * kOuter + i * kInner], i < n, from the first to the last.
template <class V, long kRows, long n, long kOuter, long kInner, class F>
CT_LANES void reduce_rows(const V* in, V* out, const F& combine) {
  if constexpr (kOuter == 1 && kRows > 1) {
    sweep<V, kRows>([&](const auto& at) {
      auto total = at.template read<1>(in);
      for (long i = 1; i < n; ++i) total = combine(total, at.template read<1>(in + i * kInner));
      at.template write<1>(out, total);
    });
  } else {
    for (long r = 0; r < kRows; ++r) {
      V total = in[r * kOuter];
      for (long i = 1; i < n; ++i) total = combine(total, in[r * kOuter + i * kInner]);
      out[r] = total;
    }
  }
}

// out[m, n] = a[m, k] b[k, n], where the samples have their own factors; strides of a, of b.
template <class V, long M, long K, long N, long kRow, long kAlong, long kDown, long kColumn,
          class A, class B>
CT_LANES void matrix_product(const A* a, const B* b, V* out) {
  for (long r = 0; r < M; ++r) {
    for (long c = 0; c < N; ++c) {
      V total{};
      for (long i = 0; i < K; ++i) total += a[r * kRow + i * kAlong] * b[i * kDown + c * kColumn];
      out[r * N + c] = total;
    }
  }
}

}  // namespace ct::native
