// The CUDA kernels. No torch here: the tests compile this file with g++ as well, and run it on the
// CPU.
//
// A thread takes a row through its net, whose parameters are in shared memory where they fit.
// Series between layers are kept in memory, rows in a row. Sums over rows are taken in an order
// that depends on sizes alone.
#pragma once

#include <cstdint>

#include "cuda_values.h"

namespace ct::hollow {

constexpr int kThreads = 128;
constexpr int kShared = 2048;  // parameters of a net that shared memory takes

// The rows first ... first + count - 1 of each group.
template <typename T>
struct Rows {
  Task<T> task;
  int64_t first, count;
  // Coefficient k of unit u, counted through all hidden layers, is part y, then part slope, which
  // becomes the cotangent of z; `planes` coefficients are computed, the task's order and maybe
  // more.
  T* kept;
  int planes, parts;

  CT_HD int64_t number(int64_t group, int64_t row) const {
    return (first + row) * task.groups + group;
  }
  CT_HD T* at(int64_t unit, int k, int part, int64_t group, int64_t row) const {
    return kept + (((unit * planes + k) * parts + part) * task.groups + group) * count + row;
  }
};

// One row on its way through the net; `theta` are the parameters of its group.
template <typename T>
struct Row {
  const Rows<T>& rows;
  const T* theta;
  int64_t group, row;

  __device__ T kept(int64_t unit, int k, int part) const {
    return *rows.at(unit, k, part, group, row);
  }
  __device__ void keep(int64_t unit, int k, int part, T value) const {
    *rows.at(unit, k, part, group, row) = value;
  }
};

// Coefficients of the input of an activation.
template <typename T, int kSize>
struct Coefficients {
  CT_MLP_INLINE T get(int k) const { return of[k]; }
  T of[kSize];
};

// The series before the activation of unit u; `below` is the number of the first unit of the layer
// before.
template <typename T, int kSize>
__device__ inline void enter_unit(const Row<T>& r, int layer, int64_t unit, int64_t below,
                                  Coefficients<T, kSize>& z) {
  const Net& net = r.rows.task.net;
  const int64_t inputs = net.inputs(layer);
  const T* weight = r.theta + net.weight[layer] + unit * inputs;
  constexpr bool kKnown = kSize <= mlp::kMaxOrder;  // how many there are, when this is compiled
  const int planes = kKnown ? kSize : r.rows.planes;
  for (int k = 0; k < planes; ++k) z.of[k] = T(0);
  z.of[0] = r.theta[net.bias[layer] + unit];
  if (layer == 0) {
    const int64_t number = r.rows.number(r.group, r.row);
    const T* h = r.rows.task.h + number * net.context;
    z.of[0] += weight[0] * r.rows.task.x[number];
    z.of[1] = weight[0];
    for (int64_t i = 0; i < net.context; ++i) z.of[0] += weight[1 + i] * h[i];
    return;
  }
  for (int64_t i = 0; i < inputs; ++i)
    for (int k = 0; k < planes; ++k) z.of[k] += weight[i] * r.kept(below + i, k, 0);
}

// All hidden layers. Without slopes, the last one goes straight on to the output, `sum`.
template <typename Op, int kOrder, bool kSlope, typename T>
__device__ void climb(const Row<T>& r, T* sum) {
  using S = device::LocalSeries<T, Op, kOrder, false>;
  const Task<T>& task = r.rows.task;
  const Net& net = task.net;
  for (int k = 0; k <= task.order; ++k) sum[k] = T(0);
  int64_t below = 0, first = 0;
  for (int layer = 0; layer < net.hidden; ++layer) {
    const bool top = layer == net.hidden - 1;
    for (int64_t u = 0; u < net.width[layer]; ++u) {
      Coefficients<T, S::kSize> z;
      enter_unit(r, layer, u, below, z);
      S s(r.rows.planes - 1, false);
      s.template fill<kSlope>(task.param, z);
      if (top && !kSlope) {
        const T weight = r.theta[net.weight[net.hidden] + u];
        for (int k = 0; k <= task.order; ++k) sum[k] += weight * s.get(mlp::kY, k);
        continue;
      }
      for (int k = 0; k <= s.order(); ++k) {
        r.keep(first + u, k, 0, s.get(mlp::kY, k));
        if (kSlope) r.keep(first + u, k, 1, s.get(mlp::kU, k));
      }
    }
    below = first, first += net.width[layer];
  }
}

// Low orders of the usual activations have code of their own; Rows::planes says the same.
template <bool kSlope>
struct Climb {
  template <typename Op>
  struct Family {
    template <typename T>
    static __device__ void run(const Row<T>& r, T* sum) {
      if constexpr (Op::kUnrolled) {
        if (r.rows.planes == 2) return climb<Op, 1, kSlope>(r, sum);
        if (r.rows.planes == 5) return climb<Op, 4, kSlope>(r, sum);
      }
      climb<Op, -1, kSlope>(r, sum);
    }
  };
};

template <bool kSlope, typename T>
__device__ void climb_by_activation(const Row<T>& r, T* sum) {
  using mlp::Activation;
  using namespace mlp::device;
  CT_MLP_BY_ACTIVATION(r.rows.task.activation, Climb<kSlope>::template Family, run(r, sum))
}

// The coefficients that are computed for an order.
inline int planes_of(int order) { return order <= 1 ? 2 : order <= 4 ? 5 : order + 1; }

// ---- kernels: gridDim.x strides over rows, gridDim.y over groups

template <typename T>
__device__ const T* shared_parameters(const Task<T>& task, int64_t group, T* shared) {
  const T* theta = task.theta + group * task.net.parameters;
  if (task.net.parameters > kShared) return theta;
  __syncthreads();  // those of an earlier group may still be read
  for (int64_t i = threadIdx.x; i < task.net.parameters; i += blockDim.x) shared[i] = theta[i];
  __syncthreads();
  return shared;
}

template <typename T>
__global__ void forward_kernel(Rows<T> rows) {
  __shared__ T shared[kShared];
  const Task<T>& task = rows.task;
  const int64_t all = task.groups * task.rows, stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t group = blockIdx.y; group < task.groups; group += gridDim.y) {
    const T* theta = shared_parameters(task, group, shared);
    for (int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < rows.count;
         row += stride) {
      T sum[mlp::kMaxOrder + 1];
      climb_by_activation<false>(Row<T>{rows, theta, group, row}, sum);
      sum[0] += theta[task.net.bias[task.net.hidden]];
      for (int k = 0; k <= task.order; ++k) task.out[k * all + rows.number(group, row)] = sum[k];
    }
  }
}

// Cotangents of z of all units, in place of slopes, from the last layer down.
template <typename T>
__device__ void descend(const Row<T>& r) {
  const Task<T>& task = r.rows.task;
  const Net& net = task.net;
  const int64_t all = task.groups * task.rows, number = r.rows.number(r.group, r.row);
  int64_t above = 0, first = 0;
  for (int layer = 0; layer < net.hidden; ++layer) above += net.width[layer];
  for (int layer = net.hidden - 1; layer >= 0; --layer) {
    first = above - net.width[layer];
    const T* weight = r.theta + net.weight[layer + 1];
    for (int64_t u = 0; u < net.width[layer]; ++u) {
      T bar[mlp::kMaxOrder + 1], found[mlp::kMaxOrder + 1];
      for (int k = 0; k <= task.order; ++k) {
        bar[k] = T(0);
        if (layer == net.hidden - 1) {
          bar[k] = weight[u] * task.g[k * all + number];
          continue;
        }
        for (int64_t o = 0; o < net.width[layer + 1]; ++o)
          bar[k] += weight[o * net.width[layer] + u] * r.kept(above + o, k, 1);
      }
      for (int j = 0; j <= task.order; ++j) {
        found[j] = T(0);
        for (int k = j; k <= task.order; ++k) found[j] += bar[k] * r.kept(first + u, k - j, 1);
      }
      for (int j = 0; j <= task.order; ++j) r.keep(first + u, j, 1, found[j]);
    }
    above = first;
  }
}

template <typename T>
__global__ void gradient_kernel(Rows<T> rows) {
  __shared__ T shared[kShared];
  const Task<T>& task = rows.task;
  const Net& net = task.net;
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t group = blockIdx.y; group < task.groups; group += gridDim.y) {
    const T* theta = shared_parameters(task, group, shared);
    for (int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; row < rows.count;
         row += stride) {
      const Row<T> r{rows, theta, group, row};
      T sum[mlp::kMaxOrder + 1];
      climb_by_activation<true>(r, sum);
      descend(r);
      const int64_t number = rows.number(group, row);
      for (int64_t i = 0; i <= net.context; ++i) {
        T total = T(0);
        for (int64_t u = 0; u < net.width[0]; ++u)
          total += theta[net.weight[0] + u * (1 + net.context) + i] * r.kept(u, 0, 1);
        if (i == 0)
          task.of_x[number] = total;
        else
          task.of_h[number * net.context + i - 1] = total;
      }
    }
  }
}

// What a row adds to the gradient in one parameter.
template <typename T>
__device__ T parameter_bar(const Row<T>& r, int layer, int64_t output, int64_t input, bool bias) {
  const Task<T>& task = r.rows.task;
  const Net& net = task.net;
  const int64_t all = task.groups * task.rows, number = r.rows.number(r.group, r.row);
  int64_t first = 0;
  for (int l = 0; l < layer; ++l) first += net.width[l];
  const bool last = layer == net.hidden;
  if (bias) return last ? task.g[number] : r.kept(first + output, 0, 1);
  if (layer == 0) {
    const T bar = r.kept(output, 0, 1);
    if (input > 0) return bar * task.h[number * net.context + input - 1];
    const T line = task.order > 0 ? r.kept(output, 1, 1) : T(0);
    return bar * task.x[number] + line;
  }
  const int64_t unit = first - net.width[layer - 1] + input;
  T total = T(0);
  for (int k = 0; k <= task.order; ++k) {
    const T bar = last ? task.g[k * all + number] : r.kept(first + output, k, 1);
    total += bar * r.kept(unit, k, 0);
  }
  return total;
}

// A block for each parameter: the rows' sum is added to of_theta.
template <typename T>
__global__ void parameter_kernel(Rows<T> rows) {
  __shared__ T shared[kThreads];
  const Task<T>& task = rows.task;
  const Net& net = task.net;
  for (int64_t i = blockIdx.x; i < task.groups * net.parameters; i += gridDim.x) {
    const int64_t group = i / net.parameters, at = i % net.parameters;
    int layer = 0;
    while (layer < net.hidden && at >= net.weight[layer + 1]) ++layer;
    const bool bias = at >= net.bias[layer];
    const int64_t inputs = net.inputs(layer), place = at - net.weight[layer];
    const int64_t output = bias ? at - net.bias[layer] : place / inputs;
    const int64_t input = bias ? 0 : place % inputs;
    T total = T(0);
    for (int64_t row = threadIdx.x; row < rows.count; row += blockDim.x)
      total += parameter_bar(Row<T>{rows, nullptr, group, row}, layer, output, input, bias);
    __syncthreads();  // an earlier sum may still be read
    shared[threadIdx.x] = total;
    for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
      __syncthreads();
      if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
    }
    if (threadIdx.x == 0) task.of_theta[i] += shared[0];
  }
}

}  // namespace ct::hollow
