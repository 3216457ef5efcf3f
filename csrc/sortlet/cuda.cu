// Sortlet kernels for CUDA: launches and registration. No call waits for the GPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "../core/stream.h"
#include "args.h"
#include "cuda_kernels.h"

namespace ct::sortlet {
namespace {

constexpr int64_t kMaxBlocks = 1 << 16;  // of a kernel that strides over its grid
constexpr int64_t kMaxRows = 65535;      // the largest gridDim.y

unsigned blocks(int64_t count, int64_t most = kMaxBlocks) {
  return static_cast<unsigned>(std::clamp<int64_t>(count, 1, most));
}

int64_t groups(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <typename T>
void run_long(const Lists& lists, const Task<T>& task, cudaStream_t stream) {
  const bool wide = sizeof(T) == sizeof(double);
  const int32_t dtype = wide ? aoti_torch_dtype_float64() : aoti_torch_dtype_float32();
  const std::vector<int64_t> twice{2, task.lists, task.n}, once{task.lists, task.n};
  const std::vector<int64_t> of_lists{task.lists};
  const Tensor keys = lists.make_of(twice, dtype);
  const Tensor indices = lists.make_of(twice, aoti_torch_dtype_int32());
  const Tensor scratch = lists.make_of(once, aoti_torch_dtype_float64());
  const Tensor swaps = lists.make_of(of_lists, aoti_torch_dtype_int64());
  SortTask<T> sort{};
  sort.scores = task.scores, sort.lists = task.lists, sort.n = task.n;
  sort.key = out<T>(keys), sort.next_key = sort.key + task.lists * task.n;
  sort.index = out<int32_t>(indices), sort.next_index = sort.index + task.lists * task.n;
  sort.swaps = reinterpret_cast<unsigned long long*>(out<int64_t>(swaps));
  const unsigned rows = blocks(task.lists, kMaxRows);
  CT_LAUNCH((clear_kernel<unsigned long long>), blocks(groups(task.lists, kThreads)), kThreads, 0,
            stream, sort.swaps, task.lists);
  CT_LAUNCH((tile_kernel<T>), dim3(blocks(groups(task.n, kTile), int64_t{1} << 30), rows), kThreads,
            0, stream, sort);
  for (int64_t width = kTile; width < task.n; width *= 2) {
    CT_LAUNCH((merge_kernel<T>), dim3(blocks(groups(task.n, kThreads)), rows), kThreads, 0, stream,
              sort, width);
    std::swap(sort.key, sort.next_key);
    std::swap(sort.index, sort.next_index);
  }
  CT_LAUNCH((long_kernel<T>), blocks(task.lists), kThreads, 0, stream, task, sort.key, sort.index,
            out<double>(scratch), sort.swaps);
}

template <typename Fill>
void run_as(const Lists& lists, Op op, int64_t kind, const Fill& fill) {
  if (lists.lists == 0) return;
  const Launch launch(lists.scores());
  dispatch_floating(lists.dtype(), lists.op(), [&](auto zero) {
    using T = decltype(zero);
    Task<T> task{};
    task.op = op, task.kind = static_cast<int>(kind);
    task.lists = lists.lists, task.n = lists.n;
    task.scores = in<T>(lists.scores());
    fill(task);
    if (op == kTerm) {
      CT_LAUNCH((term_kernel<T>), blocks(groups(task.lists, kThreads)), kThreads, 0, launch.stream,
                task);
    } else if (task.n <= kShort) {
      CT_LAUNCH((short_kernel<T>), blocks(groups(task.lists, kWarps)), kThreads, 0, launch.stream,
                task);
    } else {
      run_long(lists, task, launch.stream);
    }
  });
}

#include "operators.h"

}  // namespace
}  // namespace ct::sortlet

STABLE_TORCH_LIBRARY_IMPL(ctorch, CUDA, m) { CT_SORTLET_IMPLS(m) }
