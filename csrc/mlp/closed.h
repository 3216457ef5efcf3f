// Divergence of a net with two hidden layers in closed form: with the activations' slopes d_1 and
// d_2 it is d_2 . M d_1 for M = W_2 * P, elementwise, with the ends' product P = (W_1 W_3)^T.
#pragma once

#include "net.h"

namespace ct::mlp {
namespace {

// What a forward pass keeps: preactivations of both layers and M d_1 of the whole batch, and P.
struct ClosedPlaces {
  explicit ClosedPlaces(const Net& net)
      : one(net.linear[0].out), two(net.linear[1].out), batch(net.batch) {}
  int64_t second() const { return batch * one; }
  int64_t mixed() const { return second() + batch * two; }
  int64_t ends() const { return mixed() + batch * two; }
  int64_t size() const { return ends() + one * two; }

  int64_t one, two, batch;  // units of the hidden layers
};

inline Blocks closed_blocks(const Net& net, int64_t element) {
  return Blocks(net.batch, 8 * net.widest * element, 64);
}

// P and M, a few rows at a time.
template <typename T>
void closed_mix(const std::vector<Layer<T>>& layers, T* ends, T* mix) {
  const Layer<T>&one = layers[0], &two = layers[1], &last = layers[2];
  const Blocks blocks(two.out, 4 * one.out * sizeof(T), 64);
  for_blocks<T>(blocks, 0, [&](int64_t block, T*) {
    const int64_t begin = blocks.first(block), rows = blocks.samples(block), n = one.out;
    T *p = ends + begin * n, *m = mix + begin * n;
    const T* w = two.weight + begin * n;
    multiply_twice_transposed<T>(rows, n, last.out, last.weight + begin, last.in, one.weight, p);
    for (int64_t i = 0; i < rows * n; ++i) m[i] = w[i] * p[i];
  });
}

template <typename T>
void closed_forward(const Net& net, const Tensor& x, Tensor& value, Tensor& trace, T* kept, T* ends,
                    T* mix) {
  const auto layers = net.layers<T>(As::kTransposed, 1);
  const Layer<T>&one = layers[0], &two = layers[1], &last = layers[2];
  const ClosedPlaces places(net);
  const Blocks blocks = closed_blocks(net, sizeof(T));
  const int64_t room = blocks.size * net.widest;
  const auto& loop = loops<T>();
  closed_mix(layers, ends, mix);
  const Factor<T> mixing(mix, As::kTransposed, one.out, two.out, net.batch);
  for_blocks<T>(blocks, 5 * room, [&](int64_t block, T* scratch) {
    const int64_t begin = blocks.first(block), r = blocks.samples(block);
    T *h = scratch, *slope = h + room, *z1 = slope + room, *z2 = z1 + room, *mixed = z2 + room;
    if (kept != nullptr) {
      z1 = kept + begin * one.out;
      z2 = kept + places.second() + begin * two.out;
      mixed = kept + places.mixed() + begin * two.out;
    }
    TracedTask<T> task{};
    task.activation = net.activations[0], task.param = static_cast<T>(net.params[0]);
    task.samples = r, task.n = one.out;
    task.z = z1, task.bias = one.bias, task.value = h, task.slope = slope;
    one.factor.product(r, data<T>(x) + begin * one.in, z1);
    loop.traced(task);
    two.factor.product(r, h, z2);
    mixing.product(r, slope, mixed);
    task.activation = net.activations[1], task.param = static_cast<T>(net.params[1]);
    task.n = two.out;
    task.z = z2, task.bias = two.bias, task.slope = nullptr;
    task.beside = mixed, task.trace = data<T>(trace) + begin;
    loop.traced(task);
    T* to = data<T>(value) + begin * last.out;
    last.factor.product(r, h, to, last.bias, r);
  });
}

// From M's cotangent, which is overwritten, to those of the weights, which are added to.
template <typename T>
void closed_mix_derivative(const std::vector<Layer<T>>& layers, const T* ends, T* mix_bar,
                           Tensor* weight_bars) {
  const Layer<T>&one = layers[0], &two = layers[1], &last = layers[2];
  const int64_t n = one.out;
  T* two_bar = data<T>(weight_bars[2]);
  const Blocks blocks(two.out, 4 * n * sizeof(T), 64);
  for_blocks<T>(blocks, 0, [&](int64_t block, T*) {
    const int64_t begin = blocks.first(block) * n, end = begin + blocks.samples(block) * n;
    for (int64_t i = begin; i < end; ++i) {
      two_bar[i] += mix_bar[i] * ends[i];
      mix_bar[i] *= two.weight[i];  // now of P
    }
  });
  T *one_bar = data<T>(weight_bars[0]), *last_bar = data<T>(weight_bars[4]);
  for_blocks<T>(Blocks(2, 1, 1, 1), 0, [&](int64_t which, T*) {
    if (which == 0)
      multiply_twice_transposed<T>(n, one.in, two.out, mix_bar, n, last.weight, one_bar, 1);
    else
      multiply_twice_transposed<T>(last.out, two.out, n, one.weight, one.in, mix_bar, last_bar, 1);
  });
}

// g_value may be null; so may x_bar.
template <typename T>
void closed_backward(const Net& net, const Tensor& x, const T* kept, const Tensor* g_value,
                     const Tensor& g_trace, Tensor* x_bar, Tensor& mix_bar,
                     std::vector<Tensor>& parameters) {
  const auto layers = net.layers<T>(As::kGiven, 1);
  const Layer<T>&one = layers[0], &two = layers[1], &last = layers[2];
  const ClosedPlaces places(net);
  const Blocks blocks = closed_blocks(net, sizeof(T));
  const int64_t room = blocks.size * net.widest;
  const T* ends = kept + places.ends();
  Scratch<T> mixed_weights(places.one * places.two);
  T* mix = mixed_weights.get();
  for (int64_t i = 0; i < places.one * places.two; ++i) mix[i] = two.weight[i] * ends[i];
  const Factor<T> mixing(mix, As::kGiven, two.out, one.out, net.batch);
  std::vector<Tensor*> into;
  for (Tensor& p : parameters) into.push_back(&p);
  into.push_back(&mix_bar);
  Sums<T> sums(blocks, into);
  const auto& loop = loops<T>();
  sums.run(blocks, 5 * room, [&](int64_t block, T* scratch, int64_t lane) {
    const int64_t begin = blocks.first(block), r = blocks.samples(block);
    // the loop may write where it has read: the activation over its cotangent, and so on
    T *h_bar = scratch, *h = h_bar, *slope_bar = h + room, *slope = slope_bar,
      *z1_bar = slope + room, *z2_bar = z1_bar + room, *mixed_bar = z2_bar + room;
    T* z = const_cast<T*>(kept);  // only read
    const T* from = data<T>(x) + begin * one.in;
    TracedTask<T> task{};
    task.activation = net.activations[1], task.param = static_cast<T>(net.params[1]);
    task.samples = r, task.n = two.out;
    task.z = z + places.second() + begin * two.out, task.value = h;
    task.beside = kept + places.mixed() + begin * two.out, task.slope = mixed_bar;
    task.scale = data<T>(g_trace) + begin, task.z_bar = z2_bar;
    if (g_value == nullptr) {
      loop.traced_derivative(task);
    } else {
      const T* bar = data<T>(*g_value) + begin * last.out;
      last.factor.product(r, bar, h_bar);
      task.value_bar = h_bar;
      loop.traced_derivative(task);
      sums.add_product(lane, 4, last.out, last.in, r, bar, h);
      if (last.bias != nullptr) add_rows(sums.of(lane, 5), bar, r, last.out);
    }
    if (two.bias != nullptr) add_rows(sums.of(lane, 3), z2_bar, r, two.out);
    mixing.product(r, mixed_bar, slope_bar);
    two.factor.product(r, z2_bar, h_bar);
    task.activation = net.activations[0], task.param = static_cast<T>(net.params[0]);
    task.n = one.out;
    task.z = z + begin * one.out, task.value_bar = h_bar;
    task.beside = slope_bar, task.slope = slope;
    task.scale = nullptr, task.z_bar = z1_bar;
    loop.traced_derivative(task);
    sums.add_product(lane, 2, two.out, one.out, r, z2_bar, h);
    sums.add_product(lane, 6, two.out, one.out, r, mixed_bar, slope);
    sums.add_product(lane, 0, one.out, one.in, r, z1_bar, from);
    if (one.bias != nullptr) add_rows(sums.of(lane, 1), z1_bar, r, one.out);
    if (x_bar != nullptr) one.factor.product(r, z1_bar, data<T>(*x_bar) + begin * one.in);
  });
  closed_mix_derivative(layers, ends, data<T>(mix_bar), parameters.data());
}

}  // namespace
}  // namespace ct::mlp
