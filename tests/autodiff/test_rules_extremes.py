"""Values so large, so small or so empty that formulas fail which are right elsewhere."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch

F64 = torch.float64
INF = math.inf


def line(f: Any, x: float, order: int = 2) -> list[float]:
    """Derivatives 0 to ``order`` at a number."""
    at = torch.tensor(x, dtype=F64)
    return [float(ctorch.derivative(f, at, torch.ones_like(at), k)) for k in range(order + 1)]


def full(x: Tensor, value: float) -> Tensor:
    return torch.full((), value, dtype=F64)


# function, where, its derivatives of order 0 to 2
FINITE = {
    "atan2 beside an infinite x": (lambda x: torch.atan2(x, full(x, INF)), 2.0, (0, 0, 0)),
    "atan2 behind it": (lambda x: torch.atan2(x, full(x, -INF)), 2.0, (math.pi, 0, 0)),
    "atan2 of an infinite y": (lambda x: torch.atan2(x, full(x, 1.0)), INF, (math.pi / 2, 0, 0)),
    "hypot, large": (lambda x: torch.hypot(x, full(x, 1.0)), 1e200, (1e200, 1, 0)),
    "hypot, small": (lambda x: torch.hypot(x, full(x, 0.0)), -1e-200, (1e-200, -1)),
    "logaddexp with infinity": (lambda x: torch.logaddexp(x, full(x, INF)), 9.0, (INF, 0, 0)),
    "logaddexp with minus it": (lambda x: torch.logaddexp(x, full(x, -INF)), 9.0, (9, 1, 0)),
    "logaddexp of infinity": (lambda x: torch.logaddexp(x, full(x, 0.0)), INF, (INF, 1, 0)),
    "logaddexp of equals": (
        lambda x: torch.logaddexp(2 * x, full(x, 2.0)),
        1.0,
        (2.6931471805599454, 1, 1),
    ),
    "exp2 at minus infinity": (torch.exp2, -INF, (0, 0, 0)),
    "a high power at zero": (lambda x: x**65, 0.0, (0, 0, 0)),
    "a power that is no whole number, at zero": (lambda x: x**2.5, 0.0, (0, 0, 0)),
    "entr at zero": (torch.special.entr, 0.0, (0, INF, -INF)),
    "i0e, large": (
        torch.special.i0e,
        1e5,
        (0.0012615678379677702, -6.30785495971814e-09, 9.461810675237547e-14),
    ),
    "i1e, large and negative": (
        torch.special.i1e,
        -1e5,
        (-0.0012615615301128102, -6.3077603416113875e-09, -9.461564967688597e-14),
    ),
}


@pytest.mark.parametrize("name", FINITE)
def test_derivatives_are_finite_where_the_function_has_them(name: str) -> None:
    f, x, expected = FINITE[name]
    assert line(f, x, len(expected) - 1) == pytest.approx(list(expected), rel=1e-6, abs=1e-18)


@pytest.mark.parametrize("p", [65, 2.5])
def test_laplacian_of_powers_at_zero(p: float) -> None:
    x = torch.tensor([0.0, 1.0], dtype=F64)
    value, gradient, lap = ctorch.laplacian(lambda x: (x**p).sum(-1), x)
    assert value == 1
    assert gradient.tolist() == [0, p]
    torch.testing.assert_close(lap, torch.tensor(p * (p - 1), dtype=F64))


def test_powers_at_zero_differentiate_again_by_autograd() -> None:
    x = torch.tensor([0.0, 0.3], dtype=F64, requires_grad=True)
    y = ctorch.derivative(lambda x: x**3.5, x, torch.ones_like(x), 2)  # 8.75 x^1.5
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    torch.testing.assert_close(grad, 13.125 * x**0.5)
    (second,) = torch.autograd.grad(grad[1], x)
    torch.testing.assert_close(second[1], 13.125 * 0.5 * x.detach()[1] ** -0.5)


@pytest.mark.parametrize("f", [torch.special.i0e, torch.special.i1e])
@pytest.mark.parametrize("x", [-20.0, -3.0, 0.7, 11.9, 12.1, 40.0])
def test_scaled_bessel_functions(f: Any, x: float) -> None:
    """Against their equation, ``x^2 (y'' + 2 s y') + x (y' + s y) = m^2 y`` with s the sign."""
    y, first, second, third = line(f, x, 3)
    m, s = (1 if f is torch.special.i1e else 0), math.copysign(1, x)
    assert x * x * (second + 2 * s * first) + x * (first + s * y) == pytest.approx(
        m * m * y, abs=1e-10 * abs(x * x * y)
    )
    around = [line(f, x + h, 2)[2] for h in (-1e-4, 1e-4)]
    assert third == pytest.approx((around[1] - around[0]) / 2e-4, rel=1e-5, abs=1e-9)


def test_determinants_of_no_electrons() -> None:
    """Without spins of one kind the determinant is of a matrix [B, 0, 0]: it is 1."""

    def f(x: Tensor) -> Tensor:
        none = x[..., :0, None] * x[..., None, :0]
        a, b = torch.linalg.slogdet(none), torch.linalg.det(none)
        return a[1] + torch.logdet(none) + x.square().sum(-1) * b

    x = torch.ones(3, 2, dtype=F64)
    assert ctorch.derivative(f, x, x, 1).tolist() == [4.0] * 3
    assert ctorch.laplacian(f, x).laplacian.tolist() == [4.0] * 3
    series = ctorch.taylor_series(lambda t, y: f(y).unsqueeze(-1) * y, 0.0, x, 1)
    assert series[1].tolist() == [[2.0, 2.0]] * 3


def test_extremes_over_some_dims_of_an_empty_tensor() -> None:
    x = torch.ones(5, 0, 4)
    y = ctorch.derivative(lambda x: x.amax((0, 2)), x, x, 1)
    assert y.shape == (0,)
    assert ctorch.derivative(lambda x: torch.aminmax(x, dim=0).max, x, x, 1).shape == (0, 4)


def test_laplacian_along_directions_of_a_function_with_no_outputs() -> None:
    x = torch.ones(3, 2)
    value, gradient, lap = ctorch.laplacian(lambda x: x[..., :0], x, directions=torch.ones(1, 2))
    assert (value.shape, gradient.shape, lap.shape) == ((3, 0), (3, 0, 2), (3, 0))


def test_powers_beside_zero_know_nothing_of_it() -> None:
    """What serves at zero must not reach other elements as 0 times infinity, nor Dynamo."""
    x = torch.tensor([0.4, 1.7], dtype=F64, requires_grad=True)
    v = torch.tensor([1.0, -0.5], dtype=F64)

    def f(x: Tensor) -> Tensor:
        return ctorch.derivative(lambda x: x**2.5, x, v, 2)

    torch.testing.assert_close(f(x), 3.75 * x**0.5 * v * v)
    assert torch.autograd.gradgradcheck(f, (x,))
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))
