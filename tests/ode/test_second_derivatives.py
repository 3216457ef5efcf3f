"""Second derivatives: exact under backprop and checkpoint, refused by the continuous adjoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch

from .problems import F64, Net, frozen, leaf, same, times

every_exact_mode = pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "odeint"])
HOWS: dict[str, dict[str, Any]] = {
    "dopri5": {"method": "dopri5", "options": frozen(0.21)},
    "tsit5 with jumps": {"method": "tsit5", "options": {**frozen(0.3), "jump_t": [0.5]}},
    "vern7": {"method": "vern7", "options": frozen(0.4)},
    "bosh3": {"method": "bosh3", "options": frozen(0.31)},
    "rk4": {"method": "rk4"},
    "midpoint": {"method": "midpoint", "options": {"step_size": 0.31}},
    "explicit_adams": {"method": "explicit_adams", "options": {"step_size": 0.21}},
}


def solve(gradient: str, func: Any, y0: Tensor, t: Tensor, **how: Any) -> Tensor:
    if gradient == "odeint":
        return ctorch.odeint(func, y0, t, **how)
    return ctorch.solve_ode(func, y0, t, gradient=gradient, **how).y


@every_exact_mode
@pytest.mark.parametrize("how", HOWS.values(), ids=list(HOWS))
def test_second_derivatives_pass_gradgradcheck(gradient: str, how: dict[str, Any]) -> None:
    if gradient == "odeint" and how["method"] == "vern7":
        pytest.skip("covered by dopri5: the same interpolation")
    matrix, y0, t = leaf(2, 2), leaf(2, seed=1), times(0.0, 0.33, 0.9, grad=True)

    def outputs(matrix: Tensor, y0: Tensor, t: Tensor) -> Tensor:
        # matrix is not a leaf here: gradients run through what it is computed from, once
        twisted = torch.sin(matrix)
        return solve(gradient, lambda s, y: torch.tanh(y @ twisted + s), y0, t, **how)

    assert torch.autograd.gradgradcheck(outputs, (matrix, y0, t), atol=1e-6)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_a_hessian_is_that_of_the_plain_path(gradient: str) -> None:
    """Differentiating through saved states would make it wrong by some 20 percent."""
    net, y0, t = Net(hidden=3), leaf(2), times(0.0, 1.5)

    def final(y0: Tensor, mode: str) -> Tensor:
        y = ctorch.solve_ode(net, y0, t, gradient=mode, options=frozen(0.2)).y
        return y[-1].square().sum()

    (first,) = torch.autograd.grad(final(y0, gradient), y0, create_graph=True)
    rows = [torch.autograd.grad(g, y0, retain_graph=True)[0] for g in first]
    expected = torch.func.hessian(lambda x: final(x, "none"))(y0.detach())
    same([torch.stack(rows)], [expected], 1e-11)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_third_derivatives_work(gradient: str) -> None:
    y0 = torch.tensor([0.5], dtype=F64, requires_grad=True)
    y = ctorch.solve_ode(
        lambda t, y: y * y, y0, times(0.0, 1.0), gradient=gradient, rtol=1e-11, atol=1e-11
    ).y[-1]
    # y = y0 / (1 - y0): derivatives k! / (1 - y0)^(k + 1)
    for k, expected in ((1, 4.0), (2, 16.0), (3, 96.0)):
        (y,) = torch.autograd.grad(y, y0, create_graph=True, grad_outputs=torch.ones_like(y))
        assert float(y.detach()) == pytest.approx(expected, rel=1e-7), k


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_a_gradient_penalty_trains_the_parameters(gradient: str) -> None:
    """d/dp of |dL/dy0|^2, against a plain loop."""
    net, y0 = Net(hidden=3), leaf(2)
    parameters = list(net.parameters())

    def penalty(y: Tensor) -> tuple[Tensor, ...]:
        (g,) = torch.autograd.grad(y.square().sum(), y0, create_graph=True)
        return torch.autograd.grad(g.square().sum(), parameters, allow_unused=True)

    y = ctorch.solve_ode(
        net, y0, times(0.0, 1.0), method="midpoint", options={"step_size": 0.25}, gradient=gradient
    ).y[-1]
    state = y0
    for i in range(4):
        s = torch.tensor(0.25 * i, dtype=F64)
        middle = state + 0.125 * net(s, state)
        state = state + 0.25 * net(s + 0.125, middle)
    got = [
        torch.zeros_like(p) if g is None else g for g, p in zip(penalty(y), parameters, strict=True)
    ]
    want = [
        torch.zeros_like(p) if g is None else g
        for g, p in zip(penalty(state), parameters, strict=True)
    ]
    same(got, want, 1e-12)


@every_exact_mode
def test_a_field_made_from_the_initial_state_and_the_times_is_counted_once(gradient: str) -> None:
    """The graphs of y0 and t reach into what the field holds: with create_graph as without."""
    y0, t = leaf(2), times(0.0, 0.9, grad=True)
    matrix = torch.outer(y0, y0.cos()) * t[-1]
    y = solve(gradient, lambda s, y: torch.tanh(y @ matrix), y0, t, options=frozen(0.2))
    once = torch.autograd.grad(y.sum(), [y0, t], retain_graph=True)
    twice = torch.autograd.grad(y.sum(), [y0, t], create_graph=True)
    same([g.detach() for g in twice], once)


@pytest.mark.parametrize("interface", ["odeint_adjoint", "solve_ode"])
def test_the_continuous_adjoint_refuses(interface: str) -> None:
    net, y0 = Net(), leaf(2)
    if interface == "solve_ode":
        y = ctorch.solve_ode(net, y0, times(0.0, 1.0), gradient="adjoint").y
    else:
        y = ctorch.odeint_adjoint(net, y0, times(0.0, 1.0))
    with pytest.raises(ctorch.GradientError, match="checkpoint"):
        torch.autograd.grad(y.sum(), y0, create_graph=True)


@every_exact_mode
def test_a_second_backward_under_retain_graph_gives_the_same(gradient: str) -> None:
    net, y0 = Net(), leaf(2)
    y = solve(gradient, net, y0, times(0.0, 1.0))
    wanted = [y0, *net.parameters()]
    first = torch.autograd.grad(y.sum(), wanted, retain_graph=True)
    other = torch.autograd.grad(y[-1, 0], wanted, retain_graph=True)
    second = torch.autograd.grad(y.sum(), wanted)
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first[0], other[0])
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), wanted)


def test_a_freed_adjoint_raises_too() -> None:
    net, y0 = Net(), leaf(2)
    y = ctorch.odeint_adjoint(net, y0, times(0.0, 1.0))
    torch.autograd.grad(y.sum(), y0, retain_graph=True)
    torch.autograd.grad(y.sum(), y0)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y.sum(), y0)


@every_exact_mode
def test_a_saved_tensor_changed_in_place_is_noticed(gradient: str) -> None:
    """An optimizer step between forward and backward would make recomputed stages wrong."""
    net, y0 = Net(), leaf(2)
    y = solve(gradient, net, y0, times(0.0, 1.0))
    with torch.no_grad():
        net.inner.weight.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        y.sum().backward()
