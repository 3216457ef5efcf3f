// Adaptive solves of many samples: one that is done makes room for the next.
#pragma once

#include <algorithm>
#include <vector>

#include "owned.h"
#include "runs.h"
#include "samples.h"

namespace ct::native {

// A run of samples, worked on by one thread.
template <class Field, class Method, int W>
class Queue : Samples<Field, Method, W> {
 public:
  using S = Samples<Field, Method, W>;
  using real = typename S::real;
  using D = typename S::D;
  static constexpr long dim = S::dim;

  CT_LANES Queue(const Task& task_, int64_t begin_, int64_t end_, Run<real>* kept_)
      : S(task_), begin(begin_), end(end_), kept(kept_) {
    if (kept != nullptr) kept->open(begin, end);
  }

  CT_LANES void run() {
    const auto keeps = [&](LaneSet lanes) __attribute__((always_inline)) {
      if (kept != nullptr) keep(lanes);
    };
    if constexpr (W == 1) {
      for (int64_t number = begin; number < end; ++number) S::run(number, keeps);
    } else {
      prepare();
      next = begin;
      refill(~LaneSet{} >> (32 - W));
      while (any(active))
        if (const LaneSet free = this->step(keeps)) refill(free);
    }
  }

 private:
  using S::active, S::clock, S::output, S::sample, S::span, S::task, S::tile;

  // The same for all samples, in whole tiles; the longest way is started first.
  void prepare() {
    const int64_t count = end - begin;
    slopes.resize(count * dim);
    lengths.resize(count);
    order.resize(count);
    std::vector<double> steps(count);
    for (int64_t base = 0; base < count; base += W) {
      const int valid = static_cast<int>(std::min<int64_t>(W, count - base));
      for (int lane = 0; lane < W; ++lane)
        this->load(lane, begin + base + std::min(lane, valid - 1));
      this->start();
      for (int lane = 0; lane < valid; ++lane) {
        const int64_t i = base + lane;
        lengths[i] = peek(clock.proposed, lane);
        steps[i] = peek(span, lane) / lengths[i];
        for (long d = 0; d < dim; ++d) slopes[i * dim + d] = peek(tile.k[0][d], lane);
        if (!(steps[i] < kInfinity)) steps[i] = kInfinity;
        this->write_first(lane, begin + i);
      }
    }
    order_by(steps);
  }

  // From many steps to few, to a sixteenth; those that are alike stay in their order.
  void order_by(const std::vector<double>& steps) {
    constexpr int kKeys = 512;  // 32 powers of 2
    const auto key = [&](double x) {
      const float least = 0.5f, value = x > least ? static_cast<float>(x) : least;
      int32_t bits, zero;
      std::memcpy(&bits, &value, sizeof(bits));
      std::memcpy(&zero, &least, sizeof(zero));
      return kKeys - 1 - std::min((bits - zero) >> 19, kKeys - 1);
    };
    int64_t place[kKeys + 1] = {};
    for (double x : steps) ++place[key(x) + 1];
    for (int k = 0; k < kKeys; ++k) place[k + 1] += place[k];
    for (size_t i = 0; i < steps.size(); ++i) order[place[key(steps[i])]++] = i;
  }

  // The next samples, as far as there are any, to lanes.
  __attribute__((noinline)) void refill(LaneSet lanes) {
    LaneSet filled = 0;
    for_lanes(lanes, [&](int lane) __attribute__((always_inline)) {
      while (next < end && !(filled >> lane & 1))
        if (fill(lane, order[next++ - begin])) filled |= LaneSet{1} << lane;
    });
    active |= filled;
    // the rest stand still
    for_lanes(lanes & ~filled, [&](int lane) { put(clock.end, lane, peek(clock.tau, lane)); });
  }

  bool fill(int lane, int64_t i) {
    this->load(lane, begin + i);
    for_each<dim>([&](long d) __attribute__((always_inline)) {
      put(tile.k[0][d], lane, slopes[i * dim + d]);
    });
    put(clock.proposed, lane, static_cast<real>(lengths[i]));
    return S::begin(lane, begin + i);
  }

  __attribute__((noinline)) void keep(LaneSet lanes) {
    for_lanes(lanes, [&](int lane) {
      const double stop = peek(clock.stop, lane), direction = peek(clock.direction, lane);
      int64_t row = output[lane];
      while (row < task.rows && direction * this->goal_of(sample[lane], row) <= stop) ++row;
      const int64_t anchor = clock.lands >> lane & 1 ? task.rows - 1 : kFree;
      real* to = kept->add(sample[lane], direction * peek(clock.tau, lane),
                           direction * peek(clock.length, lane), direction * stop, anchor,
                           output[lane], row, dim);
      for (long d = 0; d < dim; ++d) to[d] = peek(tile.y[d], lane);
    });
  }

  const int64_t begin, end;
  Run<real>* const kept;
  int64_t next;
  std::vector<real> slopes;
  std::vector<double> lengths;
  std::vector<int64_t> order;
};

// Returns how many samples failed.
template <class Field, class Method, int W>
int64_t solve_samples(const Task& task) {
  // the same runs for any number of threads
  const int64_t size = std::max<int64_t>(8 * W, (task.batch / 64 + W - 1) / W * W);
  const int64_t run = W == 1 ? task.batch : std::min<int64_t>(size, 1024);
  const int64_t runs = (task.batch + run - 1) / run;
  auto* tape = static_cast<Tape<typename Field::real>*>(task.tape);
  if (tape != nullptr) tape->runs.resize(runs);
  on_threads(runs, task.threads, [&](int64_t i) {
    using Worker = Queue<Field, Method, W>;
    auto* kept = tape == nullptr ? nullptr : &tape->runs[i];
    const int64_t begin = i * run, end = std::min(task.batch, begin + run);
    if constexpr (sizeof(Worker) < 1 << 15)
      Worker(task, begin, end, kept).run();
    else
      Owned<Worker>(task, begin, end, kept)->run();
  });
  return task.batch - std::count(task.status, task.status + task.batch, kSuccess);
}

}  // namespace ct::native
