// Arithmetic of truncated Taylor series, for CPU and GPU alike.
//
// V is a number or a vector of numbers, a row kLanes of them; coefficient k of a series is the row
// at `k * stride`. A series of n terms ends there: the coefficients behind are zero, and not looked
// at. The recurrences, of O(K^2), are those of Griewank and Walther, ch. 13.
#pragma once

#include "../core/hd.h"

// CT_UNROLL: the loop over the vectors that are worked on together is written out.
#if defined(__CUDACC__)
#define CT_TAYLOR static __device__ inline
#define CT_UNROLL _Pragma("unroll")
#elif defined(__GNUC__)
#define CT_TAYLOR __attribute__((always_inline)) static inline
#define CT_UNROLL _Pragma("GCC unroll 8")
#else
#define CT_TAYLOR static inline
#define CT_UNROLL
#endif

namespace ct::jet {

CT_HD constexpr int smaller(int a, int b) { return a < b ? a : b; }
CT_HD constexpr int larger_of(int a, int b) { return a > b ? a : b; }

template <typename T, typename V, int kLanes>
struct Series {
  // sum += sum_{j=first}^{last} a_j b_{k-j}
  CT_TAYLOR void accumulate(V (&sum)[kLanes], const V* a, const V* b, int k, int first, int last,
                            int stride) {
    for (int j = first; j <= last; ++j) {
      const V *p = a + j * stride, *q = b + (k - j) * stride;
      CT_UNROLL
      for (int i = 0; i < kLanes; ++i) sum[i] += p[i] * q[i];
    }
  }

  CT_TAYLOR void put(V* out, const V (&x)[kLanes], T factor) {
    CT_UNROLL
    for (int i = 0; i < kLanes; ++i) out[i] = x[i] * factor;
  }

  // out_k = sum_j a_j b_{k-j}
  CT_TAYLOR void product(V* out, const V* a, int na, const V* b, int nb, int order, int stride) {
    for (int k = 0; k <= order; ++k) {
      V sum[kLanes] = {};
      accumulate(sum, a, b, k, larger_of(0, k + 1 - nb), smaller(k, na - 1), stride);
      put(out + k * stride, sum, T(1));
    }
  }

  // out_j = sum_{k >= j} g_{k-j} y_k
  CT_TAYLOR void correlate(V* out, const V* g, int ng, const V* y, int ny, int order, int stride) {
    for (int j = 0; j <= order; ++j) {
      V sum[kLanes] = {};
      for (int k = j; k <= smaller(ny - 1, j + ng - 1); ++k) {
        const V *p = g + (k - j) * stride, *q = y + k * stride;
        CT_UNROLL
        for (int i = 0; i < kLanes; ++i) sum[i] += p[i] * q[i];
      }
      put(out + j * stride, sum, T(1));
    }
  }

  // out_k = k x_k: what the recurrences that integrate look at
  CT_TAYLOR void times_index(V* out, const V* x, int nx, int stride) {
    for (int k = 1; k < nx; ++k) CT_UNROLL
    for (int i = 0; i < kLanes; ++i) out[k * stride + i] = x[k * stride + i] * T(k);
  }

  // y' = slope x', with y_0 in place; `kx` is k x_k. The slope may be y itself: exp.
  CT_TAYLOR void integrate(V* y, const V* slope, int ns, const V* kx, int nx, int order,
                           int stride) {
    for (int k = 1; k <= order; ++k) {
      V sum[kLanes] = {};
      accumulate(sum, kx, slope, k, larger_of(1, k + 1 - ns), smaller(k, nx - 1), stride);
      put(y + k * stride, sum, T(1) / T(k));
    }
  }

  // y' = u x' and u = constant + linear y + square y^2, with y_0 and u_0 in place; u is wanted up
  // to order `order_u`.
  CT_TAYLOR void riccati(V* y, V* u, T linear, T square, const V* kx, int nx, int order,
                         int order_u, int stride) {
    for (int k = 1; k <= order; ++k) {
      V sum[kLanes] = {};
      accumulate(sum, kx, u, k, 1, smaller(k, nx - 1), stride);
      put(y + k * stride, sum, T(1) / T(k));
      if (k > order_u) continue;
      V twice[kLanes] = {};
      accumulate(twice, y, y, k, 0, (k - 1) / 2, stride);
      const V *last = y + k * stride, *middle = y + k / 2 * stride;
      const T of_middle = k % 2 == 0 ? square : T(0);
      CT_UNROLL
      for (int i = 0; i < kLanes; ++i)
        u[k * stride + i] =
            twice[i] * (T(2) * square) + last[i] * linear + middle[i] * middle[i] * of_middle;
    }
  }

  // s' = c x' and c' = sign s x', with s_0 and c_0 in place
  CT_TAYLOR void pair(V* s, V* c, T sign, const V* kx, int nx, int order, int stride) {
    for (int k = 1; k <= order; ++k) {
      V of_s[kLanes] = {}, of_c[kLanes] = {};
      accumulate(of_s, kx, c, k, 1, smaller(k, nx - 1), stride);
      accumulate(of_c, kx, s, k, 1, smaller(k, nx - 1), stride);
      put(s + k * stride, of_s, T(1) / T(k));
      put(c + k * stride, of_c, sign / T(k));
    }
  }

  // x_0 k y_k = k x_k - sum_{0<j<k} j y_j x_{k-j}, with y_0 in place
  CT_TAYLOR void logarithm(V* y, const V* x, int nx, int order, int stride) {
    for (int k = 1; k <= order; ++k) {
      V sum[kLanes] = {};
      for (int j = larger_of(1, k + 1 - nx); j < k; ++j) CT_UNROLL
      for (int i = 0; i < kLanes; ++i) sum[i] -= y[j * stride + i] * T(j) * x[(k - j) * stride + i];
      CT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        const V top = sum[i] * (T(1) / T(k));
        y[k * stride + i] = (k < nx ? top + x[k * stride + i] : top) / x[i];
      }
    }
  }

  // k x_0 y_k = sum_{j=1}^{k} (r j - (k - j)) x_j y_{k-j}, with y_0 in place
  CT_TAYLOR void power(V* y, T exponent, const V* x, int nx, int order, int stride) {
    for (int k = 1; k <= order; ++k) {
      V sum[kLanes] = {};
      for (int j = 1; j <= smaller(k, nx - 1); ++j) {
        const T factor = (exponent * T(j) - T(k - j)) / T(k);
        CT_UNROLL
        for (int i = 0; i < kLanes; ++i)
          sum[i] += x[j * stride + i] * factor * y[(k - j) * stride + i];
      }
      CT_UNROLL
      for (int i = 0; i < kLanes; ++i) y[k * stride + i] = sum[i] / x[i];
    }
  }

  // b y = a
  CT_TAYLOR void quotient(V* y, const V* a, int na, const V* b, int nb, int order, int stride) {
    for (int k = 0; k <= order; ++k) {
      V sum[kLanes] = {};
      accumulate(sum, b, y, k, 1, smaller(k, nb - 1), stride);
      CT_UNROLL
      for (int i = 0; i < kLanes; ++i)
        y[k * stride + i] = (k < na ? a[k * stride + i] - sum[i] : -sum[i]) / b[i];
    }
  }

  // out = constant + alpha a + beta b; out may be a or b
  CT_TAYLOR void combine(V* out, T constant, T alpha, const V* a, int na, T beta, const V* b,
                         int nb, int order, int stride) {
    for (int k = 0; k <= order; ++k) {
      V sum[kLanes] = {};
      CT_UNROLL
      for (int i = 0; i < kLanes; ++i) {
        if (k < na) sum[i] += a[k * stride + i] * alpha;
        if (k < nb) sum[i] += b[k * stride + i] * beta;
        if (k == 0) sum[i] += constant;
      }
      put(out + k * stride, sum, T(1));
    }
  }
};

}  // namespace ct::jet
