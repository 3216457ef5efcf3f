// What the loops of levels.h work on, and the tables through which they are called.
#pragma once

#include <cstdint>

// A loop over k = first ... last, written out where the series of type S have an order that is
// known to the compiler, and only there: it would write out others too, in many copies of a body.
#define CT_MLP_ORDERS(S, k, first, last, ...)                       \
  if constexpr (S::kUnrolled) {                                     \
    CT_MLP_EACH for (int k = first; k <= last; ++k) { __VA_ARGS__ } \
  } else {                                                          \
    for (int k = first; k <= last; ++k) {                           \
      __VA_ARGS__                                                   \
    }                                                               \
  }

namespace ct::mlp {

constexpr int kMaxOrder = 24;  // of the kernels' jets; above, the reference serves

enum class Activation : int {  // in the order of ACTIVATIONS in ctorch/ops/_mlp_reference.py
  kIdentity,
  kRelu,
  kTanh,
  kSigmoid,
  kSoftplus,
  kExp,
  kSin,
  kSilu,
  kGelu,
  kGeluTanh,
  kCount
};

// Calls Family<Op>::call for the activation of that number. No lambda: it would not be compiled for
// the instruction set of its surroundings.
#define CT_MLP_BY_ACTIVATION(activation, Family, call) \
  switch (activation) {                                \
    case Activation::kIdentity:                        \
      return Family<Identity>::call;                   \
    case Activation::kRelu:                            \
      return Family<Relu>::call;                       \
    case Activation::kTanh:                            \
      return Family<Tanh>::call;                       \
    case Activation::kSigmoid:                         \
      return Family<Sigmoid>::call;                    \
    case Activation::kSoftplus:                        \
      return Family<Softplus>::call;                   \
    case Activation::kExp:                             \
      return Family<Exp>::call;                        \
    case Activation::kSin:                             \
      return Family<Sin>::call;                        \
    case Activation::kSilu:                            \
      return Family<Silu>::call;                       \
    case Activation::kGelu:                            \
      return Family<Gelu>::call;                       \
    default:                                           \
      return Family<GeluTanh>::call;                   \
  }

enum : int { kZ = 0, kY = 1, kU = 2, kBeside = 3, kMaxSeries = 9 };  // see arith.h

constexpr double kInverseFactorial[] = {1.0,
                                        1.0,
                                        1.0 / 2,
                                        1.0 / 6,
                                        1.0 / 24,
                                        1.0 / 120,
                                        1.0 / 720,
                                        1.0 / 5040,
                                        1.0 / 40320,
                                        1.0 / 362880,
                                        1.0 / 3628800,
                                        1.0 / 39916800,
                                        1.0 / 479001600,
                                        1.0 / 6227020800};

// Planes of one coefficient each, `stride` apart.
template <typename T>
struct Planes {
  T* data = nullptr;
  int64_t stride = 0;

  T* operator[](int64_t k) const { return data + k * stride; }
};

// An activation of jets, all orders at a time.
template <typename T>
struct JetTask {
  Activation activation;
  T param;
  int order, degree;
  bool last;          // whether of y the coefficient of that order is wanted alone
  int64_t count;      // elements of a plane
  Planes<const T> z;  // coefficients 0 ... degree; the higher ones are zero
  Planes<T> y;        // out: all coefficients, or the last
  // of the derivative only
  Planes<const T> y_bar;  // in: cotangents of all coefficients, or of the last
  Planes<T> z_bar;        // out: those of coefficients 0 ... degree
};

// One order of an activation whose lower orders are in memory: series i (numbered as in
// arith.h) has its coefficients in planes, `plane` apart, from series[i] on.
template <typename T>
struct StepTask {
  Activation activation;
  T param;
  int order;
  int64_t count, plane;
  T* const* series;
};

// Its derivative, from the highest order down: z_bar_k = sum_(m >= k) y_bar_m u_(m-k), m < orders.
template <typename T>
struct StepDerivativeTask {
  int order, orders;
  int64_t count, plane;
  const T *u, *y_bar;
  T* z_bar;
};

// An activation and its slopes at `count` elements.
template <typename T>
struct SlopesTask {
  Activation activation;
  T param;
  int64_t count;
  const T* z;
  T *value, *first, *second, *third;  // out; third may be null
};

// A matrix of tangents for each sample: row i of sample s begins at data + i * row + s * sample.
template <typename T>
struct Rows {
  T* data = nullptr;
  int64_t row = 0, sample = 0;

  explicit operator bool() const { return data != nullptr; }
};

// Tangents and the sum of second derivatives through an activation, for each sample with q = sum_i
// in_i^2:   out_i = f' in_i,   lap_out = f'' q + f' lap,   trace = sum_i f' in_i . close_i
template <typename T>
struct RowsTask {
  int64_t rows, samples, n;
  const T *first, *second, *third;  // slopes [samples, n]
  Rows<const T> in;
  Rows<T> out;     // may be null
  bool bend;       // whether there is a sum of second derivatives
  const T* lap;    // [samples, n]; null: zero
  T* lap_out;      // [samples, n], if bend
  const T* close;  // [rows, n]; null: no trace
  T* trace;        // [samples], if close
};

// Its derivative: cotangents of what is computed come in, those of what it is computed from go out.
template <typename T>
struct RowsDerivativeTask {
  RowsTask<T> task;       // what it computes again: out (may be null), lap_out
  const T* value_bar;     // [samples, n]
  Rows<const T> out_bar;  // may be null: zero
  const T* lap_bar;       // [samples, n], if bend
  const T* trace_bar;     // [samples], if close
  T* z_bar;               // out: [samples, n]
  Rows<T> in_bar;         // out; added to where sample is 0, that is, where `in` is shared
  T* lap_in_bar;          // out: [samples, n]; null: not wanted
  T* close_bar;           // added to: [rows, n], if close
};

// An activation, and the trace of its slopes with numbers beside it: sum_c f'(z_c) beside_c.
template <typename T>
struct TracedTask {
  Activation activation;
  T param;
  int64_t samples, n;
  T* z;              // [samples, n]
  const T* bias;     // [n], first added to z; null: nothing is
  T *value, *slope;  // out: [samples, n]; slope may be null
  const T* beside;   // [samples, n]; null: no trace
  T* trace;          // out: [samples]; null: no trace
  // Of the derivative only, which puts out scale f'(z), and to which z has its bias already:
  const T* scale;      // [samples]: the trace's cotangents; null: ones
  const T* value_bar;  // [samples, n]; null: zero
  T* z_bar;            // out: f' value_bar + scale f'' beside
};

// A matrix to be laid out in panels of columns, see products.h.
template <typename T>
struct PackTask {
  const T* from;  // [columns, terms] if transposed, else [terms, columns]
  bool transposed;
  int64_t terms, columns;
  T* to;
};

// How many terms of a sum are added up by themselves before they meet those before them. The
// rounding errors of n terms one after the other grow with n, those of chains with sqrt(chain n +
// n^2 / chain). A chain costs next to nothing; short ones a tenth of a product.
constexpr int64_t kChain = 64, kShortChain = 8;

// out = alpha a b, or that is added to out; b is in panels. A bias is for the first rows alone.
template <typename T>
struct ProductTask {
  int64_t rows, terms, columns;
  const T* a;  // [rows, terms]
  const T* panels;
  T* out;  // [rows, columns]
  T alpha;
  bool add;
  const T* bias;   // [columns], or null
  int64_t biased;  // rows that it is added to
  int64_t chain;
};

// The loops for one instruction set.
template <typename T>
struct Loops {
  void (*jet)(const JetTask<T>&);
  void (*jet_derivative)(const JetTask<T>&);
  int (*series)(Activation);  // how many an activation has
  void (*step)(const StepTask<T>&);
  void (*step_derivative)(const StepDerivativeTask<T>&);
  void (*slopes)(const SlopesTask<T>&);
  void (*rows)(const RowsTask<T>&);
  void (*rows_derivative)(const RowsDerivativeTask<T>&);
  void (*traced)(const TracedTask<T>&);
  void (*traced_derivative)(const TracedTask<T>&);
  int64_t (*padded)(int64_t);  // columns of a matrix in panels
  void (*pack)(const PackTask<T>&);
  void (*product)(const ProductTask<T>&);
};

}  // namespace ct::mlp
