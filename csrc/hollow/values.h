// Vectors, and what mlp/arith.h asks of them, by the functions of jet/vector_math.h. Part of
// levels.h: no include guard, and no includes of its own.

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

template <typename T>
using Math = jet::VectorMath<T, CT_MLP_BYTES>;
template <typename T>
using Vector = typename Math<T>::V;
template <typename T>
struct Lanes {
  static constexpr int kCount = CT_MLP_BYTES / sizeof(T);
};
template <typename T>
struct SinCos {
  Vector<T> sin, cos;
};

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

template <typename T>
CT_MLP_INLINE Vector<T> exponential(const Vector<T>& x) {
  return Math<T>::exp(x);
}

template <typename T>
CT_MLP_INLINE Vector<T> hyperbolic_tangent(const Vector<T>& x) {
  Vector<T> slope;
  return Math<T>::tanh(x, &slope);
}

template <typename T>
CT_MLP_INLINE Vector<T> logistic(const Vector<T>& x) {
  Vector<T> slope;
  return Math<T>::sigmoid(x, &slope);
}

template <typename T>
CT_MLP_INLINE Vector<T> log_of_one_plus_exp(const Vector<T>& x) {
  return Math<T>::softplus(x);
}

template <typename T>
CT_MLP_INLINE SinCos<T> sine_and_cosine(const Vector<T>& x) {
  SinCos<T> out;
  Math<T>::sin_cos(x, &out.sin, &out.cos);
  const auto near = Math<T>::absolute(x) <= splat<T>(jet::Float<T>::kHuge);
  bool all = true;
  for (int i = 0; i < Lanes<T>::kCount; ++i) all &= near[i] != 0;
  if (!all)
    for (int i = 0; i < Lanes<T>::kCount; ++i)
      out.sin[i] = std::sin(x[i]), out.cos[i] = std::cos(x[i]);
  return out;
}

template <typename T>
CT_MLP_INLINE Vector<T> normal_cdf(const Vector<T>& x) {
  return Math<T>::normal_cdf(x);
}

template <typename T>
CT_MLP_INLINE Vector<T> normal_pdf(const Vector<T>& x) {
  return Math<T>::gaussian(x, T(0.5)) * T(0.3989422804014326779);
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
