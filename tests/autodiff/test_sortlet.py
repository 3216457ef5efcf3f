"""Derivative operators through sortlets, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

import ctorch
from ctorch.ops import sortlet as ops

F64 = torch.float64
GAPS = ("linear", "tanh")


class Net(nn.Module):
    """Scores and coefficients of N particles in two dimensions, as in a wavefunction."""

    def __init__(self, terms: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.scores = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, terms)).double()
        self.terms = terms

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        r = x.unflatten(-1, (-1, 2))
        return self.scores(r).mT, -0.5 * (r**2).sum((-2, -1)).unsqueeze(-1)


def one(gap: str) -> Callable[[Tensor], Tensor]:
    net = Net(1)
    return lambda x: ctorch.sortlet(net(x)[0][..., 0, :], gap)[1]


def several(gap: str) -> Callable[[Tensor], Tensor]:
    net, sign = Net(), torch.tensor([1.0, -1.0, 0.7], dtype=F64)
    return lambda x: ctorch.sum_of_sortlets(*net(x), sign, gap)[1]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 8, dtype=F64, generator=torch.Generator().manual_seed(3))


def hessians(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.stack([torch.autograd.functional.hessian(f, row) for row in x])


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("make", [one, several])
def test_the_laplacian_is_the_trace_of_the_hessian(make, gap, x):
    f = make(gap)
    value, gradient, lap = ctorch.laplacian(f, x)
    leaf = x.clone().requires_grad_()
    assert_close(value, f(x), rtol=1e-12, atol=1e-12)
    (expected,) = torch.autograd.grad(f(leaf).sum(), leaf)
    assert_close(gradient, expected, rtol=1e-12, atol=1e-12)
    trace = hessians(f, x).diagonal(0, -2, -1).sum(-1)
    assert_close(lap, trace, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("gap", GAPS)
@pytest.mark.parametrize("make", [one, several])
def test_high_derivatives_along_a_direction_are_those_of_nested_autograd(make, gap, x):
    f, v = make(gap), torch.linspace(-1, 1, 40, dtype=F64).reshape(5, 8)
    s = torch.zeros((), dtype=F64, requires_grad=True)
    expected = f(x + s * v)
    for order in (1, 2, 3, 4):
        columns = [torch.autograd.grad(e, s, create_graph=True)[0] for e in expected]
        expected = torch.stack(columns)
        assert_close(ctorch.derivative(f, x, v, order), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("make", [one, several])
def test_the_laplacian_is_differentiable(make, x):
    f = make("linear")
    leaf = x[:2].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ctorch.laplacian(f, x)[2], leaf)


def test_coefficients_alone_may_carry_derivatives(x):
    scores = torch.randn(5, 3, 4, dtype=F64)
    w = torch.linspace(-1, 1, 24, dtype=F64).reshape(8, 3)

    def f(x: Tensor) -> Tensor:
        of_x = scores[: x.shape[0]] if x.ndim > 1 else scores[0]
        return ctorch.sum_of_sortlets(of_x, x @ w)[1]

    _, gradient, lap = ctorch.laplacian(f, x)
    expected = torch.autograd.functional.hessian(f, x[0]).trace()
    assert_close(lap[0], expected, rtol=1e-12, atol=1e-12)
    v = torch.ones_like(x)
    assert_close(ctorch.derivative(f, x, v, 1), gradient.sum(-1))


@pytest.mark.parametrize("width", [1e-6, 1e-100, 0.0])
def test_nothing_cancels_near_a_tie_of_one_term(width):
    """The Laplacian of a sum, one term of which has derivatives of 1 / width^2 in its log."""
    base = torch.tensor([[0.0, 0.0, 1.0], [0.5, -1.0, 1.5]], dtype=F64)
    slope = torch.tensor([[[0.3, 1.0, 0.2], [0.1, 0.4, -0.5]]], dtype=F64)

    def f(s: Tensor) -> Tensor:
        scores = base + slope * s[..., None, None]
        gap = torch.zeros(2, 3, dtype=F64)
        gap[0, 1] = width
        return ctorch.sum_of_sortlets(scores[..., 0, :, :] + gap, torch.zeros(2, dtype=F64))[1]

    def polynomial(s: Tensor) -> Tensor:  # the same in terms of gaps, on this side of the tie
        first = (width + 0.7 * s) * (1 - width - 0.8 * s)
        second = (1.5 - 0.3 * s) * (1 - 0.6 * s)
        return (first - second).abs().log()

    s = torch.zeros(1, 1, dtype=F64)
    _, gradient, lap = ctorch.laplacian(f, s)
    leaf = torch.zeros((), dtype=F64, requires_grad=True)
    (expected,) = torch.autograd.grad(polynomial(leaf), leaf, create_graph=True)
    assert_close(gradient[0, 0], expected, rtol=1e-12, atol=1e-12)
    assert_close(lap[0], torch.autograd.grad(expected, leaf)[0], rtol=1e-12, atol=1e-12)


def test_the_ratio_is_finite_where_the_logarithm_has_lost_all_digits():
    """lap(psi) / psi of a kernel, in float32, as near to a tie as float32 scores can be."""
    scores = torch.tensor([[0.0, 1e-30, 1.0]])
    rows = torch.tensor([[[1.0, 2.0, 4.0]]])
    _, of_log, ratio = ops.sortlet_laplacian(scores, rows, torch.zeros(1, 3), 0)
    assert of_log == -torch.inf
    gap = scores[0, 1].double().item()
    assert_close(ratio[0].double().item(), 2 * (1 / gap) * 2 / 1, rtol=1e-5, atol=0)


@pytest.mark.parametrize("gap", GAPS)
def test_a_tied_gap_contributes_nothing_to_a_series(gap):
    x = torch.tensor([0.0, 2.0, 0.0, 5.0], dtype=F64)
    v = torch.tensor([1.0, 0.5, 2.0, -1.0], dtype=F64)
    phi = torch.tanh if gap == "tanh" else lambda g: g

    def f(x: Tensor) -> Tensor:
        return ctorch.sortlet(x, gap)[1]

    def sorted_gaps(s: Tensor) -> Tensor:
        return phi(torch.stack([2 - 1.5 * s, 3 - 1.5 * s])).log().sum()

    s = torch.zeros((), dtype=F64)
    for order in (1, 2, 3):
        expected = ctorch.derivative(sorted_gaps, s, torch.ones_like(s), order)
        assert_close(ctorch.derivative(f, x, v, order), expected)
    assert f(x) == -torch.inf


def test_a_zero_sum_has_derivatives_zero():
    def f(x: Tensor) -> Tensor:
        return ctorch.sum_of_sortlets(x.unflatten(-1, (2, 3)), torch.zeros(2, dtype=F64))[1]

    x = torch.tensor([[1.0, 1.0, 1.0, 2.0, 2.0, 2.0]], dtype=F64)
    value, gradient, lap = ctorch.laplacian(f, x)
    assert value == -torch.inf
    assert (gradient == 0).all()
    assert lap == 0
