"""Rates of log densities: against closed forms, and the Fokker-Planck equation in full."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import ctorch
from ctorch.autodiff import Hollow
from ctorch.autodiff.fokker_planck import fokker_planck, log_density_derivatives
from ctorch.testing import check_gradients
from tests.nn.hollow_nets import F64, NETS, make, points

CLOSE = {"rtol": 1e-12, "atol": 1e-12}
sizes = st.floats(0.25, 2.0)
places = st.floats(-3.0, 3.0)


class Apart(nn.Module):
    """``f_i = tau(t, x)_i`` for an elementwise tau: no dimension sees another."""

    def __init__(self, tau: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.tau = tau

    def __ctorch_hollow__(self) -> Hollow:
        return Hollow(lambda t, x: x.new_zeros(*x.shape, 1), lambda t, x, h: self.tau(t, x))


class Mixture(nn.Module):
    """log of two correlated Gaussians that move, and of which one grows: ``[..., d] -> [...]``."""

    def __init__(self, d: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        make = {"dtype": F64, "generator": draw}
        self.mean = nn.Parameter(torch.randn(2, d, **make))
        self.speed = nn.Parameter(torch.randn(2, d, **make))
        self.root = nn.Parameter(torch.eye(d, dtype=F64) + 0.3 * torch.randn(2, d, d, **make))

    def forward(self, t: Tensor, x: Tensor) -> Tensor:
        off = x.unsqueeze(-2) - self.mean - t.unsqueeze(-1) * self.speed
        z = torch.einsum("kij,...kj->...ki", self.root, off)
        weight = torch.cat([torch.zeros_like(t), 0.7 * t], -1).log_softmax(-1)
        each = weight + torch.linalg.slogdet(self.root)[1] - 0.5 * (z**2).sum(-1)
        return torch.logsumexp(each, -1) - 0.5 * x.shape[-1] * math.log(2 * math.pi)


def gaussian(mean: Tensor, variance: Tensor, x: Tensor) -> Tensor:
    return (-0.5 * (x - mean) ** 2 / variance - 0.5 * torch.log(2 * math.pi * variance)).sum(-1)


def derivative(y: Tensor, x: Tensor) -> Tensor:
    (out,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return out


def rate_in_full(f: Any, g: Any, log_density: Any, t: Tensor, x: Tensor) -> Tensor:
    """d log p / dt from the equation for p: autograd of products, nothing is known of f and g."""
    x = x.clone().requires_grad_()
    p = log_density(t, x).exp()
    drifted, spread = f(t, x) * p.unsqueeze(-1), g(t, x) ** 2 * p.unsqueeze(-1)
    total = torch.zeros_like(p)
    for i in range(x.shape[-1]):
        first = derivative(spread[..., i], x)[..., i]
        total = total - derivative(drifted[..., i], x)[..., i]
        total = total + 0.5 * derivative(first, x)[..., i]
    return total / p


@pytest.mark.parametrize("d", [1, 2, 5])
@pytest.mark.parametrize("name", NETS)
def test_the_rate_is_that_of_the_equation_in_full(name, d):
    f, g, log_density = make(name, d), make("mlp", d, width=9), Mixture(d)
    t, x = points(d, batch=7)
    x = 0.7 * x
    p = log_density_derivatives(log_density, t, x)
    expected = rate_in_full(f, g, log_density, t, x)
    actual = fokker_planck(f, g, p.score, p.curvature, t, x)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())
    actual = fokker_planck(g, f, p.score, p.curvature, t, x)
    expected = rate_in_full(g, f, log_density, t, x)
    assert_close(actual, expected, rtol=1e-12, atol=1e-12 * expected.abs().max().item())


@given(
    rate=sizes, center=places, noise=sizes, start=places, width=sizes, time=sizes,
    x=st.lists(places, min_size=1, max_size=3),
)  # fmt: skip
def test_a_gaussian_relaxes_as_ornstein_and_uhlenbeck_say(
    rate, center, noise, start, width, time, x
):
    def log_density(t: Tensor, x: Tensor) -> Tensor:
        decay = torch.exp(-rate * t)
        variance = width**2 * decay**2 + noise**2 / (2 * rate) * (1 - decay**2)
        return gaussian(center + (start - center) * decay, variance, x)

    t, x = torch.tensor([time], dtype=F64), torch.tensor(x, dtype=F64)
    p = log_density_derivatives(log_density, t, x)
    pull = Apart(lambda t, x: rate * (center - x))
    found = fokker_planck(pull, noise, p.score, p.curvature, t, x)
    assert_close(found, p.rate, rtol=1e-9, atol=1e-10 * (1 + p.score.square().sum().item()))


@given(noise=st.lists(sizes, min_size=1, max_size=3), width=sizes, time=sizes, x=places)
def test_brownian_motion_spreads_at_the_rate_of_its_variance(noise, width, time, x):
    noise = torch.tensor(noise, dtype=F64)
    t, x = torch.tensor([time], dtype=F64), x * torch.ones_like(noise)
    variance = width**2 + noise**2 * time
    still = Apart(lambda t, x: 0 * x)
    found = fokker_planck(still, noise, -x / variance, -1 / variance, t, x)
    expected = (0.5 * noise**2 * (x**2 / variance**2 - 1 / variance)).sum(-1)
    assert_close(found, expected, **CLOSE)


@given(growth=places, noise=sizes, start=places, time=sizes, x=st.floats(0.2, 4.0))
def test_geometric_brownian_motion_is_lognormal_as_it_is_for_ito(growth, noise, start, time, x):
    def log_density(t: Tensor, x: Tensor) -> Tensor:
        mean = start + (growth - 0.5 * noise**2) * t
        return gaussian(mean, 1 + noise**2 * t, x.log()) - x.log().sum(-1)

    t, x = torch.tensor([time], dtype=F64), torch.tensor([x], dtype=F64)
    p = log_density_derivatives(log_density, t, x)
    drift, diffusion = Apart(lambda t, x: growth * x), Apart(lambda t, x: noise * x)
    found = fokker_planck(drift, diffusion, p.score, p.curvature, t, x)
    scale = 1 + (x**2 * p.score**2).sum().item() + abs(p.rate.item())
    assert_close(found, p.rate, rtol=0, atol=1e-11 * scale)


@pytest.mark.parametrize("d", [1, 3])
def test_derivatives_of_a_gaussian_of_any_covariance_are_the_known_ones(d):
    root = torch.eye(d, dtype=F64) + 0.3 * torch.randn(d, d, dtype=F64)
    precision, (t, x) = root @ root.mT, points(d)
    speed = torch.arange(1.0, d + 1, dtype=F64)

    def log_density(t: Tensor, x: Tensor) -> Tensor:
        off = x - t * speed
        return -0.5 * torch.einsum("...i,ij,...j->...", off, precision, off)

    p = log_density_derivatives(log_density, t, x)
    off = (x - t * speed) @ precision
    assert_close(p.value, log_density(t, x), **CLOSE)
    assert_close(p.score, -off, **CLOSE)
    assert_close(p.rate, off @ speed, **CLOSE)
    assert_close(p.curvature, -precision.diagonal().expand(3, d), **CLOSE)


def test_a_constant_diffusion_is_a_number_a_tensor_or_a_net():
    net, log_density = make("mlp", 3), Mixture(3)
    t, x = points(3)
    p = log_density_derivatives(log_density, t, x)
    vector = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    for noise, same in ((2, 2.0), (0.5, torch.tensor(0.5)), (vector, vector.expand(3, 3))):
        by_net = Apart(lambda t, x, noise=noise: 0 * x + noise)
        found = [fokker_planck(net, g, p.score, p.curvature, t, x) for g in (noise, same, by_net)]
        assert_close(found[0], found[1], **CLOSE)
        assert_close(found[0], found[2], **CLOSE)


def test_the_sign_of_the_diffusion_does_not_matter():
    f, (t, x) = make("sum", 3), points(3)
    both = Apart(lambda t, x: torch.tanh(x)), Apart(lambda t, x: -torch.tanh(x))
    score, curvature = torch.randn(2, 3, 3, dtype=F64)
    one, other = (fokker_planck(f, g, score, curvature, t, x) for g in both)
    assert_close(one, other, rtol=0, atol=0)


@pytest.mark.parametrize("order", [1, 2])
def test_gradients_reach_everything(order):
    f, g = make("mlp", 2, width=4, hidden=(3,)), make("sum", 2, features=3, hidden=(3,))
    t, x = points(2)
    score, curvature = torch.randn(2, 3, 2, dtype=F64)

    def rate(score: Tensor, curvature: Tensor, t: Tensor, x: Tensor) -> Tensor:
        return fokker_planck(f, g, score, curvature, t, x)

    check_gradients(rate, (score, curvature, t, x), order=order, examples=4)
    noise = torch.rand(2, dtype=F64)
    check_gradients(
        lambda noise: fokker_planck(f, noise, score, curvature, t, x), noise, order=order
    )


def test_gradients_reach_the_density_as_well():
    log_density, f, (t, x) = Mixture(2), make("mlp", 2, width=4, hidden=(3,)), points(2)

    def residual(t: Tensor, x: Tensor) -> Tensor:
        p = log_density_derivatives(log_density, t, x)
        return fokker_planck(f, 0.5, p.score, p.curvature, t, x) - p.rate

    check_gradients(residual, (t, x), modes=("reverse",), examples=4)
    (grad,) = torch.autograd.grad(residual(t, x).square().sum(), log_density.root)
    assert bool((grad != 0).all())


def test_without_gradients_there_is_no_graph_and_the_same_numbers():
    log_density, (t, x) = Mixture(2), points(2)
    with_graph = log_density_derivatives(log_density, t, x)
    with torch.no_grad():
        p = log_density_derivatives(log_density, t, x)
    assert with_graph.curvature.requires_grad
    assert not any(part.requires_grad for part in p)
    assert not t.requires_grad
    assert not x.requires_grad
    for part, other in zip(p, with_graph, strict=True):
        assert_close(part, other.detach(), rtol=0, atol=0)


def test_a_density_may_ignore_time_or_space():
    t, x = points(2)
    p = log_density_derivatives(lambda t, x: -x.sum(-1), t, x)  # linear: no curvature either
    assert_close(p.score, -torch.ones_like(x))
    assert not p.rate.any()
    assert not p.curvature.any()
    p = log_density_derivatives(lambda t, x: 3 * t.squeeze(-1), t, x)
    assert_close(p.rate, torch.full((3,), 3.0, dtype=F64))
    assert not p.score.any()
    assert not p.curvature.any()
    p = log_density_derivatives(lambda t, x: torch.ones(3), t, x)
    assert not p.rate.any()
    assert not p.score.any()
    assert not p.curvature.any()


@pytest.mark.parametrize("batch", [(), (0,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_batches_of_any_shape_keep_it_and_the_dtype(batch, dtype):
    f, g = (make(name, 2).to(dtype) for name in ("mlp", "sum"))
    t, x = torch.rand(*batch, 1, dtype=dtype), torch.randn(*batch, 2, dtype=dtype)
    p = log_density_derivatives(Mixture(2).to(dtype), t, x)
    out = fokker_planck(f, g, p.score, p.curvature, t, x)
    assert p.value.shape == p.rate.shape == out.shape == batch
    assert p.score.shape == p.curvature.shape == (*batch, 2)
    assert p.value.dtype == p.rate.dtype == p.curvature.dtype == out.dtype == dtype
    flat = [part.reshape(-1, part.shape[-1]) for part in (p.score, p.curvature, t, x)]
    assert_close(out.flatten(), fokker_planck(f, g, *flat))


X, T = torch.zeros(3, 2), torch.zeros(3, 1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"drift": lambda t, x: x}, TypeError, "net: expected a hollow net"),
        ({"diffusion": lambda t, x: x}, TypeError, "net: expected a hollow net"),
        ({"diffusion": torch.ones(3)}, ValueError, r"diffusion: expected a shape .*\(3, 2\)"),
        ({"score": torch.zeros(3)}, ValueError, r"score: expected .*\(3, 2\), got \(3,\)"),
        ({"curvature": 1.0}, ValueError, "curvature: expected .*got float"),
        ({"t": 0.0}, TypeError, "t: expected a tensor"),
        ({"t": T.double()}, TypeError, "t: expected a tensor of x's dtype torch.float32"),
        ({"t": torch.zeros(3)}, ValueError, r"t: expected \(3, 1\) beside x, got \(3,\)"),
        ({"x": X.long()}, TypeError, "x: expected a floating-point tensor"),
        ({"x": [0.0]}, TypeError, "x: expected a floating-point tensor .*got list"),
    ],
)
def test_wrong_arguments_are_named(change, error, message):
    good = {"drift": ctorch.nn.HollowMLP(2), "diffusion": 1.0, "score": X, "curvature": X}
    with pytest.raises(error, match=message):
        fokker_planck(**{**good, "t": T, "x": X, **change})


@pytest.mark.parametrize("value", [lambda t, x: x, lambda t, x: t, lambda t, x: 1.0])
def test_a_log_density_of_the_wrong_shape_is_named(value):
    with pytest.raises(ValueError, match=r"log_density: expected values \[...\] = \(3,\)"):
        log_density_derivatives(value, T, X)
    with pytest.raises(ValueError, match=r"t: expected \(3, 1\) beside x"):
        log_density_derivatives(value, T[:2], X)
