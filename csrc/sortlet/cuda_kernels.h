// The CUDA kernels. No torch here: the tests compile this file with g++ as well, and run it on the
// CPU.
//
// Once a list is sorted, a team, which is a warp or a block, runs the operator on it. Sums are
// taken in an order that depends on the sizes alone.
#pragma once

#include <cmath>
#include <cstdint>

#include "cuda_sort.h"
#include "task.h"

namespace ct::sortlet {

// ---- teams

struct WarpTeam {
  static constexpr int kSize = kWarp;
  __device__ int rank() const { return static_cast<int>(threadIdx.x) % kWarp; }
  __device__ double sum(double x) const { return warp_sum(x); }
  // The sum over ranks before this one; `carry`, of earlier calls, goes in front and is kept up.
  __device__ double before(double x, double& carry) const {
    const double upto = warp_scan(x), shifted = __shfl_up_sync(kAll, upto, 1);
    const double result = carry + (rank() > 0 ? shifted : 0);  // upto - x would cancel
    carry += __shfl_sync(kAll, upto, kWarp - 1);
    return result;
  }
  __device__ void sync() const { __syncwarp(); }
};

struct BlockTeam {
  static constexpr int kSize = kThreads;
  double* of_warp;  // shared, kWarps

  __device__ int rank() const { return static_cast<int>(threadIdx.x); }
  __device__ double sum(double x) const {
    x = warp_sum(x);
    __syncthreads();  // an earlier sum may still be read
    if (threadIdx.x % kWarp == 0) of_warp[threadIdx.x / kWarp] = x;
    __syncthreads();
    double total = 0;
    for (int w = 0; w < kWarps; ++w) total += of_warp[w];
    return total;
  }
  __device__ double before(double x, double& carry) const {
    const int lane = static_cast<int>(threadIdx.x) % kWarp,
              warp = static_cast<int>(threadIdx.x) / kWarp;
    const double upto = warp_scan(x), shifted = __shfl_up_sync(kAll, upto, 1);
    __syncthreads();
    if (lane == kWarp - 1) of_warp[warp] = upto;
    __syncthreads();
    double result = carry;
    for (int w = 0; w < kWarps; ++w) {
      result += w < warp ? of_warp[w] : 0;
      carry += of_warp[w];
    }
    return result + (lane > 0 ? shifted : 0);
  }
  __device__ void sync() const { __syncthreads(); }
};

// ---- a list in order

template <typename T>
struct Sorted {
  const T* key;
  const int32_t* index;
  double* scratch;  // n numbers
  bool odd;
};

// The operators, on one list; the conventions are those of rows.h.
template <int kKind, typename Team, typename T>
class ListOnTeam {
 public:
  __device__ ListOnTeam(const Task<T>& task, int64_t list, const Sorted<T>& sorted, Team team)
      : task_(task),
        sorted_(sorted),
        team_(team),
        list_(list),
        n_(task.n),
        gaps_(task.n - 1),
        begin_(list * task.n),
        sign_(sorted.odd ? -1 : 1) {}

  __device__ void run() {
    const T last = n_ > 0 ? sorted_.key[n_ - 1] : T(0);
    if (last != last) return fill_nan();
    switch (task_.op) {
      case kTerm:
        return;  // looks at no list
      case kLog:
        return log_value();
      case kGradient:
        return gradient();
      case kHessian:
        return hessian();
      case kLaplacian:
        return laplacian();
      default:
        return term();
    }
  }

 private:
  __device__ bool leads() const { return team_.rank() == 0; }
  __device__ double gap(int64_t i) const {
    const double low = sorted_.key[i], high = sorted_.key[i + 1];
    return low == high ? 0 : high - low;
  }
  __device__ double change(const T* v, int64_t i) const {
    return static_cast<double>(v[sorted_.index[i + 1]]) - static_cast<double>(v[sorted_.index[i]]);
  }
  __device__ bool is_tied(int64_t i) const { return gap(i) < kSmall; }

  // body(i) of each gap, by some thread.
  template <typename Body>
  __device__ void each(const Body& body) const {
    for (int64_t i = team_.rank(); i < gaps_; i += Team::kSize) body(i);
  }

  // The sum of body(i) over all gaps, for each thread.
  template <typename Body>
  __device__ double total(const Body& body) const {
    double sum = 0;
    each([&](int64_t i) { sum += body(i); });
    return team_.sum(sum);
  }

  // Keeps results[i] = the sum of values(j) over gaps j before i, or behind it; returns that of
  // all.
  template <typename Values, typename Keep>
  __device__ double scan(bool forward, const Values& values, const Keep& keep) const {
    double carry = 0;
    for (int64_t first = 0; first < gaps_; first += Team::kSize) {
      const int64_t at = first + team_.rank(), i = forward ? at : gaps_ - 1 - at;
      const double x = at < gaps_ ? values(i) : 0;
      const double before = team_.before(x, carry);
      if (at < gaps_) keep(i, x, before);
    }
    return carry;
  }

  __device__ GapValues values(int64_t i) const {
    const double g = gap(i);
    if (g == 0) return {0, 0, 0};
    return values_of<kKind>(g < kSmall ? kSmall : g);
  }

  __device__ double log_size(double least) const {
    Product product;
    int factors = 0;
    bool infinite = false;
    each([&](int64_t i) {
      const double g = gap(i);
      if (g < least || g == 0) return;
      const bool tiny = g < kSmall;
      const double phi = tiny ? g * 0x1p600 : phi_of<kKind>(g);
      if (phi > kLargest) {
        infinite = true;
        return;
      }
      product.times(phi);
      product.exponent -= tiny ? 600 : 0;
      if (++factors % 512 == 0) product.settle();
    });
    return team_.sum(infinite ? static_cast<double>(INFINITY) : product.log());
  }

  __device__ void log_value() const {
    const double ties = total([&](int64_t i) { return gap(i) == 0 ? 1.0 : 0.0; });
    const double size = log_size(0);
    if (!leads()) return;
    task_.sign[list_] = ties > 0 ? T(0) : static_cast<T>(sign_);
    task_.logabs[list_] = static_cast<T>(ties > 0 ? -static_cast<double>(INFINITY) : size);
  }

  // From derivatives in the gaps, in `scratch`, to derivatives in the scores.
  __device__ void spread(double factor) const {
    team_.sync();
    for (int64_t i = team_.rank(); i < n_; i += Team::kSize) {
      const double before = i > 0 ? sorted_.scratch[i - 1] : 0,
                   behind = i < gaps_ ? sorted_.scratch[i] : 0;
      task_.of_scores[begin_ + sorted_.index[i]] = static_cast<T>(factor * (before - behind));
    }
  }

  __device__ void gradient() const {
    each([&](int64_t i) { sorted_.scratch[i] = values(i).slope; });
    spread(task_.g[list_]);
  }

  __device__ void hessian() const {
    const double of_g = total([&](int64_t i) {
      const GapValues at = values(i);
      const double d = change(task_.v + begin_, i);
      sorted_.scratch[i] = gap(i) == 0 ? 0 : log_curve<kKind>(at) * d;
      return at.slope * d;
    });
    if (leads()) task_.of_g[list_] = static_cast<T>(of_g);
    spread(task_.g[list_]);
  }

  __device__ void laplacian() const {
    const double linear =
        total([&](int64_t i) { return values(i).slope * change(task_.lap + begin_, i); });
    double of_log = 0, of_ratio = 0;  // of this thread
    for (int64_t r = 0; r < task_.rows; ++r) {
      const T* row = task_.jacobian + r * task_.lists * n_ + begin_;
      const double along = scan(
          true, [&](int64_t i) { return values(i).slope * change(row, i); },
          [&](int64_t i, double part, double before) {
            const double d = change(row, i), curved = values(i).curve * d * d;
            of_log += curved - part * part;
            of_ratio += curved + 2 * part * before;
          });
      if (leads()) task_.slopes[r * task_.lists + list_] = static_cast<T>(along);
    }
    of_log = team_.sum(of_log), of_ratio = team_.sum(of_ratio);
    if (!leads()) return;
    task_.of_log[list_] = static_cast<T>(linear + of_log);
    task_.of_ratio[list_] = static_cast<T>(linear + of_ratio);
  }

  // ---- the term

  __device__ void term() {
    ties_ = total([&](int64_t i) { return is_tied(i) ? 1.0 : 0.0; });
    if (ties_ > 0) {  // two positions from their sum and that of their squares
      const double s = total([&](int64_t i) { return is_tied(i) ? static_cast<double>(i) : 0.0; });
      const double q =
          total([&](int64_t i) { return is_tied(i) ? static_cast<double>(i) * i : 0.0; });
      const double apart = ties_ == 2 ? sqrt(2 * q - s * s) : 0;
      first_ = static_cast<int64_t>(ties_ == 2 ? (s - apart) / 2 : s);
      second_ = static_cast<int64_t>((s + apart) / 2);
    }
    scale_ = sign_ * exp(static_cast<double>(task_.shift[list_]) + log_size(kSmall));
    if (task_.op == kTermGradient) return term_gradient();
    if (task_.op == kTermHessian) return term_hessian();
    term_laplacian();
  }

  __device__ GapValues unit(int64_t i) const {
    return is_tied(i) ? GapValues{0, 1, 0} : values_of<kKind>(gap(i));
  }

  __device__ bool survives(int64_t i) const { return ties_ == 0 || (ties_ == 1 && i == first_); }

  // The sum of parts j != i in which with i a product survives, where there are ties.
  __device__ double tied_others(int64_t i, double of_first, double of_second,
                                double of_rest) const {
    if (ties_ == 1) return i == first_ ? of_rest : of_first;
    if (ties_ == 2) return i == first_ ? of_second : i == second_ ? of_first : 0;
    return 0;
  }

  __device__ void term_gradient() const {
    const double g = task_.g[list_];
    each([&](int64_t i) { sorted_.scratch[i] = survives(i) ? g * scale_ * unit(i).slope : 0; });
    if (leads()) task_.of_shift[list_] = static_cast<T>(ties_ == 0 ? g * scale_ : 0);
    spread(1);
  }

  __device__ void term_hessian() const {
    const double g = task_.g[list_], u = task_.u[list_];
    const T* v = task_.v + begin_;
    const auto part = [&](int64_t i) { return unit(i).slope * change(v, i); };
    double along = 0;
    const auto finish = [&](int64_t i, double others) {
      const GapValues at = unit(i);
      const double alone = survives(i) ? at.slope * u + at.curve * change(v, i) : 0;
      sorted_.scratch[i] = g * scale_ * (at.slope * others + alone);
    };
    if (ties_ == 0) {
      along =
          scan(true, part, [&](int64_t i, double, double before) { sorted_.scratch[i] = before; });
      team_.sync();
      scan(false, part,
           [&](int64_t i, double, double behind) { finish(i, sorted_.scratch[i] + behind); });
    } else {
      const double of_first = part(first_), of_second = ties_ == 2 ? part(second_) : 0;
      const double of_rest = total([&](int64_t i) { return i == first_ ? 0 : part(i); });
      along = ties_ == 1 ? of_first : 0;
      each([&](int64_t i) { finish(i, tied_others(i, of_first, of_second, of_rest)); });
    }
    if (leads()) {
      const double of_g = scale_ * ((ties_ == 0 ? u : 0) + along);
      task_.of_g[list_] = static_cast<T>(of_g);
      task_.of_shift[list_] = static_cast<T>(g * of_g);
    }
    spread(1);
  }

  __device__ void term_laplacian() const {
    const T* lap = task_.lap + begin_;
    const double linear =
        total([&](int64_t i) { return survives(i) ? unit(i).slope * change(lap, i) : 0; });
    double second = 0;  // of this thread
    for (int64_t r = 0; r < task_.rows; ++r) {
      const T* row = task_.jacobian + r * task_.lists * n_ + begin_;
      const auto part = [&](int64_t i) { return unit(i).slope * change(row, i); };
      const auto curved = [&](int64_t i) {
        const double d = change(row, i);
        return survives(i) ? unit(i).curve * d * d : 0;
      };
      double along = 0;
      if (ties_ == 0) {
        along = scan(true, part, [&](int64_t i, double x, double before) {
          second += curved(i) + 2 * x * before;
        });
      } else {
        const double of_first = part(first_), of_second = ties_ == 2 ? part(second_) : 0;
        const double of_rest = total([&](int64_t i) { return i == first_ ? 0 : part(i); });
        along = ties_ == 1 ? of_first : 0;
        each([&](int64_t i) {
          second += curved(i) + part(i) * tied_others(i, of_first, of_second, of_rest);
        });
      }
      if (leads()) task_.slopes[r * task_.lists + list_] = static_cast<T>(scale_ * along);
    }
    second = team_.sum(second);
    if (!leads()) return;
    task_.sign[list_] = static_cast<T>(ties_ == 0 ? scale_ : 0);
    task_.of_ratio[list_] = static_cast<T>(scale_ * (linear + second));
  }

  __device__ void fill_nan() const {
    const T nan = static_cast<T>(NAN);
    if (leads()) {
      T* const of_list[] = {task_.sign, task_.logabs, task_.of_shift,
                            task_.of_g, task_.of_log, task_.of_ratio};
      for (T* to : of_list)
        if (to != nullptr) to[list_] = nan;
    }
    if (task_.of_scores != nullptr)
      for (int64_t i = team_.rank(); i < n_; i += Team::kSize) task_.of_scores[begin_ + i] = nan;
    if (task_.slopes != nullptr)
      for (int64_t r = team_.rank(); r < task_.rows; r += Team::kSize)
        task_.slopes[r * task_.lists + list_] = nan;
  }

  const Task<T>& task_;
  const Sorted<T>& sorted_;
  Team team_;
  int64_t list_, n_, gaps_, begin_;
  double sign_, scale_ = 0, ties_ = 0;
  int64_t first_ = 0, second_ = 0;
};

template <typename Team, typename T>
__device__ inline void run_list(const Task<T>& task, int64_t list, const Sorted<T>& sorted,
                                Team team) {
  if (task.kind == kTanh) {
    ListOnTeam<kTanh, Team, T>(task, list, sorted, team).run();
  } else {
    ListOnTeam<kLinear, Team, T>(task, list, sorted, team).run();
  }
}

// ---- kernels

// A warp for each list of at most 64.
template <typename T>
__global__ void short_kernel(Task<T> task) {
  __shared__ T keys[kWarps][kShort];
  __shared__ int32_t indices[kWarps][kShort];
  __shared__ double scratch[kWarps][kShort];
  const int lane = static_cast<int>(threadIdx.x) % kWarp,
            warp = static_cast<int>(threadIdx.x) / kWarp;
  for (int64_t list = static_cast<int64_t>(blockIdx.x) * kWarps + warp; list < task.lists;
       list += static_cast<int64_t>(gridDim.x) * kWarps) {
    T key[2];
    int32_t index[2];
    for (int h = 0; h < 2; ++h) {
      index[h] = lane + h * kWarp;
      key[h] = index[h] < task.n ? task.scores[list * task.n + index[h]] + T(0)
                                 : static_cast<T>(NAN);  // comes last, in order
    }
    const bool odd = sort_in_warp(key, index);
    for (int h = 0; h < 2; ++h)
      keys[warp][lane + h * kWarp] = key[h], indices[warp][lane + h * kWarp] = index[h];
    __syncwarp();
    const Sorted<T> sorted{keys[warp], indices[warp], scratch[warp], odd};
    run_list(task, list, sorted, WarpTeam{});
    __syncwarp();  // before the next list
  }
}

// A block for each list, sorted by then.
template <typename T>
__global__ void long_kernel(Task<T> task, const T* key, const int32_t* index, double* scratch,
                            const unsigned long long* swaps) {
  __shared__ double of_warp[kWarps];
  for (int64_t list = blockIdx.x; list < task.lists; list += gridDim.x) {
    const int64_t begin = list * task.n;
    const Sorted<T> sorted{key + begin, index + begin, scratch + begin, swaps[list] % 2 != 0};
    run_list(task, list, sorted, BlockTeam{of_warp});
    __syncthreads();  // before the next list
  }
}

template <typename T>
__global__ void term_kernel(Task<T> task) {
  for (int64_t list = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; list < task.lists;
       list += static_cast<int64_t>(gridDim.x) * kThreads)
    task.sign[list] = known_term(task, list);
}

}  // namespace ct::sortlet
