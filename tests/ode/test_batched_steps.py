"""Batched solves: every sample as if it were solved alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import ctorch
from ctorch.ode import Status, StepController

F64 = torch.float64
METHODS = ["dopri5", "tsit5", "bosh3", "vern7"]  # vern7: late last stage, interpolant of its own
B = 5


def van_der_pol(mu: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """Not autonomous, so that times count; mu [B, 1]."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        p, q = y[:, :1], y[:, 1:]
        return torch.cat([q, mu * (1 - p * p) * q - p], 1) * torch.cos(0.3 * t)

    return field


def problem() -> tuple[Tensor, Tensor]:
    mu = torch.logspace(-0.3, 0.9, B, dtype=F64).unsqueeze(1)
    return mu, torch.tensor([[2.0, 0.0]], dtype=F64).repeat(B, 1)


def alone(mu: Tensor, y0: Tensor, t: Tensor, **settings: Any) -> list[Any]:
    """A solve for every sample, with the controller that a batched solve has by default."""
    settings = {"controller": "pi", **settings}
    rows = t if t.dim() == 2 else t.expand(len(y0), -1)
    return [
        ctorch.solve_ode(van_der_pol(mu[i : i + 1]), y0[i : i + 1], rows[i], **settings)
        for i in range(len(y0))
    ]


def assert_as_alone(sol: Any, solutions: list[Any], tol: float = 1e-10) -> None:
    assert_close(sol.y, torch.stack([s.y[:, 0] for s in solutions]), rtol=tol, atol=tol)
    assert sol.stats.accepted.tolist() == [s.stats.accepted for s in solutions]
    assert sol.stats.rejected.tolist() == [s.stats.rejected for s in solutions]


@pytest.mark.parametrize("method", METHODS)
def test_every_sample_is_solved_as_if_alone(method: str) -> None:
    mu, y0 = problem()
    t = torch.tensor([0.0, 0.5, 0.5, 2.0, 6.0], dtype=F64)
    sol = ctorch.solve_ode(van_der_pol(mu), y0, t, method=method, batched=True)
    assert (sol.status == Status.SUCCESS).all()
    assert_as_alone(sol, alone(mu, y0, t, method=method))
    assert sol.stats.accepted.unique().numel() > 1  # they did step on their own


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
@pytest.mark.parametrize("method", ["dopri5", "vern7"])
def test_gradients_are_those_of_separate_solves(method: str, gradient: str) -> None:
    mu, y0 = problem()
    t = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    inputs = [x.requires_grad_() for x in (mu, y0, t)]
    settings: dict[str, Any] = {"method": method, "gradient": gradient}
    batched = ctorch.solve_ode(van_der_pol(mu), y0, t, batched=True, **settings).y
    separate = torch.stack([s.y[:, 0] for s in alone(mu, y0, t, **settings)])
    weight = torch.linspace(-1, 1, batched.numel(), dtype=F64).view_as(batched)
    expected = torch.autograd.grad((separate * weight).sum(), inputs)
    for create_graph in (False, True):  # the sweep, then the steps made again
        grads = torch.autograd.grad(
            (batched * weight).sum(), inputs, retain_graph=True, create_graph=create_graph
        )
        for actual, want in zip(grads, expected, strict=True):
            assert_close(actual, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "vern7"])
def test_gradients_of_steps_that_end_on_a_jump_are_those_of_the_steps_taken(
    method: str, create_graph: bool
) -> None:
    # the slope that a step takes over from the one before was evaluated just before the jump
    t = torch.tensor([[0.0, 2.0], [2.0, 0.0], [0.5, 1.75]], dtype=F64)
    y0 = torch.ones(3, 1, dtype=F64)
    p = torch.tensor([1.0, 1.0], dtype=F64, requires_grad=True)

    def solve(p: Tensor, gradient: str) -> Tensor:
        def field(t: Tensor, y: Tensor) -> Tensor:
            return torch.where(t < 1, p[0], 3 * p[1]) * y

        steps = {"dt0": 0.25, "options": {"min_step": 0.25, "max_step": 0.25}}
        sol = ctorch.solve_ode(
            field, y0, t, method=method, batched=True, gradient=gradient, **steps
        )
        return sol.y[:, -1].sum()

    loss = solve(p, "checkpoint")
    (grad,) = torch.autograd.grad(loss, p, create_graph=create_graph)
    eye = 1e-5 * torch.eye(2, dtype=F64)
    for i, e in enumerate(eye):
        change = (solve(p.detach() + e, "none") - solve(p.detach() - e, "none")) / 2e-5
        assert_close(grad[i], change, rtol=1e-7, atol=0)


def test_times_of_their_own_with_directions_and_padding() -> None:
    mu, y0 = problem()
    t = torch.tensor(
        [[0, 1, 2, 3.0], [0, -1, -2, -2], [1, 1, 2, 2], [3, 2, 1, 0.5], [0, 0, 0, 0]], dtype=F64
    )
    inputs = [x.requires_grad_() for x in (mu, y0, t)]
    sol = ctorch.solve_ode(van_der_pol(mu), y0, t, batched=True)
    assert (sol.status == Status.SUCCESS).all()
    assert_as_alone(sol, alone(mu, y0, t))
    assert torch.equal(sol.y[4], y0[4].expand(4, 2))  # nowhere to go: y0 itself
    separate = torch.stack([s.y[:, 0] for s in alone(mu, y0, t)])
    grads = torch.autograd.grad(sol.y.square().sum(), inputs)
    expected = torch.autograd.grad(separate.square().sum(), inputs)
    for actual, want in zip(grads, expected, strict=True):
        assert_close(actual, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(
    "settings",
    [
        {"controller": "i"},
        {"controller": "pid"},
        {"controller": StepController(never_shrinks=True)},
        {"dt0": 0.05},
        {"options": {"max_step": 0.07}},
        {"options": {"min_step": 0.02}, "rtol": 1e-9, "atol": 1e-9},
    ],
    ids=str,
)
def test_settings_act_on_every_sample(settings: dict[str, Any]) -> None:
    mu, y0 = problem()
    t = torch.tensor([0.0, 1.0, 4.0], dtype=F64)
    sol = ctorch.solve_ode(van_der_pol(mu), y0, t, batched=True, **settings)
    assert_as_alone(sol, alone(mu, y0, t, **settings))
    default = ctorch.solve_ode(van_der_pol(mu), y0, t, batched=True)
    assert default.stats.steps.tolist() != sol.stats.steps.tolist()


def with_nan(mu: Tensor, sample: int, after: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Van der Pol's field, NaN for one sample beyond a time."""
    field, bad = van_der_pol(mu), torch.zeros(B, 1, dtype=torch.bool)
    bad[sample] = True
    return lambda t, y: torch.where(bad & (t > after), math.nan, field(t, y))


def test_a_sample_that_fails_disturbs_no_other() -> None:
    """And its rows that were not reached are NaN, never something else."""
    mu, y0 = problem()
    t = torch.tensor([0.0, 0.5, 2.0, 3.0], dtype=F64)
    sol = ctorch.solve_ode(with_nan(mu, 1, 1.0), y0, t, batched=True, throw=False)
    whole = ctorch.solve_ode(van_der_pol(mu), y0, t, batched=True)
    others = [0, 2, 3, 4]
    assert torch.equal(sol.y[others], whole.y[others])
    assert torch.equal(sol.stats.accepted[others], whole.stats.accepted[others])
    assert torch.equal(sol.y[1, :2], whole.y[1, :2])
    assert sol.y[1, 2:].isnan().all()
    assert sol.status.tolist() == [0, Status.NONFINITE, 0, 0, 0]
    assert "sample 1" in sol.message
    assert "t=1" in sol.message


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradients_of_the_others_survive_a_failure(gradient: str) -> None:
    mu, y0 = problem()
    t = torch.tensor([0.0, 0.5, 2.0], dtype=F64)
    y0.requires_grad_()
    grads: list[Tensor] = []
    for field in (with_nan(mu, 1, 1.0), van_der_pol(mu)):
        sol = ctorch.solve_ode(field, y0, t, batched=True, throw=False, gradient=gradient)
        grads += torch.autograd.grad(sol.y[[0, 2, 3, 4]].sum(), y0)
    assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-12)


def test_max_steps_returns_nothing_beyond_what_was_reached() -> None:
    mu, y0 = problem()
    t = torch.tensor([0.0, 0.5, 6.0], dtype=F64)
    whole = ctorch.solve_ode(van_der_pol(mu), y0, t, batched=True)
    limit = int(whole.stats.steps.min())
    sol = ctorch.solve_ode(van_der_pol(mu), y0, t, batched=True, max_steps=limit, throw=False)
    done = whole.stats.steps == limit
    assert done.any()
    assert not done.all()
    assert torch.equal(sol.status, torch.where(done, Status.SUCCESS, Status.MAX_STEPS))
    assert torch.equal(sol.y[done], whole.y[done])
    assert sol.y[~done, -1].isnan().all()
    assert (sol.stats.steps == limit).all()
    with pytest.raises(ctorch.SolveError, match="max_steps"):
        ctorch.solve_ode(van_der_pol(mu), y0, t, batched=True, max_steps=limit)


@pytest.mark.parametrize("direction", [1.0, -1.0])
def test_last_rows_are_the_same_with_and_without_rows_between(direction: float) -> None:
    """A solve that asks for no states between reads all last ones when it is done."""
    mu, y0 = problem()
    ends = torch.tensor([1.0, 3.0, 0.0, 2.0, 3.0], dtype=F64)
    t = direction * torch.stack([torch.zeros(B, dtype=F64), 0.3 * ends, ends, ends], 1)
    field = with_nan(direction * mu, 1, 1.0 if direction > 0 else -9.0)

    def solve(t: Tensor, limit: int | None = None) -> tuple[Tensor, Tensor]:
        sol = ctorch.solve_ode(
            field, y0, t, batched=True, gradient="none", throw=False, max_steps=limit
        )
        return sol.y, sol.status

    for limit in (None, 12):
        whole, fates = solve(t, limit)
        rows, status = solve(t[:, [0, 2, 3]], limit)
        assert torch.equal(status, fates)
        assert status.any()
        assert not status.all()
        assert torch.equal(rows.nan_to_num(), whole[:, [0, 2, 3]].nan_to_num())
        assert torch.equal(rows[:, 1:].isnan().flatten(1).any(1), status != 0)


def test_a_blow_up_is_a_failure_of_its_sample_alone() -> None:
    y0 = torch.tensor([[0.1], [1.0], [-1.0]], dtype=F64)
    t = torch.tensor([0.0, 2.0], dtype=F64)
    sol = ctorch.solve_ode(lambda t, y: y * y, y0, t, batched=True, throw=False)
    assert sol.status[1] != Status.SUCCESS
    assert sol.status[[0, 2]].tolist() == [0, 0]
    exact = y0 / (1 - 2 * y0)
    assert_close(sol.y[[0, 2], 1], exact[[0, 2]], rtol=1e-5, atol=1e-5)


def test_complex_states_and_pytrees_step_as_their_parts() -> None:
    _, y0 = problem()
    t = torch.tensor([0.0, 1.0, 3.0], dtype=F64)
    z0 = torch.complex(y0, y0.flip(0) + 1)
    rate = torch.arange(1, B + 1, dtype=F64).unsqueeze(1)
    sol = ctorch.solve_ode(lambda t, z: 1j * rate * z, z0, t, batched=True)
    exact = z0.unsqueeze(1) * torch.exp(1j * rate.unsqueeze(1) * t.view(1, -1, 1))
    assert_close(sol.y, exact, rtol=1e-4, atol=1e-4)
    pair = ctorch.solve_ode(
        lambda t, s: {"a": s["b"] * rate, "b": -s["a"] * rate},
        {"a": y0, "b": y0 + 1},
        t,
        batched=True,
    )
    assert pair.y["a"].shape == (B, 3, 2)
    angle = rate.unsqueeze(1) * t.view(1, -1, 1)
    expected = y0.unsqueeze(1) * angle.cos() + (y0 + 1).unsqueeze(1) * angle.sin()
    assert_close(pair.y["a"], expected, rtol=1e-4, atol=1e-4)


def test_an_empty_batch_has_empty_rows() -> None:
    t = torch.tensor([0.0, 1.0])
    sol = ctorch.solve_ode(lambda t, y: -y * t, torch.zeros(0, 2), t, batched=True)
    assert sol.y.shape == (0, 2, 2)
    assert sol.status.shape == (0,)


def test_own_norm_and_float32() -> None:
    mu, y0 = problem()
    t = torch.tensor([0.0, 3.0])
    seen = []

    def norm(y: Tensor) -> Tensor:
        seen.append(y.shape)
        return y.abs().amax(1)

    options = {"norm": norm}
    sol = ctorch.solve_ode(
        van_der_pol(mu.float()), y0.float(), t, batched=True, rtol=1e-4, options=options
    )
    precise = ctorch.solve_ode(van_der_pol(mu), y0, t.double(), batched=True, rtol=1e-9, atol=1e-9)
    assert set(seen) == {(B, 2)}
    assert sol.y.dtype == torch.float32
    assert_close(sol.y.double(), precise.y, rtol=2e-2, atol=2e-2)


def test_evaluations_no_more_than_torchodes() -> None:
    to = pytest.importorskip("torchode")
    mu = torch.logspace(math.log10(0.5), math.log10(50), 32, dtype=F64).unsqueeze(1)
    y0 = torch.tensor([[2.0, 0.0]], dtype=F64).repeat(32, 1)
    calls = [0]

    def field(t: Tensor, y: Tensor) -> Tensor:
        calls[0] += 1
        p, q = y[:, :1], y[:, 1:]
        return torch.cat([q, mu * (1 - p * p) * q - p], 1)

    t = torch.tensor([0.0, 5.0], dtype=F64)
    with torch.no_grad():
        ours = ctorch.solve_ode(field, y0, t, rtol=1e-6, atol=1e-6, batched=True)
        assert calls[0] == ours.stats.nfe
        calls[0] = 0
        term = to.ODETerm(field)
        controller = to.IntegralController(atol=1e-6, rtol=1e-6, term=term)
        solver = to.AutoDiffAdjoint(to.Dopri5(term=term), controller)
        ends = [torch.full((32,), x, dtype=F64) for x in (0.0, 5.0)]
        solver.solve(to.InitialValueProblem(y0=y0, t_start=ends[0], t_end=ends[1]))
    assert ours.stats.nfe <= calls[0]
