// What the loops of levels.h work on, and the tables through which they are called.
#pragma once

#include <cstdint>

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

enum : int { kZ = 0, kY = 1, kU = 2, kBeside = 3, kMaxSeries = 9 };  // see activations.h

constexpr double kInverseFactorial[] = {
    1.0,          1.0,          1.0 / 2,        1.0 / 6,         1.0 / 24,
    1.0 / 120,    1.0 / 720,    1.0 / 5040,     1.0 / 40320,     1.0 / 362880,
    1.0 / 3628800, 1.0 / 39916800, 1.0 / 479001600, 1.0 / 6227020800};

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
  int order, degree, first;
  int64_t count;       // elements of a plane
  Planes<const T> z;   // coefficients 0 ... degree; the higher ones are zero
  Planes<T> y;         // out: coefficients first ... order
  // of the derivative only
  Planes<const T> y_bar;  // in: cotangents of coefficients first ... order
  Planes<T> z_bar;        // out: those of coefficients 0 ... degree
};

// The loops for one instruction set.
template <typename T>
struct Loops {
  void (*jet)(const JetTask<T>&);
  void (*jet_derivative)(const JetTask<T>&);
};

}  // namespace ct::mlp
