"""Penalties integrated beside the state: values, gradients, and what they compose with."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch import solve_ode
from ctorch.nn import NeuralODE
from ctorch.ode import regularizers

from .problems import F64

T = torch.tensor([0.0, 1.0], dtype=F64)
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


class Field(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        return self.net(torch.cat([y, t.expand(len(y), 1)], -1))


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_the_penalty_is_the_integral_of_the_squared_derivative(order: int) -> None:
    """y = y0 exp(-w t): the derivative is (-w)^K y."""
    y0 = torch.tensor([[1.0, 2.0], [0.5, 0.0], [3.0, 1.0]], dtype=F64)
    w = 1.5
    sol, penalty = regularizers.taylor(order).solve(lambda t, y: -w * y, y0, T, **TIGHT)
    exact = y0.square().mean(-1) * w ** (2 * order) * (1 - math.exp(-2 * w)) / (2 * w)
    torch.testing.assert_close(penalty, exact, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(sol.y[-1], y0 * math.exp(-w), rtol=1e-8, atol=1e-9)


def test_the_derivative_is_the_total_one_in_time_too() -> None:
    _, penalty = regularizers.taylor(2).solve(
        lambda t, y: t**2 + 0 * y, torch.zeros(1, 1, dtype=F64), T, **TIGHT
    )
    torch.testing.assert_close(penalty, torch.tensor([4 / 3], dtype=F64))  # of (2 t)^2


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_the_gradient_is_that_of_the_penalty(gradient: str) -> None:
    field, y0 = Field(), torch.randn(4, 3, dtype=F64)
    params = list(field.parameters())

    def penalty() -> Tensor:
        reg = regularizers.taylor(3)
        return reg.solve(field, y0, T, gradient=gradient, **TIGHT)[1].mean()

    grads = torch.autograd.grad(penalty(), params)
    for p, g in zip(params, grads, strict=True):
        direction = torch.randn_like(p)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * 1e-5 * direction)
                ends.append(penalty())
                p.sub_(sign * 1e-5 * direction)
        difference = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close((g * direction).sum(), difference, rtol=1e-5, atol=1e-9)


def test_the_penalty_does_not_steer_the_steps() -> None:
    def bend(t: Tensor, y: Tensor) -> Tensor:
        return torch.sin(6 * t) * y

    y0 = torch.ones(2, 3, dtype=F64)
    plain = solve_ode(bend, y0, T)
    sol, penalty = regularizers.taylor(3).solve(bend, y0, T)
    assert sol.stats.accepted == plain.stats.accepted
    torch.testing.assert_close(sol.y, plain.y, rtol=1e-12, atol=0)
    reg = regularizers.taylor(3)  # by hand it is a part of the state like any other
    whole = solve_ode(reg(bend), reg.start(y0), T)
    assert whole.stats.accepted > plain.stats.accepted
    torch.testing.assert_close(penalty, whole.y[1][-1], rtol=1e-2, atol=0)


def test_it_composes_with_every_interface() -> None:
    field, y0, reg = Field(), torch.randn(4, 3, dtype=F64), regularizers.taylor(2)
    _, expected = reg.solve(field, y0, T, **TIGHT)
    model = NeuralODE(reg(field), T, **TIGHT)
    assert {id(p) for p in model.parameters()} == {id(p) for p in field.parameters()}
    found = [
        model(reg.start(y0))[1][-1],
        ctorch.odeint(reg(field), reg.start(y0), T, **TIGHT)[1][-1],
        ctorch.odeint_adjoint(reg(field), reg.start(y0), T, **TIGHT)[1][-1],
    ]
    for other in found:
        torch.testing.assert_close(other, expected, rtol=1e-7, atol=1e-10)


def test_batched_solves_dense_output_and_arguments_are_passed_on() -> None:
    y0 = torch.randn(4, 3, dtype=F64)
    reg = regularizers.taylor(2)

    def func(t: Tensor, y: Tensor, w: float) -> Tensor:
        return torch.sin(w * y)

    sol, expected = reg.solve(func, y0, T, args=(2.0,), dense=True, **TIGHT)
    torch.testing.assert_close(sol(T), sol.y, rtol=1e-9, atol=1e-9)
    batched, penalty = reg.solve(func, y0, T, args=(2.0,), batched=True, **TIGHT)
    torch.testing.assert_close(penalty, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(batched.y[:, -1], sol.y[-1], rtol=1e-8, atol=1e-8)


def test_a_pytree_counts_all_its_elements_and_a_state_without_batch_is_one_sample() -> None:
    y0 = torch.randn(2, 4, dtype=F64)
    reg = regularizers.taylor(2)
    _, whole = reg.solve(lambda t, y: torch.sin(y), y0, T, **TIGHT)
    _, parts = reg.solve(
        lambda t, y: [x.sin() for x in y], [y0[:, :1], y0[:, 1:].reshape(2, 3, 1)], T, **TIGHT
    )
    torch.testing.assert_close(parts, whole, rtol=1e-8, atol=1e-10)
    single = regularizers.taylor(2, batch_dims=0)
    _, alone = single.solve(lambda t, y: torch.sin(y), y0[0], T, **TIGHT)
    assert alone.shape == ()
    torch.testing.assert_close(alone, whole[0], rtol=1e-7, atol=1e-9)


def test_kinetic_energy_is_the_first_derivative() -> None:
    field, y0 = Field(), torch.randn(4, 3, dtype=F64)
    _, kinetic = regularizers.kinetic().solve(field, y0, T, **TIGHT)
    _, first = regularizers.taylor(1).solve(field, y0, T, **TIGHT)
    torch.testing.assert_close(kinetic, first, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_the_jacobian_penalty_is_right_on_average(gradient: str) -> None:
    a = torch.randn(3, 3, dtype=F64, requires_grad=True)
    y0 = torch.randn(4000, 3, dtype=F64)
    _, penalty = regularizers.jacobian().solve(
        lambda t, y: y @ a.T, y0, T, gradient=gradient, rtol=1e-3, atol=1e-3
    )
    assert bool((penalty[0] - penalty[1]).abs() > 1e-6)  # every sample has a probe of its own
    exact = a.square().sum() / 3
    deviation = (penalty.std() / math.sqrt(4000)).item()
    assert abs(penalty.mean().item() - exact.item()) < 5 * deviation
    (slope,) = torch.autograd.grad(penalty.mean(), a)
    torch.testing.assert_close(slope, 2 * a.detach() / 3, rtol=0.2, atol=0.1)


def test_the_jacobian_s_probe_stays_the_same_along_a_path_and_changes_between_solves() -> None:
    a = torch.randn(3, 3, dtype=F64)
    reg, y0 = regularizers.jacobian(), torch.randn(5, 3, dtype=F64)
    sol, once = reg.solve(lambda t, y: y @ a, y0, T, **TIGHT)
    assert sol.stats.rejected == 0  # a constant integrand
    _, again = reg.solve(lambda t, y: y @ a, y0, T, **TIGHT)
    assert not torch.allclose(once, again)


@pytest.mark.parametrize(("order", "error"), [(0, ValueError), (1.0, TypeError), (True, TypeError)])
def test_a_wrong_order_is_named(order: Any, error: type) -> None:
    with pytest.raises(error, match="order"):
        regularizers.taylor(order)


def test_a_taylor_solve_of_a_taylor_penalty_is_refused() -> None:
    with pytest.raises(TypeError, match="do not nest"):
        regularizers.taylor(2).solve(lambda t, y: -y, torch.ones(2, 2), T, method="taylor")


def test_training_with_it_makes_the_solution_cheaper() -> None:
    """The paper's first figure: y(1) = y0 + y0^3 by a path with fewer bends."""
    y0 = torch.linspace(-1, 1, 32, dtype=F64)[:, None]
    evaluations = []
    for weight in (0.0, 1e-1):
        torch.manual_seed(0)
        field = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1)).double()
        with torch.no_grad():
            field[0].weight.mul_(6)
            field[2].weight.mul_(3)

        def func(t: Tensor, y: Tensor, field: nn.Module = field) -> Tensor:
            return field(torch.cat([y, t.expand(len(y), 1)], 1))

        optimizer = torch.optim.Adam(field.parameters(), 0.02)
        for _ in range(60):
            sol, penalty = regularizers.taylor(3).solve(
                func, y0, T, method="rk4", dt0=0.34, gradient="backprop"
            )
            loss = (sol.y[-1] - y0 - y0**3).square().mean() + weight * penalty.mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad():
            sol = solve_ode(func, y0, T, rtol=1e-6, atol=1e-6)
        assert float((sol.y[-1] - y0 - y0**3).square().mean()) < 0.05
        evaluations.append(sol.stats.nfe)
    assert evaluations[1] < 0.8 * evaluations[0]


def test_penalties_are_positive_backward_in_time_too():
    reg = ctorch.ode.regularizers.taylor(order=2)
    f = lambda t, y: -y * y  # noqa: E731
    t, y0 = torch.tensor([0.0, 1.0], dtype=torch.float64), torch.full((3, 2), 0.4).double()
    sol, penalty = reg.solve(f, y0, t, rtol=1e-10, atol=1e-10)
    _, back = reg.solve(f, sol.y[-1], t.flip(0), rtol=1e-10, atol=1e-10)
    assert (penalty > 0).all()
    torch.testing.assert_close(back, penalty)


def test_an_empty_batch_has_no_penalties():
    reg = ctorch.ode.regularizers.taylor(order=2)
    sol, penalty = reg.solve(lambda t, y: -y, torch.zeros(0, 2), torch.tensor([0.0, 1.0]))
    assert sol.y.shape == (2, 0, 2)
    assert penalty.shape == (0,)
