// The net of an operator, checked; how a batch is cut into blocks; gradients of parameters.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#include "../core/dispatch.h"
#include "factor.h"

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
  Factor<T> factor;  // the weight's transpose on the way forward, the weight on the way back
};

// The arguments that all operators share, checked: they are called with contiguous tensors of one
// dtype on the CPU, with no size zero and at least one hidden layer.
struct Net {
  struct Linear {
    const void *weight, *bias;  // [out, in], [out] or null
    int64_t in, out;
  };

  Net(const char* op, const Tensor& x, const std::vector<Tensor>& weights,
      const std::vector<Tensor>& biases, const std::vector<int64_t>& activations,
      const std::vector<double>& params)
      : op(op), params(params), dtype(x.scalar_type()) {
    require(weights.size() >= 2 && biases.size() == weights.size(), op,
            ": weights and biases must be one each for two layers or more");
    require(activations.size() + 1 == weights.size() && params.size() == activations.size(), op,
            ": activations and params must be one each for a hidden layer");
    for (const int64_t kind : activations) {
      require(kind >= 0 && kind < static_cast<int64_t>(Activation::kCount), op,
              ": activations must be in [0, ", static_cast<int64_t>(Activation::kCount), "), got ",
              kind);
      this->activations.push_back(static_cast<Activation>(kind));
    }
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
      linear.push_back(
          {weights[l].const_data_ptr(), given ? biases[l].const_data_ptr() : nullptr, in, out});
      in = out;
    }
    measure();
  }

  // By address, see direct.h, whose caller has checked what there is to check.
  Net(const char* op, ScalarType dtype, int64_t batch, const int64_t* form, const double* params,
      const std::vector<void*>& parameters)
      : op(op), dtype(dtype), batch(batch), inputs(form[0]) {
    const size_t layers = parameters.size() / 2;
    for (size_t l = 0; l < layers; ++l)
      linear.push_back({parameters[2 * l], parameters[2 * l + 1], form[l], form[l + 1]});
    for (size_t l = 0; l + 1 < layers; ++l) {
      activations.push_back(static_cast<Activation>(form[layers + 1 + l]));
      this->params.push_back(params[l]);
    }
    measure();
  }

  void check(const char* name, const Tensor& x, int64_t dim) const {
    require(x.is_cpu() && x.scalar_type() == dtype && x.dim() == dim && x.is_contiguous(), op, ": ",
            name, " must be contiguous, [", dim, "-dimensional], on the CPU, of the dtype of x");
  }

  void check(const char* name, const Tensor& x, std::initializer_list<int64_t> sizes) const {
    check(name, x, static_cast<int64_t>(sizes.size()));
    int64_t d = 0;
    for (int64_t size : sizes) require(x.size(d++) == size, op, ": ", name, " has the wrong shape");
  }

  // `planes`: how many rows a sample has in most products.
  template <typename T>
  std::vector<Layer<T>> layers(As as, int64_t planes) const {
    require(gemm_routine<T>() != nullptr, op, ": this torch exports no BLAS");
    std::vector<Layer<T>> layers;
    layers.reserve(linear.size());
    for (const auto& [weight, bias, in, out] : linear) {
      const bool forward = as == As::kTransposed;
      const T* w = static_cast<const T*>(weight);
      layers.push_back({w, static_cast<const T*>(bias), in, out,
                        Factor<T>(w, as, forward ? in : out, forward ? out : in, planes * batch)});
    }
    return layers;
  }

  const char* op;
  std::vector<Linear> linear;
  std::vector<Activation> activations;  // of hidden layers
  std::vector<double> params;
  ScalarType dtype;
  int64_t batch, inputs, outputs, widest = 1, numbers = 0;  // numbers: of all weights
  int depth;

 private:
  void measure() {
    depth = static_cast<int>(linear.size());
    outputs = linear.back().out;
    for (int l = 0; l < depth; ++l) {
      if (l + 1 < depth) widest = std::max(widest, linear[l].out);
      numbers += linear[l].in * linear[l].out;
    }
  }
};

// The layers of a net as the threads of a loop take them. Panels that stay in a core's own cache
// are laid out by each thread for itself: that is done sooner than they are fetched from the core
// that wrote them. Larger ones are shared.
template <typename T>
class Layout {
 public:
  using Layers = std::shared_ptr<const std::vector<Layer<T>>>;

  Layout(const Net& net, As as, int64_t planes) : net_(net), as_(as), planes_(planes) {
    if (net.numbers * static_cast<int64_t>(sizeof(T)) > kNear) shared_ = make();
  }
  Layers of_thread() const { return shared_ ? shared_ : make(); }

 private:
  static constexpr int64_t kNear = 1 << 20;

  Layers make() const {
    return std::make_shared<const std::vector<Layer<T>>>(net_.layers<T>(as_, planes_));
  }

  const Net& net_;
  As as_;
  int64_t planes_;
  Layers shared_;
};

// A batch in blocks whose rows of numbers, `bytes_a_sample`, fit the second-level cache. The cut
// depends on sizes alone: results are the same for any number of threads.
struct Blocks {
  static constexpr int64_t kCache = 960 << 10, kEnough = 8;

  Blocks(int64_t batch, int64_t bytes_a_sample, int64_t least, int64_t cache = kCache)
      : batch(batch) {
    const int64_t fitting = std::max(least, cache / std::max<int64_t>(1, bytes_a_sample));
    // several for each thread, and as many for one as for another
    count = std::max((batch + fitting - 1) / fitting, std::min(kEnough, batch / least));
    for (int64_t even = 2; even <= kEnough; even *= 2)
      if (count > even / 2 && count < even) count = even;
    size = (batch + count - 1) / count;
    count = (batch + size - 1) / size;
  }
  int64_t first(int64_t block) const { return block * size; }
  int64_t samples(int64_t block) const { return std::min(size, batch - block * size); }

  int64_t batch, size, count;
};

// body(block, scratch, own()) for all blocks, each thread with scratch memory and something of its
// own. A thread takes the next block when it is done with one: some come late, and some are slowed
// down by other work of the machine.
template <typename T, typename Own, typename Body>
void for_blocks(const Blocks& blocks, int64_t scratch, const Own& own, const Body& body) {
  std::atomic<int64_t> next{0};
  const auto lane = [&](int64_t, int64_t) {
    int64_t block = next++;
    if (block >= blocks.count) return;
    const OneBlasThread guard;
    Scratch<T> memory(scratch);
    const auto mine = own();
    for (; block < blocks.count; block = next++) body(block, memory.get(), mine);
  };
  if (blocks.count == 1) return lane(0, 1);
  const int64_t threads = torch::stable::get_num_threads();
  torch::stable::parallel_for(0, std::min(threads, blocks.count), 1, lane);
}

template <typename T, typename Body>
void for_blocks(const Blocks& blocks, int64_t scratch, const Body& body) {
  const auto nothing = [] { return 0; };
  for_blocks<T>(blocks, scratch, nothing,
                [&](int64_t block, T* memory, int) { body(block, memory); });
}

template <typename T>
void add_bias(T* rows, const T* bias, int64_t count, int64_t n) {
  if (bias == nullptr) return;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t c = 0; c < n; ++c) rows[r * n + c] += bias[c];
}

// Sums over a batch, such as gradients of parameters: several partial sums, each over a fixed
// choice of blocks, added up in order at the end. The first lane's are made in place.
template <typename T>
class Sums {
 public:
  Sums(const Blocks& blocks, std::vector<Tensor*> into) : into_(std::move(into)) {
    lanes_ = std::clamp<int64_t>(blocks.count / 4, std::min<int64_t>(2, blocks.count), 8);
    for (Tensor* x : into_)
      first_.push_back(data<T>(*x)), begin_.push_back(size_), size_ += x->numel();
    begin_.push_back(size_);
    begun_.resize(lanes_ * into_.size());
    if (lanes_ > 1) memory_ = std::make_unique<Scratch<T>>((lanes_ - 1) * size_);
  }

  // body(block, scratch, lane): blocks of a lane come one after the other
  template <typename Body>
  void run(const Blocks& blocks, int64_t scratch, const Body& body) {
    for_blocks<T>(Blocks(lanes_, 1, 1, 1), scratch, [&](int64_t lane, T* memory) {
      for (int64_t block = lane; block < blocks.count; block += lanes_) body(block, memory, lane);
    });
    finish();
  }

  // A lane's sum, to be added to.
  T* of(int64_t lane, int number) {
    T* sum = place(lane, number);
    if (!begun(lane, number)) std::fill_n(sum, begin_[number + 1] - begin_[number], T(0));
    begun(lane, number) = true;
    return sum;
  }

  // Adds alpha a^T b to a lane's sum [m, n]; a [k, m], b [k, n].
  void add_product(int64_t lane, int number, int64_t m, int64_t n, int64_t k, const T* a,
                   const T* b, T alpha = 1) {
    const T beta = begun(lane, number) ? T(1) : T(0);  // nobody reads zeros that nobody wrote
    begun(lane, number) = true;
    multiply_outer<T>(m, n, k, a, b, place(lane, number), beta, alpha);
  }

 private:
  char& begun(int64_t lane, int number) { return begun_[lane * into_.size() + number]; }

  T* place(int64_t lane, int number) {
    return lane == 0 ? first_[number] : memory_->get() + (lane - 1) * size_ + begin_[number];
  }

  void finish() {
    for (int i = 0; i < static_cast<int>(into_.size()); ++i) {
      T* to = of(0, i);
      const int64_t n = begin_[i + 1] - begin_[i];
      for (int64_t lane = 1; lane < lanes_; ++lane) {
        if (!begun(lane, i)) continue;
        const T* from = place(lane, i);
        for (int64_t j = 0; j < n; ++j) to[j] += from[j];
      }
    }
  }

  std::vector<Tensor*> into_;
  std::vector<T*> first_;
  std::vector<int64_t> begin_;
  std::vector<char> begun_;
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
