// Adaptive solves in which every sample steps on its own. Samples are lanes of a tile. What a
// sample gets does not depend on its lane or its neighbors.
#pragma once

#include "rows.h"

namespace ct::native {

// The samples in a tile: how they begin, step, write their rows, and end.
template <class Field, class Method, int W>
class Samples {
 public:
  using T = Tile<Field, Method, W>;
  using real = typename T::real;
  using V = typename T::V;
  using D = typename T::D;
  using E = typename T::E;
  static constexpr long dim = T::dim;

  CT_LANES explicit Samples(const Task& task_) : task(task_), gains(task_, Method::order, true) {
    prepare_tile(task, tile, tolerances);
    if (task.t_stride == 0)
      for (int lane = 0; lane < W; ++lane) load_times(lane, 0);
  }

  // One sample, alone in its tile. keep(lanes) is told of accepted steps.
  template <class Keep>
  CT_LANES void run(int64_t number, const Keep& keep) {
    static_assert(W == 1);
    load(0, number);
    start();
    write_first(0, number);
    active = begin(0, number);
    while (any(active)) step(keep);
  }

 protected:
  // ---- samples into lanes
  // ------------------------------------------------------------------------------------

  CT_LANES double goal_of(int64_t sample, int64_t row) const {
    return task.t[sample * task.t_stride + row];
  }

  CT_LANES void load(int lane, int64_t sample) {
    load_sample(task, tile, tolerances, lane, sample);
    if (task.t_stride != 0) load_times(lane, sample);
    put(clock.tau, lane, peek(clock.direction, lane) * goal_of(sample, 0));
  }

  CT_LANES void load_times(int lane, int64_t sample) {
    const double first = goal_of(sample, 0), last = goal_of(sample, task.rows - 1);
    const double direction = last < first ? -1 : 1;
    put(clock.direction, lane, static_cast<Number<E>>(direction));
    put(clock.end, lane, task.overshoot ? kInfinity : direction * last);
    put(span, lane, direction * (last - first));
  }

  // First slopes and first steps of the loaded samples.
  CT_LANES void start() {
    const D t0 = clock.t();
    tile.evaluate(convert<V>(t0), tile.y, tile.k[0]);
    if (task.first_step >= 0) {
      clock.proposed = all<E>(task.first_step);
      return;
    }
    const auto norm = [&](const auto& of) __attribute__((always_inline)) {
      return convert<D>(tile.norm([&](long d) __attribute__((always_inline)) {
        return of(d) / tolerances.scale(d, T::size_at(tile.y, d));
      }));
    };
    const auto& k = tile.k;
    const D d0 = norm([&](long d) __attribute__((always_inline)) { return tile.y[d]; });
    const D d1 = norm([&](long d) __attribute__((always_inline)) { return k[0][d]; });
    const D h0 = first_guess(d0, d1, span), signed_h0 = convert<D>(clock.direction) * h0;
    const V step = convert<V>(signed_h0);
    for_each<dim>([&](long d)
                      __attribute__((always_inline)) { tile.at[d] = tile.y[d] + step * k[0][d]; });
    tile.evaluate(convert<V>(t0 + signed_h0), tile.at, tile.k[1]);
    const D d2 =
        norm([&](long d) __attribute__((always_inline)) { return k[1][d] - k[0][d]; }) / h0;
    clock.proposed = convert<E>(first_length(h0, d1, d2, span, Method::order));
  }

  // Begin with a sample whose state, slope and first step are in place; returns whether there is
  // anything to do.
  CT_LANES bool begin(int lane, int64_t number) {
    put(clock.accepted, lane, 0);
    put(clock.log_last, lane, 0);
    put(clock.log_before, lane, 0);
    put(clock.error, lane, std::numeric_limits<real>::quiet_NaN());
    began[lane] = clock.attempts;
    last_attempt = at_most(last_attempt, began[lane] + task.max_steps);
    sample[lane] = number;
    extended[lane] = 0;
    output[lane] = first_rows(number);
    mark[lane] = peek(clock.tau, lane), last_goal[lane] = mark[lane] + peek(span, lane);
    wild[lane] = since[lane] = 0;
    if (advance(lane)) return true;
    finish(lane, kSuccess);
    return false;
  }

  // Of the sample in a lane.
  CT_LANES double attempts(int lane) const { return clock.attempts - began[lane]; }

  // ---- rows
  // --------------------------------------------------------------------------------------------------

  // How many rows are y0 itself.
  CT_LANES int64_t first_rows(int64_t sample) const {
    int64_t count = 1;
    while (count < task.rows && goal_of(sample, count) == goal_of(sample, 0)) ++count;
    return count;
  }

  // Writes them; of samples that lie side by side, for these are written one after the other.
  CT_LANES void write_first(int lane, int64_t sample) const {
    for (int64_t row = first_rows(sample); row-- > 0;)
      store_sample<T>(task, tile.y, lane, sample, row);
  }

  CT_LANES void write(int lane, const V* state) const {
    store_sample<T>(task, state, lane, sample[lane], output[lane]);
  }

  // To the next row, if there is one; the time of none is infinity.
  CT_LANES bool advance(int lane, int by = 0) {
    output[lane] += by;
    const bool there = output[lane] < task.rows;
    put(goal, lane,
        there ? peek(clock.direction, lane) * goal_of(sample[lane], output[lane]) : kInfinity);
    return there;
  }

  // Writes the rows within the step; returns the lanes for which there are no more.
  CT_LANES LaneSet read(LaneSet pending, V end_time) {
    const LaneSet inside = pending & bits_of(goal < clock.stop);
    const bool interpolates = any(inside);
    if (interpolates) {
      tile.extend(clock.t(), clock.h(), end_time);
      for_lanes(inside, [&](int lane) __attribute__((always_inline)) {
        extended[lane] += T::total - T::stages;
      });
    }
    LaneSet last = 0;
    do {
      if (interpolates) {
        const Mask<V> exact = mask_for<V>(goal >= clock.stop);
        const D theta = at_most((goal - clock.tau) / (clock.stop - clock.tau), all<D>(1));
        tile.interpolate(theta, convert<V>(clock.h()));
        for_each<dim>([&](long d) __attribute__((always_inline)) {
          tile.at[d] = select(exact, tile.y1[d], tile.at[d]);
        });
      }
      LaneSet more = 0;
      for_lanes(pending, [&](int lane) __attribute__((always_inline)) {
        write(lane, interpolates ? tile.at : tile.y1);
        if (!advance(lane, 1)) last |= LaneSet{1} << lane;
        if (peek(goal, lane) <= peek(clock.stop, lane)) more |= LaneSet{1} << lane;
      });
      pending = more;
    } while (any(pending));
    return last;
  }

  // ---- steps
  // -------------------------------------------------------------------------------------------------

  // Returns the lanes whose samples ended. The others go along: what comes of them is not read.
  template <class Keep>
  CT_LANES LaneSet step(const Keep& keep) {
    clock.plan(task);
    const LaneSet frozen = active & ~bits_of(clock.stop > clock.tau);
    if (any(frozen)) [[unlikely]]
      return give_up(frozen);
    const D t = clock.t();
    const E h = clock.h();
    const V end_time = beside(convert<V>(clock.t1()), convert<V>(t));
    tile.attempt(t, h, end_time);
    const E norm = tile.squared_error(tolerances, h);
    const LaneSet moved = clock.judge(task, gains, norm);
    LaneSet ended = 0;
    if (clock.attempts >= last_attempt) [[unlikely]]
      ended = out_of_attempts();
    if (any(moved)) {
      tile.evaluate_late(t, h, end_time);
      const LaneSet pending = moved & active & bits_of(goal <= clock.stop);
      keep(moved & active);
      if (any(pending)) ended |= read(pending, end_time);
      accept(moved);
    }
    LaneSet creeping = 0;
    if (task.patience > 0) creeping = watch(active & ~bits_of(norm < all<E>(kInfinity)));
    ended &= active;
    return creeping | (any(ended) ? leave(ended) : 0);
  }

  // The lanes with as many as are allowed, and when that may be so again.
  CT_LANES LaneSet out_of_attempts() {
    LaneSet lanes = 0;
    last_attempt = kInfinity;
    for_lanes(active, [&](int lane) {
      if (attempts(lane) >= task.max_steps)
        lanes |= LaneSet{1} << lane;
      else
        last_attempt = at_most(last_attempt, began[lane] + task.max_steps);
    });
    return lanes;
  }

  CT_LANES void accept(LaneSet moved) {
    clock.tau = select(moved, clock.stop, clock.tau);
    for_each<dim>([&](long d) __attribute__((always_inline)) {
      tile.y[d] = select(moved, tile.y1[d], tile.y[d]);
      tile.k[0][d] = select(moved, tile.k[T::stages - 1][d], tile.k[0][d]);
    });
  }

  // Whether the solve creeps along the edge of the field's domain: tiny steps that do not move the
  // state have no error, grow, leave the domain, and are cut again. As the eager solver asks.
  // `lost`: lanes whose error was not finite. Returns those that creep. One sample is asked every
  // so many attempts; of several, each when it is lost again.
  CT_LANES LaneSet watch(LaneSet lost) {
    if (W > 1 && lost == 0) [[likely]]
      return 0;
    LaneSet creeping = 0;
    for (int lane = 0; lane < W; ++lane) {
      const int64_t attempts = static_cast<int64_t>(this->attempts(lane));
      wild[lane] += lost >> lane & 1;
      if (W == 1 ? attempts % task.patience != 0
                 : !(lost >> lane & 1) || attempts - since[lane] < task.patience)
        continue;
      const double tau = peek(clock.tau, lane);
      if ((active >> lane & 1) && wild[lane] > task.patience / 5 &&
          tau - mark[lane] < 1e-3 * (last_goal[lane] - tau))
        creeping |= 1u << lane;
      mark[lane] = tau, wild[lane] = 0, since[lane] = attempts;
    }
    if (creeping == 0) [[likely]]
      return 0;
    for_lanes(creeping,
              [&](int lane) { set(clock.error, lane, std::numeric_limits<real>::quiet_NaN()); });
    return leave(creeping, [](int) { return kNonfinite; });
  }

  CT_LANES LaneSet leave(LaneSet lanes) {
    return leave(lanes, [&](int lane) __attribute__((always_inline)) {
      return peek(goal, lane) == kInfinity ? kSuccess : kMaxSteps;
    });
  }

  CT_LANES LaneSet give_up(LaneSet lanes) {
    return leave(lanes, [&](int lane) __attribute__((always_inline)) {
      // (before the first attempt there is no error)
      const bool finite = peek(clock.error, lane) < kInfinity || attempts(lane) == 0;
      return finite && has_slope(lane) ? kUnderflow : kNonfinite;
    });
  }

  // Whether the slope at the start of the step is finite.
  CT_LANES bool has_slope(int lane) const {
    bool finite = true;
    for (long d = 0; d < dim; ++d) finite &= std::isfinite(peek(tile.k[0][d], lane));
    return finite;
  }

  // Samples end, with status(lane).
  template <class StatusOf>
  CT_LANES LaneSet leave(LaneSet lanes, const StatusOf& status) {
    for_lanes(lanes, [&](int lane) __attribute__((always_inline)) { finish(lane, status(lane)); });
    active &= ~lanes;
    return lanes;
  }

  CT_LANES void finish(int lane, int64_t status) {
    const int64_t i = sample[lane], batch = task.batch;
    bool finite = true;
    for_each<dim>([&](long d) __attribute__((always_inline)) {
      finite &= std::isfinite(peek(tile.y[d], lane));
    });
    if (status != kMaxSteps && !finite) status = kNonfinite;
    const int64_t accepted = static_cast<int64_t>(peek(clock.accepted, lane));
    const int64_t attempts = static_cast<int64_t>(this->attempts(lane));
    if (task.worst != nullptr) {
      task.worst[i] = kUnknown;
      if ((status == kUnderflow || status == kNonfinite) && attempts > accepted) [[unlikely]] {
        tile.largest_error(tolerances, lane, task.worst[i]);
        if (!has_slope(lane)) task.worst[i] = kNoSlope;
      }
    }
    const int64_t first = task.first_step >= 0 || peek(span, lane) == 0 ? 1 : 2;
    task.counts[i] =
        first + attempts * (T::evaluated - 1) + (Method::late ? accepted : 0) + extended[lane];
    task.counts[batch + i] = accepted;
    task.counts[2 * batch + i] = attempts - accepted;
    task.status[i] = status;
    task.last[i] = peek(clock.direction, lane) * peek(clock.tau, lane);
    task.last[batch + i] = peek(clock.proposed, lane);
    const double error = peek(clock.error, lane);
    task.last[2 * batch + i] = std::sqrt(error);
    for (; output[lane] < task.rows; ++output[lane]) {
      real* to = output_row<T>(task, i, output[lane]);
      for (long d = 0; d < dim; ++d) to[d] = std::numeric_limits<real>::quiet_NaN();
    }
  }

  const Task& task;
  const Gains gains;
  T tile;
  typename T::Tolerances tolerances;
  Clock<D, E> clock{};
  LaneSet active = 0;  // lanes with a sample
  D goal{}, span{};
  // the tile's count of attempts at which the samples began, and at which one may have had them all
  double began[W], last_attempt = kInfinity;
  int64_t sample[W], output[W], extended[W];  // evaluations of stages only for rows
  // where a solve was when patience was last tried, errors not finite since, and the attempt
  double mark[W], last_goal[W];
  int64_t wild[W], since[W];
};

}  // namespace ct::native
