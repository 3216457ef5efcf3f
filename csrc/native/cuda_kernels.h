// The bodies of the CUDA kernels: one thread for each sample. With CT_TOGETHER all threads of a
// block reach every evaluation of the field, those without a sample too.
#pragma once

#include "cuda_adjoint.h"
#include "cuda_joint.h"
#include "cuda_linear.h"
#include "evaluate.h"
#include "fixed.h"
#include "pending.h"
#include "samples.h"
#include "sweep.h"

namespace ct::native {

// of memory for one thread, of which there are very many
constexpr int kMostBytes = 16 << 10, kMostAdjointBytes = 64 << 10;

// All the threads' values in one, always in the same order.
template <class Combine>
__device__ double of_block(double value, const Combine& combine) {
  __shared__ double values[kThreads];
  __syncthreads();  // what an earlier call left has been read
  const int i = static_cast<int>(threadIdx.x);
  values[i] = value;
  for (int half = kThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (i < half) values[i] = combine(values[i], values[i + half]);
  }
  __syncthreads();
  return values[0];
}

// The same of count values in memory; nothing is 0.
template <class Value, class Combine>
__device__ double of_memory(const Value* values, int64_t count, const Combine& combine) {
  double total = 0;
  for (int64_t i = threadIdx.x; i < count; i += kThreads) total = combine(total, values[i]);
  return of_block(total, combine);
}

__device__ inline int64_t thread_number() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

template <class Worker>
constexpr void check_size() {
  static_assert(sizeof(Worker) <= kMostBytes, "a sample of this field is too large for one thread");
}

// A sample that steps on its own, and keeps its steps if it is to.
template <class Field, class Method>
class KeptSample : Samples<Field, Method, 1> {
 public:
  using S = Samples<Field, Method, 1>;
  using real = typename S::real;
  static constexpr long dim = S::dim;

  CT_BOTH explicit KeptSample(const Task& task_) : S(task_) {}

  // A thread without a sample goes along with its block.
  CT_LANES void run(int64_t number, Keeper<real>* keeper) {
    this->load(0, std::min(number, task.batch - 1));
    this->start();
    if (number < task.batch) {
      this->write_first(0, number);
      active = this->begin(0, number);
    }
    const auto keep = [&](LaneSet moved) {
      if (keeper == nullptr || !moved) return;
      int64_t row = output[0];
      while (row < task.rows && clock.direction * this->goal_of(number, row) <= clock.stop) ++row;
      const int64_t anchor = clock.lands ? task.rows - 1 : kFree;
      real* to = keeper->add(number, clock.t(), clock.h(), clock.t1(), anchor, output[0], row, dim);
      for (long d = 0; d < dim; ++d) to[d] = tile.y[d];
    };
    while (any(active)) this->step(keep);
  }

 private:
  using S::active, S::clock, S::output, S::task, S::tile;
};

// run(keeper) of sample `i`, whose steps are counted, or kept, if a tape is there.
template <class Field, class Run>
CT_BOTH void with_keeper(const Task& task, int64_t i, const Run& run) {
  using K = Keeper<typename Field::real>;
  const bool there = i < task.batch;
  const auto* tape = there ? static_cast<const CudaTape*>(task.tape) : nullptr;
  if (tape != nullptr && tape->begins != nullptr) {
    K keeper(*tape, i, task.batch);
    run(&keeper);
  } else {
    run(static_cast<K*>(nullptr));
  }
  if (tape != nullptr) tape->accepted[i] = task.counts[task.batch + i];
}

// ---- solves
// ------------------------------------------------------------------------------------------------------

template <class Field, class Method>
__device__ void solve_samples(const Task& task) {
  using Worker = KeptSample<Field, Method>;
  check_size<Worker>();
  const int64_t i = thread_number();
  if (!kTogether && i >= task.batch) return;
  with_keeper<Field>(task, i, [&](auto* keeper) { Worker(task).run(i, keeper); });
}

template <class Field, class Method>
__device__ void solve_fixed(const Task& task) {
  using K = Keeper<typename Field::real>;
  using Worker = Fixed<Field, Method, 1, K>;
  check_size<Worker>();
  const int64_t i = thread_number();
  if (!kTogether && i >= task.batch) return;
  with_keeper<Field>(task, i, [&](K* keeper) {
    Worker(task, keeper).run(std::min(i, task.batch), i < task.batch);
    const auto* asked = static_cast<const CudaObservation*>(task.observation);
    if (asked == nullptr || !asked->dense || i >= task.batch) return;
    const int64_t accepted = task.counts[task.batch + i];
    if (accepted > 0) task.counts[i] = accepted * Method::total;
  });
}

// One phase of all samples.
template <class Field, class Method>
__device__ void solve_joint(const Task& task, const JointMemory<Field, Method>& memory) {
  using Worker = JointSample<Field, Method>;
  check_size<Worker>();
  const JointState& state = *memory.state;
  if (state.phase == kDone) return;
  constexpr int kSums = JointMemory<Field, Method>::kSums;
  double parts[kSums] = {};
  const int64_t i = thread_number();
  if (kTogether || i < task.batch) Worker(task, state, memory.samples, i).run(parts);
  for (int s = 0; s < kSums; ++s) {
    const double part = of_block(parts[s], NormPart<Method>{});
    if (threadIdx.x == 0) memory.partials[s * gridDim.x + blockIdx.x] = part;
  }
}

// What comes of it; for one block.
template <class Field, class Method>
__device__ void judge_joint(const Task& task, const JointMemory<Field, Method>& memory) {
  if (memory.state->phase == kDone) return;
  constexpr int kSums = JointMemory<Field, Method>::kSums;
  const int64_t blocks = (task.batch + kThreads - 1) / kThreads;
  double parts[kSums];
  for (int s = 0; s < kSums; ++s)
    parts[s] = of_memory(memory.partials + s * blocks, blocks, NormPart<Method>{});
  if (threadIdx.x == 0) JointJudge<Field, Method>(task, *memory.state).run(parts);
}

// ---- the field, the continuous solution, and gradients
// ------------------------------------------------------------------------------------

template <class Field>
__device__ void evaluate_sample(int64_t batch, const double* t, const void* y, const void* own,
                                const void* const* shared, void* dy) {
  Evaluation<Field, 1> evaluation;
  evaluation.run(thread_number(), batch, t, y, own, shared, dy);
}

// A thread makes one piece of one sample.
template <class Field, class Method>
__device__ void make_pieces(const Task& task, const CudaPieces& given) {
  using Worker = SamplePiece<Field, Method>;
  check_size<Worker>();
  const int64_t i = thread_number();
  if (kTogether || i < given.count * task.batch) Worker(task, given).run(i);
}

template <class Worker>
constexpr void check_adjoint_size() {
  static_assert(sizeof(Worker) <= kMostAdjointBytes,
                "a sample of this field is too large for one thread");
}

#if !defined(CT_TOGETHER)

// A thread goes through the samples slot, slot + slots, ..., and adds to sums of its own.
template <class Field, class Method>
__device__ void pull_back_samples(const Task& task, const CudaCotangents& given) {
  using real = typename Field::real;
  using Worker = SampleAdjoint<Field, Method, Strided<real>>;
  check_adjoint_size<Worker>();
  const int64_t slot = thread_number();
  if (slot >= given.slots) return;
  Worker worker(task, given, {static_cast<real*>(given.sums) + slot, given.slots});
  for (int64_t i = slot; i < task.batch; i += given.slots) worker.run(i);
}

#else

// The same of blocks, whose threads have a sample each. A grid has `slots` of them.
template <class Field, class Method>
__device__ void pull_back_samples(const Task& task, const CudaCotangents& given) {
  using real = typename Field::real;
  using Worker = SampleAdjoint<Field, Method, BlockSums<real>>;
  check_adjoint_size<Worker>();
  CT_LAUNCHED_MEMORY(memory);
  const int64_t block = blockIdx.x, count = given.starts[Field::shared];
  real* const to = static_cast<real*>(given.sums) + block * count;
  real* const sums = given.launched ? reinterpret_cast<real*>(memory) : to;
  for (int64_t i = threadIdx.x; i < count && given.launched; i += kThreads) sums[i] = 0;
  __syncthreads();
  Adder<real> adder(sums);
  Worker worker(task, given, {sums, &adder});
  for (int64_t i = block * kThreads; i < task.batch; i += given.slots * kThreads)
    worker.run(i + threadIdx.x);
  adder.flush();
  for (int64_t i = threadIdx.x; i < count && given.launched; i += kThreads) to[i] = sums[i];
}

#endif

// What threads or blocks added up of an array, and where their totals go.
struct CudaSums {
  int64_t slots, slot, number;  // how many there are; how far apart these lie, and the numbers
  const void* sums;             // real
  void* to;                     // real [numbers]
};

// The total of the block's number.
template <class Real>
__device__ void add_up(const CudaSums& of) {
  const Real* const sums = static_cast<const Real*>(of.sums) + blockIdx.x * of.number;
  double total = 0;
  for (int64_t i = threadIdx.x; i < of.slots; i += kThreads) total += sums[i * of.slot];
  total = of_block(total, [](double a, double b) { return a + b; });
  if (threadIdx.x == 0) static_cast<Real*>(of.to)[blockIdx.x] = static_cast<Real>(total);
}

}  // namespace ct::native
