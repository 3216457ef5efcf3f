// Small dense matrices times lanes. The weights are the same for all samples: each is read once and
// multiplies every lane, so that the products run near the rate of a GEMM as long as the weights
// stay in the cache. A matrix is w[o * kRow + i * kColumn], o < N outputs, i < K inputs; its
// transpose is the same data with the strides exchanged.
#pragma once

#include "one_sample.h"

namespace ct::native {

enum class Sum { kWrite, kAdd };

namespace linear_detail {

constexpr int kOutputs = 8;            // accumulators at a time
constexpr long kLargestTurned = 8192;  // numbers of a matrix that is turned at each use
constexpr int kAhead = 8;              // rows

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

}  // namespace linear_detail

// y[o] (=|+=) b[o] + sum_i w[o, i] x[i]. Without a bias b is null; turned[0] is the matrix turned
// round for one sample, or turned is null: it is turned here.
template <long N, long K, long kRow, long kColumn, Sum kSum = Sum::kWrite, class V, class T>
CT_LANES void linear(const T* w, const T* b, const V* x, V* y,
                     [[maybe_unused]] const T* const* turned) {
  using namespace linear_detail;
  if constexpr (kWidth<V> == 1 && kRegister<T> > 1) {
    constexpr long kSize = one_sample_detail::Plan<T, N, K, kRow, kColumn>::size;
    if constexpr (kSize == 0) {
      one_sample<N, K, kRow, kColumn, kSum == Sum::kAdd>(w, b, x, y, w);
    } else if (turned != nullptr) {
      one_sample<N, K, kRow, kColumn, kSum == Sum::kAdd>(w, b, x, y, *turned);
    } else if constexpr (kSize <= kLargestTurned) {
      alignas(kRegisterBytes) T here[kSize];
      turn_round<N, K, kRow, kColumn>(w, here);
      one_sample<N, K, kRow, kColumn, kSum == Sum::kAdd>(w, b, x, y, here);
    } else {
      for (long o = 0; o < N; ++o)
        rows<1, K, kRow, kColumn, kSum>(w + o * kRow, b == nullptr ? nullptr : b + o, x, y + o);
    }
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
