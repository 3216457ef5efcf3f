// Solves with given steps, the same for all samples: tiles are independent of each other.
#pragma once

#include "rows.h"

#if !defined(CT_CUDA)
#include <algorithm>

#include "owned.h"
#include "runs.h"
#endif

namespace ct::native {

// Kept: where the steps are kept for the gradient.
template <class Field, class Method, int W, class Kept>
class Fixed {
 public:
  using T = Tile<Field, Method, W>;
  using real = typename T::real;
  using V = typename T::V;
  using D = typename T::D;
  static constexpr long dim = T::dim;

  CT_LANES explicit Fixed(const Task& task_, Kept* kept_) : task(task_), kept(kept_) {}

  // The samples first, ..., first + valid - 1.
  CT_LANES void run(int64_t first_, int valid_) {
    first = first_, valid = valid_, output = 0, accepted = 0, evaluations = 1;
    prepare_tile(task, tile, tolerances);
    for (int lane = 0; lane < W; ++lane)
      load_sample(task, tile, tolerances, lane, first + std::min(lane, valid - 1));
    direction = task.t[task.rows - 1] < task.t[0] ? -1 : 1;
    for (; output < task.rows && task.t[output] == task.t[0]; ++output) write(tile.y);
    int64_t status = kSuccess;
    double t = task.knots[0];
    for (int64_t i = 1; i < task.knot_count && output < task.rows; ++i) {
      if (accepted >= task.max_steps) {
        status = kMaxSteps;
        break;
      }
      step(t, task.knots[i], task.anchors[i]);
      t = task.knots[i];
    }
    finish(status, t);
  }

 private:
  CT_LANES void step(double t, double t1, int64_t anchor) {
    const D start = all<D>(t), h = all<D>(t1 - t);
    const real begin = static_cast<real>(t), end = static_cast<real>(t1);
    const V first_time = all<V>(task.perturb ? beside(begin, end) : begin);
    const V end_time = all<V>(task.perturb ? beside(end, begin) : end);
    tile.evaluate(first_time, tile.y, tile.k[0]);
    tile.attempt(start, h, end_time);
    evaluations = T::stages + (accepted == 0 ? 0 : evaluations);
    ++accepted;
    if (kept != nullptr) keep(t, t1, anchor);
    bool extended = false;
    const double tau = direction * t, tau1 = direction * t1;
    for (double goal; output < task.rows && (goal = direction * task.t[output]) <= tau1; ++output) {
      if (goal == tau1) {
        write(tile.y1);
        continue;
      }
      if (!extended) {
        tile.extend(start, h, end_time);
        evaluations += T::total - T::stages;
        extended = true;
      }
      tile.interpolate(all<D>(std::min((goal - tau) / (tau1 - tau), 1.0)), convert<V>(h));
      write(tile.at);
    }
    for_each<dim>([&](long d) __attribute__((always_inline)) { tile.y[d] = tile.y1[d]; });
  }

  CT_LANES void keep(double t, double t1, int64_t anchor) {
    int64_t row = output;
    while (row < task.rows && direction * task.t[row] <= direction * t1) ++row;
    for (int lane = 0; lane < valid; ++lane) {
      real* to = kept->add(first + lane, t, t1 - t, t1, anchor, output, row, dim);
      for (long d = 0; d < dim; ++d) to[d] = get(tile.y[d], lane);
    }
  }

  CT_LANES void write(const V* state) {
    for (int lane = 0; lane < valid; ++lane)
      store_sample<T>(task, state, lane, first + lane, output);
  }

  CT_LANES void finish(int64_t status, double t) {
    for (int lane = 0; lane < valid; ++lane) {
      const int64_t i = first + lane;
      bool finite = true;
      for (long d = 0; d < dim; ++d) finite &= std::isfinite(get(tile.y[d], lane));
      task.counts[i] = evaluations;
      task.counts[task.batch + i] = accepted;
      task.counts[2 * task.batch + i] = 0;
      task.status[i] = status == kSuccess && !finite ? kNonfinite : status;
      if (task.worst != nullptr) task.worst[i] = kUnknown;
      task.last[i] = t;
      task.last[task.batch + i] = task.last[2 * task.batch + i] =
          std::numeric_limits<double>::quiet_NaN();
    }
    for (; output < task.rows; ++output)
      for (int lane = 0; lane < valid; ++lane)
        for (long d = 0; d < dim; ++d)
          output_row<T>(task, first + lane, output)[d] = std::numeric_limits<real>::quiet_NaN();
  }

  const Task& task;
  Kept* const kept;
  T tile;
  typename T::Tolerances tolerances;
  double direction;
  int64_t first, output, accepted, evaluations;
  int valid;
};

#if !defined(CT_CUDA)

// Returns how many samples failed.
template <class Field, class Method, int W>
int64_t solve_fixed(const Task& task) {
  using real = typename Field::real;
  using Worker = Fixed<Field, Method, W, Run<real>>;
  auto* tape = static_cast<Tape<real>*>(task.tape);
  if (tape != nullptr) open_runs<real>(task, W);
  const int64_t runs = tape == nullptr ? (task.batch + W - 1) / W : tape->runs.size();
  on_threads(runs, task.threads, [&](int64_t i) {
    auto* kept = tape == nullptr ? nullptr : &tape->runs[i];
    const int64_t begin = kept == nullptr ? i * W : kept->begin;
    const int64_t end = kept == nullptr ? std::min(task.batch, begin + W) : kept->end;
    const Owned<Worker> solve(task, kept);
    for (int64_t first = begin; first < end; first += W)
      solve->run(first, static_cast<int>(std::min<int64_t>(W, end - first)));
  });
  return task.batch - std::count(task.status, task.status + task.batch, kSuccess);
}

#endif

}  // namespace ct::native
