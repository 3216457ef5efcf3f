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

  CT_LANES explicit Samples(const Task& task_)
      : task(task_), gains(task_, Method::order, T::kSquares) {
    prepare_tile(task, tile, tolerances);
    if (task.t_stride == 0)
      for (int lane = 0; lane < W; ++lane) load_times(lane, 0);
  }

  // One sample, alone in its tile. keep(lanes, t, h) is told of accepted steps.
  template <class Keep>
  CT_LANES void run(int64_t number, const Keep& keep) {
    static_assert(W == 1);
    load(0, number);
    start();
    reset(0, number);
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
    put(clock.direction, lane, direction);
    put(clock.end, lane, task.overshoot ? kInfinity : direction * last);
    put(span, lane, direction * (last - first));
  }

  // First slopes and first steps of the loaded samples.
  CT_LANES void start() {
    const D t0 = clock.t();
    tile.evaluate(convert<V>(t0), tile.y, tile.k[0]);
    if (task.first_step >= 0) {
      clock.proposed = all<D>(task.first_step);
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
    const D h0 = first_guess(d0, d1, span), signed_h0 = clock.direction * h0;
    const V step = convert<V>(signed_h0);
    for_each<dim>([&](long d)
                      __attribute__((always_inline)) { tile.at[d] = tile.y[d] + step * k[0][d]; });
    tile.evaluate(convert<V>(t0 + signed_h0), tile.at, tile.k[1]);
    const D d2 =
        norm([&](long d) __attribute__((always_inline)) { return k[1][d] - k[0][d]; }) / h0;
    clock.proposed = first_length(h0, d1, d2, span, Method::order);
  }

  // Begin with a sample whose state, slope and first step are in place.
  CT_LANES void reset(int lane, int64_t number) {
    D* const zero[] = {&clock.attempts, &clock.accepted, &extended};
    for (D* x : zero) put(*x, lane, 0);
    put(clock.log_last, lane, 0);
    put(clock.log_before, lane, 0);
    put(clock.error, lane, std::numeric_limits<real>::quiet_NaN());
    sample[lane] = number;
    put(active, lane, kYes);
    mark[lane] = peek(clock.tau, lane), last_goal[lane] = mark[lane] + peek(span, lane);
    wild[lane] = since[lane] = 0;
    output[lane] = 0;
    advance(lane);
    const double start = peek(clock.tau, lane);
    while (peek(goal, lane) <= start) {
      write(lane, tile.y);
      advance(lane, 1);
    }
    if (peek(goal, lane) == kInfinity) finish(lane, kSuccess);
  }

  // ---- rows
  // --------------------------------------------------------------------------------------------------

  CT_LANES void write(int lane, const V* state) const {
    store_sample<T>(task, state, lane, sample[lane], output[lane]);
  }

  // To the next row; its time, or infinity where there is none.
  CT_LANES void advance(int lane, int by = 0) {
    output[lane] += by;
    const double t = output[lane] < task.rows
                         ? peek(clock.direction, lane) * goal_of(sample[lane], output[lane])
                         : kInfinity;
    put(goal, lane, t);
  }

  CT_LANES void read(Mask<D> pending, D t, D h, V end_time) {
    const Mask<D> inside = pending & (goal < clock.stop);
    const bool interpolates = any(inside);
    if (interpolates) {
      tile.extend(t, h, end_time);
      extended += select(inside, all<D>(T::total - T::stages), D{});
    }
    do {
      const Mask<V> exact = mask_for<V>(goal >= clock.stop);
      if (interpolates) {
        const D theta = at_most((goal - clock.tau) / (clock.stop - clock.tau), all<D>(1));
        tile.interpolate(theta, convert<V>(h));
      }
      for_each<dim>([&](long d) __attribute__((always_inline)) {
        tile.at[d] = select(exact, tile.y1[d], tile.at[d]);
      });
      const uint32_t lanes = bits_of(pending);
      for (int lane = 0; lane < W; ++lane)
        if (lanes >> lane & 1) {
          write(lane, tile.at);
          advance(lane, 1);
        }
      pending = pending & (goal <= clock.stop);
    } while (any(pending));
  }

  // ---- steps
  // -------------------------------------------------------------------------------------------------

  // Returns the lanes whose samples ended.
  template <class Keep>
  CT_LANES uint32_t step(const Keep& keep) {
    clock.plan(task, active);
    const Mask<D> frozen = active & negated(clock.stop > clock.tau);
    if (any(frozen)) [[unlikely]]
      return give_up(bits_of(frozen));
    const D t = clock.t(), h = clock.h();
    const V end_time = beside(convert<V>(clock.t1()), convert<V>(t));
    tile.attempt(t, h, end_time);
    const E norm = tile.error_norm(tolerances, h);
    const Mask<D> moved = clock.judge(task, gains, active, norm);
    Mask<D> ended = active & (clock.attempts >= all<D>(task.max_steps));
    if (any(moved)) {
      tile.evaluate_late(t, h, end_time);
      const Mask<D> pending = moved & (goal <= clock.stop);
      keep(bits_of(moved), t, h);
      if (any(pending)) {
        read(pending, t, h, end_time);
        ended = ended | (active & (goal == all<D>(kInfinity)));
      }
      accept(moved);
    }
    uint32_t creeping = 0;
    if (task.patience > 0)
      creeping = watch(active & mask_for<D>(negated(norm < all<E>(kInfinity))));
    ended = ended & active;
    return creeping | (any(ended) ? leave(bits_of(ended)) : 0);
  }

  CT_LANES void accept(Mask<D> moved) {
    const Mask<V> mask = mask_for<V>(moved);
    clock.tau = select(moved, clock.stop, clock.tau);
    for_each<dim>([&](long d) __attribute__((always_inline)) {
      tile.y[d] = select(mask, tile.y1[d], tile.y[d]);
      tile.k[0][d] = select(mask, tile.k[T::stages - 1][d], tile.k[0][d]);
    });
  }

  // Whether the solve creeps along the edge of the field's domain: tiny steps that do not move the
  // state have no error, grow, leave the domain, and are cut again. As the eager solver asks.
  // `lost`: lanes whose error was not finite. Returns those that creep. One sample is asked every
  // so many attempts; of several, each when it is lost again.
  CT_LANES uint32_t watch(Mask<D> lost) {
    if (W > 1 && !any(lost)) [[likely]]
      return 0;
    const uint32_t lanes = bits_of(lost);
    uint32_t creeping = 0;
    for (int lane = 0; lane < W; ++lane) {
      const int64_t attempts = static_cast<int64_t>(peek(clock.attempts, lane));
      wild[lane] += lanes >> lane & 1;
      if (W == 1 ? attempts % task.patience != 0
                 : !(lanes >> lane & 1) || attempts - since[lane] < task.patience)
        continue;
      const double tau = peek(clock.tau, lane);
      if (peek(active, lane) && wild[lane] > task.patience / 5 &&
          tau - mark[lane] < 1e-3 * (last_goal[lane] - tau)) {
        finish(lane, kNonfinite);
        creeping |= 1u << lane;
      }
      mark[lane] = tau, wild[lane] = 0, since[lane] = attempts;
    }
    return creeping;
  }

  CT_LANES uint32_t leave(uint32_t lanes) {
    for (int lane = 0; lane < W; ++lane)
      if (lanes >> lane & 1) finish(lane, peek(goal, lane) == kInfinity ? kSuccess : kMaxSteps);
    return lanes;
  }

  CT_LANES uint32_t give_up(uint32_t lanes) {
    for (int lane = 0; lane < W; ++lane)
      if (lanes >> lane & 1) {
        bool finite = peek(clock.error, lane) < kInfinity;
        for (long d = 0; d < dim; ++d) finite &= std::isfinite(peek(tile.k[0][d], lane));
        finish(lane, finite ? kUnderflow : kNonfinite);
      }
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
    const int64_t attempts = static_cast<int64_t>(peek(clock.attempts, lane));
    const int64_t first = task.first_step >= 0 || peek(span, lane) == 0 ? 1 : 2;
    task.counts[i] = first + attempts * (T::evaluated - 1) + (Method::late ? accepted : 0) +
                     static_cast<int64_t>(peek(extended, lane));
    task.counts[batch + i] = accepted;
    task.counts[2 * batch + i] = attempts - accepted;
    task.status[i] = status;
    task.last[i] = peek(clock.t(), lane);
    task.last[batch + i] = peek(clock.proposed, lane);
    const double error = peek(clock.error, lane);
    task.last[2 * batch + i] = T::kSquares ? std::sqrt(error) : error;
    for (; output[lane] < task.rows; ++output[lane]) {
      real* to = output_row<T>(task, i, output[lane]);
      for (long d = 0; d < dim; ++d) to[d] = std::numeric_limits<real>::quiet_NaN();
    }
    put(active, lane, 0);
  }

  static constexpr auto kYes = static_cast<Number<Mask<D>>>(-1);

  const Task& task;
  const Gains gains;
  T tile;
  typename T::Tolerances tolerances;
  Clock<D, E> clock;
  Mask<D> active;
  D goal, span, extended;
  int64_t sample[W], output[W];
  // where a solve was when patience was last tried, errors not finite since, and the attempt
  double mark[W], last_goal[W];
  int64_t wild[W], since[W];
};

}  // namespace ct::native
