// Sixteen lists side by side: a sorting network whose exchanges, and all arithmetic after it, are
// loops over the lists, which become vector instructions. Lists with a tie,
// NaN, an infinite or a tiny gap are marked, and done again by rows.h.
#pragma once

#include <type_traits>
#include <vector>

#include "task.h"

namespace ct::sortlet {

constexpr int kLanes = 16;
constexpr int kAlways = 64;  // lists up to this length come here, however few
// Lists up to this one come where they fill the lanes. A product of as many mantissas cannot
// overflow.
constexpr int kLongest = 1024;

template <typename T>
struct IndexOf;
template <>
struct IndexOf<float> {
  using type = int32_t;
};
template <>
struct IndexOf<double> {
  using type = int64_t;  // as wide as its key, so that one mask serves both
};

// Sixteen lists: element i of all of them, element i + 1, ...
template <typename T>
struct Block {
  using Index = typename IndexOf<T>::type;
  template <typename V>
  using Lanes = V (*)[kLanes];

  explicit Block(int64_t n) {
    const size_t line = 64, wide = n * kLanes * sizeof(double), narrow = n * kLanes * sizeof(T);
    const size_t shortest = n * kLanes * sizeof(uint16_t);
    // Kept by each thread: fresh pages at every call would cost more than the work.
    static thread_local std::vector<char> memory;
    const size_t size = 4 * wide + 3 * narrow + shortest + line;
    if (memory.size() < size) memory.resize(size);
    char* next = memory.data() + (line - reinterpret_cast<uintptr_t>(memory.data()) % line) % line;
    const auto take = [&](auto*& lanes, size_t size) {
      lanes = reinterpret_cast<std::remove_reference_t<decltype(lanes)>>(next);
      next += size;
    };
    take(key, narrow), take(index, narrow), take(value, narrow);
    take(slope, wide), take(curve, wide), take(part, wide), take(sum, wide), take(order, shortest);
  }

  Lanes<T> key, value;
  Lanes<Index> index;
  uint16_t* order;  // of each list, once sorted
  Lanes<double> slope, curve, part, sum;
  alignas(64) Index odd[kLanes];
  alignas(64) double sign[kLanes];
  int64_t first;  // list
  int lanes;      // lists in use
  bool again[kLanes];
};

#define CT_EACH_LANE _Pragma("GCC ivdep") for (int l = 0; l < kLanes; ++l)

template <typename T>
CT_GAP void load(Block<T>& b, const Task<T>& task) {
  const int n = static_cast<int>(task.n);
  for (int l = 0; l < kLanes; ++l) {  // lanes that are not in use repeat the last list
    const T* from = task.scores + (b.first + (l < b.lanes ? l : b.lanes - 1)) * task.n;
    for (int i = 0; i < n; ++i) b.key[i][l] = from[i];
  }
}

// Scores low to low + count against those `distance` further on, in order.
template <bool kIndexed, typename T>
CT_GAP void exchange(Block<T>& b, int first, int count, int distance) {
  using Index = typename Block<T>::Index;
  for (int i = first; i < first + count; ++i) {
    T *low = b.key[i], *high = b.key[i + distance];
    Index *of_low = b.index[i], *of_high = b.index[i + distance];
    CT_EACH_LANE {
      const T x = low[l], y = high[l];
      const bool swap = y < x;
      low[l] = swap ? y : x;
      high[l] = swap ? x : y;
      b.odd[l] ^= swap ? 1 : 0;
      if (kIndexed) {
        const Index p = of_low[l], q = of_high[l];
        of_low[l] = swap ? q : p;
        of_high[l] = swap ? p : q;
      }
    }
  }
}

// Batcher's merge exchange (Knuth, vol. 3, 5.2.2M).
template <bool kIndexed, typename T>
CT_GAP void sort(Block<T>& b, int n) {
  CT_EACH_LANE b.odd[l] = 0;
  if (kIndexed)
    for (int i = 0; i < n; ++i) CT_EACH_LANE b.index[i][l] = i;
  int top = 1;
  while (2 * top < n) top *= 2;
  for (int p = top; p > 0; p /= 2)
    for (int q = top, r = 0, d = p;; d = q - p, q /= 2, r = p) {
      for (int i = r; i + d < n; i += 2 * p)
        exchange<kIndexed>(b, i, p < n - d - i ? p : n - d - i, d);
      if (q == p) break;
    }
  CT_EACH_LANE b.sign[l] = b.odd[l] != 0 ? -1.0 : 1.0;
  if (kIndexed)
    for (int i = 0; i < n; ++i)
      for (int l = 0; l < kLanes; ++l) b.order[l * n + i] = static_cast<uint16_t>(b.index[i][l]);
}

// Slopes and curves of all gaps, the logarithm of the product of phi, and which lists go again.
template <int kKind, bool kSlopes, bool kSize, typename T>
CT_GAP void gaps(Block<T>& b, int n, double* size) {
  alignas(64) double mantissa[kLanes];
  alignas(64) int64_t exponent[kLanes], plain[kLanes];
  CT_EACH_LANE {
    mantissa[l] = 1, exponent[l] = 0;
    plain[l] = b.key[0][l] == b.key[0][l] ? 1 : 0;
  }
  for (int i = 0; i + 1 < n; ++i) CT_EACH_LANE {
      const double gap = static_cast<double>(b.key[i + 1][l]) - static_cast<double>(b.key[i][l]);
      plain[l] &= (gap >= kSmall) & (gap <= kLargest) ? 1 : 0;
      const GapValues at = values_of<kKind>(gap);
      if (kSlopes) b.slope[i][l] = at.slope, b.curve[i][l] = at.curve;
      if (kSize) {
        const int64_t bits = bits_of(at.phi);
        mantissa[l] *= double_of((bits & kMantissaBits) | kOneBits);
        exponent[l] += (bits >> 52) - 1023;
      }
    }
  if (kSize) CT_EACH_LANE size[l] = log_of(mantissa[l], exponent[l]);
  for (int l = 0; l < kLanes; ++l) b.again[l] = plain[l] == 0;
}

// value[i][l] = v at score i of list l, in sorted order. A loop over lanes would become gather
// instructions, which are slow on many machines.
template <typename T>
CT_GAP void gather(Block<T>& b, const Task<T>& task, const T* v) {
  const int n = static_cast<int>(task.n);
  for (int l = 0; l < b.lanes; ++l) {
    const T* from = v + (b.first + l) * task.n;
    const uint16_t* order = b.order + l * task.n;
    for (int i = 0; i < n; ++i) b.value[i][l] = from[order[i]];
  }
}

template <typename T>
CT_GAP void each_list(const Block<T>& b, const T* from, double* to) {
  for (int l = 0; l < kLanes; ++l) to[l] = from[b.first + (l < b.lanes ? l : b.lanes - 1)];
}

template <typename T>
CT_GAP void put(const Block<T>& b, T* to, const double* from) {
  for (int l = 0; l < b.lanes; ++l) to[b.first + l] = static_cast<T>(from[l]);
}

// From derivatives in the gaps, in `part`, to derivatives in the scores.
template <typename T>
CT_GAP void spread(Block<T>& b, const Task<T>& task) {
  const int n = static_cast<int>(task.n);
  CT_EACH_LANE b.part[n - 1][l] = 0;
  CT_EACH_LANE b.value[0][l] = static_cast<T>(-b.part[0][l]);
  for (int i = 1; i < n; ++i)
    CT_EACH_LANE b.value[i][l] = static_cast<T>(b.part[i - 1][l] - b.part[i][l]);
  for (int l = 0; l < b.lanes; ++l) {
    T* to = task.of_scores + (b.first + l) * task.n;
    const uint16_t* order = b.order + l * task.n;
    for (int i = 0; i < n; ++i) to[order[i]] = b.value[i][l];
  }
}

template <int kKind, typename T>
CT_GAP void lanes_log(Block<T>& b, const Task<T>& task) {
  alignas(64) double size[kLanes];
  sort<false>(b, static_cast<int>(task.n));
  gaps<kKind, false, true>(b, static_cast<int>(task.n), size);
  put(b, task.sign, b.sign);
  put(b, task.logabs, size);
}

template <int kKind, typename T>
CT_GAP void lanes_derivatives(Block<T>& b, const Task<T>& task) {
  const int n = static_cast<int>(task.n);
  const bool second = task.op == kHessian;
  alignas(64) double g[kLanes], along[kLanes] = {};
  sort<true>(b, n);
  gaps<kKind, true, false>(b, n, nullptr);
  each_list(b, task.g, g);
  if (second) gather(b, task, task.v);
  for (int i = 0; i + 1 < n; ++i) {
    if (!second) {
      CT_EACH_LANE b.part[i][l] = g[l] * b.slope[i][l];
      continue;
    }
    CT_EACH_LANE {
      const double d = static_cast<double>(b.value[i + 1][l]) - static_cast<double>(b.value[i][l]);
      const double slope = b.slope[i][l];
      along[l] += slope * d;
      b.part[i][l] = g[l] * (b.curve[i][l] - slope * slope) * d;
    }
  }
  if (second) put(b, task.of_g, along);
  spread(b, task);
}

template <int kKind, typename T>
CT_GAP void lanes_laplacian(Block<T>& b, const Task<T>& task) {
  const int n = static_cast<int>(task.n);
  const bool term = task.op == kTermLaplacian;
  alignas(64) double scale[kLanes], linear[kLanes] = {}, of_log[kLanes], of_ratio[kLanes];
  alignas(64) double before[kLanes];
  sort<true>(b, n);
  if (term) {
    gaps<kKind, true, true>(b, n, of_log);
    each_list(b, task.shift, scale);
    for (int l = 0; l < kLanes; ++l) scale[l] = b.sign[l] * std::exp(scale[l] + of_log[l]);
    put(b, task.sign, scale);
  } else {
    gaps<kKind, true, false>(b, n, nullptr);
    CT_EACH_LANE scale[l] = 1;
  }
  gather(b, task, task.lap);
  for (int i = 0; i + 1 < n; ++i)
    CT_EACH_LANE linear[l] += b.slope[i][l] * (static_cast<double>(b.value[i + 1][l]) -
                                               static_cast<double>(b.value[i][l]));
  CT_EACH_LANE of_log[l] = of_ratio[l] = linear[l];
  for (int64_t r = 0; r < task.rows; ++r) {
    gather(b, task, task.jacobian + r * task.lists * task.n);
    CT_EACH_LANE before[l] = 0;
    for (int i = 0; i + 1 < n; ++i) CT_EACH_LANE {
        const double d =
            static_cast<double>(b.value[i + 1][l]) - static_cast<double>(b.value[i][l]);
        const double part = b.slope[i][l] * d, curved = b.curve[i][l] * d * d;
        of_log[l] += curved - part * part;
        of_ratio[l] += curved + 2 * part * before[l];
        before[l] += part;
      }
    CT_EACH_LANE before[l] *= scale[l];
    put(b, task.slopes + r * task.lists, before);
  }
  CT_EACH_LANE of_ratio[l] *= scale[l];
  put(b, task.of_ratio, of_ratio);
  if (!term) put(b, task.of_log, of_log);
}

template <int kKind, typename T>
CT_GAP void lanes_term(Block<T>& b, const Task<T>& task) {
  const int n = static_cast<int>(task.n);
  alignas(64) double scale[kLanes], g[kLanes], u[kLanes], size[kLanes], of_shift[kLanes];
  sort<true>(b, n);
  gaps<kKind, true, true>(b, n, size);
  each_list(b, task.shift, scale);
  each_list(b, task.g, g);
  for (int l = 0; l < kLanes; ++l) scale[l] = b.sign[l] * std::exp(scale[l] + size[l]);
  if (task.op == kTermGradient) {
    CT_EACH_LANE of_shift[l] = g[l] * scale[l];
    for (int i = 0; i + 1 < n; ++i) CT_EACH_LANE b.part[i][l] = of_shift[l] * b.slope[i][l];
    put(b, task.of_shift, of_shift);
    return spread(b, task);
  }
  each_list(b, task.u, u);
  gather(b, task, task.v);
  alignas(64) double along[kLanes] = {}, behind[kLanes] = {};
  for (int i = 0; i + 1 < n; ++i) CT_EACH_LANE {
      const double d = static_cast<double>(b.value[i + 1][l]) - static_cast<double>(b.value[i][l]);
      b.sum[i][l] = along[l];  // of all before
      b.part[i][l] = b.slope[i][l] * d;
      b.curve[i][l] *= d;
      along[l] += b.part[i][l];
    }
  for (int i = n - 2; i >= 0; --i) CT_EACH_LANE {
      const double others = b.sum[i][l] + behind[l];
      behind[l] += b.part[i][l];
      b.part[i][l] = g[l] * scale[l] * (b.slope[i][l] * (others + u[l]) + b.curve[i][l]);
    }
  CT_EACH_LANE along[l] = scale[l] * (u[l] + along[l]);
  put(b, task.of_g, along);
  CT_EACH_LANE along[l] *= g[l];
  put(b, task.of_shift, along);
  spread(b, task);
}

template <int kKind, typename T>
CT_GAP void lanes_of_kind(Block<T>& b, const Task<T>& task) {
  load(b, task);
  switch (task.op) {
    case kTerm:
      return;  // looks at no list
    case kLog:
      return lanes_log<kKind>(b, task);
    case kGradient:
    case kHessian:
      return lanes_derivatives<kKind>(b, task);
    case kLaplacian:
    case kTermLaplacian:
      return lanes_laplacian<kKind>(b, task);
    case kTermGradient:
    case kTermHessian:
      return lanes_term<kKind>(b, task);
  }
}

template <typename T>
CT_GAP void lanes_body(Block<T>& b, const Task<T>& task) {
  if (task.kind == kTanh) return lanes_of_kind<kTanh>(b, task);
  lanes_of_kind<kLinear>(b, task);
}

}  // namespace ct::sortlet
