"""method="taylor" with batched=True: every sample as if alone, at the cost of one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.ode import Status

from .problems import F64, leaf, times
from .test_batched import Springs, alone

T = times(0.0, 0.7, 2.0)
EACH = torch.tensor([[0.0, 0.7, 2.0], [1.0, 0.5, -0.3], [0.2, 0.2, 0.9]], dtype=F64)


def solve(func: Any, y0: Any, t: Tensor = T, **how: Any) -> Any:
    how = {"gradient": "none", **how}
    return ctorch.solve_ode(func, y0, t, method="taylor", batched=True, **how)


@pytest.mark.parametrize("order", [None, 5])
@pytest.mark.parametrize("t", [T, T.flip(0), EACH], ids=["forward", "backward", "each its own"])
def test_every_sample_steps_as_if_it_were_alone(t: Tensor, order: int | None) -> None:
    field, y0 = Springs(), leaf(3, 2, scale=1.0).detach()
    how: dict[str, Any] = {"options": {"order": order}, "rtol": 1e-7, "atol": 1e-7}
    sol = solve(field, y0, t, **how)
    assert sol.y.shape == (3, 3, 2)
    assert sol.status.tolist() == [Status.SUCCESS] * 3
    for i in range(3):
        own = t if t.dim() == 1 else t[i]
        one = alone(field, y0, own, i, method="taylor", gradient="none", **how)
        torch.testing.assert_close(sol.y[i], one.y, rtol=1e-11, atol=1e-11)
        assert int(sol.stats.accepted[i]) == one.stats.accepted
        assert int(sol.stats.rejected[i]) == one.stats.rejected
    if t is not EACH:
        assert len(set(sol.stats.accepted.tolist())) > 1, "the samples do not need different steps"


def test_the_error_follows_the_tolerance() -> None:
    rates = torch.tensor([[0.5], [2.0], [8.0]], dtype=F64)
    y0 = torch.ones(3, 1, dtype=F64)
    worst = []
    for tol in (1e-4, 1e-7, 1e-10, 1e-13):
        sol = solve(lambda t, y: -rates * y * y * torch.cos(t), y0, rtol=tol, atol=tol)
        exact = 1 / (1 + rates * torch.sin(T))
        worst.append(float((sol.y[..., 0] - exact).abs().max()))
        assert worst[-1] < 20 * tol + 1e-14
    assert worst == sorted(worst, reverse=True)


@pytest.mark.parametrize("order", [3, 6])
def test_the_error_of_short_steps_shrinks_by_the_order(order: int) -> None:
    y0 = torch.tensor([[1.0], [0.5]], dtype=F64)
    exact = y0 / (1 + y0 * math.sin(0.7))
    errors = []
    for h in (0.1, 0.05):
        how = {"rtol": 1.0, "atol": 1.0, "options": {"order": order, "max_step": h}}
        sol = solve(lambda t, y: -y * y * torch.cos(t), y0, times(0.0, 0.7), **how)
        errors.append((sol.y[:, -1] - exact).abs())
    observed = torch.log2(errors[0] / errors[1])
    assert ((observed - order).abs() < 0.6).all()


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradients_of_first_and_second_order_are_those_of_another_method(gradient: str) -> None:
    """In the state, the times, the field's parameters and further arguments."""

    def loss(method: str, k: Tensor, y0: Tensor, t: Tensor, shift: Tensor) -> Tensor:
        sol = ctorch.solve_ode(
            lambda t, y, s: -k * torch.sin(y) + s * torch.cos(t), y0, t, method=method,
            batched=True, rtol=1e-12, atol=1e-12, gradient=gradient, args=(shift,),
        )  # fmt: skip
        return (sol.y[:, 1:] ** 2 * torch.arange(1, 3, dtype=F64)[:, None]).sum()

    found = []
    for method in ("taylor", "dopri8"):
        k = torch.tensor([[1.0], [4.0], [2.0]], dtype=F64, requires_grad=True)
        y0 = leaf(3, 2)
        t, shift = EACH.clone().requires_grad_(), torch.tensor(0.3, dtype=F64, requires_grad=True)
        t.data[2] = torch.tensor([0.2, 0.5, 0.9])  # without repeats
        inputs = (k, y0, t, shift)
        first = torch.autograd.grad(loss(method, *inputs), inputs, create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in first[:2]), (k, y0, shift))
        found.append([*first, *second])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_modules_train_and_checkpointing_gives_the_same_numbers() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    grads = []
    for gradient in ("backprop", "checkpoint"):
        sol = solve(lambda t, y: net(y), leaf(3, 2), gradient=gradient)
        grads.append(torch.autograd.grad(sol.y.sum(), net.parameters()))
        assert sol.stats.nfe_backward == (0 if gradient == "backprop" else sol.stats.nfe_backward)
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


def test_states_may_be_pytrees_or_complex() -> None:
    y0 = {"a": leaf(3, 2).detach(), "b": leaf(3).detach()}
    sol = solve(lambda t, y: {"a": y["a"] * t, "b": -y["b"]}, y0)
    torch.testing.assert_close(sol.y["b"], y0["b"][:, None] * torch.exp(-T), rtol=1e-5, atol=1e-6)
    grown = y0["a"][:, None] * torch.exp(T**2 / 2)[:, None]
    torch.testing.assert_close(sol.y["a"], grown, rtol=1e-5, atol=1e-6)
    z = torch.complex(leaf(3, 2).detach(), leaf(3, 2, scale=0.5).detach())
    sol = solve(lambda t, y: 1j * y, z)
    torch.testing.assert_close(sol.y, z[:, None] * torch.exp(1j * T)[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(0, 2), (3, 0), (2,)])
def test_degenerate_batches_are_served(shape: tuple[int, ...]) -> None:
    y0 = torch.ones(shape, dtype=F64)
    sol = solve(lambda t, y: -y, y0)
    want = torch.exp(-T).view(3, *[1] * (y0.dim() - 1)).expand(shape[0], 3, *shape[1:])
    torch.testing.assert_close(sol.y, want, rtol=1e-5, atol=1e-6)


def test_samples_fail_alone() -> None:
    y0 = torch.tensor([[1.0], [0.1], [math.nan]], dtype=F64)  # 1 / (1 / y0 - t)
    how: dict[str, Any] = {"throw": False, "max_steps": 500}
    sol = solve(lambda t, y: y * y, y0, **how)
    assert sol.status[1] == Status.SUCCESS
    assert (sol.status[[0, 2]] != Status.SUCCESS).all()
    torch.testing.assert_close(sol.y[1, :, 0], 1 / (10 - T), rtol=1e-5, atol=1e-6)
    assert sol.y[0, -1].isnan().all()
    with pytest.raises(ctorch.SolveError, match=r"sample 0.* 2 of 3"):
        solve(lambda t, y: y * y, y0, max_steps=500)


@pytest.mark.parametrize(
    "how",
    [
        {"options": {"step_size": 0.1}},
        {"options": {"jump_t": [0.5]}},
        {"dense": True},
        {"events": lambda t, y: y.sum()},
        {"gradient": "adjoint"},
    ],
)
def test_what_is_not_built_is_named(how: dict[str, Any]) -> None:
    with pytest.raises(NotImplementedError, match="batched=True"):
        solve(lambda t, y: -y, torch.ones(2, 1, dtype=F64), **how)


def test_a_field_that_returns_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="shape"):
        solve(lambda t, y: y[:1], torch.ones(2, 1, dtype=F64))
