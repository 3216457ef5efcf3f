// Gradients of weights: sums of outer products. One product alone would sweep over all the weights
// for a few numbers' worth of work each; so the factors of several are kept, and added in one
// sweep.
#pragma once

#include "linear.h"

#if defined(CT_CUDA)
#include "cuda_sums.h"
#else
#include <tuple>
#endif

namespace ct::native {

namespace pending_detail {

// Products at a time, of W lanes: so many that the numbers of a block of weights, which may come
// from afar, take longer to compute than to fetch, and so few that their factors stay in the cache.
template <int W>
constexpr int kDepth = W == 1   ? 16
                       : W < 64 ? 64 / W
                                : 1;

// The kCount (at most R) numbers that lanes have side by side: to[l][i] = from[i * W + l].
template <int kCount, int W, int R, class T>
CT_LANES void turn(const T* from, T (*to)[R]) {
  if constexpr (W % R != 0) {
    for (int l = 0; l < W; ++l)
      for (int i = 0; i < kCount; ++i) to[l][i] = from[i * W + l];
  } else {
    using X = Lanes<T, R>;
    for (int part = 0; part < W; part += R) {
      X rows[R] = {};
      CT_UNROLL(16)
      for (int i = 0; i < kCount; ++i) rows[i] = load<X>(from + i * W + part);
      transpose(rows, std::make_integer_sequence<int, R>{});
      CT_UNROLL(16)
      for (int i = 0; i < R; ++i) store<X>(to[part + i], rows[i]);
    }
  }
}

// The factors of products that are still to be added to w[o * kRow + i], o < N, i < K.
template <class T, long N, long K, int W>
struct Factors {
  static constexpr int R = kRegister<T>, lanes = W, terms = kDepth<W> * W;
  static constexpr long whole = K / R;

  alignas(kRegisterBytes) T u[kDepth<W>][N][W];
  alignas(kRegisterBytes) T x[(K + R - 1) / R][terms][R];  // by lanes: inputs side by side
  int count;

  CT_LANES void put(const T* u_, const T* x_) {
    std::memcpy(u[count], u_, sizeof(u[count]));
    for (long c = 0; c < whole; ++c) turn<R, W>(x_ + c * R * W, x[c] + count * W);
    if constexpr (K % R != 0) turn<K % R, W>(x_ + whole * R * W, x[whole] + count * W);
    ++count;
  }
};

// kRows rows of the weights, kRegisters registers of columns, of which the last has kLast numbers.
template <int kRows, int kRegisters, int kLast, long kRow, long kColumn, class F, class T>
CT_LANES void add_block(const F& factors, long o, long c, T* w) {
  constexpr int R = kRegister<T>;
  using X = Lanes<T, R>;
  X acc[kRows][kRegisters] = {};
  w += o * kRow + c * R * kColumn;
  if constexpr (kColumn == 1) {
    CT_UNROLL(8)
    for (int r = 0; r < kRows; ++r) {
      CT_UNROLL(2)
      for (int i = 0; i < kRegisters; ++i) __builtin_prefetch(w + r * kRow + i * R, 1);
    }
  }
  for (int k = 0; k < factors.count; ++k)
    for (int l = 0; l < F::lanes; ++l) {
      X x[kRegisters];
      CT_UNROLL(2)
      for (int i = 0; i < kRegisters; ++i) x[i] = load<X>(factors.x[c + i][k * F::lanes + l]);
      CT_UNROLL(8)
      for (int r = 0; r < kRows; ++r) {
        const X u = all<X>(factors.u[k][o + r][l]);
        CT_UNROLL(2)
        for (int i = 0; i < kRegisters; ++i) acc[r][i] += u * x[i];
      }
    }
  CT_UNROLL(8)
  for (int r = 0; r < kRows; ++r) {
    CT_UNROLL(2)
    for (int i = 0; i < kRegisters; ++i) {
      constexpr auto numbers = [](int i) { return i == kRegisters - 1 ? kLast : R; };
      T* const to = w + r * kRow + i * R * kColumn;
      if constexpr (kColumn == 1) {
        X sum{};
        std::memcpy(&sum, to, numbers(i) * sizeof(T));
        sum += acc[r][i];
        std::memcpy(to, &sum, numbers(i) * sizeof(T));
      } else {
        T sums[R];
        store<X>(sums, acc[r][i]);
        for (int l = 0; l < numbers(i); ++l) to[l * kColumn] += sums[l];
      }
    }
  }
}

template <int kRegisters, int kLast, long N, long kRow, long kColumn, class F, class T>
CT_LANES void add_columns(const F& factors, long c, T* w) {
  constexpr int kRows = 8;
  constexpr long kWhole = N - N % kRows;
  if constexpr (kWhole > 0)
    for (long o = 0; o < kWhole; o += kRows)
      add_block<kRows, kRegisters, kLast, kRow, kColumn>(factors, o, c, w);
  if constexpr (N > kWhole)
    add_block<static_cast<int>(N - kWhole), kRegisters, kLast, kRow, kColumn>(factors, kWhole, c,
                                                                              w);
}

template <long N, long K, long kRow, long kColumn, class F, class T>
__attribute__((noinline)) void add(F& factors, T* w) {
  constexpr int R = kRegister<T>;
  constexpr long kWhole = K / R, kPairs = kWhole - kWhole % 2;
  if constexpr (kPairs > 0)
    for (long c = 0; c < kPairs; c += 2) add_columns<2, R, N, kRow, kColumn>(factors, c, w);
  if constexpr (kWhole > kPairs) add_columns<1, R, N, kRow, kColumn>(factors, kPairs, w);
  if constexpr (K % R != 0) add_columns<1, K % R, N, kRow, kColumn>(factors, kWhole, w);
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
  template <class T, int W>
  using Factors = pending_detail::Factors<T, rows<T>, columns<T>, W>;

  template <int W, class T>
  CT_LANES static void put(const T* u, const T* x, T* w, void* place) {
    auto& factors = *static_cast<Factors<T, W>*>(place);
    factors.put(turned<T> ? x : u, turned<T> ? u : x);
    if (factors.count == pending_detail::kDepth<W>) flush(w, factors);
  }

  template <class T, int W>
  CT_LANES static void flush(T* w, Factors<T, W>& factors) {
    constexpr long row = turned<T> ? kColumn : kRow, column = turned<T> ? kRow : kColumn;
    if (factors.count > 0) pending_detail::add<rows<T>, columns<T>, row, column>(factors, w);
  }
};

template <class... Products>
struct ProductList {
  static constexpr long count = sizeof...(Products);
};

// Where the gradients of the arrays that all samples share are added up, as the field writes them:
// places for the factors of outer products stand behind them.
template <class Field, int W>
class Gradients {
 public:
  using real = typename Field::real;

  void attach(real* const* shared) { all = shared; }
  void flush() {}

  real* const* all;
};

#if !defined(CT_CUDA)
template <class Field, int W>
  requires(Field::Products::count > 0)
class Gradients<Field, W> {
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
    std::tuple<typename Products::template Factors<real, W>...> factors;

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

// The gradient P += sum over lanes of u[o] x[i], later, from `place` in `shared`; on a GPU at once.
// Sums: where numbers are added up, as `real*`.
template <class P, class V, class Sums>
CT_LANES void add_outer(const V* u, const V* x, const Sums* shared, [[maybe_unused]] long place) {
  const Sums w = shared[P::array] + P::start;
#if defined(CT_CUDA)
  outer<P::N, P::K, P::kRow, P::kColumn>(u, x, w);
#else
  using T = Number<V>;
  P::template put<kWidth<V>>(reinterpret_cast<const T*>(u), reinterpret_cast<const T*>(x), w,
                             shared[place]);
#endif
}

}  // namespace ct::native
