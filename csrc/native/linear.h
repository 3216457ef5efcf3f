// Small dense matrices times lanes. The weights are the same for all samples: each is read once and
// multiplies every lane, so that the products run near the rate of a GEMM as long as the weights
// stay in the cache. A matrix is w[o * kRow + i * kColumn], o < N outputs, i < K inputs; its
// transpose is the same data with the strides exchanged.
#pragma once

#include "one_sample.h"

namespace ct::native {

enum class Sum { kWrite, kAdd };

namespace linear_detail {

constexpr int kOutputs = 8;  // accumulators at a time

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
    const V xi = x[i];
    CT_UNROLL(8)
    for (int r = 0; r < kCount; ++r) acc[r] += xi * w[r * kRow + i * kColumn];
  }
  CT_UNROLL(8)
  for (int r = 0; r < kCount; ++r) y[r] = acc[r];
}

}  // namespace linear_detail

// y[o] (=|+=) b[o] + sum_i w[o, i] x[i]. Without a bias b is null; turned[0] is the matrix turned
// round for one sample.
template <long N, long K, long kRow, long kColumn, Sum kSum = Sum::kWrite, class V, class T>
CT_LANES void linear(const T* w, const T* b, const V* x, V* y,
                     [[maybe_unused]] const T* const* turned) {
  using namespace linear_detail;
  if constexpr (kWidth<V> == 1 && kRegister<T> > 1) {
    one_sample<N, K, kRow, kColumn, kSum == Sum::kAdd>(w, b, x, y, *turned);
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

// w[o, i] += sum over lanes of u[o] x[i]: the gradient of the weights, for cotangents u of y.
template <long N, long K, long kRow, long kColumn, class V, class T>
CT_LANES void outer(const V* u, const V* x, T* w) {
  constexpr int W = kWidth<V>;
  if constexpr (kColumn != 1 && kRow == 1) {
    outer<K, N, kColumn, kRow>(x, u, w);
  } else if constexpr (W == 1) {
    for (long o = 0; o < N; ++o)
      for (long i = 0; i < K; ++i) w[o * kRow + i * kColumn] += u[o] * x[i];
  } else if constexpr (kColumn == 1 && K >= W) {
    // lanes take the place of the inputs: blocks of W inputs are turned round
    const T* numbers = reinterpret_cast<const T*>(u);
    for (long i = 0; i + W <= K; i += W) {
      V turned[W];
      for (int l = 0; l < W; ++l)
        for (int j = 0; j < W; ++j) turned[l][j] = x[i + j][l];
      constexpr long kWhole = N - N % 8;
      const auto add = [&]<int kCount>(long o, std::integral_constant<int, kCount>) {
        V acc[kCount];
        CT_UNROLL(8)
        for (int r = 0; r < kCount; ++r) acc[r] = load<V>(w + (o + r) * kRow + i);
        for (int l = 0; l < W; ++l) {
          const V xl = turned[l];
          CT_UNROLL(8)
          for (int r = 0; r < kCount; ++r) acc[r] += xl * numbers[(o + r) * W + l];
        }
        CT_UNROLL(8)
        for (int r = 0; r < kCount; ++r) store<V>(w + (o + r) * kRow + i, acc[r]);
      };
      for (long o = 0; o < kWhole; o += 8) add(o, std::integral_constant<int, 8>{});
      for (long o = kWhole; o < N; ++o) add(o, std::integral_constant<int, 1>{});
    }
    for (long o = 0; o < N; ++o)
      for (long i = K - K % W; i < K; ++i) w[o * kRow + i] += sum(u[o] * x[i]);
  } else {
    for (long o = 0; o < N; ++o)
      for (long i = 0; i < K; ++i) w[o * kRow + i * kColumn] += sum(u[o] * x[i]);
  }
}

// y[i] += sum over lanes of u[i]: the gradient of what is the same for all samples.
template <class V, class T>
CT_LANES void reduce(long n, const V* u, T* y) {
  for (long i = 0; i < n; ++i) y[i] += sum(u[i]);
}

}  // namespace ct::native
