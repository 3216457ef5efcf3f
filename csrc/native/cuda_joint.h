// Adaptive solves on a GPU with one step for all samples. Two kernels take turns until the solve is
// done: in the first every sample goes one phase further, in a thread of its own, and blocks add up
// its part of the error norm; the second, of one block, adds up the blocks and decides. What they
// decide stays on the GPU: the CPU only asks now and then whether the solve is done.
#pragma once

#include "cuda_tape.h"
#include "rows.h"

namespace ct::native {

enum Phase : int64_t { kBegin, kProbe, kAttempt, kClose, kDone, kJump };

// Zeros at first. Python reads the first three numbers.
struct JointState {
  int64_t phase, status, accepted;
  Clock<double> clock;  // of the attempt
  double last_goal, mark, h0;
  int64_t output, evaluations, attempts, wild;
  int64_t next, jumped;  // the stop ahead; the slope was evaluated just after the last one
  // the attempt before, if it was accepted, and the rows in it
  int64_t moved;
  double t, h, tau, stop;
  int64_t anchor, first_row, end_row, after_jump;
};
static_assert(sizeof(JointState) <= 512);

// What goes from launch to launch.
template <class Field, class Method>
struct JointMemory {
  using real = typename Field::real;
  static constexpr int kSums = 2 * Method::segments;
  JointState* state;
  real* samples;     // [(2 + total) dim, batch]: y, y1, k
  double* partials;  // [kSums, blocks]
};

// Partial norms are sums, or maxima.
template <class Method>
struct NormPart {
  CT_BOTH double operator()(double a, double b) const {
    return Method::maximum ? select((a > b) | (a != a), a, b) : a + b;
  }
};

// ---- a sample
// ----------------------------------------------------------------------------------------------------

template <class Field, class Method>
class JointSample {
 public:
  using T = Tile<Field, Method, 1>;
  using real = typename T::real;
  static constexpr long dim = T::dim;
  static constexpr int segments = Method::segments;

  // A thread without a sample goes along with its block, from zeros.
  CT_BOTH JointSample(const Task& task_, const JointState& state_, real* memory_, int64_t number)
      : task(task_),
        state(state_),
        there(number < task_.batch),
        sample(std::min(number, task_.batch - 1)),
        memory(memory_ + sample) {
    prepare_tile(task, tile, tolerances);
    load_sample(task, tile, tolerances, 0, sample);
  }

  // One phase; `parts` are its parts of the norms.
  CT_BOTH void run(double* parts) {
    go(parts);
    for (int s = 0; s < 2 * segments && !there; ++s) parts[s] = 0;
  }

 private:
  CT_BOTH void go(double* parts) {
    if (state.phase == kBegin) return begin(parts);
    load(0, tile.y);
    load(2, tile.k[0]);
    if (state.phase == kProbe) return probe(parts);
    if (state.moved) commit();
    if (state.phase == kJump)
      jump();
    else if (state.phase == kAttempt)
      attempt(parts);
    else
      close(parts);
  }

  CT_BOTH void load(int array, real* to) const {
    for (long d = 0; d < dim; ++d) to[d] = there ? memory[(array * dim + d) * task.batch] : real(0);
  }
  CT_BOTH void store(int array, const real* from) const {
    for (long d = 0; d < dim && there; ++d) memory[(array * dim + d) * task.batch] = from[d];
  }

  CT_BOTH void write(const real* row, int64_t number) const {
    if (there) store_sample<T>(task, row, 0, sample, number);
  }

  template <class Scaled>
  CT_BOTH static void norm(double* parts, const Scaled& scaled) {
    for_constants<0, segments>([&](auto s) {
      constexpr long first = Method::segment[s], last = Method::segment[s + 1];
      real total = 0;
      for (long d = first; d < last; d += T::numbers)
        total = T::taken_in(total, scaled, d / T::numbers);
      parts[s] = static_cast<double>(total);
    });
  }

  template <class Of>
  CT_BOTH void scaled_norm(double* parts, const Of& of) {
    norm(parts, [&](long d) { return of(d) / tolerances.scale(d, T::size_at(tile.y, d)); });
  }

  CT_BOTH void begin(double* parts) {
    const double direction = task.t[task.rows - 1] < task.t[0] ? -1 : 1;
    for (int64_t r = 0; r < task.rows && direction * task.t[r] <= direction * task.t[0]; ++r)
      write(tile.y, r);
    tile.evaluate(static_cast<real>(task.t[0]), tile.y, tile.k[0]);
    store(0, tile.y);
    store(2, tile.k[0]);
    scaled_norm(parts, [&](long d) { return tile.y[d]; });
    scaled_norm(parts + segments, [&](long d) { return tile.k[0][d]; });
  }

  CT_BOTH void probe(double* parts) {
    const double h = state.clock.direction * state.h0;
    for (long d = 0; d < dim; ++d) tile.at[d] = tile.y[d] + static_cast<real>(h) * tile.k[0][d];
    tile.evaluate(static_cast<real>(state.clock.t() + h), tile.at, tile.k[1]);
    scaled_norm(parts, [&](long d) { return tile.k[1][d] - tile.k[0][d]; });
  }

  CT_BOTH static real before_end(double t1, double t) {
    return beside(static_cast<real>(t1), static_cast<real>(t));
  }

  CT_BOTH void attempt(double* parts) {
    const double t = state.clock.t(), h = state.clock.h();
    tile.attempt(t, h, before_end(state.clock.t1(), t));
    const real length = static_cast<real>(h);
    norm(parts, [&](long d) { return tile.scaled_error(tolerances, length, d); });
    store(1, tile.y1);
    for (int i = 1; i < T::stages; ++i) store(2 + i, tile.k[i]);
  }

  // The slope just after the time at which the step ended.
  CT_BOTH void jump() {
    const real far = static_cast<real>(state.clock.direction * kInfinity);
    tile.evaluate(beside(static_cast<real>(state.clock.t()), far), tile.y, tile.k[0]);
    store(2, tile.k[0]);
  }

  // The end of an accepted step.
  CT_BOTH void commit() {
    load(1, tile.y1);
    for (int i = 1; i < T::stages; ++i) load(2 + i, tile.k[i]);
    const double direction = state.clock.direction, t1 = direction * state.stop;
    const real end_time = before_end(t1, state.t);
    tile.evaluate_late(state.t, state.h, end_time);
    keep(t1);
    bool extended = false;
    for (int64_t r = state.first_row; r < state.end_row; ++r) {
      const double goal = direction * task.t[r];
      if (goal == state.stop) {
        write(tile.y1, r);
        continue;
      }
      if (!extended) tile.extend(state.t, state.h, end_time);
      extended = true;
      const double theta = std::min((goal - state.tau) / (state.stop - state.tau), 1.0);
      tile.interpolate(theta, static_cast<real>(state.h));
      write(tile.at, r);
    }
    for (long d = 0; d < dim; ++d) tile.y[d] = tile.y1[d], tile.k[0][d] = tile.k[T::stages - 1][d];
    store(0, tile.y);
    store(2, tile.k[0]);
  }

  CT_BOTH void keep(double t1) {
    const auto* tape = static_cast<const CudaTape*>(task.tape);
    if (!there || tape == nullptr || tape->begins == nullptr) return;
    Keeper<real> keeper(*tape, sample, task.batch);
    keeper.skip(state.accepted - 1);
    real* to = keeper.add(sample, state.t, state.h, t1, state.anchor, state.first_row,
                          state.end_row, dim, state.after_jump);
    for (long d = 0; d < dim; ++d) to[d] = tile.y[d];
  }

  CT_BOTH void close(double* parts) {
    bool finite = true, slope = true;
    for (long d = 0; d < dim; ++d) {
      finite &= std::isfinite(tile.y[d]);
      slope &= std::isfinite(tile.k[0][d]);
    }
    parts[0] = finite ? 0 : 1, parts[1] = slope ? 0 : 1;
    if (!there) return;
    for (int64_t r = state.output; r < task.rows; ++r)
      for (long d = 0; d < dim; ++d)
        output_row<T>(task, sample, r)[d] = std::numeric_limits<real>::quiet_NaN();
    const auto* tape = static_cast<const CudaTape*>(task.tape);
    if (tape != nullptr) tape->accepted[sample] = state.accepted;
  }

  const Task& task;
  const JointState& state;
  const bool there;
  const int64_t sample;
  real* const memory;
  T tile;
  typename T::Tolerances tolerances;
};

// ---- the decision
// ------------------------------------------------------------------------------------------------

template <class Field, class Method>
class JointJudge {
 public:
  using T = Tile<Field, Method, 1>;
  static constexpr int segments = Method::segments;

  CT_BOTH JointJudge(const Task& task_, JointState& state_)
      : task(task_), state(state_), asked(static_cast<const CudaObservation*>(task_.observation)) {}

  // `parts`: of all samples.
  CT_BOTH void run(const double* parts) {
    switch (state.phase) {
      case kBegin:
        return begin(norm(parts), norm(parts + segments));
      case kProbe:
        ++state.evaluations;
        state.clock.proposed = first_length(state.h0, d1(), norm(parts) / state.h0, span(),
                                            static_cast<double>(Method::order));
        return plan();
      case kAttempt:
        return judge(norm(parts));
      case kJump:
        ++state.evaluations;
        state.moved = 0, state.jumped = 1;
        return plan();
      default:
        return finish(parts[0] == 0, parts[1] == 0);
    }
  }

 private:
  CT_BOTH double goal() const { return state.clock.direction * task.t[state.output]; }
  CT_BOTH double span() const { return state.last_goal - state.clock.tau; }
  CT_BOTH double& d1() { return state.mark; }  // until the first step

  // Root mean square (or maximum) over all samples; the largest of the segments.
  CT_BOTH double norm(const double* parts) const {
    double largest = 0;
    for_constants<0, segments>([&](auto s) {
      constexpr long length = Method::segment[s + 1] - Method::segment[s];
      if constexpr (length > 0) {
        const double count = static_cast<double>(task.batch) * length / T::numbers;
        const double size = Method::maximum ? parts[s] : std::sqrt(parts[s] / count);
        largest = T::larger(largest, size);
      }
    });
    return static_cast<typename T::real>(largest);
  }

  CT_BOTH void begin(double y, double slope) {
    auto& clock = state.clock;
    const double first = task.t[0], last = task.t[task.rows - 1];
    clock = {};
    clock.direction = last < first ? -1 : 1;
    clock.tau = clock.direction * first;
    state.last_goal = clock.direction * last;
    clock.end = task.overshoot ? kInfinity : state.last_goal;
    clock.error = std::numeric_limits<double>::quiet_NaN();
    while (state.output < task.rows && goal() <= clock.tau) ++state.output;
    state.evaluations = 1;
    if (state.output == task.rows) return close(kSuccess);
    if (task.first_step >= 0) {
      clock.proposed = task.first_step;
      return plan();
    }
    d1() = slope;
    state.h0 = first_guess(y, slope, span());
    state.phase = kProbe;
  }

  // To the next attempt, if there is one.
  CT_BOTH void plan() {
    auto& clock = state.clock;
    if (state.attempts == 0) state.mark = clock.tau;
    if (state.output == task.rows) return close(kSuccess);
    if (state.attempts >= task.max_steps) return close(kMaxSteps);
    if (state.attempts > 0 && state.attempts % task.patience == 0) {
      const bool creeps = clock.tau - state.mark < 1e-3 * span();
      if (state.wild > task.patience / 5 && creeps) {
        state.clock.error = std::numeric_limits<double>::quiet_NaN();
        return close(kNonfinite);
      }
      state.mark = clock.tau, state.wild = 0;
    }
    if (asked != nullptr) {
      while (state.next < asked->stop_count && asked->stops[state.next] <= clock.tau) ++state.next;
      clock.end = state.next < asked->stop_count ? asked->stops[state.next] : kInfinity;
    }
    clock.plan(task);
    if (!(clock.stop > clock.tau))  // (before the first attempt there is no error)
      return close(clock.error < kInfinity || state.attempts == 0 ? kUnderflow : kNonfinite);
    ++state.attempts;
    state.phase = kAttempt;
  }

  CT_BOTH void judge(double error) {
    auto& clock = state.clock;
    state.wild += error < kInfinity ? 0 : 1;
    state.evaluations += T::evaluated - 1;
    state.t = clock.t(), state.h = clock.h();
    state.moved = clock.judge(task, Gains(task, Method::order), error);
    if (state.moved) {
      ++state.accepted;
      state.evaluations += Method::late;
      state.tau = clock.tau, state.stop = clock.stop;
      state.anchor = clock.lands ? landing() : kFree;
      state.after_jump = state.jumped, state.jumped = 0;
      state.first_row = state.output;
      bool inside = asked != nullptr && asked->dense;
      for (; state.output < task.rows && goal() <= clock.stop; ++state.output)
        inside |= goal() < clock.stop;
      state.end_row = state.output;
      if (inside) state.evaluations += T::total - T::stages;
      clock.tau = clock.stop;
      if (clock.lands && jumps() && state.output < task.rows) {
        state.phase = kJump;
        return;
      }
    }
    plan();
  }

  // On what the end of a step hangs that lands, and whether the field jumps there.
  CT_BOTH int64_t landing() const {
    return asked == nullptr ? task.rows - 1 : asked->anchors[state.next];
  }
  CT_BOTH bool jumps() const { return asked != nullptr && asked->jumps[state.next]; }

  CT_BOTH void close(int64_t status) {
    state.status = status;
    state.phase = kClose;
  }

  CT_BOTH void finish(bool finite, bool slope) {
    finite = finite && (state.status != kUnderflow || slope);
    if (state.status != kMaxSteps && !finite) state.status = kNonfinite;
    task.counts[0] = state.evaluations;
    task.counts[task.batch] = state.accepted;
    task.counts[2 * task.batch] = state.attempts - state.accepted;
    task.status[0] = state.status;
    if (task.worst != nullptr) task.worst[0] = kUnknown;  // it is not looked for
    task.last[0] = state.clock.t();
    task.last[task.batch] = state.clock.proposed;
    task.last[2 * task.batch] = state.clock.error;
    state.phase = kDone;
  }

  const Task& task;
  JointState& state;
  const CudaObservation* const asked;
};

}  // namespace ct::native
