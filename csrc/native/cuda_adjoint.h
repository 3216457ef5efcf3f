// The exact gradient on a GPU: adjoint.h for one sample in a thread of its own.
#pragma once

#include "cuda_tape.h"
#include "rows.h"

namespace ct::native {

// Numbers that lie apart: those of neighboring threads are neighbors in memory.
template <class Real>
struct Strided {
  Real* numbers;
  int64_t stride;

  CT_BOTH Real& operator[](long j) const { return numbers[j * stride]; }
  CT_BOTH Strided operator+(long j) const { return {numbers + j * stride, stride}; }
};

// As in linear.h.
template <long N, long K, long kRow, long kColumn, class V, class T>
CT_LANES void outer(const V* u, const V* x, Strided<T> w) {
  for (long o = 0; o < N; ++o)
    for (long i = 0; i < K; ++i) w[o * kRow + i * kColumn] += u[o] * x[i];
}

// Cotangents of the rows in, those of everything else out. Each thread adds those of the shared
// arrays to sums of its own.
struct CudaCotangents {
  const void* out;        // real, at the strides of Task.out
  void* y0;               // real [batch, dim]
  void* own;              // real [batch, own]
  void* sums;             // real [numbers, slots], zeros
  int64_t slots;          // threads
  const int64_t* starts;  // of the shared arrays among the numbers
};

template <class Field, class Method>
class SampleAdjoint {
 public:
  using T = Tile<Field, Method, 1>;
  using real = typename T::real;
  static constexpr long dim = T::dim;
  static constexpr int stages = T::stages, total = T::total;

  CT_BOTH SampleAdjoint(const Task& task_, const CudaCotangents& given_, int64_t slot)
      : task(task_), given(given_), tape(*static_cast<const CudaTape*>(task_.tape)) {
    tile.shared.attach(task.shared);
    real* first = static_cast<real*>(given.sums) + slot;
    for (long s = 0; s < Field::shared; ++s)
      sums[s] = {first + given.starts[s] * given.slots, given.slots};
  }

  CT_BOTH void run(int64_t sample_) {
    sample = sample_;
    const real* own = static_cast<const real*>(task.own) + sample * Field::own;
    for (long j = 0; j < Field::own; ++j) tile.own[j] = own[j], own_b[j] = 0;
    for (long d = 0; d < dim; ++d) yb[d] = carried[d] = 0;
    const int64_t begin = tape.begins[sample];
    for (int64_t at = tape.begins[sample + 1]; at-- > begin;) {
      load(at);
      step(tape.steps[at], at == begin);
    }
    // the rows that are y0 itself
    const double* goals = task.t + sample * task.t_stride;
    for (int64_t r = 0; r < task.rows && goals[r] == goals[0]; ++r)
      for (long d = 0; d < dim; ++d) yb[d] += row(r)[d];
    real* to = static_cast<real*>(given.y0) + sample * dim;
    for (long d = 0; d < dim; ++d) to[d] = yb[d];
    real* own_to = static_cast<real*>(given.own) + sample * Field::own;
    for (long j = 0; j < Field::own; ++j) own_to[j] = own_b[j];
  }

 private:
  CT_BOTH const real* row(int64_t number) const {
    return static_cast<const real*>(given.out) + sample * task.out_sample + number * task.out_row;
  }

  CT_BOTH void load(int64_t at) {
    const real* y = static_cast<const real*>(tape.states) + at * dim;
    for (long d = 0; d < dim; ++d) tile.y[d] = y[d];
  }

  CT_BOTH void step(const KeptStep& taken, bool fresh) {
    const real h = static_cast<real>(taken.h);
    for (int i = 0; i < total; ++i)
      for (long d = 0; d < dim; ++d) kb[i][d] = 0;
    const bool inside = read_rows(taken);
    make_stages(taken, fresh, inside);
    for_constants<0, stages>([&](auto i) {
      constexpr double b = Method::b[decltype(i)::value];
      if constexpr (b != 0)
        for (long d = 0; d < dim; ++d) kb[i][d] += h * static_cast<real>(b) * yb[d];
    });
    if constexpr (Method::fsal)
      for (long d = 0; d < dim; ++d) kb[stages - 1][d] += carried[d];
    for (long d = 0; d < dim; ++d) yb[d] += starts[d];
    for_constants<0, total - 1>([&](auto j) {
      constexpr int i = total - 1 - decltype(j)::value;
      if (i < stages || inside) pull_back<i>(h);
    });
    if (Method::fsal && !fresh)
      for (long d = 0; d < dim; ++d) carried[d] = kb[0][d];
    else
      pull_back<0>(h);
  }

  // Cotangents of the rows in the step: yb of its end, `starts` of its start, kb of its slopes.
  // Returns whether any is inside.
  CT_BOTH bool read_rows(const KeptStep& taken) {
    bool inside = false;
    for (long d = 0; d < dim; ++d) starts[d] = 0;
    const double* goals = task.t + sample * task.t_stride;
    for (int64_t r = taken.first_row; r < taken.end_row; ++r) {
      const real* g = row(r);
      if (goals[r] == taken.stop) {
        for (long d = 0; d < dim; ++d) yb[d] += g[d];
        continue;
      }
      inside = true;
      const double theta = std::min((goals[r] - taken.t) / (taken.stop - taken.t), 1.0);
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

  // The stages of the forward step again, as adjoint.h makes them.
  CT_BOTH void make_stages(const KeptStep& taken, bool fresh, bool inside) {
    const real begin = static_cast<real>(taken.t), end = static_cast<real>(taken.stop);
    const real end_time = task.knots == nullptr || task.perturb ? beside(end, begin) : end;
    real first = begin;
    if constexpr (Method::fsal)
      first = fresh ? begin : beside(begin, begin - (end - begin));
    else if (task.perturb)
      first = beside(begin, end);
    times[0] = first;
    for (long d = 0; d < dim; ++d) states[0][d] = tile.y[d];
    tile.evaluate(first, tile.y, tile.k[0]);
    for_constants<1, total>([&](auto i) {
      constexpr int I = decltype(i)::value;
      if (I >= stages && !inside) return;
      times[I] = tile.template stage_time<I>(taken.t, taken.h, end_time);
      tile.template stage_state<I>(static_cast<real>(taken.h), states[I]);
      constexpr bool kUsed = I != (Method::fsal ? stages - 1 : stages);
      if (I < total - 1 && (kUsed || inside)) tile.evaluate(times[I], states[I], tile.k[I]);
    });
  }

  template <int I>
  CT_BOTH void pull_back(real h) {
    bool zero = true;
    for (long d = 0; d < dim; ++d) zero &= kb[I][d] == 0;
    // as at the end of the last step, and in steps behind a sample's last output: there may be no
    // derivative
    if (zero) return;
    real u[dim];
    if constexpr (kSmall<Field>) {
      real time_b;
      Field::vjp(times[I], states[I], tile.own, tile.shared.all, work, kb[I], time_b, u, own_b,
                 sums);
    } else {
      pull_apart(times[I], states[I], kb[I], u);
    }
    for (long d = 0; d < dim; ++d) yb[d] += u[d];
    for_constants<0, I>([&](auto j) {
      constexpr double a = Method::a[I][decltype(j)::value];
      if constexpr (a != 0)
        for (long d = 0; d < dim; ++d) kb[j][d] += h * static_cast<real>(a) * u[d];
    });
  }

  CT_BOTH __attribute__((noinline)) void pull_apart(real t, const real* state, const real* ct,
                                                    real* u) {
    real time_b;
    Field::vjp(t, state, tile.own, tile.shared.all, work, ct, time_b, u, own_b, sums);
  }

  const Task& task;
  const CudaCotangents& given;
  const CudaTape& tape;
  T tile;
  real yb[dim], starts[dim], carried[dim], kb[total][dim];
  real states[total][dim], times[total];
  real own_b[Field::own + 1], work[Field::vjp_work + 1];
  Strided<real> sums[Field::shared + 1];
  int64_t sample;
};

}  // namespace ct::native
