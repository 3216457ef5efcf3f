// The sortlet kernels of CUDA, run on the CPU and compared with one list at a time.
#include "cuda_emu.h"
//
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "sortlet/cuda_kernels.h"
#include "sortlet/rows.h"

using namespace ct::sortlet;

namespace {

constexpr int64_t kRows = 2;

int failures = 0;

void expect_close(const char* what, int64_t n, double actual, double expected) {
  const bool both_nan = actual != actual && expected != expected;
  if (both_nan || actual == expected) return;
  if (std::fabs(actual - expected) <= 1e-10 * (1 + std::fabs(expected))) return;
  std::printf("%s of %lld scores: got %.17g, expected %.17g\n", what, static_cast<long long>(n),
              actual, expected);
  ++failures;
}

// Shuffled scores with gaps of about one; how list number k goes wrong is told by k.
struct Lists {
  Lists(int64_t lists_, int64_t n_, int kind_) : lists(lists_), n(n_), kind(kind_) {
    for (int64_t i = 0; i < lists * n; ++i)
      scores.push_back(static_cast<double>((i % n) * 7919 % prime(n)) + 0.3 * std::sin(3.0 * i));
    for (int64_t k = 0; k < lists && n > 0; ++k) {
      double* list = &scores[k * n];
      if (k == 1 && n > 2) list[n - 1] = list[1];
      if (k == 2 && n > 3) list[0] = list[n - 1], list[2] = list[1];
      if (k == 3 && n > 3) list[0] = list[n - 1] = list[1];
      if (k == 4) list[n / 2] = NAN;
      if (k == 5 && n > 2) list[0] = INFINITY, list[1] = -INFINITY;
      if (k == 6 && n > 1) list[0] = -0.0, list[1] = 0.0;
      if (k == 7 && n > 1) list[0] = 1e-200, list[1] = 0;
    }
    for (int64_t i = 0; i < kRows * lists * n; ++i) jacobian.push_back(std::sin(1.0 + 0.7 * i));
    for (int64_t i = 0; i < lists * n; ++i) wide.push_back(std::sin(2.0 + 0.9 * i));
    for (int64_t i = 0; i < lists; ++i) narrow.push_back(std::cos(1.0 + i) - 0.3 * n);
  }

  static int64_t prime(int64_t n) { return n < 7919 ? 7927 : 1000003; }

  Task<double> task(Op op, std::vector<std::vector<double>>& results) {
    results.clear();
    for (int i = 0; i < 6; ++i) results.emplace_back(lists, -7.0);
    results.emplace_back(lists * n, -7.0);
    results.emplace_back(kRows * lists, -7.0);
    Task<double> task{};
    task.op = op, task.kind = kind, task.lists = lists, task.n = n, task.rows = kRows;
    task.scores = scores.data(), task.shift = task.g = task.u = narrow.data();
    task.v = task.lap = wide.data(), task.jacobian = jacobian.data();
    task.sign = results[0].data(), task.logabs = results[1].data();
    task.of_shift = results[2].data(), task.of_g = results[3].data();
    task.of_log = results[4].data(), task.of_ratio = results[5].data();
    task.of_scores = results[6].data(), task.slopes = results[7].data();
    return task;
  }

  int64_t lists, n;
  int kind;
  std::vector<double> scores, jacobian, wide, narrow;
};

// Long lists, sorted once for all operators.
struct Sort {
  explicit Sort(const Lists& lists)
      : key(2 * lists.lists * lists.n),
        scratch(lists.lists * lists.n),
        index(2 * lists.lists * lists.n),
        swaps(lists.lists, 99) {
    task.scores = lists.scores.data(), task.lists = lists.lists, task.n = lists.n;
    task.key = key.data(), task.next_key = task.key + lists.lists * lists.n;
    task.index = index.data(), task.next_index = task.index + lists.lists * lists.n;
    task.swaps = swaps.data();
    const unsigned tiles = static_cast<unsigned>((lists.n + kTile - 1) / kTile);
    CT_LAUNCH(clear_kernel<unsigned long long>, 1, kThreads, 0, nullptr, task.swaps, lists.lists);
    CT_LAUNCH(tile_kernel<double>, dim3(tiles, 2), kThreads, 0, nullptr, task);
    for (int64_t width = kTile; width < lists.n; width *= 2) {
      CT_LAUNCH(merge_kernel<double>, dim3(2, 2), kThreads, 0, nullptr, task, width);
      std::swap(task.key, task.next_key);
      std::swap(task.index, task.next_index);
    }
  }

  SortTask<double> task{};
  std::vector<double> key, scratch;
  std::vector<int32_t> index;
  std::vector<unsigned long long> swaps;
};

void serial(const Task<double>& task) {
  Workspace<double> work;
  for (int64_t k = 0; k < task.lists; ++k) {
    if (task.op == kTerm) {
      task.sign[k] = known_term(task, k);
    } else if (task.kind == kTanh) {
      Row<double, kTanh>(task, k, work);
    } else {
      Row<double, kLinear>(task, k, work);
    }
  }
}

void check(int64_t count, int64_t n, int kind, std::vector<Op> ops = {}) {
  Lists lists(count, n, kind);
  if (ops.empty())
    ops = {kLog, kGradient, kHessian, kLaplacian, kTermGradient, kTermHessian, kTermLaplacian};
  const bool is_long = n > kShort;
  std::unique_ptr<Sort> sort = is_long ? std::make_unique<Sort>(lists) : nullptr;
  for (const Op op : ops) {
    std::vector<std::vector<double>> actual, expected;
    const Task<double> task = lists.task(op, actual);
    if (op == kTerm) {
      CT_LAUNCH(term_kernel<double>, 2, kThreads, 0, nullptr, task);
    } else if (is_long) {
      CT_LAUNCH(long_kernel<double>, 2, kThreads, 0, nullptr, task, sort->task.key,
                sort->task.index, sort->scratch.data(), sort->task.swaps);
    } else {
      CT_LAUNCH(short_kernel<double>, 1, kThreads, 0, nullptr, task);
    }
    serial(lists.task(op, expected));
    for (size_t r = 0; r < actual.size(); ++r)
      for (size_t i = 0; i < actual[r].size(); ++i)
        expect_close("result", n, actual[r][i], expected[r][i]);
  }
}

}  // namespace

int main() {
#ifdef EMU_WITHOUT_BARRIER
  check(2, 70, kLinear, {kGradient});  // others would hang: threads take ways that sums tell
  return EXIT_SUCCESS;
#endif
  check(9, 5, kLinear, {kTerm});
  for (const int64_t n : {0, 2, 33}) check(9, n, kLinear);
  for (const int64_t n : {1, 3, 64}) check(5, n, kLinear, {kLog, kTermHessian});
  check(5, 20, kTanh);
  check(8, 150, kLinear);
  check(3, 70, kTanh, {kLaplacian, kTermHessian});
  check(2, 2 * kTile + 300, kLinear, {kLog});
  if (failures == 0) std::puts("ok");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
