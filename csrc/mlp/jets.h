// Activations of jets: all coefficients of a few elements at a time, in registers or nearly so.
// Part of levels.h.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

// The series of one vector of elements. kOrder < 0: the order is only known at run time. kDegree <
// 0: so is the degree of z; where the order is known, zeros fill z up, and nothing has to be asked.
template <typename T_, int kSeries, int kOrder, int kDegree>
struct LocalSeries {
  using T = T_;
  using V = Vector<T>;
  static constexpr bool kUnrolled = kOrder >= 0, kFilled = kOrder >= 0 && kDegree < 0;
  static constexpr int kSize = (kOrder < 0 ? kMaxOrder : kOrder) + 1;

  CT_MLP_INLINE LocalSeries(int order, int degree) : order_(order), degree_(degree) {}
  CT_MLP_INLINE int order() const { return kOrder < 0 ? order_ : kOrder; }
  CT_MLP_INLINE int degree(int series) const {
    if (series != kZ) return order();
    return kDegree > 0 ? kDegree : kOrder < 0 ? degree_ : kOrder;
  }
  CT_MLP_INLINE V get(int series, int k) const { return coefficient_[series][k]; }
  CT_MLP_INLINE void set(int series, int k, const V& value) { coefficient_[series][k] = value; }

 private:
  V coefficient_[kSeries][kSize];
  int order_, degree_;
};

// All series of the elements from `at` on; the last few of a plane are fewer than a vector.
template <typename Op, bool kSlope, typename S, typename T>
CT_MLP_INLINE void fill_series(S& s, const JetTask<T>& task, int64_t at, int lanes) {
  const int order = s.order(), degree = s.degree(kZ);
  CT_MLP_ORDERS(S, k, 0, order, {
    const bool known = k <= degree && (!S::kFilled || k <= task.degree);
    s.set(kZ, k, known ? load<T>(task.z[k] + at, lanes) : Vector<T>{});
    Op::template order<kSlope>(s, k, task.param);
  })
}

template <typename Op, int kOrder, int kDegree, typename T>
CT_MLP_INLINE void jet_vector(const JetTask<T>& task, int64_t at, int lanes) {
  using S = LocalSeries<T, Op::kSeries, kOrder, kDegree>;
  S s(task.order, task.degree);
  fill_series<Op, false>(s, task, at, lanes);
  const int order = s.order();
  if (task.last) return store<T>(task.y[0] + at, s.get(kY, order), lanes);
  CT_MLP_ORDERS(S, k, 0, order, store<T>(task.y[k] + at, s.get(kY, k), lanes);)
}

// z_bar_j = sum_(k >= j) y_bar_k u_(k-j). With task.last, the last coefficient alone has a
// cotangent.
template <typename Op, int kOrder, typename T>
CT_MLP_INLINE void jet_derivative_vector(const JetTask<T>& task, int64_t at, int lanes) {
  using V = Vector<T>;
  using S = LocalSeries<T, Op::kSeries, kOrder, -1>;
  S s(task.order, task.degree);
  fill_series<Op, true>(s, task, at, lanes);
  const int order = s.order(), first = task.last ? order : 0;
  V bar[S::kSize];
  CT_MLP_ORDERS(S, k, 0, order, {
    bar[k] = k < first ? V{} : load<T>(task.y_bar[k - first] + at, lanes);
    if (k >= first) store<T>(task.y[k - first] + at, s.get(kY, k), lanes);
  })
  CT_MLP_ORDERS(S, j, 0, order, {
    if (j > task.degree) continue;
    V total = bar[order] * s.get(kU, order - j);
    CT_MLP_ORDERS(S, k, j, order - 1, total += bar[k] * s.get(kU, k - j);)
    store<T>(task.z_bar[j] + at, total, lanes);
  })
}

// Any order, and any rest of a plane.
template <typename Op, typename T>
__attribute__((noinline)) void jet_from(const JetTask<T>& task, int64_t at) {
  for (; at < task.count; at += Lanes<T>::kCount)
    jet_vector<Op, -1, -1>(task, at, lanes_from<T>(at, task.count));
}

template <typename Op, typename T>
__attribute__((noinline)) void jet_derivative_from(const JetTask<T>& task, int64_t at) {
  for (; at < task.count; at += Lanes<T>::kCount)
    jet_derivative_vector<Op, -1>(task, at, lanes_from<T>(at, task.count));
}

// Works on a copy of the task, which no store can change.
template <typename Op, int kOrder, int kDegree, typename T>
void jet_loop(const JetTask<T>& given) {
  const JetTask<T> task = given;
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t at = 0;
  for (; at + kLanes <= task.count; at += kLanes) jet_vector<Op, kOrder, kDegree>(task, at, kLanes);
  jet_from<Op>(task, at);
}

template <typename Op, int kOrder, typename T>
void jet_derivative_loop(const JetTask<T>& task) {
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t at = 0;
  for (; at + kLanes <= task.count; at += kLanes)
    jet_derivative_vector<Op, kOrder>(task, at, kLanes);
  jet_derivative_from<Op>(task, at);
}

template <typename Op, int kOrder, typename T>
void jet_of_order(const JetTask<T>& task) {
  if (task.degree == 1)
    jet_loop<Op, kOrder, 1>(task);
  else
    jet_loop<Op, kOrder, kOrder>(task);
}

// Low orders of the usual activations have code of their own; the others share one.
template <typename Op>
struct Jet {
  template <typename T>
  static void forward(const JetTask<T>& task) {
    if constexpr (CT_MLP_UNROLL && Op::kUnrolled) switch (task.order) {
        case 1:
          return jet_loop<Op, 1, 1>(task);
        case 2:
          return jet_of_order<Op, 2>(task);
        case 3:
          return jet_of_order<Op, 3>(task);
        case 4:
          return jet_of_order<Op, 4>(task);
        case 5:
          return jet_of_order<Op, 5>(task);
        case 6:
          return jet_of_order<Op, 6>(task);
      }
    jet_from<Op>(task, 0);
  }
  template <typename T>
  static void derivative(const JetTask<T>& task) {
    if constexpr (CT_MLP_UNROLL && Op::kUnrolled) switch (task.order) {
        case 2:
          return jet_derivative_loop<Op, 2>(task);
        case 3:
          return jet_derivative_loop<Op, 3>(task);
        case 6:
          return jet_derivative_loop<Op, 6>(task);
      }
    jet_derivative_from<Op>(task, 0);
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
