// Activations: coefficients of f(z) order by order, and the slopes f, f', f'', f'''.
//
// The series of an activation are numbered: z, y = f(z), u = f'(z), then what it keeps beside them.
// An order k >= 1 follows from the lower ones and z_k by dy = u dz; u_k is only computed where the
// activation needs it itself or kSlope asks for it (every derivative of a jet is a product with u).
// Part of levels.h.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

// sum_j a_j b_(k-j); coefficients of series a above its degree are zero.
template <typename S>
CT_MLP_INLINE typename S::V product(const S& s, int a, int b, int k) {
  const int last = s.degree(a) < k ? s.degree(a) : k;
  typename S::V total = s.get(a, 0) * s.get(b, k);
  CT_MLP_EACH
  for (int j = 1; j <= last; ++j) total += s.get(a, j) * s.get(b, k - j);
  return total;
}

// y_k from dy = slope dz, k >= 1
template <typename S>
CT_MLP_INLINE typename S::V integral(const S& s, int slope, int z, int k) {
  using T = typename S::T;
  const int last = s.degree(z) < k ? s.degree(z) : k;
  typename S::V total = s.get(z, 1) * s.get(slope, k - 1);
  CT_MLP_EACH
  for (int j = 2; j <= last; ++j) total += (T(j) * s.get(z, j)) * s.get(slope, k - j);
  return total * (T(1) / T(k));
}

// sum_j a_j a_(k-j), half of the products
template <typename S>
CT_MLP_INLINE typename S::V square(const S& s, int a, int k) {
  using T = typename S::T;
  if (k == 0) return s.get(a, 0) * s.get(a, 0);
  typename S::V total = s.get(a, 0) * s.get(a, k);
  CT_MLP_EACH
  for (int j = 1; 2 * j < k; ++j) total += s.get(a, j) * s.get(a, k - j);
  total *= T(2);
  if (k % 2 == 0) total += s.get(a, k / 2) * s.get(a, k / 2);
  return total;
}

template <typename T>
struct Slopes {
  Vector<T> value, first, second, third;
};

struct Identity {
  static constexpr bool kUnrolled = false;
  static constexpr int kSeries = 3;
  template <bool kSlope, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    s.set(kY, k, k <= s.degree(kZ) ? s.get(kZ, k) : typename S::V{});
    if (kSlope) s.set(kU, k, splat<typename S::T>(k == 0));
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    return {z, splat<T>(1), splat<T>(0), splat<T>(0)};
  }
};

struct Relu {
  static constexpr bool kUnrolled = false;
  static constexpr int kSeries = 3;
  template <bool kSlope, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    using V = typename S::V;
    const auto off = s.get(kZ, 0) <= V{};  // NaN goes through
    const V z = k <= s.degree(kZ) ? s.get(kZ, k) : V{};
    s.set(kY, k, off ? V{} : z);
    if (kSlope) s.set(kU, k, off ? V{} : splat<typename S::T>(k == 0));
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    const auto off = z <= Vector<T>{};
    return {off ? Vector<T>{} : z, off ? Vector<T>{} : splat<T>(1), splat<T>(0), splat<T>(0)};
  }
};

struct Tanh {
  static constexpr bool kUnrolled = true;
  static constexpr int kSeries = 3;
  template <bool, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    s.set(kY, k, k ? integral(s, kU, kZ, k) : hyperbolic_tangent<typename S::T>(s.get(kZ, 0)));
    const typename S::V y2 = square(s, kY, k);
    s.set(kU, k, k ? -y2 : 1 - y2);
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    const Vector<T> y = hyperbolic_tangent<T>(z), first = 1 - y * y, second = -2 * y * first;
    return {y, first, second, -2 * (first * first + y * second)};
  }
};

// y' = y - y^2 along z, with y and its slope as two series of s
template <typename S>
CT_MLP_INLINE void logistic_order(S& s, int y, int slope, int z, int k) {
  s.set(y, k, k ? integral(s, slope, z, k) : logistic<typename S::T>(s.get(z, 0)));
  s.set(slope, k, s.get(y, k) - square(s, y, k));
}

template <typename T>
CT_MLP_INLINE Slopes<T> logistic_slopes(const Vector<T>& z) {
  const Vector<T> y = logistic<T>(z), first = y * (1 - y), odd = 1 - 2 * y;
  return {y, first, first * odd, first * (odd * odd - 2 * first)};
}

struct Sigmoid {
  static constexpr bool kUnrolled = false;
  static constexpr int kSeries = 3;
  template <bool, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    logistic_order(s, kY, kU, kZ, k);
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    return logistic_slopes<T>(z);
  }
};

struct Softplus {
  static constexpr bool kUnrolled = true;
  enum : int { kGate = kU, kGateSlope = kBeside, kSeries };
  template <bool, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T beta) {
    using T = typename S::T;
    if (k == 0) {
      const typename S::V scaled = beta * s.get(kZ, 0), gate = logistic<T>(scaled);
      s.set(kY, 0, log_of_one_plus_exp<T>(scaled) / beta);
      s.set(kGate, 0, gate);
      s.set(kGateSlope, 0, beta * (gate - gate * gate));
      return;
    }
    s.set(kY, k, integral(s, kGate, kZ, k));
    s.set(kGate, k, integral(s, kGateSlope, kZ, k));
    s.set(kGateSlope, k, beta * (s.get(kGate, k) - square(s, kGate, k)));
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T beta) {
    const Slopes<T> gate = logistic_slopes<T>(beta * z);
    return {log_of_one_plus_exp<T>(beta * z) / beta, gate.value, beta * gate.first,
            beta * beta * gate.second};
  }
};

struct Exp {
  static constexpr bool kUnrolled = false;
  static constexpr int kSeries = 3;
  template <bool, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    s.set(kY, k, k ? integral(s, kU, kZ, k) : exponential<typename S::T>(s.get(kZ, 0)));
    s.set(kU, k, s.get(kY, k));
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    const Vector<T> y = exponential<T>(z);
    return {y, y, y, y};
  }
};

struct Sin {
  static constexpr bool kUnrolled = true;
  static constexpr int kSeries = 3;
  template <bool, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    if (k == 0) {
      const SinCos<typename S::T> at = sine_and_cosine<typename S::T>(s.get(kZ, 0));
      s.set(kY, 0, at.sin);
      s.set(kU, 0, at.cos);
      return;
    }
    s.set(kY, k, integral(s, kU, kZ, k));
    s.set(kU, k, -integral(s, kY, kZ, k));
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    const SinCos<T> at = sine_and_cosine<T>(z);
    return {at.sin, at.cos, -at.sin, -at.cos};
  }
};

struct Silu {  // y = z g
  static constexpr bool kUnrolled = true;
  enum : int { kGate = kBeside, kGateSlope, kSeries };
  template <bool kSlope, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    logistic_order(s, kGate, kGateSlope, kZ, k);
    s.set(kY, k, product(s, kZ, kGate, k));
    if (kSlope) s.set(kU, k, s.get(kGate, k) + product(s, kZ, kGateSlope, k));
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    const Slopes<T> gate = logistic_slopes<T>(z);
    return {z * gate.value, gate.value + z * gate.first, 2 * gate.first + z * gate.second,
            3 * gate.second + z * gate.third};
  }
};

struct Gelu {  // y = z cdf; d cdf = pdf dz, d pdf = -moment dz, moment = z pdf
  static constexpr bool kUnrolled = false;
  enum : int { kCdf = kBeside, kPdf, kMoment, kSeries };
  template <bool kSlope, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    using T = typename S::T;
    s.set(kCdf, k, k ? integral(s, kPdf, kZ, k) : normal_cdf<T>(s.get(kZ, 0)));
    s.set(kPdf, k, k ? -integral(s, kMoment, kZ, k) : normal_pdf<T>(s.get(kZ, 0)));
    s.set(kMoment, k, product(s, kZ, kPdf, k));
    s.set(kY, k, product(s, kZ, kCdf, k));
    if (kSlope) s.set(kU, k, s.get(kCdf, k) + s.get(kMoment, k));
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    const Vector<T> cdf = normal_cdf<T>(z), pdf = normal_pdf<T>(z);
    return {z * cdf, cdf + z * pdf, pdf * (2 - z * z), pdf * z * (z * z - 4)};
  }
};

struct GeluTanh {  // y = z/2 (1 + t), t = tanh(inner), inner = a (z + b z^3)
  static constexpr bool kUnrolled = false;
  enum : int { kSquare = kBeside, kInner, kTanh, kTanhSlope, kBend, kSeries };
  static constexpr double kA = 0.7978845608028653559, kB = 0.044715;
  template <bool kSlope, typename S>
  static CT_MLP_INLINE void order(S& s, int k, typename S::T) {
    using T = typename S::T;
    using V = typename S::V;
    const V z = k <= s.degree(kZ) ? s.get(kZ, k) : V{};
    s.set(kSquare, k, product(s, kZ, kZ, k));
    s.set(kInner, k, T(kA) * (z + T(kB) * product(s, kZ, kSquare, k)));
    s.set(kTanh, k,
          k ? integral(s, kTanhSlope, kInner, k) : hyperbolic_tangent<T>(s.get(kInner, 0)));
    const V t2 = square(s, kTanh, k);
    s.set(kTanhSlope, k, k ? -t2 : 1 - t2);
    s.set(kY, k, T(0.5) * (z + product(s, kZ, kTanh, k)));
    if (!kSlope) return;
    s.set(kBend, k,
          T(kA) * (s.get(kTanhSlope, k) + T(3 * kB) * product(s, kTanhSlope, kSquare, k)));
    s.set(kU, k, T(0.5) * ((k ? s.get(kTanh, k) : 1 + s.get(kTanh, 0)) + product(s, kZ, kBend, k)));
  }
  template <typename T>
  static CT_MLP_INLINE Slopes<T> slopes(const Vector<T>& z, T) {
    const Vector<T> i1 = T(kA) + T(3 * kA * kB) * z * z, i2 = T(6 * kA * kB) * z;
    const T i3 = T(6 * kA * kB);
    const Vector<T> t = hyperbolic_tangent<T>(z * (T(kA) + T(kA * kB) * z * z)), v = 1 - t * t;
    const Vector<T> t1 = v * i1, t2 = v * i2 - 2 * t * t1 * i1;
    const Vector<T> t3 = v * i3 - 2 * (2 * t * t1 * i2 + t1 * t1 * i1 + t * t2 * i1);
    return {T(0.5) * z * (1 + t), T(0.5) * (1 + t + z * t1), t1 + T(0.5) * z * t2,
            T(1.5) * t2 + T(0.5) * z * t3};
  }
};

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
