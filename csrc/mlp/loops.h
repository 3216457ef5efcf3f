// All loops for one instruction set; part of levels.h.
#include "vector.h"
// (each builds on those before)
#include "activations.h"
// ...
#include "jets.h"
// ...
#include "steps.h"
// ...
#include "rows.h"

namespace ct::mlp::CT_MLP_LEVEL {
namespace {

template <typename T>
Loops<T> loops() {
  return {&jet_forward<T>, &jet_derivative<T>, &series, &step<T>,
          &step_derivative<T>, &slopes<T>, &rows<T>, &rows_derivative<T>};
}

}  // namespace
}  // namespace ct::mlp::CT_MLP_LEVEL
