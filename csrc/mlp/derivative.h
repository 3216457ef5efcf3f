// d^K/ds^K f(x + s v): all coefficients of a block of samples through all layers, and back.
#pragma once

#include "net.h"

namespace ct::mlp {
namespace {

// Where the preactivations of a block's hidden layers are kept for the way back.
struct KeptJets {
  KeptJets(const Net& net, int order) : order(order) {
    for (int l = 0; l + 1 < net.depth; ++l) {
      begin.push_back(row);
      row += (degree(l) + 1) * net.linear[l].out;
    }
  }
  // the first layer's preactivation is linear in s
  int degree(int layer) const { return layer == 0 ? std::min(order, 1) : order; }

  int order;
  std::vector<int64_t> begin;
  int64_t row = 0;  // numbers a sample
};

// What is kept is laid out by the blocks of the backward pass. Without it they may be small, which
// leaves most of a cache that may be shared to the panels.
inline Blocks derivative_blocks(const Net& net, int order, int64_t element, bool kept) {
  const int64_t planes = (order + 1) * (kept ? 5 : 2);
  return Blocks(net.batch, planes * net.widest * element, 16, kept ? Blocks::kCache : 256 << 10);
}

template <typename T>
T factorial(int n) {
  T product = 1;
  for (int i = 2; i <= n; ++i) product *= i;
  return product;
}

// x and v [batch, inputs]; out [batch, outputs]; kept may be null.
template <typename T>
void derivative_forward(const Net& net, const T* x, const T* v, int order, T* out, T* kept) {
  const Layout<T> layout(net, As::kTransposed, order + 1);
  const KeptJets places(net, order);
  const Blocks blocks = derivative_blocks(net, order, sizeof(T), kept != nullptr);
  const int64_t planes = order + 1, room = planes * blocks.size * net.widest;
  const auto& loop = loops<T>();
  const auto own = [&] { return layout.of_thread(); };
  for_blocks<T>(blocks, 2 * room, own, [&](int64_t block, T* scratch, const auto& mine) {
    const std::vector<Layer<T>>& layers = *mine;
    const int64_t begin = blocks.first(block), r = blocks.samples(block), d = net.inputs;
    T *z = scratch, *h = scratch + room;
    T* keep = kept == nullptr ? nullptr : kept + begin * places.row;
    for (int l = 0; l + 1 < net.depth; ++l) {
      const Layer<T>& layer = layers[l];
      const int degree = places.degree(l);
      if (keep != nullptr) z = keep + places.begin[l] * r;
      const int64_t plane = r * layer.out;
      if (l > 0) {
        layer.factor.product((order + 1) * r, h, z, layer.bias, r);
      } else {
        layer.factor.product(r, x + begin * d, z, layer.bias, r, kShortChain);
        if (order > 0) layer.factor.product(r, v + begin * d, z + plane, nullptr, 0, kShortChain);
      }
      JetTask<T> task{net.activations[l],
                      static_cast<T>(net.params[l]),
                      order,
                      degree,
                      l + 2 == net.depth,
                      plane,
                      {z, plane},
                      {h, plane},
                      {},
                      {}};
      loop.jet(task);
    }
    const Layer<T>& last = layers.back();
    T* to = out + begin * last.out;
    last.factor.product(r, h, to, factorial<T>(order));
    if (order == 0) add_bias(to, last.bias, r, last.out);
  });
}

template <typename T>
void derivative_backward(const Net& net, const Tensor& x, const Tensor& v, int order,
                         const Tensor& g, const Tensor& kept, Tensor& x_bar, Tensor& v_bar,
                         std::vector<Tensor>& parameters) {
  const auto layers = net.layers<T>(As::kGiven, order + 1);
  const KeptJets places(net, order);
  const Blocks blocks = derivative_blocks(net, order, sizeof(T), true);
  const int64_t room = (order + 1) * blocks.size * net.widest;
  std::vector<Tensor*> into;
  for (Tensor& p : parameters) into.push_back(&p);
  Sums<T> sums(blocks, into);
  const auto& loop = loops<T>();
  const int last = net.depth - 1;
  sums.run(blocks, 4 * room, [&](int64_t block, T* scratch, int64_t lane) {
    const int64_t begin = blocks.first(block), r = blocks.samples(block), d = net.inputs;
    T *h = scratch, *h_bar = h + room, *z_bar = h_bar + room, *next_bar = z_bar + room;
    const T *keep = data<T>(kept) + begin * places.row, *of_out = data<T>(g) + begin * net.outputs;
    const T scale = factorial<T>(order);
    layers[last].factor.product(r, of_out, h_bar, scale);
    if (order == 0 && layers[last].bias != nullptr)
      add_rows(sums.of(lane, 2 * last + 1), of_out, r, net.outputs);
    for (int l = last - 1; l >= 0; --l) {
      const Layer<T>& layer = layers[l];
      const int64_t plane = r * layer.out;
      const int degree = places.degree(l);
      JetTask<T> task{net.activations[l],
                      static_cast<T>(net.params[l]),
                      order,
                      degree,
                      l + 1 == last,
                      plane,
                      {keep + places.begin[l] * r, plane},
                      {h, plane},
                      {h_bar, plane},
                      {z_bar, plane}};
      loop.jet_derivative(task);
      if (l + 1 == last)  // of the layer above
        sums.add_product(lane, 2 * last, net.outputs, layer.out, r, of_out, h, scale);
      else
        sums.add_product(lane, 2 * (l + 1), layers[l + 1].out, layer.out, (order + 1) * r, next_bar,
                         h);
      if (layer.bias != nullptr) add_rows(sums.of(lane, 2 * l + 1), z_bar, r, layer.out);
      if (l > 0) layer.factor.product((order + 1) * r, z_bar, h_bar);
      std::swap(z_bar, next_bar);
    }
    const Layer<T>& layer = layers[0];  // its cotangents are in next_bar
    const T* rows[] = {data<T>(x) + begin * d, data<T>(v) + begin * d};
    Tensor* bars[] = {&x_bar, &v_bar};
    for (int k = 0; k <= places.degree(0); ++k) {
      const T* bar = next_bar + k * r * layer.out;
      sums.add_product(lane, 0, layer.out, d, r, bar, rows[k]);
      layer.factor.product(r, bar, data<T>(*bars[k]) + begin * d);
    }
    if (order == 0) std::fill_n(data<T>(v_bar) + begin * d, r * d, T(0));
  });
}

}  // namespace
}  // namespace ct::mlp
