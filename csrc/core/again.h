// A compiled solve that is called again, from Python to the kernel and back in one function.
#pragma once

#include <Python.h>

namespace ct::core {

// solve_again(call, y0, t, out, *shared): the five or more of them addresses. Returns evaluations,
// accepted and rejected steps; or None where that is not to be had here: objects have changed, the
// times are no times, the solve failed. `call` is the address of an Again (again.cpp), which
// ctorch/ode/native_again.py packs.
PyObject* solve_again(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace ct::core
