// A block of rows through the activation of one hidden layer; part of levels.h.

namespace ct::hollow::CT_MLP_LEVEL {
namespace {

// Coefficient k of row r is at k * plane + r * width.
template <typename T>
struct Pass {
  Activation activation;
  T param;
  int order;
  bool first;  // the first layer: z_1 is `line` in every row, and higher coefficients are zero
  int64_t rows, width, plane;
  const T* line;
  T* z;           // in; y goes there too, or the cotangent of z
  T* slope;       // out: that of y
  const T* last;  // weights of the last layer [width]
  T* sums;        // out: last . y, a vector for each (k, row), `sum_plane` rows apart
  const T* g;     // in: cotangents of last . y, `sum_plane` apart
  int64_t sum_plane;
  T* last_bar;  // added to: [width]
};

enum Mode : int { kHidden, kKept, kLast, kGradient };

template <typename T>
struct Loaded {
  CT_MLP_INLINE Vector<T> get(int k) const {
    return first && k == 1 ? load<T>(line) : load<T>(z + k * plane);
  }
  const T *z, *line;
  int64_t plane;
  bool first;
};

template <typename T, int kSize>
struct Bars {
  CT_MLP_INLINE Vector<T> get(int k) const { return bar[k]; }
  Vector<T> bar[kSize];
};

// z to y, and to its slope where that is kept.
template <typename Op, int kOrder, bool kFirst, bool kSlope, typename T>
void through(const Pass<T>& p) {
  for (int64_t at = 0; at < p.rows * p.width; at += Lanes<T>::kCount) {
    LocalSeries<T, Op, kOrder, kFirst> s(p.order, p.first);
    const T* line = s.first() ? p.line + at % p.width : nullptr;
    s.template fill<kSlope>(p.param, Loaded<T>{p.z + at, line, p.plane, s.first()});
    const int last = s.order();
    CT_MLP_EACH
    for (int k = 0; k <= last; ++k) {
      store<T>(p.z + k * p.plane + at, s.get(kY, k));
      if (kSlope) store<T>(p.slope + k * p.plane + at, s.get(kU, k));
    }
  }
}

// z to y, and straight on to the products with the last layer.
template <typename Op, int kOrder, bool kFirst, typename T>
void to_last(const Pass<T>& p) {
  constexpr int kLanes = Lanes<T>::kCount;
  using S = LocalSeries<T, Op, kOrder, kFirst>;
  for (int64_t r = 0; r < p.rows; ++r) {
    Vector<T> sum[S::kSize];
    const int last = S(p.order, p.first).order();
    CT_MLP_EACH
    for (int k = 0; k <= last; ++k) sum[k] = Vector<T>{};
    for (int64_t at = 0; at < p.width; at += kLanes) {
      S s(p.order, p.first);
      const T* z = p.z + r * p.width + at;
      s.template fill<false>(p.param, Loaded<T>{z, p.line + at, p.plane, s.first()});
      const Vector<T> weight = load<T>(p.last + at);
      CT_MLP_EACH
      for (int k = 0; k <= last; ++k) sum[k] += weight * s.get(kY, k);
    }
    CT_MLP_EACH
    for (int k = 0; k <= last; ++k) store<T>(p.sums + (k * p.sum_plane + r) * kLanes, sum[k]);
  }
}

// The same backward: z to its cotangent, and the last layer's weights' own.
template <typename Op, int kOrder, bool kFirst, typename T>
void from_last(const Pass<T>& p) {
  using S = LocalSeries<T, Op, kOrder, kFirst>;
  for (int64_t at = 0; at < p.width; at += Lanes<T>::kCount) {
    Vector<T> last_bar{};
    const Vector<T> weight = load<T>(p.last + at);
    for (int64_t r = 0; r < p.rows; ++r) {
      T* z = p.z + r * p.width + at;
      S s(p.order, p.first);
      s.template fill<true>(p.param, Loaded<T>{z, p.line + at, p.plane, s.first()});
      Bars<T, S::kSize> bars;
      const int last = s.order(), degree = s.degree(kZ);
      CT_MLP_EACH
      for (int k = 0; k <= last; ++k) {
        bars.bar[k] = splat<T>(p.g[k * p.sum_plane + r]);
        last_bar += bars.bar[k] * s.get(kY, k);
      }
      CT_MLP_EACH
      for (int j = 0; j <= degree; ++j) store<T>(z + j * p.plane, weight * s.correlated(bars, j));
    }
    store<T>(p.last_bar + at, load<T>(p.last_bar + at) + last_bar);
  }
}

// Cotangents of y in `z` to those of z, in place, by the slope that was kept.
template <typename T>
void backward(const Pass<T>& p) {
  const int degree = p.first && p.order > 1 ? 1 : p.order;
  for (int64_t at = 0; at < p.rows * p.width; at += Lanes<T>::kCount)
    for (int j = 0; j <= degree; ++j) {
      Vector<T> total{};
      for (int k = j; k <= p.order; ++k)
        total += load<T>(p.z + k * p.plane + at) * load<T>(p.slope + (k - j) * p.plane + at);
      store<T>(p.z + j * p.plane + at, total);
    }
}

// Low orders of the usual activations have code of their own, most of them where no gradient is
// taken; the others share one.
template <typename Op, int kMode, int kOrder, bool kFirst, typename T>
void pass_of_order(const Pass<T>& p) {
  if constexpr (kMode == kHidden) through<Op, kOrder, kFirst, false>(p);
  if constexpr (kMode == kKept) through<Op, kOrder, kFirst, true>(p);
  if constexpr (kMode == kLast) to_last<Op, kOrder, kFirst>(p);
  if constexpr (kMode == kGradient) from_last<Op, kOrder, kFirst>(p);
}

template <typename Op, int kMode, int kOrder, typename T>
void pass_of_layer(const Pass<T>& p) {
  if (p.first)
    pass_of_order<Op, kMode, kOrder, true>(p);
  else
    pass_of_order<Op, kMode, kOrder, false>(p);
}

template <int kMode>
struct PassOf {
  template <typename Op>
  struct Family {
    template <typename T>
    static void run(const Pass<T>& p) {
      constexpr bool kForward = kMode == kHidden || kMode == kLast;
      if constexpr (CT_MLP_UNROLL && Op::kUnrolled) switch (p.order) {
          case 0:  // no difference between layers
            return pass_of_order<Op, kMode, 0, false>(p);
          case 1:
            return pass_of_layer<Op, kMode, 1>(p);
          case 2:
            return pass_of_layer<Op, kMode, 2>(p);
          case 3:
            if constexpr (kForward) return pass_of_layer<Op, kMode, 3>(p);
            break;
          case 4:
            if constexpr (kForward) return pass_of_layer<Op, kMode, 4>(p);
            break;
        }
      pass_of_order<Op, kMode, -1, false>(p);
    }
  };
};

template <int kMode, typename T>
void pass(const Pass<T>& p) {
  CT_MLP_BY_ACTIVATION(p.activation, PassOf<kMode>::template Family, run(p))
}

}  // namespace
}  // namespace ct::hollow::CT_MLP_LEVEL
