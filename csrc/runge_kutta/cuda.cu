// Runge-Kutta kernels for CUDA: launches and registration. No call waits for the GPU.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "../core/stream.h"
#include "args.h"
#include "control_args.h"
#include "cuda_kernels.h"

namespace ct::rk {
namespace {

constexpr int64_t kMaxBlocks = 1 << 16;  // of a kernel that strides over its grid
constexpr int kPackBytes = 16;           // the widest load

unsigned blocks_for(int64_t threads) {
  return static_cast<unsigned>(
      std::clamp<int64_t>((threads + kThreads - 1) / kThreads, 1, kMaxBlocks));
}

template <typename T>
const T* state_pointer(const Slopes& k, const char* name, const std::optional<Tensor>& y) {
  if (!y) return nullptr;
  k.check_like_state(name, *y);
  return y->const_data_ptr<T>();
}

// A slope must lie as its row of k does; one that does not is copied first.
std::optional<Tensor> read_slope(const Slopes& k, const std::optional<Tensor>& slope,
                                 int64_t slot) {
  if (!slope) return std::nullopt;
  k.check_like_state("slope", *slope, /*contiguous=*/false);
  k.check_slot(slot);
  return as_contiguous(*slope);
}

template <typename T>
T* slot_pointer(const Slopes& k, int64_t slot) {
  return k.tensor.template mutable_data_ptr<T>() + slot * k.numel;
}

bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % kPackBytes == 0; }

template <typename T, typename A>
bool packs(const CombineTask<T, A>& task) {
  bool fit = task.numel % (kPackBytes / static_cast<int>(sizeof(T))) == 0;
  for (const void* pointer :
       {static_cast<const void*>(task.y), static_cast<const void*>(task.out),
        static_cast<const void*>(task.fresh), static_cast<const void*>(task.slot)})
    fit = fit && aligned(pointer);
  for (int j = 0; j < task.terms.count; ++j) fit = fit && aligned(task.terms.row[j]);
  return fit;
}

Tensor combine(const Slopes& k, const std::optional<Tensor>& y, const Tensor& a, const Tensor& h,
               const std::optional<Tensor>& slope = std::nullopt, int64_t slot = -1) {
  const Launch launch(k.tensor);
  Tensor out = new_state(k);
  dispatch_floating_and_reduced(k.dtype, k.op, [&](auto zero) {
    using T = decltype(zero);
    using A = accumulator_t<T>;
    constexpr int kWidth = kPackBytes / static_cast<int>(sizeof(T));
    const T* fresh = slope ? slope->const_data_ptr<T>() : nullptr;
    CombineTask<T, A> task{};
    task.terms = read_terms<T, A>(k, "a", a, fresh, slot);
    task.step = read_step(k, h);
    task.y = state_pointer<T>(k, "y", y);
    task.out = out.mutable_data_ptr<T>();
    task.slot = slope ? slot_pointer<T>(k, slot) : nullptr;
    task.fresh = fresh == task.slot ? nullptr : fresh;
    task.numel = k.numel, task.row = k.row;
    if (k.numel == 0) return;
    if (packs(task)) {
      CT_LAUNCH((combine_kernel<kWidth, T, A>), blocks_for(k.numel / kWidth), kThreads, 0,
                launch.stream, task);
    } else {
      CT_LAUNCH((combine_kernel<1, T, A>), blocks_for(k.numel), kThreads, 0, launch.stream, task);
    }
  });
  return out;
}

Tensor rk_combine(std::optional<Tensor> y, const Tensor& k_, const Tensor& a, const Tensor& h) {
  const Tensor k = as_contiguous(k_);
  if (y) y = as_contiguous(*y);
  return combine(Slopes("rk_combine", k), y, a, h);
}

Tensor rk_stage(std::optional<Tensor> y, const Tensor& k_, const Tensor& slope, int64_t slot,
                const Tensor& a, const Tensor& h) {
  const Slopes k("rk_stage", k_);
  return combine(k, y, a, h, read_slope(k, slope, slot), slot);
}

template <typename T>
void launch_norm(const ErrorTask<T>& task, const Segments& segments, T* out, const Tensor& like,
                 cudaStream_t stream) {
  if (segments.unit_length <= 256) {
    int lanes = 1;
    while (lanes < kWarp && lanes * 4 < segments.unit_length) lanes *= 2;
    const int64_t blocks = (segments.units * lanes + kThreads - 1) / kThreads;
    CT_LAUNCH((lanes_norm_kernel<T>), static_cast<unsigned>(blocks), kThreads, 0, stream, task,
              segments, out, lanes);
    return;
  }
  if (segments.unit_length <= kPiece) {
    CT_LAUNCH((block_norm_kernel<T>), static_cast<unsigned>(segments.units), kThreads, 0, stream,
              task, segments, out);
    return;
  }
  int64_t pieces = 0;
  for (int s = 0; s < segments.count; ++s) pieces += pieces_of(segments.length[s]);
  // Partial results are double; the memory comes from torch's allocator in units of T.
  const int64_t space = segments.units * pieces * static_cast<int64_t>(sizeof(double) / sizeof(T));
  const Tensor partial = new_tensor(like, &space, 1);
  double* to = reinterpret_cast<double*>(partial.template mutable_data_ptr<T>());
  if (pieces > 0) {
    CT_LAUNCH((piece_kernel<T>), static_cast<unsigned>(segments.units * pieces), kThreads, 0,
              stream, task, segments, to, pieces);
  }
  CT_LAUNCH((join_kernel<T>), static_cast<unsigned>(segments.units), kThreads, 0, stream, to,
            segments, out, pieces, task.maximum);
}

template <typename T>
void compute_norm(const Slopes& k, const Norm& norm, const ErrorTask<T>& task, Tensor& out,
                  cudaStream_t stream) {
  Segments segments{};
  segments.units = norm.units, segments.unit_length = norm.length;
  segments.first_launch = true;
  if (norm.units == 0) return;
  for (size_t next = 0; next < norm.segments.size();) {
    segments.count = static_cast<int>(std::min<size_t>(kMaxSegments, norm.segments.size() - next));
    int64_t covered = 0;
    for (int s = 0; s < segments.count; ++s)
      covered += segments.length[s] = norm.segments[next + s];
    launch_norm(task, segments, out.mutable_data_ptr<T>(), k.tensor, stream);
    segments.begin += covered;
    segments.first_launch = false;
    next += segments.count;
  }
}

Tensor rk_error(const Tensor& y, const Tensor& y1, const Tensor& k_, std::optional<Tensor> slope,
                int64_t slot, const Tensor& e, const Tensor& h, const Tensor& rtol,
                const Tensor& atol, std::vector<int64_t> segments, bool maximum, bool per_sample) {
  const Slopes k("rk_error", k_);
  const Launch launch(k_);
  const Norm norm = read_norm(k, std::move(segments), maximum, per_sample);
  const std::optional<Tensor> fresh = read_slope(k, slope, slot);
  Tensor out = new_tensor(k_, &norm.units, per_sample ? 1 : 0);
  dispatch_floating(k.dtype, k.op, [&](auto zero) {
    using T = decltype(zero);
    const T* from = fresh ? fresh->const_data_ptr<T>() : nullptr;
    ErrorTask<T> task{};
    task.error = read_terms<T, T>(k, "e", e, from, slot);
    task.step = read_step(k, h);
    task.rtol = read_tolerance<T>(k, "rtol", rtol), task.atol = read_tolerance<T>(k, "atol", atol);
    task.y = state_pointer<T>(k, "y", y), task.y1 = state_pointer<T>(k, "y1", y1);
    task.slot = fresh ? slot_pointer<T>(k, slot) : nullptr;
    task.fresh = from == task.slot ? nullptr : from;
    task.row = k.row, task.maximum = maximum;
    compute_norm(k, norm, task, out, launch.stream);
  });
  return out;
}

std::tuple<Tensor, Tensor> rk_step(const Tensor& y_, const Tensor& k_, const Tensor& b,
                                   const Tensor& e, const Tensor& h, const Tensor& rtol,
                                   const Tensor& atol, std::vector<int64_t> segments, bool maximum,
                                   bool per_sample) {
  const Tensor kc = as_contiguous(k_);
  const std::optional<Tensor> y = as_contiguous(y_);
  const Slopes k("rk_step", kc);
  const Launch launch(kc);
  const Norm norm = read_norm(k, std::move(segments), maximum, per_sample);
  Tensor y1 = new_state(k), out = new_tensor(kc, &norm.units, per_sample ? 1 : 0);
  dispatch_floating(k.dtype, k.op, [&](auto zero) {
    using T = decltype(zero);
    ErrorTask<T> task{};
    task.error = read_terms<T, T>(k, "e", e), task.solution = read_terms<T, T>(k, "b", b);
    task.step = read_step(k, h);
    task.rtol = read_tolerance<T>(k, "rtol", rtol), task.atol = read_tolerance<T>(k, "atol", atol);
    task.y = state_pointer<T>(k, "y", y);
    task.new_state = y1.mutable_data_ptr<T>();
    task.row = k.row, task.maximum = maximum;
    compute_norm(k, norm, task, out, launch.stream);
  });
  return {y1, out};
}

template <typename T>
DenseTask<T> dense_task(const Slopes& k, const Queries& queries) {
  DenseTask<T> task{};
  const T* rows = k.tensor.template const_data_ptr<T>();
  task.degree = static_cast<int>(queries.degree);
  for (int64_t i = 0; i < queries.rows; ++i) {
    if (!queries.active(i)) continue;
    require(task.count < kMaxTerms && (task.count + 1) * queries.degree <= kMaxWeights, k.op,
            ": p has too many numbers for CUDA, which allows ", kMaxTerms, " rows and ",
            kMaxWeights, " numbers");
    for (int64_t m = 0; m < queries.degree; ++m)
      task.weights[task.count * queries.degree + m] = queries.weights[i * queries.degree + m];
    task.row[task.count++] = rows + i * k.numel;
  }
  task.numel = k.numel, task.row_length = k.row;
  task.samples = k.batch;
  return task;
}

template <typename T>
void launch_dense(DenseTask<T> task, const Tensor& theta, bool of_samples, cudaStream_t stream) {
  const int64_t count = theta.numel();
  const double* times = theta.const_data_ptr<double>();
  if (of_samples) {
    task.theta = times, task.queries = count;
    CT_LAUNCH((dense_samples_kernel<T>), blocks_for(count * task.row_length), kThreads, 0, stream,
              task);
    return;
  }
  if (!theta.is_cpu()) {
    task.theta = times, task.queries = count;
    const dim3 grid(blocks_for(task.numel),
                    static_cast<unsigned>(std::min<int64_t>((count + kTile - 1) / kTile, 65535)));
    CT_LAUNCH((dense_kernel<T>), grid, kThreads, 0, stream, task);
    return;
  }
  T* out = task.out;  // times on the CPU travel with the launch, a tile in each: nothing to copy,
                      // nothing to wait for
  for (int64_t first = 0; first < count; first += kTile) {
    task.queries = std::min<int64_t>(kTile, count - first);
    std::copy(times + first, times + first + task.queries, task.theta_value);
    task.out = out + first * task.numel;
    CT_LAUNCH((dense_kernel<T>), blocks_for(task.numel), kThreads, 0, stream, task);
  }
}

Tensor rk_interpolate(const Tensor& y_, const Tensor& k_, const Tensor& p, const Tensor& theta,
                      const Tensor& h, std::optional<Tensor> sample) {
  const Tensor kc = as_contiguous(k_);
  const std::optional<Tensor> y = as_contiguous(y_);
  const Slopes k("rk_interpolate", kc);
  const Launch launch(kc);
  const Queries queries(k, p, theta, sample);
  if (queries.of_samples || !theta.is_cpu()) k.check_device("theta", theta);
  const Step step = read_step(k, h);
  Tensor out = queries.new_output(k);
  dispatch_floating(k.dtype, k.op, [&](auto zero) {
    using T = decltype(zero);
    DenseTask<T> task = dense_task<T>(k, queries);
    task.sample = queries.samples;
    task.step = step;
    task.y = state_pointer<T>(k, "y", y);
    task.out = out.mutable_data_ptr<T>();
    if (out.numel() > 0) launch_dense(task, theta, queries.of_samples, launch.stream);
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> rk_plan(const Tensor& samples, const Tensor& counts,
                                           const Tensor& c, const Tensor& control,
                                           const Tensor& like) {
  const Launch launch(samples);
  Plan plan(samples, counts, c, control, like);
  dispatch_floating(plan.dtype, Plan::kOp, [&](auto zero) {
    using T = decltype(zero);
    if (plan.batch == 0) return;
    CT_LAUNCH((plan_kernel<T>), blocks_for(plan.batch), kThreads, 0, launch.stream, plan.task<T>());
  });
  return {plan.step, plan.lands, plan.times};
}

std::tuple<Tensor, Tensor> rk_judge(const Tensor& samples, const Tensor& counts, const Tensor& step,
                                    const Tensor& lands, const Tensor& error, const Tensor& goals,
                                    const Tensor& control) {
  const Launch launch(samples);
  Judgement judgement(samples, counts, step, lands, error, goals, control);
  torch::stable::zero_(judgement.flags);
  dispatch_floating(judgement.error.scalar_type(), Judgement::kOp, [&](auto zero) {
    using T = decltype(zero);
    if (judgement.batch == 0) return;
    CT_LAUNCH((judge_kernel<T>), blocks_for(judgement.batch), kThreads, 0, launch.stream,
              judgement.task<T>(),
              reinterpret_cast<unsigned long long*>(judgement.flags.mutable_data_ptr<int64_t>()));
  });
  return {judgement.moved, judgement.flags};
}

std::tuple<Tensor, Tensor> rk_accept(const Tensor& moved, const Tensor& y, const Tensor& y1,
                                     const Tensor& k0, const Tensor& k1) {
  const Launch launch(y);
  Acceptance acceptance(moved, y, y1, k0, k1);
  dispatch_floating(acceptance.dtype, Acceptance::kOp, [&](auto zero) {
    using T = decltype(zero);
    const int64_t numel = acceptance.y.numel();
    if (numel == 0) return;
    CT_LAUNCH((accept_kernel<T>), blocks_for(numel), kThreads, 0, launch.stream,
              acceptance.task<T>());
  });
  return {acceptance.next_y, acceptance.next_k};
}

}  // namespace
}  // namespace ct::rk

STABLE_TORCH_LIBRARY_IMPL(ctorch, CUDA, m) {
  m.impl("rk_combine", TORCH_BOX(&ct::rk::rk_combine));
  m.impl("rk_stage", TORCH_BOX(&ct::rk::rk_stage));
  m.impl("rk_error", TORCH_BOX(&ct::rk::rk_error));
  m.impl("rk_step", TORCH_BOX(&ct::rk::rk_step));
  m.impl("rk_interpolate", TORCH_BOX(&ct::rk::rk_interpolate));
  m.impl("rk_plan", TORCH_BOX(&ct::rk::rk_plan));
  m.impl("rk_judge", TORCH_BOX(&ct::rk::rk_judge));
  m.impl("rk_accept", TORCH_BOX(&ct::rk::rk_accept));
}
