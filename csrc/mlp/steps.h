// Activations of series that grow by one order at a time. Part of levels.h.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

// A vector of elements of all series, in memory. kOrder < 0: the order is only known at run time.
template <typename T_, int kOrder, bool kWhole>
struct StoredSeries {
  using T = T_;
  using V = Vector<T>;
  static constexpr bool kUnrolled = kOrder >= 0;

  CT_MLP_INLINE int degree(int) const { return kOrder < 0 ? task.order : kOrder; }
  CT_MLP_INLINE V get(int series, int k) const {
    const T* from = task.series[series] + k * task.plane + at;
    return kWhole ? load<T>(from) : load<T>(from, lanes);
  }
  CT_MLP_INLINE void set(int series, int k, const V& value) {
    T* to = task.series[series] + k * task.plane + at;
    if (kWhole)
      store<T>(to, value);
    else
      store<T>(to, value, lanes);
  }

  const StepTask<T>& task;
  int64_t at;
  int lanes;
};

template <typename Op, int kOrder, typename T>
void step_loop(const StepTask<T>& task) {
  constexpr int kLanes = Lanes<T>::kCount;
  const int k = kOrder < 0 ? task.order : kOrder;
  int64_t at = 0;
  for (; at + kLanes <= task.count; at += kLanes) {
    StoredSeries<T, kOrder, true> s{task, at, kLanes};
    Op::template order<true>(s, k, task.param);
  }
  if (at < task.count) {
    StoredSeries<T, -1, false> s{task, at, static_cast<int>(task.count - at)};
    Op::template order<true>(s, k, task.param);
  }
}

template <typename Op>
struct Step {
  static int series() { return Op::kSeries; }
  template <typename T>
  static void run(const StepTask<T>& task) {
    step_loop<Op, -1>(task);
  }
};

inline int series(Activation activation) { CT_MLP_BY_ACTIVATION(activation, Step, series()) }

template <typename T>
void step(const StepTask<T>& task) {
  CT_MLP_BY_ACTIVATION(task.activation, Step, run(task))
}

template <typename T>
CT_MLP_INLINE void step_derivative_vector(const StepDerivativeTask<T>& task, int64_t at,
                                          int lanes) {
  const int terms = task.orders - task.order;
  const T *bar = task.y_bar + task.order * task.plane + at, *u = task.u + at;
  Vector<T> total{};
  for (int m = 0; m < terms; ++m, bar += task.plane, u += task.plane)
    total += load<T>(bar, lanes) * load<T>(u, lanes);
  store<T>(task.z_bar + task.order * task.plane + at, total, lanes);
}

template <typename T>
void step_derivative(const StepDerivativeTask<T>& task) {
  constexpr int kLanes = Lanes<T>::kCount;
  int64_t at = 0;
  for (; at + kLanes <= task.count; at += kLanes) step_derivative_vector(task, at, kLanes);
  if (at < task.count) step_derivative_vector(task, at, static_cast<int>(task.count - at));
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
