// The samples of a solve as runs, on several threads.
#pragma once

#include <atomic>
#include <thread>
#include <vector>

#include "tape.h"
#include "task.h"

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
  std::atomic<int64_t> next{0};
  const auto work = [&] {
    for (int64_t i; (i = next++) < count;) body(i);
  };
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads && i < count; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

}  // namespace ct::native
