// Taylor kernels for the CPU.
//
// Elements are worked through in blocks of a row (kRowBytes of each coefficient), which is copied
// to scratch memory that stays in the first-level cache: there a function is a handful of calls of
// vectorized arithmetic on whole series, of any order. The instruction set is chosen at run time.
// Threads share out whole blocks, and nothing is added up across them: results do not depend on
// the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <tuple>

#include "args.h"
#include "arith.h"
#include "cpu_laplacian.h"
#include "cpu_machines.h"
#include "laplacian.h"

namespace ct::jet {
namespace {

constexpr int64_t kGrain = 1 << 15;  // coefficients that are worth a thread

// body(first, last) over ranges of blocks, each of so many elements with so many coefficients.
template <typename Body>
void for_blocks(int64_t blocks, int64_t elements, int64_t coefficients, const Body& body) {
  const int64_t grain = std::max<int64_t>(1, kGrain / (elements * coefficients));
  if (blocks <= grain) {
    if (blocks > 0) body(int64_t(0), blocks);
    return;
  }
  torch::stable::parallel_for(0, blocks, grain, body);
}

// Runs body(machine type) for the widest vectors that this machine has.
template <typename T, typename Body>
void on_machine(const Body& body) {
  switch (instruction_set()) {
#if defined(CT_X86_LEVELS)
    case 4:
      return body(static_cast<v4::Machine<T>*>(nullptr));
    case 3:
      return body(static_cast<v3::Machine<T>*>(nullptr));
#endif
    default:
      return body(static_cast<base::Machine<T>*>(nullptr));
  }
}

// One operand: a stack, and where in it the elements of the result look.
template <typename T>
struct Operand {
  Operand(const Stack& x, const Index& index_ = {})
      : data(x.tensor.template const_data_ptr<T>()),
        terms(x.terms),
        numel(x.numel),
        index(index_) {}

  // Rows of `count` coefficients for n elements from `begin` on; the rest of a row repeats the
  // first, so that nothing special happens there.
  template <int kRow>
  void load(T* to, int64_t begin, int n, int count) const {
    for (int k = 0; k < count; ++k, to += kRow) {
      const T* from = data + k * numel;
      if (index.linear) {
        std::memcpy(to, from + begin, n * sizeof(T));
      } else {
        int64_t at = begin / index.repeat % index.count, left = index.repeat - begin % index.repeat;
        for (int i = 0; i < n; ++i) {
          to[i] = from[at];
          if (--left > 0) continue;
          left = index.repeat;
          if (++at == index.count) at = 0;
        }
      }
      std::fill(to + n, to + kRow, to[0]);
    }
  }

  const T* data;
  int terms;
  int64_t numel;
  Index index;
};

template <int kRow, typename T>
void store(T* to, const T* from, int64_t numel, int64_t begin, int n, int count) {
  for (int k = 0; k < count; ++k)
    std::memcpy(to + k * numel + begin, from + k * kRow, n * sizeof(T));
}

// body(machine, begin, n) for every block.
template <typename T, typename Body>
void run(int64_t numel, int coefficients, int capacity, const Body& body) {
  on_machine<T>([&](auto* type) {
    using M = std::remove_pointer_t<decltype(type)>;
    constexpr int kRow = M::kRow;
    for_blocks((numel + kRow - 1) / kRow, kRow, coefficients, [&](int64_t first, int64_t last) {
      T* memory = scratch<T>(static_cast<size_t>(kSeries) * capacity * kRow);
      for (int64_t block = first; block < last; ++block) {
        M machine(memory, capacity);
        const int64_t begin = block * kRow;
        body(machine, begin, static_cast<int>(std::min<int64_t>(kRow, numel - begin)));
      }
    });
  });
}

// ---- elementwise functions ---------------------------------------------------------------------

void require_order(const char* op, int64_t order, int64_t level) {
  require(order >= 0 && order < (1 << 20), op, ": order must not be negative, got ", order);
  require(level >= 0 && level < (1 << 10), op, ": level must not be negative, got ", level);
}

Tensor jet_unary(const Tensor& x_, int64_t number, int64_t order_, double param, int64_t level,
                 bool last) {
  constexpr const char* kOp = "jet_unary";
  const Stack x(kOp, "x", x_);
  const Op function = read_op(kOp, number);
  require_order(kOp, order_, level);
  require(x.terms <= order_ + 1, kOp, ": x has more coefficients than the order asks for");
  const int order = static_cast<int>(order_), m = static_cast<int>(level);
  Tensor out = new_tensor(x.tensor, last ? x.shape : with_front(order + 1, x.shape));
  dispatch_floating(x.tensor.scalar_type(), kOp, [&](auto zero) {
    using T = decltype(zero);
    const Operand<T> argument(x);
    T* to = out.mutable_data_ptr<T>();
    run<T>(x.numel, order + 1, order + m + 2, [&](auto& machine, int64_t begin, int n) {
      using M = std::remove_reference_t<decltype(machine)>;
      T *xs = machine.take(), *ys = machine.take();
      argument.template load<M::kRow>(xs, begin, n, x.terms);
      Functions<M>::evaluate(machine, function, m, static_cast<T>(param), ys, xs, x.terms, order);
      if (last)
        store<M::kRow>(to, machine.at(ys, order), x.numel, begin, n, 1);
      else
        store<M::kRow>(to, ys, x.numel, begin, n, order + 1);
    });
  });
  return out;
}

Tensor jet_unary_backward(const Tensor& g_, const Tensor& x_, int64_t number, int64_t order_,
                          double param, int64_t level, bool last) {
  constexpr const char* kOp = "jet_unary_backward";
  const Stack x(kOp, "x", x_);
  const Op function = read_op(kOp, number);
  require_order(kOp, order_, level);
  require(x.terms <= order_ + 1, kOp, ": x has more coefficients than the order asks for");
  const int order = static_cast<int>(order_), m = static_cast<int>(level);
  require_like(kOp, "g", g_, x_);
  require_sizes(kOp, "g", g_, last ? x.shape : with_front(order + 1, x.shape));
  const Tensor g = as_contiguous(g_);
  Tensor out = new_tensor(x.tensor, with_front(x.terms, x.shape));
  dispatch_floating(x.tensor.scalar_type(), kOp, [&](auto zero) {
    using T = decltype(zero);
    const Operand<T> argument(x);
    Operand<T> cotangent(x);
    cotangent.data = g.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    run<T>(x.numel, 2 * (order + 1), order + m + 2, [&](auto& machine, int64_t begin, int n) {
      using M = std::remove_reference_t<decltype(machine)>;
      T *xs = machine.take(), *slope = machine.take(), *gs = machine.take();
      argument.template load<M::kRow>(xs, begin, n, x.terms);
      cotangent.template load<M::kRow>(gs, begin, n, last ? 1 : order + 1);
      Functions<M>::evaluate(machine, function, m, static_cast<T>(param), slope, xs, x.terms,
                             order);
      if (last)
        for (int j = 0; j < x.terms; ++j)
          machine.product(machine.at(xs, j), machine.at(slope, order - j), 1, gs, 1, 0);
      else
        machine.correlate(xs, slope, order + 1, gs, order + 1, x.terms - 1);
      store<M::kRow>(to, xs, x.numel, begin, n, x.terms);
    });
  });
  return out;
}

// ---- products ----------------------------------------------------------------------------------

// body(machine, out, a, b) on series in scratch memory.
template <typename Body>
Tensor of_pair(const char* op, const Tensor& a_, const Tensor& b_, int64_t order_,
               const Body& body) {
  Stack a(op, "the first argument", a_), b(op, "the second argument", b_);
  require_like(op, "the second argument", b_, a_);
  require_order(op, order_, 0);
  const int order = static_cast<int>(order_);
  const Sizes shape = broadcast(op, a.shape, b.shape);
  const Index of_a = read_index(a, shape), of_b = read_index(b, shape);
  const int64_t numel = numel_of(shape);
  Tensor out = new_tensor(a.tensor, with_front(order + 1, shape));
  dispatch_floating(a.tensor.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    const Operand<T> left(a, of_a), right(b, of_b);
    T* to = out.mutable_data_ptr<T>();
    const int capacity = std::max({order + 1, a.terms, b.terms});
    run<T>(numel, 2 * capacity, capacity, [&](auto& machine, int64_t begin, int n) {
      using M = std::remove_reference_t<decltype(machine)>;
      T *as = machine.take(), *bs = machine.take(), *ys = machine.take();
      left.template load<M::kRow>(as, begin, n, a.terms);
      right.template load<M::kRow>(bs, begin, n, b.terms);
      body(machine, ys, as, a.terms, bs, b.terms, order);
      store<M::kRow>(to, ys, numel, begin, n, order + 1);
    });
  });
  return out;
}

Tensor jet_mul(const Tensor& a, const Tensor& b, int64_t order) {
  return of_pair("jet_mul", a, b, order,
                 [](auto& m, auto* y, auto* a, int na, auto* b, int nb, int order) {
                   m.product(y, a, na, b, nb, order);
                 });
}

Tensor jet_div(const Tensor& a, const Tensor& b, int64_t order) {
  return of_pair("jet_div", a, b, order,
                 [](auto& m, auto* y, auto* a, int na, auto* b, int nb, int order) {
                   m.quotient(y, a, na, b, nb, order);
                 });
}

Tensor jet_correlate(const Tensor& g, const Tensor& y, int64_t order) {
  return of_pair("jet_correlate", g, y, order,
                 [](auto& m, auto* z, auto* g, int ng, auto* y, int ny, int order) {
                   m.correlate(z, g, ng, y, ny, order);
                 });
}

// ---- Laplacians --------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> laplacian(const char* op, const Tensor& x, const Tensor& rows,
                                             const std::optional<Tensor>& lap, int64_t number,
                                             double param, bool with_rows) {
  const LaplacianArgs args(op, x, rows, lap, number);
  Tensor y = new_tensor(args.x, args.shape), out = new_tensor(args.x, args.shape);
  Tensor new_rows = with_rows ? new_tensor(args.x, with_front(args.count, args.shape)) : y;
  dispatch_floating(args.x.scalar_type(), op, [&](auto zero) {
    using T = decltype(zero);
    LaplacianTask<T> task = args.task<T>(param);
    task.y = y.mutable_data_ptr<T>(), task.out = out.mutable_data_ptr<T>();
    task.new_rows = with_rows ? new_rows.mutable_data_ptr<T>() : nullptr;
    on_machine<T>([&](auto* type) {
      using M = std::remove_pointer_t<decltype(type)>;
      if (task.shared()) sum_squares<M>(task);
      const int64_t blocks = (task.numel + kWide - 1) / kWide;
      for_blocks(blocks, kWide, task.count + 3, [&](int64_t first, int64_t last) {
        LaplacianBlock<M> block;
        for (int64_t b = first; b < last; ++b) block.forward(task, b * kWide);
      });
    });
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
  const auto [y, unused, out] = laplacian("jet_laplacian_last", x, rows, lap, number, param, false);
  return {y, out};
}

std::tuple<Tensor, Tensor, Tensor> jet_laplacian_backward(
    const Tensor& x, const Tensor& rows, std::optional<Tensor> lap, std::optional<Tensor> gy,
    std::optional<Tensor> grows, std::optional<Tensor> glap, int64_t number, double param) {
  constexpr const char* kOp = "jet_laplacian_backward";
  const LaplacianArgs args(kOp, x, rows, lap, number);
  const LaplacianCotangents cotangents(args, gy, grows, glap);
  Tensor x_bar = new_tensor(args.x, args.shape), lap_bar = new_tensor(args.x, args.shape);
  Tensor rows_bar = new_tensor(args.x, sizes_of(args.rows));
  dispatch_floating(args.x.scalar_type(), kOp, [&](auto zero) {
    using T = decltype(zero);
    LaplacianTask<T> task = args.task<T>(param);
    cotangents.put(task);
    task.x_bar = x_bar.mutable_data_ptr<T>(), task.lap_bar = lap_bar.mutable_data_ptr<T>();
    task.rows_bar = rows_bar.mutable_data_ptr<T>();
    on_machine<T>([&](auto* type) {
      using M = std::remove_pointer_t<decltype(type)>;
      if (task.shared()) {
        sum_squares<M>(task);
        const int64_t stretches = (task.columns + M::kRow - 1) / M::kRow;
        for_blocks(stretches, M::kRow * (task.numel / std::max<int64_t>(1, task.columns)),
                   2 * task.count + 4, [&](int64_t first, int64_t last) {
                     LaplacianBlock<M> block;
                     for (int64_t s = first; s < last; ++s)
                       block.backward_shared(task, s * M::kRow);
                   });
      } else {
        const int64_t blocks = (task.numel + kWide - 1) / kWide;
        for_blocks(blocks, kWide, 2 * task.count + 4, [&](int64_t first, int64_t last) {
          LaplacianBlock<M> block;
          for (int64_t b = first; b < last; ++b) block.backward(task, b * kWide);
        });
      }
    });
  });
  return {x_bar, rows_bar, lap_bar};
}

}  // namespace
}  // namespace ct::jet

STABLE_TORCH_LIBRARY_IMPL(ctorch, CPU, m) {
  m.impl("jet_unary", TORCH_BOX(&ct::jet::jet_unary));
  m.impl("jet_unary_backward", TORCH_BOX(&ct::jet::jet_unary_backward));
  m.impl("jet_mul", TORCH_BOX(&ct::jet::jet_mul));
  m.impl("jet_div", TORCH_BOX(&ct::jet::jet_div));
  m.impl("jet_correlate", TORCH_BOX(&ct::jet::jet_correlate));
  m.impl("jet_laplacian", TORCH_BOX(&ct::jet::jet_laplacian));
  m.impl("jet_laplacian_last", TORCH_BOX(&ct::jet::jet_laplacian_last));
  m.impl("jet_laplacian_backward", TORCH_BOX(&ct::jet::jet_laplacian_backward));
}
