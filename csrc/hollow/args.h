// Reads and checks the arguments of the operators; the same for CPU and CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <sstream>
#include <stdexcept>
#include <vector>

#include "../core/dispatch.h"
#include "task.h"

namespace ct::hollow {

using torch::stable::Tensor;

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// A new contiguous tensor with the dtype and device of `like`. Through the C function, since the
// dispatcher looks an operator up by its name at every call.
inline Tensor new_tensor(const Tensor& like, const std::vector<int64_t>& sizes) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t d = sizes.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device_type, dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(),
                                                  strides.data(), dtype, device_type,
                                                  like.get_device_index(), &made));
  return Tensor(made);
}

inline Tensor new_like(const Tensor& x) {
  const auto sizes = x.sizes();
  return new_tensor(x, std::vector<int64_t>(sizes.begin(), sizes.end()));
}

inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// x [N, M], h [N, M, H], theta [G, P] with G = 1 or M, contiguous.
class Arguments {
 public:
  Arguments(const char* op_, const Tensor& x_, const Tensor& h_, const Tensor& theta_,
            const std::vector<int64_t>& widths, int64_t activation_, int64_t order_)
      : op(op_),
        x(as_contiguous(x_)),
        h(as_contiguous(h_)),
        theta(as_contiguous(theta_)),
        dtype(x_.scalar_type()) {
    require(x.dim() == 2 && h.dim() == 3 && theta.dim() == 2, op,
            ": x must be [N, M], h [N, M, H], theta [G, P]");
    require(h.size(0) == x.size(0) && h.size(1) == x.size(1), op,
            ": h must have the shape of x, and one more dim");
    like("h", h), like("theta", theta);
    require(theta.size(0) == 1 || theta.size(0) == x.size(1), op,
            ": theta must have one group, or one for each column of x, got ", theta.size(0));
    require(order_ >= 0 && order_ <= mlp::kMaxOrder, op, ": order must be in [0, ", mlp::kMaxOrder,
            "], got ", order_);
    require(activation_ >= 0 && activation_ < static_cast<int64_t>(Activation::kCount), op,
            ": there is no activation number ", activation_);
    order = static_cast<int>(order_), activation = static_cast<Activation>(activation_);
    read_net(widths);
  }

  void like(const char* name, const Tensor& other) const {
    require(other.scalar_type() == dtype, op, ": ", name, " must have the dtype of x");
    require(other.is_cpu() == x.is_cpu() && other.get_device_index() == x.get_device_index(), op,
            ": ", name, " must be on the device of x");
  }

  // A stack [order + 1, N, M], contiguous.
  Tensor stack(const char* name, const Tensor& given) const {
    like(name, given);
    require(given.dim() == 3 && given.size(0) == order + 1 && given.size(1) == x.size(0) &&
                given.size(2) == x.size(1),
            op, ": ", name, " must be [order + 1, N, M]");
    return as_contiguous(given);
  }

  Tensor new_stack() const { return new_tensor(x, {order + 1, x.size(0), x.size(1)}); }

  // Whether there is a row; without one a gradient in theta is zero.
  bool any() const { return x.size(0) > 0 && x.size(1) > 0; }

  template <typename T>
  Task<T> task(double param) const {
    Task<T> task;
    task.net = net, task.activation = activation, task.param = static_cast<T>(param);
    task.order = order, task.groups = theta.size(0);
    task.rows = any() ? x.size(0) * x.size(1) / task.groups : 0;
    task.x = x.const_data_ptr<T>(), task.h = h.const_data_ptr<T>();
    task.theta = theta.const_data_ptr<T>();
    return task;
  }

  const char* op;
  Tensor x, h, theta;
  ScalarType dtype;
  Net net;
  int order = 0;
  Activation activation = Activation::kIdentity;

 private:
  void read_net(const std::vector<int64_t>& widths) {
    const int64_t count = static_cast<int64_t>(widths.size());
    require(count >= 1 && count <= kMaxHidden, op, ": there must be 1 to ", kMaxHidden,
            " hidden layers, got ", count);
    net.hidden = static_cast<int>(count), net.context = h.size(2);
    for (int l = 0; l < net.hidden; ++l) {
      require(widths[l] >= 0, op, ": widths must be >= 0, got ", widths[l]);
      net.width[l] = widths[l];
    }
    for (int l = 0; l <= net.hidden; ++l) {
      net.weight[l] = net.parameters;
      net.bias[l] = net.weight[l] + net.outputs(l) * net.inputs(l);
      net.parameters = net.bias[l] + net.outputs(l);
    }
    require(theta.size(1) == net.parameters, op, ": theta must be [G, ", net.parameters,
            "] for these widths, got [G, ", theta.size(1), "]");
  }
};

}  // namespace ct::hollow
