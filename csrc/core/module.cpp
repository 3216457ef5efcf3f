// The Python module ctorch._C. It is empty: importing it loads the library, and loading registers
// the kernels.
#include <Python.h>

extern "C" PyMODINIT_FUNC PyInit__C(void) {
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT,
                                   "_C",
                                   "Compiled kernels of ctorch.",
                                   -1,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr,
                                   nullptr};
  return PyModule_Create(&definition);
}
