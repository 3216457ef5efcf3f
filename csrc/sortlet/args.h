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

namespace ct::sortlet {

using torch::stable::Tensor;

template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// The lists of an operator: scores [..., N], contiguous.
class Lists {
 public:
  Lists(const char* op, const Tensor& scores, int64_t kind)
      : op_(op), scores_(torch::stable::contiguous(scores)), dtype_(scores.scalar_type()) {
    const auto sizes = scores_.sizes();
    require(sizes.size() >= 1, op, ": scores must be [..., N], got a 0-dim tensor");
    require(kind >= 0 && kind < kKinds, op, ": gap must be 0 or 1, got ", kind);
    lead.assign(sizes.begin(), sizes.end() - 1);
    n = sizes[sizes.size() - 1];
    require(n < (int64_t{1} << 31), op, ": scores has lists of ", n, "; 2^31 - 1 are allowed");
    lists = 1;
    for (const int64_t size : lead) lists *= size;
  }

  ScalarType dtype() const { return dtype_; }
  const Tensor& scores() const { return scores_; }
  const char* op() const { return op_; }

  // The argument, contiguous: `rows` more dims in front, and N behind if `wide`.
  Tensor read(const char* name, const Tensor& x, bool wide, bool rows = false) const {
    const auto given = x.sizes();
    const size_t first = rows ? 1 : 0;
    bool same = given.size() == first + lead.size() + (wide ? 1 : 0);
    for (size_t d = 0; same && d < lead.size(); ++d) same = given[first + d] == lead[d];
    require(same && (!wide || given[given.size() - 1] == n), op_, ": ", name,
            " must have the shape of the scores", wide ? "" : " without the last dim",
            rows ? ", and rows in front" : "");
    require(x.scalar_type() == dtype_, op_, ": ", name, " must have the dtype of the scores");
    require(x.is_cpu() == scores_.is_cpu() && x.get_device_index() == scores_.get_device_index(),
            op_, ": ", name, " must be on the device of the scores");
    return torch::stable::contiguous(x);
  }

  // A new tensor [R, ..., N]; without rows, `count` is negative.
  Tensor make(bool wide, int64_t count = -1) const {
    std::vector<int64_t> sizes;
    if (count >= 0) sizes.push_back(count);
    sizes.insert(sizes.end(), lead.begin(), lead.end());
    if (wide) sizes.push_back(n);
    return make_of(sizes, dtype_code());
  }

  Tensor make_of(const std::vector<int64_t>& sizes, int32_t dtype) const {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t d = sizes.size(); d-- > 0;) {
      strides[d] = stride;
      stride *= sizes[d] > 1 ? sizes[d] : 1;
    }
    int32_t device_type;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(scores_.get(), &device_type));
    AtenTensorHandle made = nullptr;
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                 dtype, device_type, scores_.get_device_index(), &made));
    return Tensor(made);
  }

  std::vector<int64_t> lead;
  int64_t n = 0, lists = 0;

 private:
  int32_t dtype_code() const {
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(scores_.get(), &dtype));
    return dtype;
  }

  const char* op_;
  Tensor scores_;
  ScalarType dtype_;
};

template <typename T>
const T* in(const Tensor& x) {
  return x.const_data_ptr<T>();
}

template <typename T>
T* out(const Tensor& x) {
  return x.mutable_data_ptr<T>();
}

}  // namespace ct::sortlet
