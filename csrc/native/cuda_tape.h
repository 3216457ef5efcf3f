// The accepted steps of a solve on a GPU, from which the exact gradient is made. A solve is made
// twice: once to count its steps, and again with room for them.
#pragma once

#include "task.h"

namespace ct::native {

struct KeptStep {
  double t, h, stop;
  int64_t anchor;              // on what the end hangs
  int64_t first_row, end_row;  // the output times in it
  int64_t jumped;              // its first slope was evaluated just after its start
};

// What Task.observation points to.
struct CudaObservation {
  const double* stops;     // in tau, increasing: where adaptive steps have to end
  const int64_t* jumps;    // whether the field jumps there
  const int64_t* anchors;  // the output time that one is, or kConstant
  int64_t stop_count;
  int64_t dense;  // all steps become pieces of a continuous solution
};

// What Task.tape points to.
struct CudaTape {
  int64_t* accepted;      // [batch]: how many steps there are
  const int64_t* begins;  // [batch + 1]: where those of a sample begin; null: they are counted only
  KeptStep* steps;        // one more than all of them
  void* states;           // real [steps, dim]: at their starts
};

// The steps of one sample, as they are made.
template <class Real>
class Keeper {
 public:
  CT_BOTH Keeper(const CudaTape& tape_, int64_t sample, int64_t batch)
      : tape(tape_), at(tape_.begins[sample]), end(tape_.begins[sample + 1]) {
    last = tape.begins[batch];
  }

  // Room for the state, which the caller fills. What is too much (the solves differ, which the
  // counts tell) goes where nothing is read.
  CT_BOTH Real* add(int64_t, double t, double h, double stop, int64_t anchor, int64_t first_row,
                    int64_t end_row, long dim, int64_t jumped = 0) {
    const int64_t number = at < end ? at++ : last;
    tape.steps[number] = {t, h, stop, anchor, first_row, end_row, jumped};
    return static_cast<Real*>(tape.states) + number * dim;
  }

  CT_BOTH void skip(int64_t steps) { at = std::min(at + steps, end); }

 private:
  const CudaTape& tape;
  int64_t at, end, last;
};

}  // namespace ct::native
