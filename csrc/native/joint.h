// Adaptive solves with one step for all samples: the error norm is over the whole batch.
#pragma once

#include <memory>

#include "rows.h"
#include "runs.h"
#include "tape.h"

namespace ct::native {

template <class Field, class Method, int W>
class Joint {
 public:
  using T = Tile<Field, Method, W>;
  using real = typename T::real;
  using V = typename T::V;
  using D = typename T::D;
  static constexpr long dim = T::dim;

  explicit Joint(const Task& task_) : task(task_), gains(task_, Method::order) {
    if (task.tape != nullptr) open_runs<real>(task, W);
    parts.resize((task.batch + W - 1) / W);
    for (size_t p = 0; p < parts.size(); ++p) {
      Part& part = parts[p];
      part.first = static_cast<int64_t>(p) * W;
      part.valid = static_cast<int>(std::min<int64_t>(W, task.batch - part.first));
      prepare_tile(task, part.tile, part.tolerances);
      for (int lane = 0; lane < W; ++lane) {
        load_sample(task, part.tile, part.tolerances, lane,
                    part.first + std::min(lane, part.valid - 1));
        set(part.counted, lane, lane < part.valid ? kYes : 0);
      }
    }
  }

  void run() {
    begin();
    int64_t status = kSuccess;
    if (output < task.rows) {
      start(last_goal - clock.tau);
      status = integrate();
    }
    finish(status);
  }

 protected:
  struct Part {
    T tile;
    typename T::Tolerances tolerances;
    Mask<V> counted;  // the other lanes repeat a sample
    int64_t first;
    int valid;
  };

  static constexpr auto kYes = static_cast<Number<Mask<V>>>(-1);

  // The clock, and the rows that are y0 itself.
  void begin() {
    const double first = task.t[0], last = task.t[task.rows - 1];
    clock = {};
    clock.direction = last < first ? -1 : 1;
    clock.tau = clock.direction * first;
    last_goal = clock.direction * last;
    clock.end = task.overshoot ? kInfinity : last_goal;
    clock.error = std::numeric_limits<double>::quiet_NaN();
    for (output = 0; output < task.rows && goal() <= clock.tau; ++output)
      for (Part& part : parts) write(part, part.tile.y);
    evaluations = 1;
  }

  double goal() const { return clock.direction * task.t[output]; }

  // ---- norms
  // -------------------------------------------------------------------------------------------------

  // Root mean square (or maximum) over all samples of scaled(part, d); the largest of the segments.
  template <class Scaled>
  double norm(const Scaled& scaled) {
    if constexpr (Method::Norm::count > 0) return own_norm(scaled);
    double totals[Method::segments] = {};
    for (Part& part : parts)
      for_constants<0, Method::segments>([&](auto s) {
        V total{};
        const auto here = [&](long d) { return scaled(part, d); };
        for (long e = Method::segment[s]; e < Method::segment[s + 1]; e += T::numbers)
          total = T::taken_in(total, here, e / T::numbers);
        total = select(part.counted, total, V{});
        if constexpr (Method::maximum)
          for (int lane = 0; lane < part.valid; ++lane)
            totals[s] = T::larger(totals[s], static_cast<double>(get(total, lane)));
        else
          totals[s] += sum(convert<D>(total));
      });
    double largest = 0;
    for (int s = 0; s < Method::segments; ++s) {
      const double count = static_cast<double>(task.batch) *
                           (Method::segment[s + 1] - Method::segment[s]) / T::numbers;
      if (count == 0) continue;
      const double size = Method::maximum ? totals[s] : std::sqrt(totals[s] / count);
      largest = T::larger(largest, size);
    }
    return static_cast<real>(largest);
  }

  // The norm that the user takes, of all samples.
  template <class Scaled>
  double own_norm(const Scaled& scaled) {
    ratio.resize(task.batch * dim);
    for (Part& part : parts)
      for (long d = 0; d < dim; ++d) {
        const V x = scaled(part, d);
        for (int lane = 0; lane < part.valid; ++lane)
          ratio[(part.first + lane) * dim + d] = get(x, lane);
      }
    real result;
    evaluate_values<typename Method::Norm, real>(0, ratio.data(), task.norm_shared, &result);
    return std::abs(result);
  }

  // ---- steps
  // -------------------------------------------------------------------------------------------------

  void start(double span) {
    const double t0 = clock.t();
    for (Part& part : parts) part.tile.evaluate(time(t0), part.tile.y, part.tile.k[0]);
    if (task.first_step >= 0 || span == 0) {
      clock.proposed = task.first_step >= 0 ? task.first_step : 0;
      return;
    }
    const auto scaled_norm = [&](const auto& of) {
      return norm([&](Part& part, long d) {
        return of(part.tile, d) / part.tolerances.scale(d, T::size_at(part.tile.y, d));
      });
    };
    const double d0 = scaled_norm([](T& tile, long d) { return tile.y[d]; });
    const double d1 = scaled_norm([](T& tile, long d) { return tile.k[0][d]; });
    const double h0 = first_guess(d0, d1, span), signed_h0 = clock.direction * h0;
    for (Part& part : parts) {
      T& tile = part.tile;
      for (long d = 0; d < dim; ++d)
        tile.at[d] = tile.y[d] + static_cast<real>(signed_h0) * tile.k[0][d];
      tile.evaluate(time(t0 + signed_h0), tile.at, tile.k[1]);
    }
    ++evaluations;
    const double d2 = scaled_norm([](T& tile, long d) { return tile.k[1][d] - tile.k[0][d]; }) / h0;
    clock.proposed = first_length(h0, d1, d2, span, Method::order);
  }

  int64_t integrate() {
    double mark = clock.tau;
    int64_t wild = 0, attempts = 0;
    while (output < task.rows) {
      if (attempts >= task.max_steps) return kMaxSteps;
      if (attempts > 0 && attempts % task.patience == 0) {
        if (wild > task.patience / 5 && clock.tau - mark < 1e-3 * (last_goal - clock.tau))
          return kNonfinite;
        mark = clock.tau, wild = 0;
      }
      clock.plan(task, true);
      if (!(clock.stop > clock.tau)) return clock.error < kInfinity ? kUnderflow : kNonfinite;
      ++attempts;
      step(wild);
    }
    return kSuccess;
  }

  void step(int64_t& wild) {
    if (!attempt(wild)) return;
    if (task.tape != nullptr) keep(rows_within(), clock.lands ? task.rows - 1 : kFree);
    if (goal() <= clock.stop) read(rows_within(), before_end());
    accept();
  }

  // The step that is planned; returns whether it is accepted.
  bool attempt(int64_t& wild) {
    const D start = all<D>(clock.t()), h = all<D>(clock.h());
    const V end_time = before_end(), length = convert<V>(h);
    make_room();
    for (Part& part : parts) part.tile.attempt(start, h, end_time);
    const double error = norm(
        [&](Part& part, long d) { return part.tile.scaled_error(part.tolerances, length, d); });
    wild += error < kInfinity ? 0 : 1;
    evaluations += T::evaluated - 1;
    if (!clock.judge(task, gains, true, error)) return false;
    if constexpr (Method::late) {
      ++evaluations;
      for (Part& part : parts) part.tile.evaluate_late(start, h, end_time);
    }
    return true;
  }

  // The time of stages at the end of a step: the number before it, in case the field jumps there.
  V before_end() const {
    return time(beside(static_cast<real>(clock.t1()), static_cast<real>(clock.t())));
  }

  void accept() {
    clock.tau = clock.stop;
    for (Part& part : parts)
      for (long d = 0; d < dim; ++d) {
        part.tile.y[d] = part.tile.y1[d];
        part.tile.k[0][d] = part.tile.k[T::stages - 1][d];
      }
  }

  // Where the evaluations of the next step are kept.
  void make_room() {
    if constexpr (kRecords<Field> && Method::gradient) {
      if (task.tape == nullptr) return;
      constexpr long size = T::stages * kRecord<Field>;
      V* room = reinterpret_cast<V*>(static_cast<Tape<real>*>(task.tape)->record(
          static_cast<size_t>(clock.accepted), parts.size() * size * sizeof(V)));
      for (size_t p = 0; p < parts.size(); ++p)
        parts[p].tile.records = room == nullptr ? nullptr : room + p * size;
    }
  }

  // The step, with the rows up to `row`, on what its end hangs, and whether the field jumps at its
  // start.
  void keep(int64_t row, int64_t anchor, bool jumped = false) {
    auto& runs = static_cast<Tape<real>*>(task.tape)->runs;
    for (auto& run : runs)
      for (int64_t sample = run.begin; sample < run.end; ++sample) {
        Part& part = parts[sample / W];
        real* to = run.add(sample, clock.t(), clock.h(), clock.t1(), anchor, output, row, dim);
        run.steps.back().jumped = jumped;
        for (long d = 0; d < dim; ++d)
          to[d] = get(part.tile.y[d], static_cast<int>(sample - part.first));
      }
  }

  // ---- rows
  // --------------------------------------------------------------------------------------------------

  // The row after the last one in the step.
  int64_t rows_within() const {
    int64_t row = output;
    while (row < task.rows && clock.direction * task.t[row] <= clock.stop) ++row;
    return row;
  }

  // The rows up to `end`, which lie in the step.
  void read(int64_t end, V end_time, bool extended = false) {
    for (; output < end; ++output) {
      const bool exact = goal() == clock.stop;
      if (!exact && !extended) {
        extend(end_time);
        extended = true;
      }
      if (!exact) interpolate(theta());
      for (Part& part : parts) write(part, exact ? part.tile.y1 : part.tile.at);
    }
  }

  // Where in the step the next row lies.
  double theta() const { return std::min((goal() - clock.tau) / (clock.stop - clock.tau), 1.0); }

  void extend(V end_time) {
    const D start = all<D>(clock.t()), h = all<D>(clock.h());
    for (Part& part : parts) part.tile.extend(start, h, end_time);
    evaluations += T::total - T::stages;
  }

  void interpolate(double theta) {
    const V length = all<V>(static_cast<real>(clock.h()));
    for (Part& part : parts) part.tile.interpolate(all<D>(theta), length);
  }

  void write(Part& part, const V* state) {
    for (int lane = 0; lane < part.valid; ++lane)
      store_sample<T>(task, state, lane, part.first + lane, output);
  }

  void finish(int64_t status) {
    bool finite = true;
    for (Part& part : parts)
      for (long d = 0; d < dim; ++d)
        for (int lane = 0; lane < part.valid; ++lane)
          finite &= std::isfinite(get(part.tile.y[d], lane));
    if (status != kMaxSteps && !finite) status = kNonfinite;
    task.counts[0] = evaluations;
    task.counts[task.batch] = static_cast<int64_t>(clock.accepted);
    task.counts[2 * task.batch] = static_cast<int64_t>(clock.attempts - clock.accepted);
    task.status[0] = status;
    task.last[0] = clock.t();
    task.last[task.batch] = clock.proposed;
    task.last[2 * task.batch] = clock.error;
    for (; output < task.rows; ++output)
      for (int64_t sample = 0; sample < task.batch; ++sample)
        std::fill_n(output_row<T>(task, sample, output), dim,
                    std::numeric_limits<real>::quiet_NaN());
  }

  CT_LANES static V time(double t) { return all<V>(static_cast<real>(t)); }

  const Task& task;
  const Gains gains;
  std::vector<Part> parts;
  std::vector<real> ratio;
  Clock<double> clock;
  double last_goal;
  int64_t output, evaluations;
};

// Returns whether it failed.
template <class Field, class Method, int W>
int64_t solve_joint(const Task& task) {
  Joint<Field, Method, W>(task).run();
  return task.status[0] != kSuccess;
}

}  // namespace ct::native
