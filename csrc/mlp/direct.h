// A kernel of a plain MLP by address: for a small net the way through the dispatcher, with a handle
// for each parameter, costs more than its activations. The arithmetic is the operator's.
//
// The caller (ctorch/ops/_mlp_direct.py, through the Python module) answers for the addresses:
// dense memory on the CPU, of float64 where `wide`, else float32. There is a hidden layer, no size
// is zero.
#pragma once

#include <cstdint>
#include <vector>

namespace ct::mlp::direct {

// d^order/ds^order f(x + s v); x and v [batch, inputs], out [batch, outputs]. `form` holds the
// sizes of inputs, hidden layers and outputs, then the activations (tasks.h) of the hidden layers,
// `params` a number for each of these. `parameters` are weight and bias of one layer after the
// other; a bias may be null.
void derivative(void* out, const void* x, const void* v, int64_t batch, int64_t order, bool wide,
                const int64_t* form, const double* params, const std::vector<void*>& parameters);

}  // namespace ct::mlp::direct
