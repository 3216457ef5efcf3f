// Elementwise functions of Taylor series, as programs of the arithmetic in arith.h.
//
// A machine runs them: on the CPU on a block of elements, on the GPU on one. It gives the value of
// a function at the first coefficients, the arithmetic, and memory for intermediate series.
#pragma once

#include "../core/hd.h"

// Programs are called, not inlined into every kernel.
#if defined(__CUDACC__)
#define CT_PROGRAM static __device__ __noinline__
#else
#define CT_PROGRAM static
#endif

namespace ct::jet {

// In the order of UNARY in ctorch/ops/_jet_reference.py.
enum class Op : int {
  kTanh,
  kSigmoid,
  kSoftplus,
  kExp,
  kLog,
  kExpm1,
  kLog1p,
  kSin,
  kCos,
  kSqrt,
  kRsqrt,
  kReciprocal,
  kPow,
  kErf,
  kGelu,
  kGeluTanh,
  kSilu,
  kSinh,
  kCosh,
  kTan,
  kAtan,
  kAsin,
  kAcos,
  kAsinh,
  kAcosh,
  kAtanh,
  kLogsigmoid,
  kMish,
};
constexpr int kOps = 28;

// What a machine can take the value of. Those from kTanh on give a second one: the derivative, or
// the cosine of a sine.
enum class Value : int {
  kSoftplus,
  kExp,
  kLog,
  kExpm1,
  kLog1p,
  kSqrt,
  kRsqrt,
  kReciprocal,
  kPower,
  kErf,
  kNormalCdf,
  kAtan,
  kAsin,
  kAcos,
  kAsinh,
  kAcosh,
  kAtanh,
  kTanh,
  kSigmoid,
  kTan,
  kSinCos,
  kSinhCosh,
};

constexpr int kSeries = 14;        // that a program keeps at the same time, at most
constexpr int kMostProducts = 64;  // whole exponents up to here are taken by products

template <typename Machine>
struct Functions {
  using T = typename Machine::Scalar;
  using S = typename Machine::Series;

  // What a program took is given back at the end of its scope.
  struct Scope {
    CT_HD explicit Scope(Machine& m) : machine(m), taken(m.taken) {}
    CT_HD ~Scope() { machine.taken = taken; }
    Machine& machine;
    int taken;
  };

  // The level-th derivative of a function at the series x of n terms, up to the order.
  CT_PROGRAM void evaluate(Machine& m, Op op, int level, T param, S out, S x, int n, int order) {
    if (level > 1)
      compose(m, op, level, param, out, x, n, order);
    else
      direct(m, op, level, param, out, x, n, order);
  }

 private:
  // For the function itself and its first derivative.
  CT_PROGRAM void direct(Machine& m, Op op, int level, T param, S out, S x, int n, int order) {
    const Scope scope(m);
    const S kx = m.take();
    m.times_index(kx, x, n);
    switch (op) {
      case Op::kTanh:
        return riccati(m, Value::kTanh, level, 0, -1, out, x, kx, n, order);
      case Op::kSigmoid:
        return riccati(m, Value::kSigmoid, level, 1, -1, out, x, kx, n, order);
      case Op::kTan:
        return riccati(m, Value::kTan, level, 0, 1, out, x, kx, n, order);
      case Op::kSoftplus:
        return softplus(m, level, param, 1, out, x, kx, n, order);
      case Op::kLogsigmoid:
        return softplus(m, level, -1, -1, out, x, kx, n, order);
      case Op::kSilu:
        return silu(m, level, out, x, kx, n, order);
      case Op::kMish:
        return mish(m, level, out, x, kx, n, order);
      case Op::kExp:
        return exponential(m, Value::kExp, out, x, kx, n, order);
      case Op::kExpm1:
        return expm1(m, level, out, x, kx, n, order);
      case Op::kLog:
        return level ? power(m, -1, 1, out, x, n, order)
                     : logarithm(m, Value::kLog, out, x, x, n, order);
      case Op::kLog1p:
        return log1p(m, level, out, x, n, order);
      case Op::kSin:
        return pair(m, Value::kSinCos, level == 1, 1, -1, out, x, kx, n, order);
      case Op::kCos:
        return pair(m, Value::kSinCos, level == 0, level == 1 ? -1 : 1, -1, out, x, kx, n, order);
      case Op::kSinh:
        return pair(m, Value::kSinhCosh, level == 1, 1, 1, out, x, kx, n, order);
      case Op::kCosh:
        return pair(m, Value::kSinhCosh, level == 0, 1, 1, out, x, kx, n, order);
      case Op::kSqrt:
        return level ? power(m, T(-0.5), T(0.5), out, x, n, order)
                     : power(m, T(0.5), 1, out, x, n, order);
      case Op::kRsqrt:
        return level ? power(m, T(-1.5), T(-0.5), out, x, n, order)
                     : power(m, T(-0.5), 1, out, x, n, order);
      case Op::kReciprocal:
        return level ? power(m, -2, -1, out, x, n, order) : power(m, -1, 1, out, x, n, order);
      case Op::kPow:
        return level ? power(m, param - 1, param, out, x, n, order)
                     : power(m, param, 1, out, x, n, order);
      case Op::kErf:
        return erf(m, level, out, x, kx, n, order);
      case Op::kGelu:
        return gelu(m, level, out, x, kx, n, order);
      case Op::kGeluTanh:
        return gelu_tanh(m, level, out, x, n, order);
      case Op::kAtan:
        return inverse(m, Value::kAtan, level, 1, 1, 1, -1, out, x, kx, n, order);
      case Op::kAsin:
        return inverse(m, Value::kAsin, level, 1, -1, 1, T(-0.5), out, x, kx, n, order);
      case Op::kAcos:
        return inverse(m, Value::kAcos, level, -1, -1, 1, T(-0.5), out, x, kx, n, order);
      case Op::kAsinh:
        return inverse(m, Value::kAsinh, level, 1, 1, 1, T(-0.5), out, x, kx, n, order);
      case Op::kAcosh:
        return inverse(m, Value::kAcosh, level, 1, 1, -1, T(-0.5), out, x, kx, n, order);
      case Op::kAtanh:
        return inverse(m, Value::kAtanh, level, 1, -1, 1, -1, out, x, kx, n, order);
    }
  }

  CT_PROGRAM void riccati(Machine& m, Value value, int level, T linear, T square, S out, S x, S kx,
                          int n, int order) {
    const Scope scope(m);
    const S other = m.take();
    const S y = level ? other : out, slope = level ? out : other;
    m.values(value, 0, y, slope, x);
    m.riccati(y, slope, linear, square, kx, n, order, level ? order : order - 1);
  }

  // sigmoid(x) and, up to order_slope, its derivative
  CT_PROGRAM void logistic(Machine& m, S y, S slope, S x, S kx, int n, int order, int order_slope) {
    m.values(Value::kSigmoid, 0, y, slope, x);
    m.riccati(y, slope, 1, -1, kx, n, order, order_slope);
  }

  // log(1 + exp(beta x)) / beta and, for beta = -1 and sign = -1, the logarithm of sigmoid(x):
  // its derivative is sigmoid(-x) there as well.
  CT_PROGRAM void softplus(Machine& m, int level, T beta, T sign, S out, S x, S kx, int n,
                           int order) {
    const Scope scope(m);
    const S inner = m.take(), kinner = m.take(), slope = m.take();
    m.combine(inner, 0, beta, x, n, 0, x, 0, n - 1);
    m.combine(kinner, 0, beta, kx, n, 0, x, 0, n - 1);
    if (level) return logistic(m, out, slope, inner, kinner, n, order, order - 1);
    const S y = m.take();
    logistic(m, y, slope, inner, kinner, n, order, order - 1);
    m.values(Value::kSoftplus, 0, out, out, inner);
    m.combine(out, 0, sign < 0 ? T(-1) : T(1) / beta, out, 1, 0, x, 0, 0);
    m.integrate(out, y, order + 1, kx, n, order);
  }

  CT_PROGRAM void silu(Machine& m, int level, S out, S x, S kx, int n, int order) {
    const Scope scope(m);
    const S y = m.take(), slope = m.take();
    logistic(m, y, slope, x, kx, n, order, level ? order : order - 1);
    if (level == 0) return m.product(out, x, n, y, order + 1, order);
    m.product(out, x, n, slope, order + 1, order);
    m.combine(out, 0, 1, out, order + 1, 1, y, order + 1, order);
  }

  CT_PROGRAM void mish(Machine& m, int level, S out, S x, S kx, int n, int order) {
    const Scope scope(m);
    const int all = order + 1;
    const S y = m.take(), slope = m.take(), soft = m.take(), ksoft = m.take();
    logistic(m, y, slope, x, kx, n, order, order - 1);
    m.values(Value::kSoftplus, 0, soft, soft, x);
    m.integrate(soft, y, all, kx, n, order);
    m.times_index(ksoft, soft, all);
    const S outer = m.take(), outer_slope = slope;
    m.values(Value::kTanh, 0, outer, outer_slope, soft);
    m.riccati(outer, outer_slope, 0, -1, ksoft, all, order, order);
    if (level == 0) return m.product(out, x, n, outer, all, order);
    m.product(soft, outer_slope, all, y, all, order);
    m.product(out, x, n, soft, all, order);
    m.combine(out, 0, 1, out, all, 1, outer, all, order);
  }

  CT_PROGRAM void exponential(Machine& m, Value value, S out, S x, S kx, int n, int order) {
    m.values(value, 0, out, out, x);
    m.integrate(out, out, order + 1, kx, n, order);
  }

  CT_PROGRAM void expm1(Machine& m, int level, S out, S x, S kx, int n, int order) {
    exponential(m, Value::kExp, out, x, kx, n, order);
    if (level == 0) m.values(Value::kExpm1, 0, out, out, x);
  }

  CT_PROGRAM void logarithm(Machine& m, Value value, S out, S argument, S x, int n, int order) {
    m.values(value, 0, out, out, argument);
    m.logarithm(out, x, n, order);
  }

  CT_PROGRAM void log1p(Machine& m, int level, S out, S x, int n, int order) {
    const Scope scope(m);
    const S more = m.take();
    m.combine(more, 1, 1, x, n, 0, x, 0, n - 1);
    if (level) return power(m, -1, 1, out, more, n, order);
    logarithm(m, Value::kLog1p, out, x, more, n, order);
  }

  CT_PROGRAM void pair(Machine& m, Value value, bool second, T factor, T sign, S out, S x, S kx,
                       int n, int order) {
    const Scope scope(m);
    const S other = m.take();
    const S s = second ? other : out, c = second ? out : other;
    m.values(value, 0, s, c, x);
    m.pair(s, c, sign, kx, n, order);
    if (factor != T(1)) m.combine(out, 0, factor, out, order + 1, 0, x, 0, order);
  }

  // factor x^exponent
  CT_PROGRAM void power(Machine& m, T exponent, T factor, S out, S x, int n, int order) {
    if (factor == T(0)) return m.combine(out, 0, 0, x, 0, 0, x, 0, order);
    const bool whole =
        exponent >= T(0) && exponent <= T(kMostProducts) && exponent == T(int(exponent));
    if (whole) {
      whole_power(m, int(exponent), out, x, n, order);
    } else {
      const Value value = exponent == T(0.5)    ? Value::kSqrt
                          : exponent == T(-0.5) ? Value::kRsqrt
                          : exponent == T(-1)   ? Value::kReciprocal
                                                : Value::kPower;
      m.values(value, exponent, out, out, x);
      m.power(out, exponent, x, n, order);
    }
    if (factor != T(1)) m.combine(out, 0, factor, out, order + 1, 0, x, 0, order);
  }

  // By squares and products, from the highest bit down.
  CT_PROGRAM void whole_power(Machine& m, int exponent, S out, S x, int n, int order) {
    if (exponent == 0) return m.combine(out, 1, 0, x, 0, 0, x, 0, order);
    const Scope scope(m);
    const S space = m.take();
    m.combine(out, 0, 1, x, n, 0, x, 0, order);
    int bit = 1;
    while (bit <= exponent / 2) bit *= 2;
    for (bit /= 2; bit > 0; bit /= 2) {
      m.product(space, out, order + 1, out, order + 1, order);
      if (exponent & bit)
        m.product(out, space, order + 1, x, n, order);
      else
        m.combine(out, 0, 1, space, order + 1, 0, x, 0, order);
    }
  }

  // factor exp(scale x^2), with the square
  CT_PROGRAM void density(Machine& m, T factor, T scale, S out, S square, S x, int n, int order) {
    const Scope scope(m);
    const S inner = m.take(), kinner = m.take();
    m.product(square, x, n, x, n, order);
    m.combine(inner, 0, scale, square, order + 1, 0, x, 0, order);
    m.times_index(kinner, inner, order + 1);
    exponential(m, Value::kExp, out, inner, kinner, order + 1, order);
    m.combine(out, 0, factor, out, order + 1, 0, x, 0, order);
  }

  CT_PROGRAM void erf(Machine& m, int level, S out, S x, S kx, int n, int order) {
    const Scope scope(m);
    const S square = m.take();
    const T factor = T(1.12837916709551257390);  // 2 / sqrt(pi)
    if (level) return density(m, factor, -1, out, square, x, n, order);
    const S slope = m.take();
    density(m, factor, -1, slope, square, x, n, order);
    m.values(Value::kErf, 0, out, out, x);
    m.integrate(out, slope, order + 1, kx, n, order);
  }

  CT_PROGRAM void gelu(Machine& m, int level, S out, S x, S kx, int n, int order) {
    const Scope scope(m);
    const int all = order + 1;
    const S square = m.take(), slope = m.take(), below = m.take();
    density(m, T(0.398942280401432677940), T(-0.5), slope, square, x, n, order);  // 1 / sqrt(2 pi)
    m.values(Value::kNormalCdf, 0, below, below, x);
    m.integrate(below, slope, all, kx, n, order);
    if (level == 0) return m.product(out, x, n, below, all, order);
    m.product(out, x, n, slope, all, order);
    m.combine(out, 0, 1, out, all, 1, below, all, order);
  }

  // x sigmoid(2 u) with u = sqrt(2 / pi) (x + 0.044715 x^3)
  CT_PROGRAM void gelu_tanh(Machine& m, int level, S out, S x, int n, int order) {
    const Scope scope(m);
    const int all = order + 1;
    const T twice = T(1.59576912160573071176), cube = T(0.044715);  // 2 sqrt(2 / pi)
    const S square = m.take(), inner = m.take(), kinner = m.take(), y = m.take(), slope = m.take();
    m.product(square, x, n, x, n, order);
    m.product(inner, square, all, x, n, order);
    m.combine(inner, 0, twice * cube, inner, all, twice, x, n, order);
    m.times_index(kinner, inner, all);
    logistic(m, y, slope, inner, kinner, all, order, level ? order : order - 1);
    if (level == 0) return m.product(out, x, n, y, all, order);
    m.combine(square, twice, 3 * twice * cube, square, all, 0, x, 0, order);
    m.product(inner, slope, all, square, all, order);
    m.product(out, x, n, inner, all, order);
    m.combine(out, 0, 1, out, all, 1, y, all, order);
  }

  // A function whose derivative is sign (constant + square x^2)^exponent
  CT_PROGRAM void inverse(Machine& m, Value value, int level, T sign, T square, T constant,
                          T exponent, S out, S x, S kx, int n, int order) {
    const Scope scope(m);
    const S base = m.take();
    m.product(base, x, n, x, n, order);
    m.combine(base, constant, square, base, order + 1, 0, x, 0, order);
    if (level) return power(m, exponent, sign, out, base, order + 1, order);
    const S slope = m.take();
    power(m, exponent, sign, slope, base, order + 1, order);
    m.values(value, 0, out, out, x);
    m.integrate(out, slope, order + 1, kx, n, order);
  }

  // The function's own series at x_0, differentiated as a polynomial and put around x - x_0.
  CT_PROGRAM void compose(Machine& m, Op op, int level, T param, S out, S x, int n, int order) {
    const Scope scope(m);
    const S line = m.take(), own = m.take(), inner = m.take(), space = m.take();
    m.combine(line, 0, 1, x, 1, 0, x, 0, 0);
    m.combine(m.at(line, 1), 1, 0, x, 0, 0, x, 0, 0);
    direct(m, op, 0, param, own, line, 2, order + level);
    m.combine(inner, 0, 1, x, n, 0, x, 0, n - 1);
    m.combine(inner, 0, 0, x, 0, 0, x, 0, 0);
    m.combine(out, 0, factor_of(order, level), m.at(own, order + level), 1, 0, x, 0, 0);
    for (int k = order - 1, known = 1; k >= 0; --k, ++known) {
      m.product(space, out, known, inner, n, known);
      m.combine(out, 0, 1, space, known + 1, 0, x, 0, known);
      m.combine(out, 0, 1, out, 1, factor_of(k, level), m.at(own, k + level), 1, 0);
    }
  }

  // (k + level)! / k!
  CT_PROGRAM T factor_of(int k, int level) {
    T factor = 1;
    for (int i = 1; i <= level; ++i) factor *= T(k + i);
    return factor;
  }
};

}  // namespace ct::jet
