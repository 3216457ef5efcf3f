// Divergence of a net with two hidden layers in closed form: with the activations' slopes d_1 and
// d_2 it is d_2 . M d_1 for M = W_2 * (W_1 W_3)^T, elementwise, which the caller has made.
//
// The loops over tangents serve here as well: M d_1 is one row that the second activation traces
// against ones, and d_1 is what the first makes of a row of ones.
#pragma once

#include "net.h"

namespace ct::mlp {
namespace {

// Of a sample's numbers that are kept: preactivations of both layers, and M d_1.
inline int64_t closed_kept(const Net& net) {
  return net.weights[0].size(0) + 2 * net.weights[1].size(0);
}

inline Blocks closed_blocks(const Net& net, int64_t element) {
  return Blocks(net.batch, 8 * net.widest * element, 64);
}

// The second activation: in [r, n], one row for each sample, traced against ones.
template <typename T>
RowsTask<T> traced_row(int64_t r, int64_t n, const T* in, const T* first, const T* second,
                       const T* ones, T* trace) {
  RowsTask<T> task{};
  task.rows = 1, task.samples = r, task.n = n;
  task.first = first, task.second = second;
  task.in = {in, 0, n};
  task.close = ones, task.trace = trace;
  return task;
}

template <typename T>
void closed_forward(const Net& net, const Tensor& x, const Tensor& mix, Tensor& value,
                    Tensor& trace, Tensor* kept) {
  const auto layers = net.layers<T>();
  const Layer<T>&one = layers[0], &two = layers[1], &last = layers[2];
  const Blocks blocks = closed_blocks(net, sizeof(T));
  const int64_t room = blocks.size * net.widest;
  const auto& loop = loops<T>();
  for_blocks<T>(blocks, 6 * room + net.widest, [&](int64_t block, T* scratch) {
    const int64_t begin = blocks.first(block), r = blocks.samples(block);
    const T param = static_cast<T>(net.param), *from = data<T>(x) + begin * one.in;
    T *h = scratch, *first = h + room, *second = first + room, *ones = second + 4 * room;
    T* keep = kept == nullptr ? second + room : data<T>(*kept) + begin * closed_kept(net);
    T *z1 = keep, *z2 = z1 + r * one.out, *mixed = z2 + r * two.out;
    std::fill_n(ones, two.out, T(1));
    multiply_transposed<T>(r, one.out, one.in, from, one.weight, z1);
    add_bias(z1, one.bias, r, one.out);
    loop.slopes({net.activation, param, r * one.out, z1, h, first, second, nullptr});
    multiply_transposed<T>(r, two.out, one.out, h, two.weight, z2);
    add_bias(z2, two.bias, r, two.out);
    multiply_transposed<T>(r, two.out, one.out, first, data<T>(mix), mixed);
    loop.slopes({net.activation, param, r * two.out, z2, h, first, second, nullptr});
    loop.rows(traced_row<T>(r, two.out, mixed, first, second, ones, data<T>(trace) + begin));
    T* to = data<T>(value) + begin * last.out;
    multiply_transposed<T>(r, last.out, last.in, h, last.weight, to);
    add_bias(to, last.bias, r, last.out);
  });
}

// g_value may be null; so may x_bar.
template <typename T>
void closed_backward(const Net& net, const Tensor& x, const Tensor& mix, const Tensor& kept,
                     const Tensor* g_value, const Tensor& g_trace, Tensor* x_bar, Tensor& mix_bar,
                     std::vector<Tensor>& parameters) {
  const auto layers = net.layers<T>();
  const Layer<T>&one = layers[0], &two = layers[1], &last = layers[2];
  const Blocks blocks = closed_blocks(net, sizeof(T));
  const int64_t room = blocks.size * net.widest;
  std::vector<Tensor*> into;
  for (Tensor& p : parameters) into.push_back(&p);
  into.push_back(&mix_bar);
  Sums<T> sums(blocks, into);
  const auto& loop = loops<T>();
  sums.run(blocks, 8 * room + 2 * net.widest, [&](int64_t block, T* scratch, int64_t lane) {
    const int64_t begin = blocks.first(block), r = blocks.samples(block);
    const T param = static_cast<T>(net.param), *from = data<T>(x) + begin * one.in;
    T *h = scratch, *first = h + room, *second = first + room, *h_bar = second + room,
      *z_bar = h_bar + room, *mixed_bar = z_bar + room, *slope = mixed_bar + room,
      *slope_bar = slope + room, *ones = slope_bar + room, *unused = ones + net.widest;
    const T* z1 = data<T>(kept) + begin * closed_kept(net);
    const T *z2 = z1 + r * one.out, *mixed = z2 + r * two.out;
    std::fill_n(ones, net.widest, T(1));
    std::fill_n(unused, net.widest, T(0));
    // second activation
    loop.slopes({net.activation, param, r * two.out, z2, h, first, second, nullptr});
    if (g_value != nullptr) {
      const T* bar = data<T>(*g_value) + begin * last.out;
      multiply<T>(r, last.in, last.out, bar, last.weight, h_bar);
      multiply_outer<T>(last.out, last.in, r, bar, h, sums.of(lane, 4), 1);
      if (last.bias != nullptr) add_rows(sums.of(lane, 5), bar, r, last.out);
    } else {
      std::fill_n(h_bar, r * two.out, T(0));
    }
    RowsDerivativeTask<T> d{};
    d.task = traced_row<T>(r, two.out, mixed, first, second, ones, nullptr);
    d.value_bar = h_bar, d.trace_bar = data<T>(g_trace) + begin, d.close_bar = unused;
    d.z_bar = z_bar, d.in_bar = {mixed_bar, 0, two.out};
    loop.rows_derivative(d);
    // first activation
    loop.slopes({net.activation, param, r * one.out, z1, h, first, second, nullptr});
    multiply<T>(r, one.out, two.out, mixed_bar, data<T>(mix), slope_bar);
    multiply<T>(r, one.out, two.out, z_bar, two.weight, h_bar);
    multiply_outer<T>(two.out, one.out, r, z_bar, h, sums.of(lane, 2), 1);
    if (two.bias != nullptr) add_rows(sums.of(lane, 3), z_bar, r, two.out);
    RowsDerivativeTask<T> e{};
    e.task.rows = 1, e.task.samples = r, e.task.n = one.out;
    e.task.first = first, e.task.second = second;
    e.task.in = {ones, 0, 0}, e.task.out = {slope, 0, one.out};
    e.value_bar = h_bar, e.out_bar = {slope_bar, 0, one.out};
    e.z_bar = z_bar, e.in_bar = {unused, 0, 0};
    loop.rows_derivative(e);
    multiply_outer<T>(two.out, one.out, r, mixed_bar, slope, sums.of(lane, 6), 1);
    multiply_outer<T>(one.out, one.in, r, z_bar, from, sums.of(lane, 0), 1);
    if (one.bias != nullptr) add_rows(sums.of(lane, 1), z_bar, r, one.out);
    if (x_bar != nullptr)
      multiply<T>(r, one.in, one.out, z_bar, one.weight, data<T>(*x_bar) + begin * one.in);
  });
}

}  // namespace
}  // namespace ct::mlp
