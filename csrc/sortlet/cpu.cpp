// Sortlet kernels for the CPU. Short lists go sixteen at a time through a sorting network, long
// ones one at a time through a radix sort; threads share out lists. No list looks at another one,
// so that results do not depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "args.h"
#include "lanes.h"
#include "rows.h"

#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12 && defined(__x86_64__) && \
    defined(__linux__) && !defined(CT_SANITIZE) && !defined(CT_NO_CLONES)
#define CT_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CT_CLONES
#endif

namespace ct::sortlet {
namespace {

constexpr int64_t kScoresAThread = 4096;  // below that a thread is not worth its start

CT_CLONES void lanes(Block<float>& b, const Task<float>& task) { lanes_body(b, task); }
CT_CLONES void lanes(Block<double>& b, const Task<double>& task) { lanes_body(b, task); }

template <typename T>
void one_list(const Task<T>& task, int64_t list, Workspace<T>& work) {
  if (task.kind == kTanh) {
    Row<T, kTanh>(task, list, work);
  } else {
    Row<T, kLinear>(task, list, work);
  }
}

template <typename T>
bool side_by_side(const Task<T>& task) {
  return task.n > 0 && (task.n <= kAlways || (task.n <= kLongest && task.lists >= kLanes / 2));
}

template <typename T>
void some_lists(const Task<T>& task, int64_t begin, int64_t end) {
  if (task.op == kTerm) {
    for (int64_t list = begin; list < end; ++list) task.sign[list] = known_term(task, list);
    return;
  }
  Workspace<T> work;
  if (!side_by_side(task)) {
    for (int64_t list = begin; list < end; ++list) one_list(task, list, work);
    return;
  }
  Block<T> block(task.n);
  for (block.first = begin; block.first < end; block.first += kLanes) {
    block.lanes = static_cast<int>(std::min<int64_t>(kLanes, end - block.first));
    lanes(block, task);
    for (int l = 0; l < block.lanes; ++l)
      if (block.again[l]) one_list(task, block.first + l, work);
  }
}

template <typename T>
void run(const Task<T>& task) {
  const int64_t together = side_by_side(task) ? kLanes : 1;
  const int64_t groups = (task.lists + together - 1) / together;
  const int64_t size = std::max<int64_t>(1, together * task.n * (1 + task.rows));
  const int64_t grain = std::max<int64_t>(1, kScoresAThread / size);
  const auto body = [&](int64_t first, int64_t last) {
    some_lists(task, first * together, std::min(task.lists, last * together));
  };
  if (groups <= grain) {
    if (groups > 0) body(0, groups);
    return;
  }
  torch::stable::parallel_for(0, groups, grain, body);
}

template <typename Fill>
void run_as(const Lists& lists, Op op, int64_t kind, const Fill& fill) {
  dispatch_floating(lists.dtype(), lists.op(), [&](auto zero) {
    using T = decltype(zero);
    Task<T> task{};
    task.op = op, task.kind = static_cast<int>(kind);
    task.lists = lists.lists, task.n = lists.n;
    task.scores = in<T>(lists.scores());
    fill(task);
    run(task);
  });
}

#include "operators.h"

}  // namespace
}  // namespace ct::sortlet

STABLE_TORCH_LIBRARY_IMPL(ctorch, CPU, m) { CT_SORTLET_IMPLS(m) }
