// Tangents through an activation: a few columns at a time, over all rows. Part of levels.h.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

template <typename Op>
struct SlopesOf {
  template <typename T>
  static CT_MLP_INLINE void at(const SlopesTask<T>& task, int64_t at, int lanes) {
    const Slopes<T> s = Op::template slopes<T>(load<T>(task.z + at, lanes), task.param);
    store<T>(task.value + at, s.value, lanes);
    store<T>(task.first + at, s.first, lanes);
    store<T>(task.second + at, s.second, lanes);
    if (task.third != nullptr) store<T>(task.third + at, s.third, lanes);
  }
  template <typename T>
  static void run(const SlopesTask<T>& task) {
    for (int64_t i = 0; i < task.count; i += Lanes<T>::kCount)
      at(task, i, lanes_from<T>(i, task.count));
  }
};

template <typename T>
void slopes(const SlopesTask<T>& task) {
  CT_MLP_BY_ACTIVATION(task.activation, SlopesOf, run(task))
}

// Columns that a loop over the rows takes at once: kCount whole vectors, or a part of one.
template <typename T, int kCount>
struct Columns {
  using V = Vector<T>;
  static constexpr int kLanes = Lanes<T>::kCount;

  CT_MLP_INLINE V read(const T* from, int j) const {
    return kCount > 1 ? load<T>(from + j * kLanes) : load<T>(from, lanes);
  }
  CT_MLP_INLINE void write(T* to, int j, const V& x) const {
    if (kCount > 1)
      store<T>(to + j * kLanes, x);
    else
      store<T>(to, x, lanes);
  }
  int lanes;
};

template <typename T>
CT_MLP_INLINE T sum_of_lanes(const Vector<T>& x) {
  T total = 0;
  for (int i = 0; i < Lanes<T>::kCount; ++i) total += x[i];
  return total;
}

template <int kCount, bool kOut, bool kBend, bool kTrace, typename T>
CT_MLP_INLINE void rows_columns(const RowsTask<T>& task, int64_t s, int64_t c, int lanes) {
  using V = Vector<T>;
  const Columns<T, kCount> columns{lanes};
  const int64_t at = s * task.n + c;
  V first[kCount], square[kCount], traced[kCount];
  for (int j = 0; j < kCount; ++j) {
    first[j] = columns.read(task.first + at, j);
    square[j] = traced[j] = V{};
  }
  const T *in = task.in.data + s * task.in.sample + c, *close = kTrace ? task.close + c : nullptr;
  T* out = kOut ? task.out.data + s * task.out.sample + c : nullptr;
  for (int64_t i = 0; i < task.rows; ++i) {
    for (int j = 0; j < kCount; ++j) {
      const V x = columns.read(in, j);
      if (kBend) square[j] += x * x;
      if (kOut) columns.write(out, j, first[j] * x);
      if (kTrace) traced[j] += x * columns.read(close, j);
    }
    in += task.in.row;
    if (kOut) out += task.out.row;
    if (kTrace) close += task.n;
  }
  for (int j = 0; j < kCount; ++j) {
    if (kTrace) task.trace[s] += sum_of_lanes<T>(first[j] * traced[j]);
    if (!kBend) continue;
    V bent = columns.read(task.second + at, j) * square[j];
    if (task.lap != nullptr) bent += first[j] * columns.read(task.lap + at, j);
    columns.write(task.lap_out + at, j, bent);
  }
}

template <bool kOut, bool kBend, bool kTrace, typename T>
void rows_loop(const RowsTask<T>& task) {
  constexpr int kLanes = Lanes<T>::kCount, kWide = 4 * kLanes;
  for (int64_t s = 0; s < task.samples; ++s) {
    if (kTrace) task.trace[s] = 0;
    int64_t c = 0;
    for (; c + kWide <= task.n; c += kWide)
      rows_columns<4, kOut, kBend, kTrace>(task, s, c, kLanes);
    for (; c < task.n; c += kLanes)
      rows_columns<1, kOut, kBend, kTrace>(
          task, s, c, static_cast<int>(task.n - c < kLanes ? task.n - c : kLanes));
  }
}

template <typename T>
void rows(const RowsTask<T>& task) {
  if (task.close != nullptr) return rows_loop<false, false, true>(task);
  if (!task.bend) return rows_loop<true, false, false>(task);
  if (task.out)
    rows_loop<true, true, false>(task);
  else
    rows_loop<false, true, false>(task);
}

template <int kCount, bool kOut, bool kBend, bool kBar, bool kTrace, bool kShared, typename T>
CT_MLP_INLINE void rows_derivative_columns(const RowsDerivativeTask<T>& d, int64_t s, int64_t c,
                                           int lanes) {
  using V = Vector<T>;
  const RowsTask<T>& task = d.task;
  const Columns<T, kCount> columns{lanes};
  const int64_t at = s * task.n + c;
  // in_bar = first * out_bar + twice * in
  V first[kCount], twice[kCount], square[kCount], along[kCount];
  for (int j = 0; j < kCount; ++j) {
    first[j] = columns.read(task.first + at, j);
    square[j] = along[j] = V{};
    if (kBend) twice[j] = 2 * columns.read(task.second + at, j) * columns.read(d.lap_bar + at, j);
  }
  const T *in = task.in.data + s * task.in.sample + c, *close = kTrace ? task.close + c : nullptr;
  const T* bar = kBar ? d.out_bar.data + s * d.out_bar.sample + c : nullptr;
  T *out = kOut ? task.out.data + s * task.out.sample + c : nullptr,
    *in_bar = d.in_bar.data + s * d.in_bar.sample + c,
    *close_bar = kTrace ? d.close_bar + c : nullptr;
  const T trace_bar = kTrace ? d.trace_bar[s] : T(0);
  for (int64_t i = 0; i < task.rows; ++i) {
    for (int j = 0; j < kCount; ++j) {
      const V x = columns.read(in, j);
      V x_bar = kBend ? twice[j] * x : V{};
      if (kBend) square[j] += x * x;
      if (kOut) columns.write(out, j, first[j] * x);
      if (kBar || kTrace) {
        const V of_out = kTrace ? trace_bar * columns.read(close, j) : columns.read(bar, j);
        along[j] += of_out * x;
        x_bar += first[j] * of_out;
      }
      if (kTrace)
        columns.write(close_bar, j, columns.read(close_bar, j) + trace_bar * first[j] * x);
      if (kShared) x_bar += columns.read(in_bar, j);
      columns.write(in_bar, j, x_bar);
    }
    in += task.in.row, in_bar += d.in_bar.row;
    if (kOut) out += task.out.row;
    if (kBar) bar += d.out_bar.row;
    if (kTrace) close += task.n, close_bar += task.n;
  }
  for (int j = 0; j < kCount; ++j) {
    const V second = columns.read(task.second + at, j);
    V z_bar = first[j] * columns.read(d.value_bar + at, j);
    if (kBend) {
      const V lap_bar = columns.read(d.lap_bar + at, j);
      V bent = second * square[j];
      if (task.lap != nullptr) {
        const V lap = columns.read(task.lap + at, j);
        bent += first[j] * lap;
        along[j] += lap_bar * lap;
        columns.write(d.lap_in_bar + at, j, first[j] * lap_bar);
      }
      columns.write(task.lap_out + at, j, bent);
      z_bar += columns.read(task.third + at, j) * square[j] * lap_bar;
    }
    columns.write(d.z_bar + at, j, z_bar + second * along[j]);
  }
}

template <bool kOut, bool kBend, bool kBar, bool kTrace, bool kShared, typename T>
void rows_derivative_loop(const RowsDerivativeTask<T>& d) {
  constexpr int kLanes = Lanes<T>::kCount, kWide = 4 * kLanes;
  const int64_t n = d.task.n;
  for (int64_t s = 0; s < d.task.samples; ++s) {
    int64_t c = 0;
    for (; c + kWide <= n; c += kWide)
      rows_derivative_columns<4, kOut, kBend, kBar, kTrace, kShared>(d, s, c, kLanes);
    for (; c < n; c += kLanes)
      rows_derivative_columns<1, kOut, kBend, kBar, kTrace, kShared>(
          d, s, c, static_cast<int>(n - c < kLanes ? n - c : kLanes));
  }
}

template <bool kShared, typename T>
void rows_derivative_of(const RowsDerivativeTask<T>& d) {
  if (d.task.close != nullptr) return rows_derivative_loop<false, false, false, true, kShared>(d);
  if (!d.task.bend) return rows_derivative_loop<true, false, true, false, kShared>(d);
  if (d.out_bar)
    rows_derivative_loop<true, true, true, false, kShared>(d);
  else
    rows_derivative_loop<false, true, false, false, kShared>(d);
}

template <typename T>
void rows_derivative(const RowsDerivativeTask<T>& d) {
  if (d.in_bar.sample == 0)
    rows_derivative_of<true>(d);
  else
    rows_derivative_of<false>(d);
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
