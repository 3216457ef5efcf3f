"""Solves under torch.func transforms, forward mode and torch.compile."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch

from .problems import F64, Net, differences, frozen, leaf, same, times

FIXED: dict[str, dict[str, Any]] = {
    "rk4": {"method": "rk4"},
    "midpoint, step": {"method": "midpoint", "options": {"step_size": 0.13}},
    "euler, dt0": {"method": "euler", "dt0": 0.1},
}
ADAPTIVE: dict[str, dict[str, Any]] = {
    "dopri5": {"method": "dopri5", "options": frozen(0.23)},
    "tsit5": {"method": "tsit5", "rtol": 1e-8, "atol": 1e-8},
    "vern7": {"method": "vern7", "options": frozen(0.4)},
}
BOTH = {**FIXED, **ADAPTIVE}
T = times(0.0, 0.4, 0.9)
every_how = pytest.mark.parametrize("how", BOTH.values(), ids=list(BOTH))
every_fixed = pytest.mark.parametrize("how", FIXED.values(), ids=list(FIXED))
every_mode = pytest.mark.parametrize("gradient", ["checkpoint", "backprop"])


def final(y0: Tensor, matrix: Tensor, how: dict[str, Any], gradient: str = "checkpoint") -> Tensor:
    y = ctorch.solve_ode(
        lambda t, y: torch.tanh(y @ matrix) + 0.1 * t, y0, T, gradient=gradient, **how
    ).y
    return y[-1].square().sum() + y[1, ..., 0].sum()


@every_mode
@every_how
def test_grad(how: dict[str, Any], gradient: str) -> None:
    y0, matrix = leaf(2), leaf(2, 2, seed=1)
    expected = torch.autograd.grad(final(y0, matrix, how, gradient), [y0, matrix])
    got = torch.func.grad(final, argnums=(0, 1))(y0.detach(), matrix.detach(), how, gradient)
    same(got, expected)


@every_how
def test_vjp_through_odeint(how: dict[str, Any]) -> None:
    if "dt0" in how:
        how = {**how, "options": {"step_size": how["dt0"]}}
        del how["dt0"]
    matrix = leaf(2, 2, seed=1)

    def rows(y0: Tensor) -> Tensor:
        return ctorch.odeint(lambda t, y: torch.tanh(y @ matrix), y0, T, **how)

    y0 = leaf(2)
    y, pull = torch.func.vjp(rows, y0.detach())
    (got,) = pull(torch.ones_like(y))
    same([got], [torch.autograd.grad(rows(y0).sum(), y0)[0]])


@every_how
def test_jvp_is_the_directional_derivative(how: dict[str, Any]) -> None:
    y0, matrix = leaf(2).detach(), leaf(2, 2, seed=1).detach()
    v, w = leaf(2, seed=5).detach(), leaf(2, 2, seed=6).detach()
    value, tangent = torch.func.jvp(lambda y, m: final(y, m, how), (y0, matrix), (v, w))
    gradients = torch.func.grad(final, argnums=(0, 1))(y0, matrix, how)
    same([value], [final(y0, matrix, how)])
    same([tangent], [(gradients[0] * v).sum() + (gradients[1] * w).sum()])


@every_how
def test_dual_numbers_without_torch_func(how: dict[str, Any]) -> None:
    import torch.autograd.forward_ad as fwAD

    y0, v, matrix = leaf(2).detach(), leaf(2, seed=5).detach(), leaf(2, 2, seed=1).detach()
    with fwAD.dual_level():
        tangent = fwAD.unpack_dual(final(fwAD.make_dual(y0, v), matrix, how)).tangent
    assert tangent is not None
    same([tangent], [(torch.func.grad(final)(y0, matrix, how) * v).sum()])


@every_fixed
def test_vmap_over_states_and_parameters(how: dict[str, Any]) -> None:
    states, matrices = leaf(3, 2).detach(), leaf(3, 2, 2, seed=1).detach()
    got = torch.func.vmap(lambda y, m: final(y, m, how))(states, matrices)
    same([got], [torch.stack([final(y, m, how) for y, m in zip(states, matrices, strict=True)])])


@every_fixed
def test_per_sample_gradients(how: dict[str, Any]) -> None:
    states, matrix = leaf(3, 2).detach(), leaf(2, 2, seed=1).detach()
    per_sample = torch.func.vmap(torch.func.grad(final, argnums=1), in_dims=(0, None, None))
    got = per_sample(states, matrix, how)
    same([got], [torch.stack([torch.func.grad(final, argnums=1)(y, matrix, how) for y in states])])


def test_vmap_over_an_iteration_whose_end_it_hides_warns_of_nothing() -> None:
    """All iterations are made, and slopes of earlier steps are kept."""
    t = torch.linspace(0.0, 1.0, 30, dtype=F64)
    y0 = torch.linspace(0.1, 1.2, 6, dtype=F64).reshape(3, 2)

    def final(y: Tensor) -> Tensor:
        return ctorch.solve_ode(
            lambda t, y: torch.sin(y) + t, y, t, method="implicit_adams", rtol=1e-4, atol=1e-4,
            options={"max_iters": 8},
        ).y[-1]  # fmt: skip

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = torch.func.vmap(final)(y0)
    torch.testing.assert_close(got, torch.stack([final(y) for y in y0]), rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("how", ADAPTIVE.values(), ids=list(ADAPTIVE))
def test_vmap_over_an_adaptive_solve_is_refused_with_advice(how: dict[str, Any]) -> None:
    states, matrix = leaf(3, 2).detach(), leaf(2, 2, seed=1).detach()
    with pytest.raises(RuntimeError, match="batched=True"):
        torch.func.vmap(lambda y: final(y, matrix, how))(states)


@every_fixed
def test_jacobians_and_hessians(how: dict[str, Any]) -> None:
    y0, matrix = leaf(2).detach(), leaf(2, 2, seed=1).detach()
    forward = torch.func.jacfwd(final)(y0, matrix, how)
    reverse = torch.func.jacrev(final)(y0, matrix, how)
    same([forward], [reverse])
    hessian = torch.func.hessian(final)(y0, matrix, how)

    def slope(i: int) -> Tensor:
        return torch.func.grad(final)(y0, matrix, how)[i]

    same(
        [hessian[i] for i in range(2)],
        [differences(lambda i=i: slope(i), y0) for i in range(2)],
        1e-7,
    )


@pytest.mark.parametrize("how", ADAPTIVE.values(), ids=list(ADAPTIVE))
def test_nested_grad_over_adaptive_solves(how: dict[str, Any]) -> None:
    matrix = leaf(2, 2, seed=1).detach()
    y0, v = leaf(2), leaf(2, seed=5).detach()

    def slope(y: Tensor) -> Tensor:
        return (torch.func.grad(final)(y, matrix, how) * v).sum()

    twice = torch.func.grad(slope)(y0.detach())
    (first,) = torch.autograd.grad(final(y0, matrix, how), y0, create_graph=True)
    (second,) = torch.autograd.grad((first * v).sum(), y0)
    same([twice], [second], 1e-10)


def test_grad_in_the_times() -> None:
    net, y0 = Net(), leaf(2).detach()

    def loss(t: Tensor) -> Tensor:
        return ctorch.solve_ode(net, y0, t, options=frozen(0.21)).y.square().sum()

    t = times(0.0, 0.4, 0.9, grad=True)
    same([torch.func.grad(loss)(t.detach())], [torch.autograd.grad(loss(t), t)[0]])


def test_the_continuous_adjoint_under_a_transform_is_exact_instead() -> None:
    net, y0 = Net(), leaf(2).detach()

    def loss(y: Tensor, gradient: str) -> Tensor:
        return ctorch.solve_ode(net, y, T, gradient=gradient, options=frozen(0.2)).y.sum()

    same([torch.func.grad(loss)(y0, "adjoint")], [torch.func.grad(loss)(y0, "backprop")])


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_a_compiled_field(gradient: str) -> None:
    net, y0 = Net(), leaf(2)
    compiled = torch.compile(net, backend="aot_eager")
    results = []
    for field in (net, compiled):
        y = ctorch.solve_ode(field, y0, T, gradient=gradient, options=frozen(0.3)).y
        results.append((y, *torch.autograd.grad(y.sum(), [y0, *net.parameters()])))
    same(*results, 1e-10)


class Model(nn.Module):
    """Layers around a solve."""

    def __init__(self) -> None:
        super().__init__()
        self.field = Net()
        self.read = nn.Linear(2, 1, dtype=F64)

    def forward(self, x: Tensor) -> Tensor:
        y = ctorch.solve_ode(self.field, torch.sin(x), T, options=frozen(0.3)).y
        return self.read(torch.tanh(y[-1])) * 2


def test_a_compiled_model_that_contains_a_solve() -> None:
    model, x = Model(), leaf(3, 2)
    results = []
    for call in (model, torch.compile(model, backend="aot_eager")):
        out = call(x)
        results.append((out, *torch.autograd.grad(out.sum(), [x, *model.parameters()])))
    same(*results, 1e-10)


@pytest.mark.parametrize("method", ["dopri5", "rk4", "implicit_adams"])
def test_dual_times_without_torch_func(method: str) -> None:
    """A tangent of t reaches the solution in forward mode as it does in reverse mode."""
    y0 = torch.tensor([0.5, -0.3], dtype=torch.float64)
    t = torch.linspace(0.0, 1.0, 9, dtype=torch.float64)
    tangent = torch.linspace(0.3, -1.0, 9, dtype=torch.float64)

    def last(t: Tensor) -> Tensor:
        solution = ctorch.solve_ode(
            lambda t, y: torch.sin(y) * (1 + t), y0, t, method=method, gradient="backprop"
        )
        return solution.y[-1].sum()

    with torch.autograd.forward_ad.dual_level():
        dual = last(torch.autograd.forward_ad.make_dual(t, tangent))
        forward = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert forward is not None
    leaf_t = t.clone().requires_grad_()
    (reverse,) = torch.autograd.grad(last(leaf_t), leaf_t)
    torch.testing.assert_close(forward, reverse @ tangent, rtol=1e-9, atol=1e-9)


def test_batched_solves_refuse_dual_numbers() -> None:
    y0 = torch.ones(2, 1, dtype=torch.float64)
    t = torch.tensor([0.0, 1.0], dtype=torch.float64)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(y0, y0)
        with pytest.raises(NotImplementedError, match="batched=True"):
            ctorch.solve_ode(lambda t, y: -y, dual, t, batched=True)


def test_nothing_made_under_a_transform_outlives_it() -> None:
    """A process whose first solve runs under a transform can solve afterwards."""
    code = (
        "import torch, ctorch\n"
        "t = torch.tensor([0.0, 1.0])\n"
        "f = lambda y: ctorch.solve_ode(lambda t, y: -y, y, t).y.sum()\n"
        "print(torch.func.grad(f)(torch.ones(2)).sum().item(), f(torch.ones(2)).item())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    whole = 2 + 2 * math.exp(-1)  # both: the solve is linear
    assert [float(x) for x in done.stdout.split()] == pytest.approx([whole, whole], rel=1e-5)
