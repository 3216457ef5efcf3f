// Gradients of weights: sums over lanes of outer products. A sweep over the weights adds the
// products of all lanes, in registers that lie along the inputs.
#pragma once

#include "transpose.h"

namespace ct::native {

namespace outer_detail {

// turned[l * kStride]: the numbers that R elements have in lane l, for all W lanes.
template <int W, int kStride, class T>
CT_LANES void turn(const T* x, Lanes<T, kRegister<T>>* turned) {
  constexpr int R = kRegister<T>;
  using X = Lanes<T, R>;
  for (int part = 0; part < W; part += R) {
    X rows[R];
    CT_UNROLL(16)
    for (int i = 0; i < R; ++i) rows[i] = load<X>(x + i * W + part);
    transpose(rows, std::make_integer_sequence<int, R>{});
    CT_UNROLL(16)
    for (int i = 0; i < R; ++i) turned[(part + i) * kStride] = rows[i];
  }
}

// kCount rows of the weights, kRegisters of each.
template <int kCount, int kRegisters, int W, long kRow, class T>
CT_LANES void add_rows(const T* u, const Lanes<T, kRegister<T>>* turned, T* w) {
  constexpr int R = kRegister<T>;
  using X = Lanes<T, R>;
  X acc[kCount][kRegisters] = {};
  CT_UNROLL(8)
  for (int r = 0; r < kCount; ++r)
    for (int c = 0; c < kRegisters; ++c) __builtin_prefetch(w + r * kRow + c * R, 1);
  for (int l = 0; l < W; ++l) {
    CT_UNROLL(8)
    for (int r = 0; r < kCount; ++r) {
      const X ur = all<X>(u[r * W + l]);
      CT_UNROLL(4)
      for (int c = 0; c < kRegisters; ++c) acc[r][c] += ur * turned[l * kRegisters + c];
    }
  }
  CT_UNROLL(8)
  for (int r = 0; r < kCount; ++r) {
    CT_UNROLL(4)
    for (int c = 0; c < kRegisters; ++c) {
      T* const to = w + r * kRow + c * R;
      store<X>(to, load<X>(to) + acc[r][c]);
    }
  }
}

// All rows, kRegisters of inputs.
template <int kRegisters, int W, long N, long kRow, class T>
CT_LANES void add_inputs(const T* u, const T* x, T* w) {
  constexpr int R = kRegister<T>, kRows = 8;
  Lanes<T, R> turned[W * kRegisters];
  CT_UNROLL(4)
  for (int c = 0; c < kRegisters; ++c) turn<W, kRegisters>(x + c * R * W, turned + c);
  constexpr long kWhole = N - N % kRows;
  for (long o = 0; o < kWhole; o += kRows)
    add_rows<kRows, kRegisters, W, kRow>(u + o * W, turned, w + o * kRow);
  if constexpr (N > kWhole)
    add_rows<static_cast<int>(N - kWhole), kRegisters, W, kRow>(u + kWhole * W, turned,
                                                                w + kWhole * kRow);
}

// Fewer inputs than a register holds, or such that do not lie side by side.
template <int W, long N, long K, long kRow, long kColumn, class T>
CT_LANES void add_few(const T* u, const T* x, T* w) {
  constexpr int R = kRegister<T>;
  using X = Lanes<T, R>;
  using V = Lanes<T, W>;
  constexpr long kWhole = N - N % R;
  for (long o = 0; o < kWhole; o += R) {
    X turned[W];
    turn<W, 1>(u + o * W, turned);
    for (long i = 0; i < K; ++i) {
      X total{};
      for (int l = 0; l < W; ++l) total += turned[l] * x[i * W + l];
      for (int r = 0; r < R; ++r) w[(o + r) * kRow + i * kColumn] += get(total, r);
    }
  }
  for (long o = kWhole; o < N; ++o)
    for (long i = 0; i < K; ++i)
      w[o * kRow + i * kColumn] += sum(load<V>(u + o * W) * load<V>(x + i * W));
}

}  // namespace outer_detail

// w[o, i] += sum over lanes of u[o] x[i]: the gradient of the weights, for cotangents u of y.
template <long N, long K, long kRow, long kColumn, class V, class T>
CT_LANES void outer(const V* u, const V* x, T* w) {
  constexpr int W = kWidth<V>;
  constexpr long R = kRegister<T>;
  if constexpr (kColumn != 1 && kRow == 1) {
    outer<K, N, kColumn, kRow>(x, u, w);
  } else if constexpr (W == 1) {
    for (long o = 0; o < N; ++o)
      for (long i = 0; i < K; ++i) w[o * kRow + i * kColumn] += u[o] * x[i];
  } else if constexpr (W % R != 0) {
    for (long o = 0; o < N; ++o)
      for (long i = 0; i < K; ++i) w[o * kRow + i * kColumn] += sum(u[o] * x[i]);
  } else {
    using namespace outer_detail;
    const T *const us = reinterpret_cast<const T*>(u), *const xs = reinterpret_cast<const T*>(x);
    constexpr long kPairs = kColumn == 1 ? K - K % (2 * R) : 0;
    constexpr long kWhole = kColumn == 1 ? K - K % R : 0;
    for (long i = 0; i < kPairs; i += 2 * R) add_inputs<2, W, N, kRow>(us, xs + i * W, w + i);
    if constexpr (kWhole > kPairs) add_inputs<1, W, N, kRow>(us, xs + kPairs * W, w + kPairs);
    if constexpr (K > kWhole)
      add_few<W, N, K - kWhole, kRow, kColumn>(us, xs + kWhole * W, w + kWhole * kColumn);
  }
}

}  // namespace ct::native
