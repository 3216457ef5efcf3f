// A kept step of one sample, made again; and the continuous solution, which is all steps with their
// slopes.
#pragma once

#include "cuda_tape.h"
#include "tile.h"

namespace ct::native {

template <class Field, class Method>
class StagesAgain {
 public:
  using T = Tile<Field, Method, 1>;
  using real = typename T::real;
  static constexpr long dim = T::dim;
  static constexpr int stages = T::stages, total = T::total;

 protected:
  CT_BOTH explicit StagesAgain(const Task& task_)
      : task(task_), tape(*static_cast<const CudaTape*>(task_.tape)) {
    tile.shared.attach(task.shared);
  }

  CT_BOTH void load_own(int64_t sample) {
    const real* own = static_cast<const real*>(task.own) + sample * Field::own;
    for (long j = 0; j < Field::own; ++j) tile.own[j] = own[j];
  }

  CT_BOTH void load_step(int64_t step) {
    taken = tape.steps[step];
    const real* y = static_cast<const real*>(tape.states) + step * dim;
    for (long d = 0; d < dim; ++d) tile.y[d] = y[d];
  }

  // The stages, as adjoint.h makes them.
  //
  // anew: the first slope is not the last one of the step before.
  // inside: those are needed that only the interpolant reads.
  // last: the last slope is read, too.
  CT_BOTH void make_stages(bool anew, bool inside, bool last) {
    const real begin = static_cast<real>(taken.t), end = static_cast<real>(taken.stop);
    const real end_time = task.knots == nullptr || task.perturb ? beside(end, begin) : end;
    real first = begin;
    if (Method::fsal && !anew)
      first = beside(begin, begin - (end - begin));
    else if (taken.jumped || (!Method::fsal && task.perturb))
      first = beside(begin, end);
    stage_times[0] = first;
    for (long d = 0; d < dim; ++d) states[0][d] = tile.y[d];
    tile.evaluate(first, tile.y, tile.k[0]);
    for_constants<1, total>([&](auto i) {
      constexpr int I = decltype(i)::value;
      if (I >= stages && !inside) return;
      stage_times[I] = tile.template stage_time<I>(taken.t, taken.h, end_time);
      tile.template stage_state<I>(static_cast<real>(taken.h), states[I]);
      constexpr bool kUsed = I != (Method::fsal ? stages - 1 : stages);
      if ((I < total - 1 || last) && (kUsed || inside))
        tile.evaluate(stage_times[I], states[I], tile.k[I]);
    });
  }

  const Task& task;
  const CudaTape& tape;
  T tile;
  real states[total][dim], stage_times[total];
  KeptStep taken;
};

// The continuous solution: its steps' starts and lengths in tau, and states and slopes.
struct CudaPieces {
  double *starts, *lengths;  // [count]
  void *states, *slopes;     // real [count, batch, dim] and [count, total, batch, dim]
  int64_t count;
};

// One step of one sample. All samples made the same steps.
template <class Field, class Method>
class SamplePiece : StagesAgain<Field, Method> {
 public:
  using S = StagesAgain<Field, Method>;
  using typename S::real;
  static constexpr long dim = S::dim;

  CT_BOTH SamplePiece(const Task& task_, const CudaPieces& given_) : S(task_), given(given_) {}

  // A thread without a piece goes along with its block.
  CT_BOTH void run(int64_t number) {
    const bool there = number < given.count * task.batch;
    number = std::min(number, given.count * task.batch - 1);
    const int64_t piece = number / task.batch, sample = number % task.batch;
    this->load_own(sample);
    this->load_step(tape.begins[sample] + piece);
    this->make_stages(piece == 0 || taken.jumped, true, true);
    if (!there) return;
    if (sample == 0) {
      const double direction = taken.h < 0 ? -1 : 1;
      given.starts[piece] = direction * taken.t;
      given.lengths[piece] = direction * taken.stop - direction * taken.t;
    }
    const int64_t size = task.batch * dim;
    real* to = static_cast<real*>(given.states) + piece * size + sample * dim;
    for (long d = 0; d < dim; ++d) to[d] = tile.y[d];
    to = static_cast<real*>(given.slopes) + piece * S::total * size + sample * dim;
    for (int i = 0; i < S::total; ++i, to += size)
      for (long d = 0; d < dim; ++d) to[d] = tile.k[i][d];
  }

 private:
  using S::tape, S::taken, S::task, S::tile;

  const CudaPieces& given;
};

}  // namespace ct::native
