// Kernels of hollow nets for CUDA: launches and registration. No call waits for the GPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "../core/stream.h"
#include "args.h"
#include "cuda_kernels.h"

namespace ct::hollow {
namespace {

constexpr int64_t kKept = int64_t{1} << 28;  // numbers that are kept between layers, at most
constexpr int64_t kMaxBlocks = 65535;

unsigned blocks(int64_t count) {
  return static_cast<unsigned>(std::clamp<int64_t>(count, 1, kMaxBlocks));
}

// body(rows, grid) for the rows of all groups, as many at a time as memory is meant for.
template <typename T, typename Body>
void for_rows(const Task<T>& task, const Tensor& like, int parts, bool keeps, const Body& body) {
  int64_t units = 0;
  for (int l = 0; l < task.net.hidden; ++l) units += task.net.width[l];
  const int planes = planes_of(task.order);
  const int64_t each = std::max<int64_t>(1, units * planes * parts * task.groups);
  const int64_t most = keeps ? std::clamp<int64_t>(kKept / each, 1, task.rows) : task.rows;
  const Tensor kept = new_tensor(like, {keeps ? each * most : 0});
  for (int64_t first = 0; first < task.rows; first += most) {
    const int64_t count = std::min(most, task.rows - first);
    const Rows<T> rows{task, first, count, kept.mutable_data_ptr<T>(), planes, parts};
    body(rows, dim3(blocks((count + kThreads - 1) / kThreads), blocks(task.groups)));
  }
}

template <typename T>
void run_forward(const Task<T>& task, const Tensor& like) {
  const Launch launch(like);
  for_rows(task, like, 1, task.net.hidden > 1, [&](const Rows<T>& rows, dim3 grid) {
    CT_LAUNCH((forward_kernel<T>), grid, kThreads, 0, launch.stream, rows);
  });
}

template <typename T>
void run_gradient(const Task<T>& task, Tensor& of_theta) {
  const Launch launch(of_theta);
  torch::stable::fill_(of_theta, 0.0);
  for_rows(task, of_theta, 2, true, [&](const Rows<T>& rows, dim3 grid) {
    CT_LAUNCH((gradient_kernel<T>), grid, kThreads, 0, launch.stream, rows);
    CT_LAUNCH((parameter_kernel<T>), blocks(task.groups * task.net.parameters), kThreads, 0,
              launch.stream, rows);
  });
}

#include "operators.h"

}  // namespace
}  // namespace ct::hollow

STABLE_TORCH_LIBRARY_IMPL(ctorch, CUDA, m) {
  m.impl("hollow_transform", TORCH_BOX(&ct::hollow::hollow_transform));
  m.impl("hollow_gradient", TORCH_BOX(&ct::hollow::hollow_gradient));
}
