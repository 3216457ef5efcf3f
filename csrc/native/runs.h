// The samples of a solve as runs, on several threads.
#pragma once

#include "tape.h"
#include "task.h"
#include "team.h"

namespace ct::native {

// Divides samples that take the same steps into runs of whole tiles, few enough that each may have
// gradients of its own.
template <class Real>
void open_runs(const Task& task, int width) {
  const int64_t tiles = (task.batch + width - 1) / width, run = (tiles + 15) / 16 * width;
  auto& runs = static_cast<Tape<Real>*>(task.tape)->runs;
  runs.resize((task.batch + run - 1) / run);
  for (size_t i = 0; i < runs.size(); ++i) {
    const int64_t begin = static_cast<int64_t>(i) * run;
    runs[i].open(begin, begin + run < task.batch ? begin + run : task.batch);
  }
}

// body(0), ..., body(count - 1) on several threads.
template <class Body>
void on_threads(int64_t count, int64_t threads, const Body& body) {
  threads = threads < count ? threads : count;
  if (threads > 1) return Team(threads).divide(count, body);
  for (int64_t i = 0; i < count; ++i) body(i);
}

}  // namespace ct::native
