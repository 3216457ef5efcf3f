// Gradients of weights for one sample. An outer product alone would sweep over all the weights for
// two numbers' worth of work each; so the factors of several are kept, and added in one sweep.
#pragma once

#include "linear.h"

#if !defined(CT_CUDA)
#include <tuple>
#endif

namespace ct::native {

namespace pending_detail {

constexpr int kDepth = 16;  // products at a time

// The factors of products that are still to be added to w[o * kRow + i].
template <class T, long N, long K>
struct Factors {
  alignas(kRegisterBytes) T u[kDepth][N];
  alignas(kRegisterBytes) T x[kDepth][one_sample_detail::whole(K, kRegister<T>)];
  int count;
};

// kRows rows of the weights, kRegisters registers of columns, of which the last has kLast numbers.
template <int kRows, int kRegisters, int kLast, long kRow, long kColumn, class F, class T>
CT_LANES void add_block(const F& factors, long o, long i, T* w) {
  constexpr int R = kRegister<T>;
  using X = Lanes<T, R>;
  X acc[kRows][kRegisters] = {};
  for (int k = 0; k < factors.count; ++k) {
    X x[kRegisters];
    CT_UNROLL(2)
    for (int c = 0; c < kRegisters; ++c) x[c] = load<X>(factors.x[k] + i + c * R);
    CT_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      const X u = all<X>(factors.u[k][o + r]);
      CT_UNROLL(2)
      for (int c = 0; c < kRegisters; ++c) acc[r][c] += u * x[c];
    }
  }
  CT_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    CT_UNROLL(2)
    for (int c = 0; c < kRegisters; ++c) {
      constexpr auto numbers = [](int c) { return c == kRegisters - 1 ? kLast : R; };
      T* const to = w + (o + r) * kRow + (i + c * R) * kColumn;
      if constexpr (kColumn == 1) {
        X sum{};
        std::memcpy(&sum, to, numbers(c) * sizeof(T));
        sum += acc[r][c];
        std::memcpy(to, &sum, numbers(c) * sizeof(T));
      } else {
        T sums[R];
        store<X>(sums, acc[r][c]);
        for (int l = 0; l < numbers(c); ++l) to[l * kColumn] += sums[l];
      }
    }
  }
}

template <int kRegisters, int kLast, long N, long kRow, long kColumn, class F, class T>
CT_LANES void add_columns(const F& factors, long i, T* w) {
  constexpr int kRows = 8;
  constexpr long kWhole = N - N % kRows;
  if constexpr (kWhole > 0)
    for (long o = 0; o < kWhole; o += kRows)
      add_block<kRows, kRegisters, kLast, kRow, kColumn>(factors, o, i, w);
  if constexpr (N > kWhole)
    add_block<static_cast<int>(N - kWhole), kRegisters, kLast, kRow, kColumn>(factors, kWhole, i,
                                                                              w);
}

template <long N, long K, long kRow, long kColumn, class F, class T>
__attribute__((noinline)) void add(F& factors, T* w) {
  constexpr int R = kRegister<T>;
  constexpr long kPairs = K - K % (2 * R), kWhole = K - K % R;
  if constexpr (kPairs > 0)
    for (long i = 0; i < kPairs; i += 2 * R) add_columns<2, R, N, kRow, kColumn>(factors, i, w);
  if constexpr (kWhole > kPairs) add_columns<1, R, N, kRow, kColumn>(factors, kPairs, w);
  if constexpr (K > kWhole)
    add_columns<1, static_cast<int>(K - kWhole), N, kRow, kColumn>(factors, kWhole, w);
  factors.count = 0;
}

}  // namespace pending_detail

// A gradient w[o * kRow + i * kColumn] of a shared array, from its number kStart on.
template <long kArray, long kStart, long N_, long K_, long kRow_, long kColumn_>
struct Product {
  static constexpr long array = kArray, start = kStart, N = N_, K = K_;
  static constexpr long kRow = kRow_, kColumn = kColumn_;

  // Registers run along the longer side, or the one whose numbers lie side by side.
  template <class T>
  static constexpr bool turned = K >= kRegister<T> ? kColumn != 1 && kRow == 1 : N > K;
  template <class T>
  static constexpr long rows = turned<T> ? K : N;
  template <class T>
  static constexpr long columns = turned<T> ? N : K;
  template <class T>
  using Factors = pending_detail::Factors<T, rows<T>, columns<T>>;

  template <class T>
  CT_LANES static void put(const T* u, const T* x, T* w, void* place) {
    auto& factors = *static_cast<Factors<T>*>(place);
    std::memcpy(factors.u[factors.count], turned<T> ? x : u, rows<T> * sizeof(T));
    std::memcpy(factors.x[factors.count], turned<T> ? u : x, columns<T> * sizeof(T));
    if (++factors.count == pending_detail::kDepth) flush(w, factors);
  }

  template <class T>
  CT_LANES static void flush(T* w, Factors<T>& factors) {
    constexpr long row = turned<T> ? kColumn : kRow, column = turned<T> ? kRow : kColumn;
    if (factors.count > 0) pending_detail::add<rows<T>, columns<T>, row, column>(factors, w);
  }
};

template <class... Products>
struct ProductList {
  static constexpr long count = sizeof...(Products);
};

// Where the gradients of the arrays that all samples share are added up, as the field writes them:
// for one sample places for the factors of outer products stand behind them.
template <class Field, int W>
class Gradients {
 public:
  using real = typename Field::real;

  void attach(real* const* shared) { all = shared; }
  void flush() {}

  real* const* all;
};

#if !defined(CT_CUDA)
template <class Field>
  requires(kRegister<typename Field::real> > 1 && Field::Products::count > 0)
class Gradients<Field, 1> {
 public:
  using real = typename Field::real;

  void attach(real* const* shared) {
    for (long i = 0; i < Field::shared; ++i) all[i] = shared[i];
    real** place = all + Field::shared;
    each([&]<class P>(P, auto& factors) {
      factors.count = 0;
      *place++ = reinterpret_cast<real*>(&factors);
    });
  }

  // What is still pending.
  void flush() {
    each([&]<class P>(P, auto& factors) { P::flush(all[P::array] + P::start, factors); });
  }

  real* all[Field::shared + Field::Products::count];

 private:
  template <class Products>
  struct Kept;
  template <class... Products>
  struct Kept<ProductList<Products...>> {
    std::tuple<typename Products::template Factors<real>...> factors;

    template <class Body>
    void each(const Body& body) {
      std::apply([&](auto&... one) { (body(Products{}, one), ...); }, factors);
    }
  };

  template <class Body>
  void each(const Body& body) {
    kept.each(body);
  }

  Kept<typename Field::Products> kept;
};
#endif

// The gradient P += sum over lanes of u[o] x[i]; of one sample later, from `place` in `shared`.
// Sums: where numbers are added up, as `real*`.
template <class P, class V, class Sums>
CT_LANES void add_outer(const V* u, const V* x, const Sums* shared, [[maybe_unused]] long place) {
  const Sums w = shared[P::array] + P::start;
  if constexpr (kWidth<V> == 1 && kRegister<Number<V>> > 1)
    P::put(u, x, w, shared[place]);
  else
    outer<P::N, P::K, P::kRow, P::kColumn>(u, x, w);
}

}  // namespace ct::native
