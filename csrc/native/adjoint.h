// The exact gradient of a solve, step sizes held fixed: the accepted steps are made again from
// their states, last to first, and every stage is pulled back by the field's vector-Jacobian
// product.
//
// With k_i = f(t_i, Y_i), Y_i = y + h sum_j a_ij k_j and the cotangents yb of y1 and kb of the
// slope at the end, a step gives kb_i = h b_i yb, kb_last += kb; then from the last stage to the
// first u_i = kb_i df/dy, yb += u_i, kb_j += h a_ij u_i; what remains in kb_0 goes to the step
// before.
//
// Times: h has the cotangent sum_i (<kb_i, k_i> / h + c_i kb_i df/dt), kb_last without what the
// step after gave it, and the start sum_i kb_i df/dt. Where the end hangs on an output time, both
// move it; else the length is frozen, and the start moves all steps after it.
#pragma once

#include <algorithm>

#include "hang.h"
#include "owned.h"
#include "pending.h"
#include "rows.h"
#include "runs.h"
#include "shares.h"

namespace ct::native {

// Scratch of the derivative.
template <class Field>
constexpr long kScratchBack = [] {
  if constexpr (kRecords<Field>)
    return Field::pull_work;
  else
    return Field::vjp_work;
}();

template <class Field, class Method, int W>
class Adjoint {
 public:
  using T = Tile<Field, Method, W>;
  using real = typename T::real;
  using V = typename T::V;
  using D = typename T::D;
  static constexpr long dim = T::dim;
  static constexpr int stages = T::stages, total = T::total;

  Adjoint(const Task& task_, const Tape<real>& tape_, const Run<real>& run_,
          const Cotangents& cotangents_, real* const* shared_)
      : task(task_), tape(tape_), run(run_), cotangents(cotangents_) {
    tile.shared.attach(task.shared);
    shared.attach(shared_);
  }

  void sweep() {
    next = run.begin;
    for (int lane = 0; lane < W; ++lane) {
      clear(lane);
      for (long d = 0; d < dim; ++d) set(tile.y[d], lane, states(run.begin)[d]);
      for (long j = 0; j < Field::own; ++j) set(tile.own[j], lane, owned(run.begin)[j]);
      sample[lane] = -1;
      refill(lane);
    }
    while (busy > 0) {
      if (std::any_of(at, at + W, [](int64_t a) { return a >= 0; }))
        step();
      else
        first_slope();
      for (int lane = 0; timed() && lane < W; ++lane) hang(lane);
      for (int lane = 0; lane < W; ++lane) go_back(lane);
    }
    shared.flush();
  }

 private:
  static constexpr int64_t kNone = -1, kFirstSlope = -2;  // in place of a step
  static constexpr double kAnew = 1, kAfterJump = 2;      // where a first slope is no last one

  const real* states(int64_t i) const { return static_cast<const real*>(task.y0) + i * dim; }
  const real* owned(int64_t i) const { return static_cast<const real*>(task.own) + i * Field::own; }
  const real* row(int64_t i, int64_t number) const {
    return static_cast<const real*>(cotangents.out) + i * task.out_sample + number * task.out_row;
  }

  // ---- samples in lanes
  // ----------------------------------------------------------------------------------------

  // A lane without cotangents adds nothing, whatever its numbers are.
  void clear(int lane) {
    for (long d = 0; d < dim; ++d) {
      set(yb[d], lane, 0);
      set(carried[d], lane, 0);
    }
    for (long j = 0; j < Field::own; ++j) set(ownb[j], lane, 0);
    set(tau, lane, 0);
    set(t, lane, task.t[0]);
    set(h, lane, 0);
    set(stop, lane, task.t[0]);
    set(fresh, lane, kAnew);
    set(beyond, lane, 0);
    at[lane] = kNone;
  }

  // A sample's last step with a cotangent, or -1.
  int64_t behind(int64_t i) const {
    return (cotangents.states != nullptr ? run.last : run.read)[i - run.begin];
  }

  void refill(int lane) {
    while (next < run.end) {
      const int64_t i = next++;
      if (behind(i) < 0) {  // all its rows are y0
        real* to = static_cast<real*>(cotangents.y0) + i * dim;
        std::fill_n(to, dim, real(0));
        std::fill_n(static_cast<real*>(cotangents.own) + i * Field::own, Field::own, real(0));
        first_rows(i, to);
        continue;
      }
      sample[lane] = i;
      for (long j = 0; j < Field::own; ++j) set(tile.own[j], lane, owned(i)[j]);
      at[lane] = behind(i);
      load(lane);
      ++busy;
      return;
    }
  }

  void load(int lane) {
    const Taped& taped = run.steps[at[lane]];
    set(t, lane, taped.t);
    set(h, lane, taped.h);
    set(stop, lane, taped.stop);
    set(fresh, lane, taped.before < 0 ? kAnew : taped.jumped ? kAfterJump : 0);
    set(beyond, lane, 0);
    const real* y = run.states.data() + at[lane] * dim;
    for (long d = 0; d < dim; ++d) set(tile.y[d], lane, y[d]);
  }

  // Adds the cotangents of the rows that are y0 itself.
  void first_rows(int64_t i, real* to) const {
    const double* times = task.t + i * task.t_stride;
    for (int64_t r = 0; r < task.rows && times[r] == times[0]; ++r)
      for (long d = 0; d < dim; ++d) to[d] += row(i, r)[d];
  }

  // To the step before; where the slope at the start is not that one's last, it is still to be
  // pulled back, as the end of a step of no length.
  void go_back(int lane) {
    if (at[lane] == kNone) return;
    if (at[lane] >= 0) {
      const Taped& taped = run.steps[at[lane]];
      resume[lane] = taped.before;
      if (taped.before >= 0 && !taped.jumped) return go_to(lane, taped.before);
      at[lane] = kFirstSlope;
      if constexpr (Method::fsal) {
        if (taped.jumped) set(beyond, lane, taped.h < 0 ? -kInfinity : kInfinity);
        set(h, lane, 0);
        set(stop, lane, get(t, lane));
        return;
      }
    }
    if (resume[lane] >= 0) return go_to(lane, resume[lane]);
    const int64_t i = sample[lane];
    real* to = static_cast<real*>(cotangents.y0) + i * dim;
    for (long d = 0; d < dim; ++d) to[d] = get(yb[d], lane);
    first_rows(i, to);
    real* own = static_cast<real*>(cotangents.own) + i * Field::own;
    for (long j = 0; j < Field::own; ++j) own[j] = get(ownb[j], lane);
    if (timed()) times_of(i)[task.anchors == nullptr ? 0 : task.anchors[0]] += get(tau, lane);
    --busy;
    clear(lane);
    refill(lane);
  }

  void go_to(int lane, int64_t step) {
    at[lane] = step;
    load(lane);
  }

  // ---- one step
  // ------------------------------------------------------------------------------------------------

  void step() {
    bool inside = false;
    for (int i = 0; i < total; ++i)
      for (long d = 0; d < dim; ++d) kb[i][d] = V{};
    tb = hb = D{};
    read_rows(inside);
    const V length = convert<V>(h);
    record = recorded(inside);
    if (record == nullptr) make_stages(length, inside);
    if (timed() && inside) read_times();
    for_constants<0, stages>([&](auto i) {
      if (Method::b[i] != 0)
        for (long d = 0; d < dim; ++d)
          kb[i][d] += length * static_cast<real>(Method::b[i]) * ends[d];
    });
    for (long d = 0; d < dim; ++d) yb[d] = ends[d] + starts[d];
    if (inside) for_backwards<total - 1, stages>([&](auto i) { pull_back<i>(length); });
    if constexpr (Method::fsal) {
      if (timed() && inside) lengthen<stages - 1>();
      for (long d = 0; d < dim; ++d) kb[stages - 1][d] += carried[d];
    }
    for_backwards<stages - 1, 1>([&](auto i) { pull_back<i>(length); });
    if constexpr (Method::fsal) {
      if (timed()) lengthen<0>();
      read_slope<0>();
      for (long d = 0; d < dim; ++d) carried[d] = kb[0][d];
    } else {
      pull_back<0>(length);
    }
  }

  // The slopes at the starts alone: no lane has a step left.
  void first_slope() {
    tb = hb = D{};
    for (long d = 0; d < dim; ++d) kb[0][d] = carried[d], carried[d] = V{};
    const V begin = convert<V>(t);
    times[0] = select(mask_for<V>(beyond != D{}), beside(begin, convert<V>(beyond)), begin);
    if constexpr (kRecords<Field>)
      tile.record(times[0], tile.y, again, tile.k[0]);
    else
      std::copy_n(tile.y, dim, again);
    record = again;
    pull_back<0>(V{});
  }

  template <int kFrom, int kTo, class Body>
  static void for_backwards(const Body& body) {
    if constexpr (kFrom >= kTo) {
      body(std::integral_constant<int, kFrom>{});
      for_backwards<kFrom - 1, kTo>(body);
    }
  }

  // Cotangents of the rows in the step: `ends` of its end, `starts` of its start, kb of its slopes.
  void read_rows(bool& inside) {
    for (long d = 0; d < dim; ++d) ends[d] = yb[d], starts[d] = V{};
    for (int lane = 0; lane < W; ++lane) {
      if (at[lane] < 0) continue;
      const Taped& taped = run.steps[at[lane]];
      const double* times = task.t + sample[lane] * task.t_stride;
      if (cotangents.states != nullptr) {
        inside = true;
        const real* g = static_cast<const real*>(cotangents.states) + piece_of(lane, 1);
        for (long d = 0; d < dim; ++d) set(starts[d], lane, get(starts[d], lane) + g[d]);
      }
      for (int64_t r = taped.first_row; r < taped.end_row; ++r) {
        const real* g = row(sample[lane], r);
        if (ends_step(taped, times, r)) {
          for (long d = 0; d < dim; ++d) set(ends[d], lane, get(ends[d], lane) + g[d]);
          continue;
        }
        inside = true;
        const double theta = theta_of(taped, times[r]);
        for (int i = 0; i < total; ++i) {
          double weight = 0;
          for (int m = Method::degree - 1; m >= 0; --m) weight = weight * theta + Method::p[i][m];
          const real w = static_cast<real>(weight * theta * taped.h);
          for (long d = 0; d < dim; ++d) set(kb[i][d], lane, get(kb[i][d], lane) + w * g[d]);
        }
        for (long d = 0; d < dim; ++d) set(starts[d], lane, get(starts[d], lane) + g[d]);
      }
    }
  }

  // The number of the step as a piece of the continuous solution, which all samples made.
  int64_t piece_of(int lane) const { return at[lane] / (run.end - run.begin); }

  // Where the sample's numbers begin among those of the pieces, each of so many arrays.
  int64_t piece_of(int lane, int arrays, int array = 0) const {
    return ((piece_of(lane) * arrays + array) * task.batch + sample[lane]) * dim;
  }

  // Cotangents of slope I as a part of a piece. It does not come from the state at the end, as what
  // else is in kb does: no length stands before it.
  template <int I>
  void read_slope() {
    if (cotangents.slopes == nullptr) return;
    for (int lane = 0; lane < W; ++lane) {
      if (at[lane] < 0) continue;
      const real* g = static_cast<const real*>(cotangents.slopes) + piece_of(lane, total, I);
      for (long d = 0; d < dim; ++d) set(kb[I][d], lane, get(kb[I][d], lane) + g[d]);
    }
  }

  // What the forward step left of its stages. Samples that step together are in the tiles that they
  // were in then.
  const V* recorded(bool inside) {
    if constexpr (kRecords<Field> && Method::gradient) {
      if (at[0] < 0 || (inside && total > stages) || timed()) return nullptr;
      const int64_t number = at[0] / (run.end - run.begin);
      if (number >= static_cast<int64_t>(tape.records.size())) return nullptr;
      make_times();
      return reinterpret_cast<const V*>(tape.records[number]) +
             sample[0] / W * stages * kRecord<Field>;
    }
    return nullptr;
  }

  // The stages of the forward step again.
  void make_stages(V length, bool inside) {
    make_times();
    if constexpr (kRecords<Field> && !Method::fsal) {
      tile.record(times[0], tile.y, again, tile.k[0]);
    } else {
      std::copy_n(tile.y, dim, again);
      tile.evaluate(times[0], tile.y, tile.k[0]);
    }
    for_constants<1, total>([&](auto i) {
      if (i >= stages && !inside) return;
      V* const state = again + i * kRecord<Field>;
      tile.template stage_state<i>(length, state);
      constexpr bool kUsed = i != (Method::fsal ? stages - 1 : stages);
      const bool later = i < total - 1 || timed();  // something reads its slope
      if constexpr (kRecords<Field>)
        tile.record(times[i], state, state, tile.k[i]);
      else if (later && (kUsed || inside))
        tile.evaluate(times[i], state, tile.k[i]);
    });
    record = again;
  }

  void make_times() {
    const V begin = convert<V>(t), end = convert<V>(stop);
    V end_time = task.knots == nullptr || task.perturb ? beside(end, begin) : end;
    // the first slope is the last one of the step before, which was taken just before its end
    const V earlier = begin - (end - begin);
    times[0] = begin;
    if constexpr (Method::fsal) {
      times[0] = select(mask_for<V>(fresh > D{}), begin, beside(begin, earlier));
      times[0] = select(mask_for<V>(fresh == all<D>(kAfterJump)), beside(begin, end), times[0]);
      end_time = select(mask_for<V>(beyond != D{}), beside(end, convert<V>(beyond)), end_time);
    } else if (task.perturb) {
      times[0] = beside(begin, end);
    }
    for_constants<1, total>(
        [&](auto i) { times[i] = tile.template stage_time<i>(t, h, end_time); });
  }

  static bool any_of(const V* x) {
    for (long d = 0; d < dim; ++d)
      if (any(x[d] != V{})) return true;
    return false;
  }

  template <int I>
  __attribute__((noinline)) void pull_back(V length) {
    if (timed() && (!Method::fsal || I != stages - 1)) lengthen<I>();
    read_slope<I>();
    V u[dim], time_b;
    const V* const state = record + I * kRecord<Field>;
    if (!any_of(kb[I])) return;  // as at the end of the last step
    if constexpr (kRecords<Field>)
      Field::pull(times[I], state, tile.own, tile.shared.all, work, state + dim, kb[I], time_b, u,
                  ownb, shared.all);
    else
      Field::vjp(times[I], state, tile.own, tile.shared.all, work, kb[I], time_b, u, ownb,
                 shared.all);
    tb += convert<D>(time_b);
    hb += Method::c[I] * convert<D>(time_b);
    for (long d = 0; d < dim; ++d) yb[d] += u[d];
    for_constants<0, I>([&](auto j) {
      if (Method::a[I][j] != 0)
        for (long d = 0; d < dim; ++d)
          kb[j][d] += length * static_cast<real>(Method::a[I][j]) * u[d];
    });
  }

  // ---- times
  // -----------------------------------------------------------------------------------------------

  bool timed() const { return cotangents.t != nullptr; }
  double* times_of(int64_t i) const { return cotangents.t + i * cotangents.times; }

  // Whether a row is the step's end itself. The derivative of one that only happens to lie there is
  // the interpolant's.
  bool ends_step(const Taped& taped, const double* times, int64_t row) const {
    return times[row] == taped.stop && (!timed() || row == taped.anchor);
  }

  // How the rows inside the step, and the piece, move with times, its start and its length.
  void read_times() {
    for (int lane = 0; lane < W; ++lane) {
      if (at[lane] < 0) continue;
      const Taped& taped = run.steps[at[lane]];
      const double* times = task.t + sample[lane] * task.t_stride;
      if (cotangents.starts != nullptr && sample[lane] == 0) {  // all samples share them
        const double direction = taped.h < 0 ? -1 : 1;
        set(tb, lane, get(tb, lane) + direction * cotangents.starts[piece_of(lane)]);
        set(hb, lane, get(hb, lane) + direction * cotangents.lengths[piece_of(lane)]);
      }
      for (int64_t r = taped.first_row; r < taped.end_row; ++r) {
        if (ends_step(taped, times, r)) continue;
        const real* g = row(sample[lane], r);
        const double theta = theta_of(taped, times[r]);
        double speed = 0;
        for (int i = 0; i < total; ++i) {
          double weight = 0, along = 0;
          for (int m = Method::degree - 1; m >= 0; --m)
            weight = weight * theta + (m + 1) * Method::p[i][m];
          for (long d = 0; d < dim; ++d) along += get(tile.k[i][d], lane) * g[d];
          speed += weight * along;
        }
        if (!task.has_event || r + 1 < task.rows) times_of(sample[lane])[r] += speed;
        set(tb, lane, get(tb, lane) - speed);
        set(hb, lane, get(hb, lane) - theta * speed);
      }
    }
  }

  // The share of slope I in the cotangent of the length: h stands before all that kb comes from.
  template <int I>
  void lengthen() {
    V along{};
    for (long d = 0; d < dim; ++d) along += kb[I][d] * tile.k[I][d];
    hb += select(h == D{}, D{}, convert<D>(along) / h);
  }

  // Hands the cotangents of the step's start and length to what they hang on.
  void hang(int lane) {
    const double start = get(tb, lane), after = get(tau, lane);
    if (at[lane] < 0) return set(tau, lane, after + start);
    const Taped& taped = run.steps[at[lane]];
    const int64_t before = taped.before < 0 ? kFree : run.steps[taped.before].anchor;
    double* to = times_of(sample[lane]);
    set(tau, lane, ct::native::hang(taped.anchor, before, start, get(hb, lane), after, to));
  }

  const Task& task;
  const Tape<real>& tape;
  const Run<real>& run;
  const Cotangents& cotangents;
  Gradients<Field, W> shared;
  T tile;
  V yb[dim], ends[dim], starts[dim], carried[dim], kb[total][dim];
  alignas(kRegisterBytes) alignas(V) V again[total * kRecord<Field>],
      times[total];  // the stages, where they are made again
  const V* record;   // the stages
  V ownb[Field::own + 1];
  alignas(kRegisterBytes) alignas(V) V work[kScratchBack<Field> + 1];
  D t, h, stop, fresh;
  D beyond;       // not zero: what is pulled back is the slope on that side of a jump
  D tau, tb, hb;  // cotangents of the step's end, start and length
  int64_t sample[W], at[W], resume[W], next;
  int busy = 0;
};

// Pulls cotangents of the rows back through the steps on the tape.
template <class Field, class Method, int W>
void pull_back_rows(const Task& task, const Cotangents& cotangents) {
  using real = typename Field::real;
  const auto& tape = *static_cast<const Tape<real>*>(task.tape);
  const int64_t count = static_cast<int64_t>(tape.runs.size());
  Shares<real> shares(cotangents, Field::shared, count);
  on_threads(count, task.threads, [&](int64_t i) {
    real* arrays[Field::shared + 1];
    real* const share = shares.open(arrays);
    Owned<Adjoint<Field, Method, W>>(task, tape, tape.runs[i], cotangents, arrays)->sweep();
    shares.close(i, share);
  });
}

// Puts a step of no length at every sample's first time and state on an empty tape: with it the
// cotangents of the first slopes are pulled back through the field alone.
template <class Field>
void stand_still(const Task& task) {
  using real = typename Field::real;
  auto& tape = *static_cast<Tape<real>*>(task.tape);
  Run<real>& run = tape.runs.emplace_back();
  run.open(0, task.batch);
  const real* y = static_cast<const real*>(task.y0);
  for (int64_t i = 0; i < task.batch; ++i, y += Field::dim) {
    const double t = task.t[i * task.t_stride];
    std::copy_n(y, Field::dim, run.add(i, t, 0, t, kFree, 0, 0, Field::dim));
  }
}

}  // namespace ct::native
