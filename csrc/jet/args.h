// Reads and checks the arguments of the operators; the same for CPU and CUDA.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../core/dispatch.h"
#include "functions.h"

namespace ct::jet {

using torch::stable::Tensor;
using Sizes = std::vector<int64_t>;

// Raises RuntimeError with the parts of the message put together.
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
inline Tensor new_tensor(const Tensor& like, const Sizes& sizes) {
  Sizes strides(sizes.size());
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

inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

inline Sizes sizes_of(const Tensor& x, size_t from = 0) {
  const auto sizes = x.sizes();
  return Sizes(sizes.begin() + static_cast<int64_t>(from), sizes.end());
}

inline int64_t numel_of(const Sizes& sizes) {
  int64_t numel = 1;
  for (int64_t size : sizes) numel *= size;
  return numel;
}

inline Sizes with_front(int64_t first, const Sizes& rest) {
  Sizes sizes{first};
  sizes.insert(sizes.end(), rest.begin(), rest.end());
  return sizes;
}

inline void require_like(const char* op, const char* name, const Tensor& x, const Tensor& first) {
  require(x.scalar_type() == first.scalar_type(), op, ": ", name, " must have dtype ",
          torch::headeronly::toString(first.scalar_type()), " as the first argument has, got ",
          torch::headeronly::toString(x.scalar_type()));
  require(x.is_cpu() == first.is_cpu() && x.get_device_index() == first.get_device_index(), op,
          ": ", name, " must be on the device of the first argument");
}

inline void require_sizes(const char* op, const char* name, const Tensor& x, const Sizes& sizes) {
  require(sizes_of(x) == sizes, op, ": ", name, " does not have the shape that the others ask for");
}

inline Op read_op(const char* op, int64_t number) {
  require(number >= 0 && number < kOps, op, ": there is no function number ", number);
  return static_cast<Op>(number);
}

// A series [terms, *shape], contiguous.
struct Stack {
  Stack(const char* op, const char* name, const Tensor& x) : tensor(as_contiguous(x)) {
    require(x.dim() >= 1 && x.size(0) >= 1, op, ": ", name,
            " must be a stack [D+1, *shape], with at least one coefficient");
    terms = static_cast<int>(x.size(0));
    shape = sizes_of(tensor, 1);
    numel = numel_of(shape);
  }

  Tensor tensor;
  int terms;
  Sizes shape;
  int64_t numel;  // of one coefficient
};

// How the elements of a result find those of an operand that broadcasts: (i / repeat) % count.
struct Index {
  int64_t count = 1, repeat = 1;
  bool linear = true;
};

inline Sizes broadcast(const char* op, const Sizes& a, const Sizes& b) {
  const Sizes &longer = a.size() >= b.size() ? a : b, &shorter = a.size() >= b.size() ? b : a;
  Sizes out = longer;
  for (size_t d = 0; d < shorter.size(); ++d) {
    int64_t& size = out[longer.size() - shorter.size() + d];
    require(size == shorter[d] || size == 1 || shorter[d] == 1, op,
            ": the shapes of the stacks do not broadcast");
    size = size == 1 ? shorter[d] : size;
  }
  return out;
}

// A copy of x [terms, *shape] as [terms, *out], for the broadcasts that an Index does not describe.
inline Tensor expanded(const Stack& x, const Sizes& out) {
  Sizes padded = x.shape;
  padded.insert(padded.begin(), out.size() - padded.size(), 1);
  const std::vector<int64_t> view = with_front(x.terms, padded);
  Tensor big = new_tensor(x.tensor, with_front(x.terms, out));
  torch::stable::copy_(big, torch::stable::reshape(x.tensor, view));
  return big;
}

// The index into an operand; an operand with ones in the middle of its shape is copied first.
inline Index read_index(Stack& x, const Sizes& out) {
  const size_t missing = out.size() - x.shape.size();
  const int64_t numel = numel_of(out);
  if (x.numel == numel) return {numel, 1, true};
  size_t begin = out.size(), end = 0;  // the dimensions in which x is not 1
  for (size_t d = missing; d < out.size(); ++d)
    if (x.shape[d - missing] != 1) begin = begin < d ? begin : d, end = d + 1;
  Index index{x.numel, 1, false};
  for (size_t d = end; d < out.size(); ++d) index.repeat *= out[d];
  for (size_t d = begin; d < end; ++d) {
    if (x.shape[d - missing] == out[d]) continue;
    x.tensor = expanded(x, out);
    x.shape = out, x.numel = numel;
    return {numel, 1, true};
  }
  return index;
}

}  // namespace ct::jet
