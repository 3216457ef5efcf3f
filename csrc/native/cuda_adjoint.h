// The exact gradient on a GPU: adjoint.h for one sample in a thread of its own. With CT_TOGETHER
// the samples of a block go back together, each through its own steps, until the last one is done;
// then whatever has barriers inside is called by all threads, and those that have nothing to pull
// back add nothing.
#pragma once

#include "cuda_stages.h"
#include "cuda_sums.h"
#include "hang.h"
#include "rows.h"

namespace ct::native {

// Cotangents of the rows in, those of everything else out. The shared arrays' are added up by
// threads or blocks for themselves.
struct CudaCotangents {
  const void* out;        // real, at the strides of Task.out
  void* y0;               // real [batch, dim]
  void* own;              // real [batch, own]
  double* t;              // [batch, times], zeros; null where none is wanted
  int64_t times;          // of the output, and of the grid where that has gradients
  void* sums;             // real, zeros: of threads [numbers, slots], of blocks [slots, numbers]
  int64_t slots;          // threads, or blocks
  const int64_t* starts;  // [shared + 1]: of the shared arrays among the numbers
  int64_t launched;       // a block adds up in the memory that was launched with it
  // real [P, batch, dim] and [P, total, batch, dim]: of the pieces, or null
  const void *states, *slopes;
  const double *piece_starts, *piece_lengths;  // [P], in tau; null where no times are wanted
};

template <class Field, class Method, class Sums>
class SampleAdjoint : StagesAgain<Field, Method> {
 public:
  using S = StagesAgain<Field, Method>;
  using typename S::real;
  static constexpr long dim = S::dim;
  static constexpr int stages = S::stages, total = S::total;

  CT_BOTH SampleAdjoint(const Task& task_, const CudaCotangents& given_, const Sums& sums_)
      : S(task_), given(given_), all_sums(sums_) {
    for (long s = 0; s < Field::shared; ++s) sums[s] = all_sums + given.starts[s];
  }

  // A thread without a sample goes along with its block.
  CT_BOTH void run(int64_t number) {
    begin(number);
    if (at == first) end();
    while (any(at > first)) {
      const bool stepping = at > first;
      if (stepping) this->load_step(--at);
      step(stepping);
      if (stepping && at == first) end();
    }
  }

 private:
  using S::stage_times, S::states, S::tape, S::taken, S::task, S::tile;

  // ---- a sample
  // ------------------------------------------------------------------------------------------------

  CT_BOTH const real* row(int64_t number) const {
    return static_cast<const real*>(given.out) + sample * task.out_sample + number * task.out_row;
  }

  CT_BOTH const double* goals() const { return task.t + sample * task.t_stride; }

  CT_BOTH void begin(int64_t number) {
    there = number < task.batch;
    sample = std::min(number, task.batch - 1);
    this->load_own(sample);
    for (long j = 0; j < Field::own; ++j) own_b[j] = 0;
    const real* y0 = static_cast<const real*>(task.y0) + sample * dim;
    for (long d = 0; d < dim; ++d) tile.y[d] = y0[d];
    clear();
    taken = {goals()[0], 0, goals()[0], kFree, 0, 0, 0};
    first = tape.begins[sample], at = there ? tape.begins[sample + 1] : first;
    // nothing is read behind the last rows, and a failed sample's steps there may lead up to where
    // the field has no derivative
    if (given.states != nullptr) return;
    while (at > first && tape.steps[at - 1].first_row == tape.steps[at - 1].end_row) --at;
  }

  // A thread without cotangents adds nothing, whatever its numbers are.
  CT_BOTH void clear() {
    for (long d = 0; d < dim; ++d) yb[d] = carried[d] = 0;
    tau = 0;
  }

  CT_BOTH void end() {
    if (there) {
      // the rows that are y0 itself
      for (int64_t r = 0; r < task.rows && goals()[r] == goals()[0]; ++r)
        for (long d = 0; d < dim; ++d) yb[d] += row(r)[d];
      real* to = static_cast<real*>(given.y0) + sample * dim;
      for (long d = 0; d < dim; ++d) to[d] = yb[d];
      real* own = static_cast<real*>(given.own) + sample * Field::own;
      for (long j = 0; j < Field::own; ++j) own[j] = own_b[j];
      if (timed()) times()[task.anchors == nullptr ? 0 : task.anchors[0]] += tau;
    }
    clear();
  }

  // ---- one step
  // ------------------------------------------------------------------------------------------------

  // stepping: this thread's sample makes it.
  CT_BOTH void step(bool stepping) {
    const real h = static_cast<real>(taken.h);
    for (int i = 0; i < total; ++i)
      for (long d = 0; d < dim; ++d) kb[i][d] = 0;
    for (long d = 0; d < dim; ++d) starts[d] = 0;
    tb = hb = 0;
    const bool reads = stepping && read_rows(), inside = any(reads);
    const bool anew = at == first || taken.jumped;
    this->make_stages(anew, inside, timed());
    if (timed() && reads) read_times();
    for_constants<0, stages>([&](auto i) {
      constexpr double b = Method::b[decltype(i)::value];
      if constexpr (b != 0)
        for (long d = 0; d < dim; ++d) kb[i][d] += h * static_cast<real>(b) * yb[d];
    });
    for (long d = 0; d < dim; ++d) yb[d] += starts[d];
    for_constants<0, total - stages>([&](auto j) {
      if (inside) pull_back<total - 1 - decltype(j)::value>(h);
    });
    if constexpr (Method::fsal) {
      if (timed() && inside) lengthen<stages - 1>();
      for (long d = 0; d < dim; ++d) kb[stages - 1][d] += carried[d];
    }
    for_constants<0, stages - 1>([&](auto j) { pull_back<stages - 1 - decltype(j)::value>(h); });
    if constexpr (Method::fsal) {
      if (timed()) lengthen<0>();
      read_slope<0>();
      hand_over(anew);
    }
    if (!Method::fsal || any(anew)) pull_back<0>(h);
    if (timed() && stepping) {
      const int64_t before = at == first ? kFree : tape.steps[at - 1].anchor;
      tau = hang(taken.anchor, before, tb, hb, tau, times());
    }
  }

  // The first slope to the step before, of which it is the last one.
  CT_BOTH void hand_over(bool anew) {
    for (long d = 0; d < dim; ++d) {
      carried[d] = anew ? real(0) : kb[0][d];
      kb[0][d] = anew ? kb[0][d] : real(0);
    }
  }

  // Cotangents of the rows in the step: yb of its end, `starts` of its start, kb of its slopes.
  // Returns whether any is inside.
  CT_BOTH bool read_rows() {
    bool inside = given.states != nullptr;
    if (inside) {
      const real* g = static_cast<const real*>(given.states) + piece_of(1);
      for (long d = 0; d < dim; ++d) starts[d] += g[d];
    }
    for (int64_t r = taken.first_row; r < taken.end_row; ++r) {
      const real* g = row(r);
      if (ends_step(r)) {
        for (long d = 0; d < dim; ++d) yb[d] += g[d];
        continue;
      }
      inside = true;
      const double theta = theta_of(taken, goals()[r]);
      for_constants<0, total>([&](auto i) {
        double weight = 0;
        for_constants<0, Method::degree>([&](auto m) {
          constexpr int power = Method::degree - 1 - decltype(m)::value;
          constexpr double p = Method::p[decltype(i)::value][power];
          weight = weight * theta + p;
        });
        const real w = static_cast<real>(weight * theta * taken.h);
        for (long d = 0; d < dim; ++d) kb[i][d] += w * g[d];
      });
      for (long d = 0; d < dim; ++d) starts[d] += g[d];
    }
    return inside;
  }

  // Where the sample's numbers begin among those of the pieces, each of so many arrays; the step is
  // one of them.
  CT_BOTH int64_t piece_of(int arrays, int array = 0) const {
    return (((at - first) * arrays + array) * task.batch + sample) * dim;
  }

  // As in adjoint.h. All samples made the same steps.
  template <int I>
  CT_BOTH void read_slope() {
    if (given.slopes == nullptr || !there) return;
    const real* g = static_cast<const real*>(given.slopes) + piece_of(total, I);
    for (long d = 0; d < dim; ++d) kb[I][d] += g[d];
  }

  template <int I>
  CT_BOTH bool has_cotangent() const {
    bool has = false;
    for (long d = 0; d < dim; ++d) has |= kb[I][d] != 0;
    return has;
  }

  template <int I>
  CT_BOTH void pull_back(real h) {
    if (timed() && !(Method::fsal && (I == 0 || I == stages - 1))) lengthen<I>();
    if constexpr (!Method::fsal || I > 0) read_slope<I>();
    // as at the end of the last step: there may be no derivative
    const bool active = has_cotangent<I>();
    if (!any(active)) return;
    real u[dim], time_b;
    if constexpr (kSmall<Field>)
      pull(active, stage_times[I], states[I], kb[I], u, time_b);
    else
      pull_apart(active, stage_times[I], states[I], kb[I], u, time_b);
    if (!active) return;
    const double by_time = time_b;
    constexpr double c = Method::c[I];
    tb += by_time, hb += c * by_time;
    for (long d = 0; d < dim; ++d) yb[d] += u[d];
    for_constants<0, I>([&](auto j) {
      constexpr double a = Method::a[I][decltype(j)::value];
      if constexpr (a != 0)
        for (long d = 0; d < dim; ++d) kb[j][d] += h * static_cast<real>(a) * u[d];
    });
  }

  CT_BOTH __attribute__((noinline)) void pull_apart(bool active, real t, const real* state,
                                                    const real* ct, real* u, real& time_b) {
    pull(active, t, state, ct, u, time_b);
  }

  CT_LANES void pull(bool active, real t, const real* state, const real* ct, real* u,
                     real& time_b) {
    if constexpr (kTogether) {
      real nowhere[Field::own + 1] = {};
      all_sums.adder->active = active;
      Field::vjp(t, state, tile.own, tile.shared.all, work, ct, time_b, u, active ? own_b : nowhere,
                 sums);
    } else {
      Field::vjp(t, state, tile.own, tile.shared.all, work, ct, time_b, u, own_b, sums);
    }
  }

  // ---- times
  // -----------------------------------------------------------------------------------------------

  CT_BOTH bool timed() const { return given.t != nullptr; }
  CT_BOTH double* times() const { return given.t + sample * given.times; }

  // Whether a row is the step's end itself. The derivative of one that only happens to lie there is
  // the interpolant's.
  CT_BOTH bool ends_step(int64_t row) const {
    return goals()[row] == taken.stop && (!timed() || row == taken.anchor);
  }

  // How the rows inside the step, and the piece, move with times, its start and its length.
  CT_BOTH void read_times() {
    if (given.piece_starts != nullptr && sample == 0) {  // all samples share them
      const double direction = taken.h < 0 ? -1 : 1;
      tb += direction * given.piece_starts[at - first];
      hb += direction * given.piece_lengths[at - first];
    }
    for (int64_t r = taken.first_row; r < taken.end_row; ++r) {
      if (ends_step(r)) continue;
      const real* g = row(r);
      const double theta = theta_of(taken, goals()[r]);
      double speed = 0;
      for_constants<0, total>([&](auto i) {
        double weight = 0, along = 0;
        for_constants<0, Method::degree>([&](auto m) {
          constexpr int power = Method::degree - 1 - decltype(m)::value;
          constexpr double p = (power + 1) * Method::p[decltype(i)::value][power];
          weight = weight * theta + p;
        });
        for (long d = 0; d < dim; ++d) along += tile.k[i][d] * g[d];
        speed += weight * along;
      });
      times()[r] += speed;
      tb -= speed;
      hb -= theta * speed;
    }
  }

  // The share of slope I in the cotangent of the length: h stands before all that kb comes from.
  template <int I>
  CT_BOTH void lengthen() {
    if (taken.h == 0 || !has_cotangent<I>()) return;
    real along = 0;
    for (long d = 0; d < dim; ++d) along += kb[I][d] * tile.k[I][d];
    hb += along / taken.h;
  }

  const CudaCotangents& given;
  const Sums all_sums;
  real yb[dim], starts[dim], carried[dim], kb[total][dim];
  real own_b[Field::own + 1], work[Field::vjp_work + 1];
  double tau, tb, hb;  // cotangents of the step's end, start and length
  Sums sums[Field::shared + 1];
  int64_t sample, first, at;
  bool there;
};

}  // namespace ct::native
