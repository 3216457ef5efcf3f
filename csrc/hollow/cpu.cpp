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

template <typename T>
void run_forward(const Task<T>& task, const Tensor&) {
  share_out(task, [&](int64_t first, int64_t last) { loops<T>().forward(task, first, last); });
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

template <typename T>
void run_gradient(const Task<T>& task, Tensor&) {
  const Chunks chunks(task.groups, task.rows);
  std::vector<T> several(chunks.count > 1 ? task.groups * chunks.count * task.net.parameters : 0);
  T* partial = chunks.count > 1 ? several.data() : task.of_theta;
  share_out(task,
            [&](int64_t first, int64_t last) { loops<T>().gradient(task, first, last, partial); });
  if (chunks.count > 1)
    add_chunks(partial, task.groups, chunks.count, task.net.parameters, task.of_theta);
}

#include "operators.h"

}  // namespace
}  // namespace ct::hollow

STABLE_TORCH_LIBRARY_IMPL(ctorch, CPU, m) {
  m.impl("hollow_transform", TORCH_BOX(&ct::hollow::hollow_transform));
  m.impl("hollow_gradient", TORCH_BOX(&ct::hollow::hollow_gradient));
}
