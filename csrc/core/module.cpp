// The Python module ctorch._C. Importing it loads the library, and loading registers the kernels.
// Beside the operators it has a few functions that take plain addresses and numbers, for loops in
// which a call through the dispatcher costs more than the work; ctorch/ops/_direct.py calls them,
// and ctorch/ode/native_again.py the last.
#include <Python.h>

#include <cstddef>
#include <exception>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "../mlp/direct.h"
#include "../runge_kutta/direct.h"
#include "again.h"

namespace {

template <typename T>
T from_python(PyObject* x) {
  if constexpr (std::is_pointer_v<T>) {
    return static_cast<T>(PyLong_AsVoidPtr(x));
  } else if constexpr (std::is_floating_point_v<T>) {
    return static_cast<T>(PyFloat_AsDouble(x));
  } else {
    return static_cast<T>(PyLong_AsLongLong(x));
  }
}

using Addresses = std::vector<void*>;

// While it lives, other threads of Python may run.
class Released {
 public:
  Released() : state_(PyEval_SaveThread()) {}
  ~Released() { PyEval_RestoreThread(state_); }
  Released(const Released&) = delete;
  Released& operator=(const Released&) = delete;

 private:
  PyThreadState* state_;
};
struct Kept {};

// A function of addresses and numbers as Python calls it: with exactly its arguments, in order; if
// the last of them are addresses, with any number of these. One that may take long is `Released`.
template <auto function, typename Lock = Kept>
struct Called;
template <typename Result, typename... Args, Result (*function)(Args...), typename Lock>
struct Called<function, Lock> {
  static constexpr size_t kCount = sizeof...(Args);
  template <size_t place>
  using Arg = std::decay_t<std::tuple_element_t<place, std::tuple<Args...>>>;
  static constexpr bool kOpen = std::is_same_v<Arg<kCount - 1>, Addresses>;
  static constexpr Py_ssize_t kLeast = kOpen ? kCount - 1 : kCount;

  template <size_t place>
  static Arg<place> read(PyObject* const* args, Py_ssize_t count) {
    if constexpr (std::is_same_v<Arg<place>, Addresses>) {
      Addresses all;
      all.reserve(count - kLeast);
      for (Py_ssize_t i = kLeast; i < count; ++i) all.push_back(from_python<void*>(args[i]));
      return all;
    } else {
      return from_python<Arg<place>>(args[place]);
    }
  }

  template <typename Given>
  static Result run(const Given& given) {
    [[maybe_unused]] const Lock lock{};
    return std::apply(function, given);
  }

  template <size_t... place>
  static PyObject* apply(PyObject* const* args, Py_ssize_t count, std::index_sequence<place...>) {
    const std::tuple<Arg<place>...> given{read<place>(args, count)...};
    if (PyErr_Occurred() != nullptr) return nullptr;
    try {
      if constexpr (std::is_void_v<Result>) {
        run(given);
        return Py_NewRef(Py_None);
      } else if constexpr (std::is_floating_point_v<Result>) {
        return PyFloat_FromDouble(run(given));
      } else {
        return PyLong_FromLongLong(run(given));
      }
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
  }

  static PyObject* call(PyObject*, PyObject* const* args, Py_ssize_t count) {
    if (kOpen ? count < kLeast : count != kLeast) {
      PyErr_Format(PyExc_TypeError, "takes %zd arguments, got %zd", kLeast, count);
      return nullptr;
    }
    return apply(args, count, std::index_sequence_for<Args...>{});
  }
};

using Fast = PyObject* (*)(PyObject*, PyObject* const*, Py_ssize_t);

PyMethodDef method(const char* name, Fast call) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(call)), METH_FASTCALL,
          nullptr};
}

template <auto function, class... Lock>
PyMethodDef called(const char* name) {
  return method(name, &Called<function, Lock...>::call);
}

PyMethodDef functions[] = {called<&ct::rk::direct::stage>("rk_stage"),
                           called<&ct::rk::direct::error>("rk_error"),
                           called<&ct::rk::direct::times>("rk_times"),
                           called<&ct::rk::direct::plan>("rk_plan"),
                           called<&ct::rk::direct::judge>("rk_judge"),
                           called<&ct::rk::direct::accept>("rk_accept"),
                           called<&ct::mlp::direct::derivative, Released>("mlp_derivative"),
                           called<&ct::core::unchanged>("unchanged"),
                           method("solve_again", &ct::core::solve_again),
                           {nullptr, nullptr, 0, nullptr}};

}  // namespace

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C",
                                   "Compiled kernels of ctorch.",
                                   -1,
                                   functions,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
