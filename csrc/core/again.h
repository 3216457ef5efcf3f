// Calls that differ from one before by nothing but numbers.
#pragma once

#include <Python.h>

#include <cstdint>

namespace ct::core {

// Whether objects are what they were when their words were written (ctorch/_objects.py).
int64_t unchanged(const Py_ssize_t* objects);

// A compiled solve, from Python to the kernel and back in one function:
// solve_again(call, y0, t, out, *shared): the five or more of them addresses. Returns evaluations,
// accepted and rejected steps; or None where that is not to be had here: objects have changed, the
// times are no times, the solve failed. `call` is the address of an Again (again.cpp), which
// ctorch/ode/native_again.py packs.
PyObject* solve_again(PyObject* module, PyObject* const* args, Py_ssize_t count);

}  // namespace ct::core
