// The CUDA kernels: one thread an element, its series in local memory. No torch here: the tests
// compile this file with g++ as well, and run it on the CPU.
//
// Sums are taken by one thread, in a fixed order: the same inputs give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "arith.h"
#include "functions.h"
#include "values.h"

#if defined(__CUDACC__)
#define CT_CALL static __device__ __noinline__
#else
#define CT_CALL static
#endif

namespace ct::jet {

constexpr int kThreads = 128;  // in a block

__device__ inline int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline int64_t global_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

// The machine of functions.h for one element, with series of up to kCapacity coefficients.
template <typename T, int kCapacity>
struct ThreadMachine {
  using Scalar = T;
  using Series = T*;
  using One = ct::jet::Series<T, T, 1>;

  CT_HD T* take() { return memory + kCapacity * taken++; }
  CT_HD T* at(T* x, int k) const { return x + k; }

  CT_CALL void product(T* out, const T* a, int na, const T* b, int nb, int order) {
    One::product(out, a, na, b, nb, order, 1);
  }
  CT_CALL void correlate(T* out, const T* g, int ng, const T* y, int ny, int order) {
    One::correlate(out, g, ng, y, ny, order, 1);
  }
  CT_CALL void times_index(T* out, const T* x, int n) { One::times_index(out, x, n, 1); }
  CT_CALL void integrate(T* y, const T* slope, int ns, const T* kx, int n, int order) {
    One::integrate(y, slope, ns, kx, n, order, 1);
  }
  CT_CALL void riccati(T* y, T* u, T linear, T square, const T* kx, int n, int order, int order_u) {
    One::riccati(y, u, linear, square, kx, n, order, order_u, 1);
  }
  CT_CALL void pair(T* s, T* c, T sign, const T* kx, int n, int order) {
    One::pair(s, c, sign, kx, n, order, 1);
  }
  CT_CALL void logarithm(T* y, const T* x, int n, int order) { One::logarithm(y, x, n, order, 1); }
  CT_CALL void power(T* y, T exponent, const T* x, int n, int order) {
    One::power(y, exponent, x, n, order, 1);
  }
  CT_CALL void quotient(T* y, const T* a, int na, const T* b, int nb, int order) {
    One::quotient(y, a, na, b, nb, order, 1);
  }
  CT_CALL void combine(T* out, T constant, T alpha, const T* a, int na, T beta, const T* b, int nb,
                       int order) {
    One::combine(out, constant, alpha, a, na, beta, b, nb, order, 1);
  }
  CT_CALL void values(Value value, T param, T* out, T* out2, const T* x) {
    scalar_values(value, param, out, out2, *x);
  }

  T memory[kCapacity * kSeries];
  int taken = 0;
};

// ---- elementwise functions ---------------------------------------------------------------------

template <typename T>
struct UnaryTask {
  const T* x;  // [terms, numel]
  const T* g;  // backward: the cotangent [order + 1, numel], or [numel] of the last coefficient
  T* out;
  int64_t numel;
  int terms, order, level;
  Op op;
  T param;
  bool last;
};

template <typename T>
__device__ inline void load_series(T* to, const T* from, int64_t numel, int64_t i, int count) {
  for (int k = 0; k < count; ++k) to[k] = from[k * numel + i];
}

template <typename T>
__device__ inline void store_series(T* to, const T* from, int64_t numel, int64_t i, int count) {
  for (int k = 0; k < count; ++k) to[k * numel + i] = from[k];
}

template <int kCapacity, typename T>
__global__ void unary_kernel(UnaryTask<T> task) {
  using M = ThreadMachine<T, kCapacity>;
  for (int64_t i = global_thread(); i < task.numel; i += global_threads()) {
    M machine;
    T *x = machine.take(), *y = machine.take();
    load_series(x, task.x, task.numel, i, task.terms);
    Functions<M>::evaluate(machine, task.op, task.level, task.param, y, x, task.terms, task.order);
    if (task.last)
      task.out[i] = y[task.order];
    else
      store_series(task.out, y, task.numel, i, task.order + 1);
  }
}

template <int kCapacity, typename T>
__global__ void unary_backward_kernel(UnaryTask<T> task) {
  using M = ThreadMachine<T, kCapacity>;
  for (int64_t i = global_thread(); i < task.numel; i += global_threads()) {
    M machine;
    T *x = machine.take(), *slope = machine.take(), *g = machine.take();
    load_series(x, task.x, task.numel, i, task.terms);
    Functions<M>::evaluate(machine, task.op, task.level, task.param, slope, x, task.terms,
                           task.order);
    if (task.last) {
      const T last = task.g[i];
      for (int j = 0; j < task.terms; ++j) x[j] = slope[task.order - j] * last;
    } else {
      load_series(g, task.g, task.numel, i, task.order + 1);
      M::correlate(x, slope, task.order + 1, g, task.order + 1, task.terms - 1);
    }
    store_series(task.out, x, task.numel, i, task.terms);
  }
}

// ---- products ----------------------------------------------------------------------------------

enum class Pair : int { kProduct, kQuotient, kCorrelation };

template <typename T>
struct PairOperand {
  const T* data;  // [terms, numel]
  int terms;
  int64_t numel;
  int64_t count, repeat;  // element i of the result looks at (i / repeat) % count
};

template <typename T>
struct PairTask {
  PairOperand<T> a, b;
  T* out;
  int64_t numel;
  int order;
  Pair kind;
};

// Reads its operands where they are, as often as it needs them: they stay in the cache.
template <typename T>
__global__ void pair_kernel(PairTask<T> task) {
  for (int64_t i = global_thread(); i < task.numel; i += global_threads()) {
    const T* a = task.a.data + i / task.a.repeat % task.a.count;
    const T* b = task.b.data + i / task.b.repeat % task.b.count;
    for (int k = 0; k <= task.order; ++k) {
      T sum = 0;
      if (task.kind == Pair::kCorrelation) {
        for (int j = k; j <= smaller(task.b.terms - 1, k + task.a.terms - 1); ++j)
          sum += a[(j - k) * task.a.numel] * b[j * task.b.numel];
      } else if (task.kind == Pair::kProduct) {
        for (int j = larger_of(0, k + 1 - task.b.terms); j <= smaller(k, task.a.terms - 1); ++j)
          sum += a[j * task.a.numel] * b[(k - j) * task.b.numel];
      } else {
        for (int j = 1; j <= smaller(k, task.b.terms - 1); ++j)
          sum += b[j * task.b.numel] * task.out[(k - j) * task.numel + i];
        sum = ((k < task.a.terms ? a[k * task.a.numel] : T(0)) - sum) / b[0];
      }
      task.out[k * task.numel + i] = sum;
    }
  }
}

// ---- Laplacians --------------------------------------------------------------------------------

template <typename T>
struct LaplacianKernelTask {
  const T *x, *rows, *lap;
  int64_t count, numel, columns;
  Op op;
  T param;
  T *y, *new_rows, *out;
  const T *gy, *grows, *glap;
  T *x_bar, *rows_bar, *lap_bar;
  T *first, *bend;  // backward of shared rows: f'(x), and 2 f''(x) glap, for the second kernel
};

// f(x), f'(x), f''(x) and, for order 3, f'''(x)
template <typename T>
__device__ inline void derivatives(const LaplacianKernelTask<T>& task, int64_t i, int order,
                                   T* to) {
  using M = ThreadMachine<T, 6>;
  M machine;
  T *line = machine.take(), *y = machine.take();
  line[0] = task.x[i], line[1] = T(1);
  Functions<M>::evaluate(machine, task.op, 0, task.param, y, line, 2, order);
  T factorial = 1;
  for (int k = 0; k <= order; ++k) {
    if (k > 1) factorial *= T(k);
    to[k] = factorial * y[k];
  }
}

template <typename T>
__global__ void laplacian_kernel(LaplacianKernelTask<T> task) {
  for (int64_t i = global_thread(); i < task.numel; i += global_threads()) {
    T f[3], squares = 0;
    derivatives(task, i, 2, f);
    const int64_t column = i % task.columns;
    for (int64_t r = 0; r < task.count; ++r) {
      const T row = task.rows[r * task.columns + column];
      squares += row * row;
      if (task.new_rows != nullptr) task.new_rows[r * task.numel + i] = f[1] * row;
    }
    task.y[i] = f[0];
    task.out[i] = f[2] * squares + (task.lap == nullptr ? T(0) : f[1] * task.lap[i]);
  }
}

// The cotangents of x and lap, and of rows that are not shared.
template <typename T>
__global__ void laplacian_backward_kernel(LaplacianKernelTask<T> task) {
  const bool shared = task.columns != task.numel;
  for (int64_t i = global_thread(); i < task.numel; i += global_threads()) {
    T f[4], squares = 0, products = 0;
    derivatives(task, i, 3, f);
    const T glap = task.glap == nullptr ? T(0) : task.glap[i], bend = T(2) * f[2] * glap;
    const int64_t column = i % task.columns;
    for (int64_t r = 0; r < task.count; ++r) {
      const T row = task.rows[r * task.columns + column];
      const T g = task.grows == nullptr ? T(0) : task.grows[r * task.numel + i];
      squares += row * row, products += g * row;
      if (!shared)
        task.rows_bar[r * task.numel + i] =
            task.grows == nullptr ? bend * row : f[1] * g + bend * row;
    }
    T sum = f[2] * (products + glap * (task.lap == nullptr ? T(0) : task.lap[i]));
    if (task.glap != nullptr) sum += f[3] * glap * squares;
    if (task.gy != nullptr) sum += f[1] * task.gy[i];
    task.x_bar[i] = sum;
    task.lap_bar[i] = f[1] * glap;
    if (shared) task.first[i] = f[1], task.bend[i] = bend;
  }
}

// The cotangent of shared rows: one thread an entry, over all elements that share it.
template <typename T>
__global__ void shared_rows_kernel(LaplacianKernelTask<T> task) {
  for (int64_t at = global_thread(); at < task.count * task.columns; at += global_threads()) {
    const int64_t r = at / task.columns, column = at % task.columns;
    T sum = 0, bend = 0;
    for (int64_t i = column; i < task.numel; i += task.columns) {
      if (task.grows != nullptr) sum += task.first[i] * task.grows[r * task.numel + i];
      bend += task.bend[i];
    }
    task.rows_bar[at] = task.glap == nullptr ? sum : sum + bend * task.rows[at];
  }
}

}  // namespace ct::jet
