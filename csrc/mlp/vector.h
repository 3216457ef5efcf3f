// Vectors and the elementary functions of them, to the last bits of float32 and float64.
//
// Written with the compiler's vector types. Part of levels.h, which includes it once for each
// instruction set: no include guard, and no includes of its own.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

typedef float FloatVector __attribute__((vector_size(CT_MLP_BYTES)));
typedef double DoubleVector __attribute__((vector_size(CT_MLP_BYTES)));
typedef int32_t IntVector __attribute__((vector_size(CT_MLP_BYTES)));
typedef int64_t LongVector __attribute__((vector_size(CT_MLP_BYTES)));

template <typename T>
struct Lanes;
template <>
struct Lanes<float> {
  using Vector = FloatVector;
  using Integer = IntVector;
  static constexpr int kCount = CT_MLP_BYTES / 4, kMantissa = 23, kBias = 127;
  static constexpr int32_t kAbs = 0x7fffffff;
  static constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: added, it rounds to an integer
  static constexpr float kLn2Hi = 0.693359375f, kLn2Lo = -2.12194440e-4f;
  static constexpr float kExpMax = 88.0f, kExpMin = -87.0f, kTanhMax = 20.0f;
  static constexpr int kExpTerms = 7, kLogTerms = 8, kSinTerms = 5;
  static constexpr float kSinMax = 8000.0f;
  static constexpr float kHalfPi[3] = {1.5703125f, 4.83751296997e-4f, 7.54978994e-8f};
};
template <>
struct Lanes<double> {
  using Vector = DoubleVector;
  using Integer = LongVector;
  static constexpr int kCount = CT_MLP_BYTES / 8, kMantissa = 52, kBias = 1023;
  static constexpr int64_t kAbs = 0x7fffffffffffffff;
  static constexpr double kMagic = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr double kLn2Hi = 6.93147180369123816490e-01, kLn2Lo = 1.90821492927058770002e-10;
  static constexpr double kExpMax = 709.0, kExpMin = -708.0, kTanhMax = 44.0;
  static constexpr int kExpTerms = 13, kLogTerms = 17, kSinTerms = 9;
  static constexpr double kSinMax = 1e5;
  static constexpr double kHalfPi[3] = {1.57079632673412561417e+00, 6.07710050630396597660e-11,
                                        2.02226624879595063154e-21};
};

template <typename T>
using Vector = typename Lanes<T>::Vector;
template <typename T>
using Integer = typename Lanes<T>::Integer;

template <typename T>
CT_MLP_INLINE Vector<T> splat(T value) {
  return value - Vector<T>{};
}

template <typename T>
CT_MLP_INLINE Vector<T> load(const T* from) {
  Vector<T> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
CT_MLP_INLINE void store(T* to, const Vector<T>& x) {
  std::memcpy(to, &x, sizeof(x));
}

// The first few lanes, mostly all; the others are zero.
template <typename T>
CT_MLP_INLINE Vector<T> load(const T* from, int lanes) {
  if (lanes == Lanes<T>::kCount) [[likely]]
    return load<T>(from);
  Vector<T> x{};
  std::memcpy(&x, from, lanes * sizeof(T));
  return x;
}

template <typename T>
CT_MLP_INLINE void store(T* to, const Vector<T>& x, int lanes) {
  if (lanes == Lanes<T>::kCount) [[likely]]
    store<T>(to, x);
  else
    std::memcpy(to, &x, lanes * sizeof(T));
}

// How many lanes there are from `at` on, of `count` elements.
template <typename T>
CT_MLP_INLINE int lanes_from(int64_t at, int64_t count) {
  return count - at < Lanes<T>::kCount ? static_cast<int>(count - at) : Lanes<T>::kCount;
}

template <typename T>
CT_MLP_INLINE Vector<T> absolute(const Vector<T>& x) {
  return (Vector<T>)((Integer<T>)x & Lanes<T>::kAbs);
}

template <typename T>
CT_MLP_INLINE Vector<T> with_sign(const Vector<T>& size, const Vector<T>& sign) {
  return (Vector<T>)((Integer<T>)size | ((Integer<T>)sign & ~Lanes<T>::kAbs));
}

// NaN stays NaN in both.
template <typename T>
CT_MLP_INLINE Vector<T> at_most(const Vector<T>& x, T limit) {
  const Vector<T> bound = splat<T>(limit);
  return x > bound ? bound : x;
}

template <typename T>
CT_MLP_INLINE Vector<T> at_least(const Vector<T>& x, T limit) {
  const Vector<T> bound = splat<T>(limit);
  return x < bound ? bound : x;
}

template <typename T>
struct ExpParts {
  Vector<T> scale, rest;  // exp(x) = scale * (1 + rest), scale a power of two
};

// x within the range of exp: x = k ln 2 + r, and the Taylor polynomial of exp(r) - 1, |r| < 0.35.
template <typename T>
CT_MLP_INLINE ExpParts<T> exp_parts(const Vector<T>& x) {
  using L = Lanes<T>;
  const Vector<T> shifted = x * T(1.4426950408889634) + L::kMagic, k = shifted - L::kMagic;
  const Vector<T> r = (x - k * L::kLn2Hi) - k * L::kLn2Lo;
  Vector<T> p = splat<T>(T(kInverseFactorial[L::kExpTerms]));
#pragma GCC unroll 16
  for (int j = L::kExpTerms - 1; j >= 2; --j) p = p * r + T(kInverseFactorial[j]);
  const Integer<T> bits = ((Integer<T>)shifted + L::kBias) << L::kMantissa;
  return {(Vector<T>)bits, r + r * (p * r)};
}

template <typename T>
CT_MLP_INLINE Vector<T> exponential(const Vector<T>& x) {
  const Vector<T> within = at_least<T>(at_most<T>(x, Lanes<T>::kExpMax), Lanes<T>::kExpMin);
  const ExpParts<T> e = exp_parts<T>(within);
  return e.scale + e.scale * e.rest;
}

// n / d to the last bit or the one before, d and 1 / d normal numbers. A division of the longest
// vectors keeps the machine waiting; it has an approximation to 2^-14, which one step of Newton's
// improves to 2^-28.
#if CT_MLP_BYTES == 64 && defined(__GNUC__) && !defined(__clang__)
CT_MLP_INLINE FloatVector quotient(const FloatVector& n, const FloatVector& d) {
  const FloatVector r = __builtin_ia32_rcp14ps512_mask(d, FloatVector{}, -1), q = n * r;
  return q + r * (n - d * q);
}
#endif
template <typename V>
CT_MLP_INLINE V quotient(const V& n, const V& d) {
  return n / d;
}

// expm1(2|x|) = s (1 + e) - 1 for |x| = k log(2) / 2 + r and s = 2^k, where e = expm1(2 r), |r| <
// 0.18, is the polynomial of its degree with the least relative error, 1.3e-8.
CT_MLP_INLINE FloatVector grown_minus_one(const FloatVector& x) {
  const FloatVector a = at_most<float>(absolute<float>(x), 10.0f);
  constexpr float kMagic = 12582912.0f + 127;  // the last bits of what it is added to: k's exponent
  const FloatVector shifted = a * 2.88539008f + kMagic, k = shifted - kMagic;
  const FloatVector r = a - k * 0.34657359f;
  const FloatVector p =
      (((0.0888443032f * r + 0.267732572f) * r + 0.666675399f) * r + 1.33332342f) * r + 1.99999992f;
  const FloatVector e = (r + r) + r * (p * r);
  const FloatVector s = (FloatVector)((IntVector)shifted << 23);
  return s * e + (s - 1);
}

// By expm1(2|x|), which keeps small x exact.
template <typename T>
CT_MLP_INLINE Vector<T> hyperbolic_tangent(const Vector<T>& x) {
  if constexpr (sizeof(T) == 4) {
    const FloatVector grown = grown_minus_one(x);
    return with_sign<T>(quotient(grown, FloatVector(grown + 2)), x);
  } else {
    const ExpParts<T> e = exp_parts<T>(at_most<T>(2 * absolute<T>(x), Lanes<T>::kTanhMax));
    const Vector<T> grown = e.scale * e.rest + (e.scale - 1);
    return with_sign<T>(quotient(grown, grown + 2), x);
  }
}

template <typename T>
CT_MLP_INLINE Vector<T> logistic(const Vector<T>& x) {
  return 1 / (1 + exponential<T>(-x));
}

// log(1 + t) for t in [0, 1], as 2 artanh(t / (2 + t)).
template <typename T>
CT_MLP_INLINE Vector<T> log1p_of_fraction(const Vector<T>& t) {
  const Vector<T> s = t / (2 + t), square = s * s;
  constexpr int kTerms = Lanes<T>::kLogTerms;
  Vector<T> p = splat<T>(T(1) / (2 * kTerms - 1));
#pragma GCC unroll 20
  for (int j = kTerms - 1; j >= 1; --j) p = p * square + T(1) / (2 * j - 1);
  return 2 * s * p;
}

template <typename T>
CT_MLP_INLINE Vector<T> log_of_one_plus_exp(const Vector<T>& x) {
  return at_least<T>(x, T(0)) + log1p_of_fraction<T>(exponential<T>(-absolute<T>(x)));
}

template <typename T>
struct SinCos {
  Vector<T> sin, cos;
};

// By the C library, one lane after the other; in memory, so that it is compiled once.
template <typename T>
__attribute__((noinline)) void far_sine_and_cosine(const T* x, T* sin, T* cos) {
  for (int i = 0; i < Lanes<T>::kCount; ++i) sin[i] = std::sin(x[i]), cos[i] = std::cos(x[i]);
}

template <typename T>
CT_MLP_INLINE SinCos<T> sine_and_cosine(const Vector<T>& x) {
  using L = Lanes<T>;
  const Vector<T> shifted = x * T(0.6366197723675814) + L::kMagic, k = shifted - L::kMagic;
  const Vector<T> r = ((x - k * L::kHalfPi[0]) - k * L::kHalfPi[1]) - k * L::kHalfPi[2];
  const Vector<T> square = r * r;
  Vector<T> s = splat<T>(T(1)), c = splat<T>(T(1));
#pragma GCC unroll 16
  for (int j = L::kSinTerms; j >= 1; --j) {
    s = 1 - s * square * (T(1) / (2 * j * (2 * j + 1)));
    c = 1 - c * square * (T(1) / (2 * j * (2 * j - 1)));
  }
  s = s * r;
  const Integer<T> quadrant = (Integer<T>)shifted;
  const Integer<T> odd = -(quadrant & 1), one = Integer<T>{} + 1;
  const Integer<T> flip_sin = ((quadrant >> 1) & one) << (8 * sizeof(T) - 1);
  const Integer<T> flip_cos = (((quadrant + 1) >> 1) & one) << (8 * sizeof(T) - 1);
  const Integer<T> sin = (odd & (Integer<T>)c) | (~odd & (Integer<T>)s);
  const Integer<T> cos = (odd & (Integer<T>)s) | (~odd & (Integer<T>)c);
  SinCos<T> out{(Vector<T>)(sin ^ flip_sin), (Vector<T>)(cos ^ flip_cos)};
  const Integer<T> far = absolute<T>(x) > splat<T>(L::kSinMax);
  bool any = false;
  for (int i = 0; i < L::kCount; ++i) any |= far[i] != 0;
  if (any) [[unlikely]] {
    T all[3][L::kCount];
    store<T>(all[0], x);
    far_sine_and_cosine<T>(all[0], all[1], all[2]);
    out = {load<T>(all[1]), load<T>(all[2])};
  }
  return out;
}

template <typename T>
__attribute__((noinline)) void normal_cdf_of_lanes(T* x) {
  for (int i = 0; i < Lanes<T>::kCount; ++i)
    x[i] = T(0.5) * std::erfc(x[i] * T(-0.7071067811865475244));
}

// Distribution function of the standard normal, by the C library.
template <typename T>
CT_MLP_INLINE Vector<T> normal_cdf(const Vector<T>& x) {
  T all[Lanes<T>::kCount];
  store<T>(all, x);
  normal_cdf_of_lanes<T>(all);
  return load<T>(all);
}

template <typename T>
CT_MLP_INLINE Vector<T> normal_pdf(const Vector<T>& x) {
  return exponential<T>(T(-0.5) * x * x) * T(0.3989422804014326779);
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
