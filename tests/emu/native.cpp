// Emulated kernels of native solves against the solution in closed form, and their gradient against
// its derivative: y_d' = -rate * own * y_d, all samples with their own number, one rate for all.
#include "cuda_emu.h"

#define CT_CUDA
#define CT_TOGETHER
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "native/cuda_kernels.h"

namespace {

using namespace ct::native;

struct Field {
  using real = double;
  using Matrices = MatrixList<>;
  using Products = ProductList<>;
  static constexpr long dim = 2, own = 1, shared = 1, work = 0, vjp_work = 0;
  template <class V>
  static void eval(V, const V* y, const V* own, const real* const* shared, V*, V* dy) {
    for (int d = 0; d < 2; ++d) dy[d] = -shared[0][0] * own[0] * y[d];
  }
  template <class V, class Sums>
  static void vjp(V, const V* y, const V* own, const real* const* shared, V*, const V* ct, V& ct_t,
                  V* ct_y, V* ct_own, const Sums* ct_shared) {
    ct_t = 0;
    for (int d = 0; d < 2; ++d) {
      ct_y[d] = -shared[0][0] * own[0] * ct[d];
      ct_own[0] += -shared[0][0] * y[d] * ct[d];
      ct_shared[0][0] += -own[0] * y[d] * ct[d];
    }
  }
};

struct Method {  // bosh3
  static constexpr int stages = 4, total = 4, degree = 3;
  static constexpr bool fsal = true, late = false;
  static constexpr double order = 3, c[] = {0, 0.5, 0.75, 1};
  static constexpr double a[][4] = {{}, {0.5}, {0, 0.75}, {2. / 9, 1. / 3, 4. / 9}};
  static constexpr double b[] = {2. / 9, 1. / 3, 4. / 9, 0};
  static constexpr double e[] = {-5. / 72, 1. / 12, 1. / 9, -1. / 8};
  static constexpr double p[][3] = {
      {1, -4. / 3, 5. / 9}, {0, 1, -2. / 3}, {0, 4. / 3, -8. / 9}, {0, -1, 1}};
  static constexpr int segments = 1;
  static constexpr long segment[] = {0, 2};
  static constexpr bool maximum = false, tolerances = false, pairs = false, gradient = false;
  using Norm = NoValues;
};

constexpr int64_t kBatch = kThreads + 7, kRows = 4;
constexpr int kBlocks = (kBatch + kThreads - 1) / kThreads;
constexpr double kRate = 0.8;
constexpr double kTimes[kRows] = {0, 0.3, 0.7, 1.1};

void solve(const Task* task) { solve_samples<Field, Method>(*task); }
void solve_together(const Task* task, JointMemory<Field, Method> memory) {
  solve_joint<Field, Method>(*task, memory);
}
void judge(const Task* task, JointMemory<Field, Method> memory) {
  judge_joint<Field, Method>(*task, memory);
}
void pull_back(const Task* task, const CudaCotangents* given) {
  pull_back_samples<Field, Method>(*task, *given);
}
// Products of a matrix with the inputs of a block's samples, and of its transpose with the outputs.
constexpr long kOutputs = 37, kInputs = 45;
constexpr const double* const* kNoneTurned = nullptr;
void multiply(const double* w, const double* b, const double* x, double* y, double* back) {
  const long sample = threadIdx.x;
  y += sample * kOutputs;
  linear<kOutputs, kInputs, kInputs, 1>(w, b, x + sample * kInputs, y, kNoneTurned);
  linear<kInputs, kOutputs, 1, kInputs, Sum::kAdd>(w, static_cast<const double*>(nullptr), y,
                                                   back + sample * kInputs, kNoneTurned);
}
// Sums over the block of outer products of outputs and inputs, but for those of sample 1; and of
// the outputs alone. A gradient and its transpose, and places that are added to more than once.
void sum_up(const double* u, const double* x, double* sums) {
  const long sample = threadIdx.x, size = kOutputs * kInputs;
  u += sample * kOutputs, x += sample * kInputs;
  Adder<double> adder(sums);
  adder.active = sample != 1;
  const BlockSums<double> to{sums, &adder};
  for (long o = 0; o < kOutputs; ++o) to[2 * size + o] += u[o];
  outer<kOutputs, kInputs, kInputs, 1>(u, x, to);
  for (long o = 0; o < kOutputs; ++o) to[2 * size + o / 2] += u[o];
  outer<kOutputs, kInputs, 1, kOutputs>(u, x, to + size);
  adder.flush();
}
void total(const CudaSums* sums) { add_up<double>(*sums); }

struct Solve {
  std::vector<double> y0 = std::vector<double>(kBatch * 2), own = std::vector<double>(kBatch);
  std::vector<double> out = std::vector<double>(kBatch * kRows * 2), last = y0;
  std::vector<int64_t> counts = std::vector<int64_t>(3 * kBatch), status = counts;
  double rate = kRate;
  const void* shared[1] = {&rate};
  Task task{};

  Solve() {
    last.resize(3 * kBatch);
    for (int64_t i = 0; i < kBatch; ++i) {
      own[i] = 0.5 + 0.01 * i;
      y0[2 * i] = 1 + 0.02 * i, y0[2 * i + 1] = -1.0 / (1 + i);
    }
    task.batch = kBatch, task.rows = kRows, task.t = kTimes, task.y0 = y0.data();
    task.out = out.data(), task.out_sample = 2 * kRows, task.out_row = 2, task.own = own.data();
    task.shared = shared, task.rtol = task.atol = 1e-5, task.i = 1, task.safety = 0.9;
    task.min_factor = 0.2, task.max_factor = 5, task.first_step = -1, task.max_step = 1;
    task.max_steps = 1e4, task.patience = 2000;
    task.counts = counts.data(), task.status = status.data(), task.last = last.data();
  }

  void run(bool joint) {
    if (!joint) return emu::launch(solve, kBlocks, kThreads, &task);
    JointState state{};
    std::vector<double> samples((2 + Method::total) * 2 * kBatch), partials(2 * kBlocks);
    const JointMemory<Field, Method> memory{&state, samples.data(), partials.data()};
    while (state.phase != kDone) {
      emu::launch(solve_together, kBlocks, kThreads, &task, memory);
      emu::launch(judge, 1, kThreads, &task, memory);
    }
  }
};

int failures = 0;

void expect(const char* what, int64_t i, double got, double wanted) {
  if (std::fabs(got - wanted) <= 2e-4 * (1 + std::fabs(wanted))) return;
  if (++failures < 10) std::printf("%s %ld: %.12g, not %.12g\n", what, i, got, wanted);
}

// launched: blocks add up in memory that is launched with them.
void check(bool joint, int64_t blocks, bool launched) {
  Solve first;
  std::vector<int64_t> accepted(kBatch), begins(kBatch + 1), again(kBatch);
  CudaTape tape{accepted.data(), nullptr, nullptr, nullptr};
  first.task.tape = &tape;
  first.run(joint);
  for (int64_t i = 0; i < kBatch; ++i) {
    for (int64_t r = 0; r < kRows; ++r)
      for (int d = 0; d < 2; ++d) {
        const double exact = first.y0[2 * i + d] * std::exp(-kRate * first.own[i] * kTimes[r]);
        expect("row", i, first.out[(i * kRows + r) * 2 + d], exact);
      }
    begins[i + 1] = begins[i] + accepted[i];
  }
  // the loss is the sum of all rows
  Solve second;
  std::vector<KeptStep> steps(begins[kBatch] + 1);
  std::vector<double> states(2 * steps.size()), ones(kBatch * kRows * 2, 1.0);
  CudaTape kept{again.data(), begins.data(), steps.data(), states.data()};
  second.task.tape = &kept;
  second.run(joint);
  for (int64_t i = 0; i < kBatch; ++i) expect("steps", i, again[i], accepted[i]);
  std::vector<double> y0(2 * kBatch), own(kBatch), times(kBatch * kRows), sums(blocks);
  const int64_t starts[] = {0, 1};
  const CudaCotangents given{ones.data(), y0.data(), own.data(), times.data(), kRows,  sums.data(),
                             blocks,      starts,    launched,   nullptr,      nullptr};
  CT_LAUNCH(pull_back, blocks, kThreads, launched * sizeof(double), nullptr, &second.task, &given);
  double rate = 0, exact_rate = 0;
  const CudaSums totals{blocks, 1, 1, sums.data(), &rate};
  emu::launch(total, 1, kThreads, &totals);
  for (int64_t i = 0; i < kBatch; ++i) {
    double decay = 0, slope = 0;
    for (double t : kTimes) {
      const double e = std::exp(-kRate * first.own[i] * t);
      decay += e, slope -= t * e;
    }
    const double y = first.y0[2 * i] + first.y0[2 * i + 1];
    for (int d = 0; d < 2; ++d) expect("gradient of y0", i, y0[2 * i + d], decay);
    expect("gradient of own", i, own[i], kRate * slope * y);
    double start = 0;
    for (int64_t r = 1; r < kRows; ++r) {
      const double wanted = -kRate * first.own[i] * y * std::exp(-kRate * first.own[i] * kTimes[r]);
      expect("gradient of a time", i, times[i * kRows + r], wanted);
      start -= wanted;
    }
    expect("gradient of the first time", i, times[i * kRows], start);
    exact_rate += first.own[i] * slope * y;
  }
  expect("gradient of the rate", 0, rate, exact_rate);
}

void check_products() {
  std::vector<double> w(kOutputs * kInputs), b(kOutputs), x(kThreads * kInputs);
  for (size_t i = 0; i < w.size(); ++i) w[i] = std::sin(0.7 * i);
  for (size_t i = 0; i < b.size(); ++i) b[i] = 0.1 * i;
  for (size_t i = 0; i < x.size(); ++i) x[i] = std::cos(1.1 * i);
  std::vector<double> y(kThreads * kOutputs), back(kThreads * kInputs, 3.0);
  emu::launch(multiply, 1, kThreads, w.data(), b.data(), x.data(), y.data(), back.data());
  for (long s = 0; s < kThreads; ++s) {
    for (long o = 0; o < kOutputs; ++o) {
      double sum = b[o];
      for (long i = 0; i < kInputs; ++i) sum += w[o * kInputs + i] * x[s * kInputs + i];
      expect("product", s, y[s * kOutputs + o], sum);
    }
    for (long i = 0; i < kInputs; ++i) {
      double sum = 3;
      for (long o = 0; o < kOutputs; ++o) sum += w[o * kInputs + i] * y[s * kOutputs + o];
      expect("transposed product", s, back[s * kInputs + i], sum);
    }
  }
  std::fill_n(y.begin() + kOutputs, kOutputs, NAN);
  std::fill_n(x.begin() + kInputs, kInputs, NAN);
  std::vector<double> sums(2 * w.size() + kOutputs);
  emu::launch(sum_up, 1, kThreads, y.data(), x.data(), sums.data());
  std::vector<double> exact(sums.size());
  for (long s = 0; s < kThreads; ++s)
    for (long o = 0; o < kOutputs && s != 1; ++o) {
      const double u = y[s * kOutputs + o];
      for (long i = 0; i < kInputs; ++i) {
        exact[o * kInputs + i] += u * x[s * kInputs + i];
        exact[w.size() + o + i * kOutputs] += u * x[s * kInputs + i];
      }
      exact[2 * w.size() + o] += u, exact[2 * w.size() + o / 2] += u;
    }
  for (size_t i = 0; i < sums.size(); ++i) expect("sum", i, sums[i], exact[i]);
}

}  // namespace

int main() {
  check_products();
  check(false, kBlocks, true);
  check(true, 1, false);
  std::printf(failures ? "%d failures\n" : "ok\n", failures);
  return failures ? EXIT_FAILURE : EXIT_SUCCESS;
}
