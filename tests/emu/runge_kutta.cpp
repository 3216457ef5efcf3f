// The Runge-Kutta kernels of CUDA, run on the CPU and compared with serial loops.
#include "cuda_emu.h"
//
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "runge_kutta/cuda_kernels.h"

using namespace ct::rk;

namespace {

constexpr int kThreadsHere = 64;  // two warps
constexpr int kStages = 5;

int failures = 0;

void expect_close(const char* what, double actual, double expected) {
  const bool both_nan = actual != actual && expected != expected;
  if (both_nan || std::fabs(actual - expected) <= 1e-12 * (1 + std::fabs(expected))) return;
  std::printf("%s: got %.17g, expected %.17g\n", what, actual, expected);
  ++failures;
}

std::vector<double> numbers(int64_t count, int seed) {
  std::vector<double> x(count);
  for (int64_t i = 0; i < count; ++i) x[i] = std::sin(1.0 + 0.7 * static_cast<double>(i) + seed);
  return x;
}

struct Problem {
  Problem(int64_t batch_, int64_t row_)
      : batch(batch_),
        row(row_),
        n(batch_ * row_),
        y(numbers(n, 1)),
        y1(numbers(n, 2)),
        k(numbers(kStages * n, 3)),
        fresh(numbers(n, 4)),
        h(numbers(batch_, 5)),
        rtol(numbers(n, 6)),
        out(n) {
    for (double& x : rtol) x = 0.1 + x * x;
  }

  // Every stage but the second; the last one is the slope that is on its way.
  Terms<double, double> terms(double scale) {
    Terms<double, double> t;
    for (int j = 0; j < kStages; ++j)
      if (j != 1)
        t.row[t.count] = j == kStages - 1 ? fresh.data() : &k[j * n],
        t.coefficient[t.count++] = scale * (j + 1);
    return t;
  }

  double sum(int64_t i, double scale) {
    double total = 0;
    for (int j = 0; j < kStages; ++j)
      if (j != 1) total += scale * (j + 1) * (j == kStages - 1 ? fresh[i] : k[j * n + i]);
    return total;
  }

  Step steps() { return Step{h.data(), 1, 0}; }

  void expect_slope_stored(const char* what) {
    for (int64_t i = 0; i < n; ++i) expect_close(what, k[(kStages - 1) * n + i], fresh[i]);
  }

  int64_t batch, row, n;
  std::vector<double> y, y1, k, fresh, h, rtol, out;
};

template <int kWidth>
void check_combine(int64_t batch, int64_t row) {
  Problem p(batch, row);
  CombineTask<double, double> task{
      p.terms(0.3), p.steps(), p.y.data(), p.out.data(), p.fresh.data(), &p.k[(kStages - 1) * p.n],
      p.n,          row};
  CT_LAUNCH((combine_kernel<kWidth, double, double>), 2, kThreadsHere, 0, nullptr, task);
  for (int64_t i = 0; i < p.n; ++i)
    expect_close("combine", p.out[i], p.y[i] + p.h[i / row] * p.sum(i, 0.3));
  p.expect_slope_stored("combine, stored slope");
}

struct NormCase {
  bool per_sample, maximum, step;
  std::vector<int64_t> segments;
};

double serial_norm(Problem& p, const NormCase& c, int64_t begin) {
  double norm = 0;
  for (int64_t length : c.segments) {
    double total = 0;
    for (int64_t i = begin; i < begin + length; ++i) {
      const double h = p.h[i / p.row], y1 = c.step ? p.y[i] + h * p.sum(i, 0.3) : p.y1[i];
      const double ratio = scaled_error(h * p.sum(i, 0.1), p.y[i], y1, p.rtol[i], 1e-2);
      total = c.maximum ? larger(total, std::fabs(ratio)) : total + ratio * ratio;
    }
    norm = larger(
        norm, c.maximum || length == 0 ? total : std::sqrt(total / static_cast<double>(length)));
    begin += length;
  }
  return norm;
}

void launch_norm(const ErrorTask<double>& task, const Segments& segments, double* out) {
  const int64_t units = segments.units;
  if (segments.unit_length <= 48) {
    for (int lanes : {1, 4, 32}) {
      const unsigned blocks =
          static_cast<unsigned>((units * lanes + kThreadsHere - 1) / kThreadsHere);
      CT_LAUNCH(lanes_norm_kernel<double>, blocks, kThreadsHere, 0, nullptr, task, segments, out,
                lanes);
    }
  } else if (segments.unit_length <= kPiece) {
    CT_LAUNCH(block_norm_kernel<double>, static_cast<unsigned>(units), kThreadsHere, 0, nullptr,
              task, segments, out);
  } else {
    int64_t pieces = 0;
    for (int s = 0; s < segments.count; ++s) pieces += pieces_of(segments.length[s]);
    std::vector<double> partial(units * pieces);
    const unsigned blocks = static_cast<unsigned>(units * pieces);
    CT_LAUNCH(piece_kernel<double>, blocks, kThreadsHere, 0, nullptr, task, segments,
              partial.data(), pieces);
    CT_LAUNCH(join_kernel<double>, static_cast<unsigned>(units), kThreadsHere, 0, nullptr,
              partial.data(), segments, out, pieces, task.maximum);
  }
}

void check_norm(int64_t batch, int64_t row, const NormCase& c, int64_t nan_at = -1) {
  Problem p(batch, row);
  if (nan_at >= 0) p.k[nan_at] = NAN;
  ErrorTask<double> task{};
  task.error = p.terms(0.1), task.solution = p.terms(0.3), task.step = p.steps();
  task.rtol.data = p.rtol.data(), task.atol.value = 1e-2;
  task.y = p.y.data(), task.y1 = p.y1.data(), task.new_state = c.step ? p.out.data() : nullptr;
  task.fresh = p.fresh.data(), task.slot = &p.k[(kStages - 1) * p.n];
  task.row = row, task.maximum = c.maximum;
  const int64_t units = c.per_sample ? batch : 1;
  std::vector<double> norm(units, -1), expected(units);
  for (int64_t u = 0; u < units; ++u) expected[u] = serial_norm(p, c, u * (p.n / units));
  // The first segment in a launch of its own, as when there are more segments than one launch
  // takes.
  Segments segments{units, p.n / units, 0, {c.segments[0]}, 1, true};
  launch_norm(task, segments, norm.data());
  segments.begin = c.segments[0], segments.count = static_cast<int>(c.segments.size()) - 1;
  segments.first_launch = false;
  for (int s = 0; s < segments.count; ++s) segments.length[s] = c.segments[s + 1];
  if (segments.count > 0) launch_norm(task, segments, norm.data());
  for (int64_t u = 0; u < units; ++u) expect_close("norm", norm[u], expected[u]);
  p.expect_slope_stored("norm, stored slope");
  if (!c.step) return;
  for (int64_t i = 0; i < p.n; ++i)
    expect_close("new state", p.out[i], p.y[i] + p.h[i / row] * p.sum(i, 0.3));
}

void check_norms() {
  for (bool maximum : {false, true})
    for (bool step : {false, true}) {
      check_norm(7, 5, {true, maximum, step, {5}});
      check_norm(3, 41, {true, maximum, step, {11, 0, 30}});
      check_norm(2, 300, {true, maximum, step, {130, 170}});
      check_norm(5, 70, {false, maximum, step, {350}});
      check_norm(1, 3 * kPiece + 100, {false, maximum, step, {5, kPiece + 1, 0, 2 * kPiece, 94}});
    }
  for (bool maximum : {false, true})
    for (int64_t at : {0, 33, 149}) check_norm(3, 50, {false, maximum, false, {100, 50}}, at);
}

DenseTask<double> dense_task(Problem& p, const std::vector<double>& theta,
                             std::vector<double>& out) {
  DenseTask<double> task{};
  task.count = kStages, task.degree = 3;
  for (int j = 0; j < kStages; ++j) {
    task.row[j] = &p.k[j * p.n];
    for (int m = 0; m < task.degree; ++m)
      task.weights[j * task.degree + m] = 0.1 * j - 0.2 * m + 0.05;
  }
  task.theta = theta.data(), task.step = p.steps(), task.y = p.y.data(), task.out = out.data();
  task.samples = p.batch, task.queries = static_cast<int64_t>(theta.size());
  task.numel = p.n, task.row_length = p.row;
  return task;
}

double serial_dense(Problem& p, const DenseTask<double>& task, double theta, int64_t i) {
  double sum = 0;
  for (int j = 0; j < kStages; ++j) {
    double power = 1, weight = 0;
    for (int m = 0; m < task.degree; ++m)
      weight += task.weights[j * task.degree + m] * (power *= theta);
    sum += weight * p.k[j * p.n + i];
  }
  return p.y[i] + p.h[i / p.row] * sum;
}

void check_dense() {
  Problem p(4, 13);
  const std::vector<double> theta = numbers(2 * kTile + 3, 9);
  const int64_t queries = static_cast<int64_t>(theta.size());
  std::vector<double> out(queries * p.n);
  const DenseTask<double> task = dense_task(p, theta, out);
  for (const dim3 grid : {dim3(1, 1), dim3(2, 3)}) {
    std::fill(out.begin(), out.end(), 0.0);
    CT_LAUNCH(dense_kernel<double>, grid, kThreadsHere, 0, nullptr, task);
    for (int64_t q = 0; q < queries; ++q)
      for (int64_t i = 0; i < p.n; ++i)
        expect_close("dense", out[q * p.n + i], serial_dense(p, task, theta[q], i));
  }
  std::vector<double> rows(queries * p.row);
  std::vector<int64_t> sample(queries);
  for (int64_t q = 0; q < queries; ++q)
    sample[q] = q == 5 ? 4 : q == 6 ? -1 : q * 3 % 4;  // two do not exist
  DenseTask<double> of_samples = dense_task(p, theta, rows);
  of_samples.sample = sample.data();
  CT_LAUNCH(dense_samples_kernel<double>, 2, kThreadsHere, 0, nullptr, of_samples);
  for (int64_t at = 0; at < queries * p.row; ++at) {
    const int64_t q = at / p.row;
    const bool exists = sample[q] >= 0 && sample[q] < p.batch;
    const int64_t i = sample[q] * p.row + at % p.row;
    expect_close("dense, of samples", rows[at], exists ? serial_dense(p, task, theta[q], i) : NAN);
  }
}

// Samples of a batch that is under way; one in five is done.
struct Batch {
  explicit Batch(int64_t size_)
      : size(size_),
        samples(numbers(kSampleRows * size_, 1)),
        error(numbers(size_, 2)),
        goals(4 * size_),
        counts(kCountRows * size_),
        step(kStepRows * size_),
        times(2 * size_) {
    for (int64_t i = 0; i < size; ++i) {
      double* sample = &samples[i];
      sample[kLength * size] = 0.02 * (i % 7), sample[kDirection * size] = i % 2 == 0 ? 1 : -1;
      sample[kEnd * size] = sample[kTau * size] + 0.1;
      error[i] = i % 11 == 0 ? NAN : 2 * std::fabs(error[i]);
      for (int j = 0; j < 4; ++j) goals[4 * i + j] = sample[kTau * size] + 0.1 / 3 * j;
      counts[kOutput * size + i] = 1;
      counts[kFate * size + i] = i % 5 == 0 ? kDone : kRunning;
    }
  }

  PlanTask<double> plan() {
    return {samples.data(), counts.data(), {0.5, 1},    2,     0.01,
            0.08,           size,          step.data(), lands, times.data()};
  }

  JudgeTask<double> judge() {
    return {samples.data(),
            counts.data(),
            step.data(),
            lands,
            error.data(),
            goals.data(),
            {-0.14, 0.08, 0, 0.9, 0.2, 10, false, false},
            0.01,
            0.08,
            1e6,
            size,
            4,
            moved};
  }

  void expect_equal(const char* what, const Batch& other) const {
    for (size_t i = 0; i < samples.size(); ++i) expect_close(what, samples[i], other.samples[i]);
    for (size_t i = 0; i < counts.size(); ++i)
      expect_close(what, static_cast<double>(counts[i]), static_cast<double>(other.counts[i]));
    for (size_t i = 0; i < step.size(); ++i) expect_close(what, step[i], other.step[i]);
    for (size_t i = 0; i < times.size(); ++i) expect_close(what, times[i], other.times[i]);
    for (int64_t i = 0; i < size; ++i) expect_close(what, moved[i], other.moved[i]);
  }

  int64_t size;
  std::vector<double> samples, error, goals;
  std::vector<int64_t> counts;
  std::vector<double> step, times;
  bool lands[1000] = {}, moved[1000] = {};
};

void check_control(int64_t size) {
  Batch parallel(size), serial(size);
  unsigned long long flags[kFlagEntries] = {};
  int64_t expected[kFlagEntries] = {};
  CT_LAUNCH(plan_kernel<double>, 2, kThreadsHere, 0, nullptr, parallel.plan());
  CT_LAUNCH(judge_kernel<double>, 3, kThreadsHere, 0, nullptr, parallel.judge(), &flags[0]);
  for (int64_t i = 0; i < size; ++i) plan_sample(serial.plan(), i);
  for (int64_t i = 0; i < size; ++i) {
    const Found found = judge_sample(serial.judge(), i);
    expected[kBits] |= found.bits, expected[kPassed] += found.passed;
  }
  parallel.expect_equal("step control", serial);
  for (int entry = 0; entry < kFlagEntries; ++entry)
    expect_close("flags", static_cast<double>(flags[entry]), static_cast<double>(expected[entry]));
}

void check_accept() {
  Problem p(7, 50);
  std::vector<double> next(p.n);
  const bool moved[] = {true, false, false, true, true, false, true};
  CT_LAUNCH(accept_kernel<double>, 2, kThreadsHere, 0, nullptr,
            AcceptTask<double>{moved, p.y.data(), p.y1.data(), p.fresh.data(), p.rtol.data(),
                               p.out.data(), next.data(), 7, 50});
  for (int64_t i = 0; i < p.n; ++i) {
    expect_close("accepted state", p.out[i], moved[i / 50] ? p.y1[i] : p.y[i]);
    expect_close("accepted slope", next[i], moved[i / 50] ? p.rtol[i] : p.fresh[i]);
  }
}

}  // namespace

int main() {
  check_combine<1>(3, 50);
  check_combine<2>(3, 50);
  check_norms();
  check_dense();
  for (int64_t size : {1, 63, 700}) check_control(size);
  check_accept();
  if (failures == 0) std::puts("ok");
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
