// Kernels of hollow nets for the CPU.
//
// A block of rows goes through the whole net with all its Taylor coefficients, which stay in the
// first-level cache; units are in the lanes of vectors, so that rows are read and written as they
// lie in memory. Threads share out chunks of rows; a gradient in parameters is added up over chunks
// that do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <tuple>
#include <vector>

#include "args.h"
#include "levels.h"

namespace ct::hollow {
namespace {

constexpr int64_t kThread = 1 << 17;  // products that are worth a thread

// body(first, last) for ranges of the chunks of all groups.
template <typename T, typename Body>
void share_out(const Task<T>& task, const Body& body) {
  const Chunks chunks(task.groups, task.rows);
  const int64_t all = task.groups * chunks.count;
  const int64_t work = chunks.size * (task.net.parameters + 1) * (task.order + 1);
  const int64_t grain = std::max<int64_t>(1, kThread / std::max<int64_t>(1, work));
  if (all <= grain) {
    if (all > 0) body(int64_t(0), all);
    return;
  }
  torch::stable::parallel_for(0, all, grain, body);
}

Tensor hollow_transform(const Tensor& x, const Tensor& h, const Tensor& theta,
                        std::vector<int64_t> widths, int64_t activation, double param,
                        int64_t order) {
  const Arguments a("hollow_transform", x, h, theta, widths, activation, order);
  Tensor out = a.new_stack();
  if (!a.any()) return out;
  dispatch_floating(a.dtype, a.op, [&](auto zero) {
    using T = decltype(zero);
    Task<T> task = a.task<T>(param);
    task.out = out.mutable_data_ptr<T>();
    share_out(task, [&](int64_t first, int64_t last) { loops<T>().forward(task, first, last); });
  });
  return out;
}

// The sum of `count` rows for each group, in their order.
template <typename T>
void add_chunks(const T* partial, int64_t groups, int64_t count, int64_t size, T* sum) {
  for (int64_t g = 0; g < groups; ++g, sum += size) {
    std::copy_n(partial, size, sum);
    partial += size;
    for (int64_t c = 1; c < count; ++c, partial += size)
      for (int64_t i = 0; i < size; ++i) sum[i] += partial[i];
  }
}

std::tuple<Tensor, Tensor, Tensor> hollow_gradient(const Tensor& g_, const Tensor& x,
                                                   const Tensor& h, const Tensor& theta,
                                                   std::vector<int64_t> widths, int64_t activation,
                                                   double param, int64_t order) {
  const Arguments a("hollow_gradient", x, h, theta, widths, activation, order);
  const Tensor g = a.stack("g", g_);
  Tensor of_x = torch::stable::empty_like(a.x), of_h = torch::stable::empty_like(a.h);
  Tensor of_theta = torch::stable::empty_like(a.theta);
  if (!a.any()) return {of_x, of_h, torch::stable::fill_(of_theta, 0.0)};
  dispatch_floating(a.dtype, a.op, [&](auto zero) {
    using T = decltype(zero);
    Task<T> task = a.task<T>(param);
    task.g = g.const_data_ptr<T>(), task.of_x = of_x.mutable_data_ptr<T>();
    task.of_h = of_h.mutable_data_ptr<T>(), task.of_theta = of_theta.mutable_data_ptr<T>();
    const Chunks chunks(task.groups, task.rows);
    std::vector<T> several(chunks.count > 1 ? task.groups * chunks.count * task.net.parameters : 0);
    T* partial = chunks.count > 1 ? several.data() : task.of_theta;
    share_out(task, [&](int64_t first, int64_t last) {
      loops<T>().gradient(task, first, last, partial);
    });
    if (chunks.count > 1)
      add_chunks(partial, task.groups, chunks.count, task.net.parameters, task.of_theta);
  });
  return {of_x, of_h, of_theta};
}

}  // namespace
}  // namespace ct::hollow

STABLE_TORCH_LIBRARY_IMPL(ctorch, CPU, m) {
  m.impl("hollow_transform", TORCH_BOX(&ct::hollow::hollow_transform));
  m.impl("hollow_gradient", TORCH_BOX(&ct::hollow::hollow_gradient));
}
