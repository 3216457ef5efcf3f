// The plain loops over one block of a state, each compiled for several instruction sets.
#pragma once

#include <algorithm>
#include <cstring>

#include "args.h"

// One version of a function per instruction set, chosen when the library is loaded. Sanitizers do
// not support that.
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && \
    defined(__linux__) && !defined(CT_SANITIZE) && !defined(CT_NO_CLONES)
#define CT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define CT_INLINE __attribute__((always_inline)) inline
#else
#define CT_CLONES
#define CT_INLINE inline
#endif

namespace ct::rk {
namespace {

constexpr int kBlock = 512;   // elements
constexpr int kUnrolled = 8;  // terms in one loop

// -------------------------------------------------------------------------------------------

template <int kCount, bool kFirst, typename T, typename A>
CT_INLINE void sum_loop(A* __restrict sum, const T* const* row, const A* coefficient, int64_t begin,
                        int n) {
  const T* k[kCount];
  A c[kCount];
  for (int j = 0; j < kCount; ++j) k[j] = row[j] + begin, c[j] = coefficient[j];
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) sum[i] = add_terms(kFirst ? A(0) : sum[i], k, c, kCount, i);
}

template <bool kFirst, typename T, typename A>
CT_INLINE void sum_group(A* __restrict sum, const T* const* row, const A* coefficient, int count,
                         int64_t begin, int n) {
  switch (count) {
    case 1:
      return sum_loop<1, kFirst>(sum, row, coefficient, begin, n);
    case 2:
      return sum_loop<2, kFirst>(sum, row, coefficient, begin, n);
    case 3:
      return sum_loop<3, kFirst>(sum, row, coefficient, begin, n);
    case 4:
      return sum_loop<4, kFirst>(sum, row, coefficient, begin, n);
    case 5:
      return sum_loop<5, kFirst>(sum, row, coefficient, begin, n);
    case 6:
      return sum_loop<6, kFirst>(sum, row, coefficient, begin, n);
    case 7:
      return sum_loop<7, kFirst>(sum, row, coefficient, begin, n);
    default:
      return sum_loop<8, kFirst>(sum, row, coefficient, begin, n);
  }
}

// sum[i] = sum_j coefficient[j] row[j][begin + i]
template <typename T, typename A>
CT_INLINE void sum_terms(A* __restrict sum, const Terms<T, A>& terms, int64_t begin, int n) {
  if (terms.count == 0) return std::fill(sum, sum + n, A(0));
  sum_group<true>(sum, terms.row, terms.coefficient, std::min(terms.count, kUnrolled), begin, n);
  for (int j = kUnrolled; j < terms.count; j += kUnrolled)
    sum_group<false>(sum, terms.row + j, terms.coefficient + j,
                     std::min(terms.count - j, kUnrolled), begin, n);
}

// Whole samples of so few elements that a loop over each would cost more than they do.
template <int kRow, typename A>
CT_INLINE void multiply_short_rows(A* __restrict sum, const double* h, int64_t stride, int n) {
  for (int i = 0; i < n; i += kRow, h += stride)
    for (int j = 0; j < kRow; ++j) sum[i + j] *= static_cast<A>(*h);
}

template <typename A>
CT_INLINE void multiply_by_step(A* __restrict sum, const Step& step, int64_t row, int64_t begin,
                                int n) {
  if (step.data == nullptr || step.stride == 0 || n == 0) {
    const A h = static_cast<A>(step.data == nullptr || n == 0 ? step.value : *step.data);
    for (int i = 0; i < n; ++i) sum[i] *= h;
    return;
  }
  int64_t sample = begin / row, column = begin % row;
  if (column == 0 && n % row == 0 && row <= 4) {
    const double* h = step.data + sample * step.stride;
    if (row == 1) return multiply_short_rows<1>(sum, h, step.stride, n);
    if (row == 2) return multiply_short_rows<2>(sum, h, step.stride, n);
    if (row == 3) return multiply_short_rows<3>(sum, h, step.stride, n);
    return multiply_short_rows<4>(sum, h, step.stride, n);
  }
  for (int i = 0; i < n;) {
    const A h = static_cast<A>(step.data[sample++ * step.stride]);
    const int end = static_cast<int>(std::min<int64_t>(n, i + row - column));
    for (; i < end; ++i) sum[i] *= h;
    column = 0;
  }
}

template <typename T, typename A>
struct Combination {
  T* out;
  const T* y;  // null: zeros
  Terms<T, A> terms;
  Step step;
  int64_t row;  // elements a sample
};

template <typename T, typename A>
CT_INLINE void combine_body(const Combination<T, A>& task, T* out, int64_t begin, int n) {
  A sum[kBlock];
  sum_terms(sum, task.terms, begin, n);
  multiply_by_step(sum, task.step, task.row, begin, n);
  if (task.y == nullptr) {
    for (int i = 0; i < n; ++i) out[i] = static_cast<T>(sum[i]);
    return;
  }
  const T* y = task.y + begin;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) out[i] = static_cast<T>(static_cast<A>(y[i]) + sum[i]);
}

template <typename T>
struct ErrorTask {
  Terms<T, T> terms;
  Step step;
  int64_t row;
  const T *y, *y1;
  Tolerance<T> rtol, atol;
};

template <typename T>
CT_INLINE void load_tolerance(T* __restrict to, const Tolerance<T>& tolerance, int64_t begin,
                              int n) {
  if (tolerance.data == nullptr) return std::fill(to, to + n, tolerance.value);
  std::memcpy(to, tolerance.data + begin, n * sizeof(T));
}

// sum[i] = |scaled error|, or its square for a root mean square
template <typename T>
CT_INLINE void error_body(const ErrorTask<T>& task, T* __restrict sum, bool maximum, int64_t begin,
                          int n) {
  T rtol[kBlock], atol[kBlock];
  sum_terms(sum, task.terms, begin, n);
  multiply_by_step(sum, task.step, task.row, begin, n);
  load_tolerance(rtol, task.rtol, begin, n);
  load_tolerance(atol, task.atol, begin, n);
  const T *y = task.y + begin, *y1 = task.y1 + begin;
#pragma GCC ivdep
  for (int i = 0; i < n; ++i) sum[i] = scaled_error(sum[i], y[i], y1[i], rtol[i], atol[i]);
  if (maximum)
    for (int i = 0; i < n; ++i) sum[i] = magnitude(sum[i]);
  else
    for (int i = 0; i < n; ++i) sum[i] *= sum[i];
}

// Sum or maximum by halves: vectorizes without reordering by the compiler, and its rounding error
// grows with log n.
template <typename T>
CT_INLINE T fold_body(T* values, bool maximum, int n) {
  if (n == 0) return T(0);
  while (n > 1) {
    const int half = (n + 1) / 2;
    T* __restrict low = values;
    const T* __restrict high = values + half;
    if (maximum)
      for (int i = 0; i < n - half; ++i) low[i] = larger(low[i], high[i]);
    else
      for (int i = 0; i < n - half; ++i) low[i] += high[i];
    n = half;
  }
  return values[0];
}

CT_CLONES void combine_block(const Combination<float, float>& task, float* out, int64_t begin,
                             int n) {
  combine_body(task, out, begin, n);
}
CT_CLONES void combine_block(const Combination<double, double>& task, double* out, int64_t begin,
                             int n) {
  combine_body(task, out, begin, n);
}
CT_CLONES void combine_block(const Combination<Half, float>& task, Half* out, int64_t begin,
                             int n) {
  combine_body(task, out, begin, n);
}
CT_CLONES void combine_block(const Combination<BFloat16, float>& task, BFloat16* out, int64_t begin,
                             int n) {
  combine_body(task, out, begin, n);
}
CT_CLONES void error_block(const ErrorTask<float>& task, float* sum, bool maximum, int64_t begin,
                           int n) {
  error_body(task, sum, maximum, begin, n);
}
CT_CLONES void error_block(const ErrorTask<double>& task, double* sum, bool maximum, int64_t begin,
                           int n) {
  error_body(task, sum, maximum, begin, n);
}
CT_CLONES float fold(float* values, bool maximum, int n) { return fold_body(values, maximum, n); }
CT_CLONES double fold(double* values, bool maximum, int n) { return fold_body(values, maximum, n); }

}  // namespace
}  // namespace ct::rk
