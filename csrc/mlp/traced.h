// An activation of which only a trace of its slopes is wanted, all in one pass. Part of levels.h.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

template <typename Op>
struct Traced {
  // Returns f'(z) beside.
  template <bool kWhole, typename T>
  static CT_MLP_INLINE Vector<T> forward_at(const TracedTask<T>& task, int64_t at, int64_t c,
                                            int lanes) {
    const Columns<T, kWhole ? 2 : 1> columns{lanes};
    Vector<T> z = columns.read(task.z + at, 0);
    if (task.bias != nullptr) {
      z += columns.read(task.bias + c, 0);
      columns.write(task.z + at, 0, z);
    }
    const Slopes<T> s = Op::template slopes<T>(z, task.param);
    columns.write(task.value + at, 0, s.value);
    if (task.slope != nullptr) columns.write(task.slope + at, 0, s.first);
    return task.beside != nullptr ? s.first * columns.read(task.beside + at, 0) : Vector<T>{};
  }

  template <typename T>
  static void forward(const TracedTask<T>& task) {
    constexpr int kLanes = Lanes<T>::kCount;
    for (int64_t s = 0; s < task.samples; ++s) {
      const int64_t row = s * task.n;
      Vector<T> total{};
      int64_t c = 0;
      for (; c + kLanes <= task.n; c += kLanes) total += forward_at<true>(task, row + c, c, kLanes);
      if (c < task.n) total += forward_at<false>(task, row + c, c, static_cast<int>(task.n - c));
      if (task.trace != nullptr) task.trace[s] = sum_of_lanes<T>(total);
    }
  }

  template <bool kWhole, typename T>
  static CT_MLP_INLINE void derivative_at(const TracedTask<T>& task, T scale, int64_t at,
                                          int lanes) {
    const Columns<T, kWhole ? 2 : 1> columns{lanes};
    const Slopes<T> s = Op::template slopes<T>(columns.read(task.z + at, 0), task.param);
    Vector<T> z_bar = scale * s.second * columns.read(task.beside + at, 0);
    if (task.value_bar != nullptr) z_bar += s.first * columns.read(task.value_bar + at, 0);
    columns.write(task.value + at, 0, s.value);
    columns.write(task.slope + at, 0, scale * s.first);
    columns.write(task.z_bar + at, 0, z_bar);
  }

  template <typename T>
  static void derivative(const TracedTask<T>& task) {
    constexpr int kLanes = Lanes<T>::kCount;
    for (int64_t s = 0; s < task.samples; ++s) {
      const int64_t row = s * task.n;
      const T scale = task.scale != nullptr ? task.scale[s] : T(1);
      int64_t c = 0;
      for (; c + kLanes <= task.n; c += kLanes) derivative_at<true>(task, scale, row + c, kLanes);
      if (c < task.n) derivative_at<false>(task, scale, row + c, static_cast<int>(task.n - c));
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
