// The machine of functions.h for a block of elements, and the loops over rows of a Laplacian.
// Included once for each instruction set, in a namespace of its own that defines kBytes, the width
// of its vectors. No include guard.

// kRowBytes of elements: a row, one coefficient of a block.
template <typename T>
struct Machine {
  using Scalar = T;
  using Series = T*;
  using Math = VectorMath<T, kBytes>;
  using V = typename Math::V;
  typedef T Loose __attribute__((vector_size(kBytes), aligned(alignof(T))));

  static constexpr int kRow = kRowBytes / static_cast<int>(sizeof(T));
  static constexpr int kVectors = kRowBytes / kBytes;  // in a row
  static constexpr int kUnit = 4;                      // vectors that are worked on together
  using Unit = ct::jet::Series<T, V, kUnit>;

  static V* vectors(T* x) { return reinterpret_cast<V*>(x); }
  static const V* vectors(const T* x) { return reinterpret_cast<const V*>(x); }

  Machine(T* scratch_, int capacity_) : scratch(scratch_), capacity(capacity_) {}

  T* take() { return scratch + static_cast<int64_t>(taken++) * capacity * kRow; }
  T* at(T* x, int k) const { return x + k * kRow; }

  CT_KERNEL void product(T* out, const T* a, int na, const T* b, int nb, int order) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::product(vectors(out) + i, vectors(a) + i, na, vectors(b) + i, nb, order, kVectors);
  }

  CT_KERNEL void correlate(T* out, const T* g, int ng, const T* y, int ny, int order) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::correlate(vectors(out) + i, vectors(g) + i, ng, vectors(y) + i, ny, order, kVectors);
  }

  CT_KERNEL void times_index(T* out, const T* x, int n) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::times_index(vectors(out) + i, vectors(x) + i, n, kVectors);
  }

  CT_KERNEL void integrate(T* y, const T* slope, int ns, const T* kx, int n, int order) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::integrate(vectors(y) + i, vectors(slope) + i, ns, vectors(kx) + i, n, order, kVectors);
  }

  CT_KERNEL void riccati(T* y, T* u, T linear, T square, const T* kx, int n, int order,
                         int order_u) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::riccati(vectors(y) + i, vectors(u) + i, linear, square, vectors(kx) + i, n, order,
                    order_u, kVectors);
  }

  CT_KERNEL void pair(T* s, T* c, T sign, const T* kx, int n, int order) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::pair(vectors(s) + i, vectors(c) + i, sign, vectors(kx) + i, n, order, kVectors);
  }

  CT_KERNEL void logarithm(T* y, const T* x, int n, int order) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::logarithm(vectors(y) + i, vectors(x) + i, n, order, kVectors);
  }

  CT_KERNEL void power(T* y, T exponent, const T* x, int n, int order) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::power(vectors(y) + i, exponent, vectors(x) + i, n, order, kVectors);
  }

  CT_KERNEL void quotient(T* y, const T* a, int na, const T* b, int nb, int order) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::quotient(vectors(y) + i, vectors(a) + i, na, vectors(b) + i, nb, order, kVectors);
  }

  CT_KERNEL void combine(T* out, T constant, T alpha, const T* a, int na, T beta, const T* b,
                         int nb, int order) {
    for (int i = 0; i < kVectors; i += kUnit)
      Unit::combine(vectors(out) + i, constant, alpha, vectors(a) + i, na, beta, vectors(b) + i, nb,
                    order, kVectors);
  }

  template <typename Body>
  __attribute__((always_inline)) static void each(T* out, const T* x, const Body& body) {
    for (int i = 0; i < kVectors; ++i) vectors(out)[i] = body(vectors(x)[i]);
  }

  template <typename Body>
  __attribute__((always_inline)) static void each(T* out, T* out2, const T* x, const Body& body) {
    for (int i = 0; i < kVectors; ++i) {
      V second;
      vectors(out)[i] = body(vectors(x)[i], &second);
      vectors(out2)[i] = second;
    }
  }

  template <typename Body>
  __attribute__((always_inline)) static void scalars(T* out, const T* x, const Body& body) {
    for (int i = 0; i < kRow; ++i) out[i] = body(x[i]);
  }

  CT_KERNEL void sin_cos(T* sine, T* cosine, const T* x) {
    bool huge = false;
    for (int i = 0; i < kRow; ++i) huge |= !(std::fabs(x[i]) <= Float<T>::kHuge);
    for (int i = 0; i < kVectors; ++i) {
      V s, c;
      Math::sin_cos(vectors(x)[i], &s, &c);
      vectors(sine)[i] = s, vectors(cosine)[i] = c;
    }
    if (huge)
      for (int i = 0; i < kRow; ++i)
        if (!(std::fabs(x[i]) <= Float<T>::kHuge))
          sine[i] = std::sin(x[i]), cosine[i] = std::cos(x[i]);
  }

  CT_KERNEL void root(T* out, const T* x, bool inverse) {
    for (int i = 0; i < kRow; ++i) out[i] = std::sqrt(x[i]);
    if (inverse)
      for (int i = 0; i < kRow; ++i) out[i] = T(1) / out[i];
  }

  CT_KERNEL void values(Value value, T param, T* out, T* out2, const T* x) {
    switch (value) {
      case Value::kSoftplus:
        return each(out, x, [](V v) CT_INLINED { return Math::softplus(v); });
      case Value::kExp:
        return each(out, x, [](V v) CT_INLINED { return Math::exp(v); });
      case Value::kLog:
        return each(out, x, [](V v) CT_INLINED { return Math::log(v); });
      case Value::kExpm1:
        return each(out, x, [](V v) CT_INLINED { return Math::expm1(v); });
      case Value::kLog1p:
        return each(out, x, [](V v) CT_INLINED { return Math::log1p(v); });
      case Value::kSqrt:
        return root(out, x, false);
      case Value::kRsqrt:
        return root(out, x, true);
      case Value::kReciprocal:
        return each(out, x, [](V v) CT_INLINED { return T(1) / v; });
      case Value::kErf:
        return each(out, x, [](V v) CT_INLINED { return Math::erf(v); });
      case Value::kNormalCdf:
        return each(out, x, [](V v) CT_INLINED { return Math::normal_cdf(v); });
      case Value::kTanh:
        return each(out, out2, x, [](V v, V* u) CT_INLINED { return Math::tanh(v, u); });
      case Value::kSigmoid:
        return each(out, out2, x, [](V v, V* u) CT_INLINED { return Math::sigmoid(v, u); });
      case Value::kSinCos:
        return sin_cos(out, out2, x);
      default:
        for (int i = 0; i < kRow; ++i) scalar_values(value, param, out + i, out2 + i, x[i]);
    }
  }

  // One stretch of a row of a Jacobian: out = first x, and the sum of squares gains x^2. Either
  // may be missing.
  CT_KERNEL void scale_row(T* out, T* squares, const T* x, const T* first, int64_t n) {
    if (out != nullptr && squares != nullptr) {
      for (int64_t i = 0; i < n; ++i) squares[i] += x[i] * x[i], out[i] = x[i] * first[i];
    } else if (out != nullptr) {
      for (int64_t i = 0; i < n; ++i) out[i] = x[i] * first[i];
    } else {
      for (int64_t i = 0; i < n; ++i) squares[i] += x[i] * x[i];
    }
  }

  // Its backward: products += g x, out = first g + bend x; g may be missing.
  CT_KERNEL void scale_row_backward(T* out, T* products, const T* x, const T* g, const T* first,
                                    const T* bend, int64_t n) {
    if (g == nullptr) {
      for (int64_t i = 0; i < n; ++i) out[i] = bend[i] * x[i];
    } else {
      for (int64_t i = 0; i < n; ++i)
        products[i] += g[i] * x[i], out[i] = first[i] * g[i] + bend[i] * x[i];
    }
  }

  // Where the row is shared: products += g x, out += first g.
  CT_KERNEL void share_row_backward(T* out, T* products, const T* x, const T* g, const T* first,
                                    int64_t n) {
    for (int64_t i = 0; i < n; ++i) products[i] += g[i] * x[i], out[i] += first[i] * g[i];
  }

  T* scratch;
  int capacity;
  int taken = 0;
};
