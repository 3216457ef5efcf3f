// From a run-time dtype to a compile-time type, as functions: a macro would choke on the commas of
// a kernel launch.
//
//   dispatch_floating(x.scalar_type(), "name", [&](auto zero) {
//     using scalar_t = decltype(zero);
//     ...
//   });
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <utility>

namespace ct {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;

// The type in which values stored as T are accumulated.
template <typename T>
struct Accumulator {
  using type = T;
};
template <>
struct Accumulator<Half> {
  using type = float;
};
template <>
struct Accumulator<BFloat16> {
  using type = float;
};
template <typename T>
using accumulator_t = typename Accumulator<T>::type;

// Calls body(scalar_t{}) for float32 and float64; any other dtype is an error that names the op.
template <typename Body>
void dispatch_floating(ScalarType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return std::forward<Body>(body)(float{});
    case ScalarType::Double:
      return std::forward<Body>(body)(double{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32 or float64, got ",
                      torch::headeronly::toString(dtype));
  }
}

// The same with float16 and bfloat16 as storage; compute in accumulator_t<scalar_t>.
template <typename Body>
void dispatch_floating_and_reduced(ScalarType dtype, const char* op, Body&& body) {
  switch (dtype) {
    case ScalarType::Float:
      return std::forward<Body>(body)(float{});
    case ScalarType::Double:
      return std::forward<Body>(body)(double{});
    case ScalarType::Half:
      return std::forward<Body>(body)(Half{});
    case ScalarType::BFloat16:
      return std::forward<Body>(body)(BFloat16{});
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float32, float64, float16 or bfloat16, got ",
                      torch::headeronly::toString(dtype));
  }
}

}  // namespace ct
