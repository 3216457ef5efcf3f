// A solve as Python hands it over, and what it gets back. Plain C: ctorch/ode/native_task.py holds
// the same struct. Arrays are contiguous unless strides are given; `real` is the state's type.
#pragma once

#include "base.h"

namespace ct::native {

// On what the end of a step hangs, but for the output times, which have their numbers: on nothing
// (its length is a frozen number), or on a constant.
constexpr int64_t kFree = -1, kConstant = -2;

// In place of the number with the largest error: there is none, or not even the slope where the
// solve stopped is finite.
constexpr int64_t kUnknown = -1, kNoSlope = -2;

struct Task {
  int64_t batch, rows;  // samples, output times
  const double* t;      // [rows], or [batch, rows]
  int64_t t_stride;     // from sample to sample; 0: the same times for all
  const void* y0;       // real [batch, dim]
  void* out;            // real: rows of samples, at these strides
  int64_t out_sample, out_row;
  const void* own;            // real [batch, own]
  const void* const* shared;  // real arrays
  double rtol, atol;
  const void *rtols, *atols;  // null, or real [batch, dim] in place of the numbers
  double p, i, d, safety, min_factor, max_factor, never_shrinks;
  double first_step;  // negative: to be found
  double min_step, max_step, max_steps;
  int64_t overshoot;       // steps may end beyond the last time
  int64_t patience;        // attempts after which it is asked whether the solve creeps; 0: never
  const double* knots;     // fixed steps: [knot_count] times
  const int64_t* anchors;  // the output time that a knot is, or one of kFree, kConstant
  int64_t knot_count, perturb;
  int64_t threads;
  int64_t* counts;  // [3, batch]: evaluations, accepted, rejected steps
  int64_t* status;  // [batch]
  double* last;     // [3, batch]: t, step, error norm at the end
  void* tape;       // where the accepted steps are kept for the gradient, or null
  // what else is asked: an Observation, or null
  void* observation;
  const void* const* norm_shared;  // arrays of a norm of the user's own
  int64_t has_event;               // the last row is an event's, whose time is a constant
  // [batch]: of one that failed the number of its state with the largest error, or one of kUnknown,
  // kNoSlope; or null
  int64_t* worst;
};

// Cotangents of the rows in, those of everything else out.
struct Cotangents {
  const void* out;       // real, at the strides of Task.out
  void* y0;              // real [batch, dim]
  void* own;             // real [batch, own]
  double* t;             // [batch, times], zeros; null where none is wanted
  int64_t times;         // of the output, and of the grid where that has gradients
  void* const* shared;   // real arrays as Task.shared, zeros; null where none is wanted
  const int64_t* sizes;  // of the shared arrays
  // real [P, batch, dim] and [P, total, batch, dim]: of the steps' states and slopes, or null
  const void *states, *slopes;
  const double *starts, *lengths;  // [P], in tau; null where no times are wanted
};

// ctorch.ode.Status
enum Status : int64_t { kSuccess = 0, kMaxSteps = 2, kUnderflow = 3, kNonfinite = 4 };

}  // namespace ct::native
