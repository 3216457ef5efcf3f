// Reads and checks the arguments of the operators; the same for CPU and CUDA. Messages name the
// argument: the operators are called directly by the solver's inner loop, without the checks of the
// public functions.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../core/dispatch.h"
#include "arith.h"

namespace ct::rk {

using torch::stable::Tensor;

// Raises RuntimeError with the parts of the message put together, without the C++ file and line
// that torch's own check would put in front of it.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

// What torch's own accessors give, without their cost: scalar_type() asks the shim for one dtype
// code after the other, and a typed data pointer calls it again.
inline ScalarType dtype_of(const Tensor& x) {
  static const int32_t kFloat = aoti_torch_dtype_float32(), kDouble = aoti_torch_dtype_float64(),
                       kLong = aoti_torch_dtype_int64(), kBool = aoti_torch_dtype_bool();
  int32_t code;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  if (code == kFloat) return ScalarType::Float;
  if (code == kDouble) return ScalarType::Double;
  if (code == kLong) return ScalarType::Long;
  if (code == kBool) return ScalarType::Bool;
  return x.scalar_type();
}

// Data of a tensor whose dtype has been checked.
template <typename T>
const T* data_of(const Tensor& x) {
  return static_cast<const T*>(x.const_data_ptr());
}
template <typename T>
T* mutable_data_of(const Tensor& x) {
  return static_cast<T*>(x.mutable_data_ptr());
}

// The tensor itself where it is contiguous: the dispatcher is not asked in vain.
inline Tensor as_contiguous(const Tensor& x) {
  return x.is_contiguous() ? x : torch::stable::contiguous(x);
}

// The slopes k [S, *shape] with shape = [B, ...]; a 0-dim state counts as one sample.
struct Slopes {
  Slopes(const char* op_, const Tensor& k)
      : op(op_),
        tensor(k),
        dtype(dtype_of(k)),
        sizes(k.sizes()),
        on_cpu(k.is_cpu()),
        device(k.get_device_index()) {
    require(sizes.size() >= 1, op, ": k must be [S, *shape], got a 0-dim tensor");
    require(k.is_contiguous(), op, ": k must be contiguous");
    stages = sizes[0];
    numel = 1;
    for (size_t d = 1; d < sizes.size(); ++d) numel *= sizes[d];
    batch = sizes.size() > 1 ? sizes[1] : 1;
    row = batch > 0 ? numel / batch : 0;
  }

  // A tensor that has the state's shape, dtype and device.
  void check_like_state(const char* name, const Tensor& x, bool contiguous = true) const {
    const auto given = x.sizes();
    bool same = given.size() + 1 == sizes.size();
    for (size_t d = 0; same && d < given.size(); ++d) same = given[d] == sizes[d + 1];
    require(same, op, ": ", name, " must have the shape of a row of k");
    const ScalarType of_x = dtype_of(x);
    require(of_x == dtype, op, ": ", name, " must have the dtype of k (",
            torch::headeronly::toString(dtype), "), got ", torch::headeronly::toString(of_x));
    check_device(name, x);
    require(!contiguous || x.is_contiguous(), op, ": ", name, " must be contiguous");
  }

  void check_device(const char* name, const Tensor& x) const {
    require(x.is_cpu() == on_cpu && x.get_device_index() == device, op, ": ", name,
            " must be on the device of k");
  }

  void check_slot(int64_t slot) const {
    require(slot >= 0 && slot < stages, op, ": slot must be in [0, ", stages, "), got ", slot);
  }

  const char* op;
  const Tensor& tensor;
  ScalarType dtype;
  torch::headeronly::IntHeaderOnlyArrayRef sizes;
  bool on_cpu;
  int32_t device;
  int64_t stages, batch, row, numel;
};

// A small float64 tensor on the CPU, which is read here and now.
inline const double* host_numbers(const char* op, const char* name, const Tensor& x, int64_t dim) {
  require(x.is_cpu() && dtype_of(x) == ScalarType::Double && x.dim() == dim && x.is_contiguous(),
          op, ": ", name, " must be a contiguous float64 tensor on the CPU with ", dim,
          " dimension(s)");
  return data_of<double>(x);
}

inline Step read_step(const Slopes& k, const Tensor& h) {
  const ScalarType dtype = dtype_of(h);
  require(dtype == ScalarType::Double, k.op, ": h must be float64, got ",
          torch::headeronly::toString(dtype));
  Step step;
  if (h.dim() == 0 && h.is_cpu()) {
    step.value = *data_of<double>(h);
    return step;
  }
  k.check_device("h", h);
  step.data = data_of<double>(h);
  if (h.dim() == 0) return step;
  require(h.dim() == 1 && h.size(0) == k.batch && k.sizes.size() > 1, k.op,
          ": h must be 0-dim or [B] with B = ", k.batch, ", the first size of the state");
  step.stride = h.stride(0);
  return step;
}

// The active terms of a combination over rows [.., numel]. The row `fresh_slot` is read from
// `fresh`, where its slope has not reached its row yet.
template <typename T, typename A>
Terms<T, A> active_terms(const char* op, const char* name, const double* a, int64_t count,
                         const T* rows, int64_t numel, const T* fresh, int64_t fresh_slot) {
  Terms<T, A> terms;
  for (int64_t j = 0; j < count; ++j) {
    if (a[j] == 0) continue;
    require(terms.count < kMaxTerms, op, ": ", name, " has more than ", kMaxTerms,
            " nonzero entries");
    terms.row[terms.count] = fresh != nullptr && j == fresh_slot ? fresh : rows + j * numel;
    terms.coefficient[terms.count++] = static_cast<A>(a[j]);
  }
  return terms;
}

template <typename T, typename A>
Terms<T, A> read_terms(const Slopes& k, const char* name, const Tensor& coefficients,
                       const T* fresh = nullptr, int64_t fresh_slot = -1) {
  const double* a = host_numbers(k.op, name, coefficients, 1);
  const int64_t count = coefficients.numel();
  require(count <= k.stages, k.op, ": ", name, " has ", count, " entries, but k has ", k.stages,
          " rows");
  return active_terms<T, A>(k.op, name, a, count, data_of<T>(k.tensor), k.numel, fresh, fresh_slot);
}

template <typename T>
Tolerance<T> read_tolerance(const Slopes& k, const char* name, const Tensor& x) {
  Tolerance<T> tolerance;
  if (x.dim() == 0 && x.is_cpu() && dtype_of(x) == ScalarType::Double) {
    tolerance.value = static_cast<T>(*host_numbers(k.op, name, x, 0));
    return tolerance;
  }
  k.check_like_state(name, x);
  tolerance.data = data_of<T>(x);
  return tolerance;
}

// What a norm is taken over: `units` times (the whole state, or each sample) a run of `length`
// elements, which the segments partition.
struct Norm {
  int64_t units, length;
  std::vector<int64_t> segments;
  bool maximum;
};

inline Norm read_norm(const Slopes& k, std::vector<int64_t> segments, bool maximum,
                      bool per_sample) {
  require(!per_sample || k.sizes.size() > 1, k.op,
          ": per_sample needs a state with a batch dimension");
  Norm norm{per_sample ? k.batch : 1, per_sample ? k.row : k.numel, std::move(segments), maximum};
  int64_t total = 0;
  for (int64_t length : norm.segments) {
    require(length >= 0, k.op, ": segments must not be negative");
    total += length;
  }
  if (norm.segments.empty()) norm.segments.push_back(total = norm.length);
  require(total == norm.length || norm.units == 0, k.op, ": segments add up to ", total,
          ", but must partition the ", norm.length, " elements of ",
          per_sample ? "a sample" : "the state");
  return norm;
}

// A new contiguous tensor on the device of `like`. Through the C function, since the dispatcher
// looks an operator up by its name at every call.
inline Tensor new_tensor(const Tensor& like, int32_t dtype, const int64_t* sizes, int64_t dim) {
  constexpr int64_t kUsual = 8;  // dimensions that need no memory of their own
  int64_t usual[kUsual];
  std::vector<int64_t> many(dim > kUsual ? dim : 0);
  int64_t* strides = dim > kUsual ? many.data() : usual;
  int64_t stride = 1;
  for (int64_t d = dim - 1; d >= 0; --d) {
    strides[d] = stride;
    stride *= sizes[d] > 1 ? sizes[d] : 1;
  }
  int32_t device_type;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(dim, sizes, strides, dtype, device_type,
                                                  like.get_device_index(), &made));
  return Tensor(made);
}

// With the dtype of `like` as well.
inline Tensor new_tensor(const Tensor& like, const int64_t* sizes, int64_t dim) {
  int32_t dtype;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  return new_tensor(like, dtype, sizes, dim);
}

inline Tensor new_state(const Slopes& k) {
  return new_tensor(k.tensor, k.sizes.data() + 1, static_cast<int64_t>(k.sizes.size()) - 1);
}

// The queries of a dense output: theta [M], and, for a batched one, the sample [M] that each
// belongs to.
struct Queries {
  Queries(const Slopes& k, const Tensor& p, const Tensor& theta,
          const std::optional<Tensor>& sample)
      : weights(host_numbers(k.op, "p", p, 2)), degree(p.size(1)), count(theta.numel()) {
    require(p.size(0) <= k.stages, k.op, ": p has ", p.size(0), " rows, but k has ", k.stages);
    require(theta.dim() == 1 && dtype_of(theta) == ScalarType::Double && theta.is_contiguous(),
            k.op, ": theta must be a contiguous float64 tensor [M]");
    rows = p.size(0);
    if (!sample) return;
    require(sample->dim() == 1 && dtype_of(*sample) == ScalarType::Long &&
                sample->is_contiguous() && sample->numel() == count,
            k.op, ": sample must be a contiguous int64 tensor [M] with M = ", count,
            ", the length of theta");
    require(k.sizes.size() > 1, k.op, ": sample needs a state with a batch dimension");
    k.check_device("sample", *sample);
    of_samples = true;
    samples = data_of<int64_t>(*sample);  // null where there are no queries
  }

  Tensor new_output(const Slopes& k) const {
    std::vector<int64_t> sizes{count};
    sizes.insert(sizes.end(), k.sizes.begin() + (of_samples ? 2 : 1), k.sizes.end());
    return new_tensor(k.tensor, sizes.data(), static_cast<int64_t>(sizes.size()));
  }

  bool active(int64_t stage) const {
    for (int64_t m = 0; m < degree; ++m)
      if (weights[stage * degree + m] != 0) return true;
    return false;
  }

  const double* weights;
  int64_t rows, degree, count;
  bool of_samples = false;
  const int64_t* samples = nullptr;
};

}  // namespace ct::rk
