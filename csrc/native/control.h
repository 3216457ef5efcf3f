// Step control of one tile of samples: the arithmetic of csrc/runge_kutta/control.h on lanes.
// Time is counted as tau = direction * t, which increases.
#pragma once

#include "rough.h"
#include "task.h"

namespace ct::native {

constexpr double kTinyError = 1e-300;              // its logarithm is finite
constexpr double kTinySingle = 1e-37;              // the same in single precision
constexpr double kLogLeast = -23.025850929940457;  // log 1e-10: less counts as this later
constexpr double kLandingRoom = 1.001;             // a step that all but reaches the end lands
constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Of h_next = h * clip(safety * e^last * e_1^past * e_2^before), where e, e_1, e_2 are the error
// norms of the last three accepted steps; or their squares, for which the order counts twice.
struct Gains {
  double last, past, before, safety, min_factor, max_factor, log_least;
  bool integral, never_shrinks;

  CT_BOTH Gains(const Task& task, double order, bool squares = false)
      : Gains(task, squares ? 2 * order : order, squares ? 2 * kLogLeast : kLogLeast) {}

 private:
  CT_BOTH Gains(const Task& task, double order, double log_least_)
      : last(-(task.p + task.i + task.d) / order),
        past((task.p + 2 * task.d) / order),
        before(-task.d / order),
        safety(task.safety),
        min_factor(task.min_factor),
        max_factor(task.max_factor),
        log_least(log_least_),
        integral(task.p == 0 && task.d == 0),
        never_shrinks(task.never_shrinks != 0) {}
};

template <class D>
CT_LANES D at_least(D x, D low) {
  return select(x < low, low, x);
}
template <class D>
CT_LANES D at_most(D x, D high) {
  return select(x > high, high, x);
}

// By how much the step changes. The powers are taken together, as one exponential.
template <class D>
CT_LANES D step_factor(const Gains& gains, D error, D log_error, D log_last, D log_before) {
  using T = Number<D>;
  const Mask<D> accepted = error <= all<D>(1);
  D power = static_cast<T>(gains.last) * log_error;
  if (!gains.integral) {
    // the history of accepted steps says nothing on how to shorten a rejected one
    const D history =
        static_cast<T>(gains.past) * log_last + static_cast<T>(gains.before) * log_before;
    power += select(accepted, history, D{});
  }
  D factor = static_cast<T>(gains.safety) * rough_exp(power), least = all<D>(gains.min_factor);
  if (!gains.integral)
    factor = select(accepted, factor, at_most(factor, all<D>(gains.safety)));
  else if (gains.never_shrinks)
    least = select(error < all<D>(1), all<D>(1), least);
  factor = at_most(at_least(factor, least), all<D>(gains.max_factor));
  factor = select(error == D{}, all<D>(gains.max_factor), factor);
  return select(error < all<D>(kInfinity), factor, all<D>(gains.min_factor));
}

// The least number of type T that is no less, or the next: a limit of steps is not to ask for more
// of them than it does in double precision.
template <class T>
CT_BOTH T rounded_up(double x) {
  const T near = static_cast<T>(x);
  return near < x ? near * (1 + std::numeric_limits<T>::epsilon()) : near;
}

// Where a tile of samples stands, and its attempted step. Times are of type D; lengths of steps and
// error norms of E, the precision in which the state moves. Sets of lanes are bits.
template <class D, class E = D>
struct Clock {
  D tau, end, stop, accepted;
  E direction, proposed, length, error, log_last, log_before;
  double attempts = 0;  // the same for all lanes
  LaneSet lands;

  CT_BOTH D t() const { return convert<D>(direction) * tau; }
  CT_BOTH E h() const { return direction * length; }
  CT_BOTH D t1() const { return convert<D>(direction) * stop; }

  // The next step.
  CT_LANES void plan(const Task& task) {
    length = at_most(at_least(proposed, all<E>(task.min_step)),
                     all<E>(rounded_up<Number<E>>(task.max_step)));
    const D far = convert<D>(length);
    const Mask<D> reaches = tau + kLandingRoom * far >= end;
    stop = select(reaches, end, tau + far);
    lands = bits_of(reaches);
    length = select(lands, convert<E>(end - tau), length);
  }

  // Which lanes accept the attempt, by its error norm; `tau` itself is not moved here.
  CT_LANES LaneSet judge(const Task& task, const Gains& gains, E norm) {
    constexpr double kTiny = sizeof(Number<E>) == 4 ? kTinySingle : kTinyError;
    error = norm;
    Mask<E> good = norm <= all<E>(1);
    if (task.min_step > 0) {
      // a least step which lands is longer by what is left over
      const E least = select(lands, all<E>(kLandingRoom * task.min_step), all<E>(task.min_step));
      good = good | ((norm < all<E>(kInfinity)) & (length <= least));
    }
    const LaneSet moved = bits_of(good);
    const E log_error = rough_log(at_least(norm, all<E>(kTiny)));
    const E next = length * step_factor(gains, norm, log_error, log_last, log_before);
    // a step cut short to end on a given time says little against the length tried before
    proposed = select(moved & lands, at_least(next, proposed), next);
    if (!gains.integral) {
      log_before = select(good, log_last, log_before);
      log_last = select(good, at_least(log_error, all<E>(gains.log_least)), log_last);
    }
    accepted += select(moved, all<D>(1), D{});
    attempts += 1;
    return moved;
  }
};

// First steps (Hairer, Norsett, Wanner, "Solving ODEs I", II.4), in two parts, between which the
// field is evaluated at distance h0.
template <class D>
CT_LANES D first_guess(D d0, D d1, D span) {
  const Mask<D> tiny = (d0 < all<D>(1e-5)) | (d1 < all<D>(1e-5));
  const D h0 = at_most(select(tiny, all<D>(1e-6), 0.01 * d0 / d1), span);
  const Mask<D> usable = (h0 > D{}) & (h0 < all<D>(kInfinity));
  return select(usable, h0, at_most(span, all<D>(1e-6)));
}

template <class D>
CT_LANES D first_length(D h0, D d1, D d2, D span, double order) {
  const D steepest = select(d1 > d2, d1, select(d1 != d1, d1, d2));
  const Mask<D> flat = (d1 <= all<D>(1e-15)) & (d2 <= all<D>(1e-15));
  D h1 = select(flat, at_least(h0 * 1e-3, all<D>(1e-6)),
                exp(log(0.01 / at_least(steepest, all<D>(kTinyError))) * (1 / order)));
  h1 = select(steepest < all<D>(kInfinity), h1, h0);
  return at_most(at_most(100.0 * h0, h1), span);
}

// The number next to x in the direction of y, for finite x.
template <class V>
CT_LANES V beside(V x, V y) {
  if constexpr (kWidth<V> == 1) {
    return std::nextafter(x, y);
  } else if constexpr (IsWide<V>::value) {
    return {beside(x.low, y.low), beside(x.high, y.high)};
  } else {
    using I = Mask<V>;
    const I up = (I)(y > x), positive = (I)(x > V{});
    const I step = (up == positive) ? I{} + 1 : I{} - 1;
    const V least = (V)(I{} + 1), zero_case = select(up, least, -least);
    return select(x == y, y, select(x == V{}, zero_case, (V)((I)x + step)));
  }
}

}  // namespace ct::native
