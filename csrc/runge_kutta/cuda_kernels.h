// The CUDA kernels. No torch here: the tests compile this file with g++ as well, and run it on the
// CPU.
//
// Sums are taken in an order that depends on the sizes alone, never by atomics: the same inputs
// give the same bits.
#pragma once

#include <cmath>
#include <cstdint>

#include "arith.h"
#include "control.h"

namespace ct::rk {

constexpr int kWarp = 32;
constexpr int kThreads = 256;      // in a block
constexpr int64_t kPiece = 4096;   // elements that one block of a reduction takes
constexpr int kMaxSegments = 128;  // in one launch
constexpr int kTile = 8;           // queries that share one reading of the slopes
constexpr int kMaxWeights = 256;   // numbers in the polynomials of a dense output

__device__ inline int64_t global_thread() {
  return static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
}

__device__ inline int64_t global_threads() { return static_cast<int64_t>(gridDim.x) * blockDim.x; }

template <typename A>
__device__ inline A step_at(const Step& step, int64_t i, int64_t row) {
  if (step.data == nullptr) return static_cast<A>(step.value);
  return static_cast<A>(step.stride == 0 ? *step.data : step.data[i / row * step.stride]);
}

template <typename T>
__device__ inline T tolerance_at(const Tolerance<T>& tolerance, int64_t i) {
  return tolerance.data == nullptr ? tolerance.value : tolerance.data[i];
}

// ---- combination
// ----------------------------------------------------------------------------------------------------

template <typename T, typename A>
struct CombineTask {
  Terms<T, A> terms;
  Step step;
  const T* y;  // null: zeros
  T* out;
  const T* fresh;  // a slope on its way to `slot`; null: none
  T* slot;
  int64_t numel, row;
};

// So many values that one instruction loads or stores them.
template <typename T, int kWidth>
struct alignas(sizeof(T) * kWidth) Pack {
  T value[kWidth];
};

template <int kWidth, typename T>
__device__ inline Pack<T, kWidth> load(const T* from, int64_t i) {
  return reinterpret_cast<const Pack<T, kWidth>*>(from)[i];
}

template <int kWidth, typename T>
__device__ inline void store(T* to, int64_t i, const Pack<T, kWidth>& pack) {
  reinterpret_cast<Pack<T, kWidth>*>(to)[i] = pack;
}

template <int kWidth, typename T, typename A>
__global__ void combine_kernel(CombineTask<T, A> task) {
  const int64_t packs = task.numel / kWidth;
  for (int64_t i = global_thread(); i < packs; i += global_threads()) {
    A sum[kWidth] = {};
    for (int j = 0; j < task.terms.count; ++j) {
      const Pack<T, kWidth> k = load<kWidth>(task.terms.row[j], i);
      for (int w = 0; w < kWidth; ++w)
        sum[w] += task.terms.coefficient[j] * static_cast<A>(k.value[w]);
    }
    Pack<T, kWidth> y = {}, out;
    if (task.y != nullptr) y = load<kWidth>(task.y, i);
    for (int w = 0; w < kWidth; ++w) {
      const A h = step_at<A>(task.step, i * kWidth + w, task.row);
      out.value[w] = static_cast<T>(static_cast<A>(y.value[w]) + h * sum[w]);
    }
    if (task.fresh != nullptr) store<kWidth>(task.slot, i, load<kWidth>(task.fresh, i));
    store<kWidth>(task.out, i, out);
  }
}

// ---- error norm
// -----------------------------------------------------------------------------------------------------

template <typename T>
struct ErrorTask {
  Terms<T, T> error, solution;
  Step step;
  Tolerance<T> rtol, atol;
  const T *y, *y1;
  T* new_state;    // null: y1 is given
  const T* fresh;  // a slope on its way to `slot`; null: none
  T* slot;
  int64_t row;
  bool maximum;
};

// What an element gives to the norm. Each element is asked once: its new state and its slope are
// stored on the way.
template <typename T>
__device__ inline T contribution(const ErrorTask<T>& task, int64_t i) {
  const T h = step_at<T>(task.step, i, task.row), y = task.y[i];
  T y1;
  if (task.new_state != nullptr) {
    y1 = y +
         h * add_terms(T(0), task.solution.row, task.solution.coefficient, task.solution.count, i);
    task.new_state[i] = y1;
  } else {
    y1 = task.y1[i];
  }
  const T error = h * add_terms(T(0), task.error.row, task.error.coefficient, task.error.count, i);
  if (task.fresh != nullptr) task.slot[i] = task.fresh[i];
  const T ratio =
      scaled_error(error, y, y1, tolerance_at(task.rtol, i), tolerance_at(task.atol, i));
  return task.maximum ? magnitude(ratio) : ratio * ratio;
}

template <typename A>
__device__ inline A join(A a, A b, bool maximum) {
  return maximum ? larger(a, b) : a + b;
}

// Over groups of `lanes` neighbors (a power of two, at most a warp); the first of each group has
// the result.
template <typename A>
__device__ inline A reduce_lanes(A value, bool maximum, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2)
    value = join(value, __shfl_down_sync(0xffffffffu, value, offset, lanes), maximum);
  return value;
}

// Over the block; the first thread has the result.
template <typename A>
__device__ inline A reduce_block(A value, bool maximum) {
  __shared__ A of_warp[kWarp];
  value = reduce_lanes(value, maximum, kWarp);
  __syncthreads();  // an earlier reduction may still be reading
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = value;
  __syncthreads();
  A total = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < static_cast<int>(blockDim.x) / kWarp; ++w)
      total = join(total, of_warp[w], maximum);
  return total;
}

// Some neighboring segments of every unit. Where a state has more than fit, launches follow each
// other and keep the largest norm in `out`.
struct Segments {
  int64_t units, unit_length;
  int64_t begin;  // of the first segment, within a unit
  int64_t length[kMaxSegments];
  int count;
  bool first_launch;
};

template <typename T>
__device__ inline double norm_of(T total, int64_t length, bool maximum) {
  return maximum || length == 0 ? static_cast<double>(total)
                                : sqrt(static_cast<double>(total) / static_cast<double>(length));
}

template <typename T>
__device__ inline void put_norm(T* out, const Segments& segments, double norm) {
  *out = static_cast<T>(segments.first_launch ? norm : larger(static_cast<double>(*out), norm));
}

// Short units: so many lanes each, at most a warp.
template <typename T>
__global__ void lanes_norm_kernel(ErrorTask<T> task, Segments segments, T* out, int lanes) {
  const int64_t unit = global_thread() / lanes;
  const int lane = static_cast<int>(threadIdx.x) % lanes;
  double norm = 0;
  int64_t begin = unit * segments.unit_length + segments.begin;
  for (int s = 0; s < segments.count; ++s) {
    const int64_t length = segments.length[s];
    T sum = 0;
    for (int64_t j = lane; j < length && unit < segments.units; j += lanes)
      sum = join(sum, contribution(task, begin + j), task.maximum);
    sum = reduce_lanes(sum, task.maximum, lanes);
    norm = larger(norm, norm_of(sum, length, task.maximum));
    begin += length;
  }
  if (lane == 0 && unit < segments.units) put_norm(out + unit, segments, norm);
}

// Longer units: a block each.
template <typename T>
__global__ void block_norm_kernel(ErrorTask<T> task, Segments segments, T* out) {
  const int64_t unit = blockIdx.x;
  double norm = 0;
  int64_t begin = unit * segments.unit_length + segments.begin;
  for (int s = 0; s < segments.count; ++s) {
    const int64_t length = segments.length[s];
    T sum = 0;
    for (int64_t j = threadIdx.x; j < length; j += blockDim.x)
      sum = join(sum, contribution(task, begin + j), task.maximum);
    sum = reduce_block(sum, task.maximum);
    norm = larger(norm, norm_of(sum, length, task.maximum));
    begin += length;
  }
  if (threadIdx.x == 0) put_norm(out + unit, segments, norm);
}

CT_HD int64_t pieces_of(int64_t length) { return (length + kPiece - 1) / kPiece; }

// Long units, first pass: block `unit * pieces + piece` reduces one piece of one segment.
template <typename T>
__global__ void piece_kernel(ErrorTask<T> task, Segments segments, double* partial,
                             int64_t pieces) {
  int64_t piece = blockIdx.x % pieces,
          begin = blockIdx.x / pieces * segments.unit_length + segments.begin;
  int s = 0;
  for (; piece >= pieces_of(segments.length[s]); ++s) {
    piece -= pieces_of(segments.length[s]);
    begin += segments.length[s];
  }
  const int64_t from = piece * kPiece, rest = segments.length[s] - from,
                count = rest < kPiece ? rest : kPiece;
  T sum = 0;
  for (int64_t j = threadIdx.x; j < count; j += blockDim.x)
    sum = join(sum, contribution(task, begin + from + j), task.maximum);
  sum = reduce_block(sum, task.maximum);
  if (threadIdx.x == 0) partial[blockIdx.x] = sum;
}

// Second pass: a block for each unit joins the pieces.
template <typename T>
__global__ void join_kernel(const double* partial, Segments segments, T* out, int64_t pieces,
                            bool maximum) {
  const double* next = partial + blockIdx.x * pieces;
  double norm = 0;
  for (int s = 0; s < segments.count; ++s) {
    double sum = 0;
    for (int64_t j = threadIdx.x; j < pieces_of(segments.length[s]); j += blockDim.x)
      sum = join(sum, next[j], maximum);
    sum = reduce_block(sum, maximum);
    norm = larger(norm, norm_of(sum, segments.length[s], maximum));
    next += pieces_of(segments.length[s]);
  }
  if (threadIdx.x == 0) put_norm(out + blockIdx.x, segments, norm);
}

// ---- dense output
// ---------------------------------------------------------------------------------------------------

template <typename T>
struct DenseTask {
  const T* row[kMaxTerms];
  double weights[kMaxWeights];  // polynomials of the rows, `degree` numbers each
  int count, degree;
  const double* theta;  // null: the values are here
  double theta_value[kTile];
  const int64_t* sample;
  int64_t samples;
  Step step;
  const T* y;
  T* out;
  int64_t queries, numel, row_length;
};

// Every query looks at the whole state: a tile of queries for each blockIdx.y.
template <typename T>
__global__ void dense_kernel(DenseTask<T> task) {
  __shared__ T weight[kMaxTerms][kTile];
  for (int64_t first = static_cast<int64_t>(blockIdx.y) * kTile; first < task.queries;
       first += static_cast<int64_t>(gridDim.y) * kTile) {
    const int64_t rest = task.queries - first;
    const int tile = static_cast<int>(rest < kTile ? rest : kTile);
    for (int t = static_cast<int>(threadIdx.x); t < task.count * tile;
         t += static_cast<int>(blockDim.x)) {
      const int j = t / tile, q = t % tile;
      const double theta = task.theta == nullptr ? task.theta_value[q] : task.theta[first + q];
      weight[j][q] =
          static_cast<T>(dense_weight(task.weights + j * task.degree, task.degree, theta));
    }
    __syncthreads();
    for (int64_t i = global_thread(); i < task.numel; i += global_threads()) {
      T sum[kTile] = {};
      for (int j = 0; j < task.count; ++j) {
        const T k = task.row[j][i];
        for (int q = 0; q < kTile; ++q)
          if (q < tile) sum[q] += weight[j][q] * k;
      }
      const T h = step_at<T>(task.step, i, task.row_length), y = task.y[i];
      for (int q = 0; q < kTile; ++q)
        if (q < tile) task.out[(first + q) * task.numel + i] = y + h * sum[q];
    }
    __syncthreads();  // before the next tile's weights
  }
}

// Each query looks at one sample; one that does not exist gives NaN, since a kernel cannot raise.
template <typename T>
__global__ void dense_samples_kernel(DenseTask<T> task) {
  for (int64_t at = global_thread(); at < task.queries * task.row_length; at += global_threads()) {
    const int64_t query = at / task.row_length, sample = task.sample[query];
    if (sample < 0 || sample >= task.samples) {
      task.out[at] = static_cast<T>(NAN);
      continue;
    }
    const int64_t i = sample * task.row_length + at % task.row_length;
    T sum = 0;
    for (int j = 0; j < task.count; ++j)
      sum += static_cast<T>(
                 dense_weight(task.weights + j * task.degree, task.degree, task.theta[query])) *
             task.row[j][i];
    task.out[at] = task.y[i] + step_at<T>(task.step, i, task.row_length) * sum;
  }
}

// ---- step control
// ---------------------------------------------------------------------------------------------------

template <typename T>
__global__ void plan_kernel(PlanTask<T> task) {
  for (int64_t i = global_thread(); i < task.batch; i += global_threads()) plan_sample(task, i);
}

// `flags` begins as zeros; whole numbers give the same in any order.
template <typename T>
__global__ void judge_kernel(JudgeTask<T> task, unsigned long long* flags) {
  __shared__ Found of_warp[kWarp];
  Found found{};
  for (int64_t i = global_thread(); i < task.batch; i += global_threads()) {
    const Found of_sample = judge_sample(task, i);
    found.bits |= of_sample.bits, found.passed += of_sample.passed;
  }
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    found.bits |= __shfl_down_sync(0xffffffffu, found.bits, offset);
    found.passed += __shfl_down_sync(0xffffffffu, found.passed, offset);
  }
  if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = found;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < static_cast<int>(blockDim.x) / kWarp; ++w)
    found.bits |= of_warp[w].bits, found.passed += of_warp[w].passed;
  if (found.bits != 0) atomicOr(flags + kBits, static_cast<unsigned long long>(found.bits));
  if (found.passed != 0) atomicAdd(flags + kPassed, static_cast<unsigned long long>(found.passed));
}

template <typename T>
__global__ void accept_kernel(AcceptTask<T> task) {
  for (int64_t i = global_thread(); i < task.batch * task.row; i += global_threads())
    accept_element(task, i, task.moved[i / task.row]);
}

}  // namespace ct::rk
