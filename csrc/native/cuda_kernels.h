// The bodies of the CUDA kernels: one thread for each sample.
#pragma once

#include "evaluate.h"
#include "pending.h"
#include "samples.h"
#include "sweep.h"

namespace ct::native {

constexpr int kMostBytes = 16 << 10;  // of memory for one thread, of which there are very many

// Sample `i` of a solve, if there is one.
template <class Field, class Method>
CT_BOTH void solve_sample(const Task& task, int64_t i) {
  using Worker = Samples<Field, Method, 1>;
  static_assert(sizeof(Worker) <= kMostBytes, "a sample of this field is too large for one thread");
  if (i >= task.batch) return;
  Worker(task).run(i, [](uint32_t, double, double) {});
}

template <class Field>
CT_BOTH void evaluate_sample(int64_t i, int64_t batch, const double* t, const void* y,
                             const void* own, const void* const* shared, void* dy) {
  if (i >= batch) return;
  Evaluation<Field, 1> evaluation;
  evaluation.run(i, batch, t, y, own, shared, dy);
}

}  // namespace ct::native
