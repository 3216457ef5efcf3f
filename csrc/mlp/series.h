// Taylor coefficients of the solution of x' = f(x), one sweep through the net an order, and their
// adjoint: again one sweep an order, from the highest down, and one product a layer for the
// weights.
#pragma once

#include "net.h"

namespace ct::mlp {
namespace {

// What is kept of a block's hidden layers: y and u = f'(z), each with all orders.
struct KeptSeries {
  KeptSeries(const Net& net, int orders) : orders(orders) {
    for (int l = 0; l + 1 < net.depth; ++l) {
      begin.push_back(row);
      row += 2 * orders * net.linear[l].out;
    }
  }
  int orders;
  std::vector<int64_t> begin;
  int64_t row = 0;  // numbers a sample
};

constexpr int64_t kBarSeries = 4;  // y, u and the cotangents of y and z

inline Blocks series_blocks(const Net& net, int orders, int64_t series, int64_t element) {
  const int64_t sample = (net.depth - 1) * series * orders * net.widest * element;
  return Blocks(net.batch, sample, 32);
}

template <typename T>
void series_forward(const Net& net, const Tensor& x, int order, Tensor& out, Tensor* kept) {
  const Layout<T> layout(net, As::kTransposed, order);
  const KeptSeries places(net, order);
  const auto& loop = loops<T>();
  const int hidden = net.depth - 1;
  int count = 0;  // of the series of a layer
  for (const Activation kind : net.activations) count = std::max(count, loop.series(kind));
  // what is kept is laid out by the blocks of the backward pass
  const Blocks blocks = series_blocks(net, order, kept == nullptr ? count : kBarSeries, sizeof(T));
  const int64_t d = net.inputs, most = blocks.size * net.widest * order, step = net.batch * d;
  T* to = data<T>(out);
  std::copy_n(data<T>(x), step, to);
  const auto own = [&] { return layout.of_thread(); };
  for_blocks<T>(
      blocks, hidden * count * most, own, [&](int64_t block, T* scratch, const auto& mine) {
        const std::vector<Layer<T>>& layers = *mine;
        const int64_t begin = blocks.first(block), r = blocks.samples(block);
        for (int k = 0; k < order; ++k) {
          const T* h = to + k * step + begin * d;
          for (int l = 0; l < hidden; ++l) {
            const Layer<T>& layer = layers[l];
            const int64_t plane = r * layer.out;
            T* series[kMaxSeries];
            for (int i = 0; i < count; ++i) series[i] = scratch + (l * count + i) * most;
            if (kept != nullptr) {
              series[kY] = data<T>(*kept) + begin * places.row + places.begin[l] * r;
              series[kU] = series[kY] + order * plane;
            }
            T* z = series[kZ] + k * plane;
            layer.factor.product(r, h, z, k == 0 ? layer.bias : nullptr, r);
            loop.step({net.activations[l], static_cast<T>(net.params[l]), k, plane, plane, series});
            h = series[kY] + k * plane;
          }
          const Layer<T>& last = layers.back();
          T* next = to + (k + 1) * step + begin * d;
          last.factor.product(r, h, next, T(1) / T(k + 1));
          if (k == 0) add_bias(next, last.bias, r, d);
        }
      });
}

// One block of the adjoint, with its places in memory.
template <typename T>
struct SeriesAdjoint {
  const Net& net;
  const std::vector<Layer<T>>& layers;
  int order;
  int64_t r, most;
  const T* keep;  // y and u of each hidden layer
  const KeptSeries& places;
  T *x, *x_bar;  // coefficients of the solution and their cotangents [K+1, r, d]
  T* bars;       // of each layer: y_bar and z_bar, [K, r, n] each

  T* y_bar(int l) const { return bars + 2 * l * most; }
  T* z_bar(int l) const { return bars + (2 * l + 1) * most; }
  const T* y(int l) const { return l < 0 ? x : keep + places.begin[l] * r; }

  // The cotangents that order k of the recursion passes down from x_(k+1).
  void sweep(int k, const Loops<T>& loop) const {
    const int last = net.depth - 1;
    const int64_t ends = r * net.inputs;
    const T* from = x_bar + (k + 1) * ends;
    T* out_bar = z_bar(last) + k * ends;
    for (int64_t i = 0; i < ends; ++i) out_bar[i] = from[i] * (T(1) / T(k + 1));
    for (int l = last; l >= 0; --l) {
      const Layer<T>& layer = layers[l];
      const T* bar = z_bar(l) + k * r * layer.out;
      if (l == 0) return layer.factor.product(r, bar, x_bar + k * ends, 1, true);
      const int64_t plane = r * layer.in;
      layer.factor.product(r, bar, y_bar(l - 1) + k * plane);
      loop.step_derivative(
          {k, order, plane, plane, y(l - 1) + order * plane, y_bar(l - 1), z_bar(l - 1)});
    }
  }
};

template <typename T>
void series_backward(const Net& net, const Tensor& out, int order, const Tensor& g,
                     const Tensor& kept, Tensor& x_bar, std::vector<Tensor>& parameters) {
  const auto layers = net.layers<T>(As::kGiven, order);
  const KeptSeries places(net, order);
  const auto& loop = loops<T>();
  const Blocks blocks = series_blocks(net, order, kBarSeries, sizeof(T));
  const int64_t d = net.inputs, step = net.batch * d;
  const int64_t most = blocks.size * std::max(net.widest, d) * order;
  const int64_t ends = (order + 1) * blocks.size * d;
  std::vector<Tensor*> into;
  for (Tensor& p : parameters) into.push_back(&p);
  Sums<T> sums(blocks, into);
  sums.run(blocks, 2 * net.depth * most + 2 * ends, [&](int64_t block, T* scratch, int64_t lane) {
    const int64_t begin = blocks.first(block), r = blocks.samples(block);
    T *x = scratch + 2 * net.depth * most, *bar = x + ends;
    for (int k = 0; k <= order; ++k) {
      std::copy_n(data<T>(out) + k * step + begin * d, r * d, x + k * r * d);
      std::copy_n(data<T>(g) + k * step + begin * d, r * d, bar + k * r * d);
    }
    const SeriesAdjoint<T> adjoint{
        net, layers, order, r, most, data<T>(kept) + begin * places.row, places, x, bar, scratch};
    for (int k = order - 1; k >= 0; --k) adjoint.sweep(k, loop);
    std::copy_n(bar, r * d, data<T>(x_bar) + begin * d);
    for (int l = 0; l < net.depth; ++l) {
      const Layer<T>& layer = layers[l];
      sums.add_product(lane, 2 * l, layer.out, layer.in, order * r, adjoint.z_bar(l),
                       adjoint.y(l - 1));
      if (layer.bias != nullptr) add_rows(sums.of(lane, 2 * l + 1), adjoint.z_bar(l), r, layer.out);
    }
  });
}

}  // namespace
}  // namespace ct::mlp
