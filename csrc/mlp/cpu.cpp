// Derivative operators of plain MLPs for the CPU.
//
// A few samples go through all layers with all their coefficients or tangents, which stay in the
// second-level cache between a matrix product and the activation behind it. Threads share out
// blocks of samples; products run on one thread each.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "derivative.h"

namespace ct::mlp {
namespace {

using Tensors = std::vector<Tensor>;

bool has_gemm() { return gemm_routine<float>() != nullptr && gemm_routine<double>() != nullptr; }

// Empty gradients for each parameter, weight and bias in turn.
Tensors new_gradients(const Net& net) {
  Tensors out;
  for (int l = 0; l < net.depth; ++l) {
    out.push_back(torch::stable::empty_like(net.weights[l]));
    out.push_back(torch::stable::empty_like(net.biases[l]));
  }
  return out;
}

int read_order(const char* op, int64_t order) {
  require(order >= 0 && order <= kMaxOrder, op, ": order must be in [0, ", kMaxOrder, "], got ",
          order);
  return static_cast<int>(order);
}

std::tuple<Tensor, Tensor> mlp_derivative(const Tensor& x, const Tensor& v, Tensors weights,
                                          Tensors biases, int64_t activation, double param,
                                          int64_t order_, bool keep) {
  const Net net("mlp_derivative", x, weights, biases, activation, param);
  const int order = read_order(net.op, order_);
  net.check("v", v, {net.batch, net.inputs});
  Tensor out = new_tensor(x, {net.batch, net.outputs});
  Tensor kept = new_tensor(x, {keep ? net.batch * KeptJets(net, order).row : 0});
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    derivative_forward<decltype(zero)>(net, x, v, order, out, keep ? &kept : nullptr);
  });
  return {out, kept};
}

Tensors mlp_derivative_backward(const Tensor& g, const Tensor& kept, const Tensor& x,
                                const Tensor& v, Tensors weights, Tensors biases,
                                int64_t activation, double param, int64_t order_) {
  const Net net("mlp_derivative_backward", x, weights, biases, activation, param);
  const int order = read_order(net.op, order_);
  net.check("v", v, {net.batch, net.inputs});
  net.check("g", g, {net.batch, net.outputs});
  net.check("kept", kept, {net.batch * KeptJets(net, order).row});
  Tensor x_bar = torch::stable::empty_like(x), v_bar = torch::stable::empty_like(x);
  Tensors parameters = new_gradients(net);
  dispatch_floating(net.dtype, net.op, [&](auto zero) {
    derivative_backward<decltype(zero)>(net, x, v, order, g, kept, x_bar, v_bar, parameters);
  });
  Tensors out{x_bar, v_bar};
  out.insert(out.end(), parameters.begin(), parameters.end());
  return out;
}

}  // namespace
}  // namespace ct::mlp

STABLE_TORCH_LIBRARY_IMPL(ctorch, CPU, m) {
  if (!ct::mlp::has_gemm()) return;  // then the operators have their references alone
  m.impl("mlp_derivative", TORCH_BOX(&ct::mlp::mlp_derivative));
  m.impl("mlp_derivative_backward", TORCH_BOX(&ct::mlp::mlp_derivative_backward));
}
