// The net of an operator, checked; how a batch is cut into blocks; gradients of parameters.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "../core/dispatch.h"
#include "gemm.h"
#include "levels.h"

namespace ct::mlp {
namespace {

using torch::stable::Tensor;

// Raises RuntimeError with the parts of the message put together.
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (condition) [[likely]]
    return;
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
}

inline Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
}

template <typename T>
const T* data(const Tensor& x) {
  return x.const_data_ptr<T>();
}
template <typename T>
T* data(Tensor& x) {
  return x.mutable_data_ptr<T>();
}

template <typename T>
struct Layer {
  const T *weight, *bias;  // [out, in], [out] or null
  int64_t in, out;
};

// The arguments that all operators share, checked: they are called with contiguous tensors of one
// dtype on the CPU, with no size zero and at least one hidden layer.
struct Net {
  Net(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
      const std::vector<Tensor>& biases, int64_t activation, double param)
      : op(op), weights(weights), biases(biases), param(param), dtype(x.scalar_type()) {
    require(weights.size() >= 2 && biases.size() == weights.size(), op,
            ": weights and biases must be one each for two layers or more");
    require(activation >= 0 && activation < static_cast<int64_t>(Activation::kCount), op,
            ": activation must be in [0, ", static_cast<int64_t>(Activation::kCount), "), got ",
            activation);
    this->activation = static_cast<Activation>(activation);
    check("x", x, 2);
    batch = x.size(0), inputs = x.size(1);
    require(batch > 0 && inputs > 0, op, ": x must not be empty");
    int64_t in = inputs;
    for (size_t l = 0; l < weights.size(); ++l) {
      check("weights", weights[l], 2);
      check("biases", biases[l], 1);
      const int64_t out = weights[l].size(0), given = biases[l].size(0);
      require(weights[l].size(1) == in && out > 0 && (given == 0 || given == out), op,
              ": weights and biases do not fit at layer ", l + 1);
      in = out;
      if (l + 1 < weights.size()) widest = std::max(widest, out);
    }
    outputs = in;
    depth = static_cast<int>(weights.size());
  }

  void check(const char* name, const Tensor& x, int64_t dim) const {
    require(x.is_cpu() && x.scalar_type() == dtype && x.dim() == dim && x.is_contiguous(), op, ": ",
            name, " must be contiguous, [", dim, "-dimensional], on the CPU, of the dtype of x");
  }

  void check(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) const {
    check(name, x, static_cast<int64_t>(sizes.size()));
    int64_t d = 0;
    for (int64_t size : sizes)
      require(x.size(d++) == size, op, ": ", name, " has the wrong shape");
  }

  template <typename T>
  std::vector<Layer<T>> layers() const {
    require(gemm_routine<T>() != nullptr, op, ": this torch exports no BLAS");
    std::vector<Layer<T>> out;
    for (size_t l = 0; l < weights.size(); ++l)
      out.push_back({data<T>(weights[l]), biases[l].size(0) ? data<T>(biases[l]) : nullptr,
                     weights[l].size(1), weights[l].size(0)});
    return out;
  }

  const char* op;
  const std::vector<Tensor>&weights, &biases;
  Activation activation;
  double param;
  ScalarType dtype;
  int64_t batch, inputs, outputs, widest = 1;
  int depth;
};

// A batch in blocks whose rows of numbers, `numbers` a sample, fit the second-level cache. The cut
// depends on sizes alone: results are the same for any number of threads.
struct Blocks {
  Blocks(int64_t batch, int64_t bytes_a_sample, int64_t least) : batch(batch) {
    constexpr int64_t kCache = 768 << 10;
    const int64_t fitting = std::max(least, kCache / std::max<int64_t>(1, bytes_a_sample));
    count = (batch + fitting - 1) / fitting;
    size = (batch + count - 1) / count;
    count = (batch + size - 1) / size;
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t samples(int64_t block) const { return std::min(size, batch - block * size); }

  int64_t batch, size, count;
};

// Aligned scratch memory.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64))) {
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  T* get() { return data_; }

 private:
  T* data_;
};

// body(block, scratch) for all blocks, each thread with scratch memory of its own.
template <typename T, typename Body>
void for_blocks(const Blocks& blocks, int64_t scratch, const Body& body) {
  const auto range = [&](int64_t begin, int64_t end) {
    const OneBlasThread guard;
    Scratch<T> memory(scratch);
    for (int64_t block = begin; block < end; ++block) body(block, memory.get());
  };
  if (blocks.count == 1) return range(0, 1);
  torch::stable::parallel_for(0, blocks.count, 1, range);
}

template <typename T>
void add_bias(T* rows, const T* bias, int64_t count, int64_t n) {
  if (bias == nullptr) return;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < n; ++c) rows[r * n + c] += bias[c];
}

// Sums over a batch, such as gradients of parameters: several partial sums, each over a fixed
// choice of blocks, added up in order at the end.
template <typename T>
class Sums {
 public:
  Sums(const Blocks& blocks, std::vector<Tensor*> into) : into_(std::move(into)) {
    lanes_ = std::clamp<int64_t>(blocks.count / 4, 1, 8);
    for (Tensor* x : into_) begin_.push_back(size_), size_ += x->numel();
    memory_ = std::make_unique<Scratch<T>>(std::max<int64_t>(1, lanes_ * size_));
  }

  // body(block, scratch, lane): blocks of a lane come one after the other, fresh at its first
  template <typename Body>
  void run(const Blocks& blocks, int64_t scratch, const Body& body) {
    const auto range = [&](int64_t begin, int64_t end) {
      const OneBlasThread guard;
      Scratch<T> memory(scratch);
      for (int64_t lane = begin; lane < end; ++lane) {
        std::fill_n(memory_->get() + lane * size_, size_, T(0));
        for (int64_t block = lane; block < blocks.count; block += lanes_)
          body(block, memory.get(), lane);
      }
    };
    if (lanes_ == 1)
      range(0, 1);
    else
      torch::stable::parallel_for(0, lanes_, 1, range);
    finish();
  }

  T* of(int64_t lane, int number) { return memory_->get() + lane * size_ + begin_[number]; }

 private:
  void finish() {
    for (size_t i = 0; i < into_.size(); ++i) {
      T* to = data<T>(*into_[i]);
      const int64_t n = into_[i]->numel();
      std::copy_n(memory_->get() + begin_[i], n, to);
      for (int64_t lane = 1; lane < lanes_; ++lane) {
        const T* from = memory_->get() + lane * size_ + begin_[i];
        for (int64_t j = 0; j < n; ++j) to[j] += from[j];
      }
    }
  }

  std::vector<Tensor*> into_;
  std::vector<int64_t> begin_;
  std::unique_ptr<Scratch<T>> memory_;
  int64_t lanes_, size_ = 0;
};

template <typename T>
void add_rows(T* sum, const T* rows, int64_t count, int64_t n) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < n; ++c) sum[c] += rows[r * n + c];
}

}  // namespace
}  // namespace ct::mlp
