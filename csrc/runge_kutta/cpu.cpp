// Runge-Kutta kernels for the CPU.
//
// A state is worked through in blocks of a fixed size that fit the first-level cache. Within a
// block, one plain loop a task (gather, sum, finish, fold), which the compiler vectorizes. Threads
// share out whole blocks, and partial sums are added in the order of the blocks: results do not
// depend on the number of threads.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <tuple>

#include "args.h"
#include "control_args.h"
#include "cpu_blocks.h"
#include "cpu_loops.h"
#include "direct.h"

namespace ct::rk {
namespace {

// ---- arguments
// -------------------------------------------------------------------------------------------

template <typename T>
Store<T> read_store(const Slopes& k, const Tensor& slope, int64_t slot) {
  k.check_like_state("slope", slope, /*contiguous=*/false);
  k.check_slot(slot);
  Store<T> store;
  store.to = mutable_data_of<T>(k.tensor) + slot * k.numel;
  store.from = data_of<T>(slope);
  store.contiguous = slope.is_contiguous();
  if (!store.contiguous) {
    const auto strides = slope.strides();
    store.sizes.assign(k.sizes.begin() + 1, k.sizes.end());
    store.strides.assign(strides.begin(), strides.end());
  }
  return store;
}

template <typename T>
const T* state_pointer(const Slopes& k, const char* name, const Tensor& y) {
  k.check_like_state(name, y);
  return data_of<T>(y);
}

template <typename T>
const T* state_pointer(const Slopes& k, const char* name, const std::optional<Tensor>& y) {
  return y ? state_pointer<T>(k, name, *y) : nullptr;
}

Tensor new_norm(const Slopes& k, const Norm& norm, bool per_sample) {
  return new_tensor(k.tensor, &norm.units, per_sample ? 1 : 0);
}

// ---- operators
// ------------------------------------------------------------------------------------------------------

template <typename T>
Tensor combine(const Slopes& k, const std::optional<Tensor>& y, const Tensor& a, const Tensor& h,
               const Tensor* slope = nullptr, int64_t slot = -1) {
  using A = accumulator_t<T>;
  Store<T> store;
  if (slope != nullptr) store = read_store<T>(k, *slope, slot);
  const T* fresh = store.contiguous ? store.from : nullptr;
  Tensor out = new_state(k);
  const Combination<T, A> task{mutable_data_of<T>(out), state_pointer<T>(k, "y", y),
                               read_terms<T, A>(k, "a", a, fresh, slot), read_step(k, h), k.row};
  combine_all(task, store, k.numel);
  return out;
}

Tensor rk_combine(const std::optional<Tensor>& y_, const Tensor& k_, const Tensor& a,
                  const Tensor& h) {
  const Tensor k = as_contiguous(k_);
  const std::optional<Tensor> y = y_ ? std::optional(as_contiguous(*y_)) : std::nullopt;
  const Slopes slopes("rk_combine", k);
  Tensor out;
  dispatch_floating_and_reduced(slopes.dtype, slopes.op,
                                [&](auto zero) { out = combine<decltype(zero)>(slopes, y, a, h); });
  return out;
}

Tensor rk_stage(const std::optional<Tensor>& y, const Tensor& k, const Tensor& slope, int64_t slot,
                const Tensor& a, const Tensor& h) {
  const Slopes slopes("rk_stage", k);
  Tensor out;
  dispatch_floating_and_reduced(slopes.dtype, slopes.op, [&](auto zero) {
    out = combine<decltype(zero)>(slopes, y, a, h, &slope, slot);
  });
  return out;
}

Tensor rk_error(const Tensor& y, const Tensor& y1, const Tensor& k_,
                const std::optional<Tensor>& slope, int64_t slot, const Tensor& e, const Tensor& h,
                const Tensor& rtol, const Tensor& atol, std::vector<int64_t> segments, bool maximum,
                bool per_sample) {
  const Slopes k("rk_error", k_);
  const Norm norm = read_norm(k, std::move(segments), maximum, per_sample);
  Tensor out = new_norm(k, norm, per_sample);
  dispatch_floating(k.dtype, k.op, [&](auto zero) {
    using T = decltype(zero);
    Store<T> store;
    if (slope) store = read_store<T>(k, *slope, slot);
    const T* fresh = store.contiguous ? store.from : nullptr;
    const ErrorTask<T> task{read_terms<T, T>(k, "e", e, fresh, slot),
                            read_step(k, h),
                            k.row,
                            state_pointer<T>(k, "y", y),
                            state_pointer<T>(k, "y1", y1),
                            read_tolerance<T>(k, "rtol", rtol),
                            read_tolerance<T>(k, "atol", atol)};
    compute_norm(norm, mutable_data_of<T>(out), [&](T* q, int64_t begin, int n) {
      store(begin, n);
      error_block(task, q, maximum, begin, n);
    });
  });
  return out;
}

std::tuple<Tensor, Tensor> rk_step(const Tensor& y_, const Tensor& k_, const Tensor& b,
                                   const Tensor& e, const Tensor& h, const Tensor& rtol,
                                   const Tensor& atol, std::vector<int64_t> segments, bool maximum,
                                   bool per_sample) {
  const Tensor kc = as_contiguous(k_), y = as_contiguous(y_);
  const Slopes k("rk_step", kc);
  const Norm norm = read_norm(k, std::move(segments), maximum, per_sample);
  Tensor y1 = new_state(k), out = new_norm(k, norm, per_sample);
  dispatch_floating(k.dtype, k.op, [&](auto zero) {
    using T = decltype(zero);
    T* to = mutable_data_of<T>(y1);
    const T* from = state_pointer<T>(k, "y", y);
    const Combination<T, T> combination{to, from, read_terms<T, T>(k, "b", b), read_step(k, h),
                                        k.row};
    const ErrorTask<T> task{read_terms<T, T>(k, "e", e),
                            combination.step,
                            k.row,
                            from,
                            to,
                            read_tolerance<T>(k, "rtol", rtol),
                            read_tolerance<T>(k, "atol", atol)};
    compute_norm(norm, mutable_data_of<T>(out), [&](T* q, int64_t begin, int n) {
      combine_block(combination, to + begin, begin, n);
      error_block(task, q, maximum, begin, n);
    });
  });
  return {y1, out};
}

// The terms of the dense output at theta; stages whose polynomial vanishes are left out as
// elsewhere.
template <typename T, typename A>
Terms<T, A> dense_terms(const Slopes& k, const Queries& queries, double theta) {
  Terms<T, A> terms;
  const T* rows = data_of<T>(k.tensor);
  for (int64_t i = 0; i < queries.rows; ++i) {
    if (!queries.active(i)) continue;
    require(terms.count < kMaxTerms, k.op, ": p has more than ", kMaxTerms, " nonzero rows");
    terms.row[terms.count] = rows + i * k.numel;
    terms.coefficient[terms.count++] = static_cast<A>(dense_weight(
        queries.weights + i * queries.degree, static_cast<int>(queries.degree), theta));
  }
  return terms;
}

// All queries look at one block of the slopes while it is in the cache.
template <typename T>
void interpolate_all(const Slopes& k, const T* y, const Queries& queries, const double* theta,
                     const Step& step, T* out) {
  using A = accumulator_t<T>;
  std::vector<Combination<T, A>> tasks;
  for (int64_t m = 0; m < queries.count; ++m)
    tasks.push_back({nullptr, y, dense_terms<T, A>(k, queries, theta[m]), step, k.row});
  for_blocks(blocks_of(k.numel),
             std::max<int64_t>(1, kBlocksAThread / std::max<int64_t>(1, queries.count)),
             [&](int64_t first, int64_t last) {
               for (int64_t begin = first * kBlock; begin < std::min(k.numel, last * kBlock);
                    begin += kBlock)
                 for (int64_t m = 0; m < queries.count; ++m)
                   combine_block(tasks[m], out + m * k.numel + begin, begin,
                                 block_size(begin, k.numel));
             });
}

// Each query looks at one sample.
template <typename T>
void interpolate_samples(const Slopes& k, const T* y, const Queries& queries, const double* theta,
                         const Step& step, T* out) {
  using A = accumulator_t<T>;
  for (int64_t m = 0; m < queries.count; ++m)
    require(queries.samples[m] >= 0 && queries.samples[m] < k.batch, k.op,
            ": sample must be in [0, ", k.batch, "), got ", queries.samples[m]);
  dense_terms<T, A>(k, queries, 0);  // raises here rather than in a thread
  const int64_t queries_a_thread =
      std::max<int64_t>(1, kBlocksAThread * kBlock / std::max<int64_t>(1, 8 * k.row));
  for_blocks(queries.count, queries_a_thread, [&](int64_t first, int64_t last) {
    for (int64_t m = first; m < last; ++m) {
      const Combination<T, A> task{nullptr, y, dense_terms<T, A>(k, queries, theta[m]), step,
                                   k.row};
      const int64_t start = queries.samples[m] * k.row;
      for (int64_t at = 0; at < k.row; at += kBlock)
        combine_block(task, out + m * k.row + at, start + at, block_size(at, k.row));
    }
  });
}

Tensor rk_interpolate(const Tensor& y_, const Tensor& k_, const Tensor& p, const Tensor& theta,
                      const Tensor& h, const std::optional<Tensor>& sample) {
  const Tensor kc = as_contiguous(k_), y = as_contiguous(y_);
  const Slopes k("rk_interpolate", kc);
  const Queries queries(k, p, theta, sample);
  const Step step = read_step(k, h);
  Tensor out = queries.new_output(k);
  dispatch_floating(k.dtype, k.op, [&](auto zero) {
    using T = decltype(zero);
    const auto compute = queries.of_samples ? interpolate_samples<T> : interpolate_all<T>;
    compute(k, state_pointer<T>(k, "y", y), queries, data_of<double>(theta), step,
            mutable_data_of<T>(out));
  });
  return out;
}

// body(first, last) over ranges of samples.
template <typename Body>
void for_samples(int64_t batch, const Body& body) {
  for_blocks(blocks_of(batch), kBlocksAThread / 8, [&](int64_t first, int64_t last) {
    body(first * kBlock, std::min(batch, last * kBlock));
  });
}

template <typename T>
void plan_all(const PlanTask<T>& task) {
  for_samples(task.batch, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) plan_sample(task, i);
  });
}

template <typename T>
Found judge_all(const JudgeTask<T>& task) {
  std::atomic<int64_t> bits = 0, passed = 0;
  for_samples(task.batch, [&](int64_t first, int64_t last) {
    Found of_range{};
    for (int64_t i = first; i < last; ++i) {
      const Found found = judge_sample(task, i);
      of_range.bits |= found.bits, of_range.passed += found.passed;
    }
    bits |= of_range.bits, passed += of_range.passed;
  });
  return {bits, passed};
}

template <typename T>
void accept_all(const AcceptTask<T>& task) {
  const int64_t work = task.batch * task.row, grain = kBlocksAThread * kBlock;
  for_blocks(task.batch, work <= grain ? task.batch : std::max<int64_t>(1, grain / task.row),
             [&](int64_t first, int64_t last) {
               for (int64_t sample = first; sample < last; ++sample)
                 for (int64_t i = sample * task.row; i < (sample + 1) * task.row; ++i)
                   accept_element(task, i, task.moved[sample]);
             });
}

std::tuple<Tensor, Tensor, Tensor> rk_plan(const Tensor& samples, const Tensor& counts,
                                           const Tensor& c, const Tensor& control,
                                           const Tensor& like) {
  Plan plan(samples, counts, c, control, like);
  dispatch_floating(plan.dtype, Plan::kOp,
                    [&](auto zero) { plan_all(plan.task<decltype(zero)>()); });
  return {plan.step, plan.lands, plan.times};
}

std::tuple<Tensor, Tensor> rk_judge(const Tensor& samples, const Tensor& counts, const Tensor& step,
                                    const Tensor& lands, const Tensor& error, const Tensor& goals,
                                    const Tensor& control) {
  Judgement judgement(samples, counts, step, lands, error, goals, control);
  Found found{};
  dispatch_floating(judgement.error.scalar_type(), Judgement::kOp,
                    [&](auto zero) { found = judge_all(judgement.task<decltype(zero)>()); });
  int64_t* flags = mutable_data_of<int64_t>(judgement.flags);
  flags[kBits] = found.bits, flags[kPassed] = found.passed;
  return {judgement.moved, judgement.flags};
}

std::tuple<Tensor, Tensor> rk_accept(const Tensor& moved, const Tensor& y, const Tensor& y1,
                                     const Tensor& k0, const Tensor& k1) {
  Acceptance acceptance(moved, y, y1, k0, k1);
  dispatch_floating(acceptance.dtype, Acceptance::kOp,
                    [&](auto zero) { accept_all(acceptance.task<decltype(zero)>()); });
  return {acceptance.next_y, acceptance.next_k};
}

// The output times that the samples passed in their last step.
std::tuple<Tensor, Tensor, Tensor, Tensor> rk_outputs(const Tensor& counts, const Tensor& step,
                                                      const Tensor& times_, int64_t count) {
  constexpr const char* kOp = "rk_outputs";
  const Tensor times = as_contiguous(times_);
  require(counts.dim() == 2 && times.dim() == 2, kOp, ": counts must be [", int{kCountRows},
          ", B] and times [B, T]");
  const int64_t batch = counts.size(1), row = times.size(1);
  check_matrix(kOp, "counts", counts, ScalarType::Long, kCountRows, batch, counts);
  check_matrix(kOp, "step", step, ScalarType::Double, kStepRows, batch, counts);
  check_matrix(kOp, "times", times, ScalarType::Double, batch, row, counts);
  Tensor sample = new_tensor(counts, &count, 1), index = new_tensor(counts, &count, 1);
  Tensor theta = new_tensor(step, &count, 1);
  Tensor at_end = new_tensor(counts, aoti_torch_dtype_bool(), &count, 1);
  const int64_t* numbers = data_of<int64_t>(counts);
  const double *of_step = data_of<double>(step), *goals = data_of<double>(times);
  int64_t *to_sample = mutable_data_of<int64_t>(sample),
          *to_index = mutable_data_of<int64_t>(index);
  double* to_theta = mutable_data_of<double>(theta);
  bool* to_end = mutable_data_of<bool>(at_end);
  int64_t next = 0;
  for (int64_t i = 0; i < batch; ++i) {
    const int64_t begin = numbers[kOutputBefore * batch + i], end = numbers[kOutput * batch + i];
    const double t = of_step[kStart * batch + i], t1 = of_step[kStop * batch + i];
    for (int64_t j = begin; j < end; ++j, ++next) {
      require(next < count && j >= 0 && j < row, kOp, ": count is ", count,
              ", but the samples passed more output times, or such as there are not");
      const double goal = goals[i * row + j];
      to_sample[next] = i, to_index[next] = j;
      to_theta[next] = std::min((goal - t) / (t1 - t), 1.0);
      to_end[next] = goal == t1;
    }
  }
  require(next == count, kOp, ": count is ", count, ", but the samples passed ", next,
          " output times");
  return {sample, index, theta, at_end};
}

}  // namespace

// ---- by address
// -------------------------------------------------------------------------------------------

namespace direct {
namespace {

template <typename T>
Store<T> store_of(void* k, const void* slope, int64_t slot, int64_t numel) {
  Store<T> store;
  if (slope == nullptr) return store;
  store.to = static_cast<T*>(k) + slot * numel;
  store.from = static_cast<const T*>(slope);
  return store;
}

template <typename Body>
auto by_width(bool wide, const Body& body) {
  return wide ? body(double{}) : body(float{});
}

}  // namespace

void stage(void* out, const void* y, void* k, const void* slope, int64_t slot, const double* a,
           int64_t terms, const double* h, int64_t stride, int64_t numel, int64_t row, bool wide) {
  by_width(wide, [&](auto zero) {
    using T = decltype(zero);
    const Store<T> store = store_of<T>(k, slope, slot, numel);
    const Combination<T, T> task{
        static_cast<T*>(out), static_cast<const T*>(y),
        active_terms<T, T>("stage", "a", a, terms, static_cast<T*>(k), numel, store.from, slot),
        Step{h, stride}, row};
    combine_all(task, store, numel);
  });
}

double error(void* norms, const void* y, const void* y1, void* k, const void* slope, int64_t slot,
             const double* e, int64_t terms, const double* h, int64_t stride, double rtol,
             double atol, bool maximum, int64_t numel, int64_t row, bool wide) {
  return by_width(wide, [&](auto zero) -> double {
    using T = decltype(zero);
    const Store<T> store = store_of<T>(k, slope, slot, numel);
    const ErrorTask<T> task{
        active_terms<T, T>("error", "e", e, terms, static_cast<T*>(k), numel, store.from, slot),
        Step{h, stride},
        row,
        static_cast<const T*>(y),
        static_cast<const T*>(y1),
        {nullptr, static_cast<T>(rtol)},
        {nullptr, static_cast<T>(atol)}};
    const Norm norm = norms == nullptr ? Norm{1, numel, {numel}, maximum}
                                       : Norm{numel / row, row, {row}, maximum};
    T whole = 0;
    compute_norm(norm, norms == nullptr ? &whole : static_cast<T*>(norms),
                 [&](T* q, int64_t begin, int n) {
                   store(begin, n);
                   error_block(task, q, maximum, begin, n);
                 });
    return static_cast<double>(whole);
  });
}

void times(const double* c, double t, double h, double t1, bool before_end, bool wide,
           const std::vector<void*>& out) {
  by_width(wide, [&](auto zero) {
    using T = decltype(zero);
    const double far = t > t1 ? HUGE_VAL : -HUGE_VAL;
    const T end = static_cast<T>(t1),
            last = before_end ? std::nextafter(end, static_cast<T>(far)) : end;
    for (size_t i = 0; i < out.size(); ++i) {
      // rounded before it is added, as the numbers of Python are
      const volatile double past = c[i] * h;
      *static_cast<T*>(out[i]) = c[i] == 1 ? last : static_cast<T>(t + past);
    }
  });
}

void plan(const double* samples, const int64_t* counts, const double* c, int64_t stages,
          const double* control, int64_t batch, double* step, bool* lands, void* times, bool wide) {
  by_width(wide, [&](auto zero) {
    using T = decltype(zero);
    PlanTask<T> task{};
    task.samples = samples, task.counts = counts;
    require(stages <= kMaxTerms, "plan: c has more than ", kMaxTerms, " entries");
    std::copy(c, c + stages, task.abscissae);
    task.stages = static_cast<int>(stages);
    task.min_step = control[kMinStep], task.max_step = control[kMaxStep];
    task.batch = batch;
    task.step = step, task.lands = lands, task.times = static_cast<T*>(times);
    plan_all(task);
  });
}

int64_t judge(double* samples, int64_t* counts, double* step, const bool* lands, const void* error,
              const double* goals, int64_t goal_count, const double* control, int64_t batch,
              bool* moved, bool wide) {
  const Found found = by_width(wide, [&](auto zero) {
    using T = decltype(zero);
    return judge_all(JudgeTask<T>{samples, counts, step, lands, static_cast<const T*>(error), goals,
                                  gains_of(control), control[kMinStep], control[kMaxStep],
                                  control[kMaxSteps], batch, goal_count, moved});
  });
  return found.bits | found.passed << kFlagBits;
}

void accept(const bool* moved, const void* y, const void* y1, const void* k0, const void* k1,
            void* next_y, void* next_k, int64_t batch, int64_t row, bool wide) {
  by_width(wide, [&](auto zero) {
    using T = decltype(zero);
    accept_all(AcceptTask<T>{moved, static_cast<const T*>(y), static_cast<const T*>(y1),
                             static_cast<const T*>(k0), static_cast<const T*>(k1),
                             static_cast<T*>(next_y), static_cast<T*>(next_k), batch, row});
  });
}

}  // namespace direct
}  // namespace ct::rk

STABLE_TORCH_LIBRARY_IMPL(ctorch, CPU, m) {
  m.impl("rk_combine", TORCH_BOX(&ct::rk::rk_combine));
  m.impl("rk_stage", TORCH_BOX(&ct::rk::rk_stage));
  m.impl("rk_error", TORCH_BOX(&ct::rk::rk_error));
  m.impl("rk_step", TORCH_BOX(&ct::rk::rk_step));
  m.impl("rk_interpolate", TORCH_BOX(&ct::rk::rk_interpolate));
  m.impl("rk_plan", TORCH_BOX(&ct::rk::rk_plan));
  m.impl("rk_judge", TORCH_BOX(&ct::rk::rk_judge));
  m.impl("rk_accept", TORCH_BOX(&ct::rk::rk_accept));
  m.impl("rk_outputs", TORCH_BOX(&ct::rk::rk_outputs));
}
