// Solves with one step for all samples whose steps are looked at: kept for the continuous solution,
// searched for events, ended on given times. Adaptive, or with given steps.
#pragma once

#include "joint.h"
#include "roots.h"
#include "values.h"

namespace ct::native {

// What is asked of such a solve, and what it found. Plain C: ctorch/ode/native_observed.py holds
// the same struct.
struct Observation {
  const double* stops;     // in tau, increasing: where adaptive steps have to end
  const int64_t* jumps;    // whether the field jumps there
  const int64_t* anchors;  // the output time that one is, or kConstant
  int64_t stop_count;
  double fixed_step;           // steps of this length without end, in place of the task's knots; 0
  const void* const* shared;   // arrays of the event functions
  int64_t until_event, dense;  // there is no other end; the steps are kept
  void* pieces;                // the steps that were kept
  int64_t piece_count;
  double event_time;
  int64_t event, rows;  // which one fired, or -1; how many rows there are then
  int64_t nan_event;    // which one is NaN, at event_time; or -1
};

// The steps of a continuous solution.
template <class Real>
struct Pieces {
  std::vector<double> starts, lengths;  // in tau
  std::vector<Real> states, slopes;     // [P, B, dim] and [P, total, B, dim]
};

// `Events` are the event functions: each of their elements belongs to the function `event[i]` and
// is looked at in one `direction[i]`, or (0) in both.
template <class Field, class Method, class Events, int W>
class Observed : Joint<Field, Method, W> {
 public:
  using J = Joint<Field, Method, W>;
  using typename J::D, typename J::real, typename J::T, typename J::V;
  static constexpr long dim = J::dim, count = Events::count;
  static constexpr bool adaptive = Method::fsal;

  Observed(const Task& task_, Observation& asked_) : J(task_), asked(asked_) {
    if constexpr (count > 0) state.resize(task.batch * dim);
    if (asked.dense) asked.pieces = pieces = new Pieces<real>;
  }

  void run() {
    this->begin();
    asked.event = asked.nan_event = -1;
    int64_t status = kSuccess;
    if constexpr (count > 0) {
      evaluate_events(task.t[0], [](Part& part) { return part.tile.y; });
      for (long i = 0; i < count; ++i) signs[i] = sign(values[i]);
    }
    if (asked.nan_event < 0 && (output < task.rows || count > 0))
      status = adaptive ? integrate() : integrate_on_knots();
    if (asked.event >= 0) output = task.rows;
    if (pieces != nullptr) asked.piece_count = static_cast<int64_t>(pieces->starts.size());
    this->finish(status);
  }

 private:
  using J::clock, J::evaluations, J::gains, J::goal, J::last_goal, J::output, J::parts, J::task,
      J::time;
  using typename J::Part;

  // Places within a step at which events are looked at.
  static constexpr int kPlaces = 4;

  bool reading() const {
    return asked.event < 0 && asked.nan_event < 0 && (output < task.rows || asked.until_event);
  }

  // ---- adaptive steps
  // -------------------------------------------------------------------------------------------

  int64_t integrate() {
    this->start(asked.until_event ? kInfinity : last_goal - clock.tau);
    double mark = clock.tau;
    int64_t wild = 0, attempts = 0, next = 0;
    for (; reading(); ++attempts) {
      if (attempts >= task.max_steps) return kMaxSteps;
      if (attempts > 0 && attempts % task.patience == 0) {
        if (wild > task.patience / 5 && clock.tau - mark < 1e-3 * (last_goal - clock.tau)) {
          clock.error = std::numeric_limits<double>::quiet_NaN();
          return kNonfinite;
        }
        mark = clock.tau, wild = 0;
      }
      while (next < asked.stop_count && asked.stops[next] <= clock.tau) ++next;
      clock.end = next < asked.stop_count ? asked.stops[next] : kInfinity;
      clock.plan(task);
      if (!(clock.stop > clock.tau && clock.length < kInfinity)) return this->why_stuck();
      if (!this->attempt(wild)) continue;
      look(this->before_end(), clock.lands ? asked.anchors[next] : kFree);
      this->accept();
      if (clock.lands && asked.jumps[next] && reading()) begin_after_jump();
    }
    return kSuccess;
  }

  // The slope just after the time at which the step ended.
  void begin_after_jump() {
    const real far = static_cast<real>(clock.direction * kInfinity);
    const V after = time(beside(static_cast<real>(clock.t()), far));
    this->each([&](Part& part) { part.tile.evaluate(after, part.tile.y, part.tile.k[0]); });
    ++evaluations;
    jumped = true;
  }

  // ---- given steps
  // ----------------------------------------------------------------------------------------------

  int64_t integrate_on_knots() {
    double t = task.t[0];
    clock.error = clock.proposed = std::numeric_limits<double>::quiet_NaN();
    for (int64_t i = 1; reading() && (asked.fixed_step > 0 || i < task.knot_count); ++i) {
      if (clock.accepted >= task.max_steps) return kMaxSteps;
      const double t1 =
          asked.fixed_step > 0
              ? task.t[0] + clock.direction * static_cast<double>(i) * asked.fixed_step
              : task.knots[i];
      step(t, t1, asked.fixed_step > 0 ? kFree : task.anchors[i]);
      t = t1;
    }
    return kSuccess;
  }

  void step(double t, double t1, int64_t anchor) {
    const real begin = static_cast<real>(t), end = static_cast<real>(t1);
    const V first_time = time(task.perturb ? beside(begin, end) : begin);
    const V end_time = time(task.perturb ? beside(end, begin) : end);
    clock.length = clock.direction * (t1 - t), clock.stop = clock.direction * t1;
    this->step_each([&](Part& part) {
      part.tile.evaluate(first_time, part.tile.y, part.tile.k[0]);
      part.tile.attempt(all<D>(t), all<D>(t1 - t), end_time);
    });
    evaluations = T::stages + (clock.accepted == 0 ? 0 : evaluations);
    clock.accepted += 1, clock.attempts += 1;
    look(end_time, anchor);
    clock.tau = clock.stop;
    this->each([](Part& part) {
      for (long d = 0; d < dim; ++d) part.tile.y[d] = part.tile.y1[d];
    });
  }

  // ---- what is read from a step
  // ---------------------------------------------------------------------------------------------

  // Looks at the accepted step from clock.tau to clock.stop; on what its end hangs.
  void look(V end_time, int64_t anchor) {
    const bool extended = asked.dense || count > 0;
    if (extended) this->extend(end_time);
    if (asked.dense) keep_piece();
    int64_t end = asked.until_event ? output : this->rows_within();
    double event = kInfinity;
    if constexpr (count > 0) {
      event = first_event();
      while (end > output && this->theta(end - 1) > event) --end;
    }
    const bool fired = event < kInfinity;
    if (task.tape != nullptr) this->keep(end + fired, anchor, jumped);
    jumped = false;
    this->read(end, end_time, extended);
    if (!fired) return;
    asked.event_time = clock.t() + event * clock.h();
    asked.rows = output + 1;
    this->interpolate(event);
    for (Part& part : parts) this->write(part, part.tile.at, output);
  }

  void keep_piece() {
    const int64_t size = task.batch * dim;
    const size_t states = pieces->states.size(), slopes = pieces->slopes.size();
    pieces->starts.push_back(clock.tau);
    pieces->lengths.push_back(clock.stop - clock.tau);
    pieces->states.resize(states + size);
    pieces->slopes.resize(slopes + T::total * size);
    gather([](Part& part) { return part.tile.y; }, pieces->states.data() + states);
    for (int i = 0; i < T::total; ++i)
      gather([&](Part& part) { return part.tile.k[i]; }, pieces->slopes.data() + slopes + i * size);
  }

  // A state of all samples, [batch, dim].
  template <class Of>
  void gather(const Of& of, real* to) {
    for (Part& part : parts) {
      const V* from = of(part);
      for (int lane = 0; lane < part.valid; ++lane)
        for (long d = 0; d < dim; ++d) to[(part.first + lane) * dim + d] = get(from[d], lane);
    }
  }

  // ---- events
  // ------------------------------------------------------------------------------------------------

  static int sign(double x) { return (x > 0) - (x < 0); }

  // All elements of the event functions, to `values`.
  template <class Of>
  void evaluate_events(double t, const Of& of) {
    if constexpr (count > 0) {
      gather(of, state.data());
      evaluate_values<Events, real>(static_cast<real>(t), state.data(), asked.shared, values);
      for (long i = 0; i < count; ++i)
        if (std::isnan(values[i]) && asked.nan_event < 0)
          asked.nan_event = Events::event[i], asked.event_time = t;
    }
  }

  void evaluate_events_at(double theta) {
    const bool ends = theta == 1;
    if (!ends) this->interpolate(theta);
    evaluate_events(clock.t() + theta * clock.h(),
                    [&](Part& part) { return ends ? part.tile.y1 : part.tile.at; });
  }

  // Where in the step the first crossing is; infinity: there is none.
  double first_event() {
    if constexpr (count > 0) {
      for (int place = 0; place < kPlaces; ++place) {
        const double low = static_cast<double>(place) / kPlaces, high = (place + 1.0) / kPlaces;
        evaluate_events_at(high);
        int after[count];
        for (long i = 0; i < count; ++i) after[i] = sign(values[i]);
        double found = kInfinity;
        for (long i = 0; i < count; ++i) {
          const int before = signs[i];
          const bool crossed = before * after[i] < 0 || (before != 0 && after[i] == 0);
          if (crossed && (Events::direction[i] == 0 || Events::direction[i] == -before)) {
            const double theta = root(i, before, low, high);
            if (theta < found) found = theta, asked.event = Events::event[i];
          }
          if (after[i] != 0) signs[i] = after[i];
        }
        if (found < kInfinity) return found;
      }
    }
    return kInfinity;
  }

  double root(long i, int before, double low, double high) {
    const auto value = [&](double theta) {
      evaluate_events_at(theta);
      return before * static_cast<double>(values[i]);
    };
    const double steps = std::abs(clock.t() / clock.h());
    return bracketed_root(value, low, high, 4e-16 * std::max(1.0, steps));
  }

  Observation& asked;
  Pieces<real>* pieces = nullptr;
  bool jumped = false;  // the first slope was evaluated after a jump
  std::vector<real> state;
  real values[count + 1];
  int signs[count + 1];
};

// Returns whether it failed.
template <class Field, class Method, class Events, int W>
int64_t solve_observed(const Task& task) {
  Observed<Field, Method, Events, W>(task, *static_cast<Observation*>(task.observation)).run();
  return task.status[0] != kSuccess;
}

// Hands the steps that were kept over to arrays, and forgets them.
template <class Field>
void take_pieces(Observation& asked, double* starts, double* lengths, void* states, void* slopes) {
  using real = typename Field::real;
  const auto* const pieces = static_cast<Pieces<real>*>(asked.pieces);
  asked.pieces = nullptr;
  std::copy(pieces->starts.begin(), pieces->starts.end(), starts);
  std::copy(pieces->lengths.begin(), pieces->lengths.end(), lengths);
  std::copy(pieces->states.begin(), pieces->states.end(), static_cast<real*>(states));
  std::copy(pieces->slopes.begin(), pieces->slopes.end(), static_cast<real*>(slopes));
  delete pieces;
}

}  // namespace ct::native
