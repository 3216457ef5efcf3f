#include "again.h"

#include <cmath>
#include <vector>

#include "../native/task.h"

namespace ct::core {
namespace {

using native::Task;

// What stays as it is from call to call. `objects` are words, as ctorch/_objects.py writes them;
// the caller keeps everything alive that they name.
struct Again {
  int64_t (*function)(const Task*);
  const Py_ssize_t* objects;
  Task task;
};

class Words {
 public:
  explicit Words(const Py_ssize_t* words_) : words(words_) {}

  Py_ssize_t count() { return *words++; }
  PyObject* object() { return reinterpret_cast<PyObject*>(*words++); }

 private:
  const Py_ssize_t* words;
};

// Whether an object has its class and its dict; null: nobody asks for that.
bool has(PyObject* item, const PyObject* kind, const PyObject* dict) {
  if (reinterpret_cast<PyObject*>(Py_TYPE(item)) != kind) return false;
  if (dict == nullptr) return true;
  PyObject* now = PyObject_GenericGetDict(item, nullptr);
  if (now == nullptr) PyErr_Clear();
  Py_XDECREF(now);
  return now == dict;
}

// Whether a dict has its entries, in their order.
bool holds(PyObject* dict, Words& words) {
  Py_ssize_t place = 0, left = words.count();
  PyObject *key = nullptr, *value = nullptr;
  while (PyDict_Next(dict, &place, &key, &value)) {
    if (left-- == 0) return false;
    // (both read in any case: the words go on behind them)
    const bool same_key = key == words.object(), same_value = value == words.object();
    if (!same_key || !same_value) return false;
  }
  return left == 0;
}

}  // namespace

int64_t unchanged(const Py_ssize_t* objects) {
  Words words(objects);
  for (Py_ssize_t left = words.count(); left > 0; --left) {
    PyObject *item = words.object(), *kind = words.object(), *dict = words.object();
    if (!has(item, kind, dict)) return false;
  }
  for (Py_ssize_t left = words.count(); left > 0; --left)
    if (PyObject* dict = words.object(); !holds(dict, words)) return false;
  return true;
}

namespace {

// As ctorch.ode.arguments.check_times wants them.
bool are_times(const double* t, int64_t count) {
  bool rises = false, falls = false, finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= std::isfinite(t[i]);
  for (int64_t i = 1; i < count; ++i) rises |= t[i] > t[i - 1], falls |= t[i] < t[i - 1];
  return finite && !(rises && falls);
}

template <class T>
T* address(PyObject* x) {
  return static_cast<T*>(PyLong_AsVoidPtr(x));
}

}  // namespace

PyObject* solve_again(PyObject*, PyObject* const* args, Py_ssize_t count) {
  constexpr Py_ssize_t kLeast = 4;
  if (count < kLeast) {
    PyErr_Format(PyExc_TypeError, "takes %zd arguments or more, got %zd", kLeast, count);
    return nullptr;
  }
  const auto* const again = address<const Again>(args[0]);
  std::vector<const void*> shared(count - kLeast);
  for (Py_ssize_t i = kLeast; i < count; ++i) shared[i - kLeast] = address<void>(args[i]);
  int64_t counts[3] = {}, status = 0;
  double last[3] = {};
  Task task{};
  if (again != nullptr) task = again->task;
  task.y0 = address<void>(args[1]);
  task.t = address<double>(args[2]);
  task.out = address<void>(args[3]);
  task.shared = shared.data();
  task.counts = counts, task.status = &status, task.last = last;
  if (PyErr_Occurred() != nullptr) return nullptr;
  if (!unchanged(again->objects) || !are_times(task.t, task.rows)) return Py_NewRef(Py_None);
  PyThreadState* const state = PyEval_SaveThread();
  const int64_t failed = again->function(&task);
  PyEval_RestoreThread(state);
  if (failed != 0) return Py_NewRef(Py_None);
  PyObject* const found = PyTuple_New(3);
  for (Py_ssize_t i = 0; found != nullptr && i < 3; ++i)
    PyTuple_SetItem(found, i, PyLong_FromLongLong(counts[i]));
  return found;
}

}  // namespace ct::core
