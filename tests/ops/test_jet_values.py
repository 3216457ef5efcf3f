"""Values of the elementary functions in the Taylor kernels: accuracy over the whole range."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch

from ctorch.ops import jet

FINITE: dict[str, Callable[[Any], Any]] = {
    "tanh": mpmath.tanh,
    "sigmoid": lambda x: 1 / (1 + mpmath.exp(-x)),
    "softplus": lambda x: mpmath.log1p(mpmath.exp(x)),
    "exp": mpmath.exp,
    "log": mpmath.log,
    "expm1": mpmath.expm1,
    "log1p": mpmath.log1p,
    "sin": mpmath.sin,
    "cos": mpmath.cos,
    "sqrt": mpmath.sqrt,
    "rsqrt": lambda x: 1 / mpmath.sqrt(x),
    "reciprocal": lambda x: 1 / x,
    "erf": mpmath.erf,
    "gelu": lambda x: x * mpmath.erfc(-x / mpmath.sqrt(2)) / 2,
    "silu": lambda x: x / (1 + mpmath.exp(-x)),
    "logsigmoid": lambda x: -mpmath.log1p(mpmath.exp(-x)),
}
POSITIVE = ("log", "sqrt", "rsqrt")
ULPS = {"silu": 6, "gelu": 6}  # 3 elsewhere
DTYPES = [torch.float32, torch.float64]


def grid(dtype: torch.dtype, name: str) -> list[float]:
    """From the smallest numbers to where exponentials end, and further where that makes sense."""
    tiny = torch.finfo(dtype).tiny
    end = 85.0 if dtype == torch.float32 else 700.0
    points = [tiny, 3.7e-30, 1.3e-9, 1e-6, 3.1e-3]
    points += [0.013 * 1.19**i for i in range(60) if 0.013 * 1.19**i < end]
    if name in (*POSITIVE, "reciprocal", "log1p", "sin", "cos", "tanh", "sigmoid", "erf"):
        points += [1.1e4, 7.3e6, 3e20]
    if name not in POSITIVE:
        points += [-x for x in points if name != "log1p" or x < 0.99]
    return points


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FINITE)
def test_value_is_accurate_to_a_few_units_in_the_last_place(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor(grid(dtype, name), dtype=torch.float64).to(dtype)
    y = jet.unary(x[None], name, None, 1.0)[0]
    info = torch.finfo(dtype)
    with mpmath.workdps(60):
        for at, actual in zip(x.tolist(), y.tolist(), strict=True):
            exact = FINITE[name](mpmath.mpf(at))
            size = max(abs(exact), mpmath.mpf(info.tiny))
            # sine and cosine near their zeros: relative to 1/8, unless the argument itself is small
            if name in ("sin", "cos") and abs(at) > 1:
                size = max(size, mpmath.mpf(0.125))
            error = abs(mpmath.mpf(actual) - exact) / (size * info.eps)
            # what cannot be told from underflow
            if abs(exact) < info.tiny / info.eps:
                error = abs(mpmath.mpf(actual) - exact) / mpmath.mpf(info.tiny)
            assert error <= ULPS.get(name, 3), f"{name}({at!r}) = {actual!r}: {error} ulp"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["tanh", "sigmoid"])
def test_slope_keeps_its_relative_accuracy_in_the_tails(name: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-40.0, -17.0, -3.0, 0.0, 1e-6, 3.0, 17.0, 40.0], dtype=dtype)
    slope = jet.unary(torch.stack([x, torch.ones_like(x)]), name)[1]
    at = x.double()
    half = 2 if name == "sigmoid" else 1
    exact = 1 / torch.cosh(at / half) ** 2 / half**2
    assert ((slope.double() - exact).abs() <= 8 * torch.finfo(dtype).eps * exact).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", jet.UNARY)
def test_infinity_nan_and_zero_are_as_in_torch(name: str, dtype: torch.dtype) -> None:
    functions: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "softplus": torch.nn.functional.softplus,
        "logsigmoid": torch.nn.functional.logsigmoid,
        "silu": torch.nn.functional.silu,
        "pow": lambda x: x**1.0,
    }
    if name in ("gelu", "gelu_tanh", "mish", "silu"):
        pytest.skip("products with infinity, where torch itself is of two minds")
    ends = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 800.0, -800.0]
    x = torch.tensor(ends, dtype=dtype)
    expected = functions.get(name, getattr(torch, name, None))(x)
    y = jet.unary(x[None], name, None, 1.0)[0]
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-8, equal_nan=True)
