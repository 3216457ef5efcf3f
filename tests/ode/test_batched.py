"""batched=True: every sample is solved as if alone, with one evaluation of the field for all."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch.ode import TABLEAUS, Status

from .problems import F64, Net, differences, frozen, leaf, same, times

ADAPTIVE = [name for name, tableau in TABLEAUS.items() if tableau.adaptive]
T = times(0.0, 0.7, 2.0)
every_mode = pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])


class Springs(nn.Module):
    """Springs of very different stiffness: their steps differ."""

    def __init__(self) -> None:
        super().__init__()
        self.stiffness = nn.Parameter(torch.tensor([1.0, 9.0, 60.0], dtype=F64)[:, None])

    def forward(self, t: Tensor, y: Tensor, only: int | None = None) -> Tensor:
        k = self.stiffness if only is None else self.stiffness[only]
        force = -k * torch.sin(y[..., :1]) + torch.cos(3 * t)
        return torch.cat([y[..., 1:], force], -1)


def alone(field: Springs, y0: Tensor, t: Tensor, index: int, **how: Any) -> Any:
    return ctorch.solve_ode(lambda s, y: field(s, y, index), y0[index], t, **how)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ADAPTIVE)
def test_every_sample_steps_as_if_it_were_alone(method: str, reverse: bool) -> None:
    field, y0 = Springs(), leaf(3, 2, scale=1.0).detach()
    t = T.flip(0) if reverse else T
    tol = 1e-3 if method in ("adaptive_heun", "fehlberg2") else 1e-6
    how: dict[str, Any] = {
        "method": method,
        "rtol": tol,
        "atol": tol,
        "gradient": "none",
        "controller": "i",
    }
    sol = ctorch.solve_ode(field, y0, t, batched=True, **how)
    assert sol.y.shape == (3, 3, 2)
    assert sol.status.tolist() == [Status.SUCCESS] * 3
    for i in range(3):
        one = alone(field, y0, t, i, **how)
        torch.testing.assert_close(sol.y[i], one.y, rtol=1e-10, atol=1e-10)
        assert int(sol.stats.accepted[i]) == one.stats.accepted
        assert int(sol.stats.rejected[i]) == one.stats.rejected
    assert len(set(sol.stats.accepted.tolist())) > 1, "the samples do not need different steps"


@every_mode
def test_own_times_for_every_sample(gradient: str) -> None:
    field, y0 = Springs(), leaf(3, 2)
    t = torch.stack([times(0.0, 0.5, 0.5), times(0.2, 0.9, 1.4), times(-1.0, 0.0, 2.0)])
    t.requires_grad_()
    how: dict[str, Any] = {"gradient": gradient, "rtol": 1e-8, "atol": 1e-8, "controller": "i"}
    sol = ctorch.solve_ode(field, y0, t, batched=True, **how)
    weights = torch.linspace(0.5, 1.5, 18, dtype=F64).reshape(3, 3, 2)
    wanted = [y0, t, field.stiffness]
    got = torch.autograd.grad((weights * sol.y).sum(), wanted)
    ones = [alone(field, y0, t[i], i, **how).y for i in range(3)]
    torch.testing.assert_close(sol.y, torch.stack(ones), rtol=1e-10, atol=1e-10)
    expected = torch.autograd.grad((weights * torch.stack(ones)).sum(), wanted)
    same(got, expected, 1e-9)


@every_mode
@pytest.mark.parametrize("method", ["bosh3", "dopri5", "vern7", "dopri8"])
def test_gradients_are_finite_differences(method: str, gradient: str) -> None:
    net, y0 = Net(hidden=3), leaf(2, 2)
    t = torch.stack([times(0.0, 0.33, 0.95), times(0.1, 0.55, 0.79)]).requires_grad_()

    def loss() -> Tensor:
        y = ctorch.solve_ode(
            net, y0, t, batched=True, method=method, gradient=gradient, options=frozen(0.17)
        ).y
        return (torch.arange(12, dtype=F64).reshape(2, 3, 2).cos() * y).sum()

    wanted = [y0, t, net.outer.weight]
    got = torch.autograd.grad(loss(), wanted)
    same(got, [differences(loss, x, 1e-4) for x in wanted], 1e-8)


@every_mode
def test_second_derivatives(gradient: str) -> None:
    y0, matrix = leaf(2, 2), leaf(2, 2, seed=1)
    t = torch.stack([times(0.0, 0.33, 0.95), times(0.1, 0.55, 0.79)]).requires_grad_()

    def outputs(y0: Tensor, matrix: Tensor, t: Tensor) -> Tensor:
        return ctorch.solve_ode(
            lambda s, y: torch.tanh(y @ matrix + s), y0, t, batched=True, gradient=gradient,
            options=frozen(0.27),
        ).y  # fmt: skip

    assert torch.autograd.gradgradcheck(outputs, (y0, matrix, t), atol=1e-6)


def test_time_has_a_shape_that_broadcasts_and_a_wrong_result_says_so() -> None:
    shapes = set()

    def field(t: Tensor, y: Tensor) -> Tensor:
        shapes.add((t.shape, t.dtype))
        return -y * t

    ctorch.solve_ode(field, torch.ones(4, 2, 3), T.float(), batched=True)
    assert shapes == {(torch.Size([4, 1, 1]), torch.float32)}
    shapes.clear()
    ctorch.solve_ode(field, torch.ones(4), T.float(), batched=True)
    assert shapes == {(torch.Size([4]), torch.float32)}
    with pytest.raises(ValueError, match=r"\[B, 1, \.\.\., 1\]"):
        ctorch.solve_ode(lambda t, y: -y * t[:, None], torch.ones(4, 2), T, batched=True)


@pytest.mark.parametrize("gradient", ["none", "backprop", "checkpoint"])
def test_one_bad_sample_leaves_the_others_alone(gradient: str) -> None:
    y0 = torch.tensor([[1.0], [0.2], [0.1]], dtype=F64, requires_grad=True)
    bad = torch.tensor([[0.0], [math.nan], [0.0]], dtype=F64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.where(t > 0.5, y**2 + bad, y**2)  # the first blows up at t = 1

    sol = ctorch.solve_ode(field, y0, T, batched=True, gradient=gradient, throw=False)
    statuses = [Status(int(s)) for s in sol.status]
    assert statuses[0] in (Status.STEP_UNDERFLOW, Status.NONFINITE)
    assert statuses[1:] == [Status.NONFINITE, Status.SUCCESS]
    assert torch.isfinite(sol.y[0, :2]).all()
    assert sol.y[0, 2].isnan().all()
    assert sol.y[1, 1:].isnan().all()
    torch.testing.assert_close(sol.y[2, :, 0], 0.1 / (1 - 0.1 * T), rtol=1e-5, atol=1e-5)
    if gradient != "none":
        (g,) = torch.autograd.grad(sol.y[2].sum() + sol.y[0, 1].sum(), y0)
        assert torch.isfinite(g[2]).all()
        exact = (1 / (1 - 0.1 * T) ** 2).sum()
        assert float(g[2]) == pytest.approx(float(exact), rel=1e-4)
        assert float(g[0]) == pytest.approx(1 / (1 - 0.7) ** 2, rel=1e-3)
    with pytest.raises(ctorch.SolveError, match="sample 0"):
        ctorch.solve_ode(field, y0, T, batched=True, gradient=gradient)


def test_max_steps_holds_for_each_sample() -> None:
    field, y0 = Springs(), leaf(3, 2)
    sol = ctorch.solve_ode(field, y0, times(0.0, 4.0), batched=True, max_steps=40, throw=False)
    assert int(sol.status[2]) == Status.MAX_STEPS
    assert int(sol.status[0]) == Status.SUCCESS
    assert torch.isfinite(sol.y[0]).all()
    assert sol.y[2, 1].isnan().all()


@every_mode
def test_pytrees_and_complex_states(gradient: str) -> None:
    a, b = leaf(3, 2), leaf(3, seed=1)

    def field(t: Tensor, y: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": -y["a"] * y["b"][:, None], "b": torch.cos(y["b"])}

    how: dict[str, Any] = {"gradient": gradient, "controller": "i"}
    sol = ctorch.solve_ode(field, {"a": a, "b": b}, T, batched=True, **how)
    assert sol.y["a"].shape == (3, 3, 2)
    assert sol.y["b"].shape == (3, 3)
    got = torch.autograd.grad(sol.y["a"].square().sum(), [a, b])
    one = [
        ctorch.solve_ode(
            lambda t, y: {"a": -y["a"] * y["b"], "b": torch.cos(y["b"])},
            {"a": a[i], "b": b[i]}, T, **how,
        ).y["a"]
        for i in range(3)
    ]  # fmt: skip
    torch.testing.assert_close(sol.y["a"], torch.stack(one), rtol=1e-10, atol=1e-10)
    same(got, torch.autograd.grad(torch.stack(one).square().sum(), [a, b]), 1e-9)
    z = ctorch.solve_ode(
        lambda t, y: 1j * y, a + 0j, T, batched=True, gradient=gradient, rtol=1e-8, atol=1e-8
    ).y
    torch.testing.assert_close(z[:, -1], a * torch.exp(2j * torch.ones(1)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"method": "rk4"}, NotImplementedError, "rk4"),
        ({"gradient": "adjoint"}, NotImplementedError, "checkpoint"),
        ({"events": lambda t, y: y}, NotImplementedError, "events"),
        ({"dense": True}, NotImplementedError, "dense"),
        ({"options": {"jump_t": [0.5]}}, NotImplementedError, "jump_t"),
        ({"t": T.expand(2, 3)}, ValueError, "2 rows for a batch of 3"),
        ({"t": torch.stack([T, T, T.flip(0)[[0, 2, 1]]])}, ValueError, "row 2"),
        ({"y0": torch.ones(())}, ValueError, "batched"),
        ({"y0": (torch.ones(2), torch.ones(3))}, ValueError, "batched"),
    ],
)
def test_what_is_refused_is_named(
    changes: dict[str, Any], kind: type[Exception], match: str
) -> None:
    arguments = {"y0": torch.ones(3, 1, dtype=F64), "t": T, **changes}
    y0, t = arguments.pop("y0"), arguments.pop("t")
    with pytest.raises(kind, match=match):
        ctorch.solve_ode(lambda t, y: -y, y0, t, batched=True, **arguments)


@pytest.mark.parametrize("size", [0, 1])
def test_small_batches_and_single_times(size: int) -> None:
    y0 = torch.ones(size, 2, dtype=F64)
    sol = ctorch.solve_ode(lambda t, y: -y, y0, T, batched=True)
    assert sol.y.shape == (size, 3, 2)
    torch.testing.assert_close(sol.y[:, -1], y0 * math.exp(-2), rtol=1e-5, atol=1e-5)
    one = ctorch.solve_ode(lambda t, y: -y, y0, T[:1], batched=True)
    assert torch.equal(one.y, y0[:, None])


def test_finished_samples_cost_no_evaluation_outside_their_interval() -> None:
    seen: list[Tensor] = []

    def field(t: Tensor, y: Tensor) -> Tensor:
        seen.append(t.reshape(-1))
        return torch.cos(8 * t) - y

    t = torch.stack([times(0.0, 0.1), times(0.0, 5.0)])
    ctorch.solve_ode(field, torch.ones(2, 1, dtype=F64), t, batched=True)
    every = torch.stack(seen)
    assert every.min() >= 0
    assert every[:, 0].max() <= 0.1
    assert every[:, 1].max() <= 5.0
