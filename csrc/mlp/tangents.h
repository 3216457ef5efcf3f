// Value, tangents and sum of second derivatives (the forward Laplacian), or the trace of the
// Jacobian (divergence): one block of samples through all layers, and back.
#pragma once

#include "net.h"

namespace ct::mlp {
namespace {

// What is asked for. Planes are the rows that a block's products have for each of its samples: the
// value, the tangents, and the sum of second derivatives unless the trace is wanted.
struct Tangents {
  Tangents(const Net& net, const Tensor& rows, bool all, const Tensor* close)
      : net(net), count(rows.size(0)), all(all), trace(close != nullptr) {
    net.check("rows", rows, {count, net.linear[0].out});
    require(count > 0, net.op, ": rows must not be empty");
    if (trace) net.check("close", *close, {count, net.linear.back().in});
    for (int l = 0; l + 1 < net.depth; ++l) {
      begin.push_back(kept_row);
      kept_row += (l == 0 ? 1 : planes()) * net.linear[l].out;
    }
  }
  int64_t planes() const { return count + (trace ? 1 : 2); }
  // planes behind the last activation
  int64_t last_planes() const { return trace ? 1 : all ? planes() : 2; }
  bool rows_out(int layer) const { return layer + 2 < net.depth || (all && !trace); }
  int64_t width(int layer) const { return net.linear[layer].out; }

  Blocks blocks(int64_t element, bool backward) const {
    const int64_t sample = planes() * net.widest * element * (backward ? 4 : 2);
    return Blocks(net.batch, sample, 1 + (backward ? 255 : 127) / planes());
  }

  const Net& net;
  int64_t count;
  bool all, trace;
  std::vector<int64_t> begin;  // where the preactivations of a layer are kept
  int64_t kept_row = 0;        // numbers a sample
};

// A block's tangents in a stack of planes [samples, n]: value, rows, Laplacian.
template <typename T>
Rows<T> rows_of(T* stack, int64_t samples, int64_t n) {
  return {stack + samples * n, samples * n, n};
}

// Activation of layer l: preactivations z (a stack; for the first layer the value alone) to `to`.
template <typename T>
RowsTask<T> activation_task(const Tangents& t, int layer, int64_t r, const T* z, T* slopes, T* to,
                            const T* rows, const T* close) {
  const int64_t n = t.width(layer), plane = r * n;
  const bool out = t.rows_out(layer);
  RowsTask<T> task{};
  task.rows = t.count, task.samples = r, task.n = n;
  task.first = slopes, task.second = slopes + plane, task.third = slopes + 2 * plane;
  task.in = layer == 0 ? Rows<const T>{rows, n, 0} : rows_of(z, r, n);
  if (out) task.out = rows_of(to, r, n);
  task.bend = !t.trace;
  if (task.bend) {
    task.lap = layer == 0 ? nullptr : z + (t.count + 1) * plane;
    task.lap_out = to + (out ? t.count + 1 : 1) * plane;
  }
  if (t.trace && !out) task.close = close;
  return task;
}

// The stack of outputs of a block [planes, r, o] to the results, or the cotangents the other way.
template <typename T, typename Move>
void for_outputs(const Tangents& t, int64_t begin, int64_t r, T* stack, const Move& move) {
  const int64_t o = t.net.outputs, planes = t.last_planes();
  for (int64_t p = 0; p < planes; ++p)
    for (int64_t s = 0; s < r; ++s) move(p, begin + s, stack + (p * r + s) * o, o);
}

template <typename T>
void tangents_forward(const Tangents& t, const Tensor& x, const Tensor& rows, const Tensor* close,
                      Tensor& value, Tensor& moved, Tensor& second, Tensor* kept) {
  const Net& net = t.net;
  const Layout<T> layout(net, As::kTransposed, t.planes());
  // what is kept is laid out by the blocks of the backward pass
  const Blocks blocks = t.blocks(sizeof(T), kept != nullptr);
  const int64_t room = t.planes() * blocks.size * net.widest, slope = blocks.size * net.widest;
  const int64_t ends = t.last_planes() * blocks.size * net.outputs;
  const auto& loop = loops<T>();
  const auto own = [&] { return layout.of_thread(); };
  const int64_t memory = 2 * room + 2 * slope + ends;
  for_blocks<T>(blocks, memory, own, [&](int64_t block, T* scratch, const auto& mine) {
    const std::vector<Layer<T>>& layers = *mine;
    const int64_t begin = blocks.first(block), r = blocks.samples(block);
    T *h = scratch, *z = h + room, *slopes = z + room, *ends = slopes + 2 * slope;
    T* keep = kept == nullptr ? nullptr : data<T>(*kept) + begin * t.kept_row;
    const T* from = data<T>(x) + begin * net.inputs;
    for (int l = 0; l + 1 < net.depth; ++l) {
      const Layer<T>& layer = layers[l];
      if (keep != nullptr) z = keep + t.begin[l] * r;
      layer.factor.product((l == 0 ? 1 : t.planes()) * r, from, z, layer.bias, r);
      loop.slopes({net.activations[l], static_cast<T>(net.params[l]), r * layer.out, z, h, slopes,
                   slopes + r * layer.out, nullptr});
      RowsTask<T> task = activation_task<T>(t, l, r, z, slopes, h, data<T>(rows),
                                            close == nullptr ? nullptr : data<T>(*close));
      task.trace = t.trace ? data<T>(second) + begin : nullptr;
      loop.rows(task);
      from = h;
    }
    const Layer<T>& last = layers.back();
    last.factor.product(t.last_planes() * r, h, ends, last.bias, r);
    T *to_value = data<T>(value), *to_moved = t.all ? data<T>(moved) : nullptr,
      *to_second = data<T>(second);
    for_outputs(t, begin, r, ends, [&](int64_t p, int64_t sample, const T* from, int64_t o) {
      T* to = p == 0                     ? to_value + sample * o
              : p + 1 == t.last_planes() ? to_second + sample * o
                                         : to_moved + (sample * t.count + p - 1) * o;
      std::copy_n(from, o, to);
    });
  });
}

// Cotangents of value, tangents and second; of x, rows, close and the parameters.
struct TangentsBars {
  const Tensor *value, *moved, *second;
  Tensor x, rows, close;
  std::vector<Tensor> parameters;
};

template <typename T>
void tangents_backward(const Tangents& t, const Tensor& x, const Tensor& rows, const Tensor* close,
                       const Tensor& kept, TangentsBars& bars) {
  const Net& net = t.net;
  const auto layers = net.layers<T>(As::kGiven, t.planes());
  const Blocks blocks = t.blocks(sizeof(T), true);
  const int64_t room = t.planes() * blocks.size * net.widest, slope = blocks.size * net.widest;
  const int64_t ends = t.last_planes() * blocks.size * net.outputs;
  std::vector<Tensor*> into;
  for (Tensor& p : bars.parameters) into.push_back(&p);
  const int rows_sum = static_cast<int>(into.size()), close_sum = rows_sum + 1;
  into.push_back(&bars.rows);
  if (t.trace) into.push_back(&bars.close);
  Sums<T> sums(blocks, into);
  const auto& loop = loops<T>();
  const int last = net.depth - 1;
  sums.run(blocks, 4 * room + 3 * slope + ends, [&](int64_t block, T* scratch, int64_t lane) {
    const int64_t begin = blocks.first(block), r = blocks.samples(block);
    T *h = scratch, *h_bar = h + room, *z_bar = h_bar + room, *above = z_bar + room,
      *slopes = above + room, *out_bar = slopes + 3 * slope;
    const T* keep = data<T>(kept) + begin * t.kept_row;
    for_outputs(t, begin, r, out_bar, [&](int64_t p, int64_t sample, T* to, int64_t o) {
      const T* from = p == 0 ? data<T>(*bars.value) + sample * o
                      : p + 1 == t.last_planes()
                          ? data<T>(*bars.second) + sample * o
                          : data<T>(*bars.moved) + (sample * t.count + p - 1) * o;
      std::copy_n(from, o, to);
    });
    layers[last].factor.product(t.last_planes() * r, out_bar, h_bar);
    if (layers[last].bias != nullptr)
      add_rows(sums.of(lane, 2 * last + 1), out_bar, r, net.outputs);
    for (int l = last - 1; l >= 0; --l) {
      const Layer<T>& layer = layers[l];
      const int64_t n = layer.out, plane = r * n;
      const T* z = keep + t.begin[l] * r;
      loop.slopes({net.activations[l], static_cast<T>(net.params[l]), plane, z, h, slopes,
                   slopes + plane, slopes + 2 * plane});
      RowsDerivativeTask<T> d{};
      d.task = activation_task<T>(t, l, r, z, slopes, h, data<T>(rows),
                                  close == nullptr ? nullptr : data<T>(*close));
      const bool out = t.rows_out(l);
      d.value_bar = h_bar;
      if (out) d.out_bar = rows_of<const T>(h_bar, r, n);
      if (d.task.bend) d.lap_bar = h_bar + (out ? t.count + 1 : 1) * plane;
      if (d.task.close != nullptr) {
        d.trace_bar = data<T>(*bars.second) + begin;
        d.close_bar = sums.of(lane, close_sum);
      }
      d.z_bar = z_bar;
      d.in_bar = l == 0 ? Rows<T>{sums.of(lane, rows_sum), n, 0} : rows_of(z_bar, r, n);
      d.lap_in_bar = l == 0 ? nullptr : z_bar + (t.count + 1) * plane;
      loop.rows_derivative(d);
      if (l + 1 == last)
        sums.add_product(lane, 2 * last, net.outputs, n, t.last_planes() * r, out_bar, h);
      else
        sums.add_product(lane, 2 * (l + 1), layers[l + 1].out, n, t.planes() * r, above, h);
      if (layer.bias != nullptr) add_rows(sums.of(lane, 2 * l + 1), z_bar, r, n);
      if (l > 0) layer.factor.product(t.planes() * r, z_bar, h_bar);
      std::swap(z_bar, above);
    }
    const Layer<T>& layer = layers[0];  // its cotangent is in `above`
    sums.add_product(lane, 0, layer.out, layer.in, r, above, data<T>(x) + begin * layer.in);
    layer.factor.product(r, above, data<T>(bars.x) + begin * layer.in);
  });
}

}  // namespace
}  // namespace ct::mlp
