// Activations of jets: all coefficients of a few elements at a time, in registers or nearly so.
// Part of levels.h.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

// The series of one vector of elements. kOrder < 0: the order is only known at run time.
template <typename T_, int kSeries, int kOrder, int kDegree>
struct LocalSeries {
  using T = T_;
  using V = Vector<T>;
  static constexpr int kSize = (kOrder < 0 ? kMaxOrder : kOrder) + 1;

  CT_MLP_INLINE LocalSeries(int order, int degree) : order_(order), degree_(degree) {}
  CT_MLP_INLINE int order() const { return kOrder < 0 ? order_ : kOrder; }
  CT_MLP_INLINE int degree(int series) const {
    if (series != kZ) return order();
    return kDegree < 0 ? degree_ : kDegree;
  }
  CT_MLP_INLINE V get(int series, int k) const { return coefficient_[series][k]; }
  CT_MLP_INLINE void set(int series, int k, const V& value) { coefficient_[series][k] = value; }

 private:
  V coefficient_[kSeries][kSize];
  int order_, degree_;
};

// All series of the elements from `at` on; the last few of a plane are fewer than a vector.
template <typename Op, bool kSlope, bool kWhole, typename S, typename T>
CT_MLP_INLINE void fill_series(S& s, const JetTask<T>& task, int64_t at, int lanes) {
  const int order = s.order(), degree = s.degree(kZ);
#pragma GCC unroll 8
  for (int k = 0; k <= order; ++k) {
    if (k > degree)
      s.set(kZ, k, Vector<T>{});
    else
      s.set(kZ, k, kWhole ? load<T>(task.z[k] + at) : load<T>(task.z[k] + at, lanes));
    Op::template order<kSlope>(s, k, task.param);
  }
}

template <typename Op, int kOrder, int kDegree, typename T>
CT_MLP_INLINE void jet_vector(const JetTask<T>& task, int64_t at, int lanes) {
  constexpr bool kWhole = kOrder >= 0;
  LocalSeries<T, Op::kSeries, kOrder, kDegree> s(task.order, task.degree);
  fill_series<Op, false, kWhole>(s, task, at, lanes);
  const int order = s.order(), first = task.first;
#pragma GCC unroll 8
  for (int k = 0; k <= order; ++k) {
    if (k < first) continue;
    if (kWhole)
      store<T>(task.y[k - first] + at, s.get(kY, k));
    else
      store<T>(task.y[k - first] + at, s.get(kY, k), lanes);
  }
}

// z_bar_j = sum_(k >= j) y_bar_k u_(k-j). kLast: only the highest coefficient has a cotangent.
template <typename Op, int kOrder, bool kLast, typename T>
CT_MLP_INLINE void jet_derivative_vector(const JetTask<T>& task, int64_t at, int lanes) {
  using V = Vector<T>;
  constexpr bool kWhole = kOrder >= 0;
  LocalSeries<T, Op::kSeries, kOrder, -1> s(task.order, task.degree);
  fill_series<Op, true, kWhole>(s, task, at, lanes);
  const int order = s.order(), first = kLast ? order : 0, degree = task.degree;
  V bar[decltype(s)::kSize];
#pragma GCC unroll 8
  for (int k = first; k <= order; ++k) {
    const T* from = task.y_bar[k - first] + at;
    bar[k] = kWhole ? load<T>(from) : load<T>(from, lanes);
    if (kWhole)
      store<T>(task.y[k - first] + at, s.get(kY, k));
    else
      store<T>(task.y[k - first] + at, s.get(kY, k), lanes);
  }
#pragma GCC unroll 8
  for (int j = 0; j <= order; ++j) {
    if (j > degree) continue;
    V total = bar[order] * s.get(kU, order - j);
    const int from = kLast ? order : j;
#pragma GCC unroll 8
    for (int k = from; k < order; ++k) total += bar[k] * s.get(kU, k - j);
    if (kWhole)
      store<T>(task.z_bar[j] + at, total);
    else
      store<T>(task.z_bar[j] + at, total, lanes);
  }
}

// What is left of a plane after the whole vectors.
template <typename Op, typename T>
__attribute__((noinline)) void jet_rest(const JetTask<T>& task, int64_t at) {
  jet_vector<Op, -1, -1>(task, at, static_cast<int>(task.count - at));
}

template <typename Op, bool kLast, typename T>
__attribute__((noinline)) void jet_derivative_rest(const JetTask<T>& task, int64_t at) {
  jet_derivative_vector<Op, -1, kLast>(task, at, static_cast<int>(task.count - at));
}

template <typename Op, int kOrder, int kDegree, typename T>
void jet_loop(const JetTask<T>& task) {
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t at = 0;
  for (; at + kLanes <= task.count; at += kLanes) jet_vector<Op, kOrder, kDegree>(task, at, kLanes);
  if (at < task.count) jet_rest<Op>(task, at);
}

template <typename Op, int kOrder, bool kLast, typename T>
void jet_derivative_loop(const JetTask<T>& task) {
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t at = 0;
  for (; at + kLanes <= task.count; at += kLanes)
    jet_derivative_vector<Op, kOrder, kLast>(task, at, kLanes);
  if (at < task.count)
    jet_derivative_rest<Op, kLast>(task, at);
}

template <typename Op, int kOrder>
struct JetOfOrder {
  template <typename T>
  static void forward(const JetTask<T>& task) {
    if (task.degree == 1)
      jet_loop<Op, kOrder, 1>(task);
    else
      jet_loop<Op, kOrder, kOrder>(task);
  }
  template <typename T>
  static void derivative(const JetTask<T>& task) {
    if (task.first > 0)
      jet_derivative_loop<Op, kOrder, true>(task);
    else
      jet_derivative_loop<Op, kOrder, false>(task);
  }
};

// Low orders of the usual activations have code of their own; the others share one.
template <typename Op>
struct Jet {
  template <typename T>
  static void forward(const JetTask<T>& task) {
    if constexpr (CT_MLP_UNROLL && Op::kUnrolled) switch (task.order) {
        case 1:
          return jet_loop<Op, 1, 1>(task);
        case 2:
          return JetOfOrder<Op, 2>::forward(task);
        case 3:
          return JetOfOrder<Op, 3>::forward(task);
        case 4:
          return JetOfOrder<Op, 4>::forward(task);
        case 5:
          return JetOfOrder<Op, 5>::forward(task);
        case 6:
          return JetOfOrder<Op, 6>::forward(task);
      }
    jet_loop<Op, -1, -1>(task);
  }
  template <typename T>
  static void derivative(const JetTask<T>& task) {
    if constexpr (CT_MLP_UNROLL && Op::kUnrolled) switch (task.order) {
        case 2:
          return JetOfOrder<Op, 2>::derivative(task);
        case 3:
          return JetOfOrder<Op, 3>::derivative(task);
        case 4:
          return JetOfOrder<Op, 4>::derivative(task);
        case 6:
          return JetOfOrder<Op, 6>::derivative(task);
      }
    JetOfOrder<Op, -1>::derivative(task);
  }
};

template <typename T>
void jet_forward(const JetTask<T>& task) {
  CT_MLP_BY_ACTIVATION(task.activation, Jet, forward(task))
}

template <typename T>
void jet_derivative(const JetTask<T>& task) {
  CT_MLP_BY_ACTIVATION(task.activation, Jet, derivative(task))
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
