"""The hyperbolic tangent of native solves at the widths at which it is computed."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from ctorch.codegen import build

SOURCE = """
#include "native/math.h"
using real = {real};
extern "C" void run(long n, const real* x, real* y) {{
  ct::native::map(n, y, [](auto v) {{ return ct::native::tanh(v); }}, x);
}}
"""
#: a processor with 512-bit registers looks coefficients up; others compute what comes of a series
PROCESSORS = {"this": "", "avx2": "-mno-avx512f", "sse": "-mno-avx512f -mno-avx -mno-fma"}


def tanh(x: np.ndarray) -> np.ndarray:
    """In registers."""
    real = "float" if x.dtype == np.float32 else "double"
    run = build.load(SOURCE.format(real=real)).run
    pad = -len(x) % 16  # the last register is whole, too
    x = np.ascontiguousarray(np.pad(x, (0, pad)))
    y = np.empty_like(x)
    run(ctypes.c_long(len(x)), x.ctypes.data_as(ctypes.c_void_p), y.ctypes.data_as(ctypes.c_void_p))
    return y[: len(y) - pad]


@pytest.fixture(params=PROCESSORS, autouse=True)
def processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CTORCH_NATIVE_FLAGS", PROCESSORS[request.param])


def arguments(dtype: type) -> np.ndarray:
    """Numbers of all sizes, and those beside the ends of intervals, of both signs."""
    draw = np.random.default_rng(0)
    powers = [2.0 ** draw.uniform(-30, 5, 200_000), draw.uniform(0, 2, 200_000)]
    seams = np.ldexp(np.array([[4], [5], [6], [7]]), np.arange(-8, 4)).ravel().astype(dtype)
    beside = [seams]
    for _ in range(3):
        beside += [np.nextafter(beside[-1], dtype(np.inf))]
        beside = [np.nextafter(seams, dtype(0)), *beside]
    x = np.concatenate([*powers, *beside]).astype(dtype)
    return np.concatenate([x, -x])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_errors_are_below_three_units_in_the_last_place(dtype: type) -> None:
    x = arguments(dtype)
    y, want = tanh(x), np.tanh(x.astype(np.longdouble))
    unit = np.spacing(np.abs(want.astype(dtype)))
    assert (np.abs(y.astype(np.longdouble) - want) / unit).max() < 2.75
    assert (np.abs(y) <= 1).all()
    assert np.array_equal(tanh(-x), -y)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_special_numbers(dtype: type) -> None:
    tiny = np.finfo(dtype).smallest_subnormal
    x = np.array([0.0, -0.0, tiny, -tiny, 1e-30, 30, -30, 1e30, np.inf, -np.inf, np.nan], dtype)
    want = np.array([0.0, -0.0, tiny, -tiny, 1e-30, 1, -1, 1, 1, -1, np.nan], dtype)
    y = tanh(x)
    assert np.array_equal(y, want, equal_nan=True)
    assert np.array_equal(np.signbit(y[:10]), np.signbit(want[:10]))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_number_does_not_hang_on_where_it_stands(dtype: type) -> None:
    x = arguments(dtype)[:1001]
    assert np.array_equal(tanh(x)[::-1], tanh(x[::-1].copy()))
