// Step control of one sample of a batch: how its next step lies, and what becomes of the attempt.
//
// Time is counted as tau = direction * t, which increases. Samples are columns: `samples`,
// `counts` and `step` are matrices [rows, B] whose rows are named below; ctorch/ops/step_control.py
// names them for Python.
#pragma once

#include <cmath>
#include <cstdint>

#include "arith.h"

namespace ct::rk {

// Rows of `samples`: time, proposed length of the next step, last time, direction of t, error norm
// of the last attempt, logarithms of the norms of the last two accepted steps.
enum SampleRow { kTau, kLength, kEnd, kDirection, kError, kLogLast, kLogBefore, kSampleRows };

// Rows of `counts`: fate, next output time, the same before the last attempt, steps.
enum CountRow { kFate, kOutput, kOutputBefore, kAccepted, kRejected, kCountRows };

// Rows of `step`: t at the start, signed length, t at the end.
enum StepRow { kStart, kSigned, kStop, kStepRows };

enum Fate { kRunning, kDone, kSpent, kStuck, kWild };

// What the host has to know of a step. Bits.
enum Flag { kMoved = 1, kInside = 2, kNotFinite = 4, kBusy = 8 };

// Entries of `flags`: bits, and the number of output times that were passed.
enum FlagEntry { kBits, kPassed, kFlagEntries };

// Entries of `control`.
enum ControlEntry {
  kP,
  kI,
  kD,
  kSafety,
  kMinFactor,
  kMaxFactor,
  kNeverShrinks,
  kOrder,
  kMinStep,
  kMaxStep,
  kMaxSteps,
  kControlEntries
};

constexpr double kTinyError = 1e-300;  // its logarithm is finite
constexpr double kLogLeast =
    -23.025850929940457;                // log 1e-10: a smaller error counts as this later
constexpr double kLandingRoom = 1.001;  // a step that would all but reach the end goes there

// ---- the plan
// ------------------------------------------------------------------------------------------------

template <typename T>
struct PlanTask {
  const double* samples;
  const int64_t* counts;
  double abscissae[kMaxTerms];
  int stages;
  double min_step, max_step;
  int64_t batch;
  double* step;
  bool* lands;
  T* times;  // [stages, B]
};

CT_HD double limited(double length, double min_step, double max_step) {
  length = length < min_step ? min_step : length;
  return length > max_step ? max_step : length;
}

// Whether a step of that length ends where it starts.
CT_HD bool frozen(double tau, double length, double end) {
  return !(tau + length > tau || tau + kLandingRoom * length >= end);
}

template <typename T>
CT_HD void plan_sample(const PlanTask<T>& task, int64_t i) {
  const int64_t b = task.batch;
  const double* sample = task.samples + i;
  const double tau = sample[kTau * b], end = sample[kEnd * b], direction = sample[kDirection * b];
  double length = sample[kLength * b], stop = tau;
  bool lands = false;
  if (task.counts[kFate * b + i] == kRunning) {
    length = limited(length, task.min_step, task.max_step);
    lands = tau + kLandingRoom * length >= end;
    length = lands ? end - tau : length;
    stop = lands ? end : tau + length;
  } else {
    length = 0;
  }
  const double t = direction * tau, h = direction * length, t1 = direction * stop;
  task.step[kStart * b + i] = t;
  task.step[kSigned * b + i] = h;
  task.step[kStop * b + i] = t1;
  task.lands[i] = lands;
  // At the end of a step the field is asked just before it, in case it jumps there.
  const T before_end = std::nextafter(static_cast<T>(t1), static_cast<T>(t));
  for (int j = 0; j < task.stages; ++j) {
    const double c = task.abscissae[j];
    task.times[j * b + i] = c == 1 ? before_end : static_cast<T>(c == 0 ? t : t + c * h);
  }
}

// ---- the judgement
// -------------------------------------------------------------------------------------------

// Of the controller h_next = h * clip(safety * e^last * e_1^past * e_2^before), where e, e_1, e_2
// are the error norms of the last three accepted steps.
struct Gains {
  double last, past, before, safety, min_factor, max_factor;
  bool integral, never_shrinks;
};

CT_HD Gains gains_of(const double* control) {
  const double p = control[kP], i = control[kI], d = control[kD], order = control[kOrder];
  return {-(p + i + d) / order, (p + 2 * d) / order, -d / order,       control[kSafety],
          control[kMinFactor],  control[kMaxFactor], p == 0 && d == 0, control[kNeverShrinks] != 0};
}

// By how much the step changes. The powers are taken together, as one exponential.
CT_HD double step_factor(const Gains& gains, double error, double log_error, double log_last,
                         double log_before) {
  if (!(error < HUGE_VAL)) return gains.min_factor;  // nothing is known but that it was too long
  if (error == 0) return gains.max_factor;
  double power = gains.last * log_error;
  const bool accepted = error <= 1;
  // the history of accepted steps says nothing on how to shorten a rejected one
  if (accepted) power += gains.past * log_last + gains.before * log_before;
  double factor = gains.safety * std::exp(power);
  if (!gains.integral && !accepted && factor > gains.safety) factor = gains.safety;
  const double least = gains.integral && gains.never_shrinks && error < 1 ? 1.0 : gains.min_factor;
  factor = factor < least ? least : factor;
  return factor > gains.max_factor ? gains.max_factor : factor;
}

template <typename T>
struct JudgeTask {
  double* samples;
  int64_t* counts;
  double* step;
  const bool* lands;
  const T* error;
  const double* goals;  // [B, goal_count], increasing, in tau
  Gains gains;
  double min_step, max_step, max_steps;
  int64_t batch, goal_count;
  bool* moved;
};

struct Found {
  int64_t bits, passed;
};

template <typename T>
CT_HD Found judge_sample(const JudgeTask<T>& task, int64_t i) {
  const int64_t b = task.batch;
  double *sample = task.samples + i, *step = task.step + i;
  const double* goals = task.goals + i * task.goal_count;
  int64_t* count = task.counts + i;
  Found found{};
  int64_t output = count[kOutput * b];
  count[kOutputBefore * b] = output;
  task.moved[i] = false;
  if (count[kFate * b] != kRunning) return found;

  const double direction = sample[kDirection * b];
  const double length = std::fabs(step[kSigned * b]), error = static_cast<double>(task.error[i]);
  const bool finite = std::isfinite(error), lands = task.lands[i];
  // that of a least step which lands is longer by what is left over
  const double least = lands ? kLandingRoom * task.min_step : task.min_step;
  const bool moves = error <= 1 || (length <= least && finite);
  const double log_error = std::log(error > kTinyError ? error : kTinyError);
  const double log_last = sample[kLogLast * b];
  const double factor = step_factor(task.gains, error, log_error, log_last, sample[kLogBefore * b]);
  double next = length * (moves || factor < 1 ? factor : 1.0);
  sample[kError * b] = error;
  int64_t fate = kRunning;
  if (moves) {
    const double tau1 = direction * step[kStop * b], proposed = sample[kLength * b];
    if (lands && proposed > next) next = proposed;  // a cut step says little
    found.bits = kMoved;
    for (; output < task.goal_count && goals[output] <= tau1; ++output)
      if (goals[output] < tau1) found.bits |= kInside;
    found.passed = output - count[kOutput * b];
    task.moved[i] = true;
    count[kOutput * b] = output;
    sample[kTau * b] = tau1;
    sample[kLogBefore * b] = log_last;
    sample[kLogLast * b] = log_error > kLogLeast ? log_error : kLogLeast;
    if (lands) fate = kDone;
  } else {
    if (!finite) found.bits |= kNotFinite;
    step[kSigned * b] = 0;
    step[kStop * b] = step[kStart * b];
  }
  sample[kLength * b] = next;
  if (fate == kRunning &&
      frozen(sample[kTau * b], limited(next, task.min_step, task.max_step), sample[kEnd * b]))
    fate = finite ? kStuck : kWild;
  const int64_t steps =
      ++count[(moves ? kAccepted : kRejected) * b] + count[(moves ? kRejected : kAccepted) * b];
  if (fate == kRunning && static_cast<double>(steps) >= task.max_steps) fate = kSpent;
  count[kFate * b] = fate;
  if (fate == kRunning) found.bits |= kBusy;
  return found;
}

// ---- the acceptance
// ------------------------------------------------------------------------------------------

// State and slope at the start of the next step: new ones for the samples that moved.
template <typename T>
struct AcceptTask {
  const bool* moved;
  const T *y, *y1, *k0, *k1;
  T *next_y, *next_k;
  int64_t batch, row;
};

template <typename T>
CT_HD void accept_element(const AcceptTask<T>& task, int64_t i, bool moved) {
  task.next_y[i] = moved ? task.y1[i] : task.y[i];
  task.next_k[i] = moved ? task.k1[i] : task.k0[i];
}

}  // namespace ct::rk
