// Small dense matrices times lanes. The weights are the same for all samples: each is read once and
// multiplies every lane, so that the products run near the rate of a GEMM as long as the weights
// stay in the cache. A matrix is w[o * kRow + i * kColumn], o < N outputs, i < K inputs; its
// transpose is the same data with the strides exchanged.
#pragma once

#include "lanes.h"
#include "outer.h"

namespace ct::native {

enum class Sum { kWrite, kAdd };

namespace linear_detail {

constexpr int kOutputs = 8;  // accumulators at a time
constexpr int kAhead = 8;    // rows

// Outputs o .. o + kCount - 1.
template <int kCount, long K, long kRow, long kColumn, Sum kSum, class V, class T>
CT_LANES void rows(const T* w, const T* b, const V* x, V* y) {
  V acc[kCount];
  CT_UNROLL(8)
  for (int r = 0; r < kCount; ++r) {
    acc[r] = kSum == Sum::kAdd ? y[r] : V{};
    if (b != nullptr) acc[r] += all<V>(b[r]);
  }
  for (long i = 0; i < K; ++i) {
    // a transposed matrix is read line by line, which no processor foresees
    if constexpr (kWidth<V> > 1 && kColumn > 64)
      __builtin_prefetch(w + (i + kAhead < K ? i + kAhead : i) * kColumn);
    const V xi = x[i];
    CT_UNROLL(8)
    for (int r = 0; r < kCount; ++r) acc[r] += xi * w[r * kRow + i * kColumn];
  }
  CT_UNROLL(8)
  for (int r = 0; r < kCount; ++r) y[r] = acc[r];
}

// One sample, inputs side by side in memory: registers run along the inputs.
template <int kCount, long K, long kRow, Sum kSum, class T>
CT_LANES void dots(const T* w, const T* b, const T* x, T* y) {
  constexpr int R = kRegister<T>;
  using X = Lanes<T, R>;
  X acc[kCount] = {};
  long i = 0;
  for (; i + R <= K; i += R) {
    const X xi = load<X>(x + i);
    CT_UNROLL(8)
    for (int r = 0; r < kCount; ++r) acc[r] += xi * load<X>(w + r * kRow + i);
  }
  CT_UNROLL(8)
  for (int r = 0; r < kCount; ++r) {
    T total = sum(acc[r]);
    for (long j = i; j < K; ++j) total += x[j] * w[r * kRow + j];
    if (b != nullptr) total += b[r];
    y[r] = kSum == Sum::kAdd ? y[r] + total : total;
  }
}

// The sums of R registers in one: at each level two registers of partial sums become one, which
// holds the folded halves of the groups of the first between those of the second.
template <int kGroup, class X, int... P>
CT_LANES X fold_pair(X a, X b, std::integer_sequence<int, P...>) {
  constexpr int R = kWidth<X>, h = kGroup / 2;
  constexpr auto from = [](int p) { return (p / h % 2) * R + p / h / 2 * kGroup + p % h; };
  return __builtin_shufflevector(a, b, from(P)...) +
         __builtin_shufflevector(a, b, (from(P) + h)...);
}

template <int kCount, class X>
CT_LANES X fold_all(X* each) {
  if constexpr (kCount == 1) {
    return each[0];
  } else {
    constexpr int half = kCount / 2;
    CT_UNROLL(8)
    for (int i = 0; i < half; ++i)
      each[i] =
          fold_pair<kCount>(each[i], each[i + half], std::make_integer_sequence<int, kWidth<X>>{});
    return fold_all<half>(each);
  }
}

// As many dots as a register holds numbers.
template <long K, long kRow, Sum kSum, class T>
CT_LANES void register_of_dots(const T* w, const T* b, const T* x, T* y) {
  constexpr int R = kRegister<T>;
  using X = Lanes<T, R>;
  X acc[R] = {};
  for (long i = 0; i + R <= K; i += R) {
    const X xi = load<X>(x + i);
    CT_UNROLL(16)
    for (int r = 0; r < R; ++r) acc[r] += xi * load<X>(w + r * kRow + i);
  }
  X total = fold_all<R>(acc);
  for (long j = K - K % R; j < K; ++j) {
    X column;
    for (int r = 0; r < R; ++r) column[r] = w[r * kRow + j];
    total += x[j] * column;
  }
  if (b != nullptr) total += load<X>(b);
  store<X>(y, kSum == Sum::kAdd ? load<X>(y) + total : total);
}

// One sample, outputs side by side in memory: registers run along the outputs.
template <int kRegisters, long K, long kColumn, Sum kSum, class T>
CT_LANES void columns(const T* w, const T* b, const T* x, T* y) {
  constexpr int R = kRegister<T>;
  using X = Lanes<T, R>;
  X acc[kRegisters];
  CT_UNROLL(8)
  for (int r = 0; r < kRegisters; ++r) {
    acc[r] = kSum == Sum::kAdd ? load<X>(y + r * R) : X{};
    if (b != nullptr) acc[r] += load<X>(b + r * R);
  }
  for (long i = 0; i < K; ++i) {
    const T xi = x[i];
    CT_UNROLL(8)
    for (int r = 0; r < kRegisters; ++r) acc[r] += xi * load<X>(w + i * kColumn + r * R);
  }
  CT_UNROLL(8)
  for (int r = 0; r < kRegisters; ++r) store<X>(y + r * R, acc[r]);
}

template <long N, long K, long kRow, long kColumn, Sum kSum, class T>
CT_LANES void one_sample(const T* w, const T* b, const T* x, T* y) {
  constexpr long R = kRegister<T>;
  const auto bias = [&](long o) { return b == nullptr ? nullptr : b + o; };
  long o = 0;
  if constexpr (kRow == 1 && kColumn != 1) {
    for (; o + 4 * R <= N; o += 4 * R) columns<4, K, kColumn, kSum>(w + o, bias(o), x, y + o);
    for (; o + R <= N; o += R) columns<1, K, kColumn, kSum>(w + o, bias(o), x, y + o);
  } else if constexpr (kColumn == 1 && K >= R) {
    constexpr long kWhole = N - N % R;
    for (; o < kWhole; o += R) register_of_dots<K, kRow, kSum>(w + o * kRow, bias(o), x, y + o);
    if constexpr (N > kWhole)
      dots<static_cast<int>(N - kWhole), K, kRow, kSum>(w + o * kRow, bias(o), x, y + o);
    return;
  }
  for (; o < N; ++o) rows<1, K, kRow, kColumn, kSum>(w + o * kRow, bias(o), x, y + o);
}

}  // namespace linear_detail

// y[o] (=|+=) b[o] + sum_i w[o, i] x[i]. Without a bias b is null.
template <long N, long K, long kRow, long kColumn, Sum kSum = Sum::kWrite, class V, class T>
CT_LANES void linear(const T* w, const T* b, const V* x, V* y) {
  using namespace linear_detail;
  if constexpr (kWidth<V> == 1 && kRegister<T> > 1) {
    one_sample<N, K, kRow, kColumn, kSum>(w, b, x, y);
  } else {
    const auto bias = [&](long o) { return b == nullptr ? nullptr : b + o; };
    constexpr long kWhole = N - N % kOutputs;
    for (long o = 0; o < kWhole; o += kOutputs)
      rows<kOutputs, K, kRow, kColumn, kSum>(w + o * kRow, bias(o), x, y + o);
    if constexpr (N > kWhole)
      rows<static_cast<int>(N - kWhole), K, kRow, kColumn, kSum>(w + kWhole * kRow, bias(kWhole), x,
                                                                 y + kWhole);
  }
}

}  // namespace ct::native
