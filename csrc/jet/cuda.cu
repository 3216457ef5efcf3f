// Taylor kernels for CUDA: launches and registration. No call waits for the GPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../core/stream.h"
#include "args.h"
#include "cuda_kernels.h"
#include "laplacian.h"

namespace ct::jet {
namespace {

constexpr int64_t kMaxBlocks = 1 << 14;  // of a kernel that strides over its grid
constexpr int kSmall = 10, kLarge = 40;  // coefficients that a thread has room for

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

// ---- elementwise functions ---------------------------------------------------------------------

void require_order(const char* op, int64_t terms, int64_t order, int64_t level) {
  require(order >= 0 && level >= 0 && order + level + 1 <= kLarge, op, ": order ", order,
          " of derivative ", level, " is not served on CUDA: their sum must be at most ",
          kLarge - 1, "; use the CPU");
  require(terms <= order + 1, op, ": x has more coefficients than the order asks for");
}

template <bool kBackward, typename T>
void launch(const UnaryTask<T>& task, cudaStream_t stream) {
  const bool small = task.order + task.level + 1 <= kSmall;
  if (task.numel == 0) return;
  if constexpr (kBackward) {
    if (small) {
      CT_LAUNCH((unary_backward_kernel<kSmall, T>), blocks_for(task.numel), kThreads, 0, stream,
                task);
    } else {
      CT_LAUNCH((unary_backward_kernel<kLarge, T>), blocks_for(task.numel), kThreads, 0, stream,
                task);
    }
  } else {
    if (small) {
      CT_LAUNCH((unary_kernel<kSmall, T>), blocks_for(task.numel), kThreads, 0, stream, task);
    } else {
      CT_LAUNCH((unary_kernel<kLarge, T>), blocks_for(task.numel), kThreads, 0, stream, task);
    }
  }
}

Tensor unary(const char* name, const Tensor* g, const Tensor& x_, int64_t number, int64_t order,
             double param, int64_t level, bool last) {
  const Stack x(name, "x", x_);
  const Op op = read_op(name, number);
  require_order(name, x.terms, order, level);
  std::optional<Tensor> cotangent;
  if (g != nullptr) {
    require_like(name, "g", *g, x_);
    require_sizes(name, "g", *g, last ? x.shape : with_front(order + 1, x.shape));
    cotangent = as_contiguous(*g);
  }
  const Launch device(x.tensor);
  Tensor out = new_tensor(x.tensor, g != nullptr ? with_front(x.terms, x.shape)
                                    : last       ? x.shape
                                                 : with_front(order + 1, x.shape));
  dispatch_floating(x.tensor.scalar_type(), name, [&](auto zero) {
    using T = decltype(zero);
    const UnaryTask<T> task{x.tensor.const_data_ptr<T>(),
                            cotangent ? cotangent->const_data_ptr<T>() : nullptr,
                            out.mutable_data_ptr<T>(),
                            x.numel,
                            x.terms,
                            static_cast<int>(order),
                            static_cast<int>(level),
                            op,
                            static_cast<T>(param),
                            last};
    if (cotangent)
      launch<true>(task, device.stream);
    else
      launch<false>(task, device.stream);
  });
  return out;
}

Tensor jet_unary(const Tensor& x, int64_t number, int64_t order, double param, int64_t level,
                 bool last) {
  return unary("jet_unary", nullptr, x, number, order, param, level, last);
}

Tensor jet_unary_backward(const Tensor& g, const Tensor& x, int64_t number, int64_t order,
                          double param, int64_t level, bool last) {
  return unary("jet_unary_backward", &g, x, number, order, param, level, last);
}

// ---- products ----------------------------------------------------------------------------------

template <typename T>
PairOperand<T> operand(const Stack& x, const Index& index) {
  return {x.tensor.template const_data_ptr<T>(), x.terms, x.numel,
          std::max<int64_t>(1, index.count), std::max<int64_t>(1, index.repeat)};
}

Tensor of_pair(const char* op, Pair kind, const Tensor& a_, const Tensor& b_, int64_t order) {
  Stack a(op, "the first argument", a_), b(op, "the second argument", b_);
  require_like(op, "the second argument", b_, a_);
  require(order >= 0, op, ": order must not be negative, got ", order);
  const Launch device(a.tensor);
  const Sizes shape = broadcast(op, a.shape, b.shape);
  const Index of_a = read_index(a, shape), of_b = read_index(b, shape);
  Tensor out = new_tensor(a.tensor, with_front(order + 1, shape));
  dispatch_floating(a.tensor.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const PairTask<T> task{operand<T>(a, of_a), operand<T>(b, of_b),     out.mutable_data_ptr<T>(),
                           numel_of(shape),     static_cast<int>(order), kind};
    if (task.numel == 0) return;
    CT_LAUNCH((pair_kernel<T>), blocks_for(task.numel), kThreads, 0, device.stream, task);
  });
  return out;
}

Tensor jet_mul(const Tensor& a, const Tensor& b, int64_t order) {
  return of_pair("jet_mul", Pair::kProduct, a, b, order);
}

Tensor jet_div(const Tensor& a, const Tensor& b, int64_t order) {
  return of_pair("jet_div", Pair::kQuotient, a, b, order);
}

Tensor jet_correlate(const Tensor& g, const Tensor& y, int64_t order) {
  return of_pair("jet_correlate", Pair::kCorrelation, g, y, order);
}

// ---- Laplacians --------------------------------------------------------------------------------

template <typename T>
LaplacianKernelTask<T> kernel_task(const LaplacianArgs& args, double param) {
  const LaplacianTask<T> task = args.task<T>(param);
  LaplacianKernelTask<T> kernel{};
  kernel.x = task.x, kernel.rows = task.rows, kernel.lap = task.lap;
  kernel.count = task.count, kernel.numel = task.numel, kernel.columns = task.columns;
  kernel.op = task.op, kernel.param = task.param;
  return kernel;
}

std::tuple<Tensor, Tensor, Tensor> laplacian(const char* op, const Tensor& x, const Tensor& rows,
                                             const std::optional<Tensor>& lap, int64_t number,
                                             double param, bool with_rows) {
  const Launch device(x);
  const LaplacianArgs args(op, x, rows, lap, number);
  Tensor y = new_tensor(args.x, args.shape), out = new_tensor(args.x, args.shape);
  Tensor new_rows = with_rows ? new_tensor(args.x, with_front(args.count, args.shape)) : y;
  dispatch_floating(args.x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    LaplacianKernelTask<T> task = kernel_task<T>(args, param);
    task.y = y.mutable_data_ptr<T>(), task.out = out.mutable_data_ptr<T>();
    task.new_rows = with_rows ? new_rows.mutable_data_ptr<T>() : nullptr;
    if (task.numel == 0) return;
    CT_LAUNCH((laplacian_kernel<T>), blocks_for(task.numel), kThreads, 0, device.stream, task);
  });
  return {y, new_rows, out};
}

std::tuple<Tensor, Tensor, Tensor> jet_laplacian(const Tensor& x, const Tensor& rows,
                                                 std::optional<Tensor> lap, int64_t number,
                                                 double param) {
  return laplacian("jet_laplacian", x, rows, lap, number, param, true);
}

std::tuple<Tensor, Tensor> jet_laplacian_last(const Tensor& x, const Tensor& rows,
                                              std::optional<Tensor> lap, int64_t number,
                                              double param) {
  const auto result = laplacian("jet_laplacian_last", x, rows, lap, number, param, false);
  return {std::get<0>(result), std::get<2>(result)};
}

std::tuple<Tensor, Tensor, Tensor> jet_laplacian_backward(
    const Tensor& x, const Tensor& rows, std::optional<Tensor> lap, std::optional<Tensor> gy,
    std::optional<Tensor> grows, std::optional<Tensor> glap, int64_t number, double param) {
  constexpr const char* kOp = "jet_laplacian_backward";
  const Launch device(x);
  const LaplacianArgs args(kOp, x, rows, lap, number);
  const LaplacianCotangents cotangents(args, gy, grows, glap);
  Tensor x_bar = new_tensor(args.x, args.shape), lap_bar = new_tensor(args.x, args.shape);
  Tensor rows_bar = new_tensor(args.x, sizes_of(args.rows));
  const bool shared = args.columns != numel_of(args.shape);
  const Tensor space = new_tensor(args.x, {shared ? 2 * numel_of(args.shape) : 0});
  dispatch_floating(args.x.scalar_type(), kOp, [&](auto zero) {
    using T = decltype(zero);
    LaplacianTask<T> given = args.task<T>(param);
    cotangents.put(given);
    LaplacianKernelTask<T> task = kernel_task<T>(args, param);
    task.gy = given.gy, task.grows = given.grows, task.glap = given.glap;
    task.x_bar = x_bar.mutable_data_ptr<T>(), task.lap_bar = lap_bar.mutable_data_ptr<T>();
    task.rows_bar = rows_bar.mutable_data_ptr<T>();
    if (shared) task.first = space.mutable_data_ptr<T>(), task.bend = task.first + task.numel;
    if (task.numel > 0) {
      CT_LAUNCH((laplacian_backward_kernel<T>), blocks_for(task.numel), kThreads, 0, device.stream,
                task);
    }
    if (shared && task.count * task.columns > 0) {
      CT_LAUNCH((shared_rows_kernel<T>), blocks_for(task.count * task.columns), kThreads, 0,
                device.stream, task);
    }
  });
  return {x_bar, rows_bar, lap_bar};
}

}  // namespace
}  // namespace ct::jet

STABLE_TORCH_LIBRARY_IMPL(ctorch, CUDA, m) {
  m.impl("jet_unary", TORCH_BOX(&ct::jet::jet_unary));
  m.impl("jet_unary_backward", TORCH_BOX(&ct::jet::jet_unary_backward));
  m.impl("jet_mul", TORCH_BOX(&ct::jet::jet_mul));
  m.impl("jet_div", TORCH_BOX(&ct::jet::jet_div));
  m.impl("jet_correlate", TORCH_BOX(&ct::jet::jet_correlate));
  m.impl("jet_laplacian", TORCH_BOX(&ct::jet::jet_laplacian));
  m.impl("jet_laplacian_last", TORCH_BOX(&ct::jet::jet_laplacian_last));
  m.impl("jet_laplacian_backward", TORCH_BOX(&ct::jet::jet_laplacian_backward));
}
