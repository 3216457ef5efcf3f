"""Products of one sample with matrices of all shapes, at the width of this processor."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
import pytest

from ctorch.codegen import build

OUTPUTS = (1, 2, 5, 8, 9, 16, 17, 24, 33, 40, 48, 65, 70)
INPUTS = (1, 3, 17, 64, 70)
SHAPES = [*itertools.product(OUTPUTS, INPUTS)]

SOURCE = """
#include "native/linear.h"
using namespace ct::native;
using real = {real};
template <long N, long K, bool kTurned>
void product(bool adds, const real* w, const real* b, const real* x, real* y) {{
  constexpr long kRow = kTurned ? 1 : K, kColumn = kTurned ? N : 1;
  alignas(64) static real turned[Matrix<0, 0, N, K, kRow, kColumn>::template size<real> + 1];
  for (real& number : turned) number = std::numeric_limits<real>::quiet_NaN();
  turn_round<N, K, kRow, kColumn>(w, turned);
  const real* const all[] = {{turned}};
  if (adds)
    linear<N, K, kRow, kColumn, Sum::kAdd>(w, b, x, y, all);
  else
    linear<N, K, kRow, kColumn>(w, b, x, y, all);
}}
using Function = void (*)(bool, const real*, const real*, const real*, real*);
const Function functions[] = {{{functions}}};
extern "C" void run(long i, bool adds, const real* w, const real* b, const real* x, real* y) {{
  functions[i](adds, w, b, x, y);
}}
"""


@pytest.mark.parametrize("real", ["float", "double"])
@pytest.mark.parametrize("turned", [False, True])
def test_all_shapes(real: str, turned: bool) -> None:
    dtype = np.float32 if real == "float" else np.float64
    functions = ", ".join(f"product<{n}, {k}, {str(turned).lower()}>" for n, k in SHAPES)
    run = build.load(SOURCE.format(real=real, functions=functions)).run
    draw = np.random.default_rng(0)

    def address(x: np.ndarray | None) -> ctypes.c_void_p:
        return ctypes.c_void_p(None if x is None else x.ctypes.data)

    for i, (n, k) in enumerate(SHAPES):
        w, b = draw.normal(size=(n, k)).astype(dtype), draw.normal(size=n).astype(dtype)
        x, before = draw.normal(size=k).astype(dtype), draw.normal(size=n + 16).astype(dtype)
        given = np.ascontiguousarray(w.T if turned else w)
        for adds, bias in itertools.product((False, True), (None, b)):
            y = before.copy()
            run(ctypes.c_long(i), adds, *map(address, (given, bias, x, y)))
            terms = [w.astype(np.float64) @ x, before[:n] * adds, 0 if bias is None else bias]
            size = np.abs(w.astype(np.float64)) @ np.abs(x) + 10
            error = np.abs(y[:n] - sum(terms)) / (size * np.finfo(dtype).eps)
            assert error.max() < 4, (n, k, adds)
            assert np.array_equal(y[n:], before[n:]), (n, k, adds)  # nothing is written beyond
