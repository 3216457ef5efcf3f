// All loops for one instruction set; part of levels.h.
// clang-format off: each builds on those before
#include "vector.h"
#include "arith.h"
#include "jets.h"
#include "steps.h"
#include "rows.h"
#include "traced.h"
#include "products.h"
// clang-format on

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

template <typename T>
Loops<T> loops() {
  return {&jet_forward<T>,
          &jet_derivative<T>,
          &series,
          &step<T>,
          &step_derivative<T>,
          &slopes<T>,
          &rows<T>,
          &rows_derivative<T>,
          &traced<T>,
          &traced_derivative<T>,
          &padded<T>,
          &pack<T>,
          &product<T>};
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
