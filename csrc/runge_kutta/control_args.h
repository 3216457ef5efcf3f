// Reads and checks the arguments of the operators of step control, and makes their outputs; the
// same for CPU and CUDA.
#pragma once

#include <algorithm>

#include "args.h"
#include "control.h"

namespace ct::rk {

// A contiguous matrix [rows, B] on the device of `like`, of the dtype named.
inline void check_matrix(const char* op, const char* name, const Tensor& x, ScalarType dtype,
                         int64_t rows, int64_t batch, const Tensor& like) {
  require(x.dim() == 2 && x.size(0) == rows && x.size(1) == batch, op, ": ", name, " must be [",
          rows, ", ", batch, "]");
  require(dtype_of(x) == dtype, op, ": ", name, " must have dtype ",
          torch::headeronly::toString(dtype), ", got ", torch::headeronly::toString(dtype_of(x)));
  require(x.is_contiguous(), op, ": ", name, " must be contiguous");
  require(x.is_cpu() == like.is_cpu() && x.get_device_index() == like.get_device_index(), op, ": ",
          name, " must be on the device of samples");
}

inline int64_t check_samples(const char* op, const Tensor& samples, const Tensor& counts) {
  require(samples.dim() == 2, op, ": samples must be [", int{kSampleRows}, ", B]");
  const int64_t batch = samples.size(1);
  check_matrix(op, "samples", samples, ScalarType::Double, kSampleRows, batch, samples);
  check_matrix(op, "counts", counts, ScalarType::Long, kCountRows, batch, samples);
  return batch;
}

inline const double* read_control(const char* op, const Tensor& control) {
  const double* numbers = host_numbers(op, "control", control, 1);
  require(control.numel() == kControlEntries, op, ": control must have ", int{kControlEntries},
          " entries, got ", control.numel());
  return numbers;
}

struct Plan {
  Plan(const Tensor& samples_, const Tensor& counts_, const Tensor& c, const Tensor& control,
       const Tensor& like)
      : samples(samples_),
        counts(counts_),
        batch(check_samples(kOp, samples_, counts_)),
        abscissae(host_numbers(kOp, "c", c, 1)),
        stages(c.numel()),
        numbers(read_control(kOp, control)),
        dtype(dtype_of(like)) {
    require(stages <= kMaxTerms, kOp, ": c has more than ", kMaxTerms, " entries");
    require(like.numel() == batch, kOp, ": like must have one element for each of the ", batch,
            " samples, got ", like.numel());
    const int64_t step_sizes[] = {kStepRows, batch};
    step = new_tensor(samples, step_sizes, 2);
    lands = new_tensor(samples, aoti_torch_dtype_bool(), &batch, 1);
    std::vector<int64_t> sizes{stages};
    for (int64_t d = 0; d < like.dim(); ++d) sizes.push_back(like.size(d));
    int32_t of_times;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &of_times));
    times = new_tensor(samples, of_times, sizes.data(), static_cast<int64_t>(sizes.size()));
  }

  template <typename T>
  PlanTask<T> task() {
    PlanTask<T> task{};
    task.samples = data_of<double>(samples);
    task.counts = data_of<int64_t>(counts);
    std::copy(abscissae, abscissae + stages, task.abscissae);
    task.stages = static_cast<int>(stages);
    task.min_step = numbers[kMinStep], task.max_step = numbers[kMaxStep];
    task.batch = batch;
    task.step = mutable_data_of<double>(step);
    task.lands = mutable_data_of<bool>(lands);
    task.times = mutable_data_of<T>(times);
    return task;
  }

  static constexpr const char* kOp = "rk_plan";
  const Tensor &samples, &counts;
  int64_t batch;
  const double* abscissae;
  int64_t stages;
  const double* numbers;
  ScalarType dtype;
  Tensor step, lands, times;
};

struct Judgement {
  Judgement(const Tensor& samples_, const Tensor& counts_, const Tensor& step_,
            const Tensor& lands_, const Tensor& error_, const Tensor& goals_, const Tensor& control)
      : samples(samples_),
        counts(counts_),
        step(step_),
        lands(lands_),
        batch(check_samples(kOp, samples_, counts_)),
        error(as_contiguous(error_)),
        goals(as_contiguous(goals_)),
        numbers(read_control(kOp, control)) {
    check_matrix(kOp, "step", step, ScalarType::Double, kStepRows, batch, samples);
    check_vector("lands", lands);
    check_vector("error", error);
    require(dtype_of(lands) == ScalarType::Bool, kOp, ": lands must have dtype bool");
    require(goals.dim() == 2, kOp, ": goals must be [B, T]");
    check_matrix(kOp, "goals", goals, ScalarType::Double, batch, goals.size(1), samples);
    const int64_t entries = kFlagEntries;
    moved = new_tensor(samples, aoti_torch_dtype_bool(), &batch, 1);
    flags = new_tensor(samples, aoti_torch_dtype_int64(), &entries, 1);
  }

  void check_vector(const char* name, const Tensor& x) const {
    require(x.dim() == 1 && x.size(0) == batch && x.is_contiguous(), kOp, ": ", name,
            " must be [B] and contiguous, with B = ", batch);
    require(x.is_cpu() == samples.is_cpu() && x.get_device_index() == samples.get_device_index(),
            kOp, ": ", name, " must be on the device of samples");
  }

  template <typename T>
  JudgeTask<T> task() {
    return {mutable_data_of<double>(samples),
            mutable_data_of<int64_t>(counts),
            mutable_data_of<double>(step),
            data_of<bool>(lands),
            data_of<T>(error),
            data_of<double>(goals),
            gains_of(numbers),
            numbers[kMinStep],
            numbers[kMaxStep],
            numbers[kMaxSteps],
            batch,
            goals.size(1),
            mutable_data_of<bool>(moved)};
  }

  static constexpr const char* kOp = "rk_judge";
  const Tensor &samples, &counts, &step, &lands;
  int64_t batch;
  Tensor error, goals;
  const double* numbers;
  Tensor moved, flags;
};

struct Acceptance {
  Acceptance(const Tensor& moved_, const Tensor& y_, const Tensor& y1_, const Tensor& k0_,
             const Tensor& k1_)
      : moved(moved_),
        y(as_contiguous(y_)),
        y1(as_contiguous(y1_)),
        k0(as_contiguous(k0_)),
        k1(as_contiguous(k1_)),
        dtype(dtype_of(y)) {
    require(moved.dim() == 1 && dtype_of(moved) == ScalarType::Bool && moved.is_contiguous(), kOp,
            ": moved must be a contiguous bool tensor [B]");
    require(y.dim() >= 1 && y.size(0) == moved.size(0), kOp,
            ": y must be [B, ...] with B = ", moved.size(0));
    check_like_y("moved", moved, false);
    check_like_y("y1", y1), check_like_y("k0", k0), check_like_y("k1", k1);
    const auto sizes = y.sizes();
    next_y = new_tensor(y, sizes.data(), static_cast<int64_t>(sizes.size()));
    next_k = new_tensor(y, sizes.data(), static_cast<int64_t>(sizes.size()));
  }

  void check_like_y(const char* name, const Tensor& x, bool shape = true) const {
    require(x.is_cpu() == y.is_cpu() && x.get_device_index() == y.get_device_index(), kOp, ": ",
            name, " must be on the device of y");
    if (!shape) return;
    const auto given = x.sizes(), wanted = y.sizes();
    require(given.size() == wanted.size() &&
                std::equal(given.begin(), given.end(), wanted.begin()) && dtype_of(x) == dtype,
            kOp, ": ", name, " must have the shape and dtype of y");
  }

  template <typename T>
  AcceptTask<T> task() {
    const int64_t batch = y.size(0);
    return {data_of<bool>(moved),
            data_of<T>(y),
            data_of<T>(y1),
            data_of<T>(k0),
            data_of<T>(k1),
            mutable_data_of<T>(next_y),
            mutable_data_of<T>(next_k),
            batch,
            batch > 0 ? y.numel() / batch : 0};
  }

  static constexpr const char* kOp = "rk_accept";
  const Tensor& moved;
  Tensor y, y1, k0, k1;
  ScalarType dtype;
  Tensor next_y, next_k;
};

}  // namespace ct::rk
