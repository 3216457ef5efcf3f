// An activation of which only a trace of its slopes is wanted, all in one pass. Part of levels.h.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

template <typename Op>
struct Traced {
  // Returns f'(z) beside.
  template <typename T>
  static CT_MLP_INLINE Vector<T> forward_at(const TracedTask<T>& task, int64_t at, int64_t c,
                                            int lanes) {
    Vector<T> z = load<T>(task.z + at, lanes);
    if (task.bias != nullptr) {
      z += load<T>(task.bias + c, lanes);
      store<T>(task.z + at, z, lanes);
    }
    const Slopes<T> s = Op::template slopes<T>(z, task.param);
    store<T>(task.value + at, s.value, lanes);
    if (task.slope != nullptr) store<T>(task.slope + at, s.first, lanes);
    return task.beside != nullptr ? s.first * load<T>(task.beside + at, lanes) : Vector<T>{};
  }

  template <typename T>
  static void forward(const TracedTask<T>& task) {
    constexpr int kLanes = Lanes<T>::kCount;
    for (int64_t s = 0; s < task.samples; ++s) {
      const int64_t row = s * task.n;
      Vector<T> total{};
      for (int64_t c = 0; c < task.n; c += kLanes)
        total += forward_at(task, row + c, c, lanes_from<T>(c, task.n));
      if (task.trace != nullptr) task.trace[s] = sum_of_lanes<T>(total);
    }
  }

  template <typename T>
  static CT_MLP_INLINE void derivative_at(const TracedTask<T>& task, T scale, int64_t at,
                                          int lanes) {
    const Slopes<T> s = Op::template slopes<T>(load<T>(task.z + at, lanes), task.param);
    Vector<T> z_bar = scale * s.second * load<T>(task.beside + at, lanes);
    if (task.value_bar != nullptr) z_bar += s.first * load<T>(task.value_bar + at, lanes);
    store<T>(task.value + at, s.value, lanes);
    store<T>(task.slope + at, scale * s.first, lanes);
    store<T>(task.z_bar + at, z_bar, lanes);
  }

  template <typename T>
  static void derivative(const TracedTask<T>& task) {
    constexpr int kLanes = Lanes<T>::kCount;
    for (int64_t s = 0; s < task.samples; ++s) {
      const int64_t row = s * task.n;
      const T scale = task.scale != nullptr ? task.scale[s] : T(1);
      for (int64_t c = 0; c < task.n; c += kLanes)
        derivative_at(task, scale, row + c, lanes_from<T>(c, task.n));
    }
  }
};

template <typename T>
void traced(const TracedTask<T>& task) {
  CT_MLP_BY_ACTIVATION(task.activation, Traced, forward(task))
}

template <typename T>
void traced_derivative(const TracedTask<T>& task) {
  CT_MLP_BY_ACTIVATION(task.activation, Traced, derivative(task))
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
