// Derivative operators of plain MLPs for the CPU.
//
// A few samples go through all layers with all their coefficients or tangents, which stay in the
// second-level cache between a matrix product and the activation behind it. Threads share out
// blocks of samples; products run on one thread each.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "closed.h"
#include "derivative.h"
#include "direct.h"
#include "series.h"
#include "tangents.h"

namespace ct::mlp {
namespace {

using Tensors = std::vector<Tensor>;
using Kinds = std::vector<int64_t>;
using Params = std::vector<double>;

bool has_gemm() { return gemm_routine<float>() != nullptr && gemm_routine<double>() != nullptr; }

// Empty gradients for each parameter, weight and bias in turn.
Tensors new_gradients(const Tensors& weights, const Tensors& biases) {
  Tensors out;
  for (size_t l = 0; l < weights.size(); ++l) {
    out.push_back(torch::stable::empty_like(weights[l]));
    out.push_back(torch::stable::empty_like(biases[l]));
  }
  return out;
}

int read_order(const char* op, int64_t order) {
  require(order >= 0 && order <= kMaxOrder, op, ": order must be in [0, ", kMaxOrder, "], got ",
          order);
  return static_cast<int>(order);
}

std::tuple<Tensor, Tensor> mlp_derivative(const Tensor& x, const Tensor& v, Tensors weights,
                                          Tensors biases, Kinds activations, Params params,
                                          int64_t order_, bool keep) {
  const Net net("mlp_derivative", x, weights, biases, activations, params);
  const int order = read_order(net.op, order_);
  net.check("v", v, {net.batch, net.inputs});
  Tensor out = new_tensor(x, {net.batch, net.outputs});
  Tensor kept = new_tensor(x, {keep ? net.batch * KeptJets(net, order).row : 0});
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    using T = decltype(zero);
    derivative_forward<T>(net, data<T>(x), data<T>(v), order, data<T>(out),
                          keep ? data<T>(kept) : nullptr);
  });
  return {out, kept};
}

Tensors mlp_derivative_backward(const Tensor& g, const Tensor& kept, const Tensor& x,
                                const Tensor& v, Tensors weights, Tensors biases, Kinds activations,
                                Params params, int64_t order_) {
  const Net net("mlp_derivative_backward", x, weights, biases, activations, params);
  const int order = read_order(net.op, order_);
  net.check("v", v, {net.batch, net.inputs});
  net.check("g", g, {net.batch, net.outputs});
  net.check("kept", kept, {net.batch * KeptJets(net, order).row});
  Tensor x_bar = torch::stable::empty_like(x), v_bar = torch::stable::empty_like(x);
  Tensors parameters = new_gradients(weights, biases);
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    derivative_backward<decltype(zero)>(net, x, v, order, g, kept, x_bar, v_bar, parameters);
  });
  Tensors out{x_bar, v_bar};
  out.insert(out.end(), parameters.begin(), parameters.end());
  return out;
}

std::tuple<Tensor, Tensor> mlp_series(const Tensor& x, Tensors weights, Tensors biases,
                                      Kinds activations, Params params, int64_t order_, bool keep) {
  const Net net("mlp_series", x, weights, biases, activations, params);
  const int order = read_order(net.op, order_);
  require(net.inputs == net.outputs, net.op, ": the net must have as many outputs as inputs");
  Tensor out = new_tensor(x, {order + 1, net.batch, net.inputs});
  Tensor kept = new_tensor(x, {keep ? net.batch * KeptSeries(net, order).row : 0});
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    series_forward<decltype(zero)>(net, x, order, out, keep ? &kept : nullptr);
  });
  return {out, kept};
}

Tensors mlp_series_backward(const Tensor& g, const Tensor& kept, const Tensor& x, const Tensor& out,
                            Tensors weights, Tensors biases, Kinds activations, Params params,
                            int64_t order_) {
  const Net net("mlp_series_backward", x, weights, biases, activations, params);
  const int order = read_order(net.op, order_);
  require(net.inputs == net.outputs, net.op, ": the net must have as many outputs as inputs");
  net.check("out", out, {order + 1, net.batch, net.inputs});
  net.check("g", g, {order + 1, net.batch, net.inputs});
  net.check("kept", kept, {net.batch * KeptSeries(net, order).row});
  Tensor x_bar = torch::stable::empty_like(x);
  Tensors parameters = new_gradients(weights, biases);
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    series_backward<decltype(zero)>(net, out, order, g, kept, x_bar, parameters);
  });
  Tensors found{x_bar};
  found.insert(found.end(), parameters.begin(), parameters.end());
  return found;
}

// The Laplacian's or, with `close`, the trace's forward pass: value, tangents (if all), second
// derivatives or trace, and what is kept.
std::tuple<Tensor, Tensor, Tensor, Tensor> tangents(const Net& net, const Tensor& x,
                                                    const Tensor& rows, const Tensor* close,
                                                    bool all, bool keep) {
  const Tangents t(net, rows, all, close);
  Tensor value = new_tensor(x, {net.batch, net.outputs});
  Tensor moved = new_tensor(x, {all ? net.batch : 0, t.count, net.outputs});
  Tensor second = t.trace ? new_tensor(x, {net.batch}) : torch::stable::empty_like(value);
  Tensor kept = new_tensor(x, {keep ? net.batch * t.kept_row : 0});
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    tangents_forward<decltype(zero)>(t, x, rows, close, value, moved, second,
                                     keep ? &kept : nullptr);
  });
  return {value, moved, second, kept};
}

Tensors tangents_derivative(const Net& net, Tensors parameters, const Tensor& g_value,
                            const Tensor* g_moved, const Tensor& g_second, const Tensor& kept,
                            const Tensor& x, const Tensor& rows, const Tensor* close) {
  const Tangents t(net, rows, g_moved != nullptr, close);
  net.check("g_value", g_value, {net.batch, net.outputs});
  if (t.all) net.check("g_moved", *g_moved, {net.batch, t.count, net.outputs});
  if (t.trace)
    net.check("g_second", g_second, {net.batch});
  else
    net.check("g_second", g_second, {net.batch, net.outputs});
  net.check("kept", kept, {net.batch * t.kept_row});
  TangentsBars bars{&g_value,
                    g_moved,
                    &g_second,
                    torch::stable::empty_like(x),
                    torch::stable::empty_like(rows),
                    t.trace ? torch::stable::empty_like(*close) : new_tensor(x, {0}),
                    std::move(parameters)};
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    tangents_backward<decltype(zero)>(t, x, rows, close, kept, bars);
  });
  Tensors out{bars.x, bars.rows};
  if (t.trace) out.push_back(bars.close);
  out.insert(out.end(), bars.parameters.begin(), bars.parameters.end());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> mlp_laplacian(const Tensor& x, const Tensor& rows,
                                                         Tensors weights, Tensors biases,
                                                         Kinds activations, Params params,
                                                         bool gradient, bool keep) {
  const Net net("mlp_laplacian", x, weights, biases, activations, params);
  return tangents(net, x, rows, nullptr, gradient, keep);
}

Tensors mlp_laplacian_backward(const Tensor& g_value, std::optional<Tensor> g_moved,
                               const Tensor& g_lap, const Tensor& kept, const Tensor& x,
                               const Tensor& rows, Tensors weights, Tensors biases,
                               Kinds activations, Params params) {
  const Net net("mlp_laplacian_backward", x, weights, biases, activations, params);
  return tangents_derivative(net, new_gradients(weights, biases), g_value,
                             g_moved ? &*g_moved : nullptr, g_lap, kept, x, rows, nullptr);
}

std::tuple<Tensor, Tensor, Tensor> mlp_divergence(const Tensor& x, const Tensor& rows,
                                                  const Tensor& close, Tensors weights,
                                                  Tensors biases, Kinds activations, Params params,
                                                  bool keep) {
  const Net net("mlp_divergence", x, weights, biases, activations, params);
  auto [value, moved, trace, kept] = tangents(net, x, rows, &close, false, keep);
  return {value, trace, kept};
}

Tensors mlp_divergence_backward(const Tensor& g_value, const Tensor& g_trace, const Tensor& kept,
                                const Tensor& x, const Tensor& rows, const Tensor& close,
                                Tensors weights, Tensors biases, Kinds activations, Params params) {
  const Net net("mlp_divergence_backward", x, weights, biases, activations, params);
  return tangents_derivative(net, new_gradients(weights, biases), g_value, nullptr, g_trace, kept,
                             x, rows, &close);
}

std::tuple<Tensor, Tensor, Tensor> mlp_closed_divergence(const Tensor& x, Tensors weights,
                                                         Tensors biases, Kinds activations,
                                                         Params params, bool keep) {
  const Net net("mlp_closed_divergence", x, weights, biases, activations, params);
  require(net.depth == 3, net.op, ": the net must have two hidden layers");
  Tensor value = new_tensor(x, {net.batch, net.outputs}), trace = new_tensor(x, {net.batch});
  const ClosedPlaces places(net);
  Tensor kept = new_tensor(x, {keep ? places.size() : 0});
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    using T = decltype(zero);
    Scratch<T> mix(places.one * places.two);
    if (keep) {
      T* all = data<T>(kept);
      closed_forward<T>(net, x, value, trace, all, all + places.ends(), mix.get());
    } else {
      closed_forward<T>(net, x, value, trace, nullptr, mix.get(), mix.get());
    }
  });
  return {value, trace, kept};
}

Tensors mlp_closed_divergence_backward(std::optional<Tensor> g_value, const Tensor& g_trace,
                                       const Tensor& kept, const Tensor& x, Tensors weights,
                                       Tensors biases, Kinds activations, Params params,
                                       bool of_x) {
  const Net net("mlp_closed_divergence_backward", x, weights, biases, activations, params);
  require(net.depth == 3, net.op, ": the net must have two hidden layers");
  if (g_value) net.check("g_value", *g_value, {net.batch, net.outputs});
  net.check("g_trace", g_trace, {net.batch});
  net.check("kept", kept, {ClosedPlaces(net).size()});
  Tensor x_bar = new_tensor(x, {of_x ? net.batch : 0, net.inputs});
  Tensor mix_bar = torch::stable::empty_like(weights[1]);
  Tensors parameters = new_gradients(weights, biases);
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    using T = decltype(zero);
    closed_backward<T>(net, x, data<T>(kept), g_value ? &*g_value : nullptr, g_trace,
                       of_x ? &x_bar : nullptr, mix_bar, parameters);
  });
  Tensors out{x_bar};
  out.insert(out.end(), parameters.begin(), parameters.end());
  return out;
}

}  // namespace

namespace direct {

void derivative(void* out, const void* x, const void* v, int64_t batch, int64_t order, bool wide,
                const int64_t* form, const double* params, const std::vector<void*>& parameters) {
  const auto dtype = wide ? ScalarType::Double : ScalarType::Float;
  const Net net("mlp_derivative", dtype, batch, form, params, parameters);
  const int checked = read_order(net.op, order);
  dispatch_floating(dtype, net.op, [&](auto zero) {
    using T = decltype(zero);
    derivative_forward<T>(net, static_cast<const T*>(x), static_cast<const T*>(v), checked,
                          static_cast<T*>(out), nullptr);
  });
}

}  // namespace direct
}  // namespace ct::mlp

STABLE_TORCH_LIBRARY_IMPL(ctorch, CPU, m) {
  if (!ct::mlp::has_gemm() || !ct::mlp::has_loops())
    return;  // then the operators have their references alone
  m.impl("mlp_derivative", TORCH_BOX(&ct::mlp::mlp_derivative));
  m.impl("mlp_derivative_backward", TORCH_BOX(&ct::mlp::mlp_derivative_backward));
  m.impl("mlp_series", TORCH_BOX(&ct::mlp::mlp_series));
  m.impl("mlp_series_backward", TORCH_BOX(&ct::mlp::mlp_series_backward));
  m.impl("mlp_closed_divergence", TORCH_BOX(&ct::mlp::mlp_closed_divergence));
  m.impl("mlp_closed_divergence_backward", TORCH_BOX(&ct::mlp::mlp_closed_divergence_backward));
  m.impl("mlp_laplacian", TORCH_BOX(&ct::mlp::mlp_laplacian));
  m.impl("mlp_laplacian_backward", TORCH_BOX(&ct::mlp::mlp_laplacian_backward));
  m.impl("mlp_divergence", TORCH_BOX(&ct::mlp::mlp_divergence));
  m.impl("mlp_divergence_backward", TORCH_BOX(&ct::mlp::mlp_divergence_backward));
}
