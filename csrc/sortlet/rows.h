// One list at a time, of any length and content: the conventions for ties, NaN and infinities are
// here. Lists of up to 64 scores come here only where they need one.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "task.h"

namespace ct::sortlet {

constexpr int64_t kInsertion = 32;  // lists up to this length are sorted by insertion

// Memory that the lists of one thread share.
template <typename T>
struct Workspace {
  struct Entry {
    T key;
    int32_t index;
  };
  std::vector<Entry> entries, other;
  std::vector<double> gaps, parts, sums;
  std::vector<uint8_t> seen;

  void fit(int64_t n) {
    if (static_cast<int64_t>(entries.size()) >= n) return;
    entries.resize(n), other.resize(n);
    gaps.resize(n), parts.resize(n), sums.resize(n);
    seen.resize(n);
  }
};

// Whole numbers in the order of floating-point numbers.
inline uint32_t radix_key(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
inline uint64_t radix_key(double x) {
  uint64_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits ^ ((bits >> 63) != 0 ? ~uint64_t{0} : uint64_t{1} << 63);
}

// Stable; from the lowest digit of 8 bits on. A digit that all keys share is skipped.
template <typename T>
void radix_sort(Workspace<T>& work, int64_t n) {
  constexpr int kDigits = sizeof(T);
  uint32_t count[kDigits][256] = {};
  for (int64_t i = 0; i < n; ++i) {
    auto key = radix_key(work.entries[i].key);
    for (int d = 0; d < kDigits; ++d, key >>= 8) ++count[d][key & 255];
  }
  for (int d = 0; d < kDigits; ++d) {
    uint32_t first = 0;
    bool shared = false;
    for (uint32_t& c : count[d]) {
      shared = shared || c == n;
      const uint32_t size = c;
      c = first, first += size;
    }
    if (shared) continue;
    for (int64_t i = 0; i < n; ++i) {
      const auto entry = work.entries[i];
      work.other[count[d][(radix_key(entry.key) >> (8 * d)) & 255]++] = entry;
    }
    work.entries.swap(work.other);
  }
}

// Sorts one list; true if the permutation is odd.
template <typename T>
bool sort_list(Workspace<T>& work, const T* scores, int64_t n) {
  for (int64_t i = 0; i < n; ++i)  // -0 becomes +0, with which it ties
    work.entries[i] = {scores[i] + T(0), static_cast<int32_t>(i)};
  bool odd = false;
  if (n <= kInsertion) {
    for (int64_t i = 1; i < n; ++i) {
      const auto entry = work.entries[i];
      int64_t j = i;
      for (; j > 0 && work.entries[j - 1].key > entry.key; --j)
        work.entries[j] = work.entries[j - 1], odd = !odd;
      work.entries[j] = entry;
    }
    return odd;
  }
  radix_sort(work, n);
  std::fill(work.seen.begin(), work.seen.begin() + n, uint8_t{0});
  odd = n % 2 != 0;
  for (int64_t i = 0; i < n; ++i) {  // a permutation of c cycles is odd where n - c is
    if (work.seen[i] != 0) continue;
    odd = !odd;
    for (int64_t j = i; work.seen[j] == 0; j = work.entries[j].index) work.seen[j] = 1;
  }
  return odd;
}

// One list, sorted.
template <typename T, int kKind>
class Row {
 public:
  Row(const Task<T>& task, int64_t list, Workspace<T>& work)
      : task_(task), list_(list), n_(task.n), begin_(list * task.n), work_(work) {
    work_.fit(n_);
    if (std::any_of(task.scores + begin_, task.scores + begin_ + n_, [](T x) { return x != x; })) {
      fill_nan();
      return;
    }
    sign_ = sort_list(work_, task.scores + begin_, n_) ? -1 : 1;
    for (int64_t i = 0; i + 1 < n_; ++i) {
      const double low = work_.entries[i].key, high = work_.entries[i + 1].key;
      work_.gaps[i] = low == high ? 0 : high - low;
    }
    run();
  }

 private:
  int64_t count() const { return n_ > 0 ? n_ - 1 : 0; }
  double gap(int64_t i) const { return work_.gaps[i]; }
  int32_t index(int64_t i) const { return work_.entries[i].index; }
  double change(const T* v, int64_t i) const {
    return static_cast<double>(v[index(i + 1)]) - static_cast<double>(v[index(i)]);
  }

  void run() {
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
      case kTermGradient:
      case kTermHessian:
      case kTermLaplacian:
        return term();
    }
  }

  // ---- the logarithm

  // Values of a gap, with slope and curve zero at a tie.
  GapValues values(int64_t i) const {
    if (gap(i) == 0) return {0, 0, 0};
    return values_of<kKind>(std::max(gap(i), kSmall));
  }

  // The sum of log phi; ties left out.
  double log_size(double least) const {
    Product product;
    for (int64_t i = 0; i < count(); ++i) {
      if (gap(i) < least || gap(i) == 0) continue;
      const bool tiny = gap(i) < kSmall;  // phi(g) = g; and g may be denormal
      const double phi = tiny ? gap(i) * 0x1p600 : phi_of<kKind>(gap(i));
      if (!(phi <= kLargest)) return std::numeric_limits<double>::infinity();
      product.times(phi);
      product.exponent -= tiny ? 600 : 0;
      if (i % 512 == 511) product.settle();
    }
    return product.log();
  }

  void log_value() {
    bool tied = false;
    for (int64_t i = 0; i < count(); ++i) tied = tied || gap(i) == 0;
    task_.sign[list_] = tied ? T(0) : T(sign_);
    task_.logabs[list_] = tied ? -std::numeric_limits<T>::infinity() : static_cast<T>(log_size(0));
  }

  // From derivatives in the gaps, in `parts`, to derivatives in the scores.
  void spread(double factor) {
    double before = 0;
    for (int64_t i = 0; i < n_; ++i) {
      const double slope = i < count() ? work_.parts[i] : 0;
      task_.of_scores[begin_ + index(i)] = static_cast<T>(factor * (before - slope));
      before = slope;
    }
  }

  void gradient() {
    for (int64_t i = 0; i < count(); ++i) work_.parts[i] = values(i).slope;
    spread(task_.g[list_]);
  }

  void hessian() {
    double of_g = 0;
    for (int64_t i = 0; i < count(); ++i) {
      const GapValues at = values(i);
      const double d = change(task_.v + begin_, i);
      of_g += at.slope * d;
      work_.parts[i] = gap(i) == 0 ? 0 : log_curve<kKind>(at) * d;
    }
    task_.of_g[list_] = static_cast<T>(of_g);
    spread(task_.g[list_]);
  }

  void laplacian() {
    double linear = 0, of_log = 0, of_ratio = 0;
    for (int64_t i = 0; i < count(); ++i) {
      const GapValues at = values(i);
      linear += at.slope * change(task_.lap + begin_, i);
      work_.parts[i] = at.slope, work_.sums[i] = at.curve;
    }
    for (int64_t r = 0; r < task_.rows; ++r) {
      const T* row = task_.jacobian + r * task_.lists * n_ + begin_;
      double before = 0;
      for (int64_t i = 0; i < count(); ++i) {
        const double d = change(row, i), part = work_.parts[i] * d;
        const double curved = work_.sums[i] * d * d;
        of_log += curved - part * part;
        of_ratio += curved + 2 * part * before;
        before += part;
      }
      task_.slopes[r * task_.lists + list_] = static_cast<T>(before);
    }
    task_.of_log[list_] = static_cast<T>(linear + of_log);
    task_.of_ratio[list_] = static_cast<T>(linear + of_ratio);
  }

  // ---- the term: where z gaps are tied, only derivatives in all of these are not zero

  void term() {
    int64_t z = 0;
    for (int64_t i = 0; i < count(); ++i)
      if (is_tied(i)) tied_[std::min<int64_t>(z++, 1)] = i;
    ties_ = z;
    scale_ = sign_ * std::exp(static_cast<double>(task_.shift[list_]) + log_size(kSmall));
    if (task_.op == kTermGradient) return term_gradient();
    if (task_.op == kTermHessian) return term_hessian();
    term_laplacian();
  }

  bool is_tied(int64_t i) const { return gap(i) < kSmall; }

  // Slope and curve over the nonzero factor that a gap has in `scale_`.
  GapValues unit(int64_t i) const {
    return is_tied(i) ? GapValues{0, 1, 0} : values_of<kKind>(gap(i));
  }

  // Whether a product of all gaps but i, and but i and j, is not zero.
  bool survives(int64_t i) const { return ties_ == 0 || (ties_ == 1 && tied_[0] == i); }
  bool survives(int64_t i, int64_t j) const {
    if (ties_ == 2) return (tied_[0] == i && tied_[1] == j) || (tied_[0] == j && tied_[1] == i);
    return ties_ == 0 || (ties_ == 1 && (tied_[0] == i || tied_[0] == j));
  }

  void term_gradient() {
    const double g = task_.g[list_];
    for (int64_t i = 0; i < count(); ++i)
      work_.parts[i] = survives(i) ? g * scale_ * unit(i).slope : 0;
    spread(1);
    task_.of_shift[list_] = static_cast<T>(ties_ == 0 ? g * scale_ : 0);
  }

  // sums[i] = sum over j != i of parts[j], as far as these pairs survive.
  void sum_others() {
    std::fill(work_.sums.begin(), work_.sums.begin() + count(), 0.0);
    double before = 0, behind = 0;
    for (int64_t i = 0; i < count(); ++i) {
      if (ties_ == 0 || survives(i)) work_.sums[i] = before;
      before += work_.parts[i];
    }
    for (int64_t i = count(); i-- > 0;) {
      if (ties_ == 0 || survives(i)) work_.sums[i] += behind;
      behind += work_.parts[i];
    }
    if (ties_ == 1)
      for (int64_t i = 0; i < count(); ++i)
        if (i != tied_[0]) work_.sums[i] = work_.parts[tied_[0]];
    if (ties_ == 2) {
      work_.sums[tied_[0]] = work_.parts[tied_[1]];
      work_.sums[tied_[1]] = work_.parts[tied_[0]];
    }
  }

  void term_hessian() {
    const double g = task_.g[list_], u = task_.u[list_];
    const T* v = task_.v + begin_;
    for (int64_t i = 0; i < count(); ++i) work_.parts[i] = unit(i).slope * change(v, i);
    sum_others();
    double along = 0;
    for (int64_t i = 0; i < count(); ++i) along += survives(i) ? work_.parts[i] : 0;
    for (int64_t i = 0; i < count(); ++i) {
      const GapValues at = unit(i);
      const double alone = survives(i) ? at.slope * u + at.curve * change(v, i) : 0;
      work_.parts[i] = g * scale_ * (at.slope * work_.sums[i] + alone);
    }
    spread(1);
    const double of_g = scale_ * ((ties_ == 0 ? u : 0) + along);
    task_.of_g[list_] = static_cast<T>(of_g);
    task_.of_shift[list_] = static_cast<T>(g * of_g);
  }

  void term_laplacian() {
    double second = 0;
    for (int64_t i = 0; i < count(); ++i)
      second += survives(i) ? unit(i).slope * change(task_.lap + begin_, i) : 0;
    for (int64_t r = 0; r < task_.rows; ++r) {
      const T* row = task_.jacobian + r * task_.lists * n_ + begin_;
      double along = 0;
      for (int64_t i = 0; i < count(); ++i) work_.parts[i] = unit(i).slope * change(row, i);
      sum_others();
      for (int64_t i = 0; i < count(); ++i) {
        const double d = change(row, i);
        along += survives(i) ? work_.parts[i] : 0;
        second += work_.parts[i] * work_.sums[i] + (survives(i) ? unit(i).curve * d * d : 0);
      }
      task_.slopes[r * task_.lists + list_] = static_cast<T>(scale_ * along);
    }
    task_.sign[list_] = static_cast<T>(ties_ == 0 ? scale_ : 0);
    task_.of_ratio[list_] = static_cast<T>(scale_ * second);
  }

  void fill_nan() {
    const T nan = std::numeric_limits<T>::quiet_NaN();
    for (T* of_list :
         {task_.sign, task_.logabs, task_.of_shift, task_.of_g, task_.of_log, task_.of_ratio})
      if (of_list != nullptr) of_list[list_] = nan;
    if (task_.of_scores != nullptr)
      std::fill(task_.of_scores + begin_, task_.of_scores + begin_ + n_, nan);
    if (task_.slopes != nullptr)
      for (int64_t r = 0; r < task_.rows; ++r) task_.slopes[r * task_.lists + list_] = nan;
  }

  const Task<T>& task_;
  int64_t list_, n_, begin_;
  Workspace<T>& work_;
  double sign_ = 1, scale_ = 0;
  int64_t ties_ = 0, tied_[2] = {-1, -1};
};

}  // namespace ct::sortlet
