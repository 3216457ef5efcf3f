// Adaptive solves with one step for all samples: the error norm is over the whole batch. Tiles of
// samples are divided among threads; what they add to a norm is added up in their order, so that
// the result is the same for any number of threads.
#pragma once

#include <time.h>

#include <optional>

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

  explicit Joint(const Task& task_)
      : task(task_), gains(task_, Method::order), alone(task_.threads < 2) {
    if (task.tape != nullptr) open_runs<real>(task, W);
    if (Method::Norm::count > 0) ratio.resize(task.batch * dim);
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
    double totals[Method::segments];
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
      for (const Part& part : parts) write(part, part.tile.y, output);
    evaluations = 1;
  }

  double goal() const { return clock.direction * task.t[output]; }

  // ---- threads
  // -----------------------------------------------------------------------------------------------

  // body(0), ..., body(count - 1), on the threads that there are.
  template <class Body>
  void divide(int64_t count, const Body& body) {
    if (team) return team->divide(count, body);
    for (int64_t i = 0; i < count; ++i) body(i);
  }

  template <class Body>
  void each(const Body& body) {
    // (a part of a small field takes no longer than handing it to a thread)
    const auto count = static_cast<int64_t>(parts.size()), pieces = std::min<int64_t>(count, 64);
    divide(pieces, [&](int64_t i) {
      const int64_t end = (i + 1) * count / pieces;
      for (int64_t p = i * count / pieces; p < end; ++p) body(parts[p]);
    });
  }

  // The same, for what takes most of a step. Some steps are made alone; then others are called
  // where there is enough to do, and sent away again where, the processors being busy, they hold it
  // up.
  template <class Body>
  void step_each(const Body& body) {
    if (alone) return each(body);
    const double begin = now();
    each(body);
    const double took = now() - begin;
    if (team) {
      lost += took - step_seconds;
      if (lost > kMostLost) team.reset();
      alone = !team;
    } else {
      step_seconds = std::min(step_seconds, took);
      if (--trials == 0) find_others();
    }
  }

  static double now() {  // seconds; without <chrono>, as Team is without <thread>
    timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
  }

  void find_others() {
    const double ahead = (clock.end - clock.tau) / clock.length * step_seconds;
    const double worth = std::min(step_seconds / kWorthThread, double(parts.size()));
    const int64_t count = std::min(task.threads, static_cast<int64_t>(worth));
    alone = count < 2 || ahead < kWorthTeam;
    if (!alone) team.emplace(count);
  }

  // Seconds of a step for which a thread is called: several times what the calls of it take; those
  // of a solve; and those that threads may cost in all. With CT_ALL_THREADS tests call them anyway.
#if defined(CT_ALL_THREADS)
  static constexpr double kWorthThread = 1e-12, kWorthTeam = 0, kMostLost = kInfinity;
#else
  static constexpr double kWorthThread = 2e-5, kWorthTeam = 2e-3, kMostLost = 2e-3;
#endif

  // ---- norms
  // -------------------------------------------------------------------------------------------------

  // Root mean square (or maximum) over all samples of scaled(part, d); the largest of the segments.
  template <class Scaled>
  double norm(const Scaled& scaled) {
    each([&](Part& part) { take_in(part, scaled); });
    return total_norm();
  }

  // The share of a part.
  template <class Scaled>
  void take_in(Part& part, const Scaled& scaled) {
    if constexpr (Method::Norm::count > 0) {
      for (long d = 0; d < dim; ++d) {
        const V x = scaled(part, d);
        for (int lane = 0; lane < part.valid; ++lane)
          ratio[(part.first + lane) * dim + d] = get(x, lane);
      }
      return;
    }
    for_constants<0, Method::segments>([&](auto s) {
      V total{};
      const auto here = [&](long d) { return scaled(part, d); };
      for (long e = Method::segment[s]; e < Method::segment[s + 1]; e += T::numbers)
        total = T::taken_in(total, here, e / T::numbers);
      total = select(part.counted, total, V{});
      part.totals[s] = 0;
      if constexpr (Method::maximum)
        for (int lane = 0; lane < part.valid; ++lane)
          part.totals[s] = T::larger(part.totals[s], static_cast<double>(get(total, lane)));
      else
        part.totals[s] = sum(convert<D>(total));
    });
  }

  // Of all shares.
  double total_norm() const {
    if constexpr (Method::Norm::count > 0) {
      real result;
      evaluate_values<typename Method::Norm, real>(0, ratio.data(), task.norm_shared, &result);
      return std::abs(result);
    }
    double largest = 0;
    for (int s = 0; s < Method::segments; ++s) {
      const double count = static_cast<double>(task.batch) *
                           (Method::segment[s + 1] - Method::segment[s]) / T::numbers;
      if (count == 0) continue;
      double total = 0;
      for (const Part& part : parts)
        total = Method::maximum ? T::larger(total, part.totals[s]) : total + part.totals[s];
      largest = T::larger(largest, Method::maximum ? total : std::sqrt(total / count));
    }
    return static_cast<real>(largest);
  }

  // ---- steps
  // -------------------------------------------------------------------------------------------------

  void start(double span) {
    const double t0 = clock.t();
    each([&](Part& part) { part.tile.evaluate(time(t0), part.tile.y, part.tile.k[0]); });
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
    each([&](Part& part) {
      T& tile = part.tile;
      for (long d = 0; d < dim; ++d)
        tile.at[d] = tile.y[d] + static_cast<real>(signed_h0) * tile.k[0][d];
      tile.evaluate(time(t0 + signed_h0), tile.at, tile.k[1]);
    });
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
        if (wild > task.patience / 5 && clock.tau - mark < 1e-3 * (last_goal - clock.tau)) {
          clock.error = std::numeric_limits<double>::quiet_NaN();
          return kNonfinite;
        }
        mark = clock.tau, wild = 0;
      }
      clock.plan(task);
      if (!(clock.stop > clock.tau)) return why_stuck();
      ++attempts;
      step(wild);
    }
    return kSuccess;
  }

  // Whether the slope at the start of the step is finite.
  bool has_slope() const {
    for (const Part& part : parts)
      for (long d = 0; d < dim; ++d)
        for (int lane = 0; lane < part.valid; ++lane)
          if (!std::isfinite(get(part.tile.k[0][d], lane))) return false;
    return true;
  }

  int64_t why_stuck() const {
    if (!has_slope()) return kNonfinite;
    if (!(clock.length < kInfinity && clock.tau < kInfinity)) return kMaxSteps;
    // (before the first attempt there is no error)
    return clock.error < kInfinity || clock.attempts == 0 ? kUnderflow : kNonfinite;
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
    step_each([&](Part& part) {
      part.tile.attempt(start, h, end_time);
      take_in(part, [&](Part& p, long d) { return p.tile.scaled_error(p.tolerances, length, d); });
    });
    const double error = total_norm();
    wild += error < kInfinity ? 0 : 1;
    evaluations += T::evaluated - 1;
    if (!clock.judge(task, gains, error)) return false;
    if constexpr (Method::late) {
      ++evaluations;
      each([&](Part& part) { part.tile.evaluate_late(start, h, end_time); });
    }
    return true;
  }

  // The time of stages at the end of a step: the number before it, in case the field jumps there.
  V before_end() const {
    return time(beside(static_cast<real>(clock.t1()), static_cast<real>(clock.t())));
  }

  void accept() {
    clock.tau = clock.stop;
    each([](Part& part) {
      for (long d = 0; d < dim; ++d) {
        part.tile.y[d] = part.tile.y1[d];
        part.tile.k[0][d] = part.tile.k[T::stages - 1][d];
      }
    });
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
    divide(static_cast<int64_t>(runs.size()), [&](int64_t i) {
      auto& run = runs[i];
      for (int64_t sample = run.begin; sample < run.end; ++sample) {
        Part& part = parts[sample / W];
        real* to = run.add(sample, clock.t(), clock.h(), clock.t1(), anchor, output, row, dim);
        run.steps.back().jumped = jumped;
        for (long d = 0; d < dim; ++d)
          to[d] = get(part.tile.y[d], static_cast<int>(sample - part.first));
      }
    });
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
    int64_t inside = output;  // the rows from here on are its end
    while (inside < end && clock.direction * task.t[inside] != clock.stop) ++inside;
    if (inside > output && !extended) extend(end_time);
    const V length = all<V>(static_cast<real>(clock.h()));
    each([&](Part& part) {
      for (int64_t row = output; row < inside; ++row) {
        part.tile.interpolate(all<D>(theta(row)), length);
        write(part, part.tile.at, row);
      }
      for (int64_t row = inside; row < end; ++row) write(part, part.tile.y1, row);
    });
    output = end;
  }

  // Where in the step a row lies.
  double theta(int64_t row) const {
    return std::min((clock.direction * task.t[row] - clock.tau) / (clock.stop - clock.tau), 1.0);
  }

  void extend(V end_time) {
    const D start = all<D>(clock.t()), h = all<D>(clock.h());
    each([&](Part& part) { part.tile.extend(start, h, end_time); });
    evaluations += T::total - T::stages;
  }

  void interpolate(double theta) {
    const V length = all<V>(static_cast<real>(clock.h()));
    each([&](Part& part) { part.tile.interpolate(all<D>(theta), length); });
  }

  void write(const Part& part, const V* state, int64_t row) const {
    for (int lane = 0; lane < part.valid; ++lane)
      store_sample<T>(task, state, lane, part.first + lane, row);
  }

  void finish(int64_t status) {
    bool finite = true;
    for (Part& part : parts)
      for (long d = 0; d < dim; ++d)
        for (int lane = 0; lane < part.valid; ++lane)
          finite &= std::isfinite(get(part.tile.y[d], lane));
    if (status != kMaxSteps && !finite) status = kNonfinite;
    find_worst(status);
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

  // Of which number the error was the largest where the steps came to nothing.
  void find_worst(int64_t status) {
    if (task.worst == nullptr) return;
    task.worst[0] = kUnknown;
    if ((status != kUnderflow && status != kNonfinite) || !(clock.attempts > clock.accepted))
      return;
    double largest = -1;
    for (const Part& part : parts)
      for (int lane = 0; lane < part.valid; ++lane) {
        int64_t number;
        const double error = part.tile.largest_error(part.tolerances, lane, number);
        if (error > largest) largest = error, task.worst[0] = (part.first + lane) * dim + number;
      }
    if (!has_slope()) task.worst[0] = kNoSlope;
  }

  CT_LANES static V time(double t) { return all<V>(static_cast<real>(t)); }

  const Task& task;
  const Gains gains;
  std::vector<Part> parts;
  std::vector<real> ratio;
  Clock<double> clock;
  double last_goal;
  int64_t output, evaluations;
  std::optional<Team> team;
  bool alone;                       // there are no other threads, nor will there be
  int trials = 3;                   // steps until that is known
  double step_seconds = kInfinity;  // alone
  double lost = 0;                  // seconds, to those who should have helped
};

// Returns whether it failed.
template <class Field, class Method, int W>
int64_t solve_joint(const Task& task) {
  Joint<Field, Method, W>(task).run();
  return task.status[0] != kSuccess;
}

}  // namespace ct::native
