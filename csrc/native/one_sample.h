// Small dense matrices times the numbers of one sample, which lie side by side in memory: registers
// run along the outputs, which takes no sums over a register, or, where the outputs are too few to
// fill one, along the inputs. A matrix that lies the other way is turned round once a solve.
#pragma once

#include "transpose.h"

namespace ct::native {

namespace one_sample_detail {

constexpr long whole(long n, long R) { return (n + R - 1) / R * R; }

// How the products with a matrix of N outputs and K inputs are made.
template <class T, long N, long K, long kRow, long kColumn>
struct Plan {
  static constexpr long R = kRegister<T>;
  static constexpr bool outputs = R > 1 && 2 * N > R, inputs = R > 1 && !outputs && K >= R;
  // of w as it is read: steps from output to output or from input to input, and whether that is as
  // it was given
  static constexpr bool given = outputs ? kRow == 1 && N % R == 0 : !inputs || kColumn == 1;
  static constexpr long stride = outputs ? (given ? kColumn : whole(N, R)) : (given ? kRow : K);
  static constexpr long size = given ? 0 : outputs ? K * stride : N * K;
};

// Of kCount registers of outputs. Few of them alone would wait for each other's last sum: each has
// several sums then, of every kChains-th input; and as many as the registers have room for, since
// the loop takes long to end.
template <int kCount, long N, long K, long kStride, bool kAdds, class T>
CT_LANES void along_outputs(const T* w, const T* b, const T* x, T* y) {
  constexpr int R = kRegister<T>, kChains = kCount > 4 ? 2 : 4;
  using X = Lanes<T, R>;
  constexpr auto numbers = [](int r) { return N - r * R < R ? N - r * R : R; };
  X acc[kChains][kCount] = {};
  const auto add = [&](long i, int chain) __attribute__((always_inline)) {
    const X xi = all<X>(x[i]);
    CT_UNROLL(8)
    for (int r = 0; r < kCount; ++r) acc[chain][r] += xi * load<X>(w + i * kStride + r * R);
  };
  constexpr long kWhole = K - K % kChains;
  CT_UNROLL(1)  // straight code of this length would not be ready in time
  for (long i = 0; i < kWhole; i += kChains) {
    CT_UNROLL(4)
    for (int chain = 0; chain < kChains; ++chain) add(i + chain, chain);
  }
  for (long i = kWhole; i < K; ++i) add(i, 0);
  CT_UNROLL(8)
  for (int r = 0; r < kCount; ++r) {
    X total = acc[0][r];
    if constexpr (kChains == 2) total += acc[1][r];
    if constexpr (kChains == 4) total = (total + acc[1][r]) + (acc[2][r] + acc[3][r]);
    const auto more = [&](const T* from) __attribute__((always_inline)) {
      X part{};
      std::memcpy(&part, from + r * R, numbers(r) * sizeof(T));
      total += part;
    };
    if (b != nullptr) more(b);
    if (kAdds) more(y);
    std::memcpy(y + r * R, &total, numbers(r) * sizeof(T));
  }
}

// Of kCount outputs, less than a register of them.
template <int kCount, long K, long kStride, bool kAdds, class T>
CT_LANES void along_inputs(const T* w, const T* b, const T* x, T* y) {
  constexpr int R = kRegister<T>, kChains = K >= 4 * R && kCount < 4 ? 2 : 1;
  using X = Lanes<T, R>;
  X acc[kChains][kCount] = {};
  const auto add = [&](long i, int chain) __attribute__((always_inline)) {
    const X xi = load<X>(x + i);
    CT_UNROLL(16)
    for (int r = 0; r < kCount; ++r) acc[chain][r] += xi * load<X>(w + r * kStride + i);
  };
  long i = 0;
  for (; i + kChains * R <= K; i += kChains * R) {
    CT_UNROLL(2)
    for (int chain = 0; chain < kChains; ++chain) add(i + chain * R, chain);
  }
  for (; i + R <= K; i += R) add(i, 0);
  X totals{};  // stored at once: who loads them at once would wait for several stores
  CT_UNROLL(16)
  for (int r = 0; r < kCount; ++r) {
    T total = sum(kChains == 1 ? acc[0][r] : acc[0][r] + acc[kChains - 1][r]);
    for (long j = K - K % R; j < K; ++j) total += x[j] * w[r * kStride + j];
    if (b != nullptr) total += b[r];
    totals[r] = kAdds ? y[r] + total : total;
  }
  std::memcpy(y, &totals, kCount * sizeof(T));
}

// to[i * kTo + o] = from[o * kFrom + i]
template <long N, long K, long kFrom, long kTo, class T>
CT_LANES void transpose_all(const T* from, T* to) {
  constexpr long R = kRegister<T>, kRows = N - N % R, kColumns = K - K % R;
  using X = Lanes<T, R>;
  for (long o = 0; o < kRows; o += R)
    for (long i = 0; i < kColumns; i += R) {
      X block[R];
      CT_UNROLL(16)
      for (long r = 0; r < R; ++r) block[r] = load<X>(from + (o + r) * kFrom + i);
      transpose(block, std::make_integer_sequence<int, R>{});
      CT_UNROLL(16)
      for (long r = 0; r < R; ++r) store<X>(to + (i + r) * kTo + o, block[r]);
    }
  for (long o = 0; o < N; ++o)
    for (long i = o < kRows ? kColumns : 0; i < K; ++i) to[i * kTo + o] = from[o * kFrom + i];
}

}  // namespace one_sample_detail

// A matrix turned round, for one_sample: `to` has room for Plan::size numbers.
template <long N, long K, long kRow, long kColumn, class T>
CT_LANES void turn_round(const T* w, T* to) {
  using P = one_sample_detail::Plan<T, N, K, kRow, kColumn>;
  if constexpr (P::size == 0) {
    return;
  } else if constexpr (P::outputs) {
    if constexpr (kColumn == 1)
      one_sample_detail::transpose_all<N, K, kRow, P::stride>(w, to);
    else
      for (long o = 0; o < N; ++o)
        for (long i = 0; i < K; ++i) to[i * P::stride + o] = w[o * kRow + i * kColumn];
    for (long i = 0; i < K; ++i)
      for (long o = N; o < P::stride; ++o) to[i * P::stride + o] = 0;
  } else {
    for (long i = 0; i < K; ++i)
      for (long o = 0; o < N; ++o) to[o * K + i] = w[o * kRow + i * kColumn];
  }
}

// y[o] = b[o] + sum_i w[o, i] x[i], or added to y; `turned`: what turn_round made of w.
template <long N, long K, long kRow, long kColumn, bool kAdds, class T>
CT_LANES void one_sample(const T* w, const T* b, const T* x, T* y, const T* turned) {
  using namespace one_sample_detail;
  using P = Plan<T, N, K, kRow, kColumn>;
  const T* const m = P::given ? w : turned;
  if constexpr (P::outputs) {
    constexpr long R = P::R, kBlock = 8 * R, kBlocks = N / kBlock * kBlock;
    const auto bias = [&](long o) { return b == nullptr ? nullptr : b + o; };
    for (long o = 0; o < kBlocks; o += kBlock)
      along_outputs<8, kBlock, K, P::stride, kAdds>(m + o, bias(o), x, y + o);
    if constexpr (N > kBlocks)
      along_outputs<static_cast<int>((N - kBlocks + R - 1) / R), N - kBlocks, K, P::stride, kAdds>(
          m + kBlocks, bias(kBlocks), x, y + kBlocks);
  } else if constexpr (P::inputs) {
    along_inputs<static_cast<int>(N), K, P::stride, kAdds>(m, b, x, y);
  } else {
    for (long o = 0; o < N; ++o) {
      T total = kAdds ? y[o] : T(0);
      if (b != nullptr) total += b[o];
      for (long i = 0; i < K; ++i) total += x[i] * w[o * kRow + i * kColumn];
      y[o] = total;
    }
  }
}

// A matrix in the field: of which shared array, from where on, with which strides.
template <long kArray, long kStart, long N, long K, long kRow, long kColumn>
struct Matrix {
  template <class T>
  using Plan = one_sample_detail::Plan<T, N, K, kRow, kColumn>;

  template <class T>
  static constexpr long size = one_sample_detail::whole(Plan<T>::size, kRegister<T>);

  template <class T>
  CT_LANES static void turn(const T* const* shared, T* to) {
    turn_round<N, K, kRow, kColumn>(shared[kArray] + kStart, to);
  }
};

template <class... Matrices>
struct MatrixList {
  static constexpr long count = sizeof...(Matrices);

  template <class T>
  static constexpr long size = (Matrices::template size<T> + ... + 0);

  template <class T>
  CT_LANES static void turn(const T** shared, const T** turned, T* to) {
    ((Matrices::turn(shared, to), *turned++ = to, to += Matrices::template size<T>), ...);
  }
};

// The arrays that all samples share, as the field reads them: for one sample the matrices, turned
// round, stand behind those that are given.
template <class Field, int W>
class Arrays {
 public:
  using real = typename Field::real;

  CT_LANES void attach(const void* const* shared) {
    all = reinterpret_cast<const real* const*>(shared);
  }

  const real* const* all;
};

template <class Field>
  requires(kRegister<typename Field::real> > 1 && Field::Matrices::count > 0)
class Arrays<Field, 1> {
 public:
  using real = typename Field::real;
  using Matrices = typename Field::Matrices;

  CT_LANES void attach(const void* const* shared) {
    for (long i = 0; i < Field::shared; ++i) all[i] = static_cast<const real*>(shared[i]);
    Matrices::turn(all, all + Field::shared, numbers);
  }

  const real* all[Field::shared + Matrices::count];

 private:
  alignas(kRegisterBytes) real numbers[Matrices::template size<real> + 1];
};

}  // namespace ct::native
