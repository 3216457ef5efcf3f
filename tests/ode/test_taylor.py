"""``method="taylor"``: order, accuracy, output, gradients and failures of the Taylor integrator."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import ctorch
from ctorch import SolveError, solve_ode
from ctorch.ode import ContinuousAdjoint, Event, Status
from ctorch.ode.taylor import TaylorLoop

from .problems import ALL, COUPLED, F64, OSCILLATOR, Known

both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])


def taylor(func: Any, y0: Any, t: Tensor, **how: Any) -> Any:
    return solve_ode(func, y0, t, method="taylor", **how)


def span(problem: Known, reverse: bool, count: int = 2) -> Tensor:
    ends = (problem.t1, problem.t0) if reverse else (problem.t0, problem.t1)
    return torch.linspace(*ends, count, dtype=F64)


def kepler(t: Tensor, y: Tensor) -> Tensor:
    q, v = y[:2], y[2:]
    return torch.cat([v, -q * (q * q).sum() ** -1.5])


def lorenz(t: Tensor, y: Tensor) -> Tensor:
    a, b, c = y.unbind()
    return torch.stack([10 * (b - a), a * (28 - c) - b, a * b - 8 / 3 * c])


# ---- accuracy


@both_ways
@pytest.mark.parametrize("order", range(1, 11))
def test_the_error_of_fixed_steps_shrinks_by_the_order(order: int, reverse: bool) -> None:
    t = span(OSCILLATOR, reverse)
    errors = []
    count = {1: 256, 2: 64, 3: 32}.get(order, 12 if order < 8 else 6)
    for steps in (count, 2 * count):
        options = {"order": order, "step_size": 3.0 / steps}
        y0 = OSCILLATOR.y0(float(t[0]))
        sol = taylor(OSCILLATOR.func, y0, t, options=options, gradient="none")
        assert sol.stats.accepted == steps
        assert sol.stats.nfe == order * steps
        errors.append(float((sol.y - OSCILLATOR.exact(t)).abs().max()))
    assert order - 0.8 < math.log2(errors[0] / errors[1]) < order + 1.5, errors


@both_ways
@pytest.mark.parametrize("name", ALL)
def test_the_error_follows_the_tolerance(name: str, reverse: bool) -> None:
    problem, t = ALL[name], span(ALL[name], reverse, 7)
    errors = []
    for tol in (1e-4, 1e-7, 1e-10, 1e-13):
        sol = taylor(problem.func, problem.y0(float(t[0])), t, rtol=tol, atol=tol, gradient="none")
        errors.append(float((sol.y - problem.exact(t)).abs().max()))
        assert errors[-1] < 100 * tol
        assert sol.stats.rejected == 0
    assert errors[0] > 1e-7  # tolerances are not merely met but made use of
    assert errors[2] > 1e-13


@pytest.mark.parametrize(("func", "y0", "end"), [
    (kepler, [0.5, 0.0, 0.0, math.sqrt(3.0)], 10.0),
    (lorenz, [1.0, 1.0, 20.0], 2.0),
], ids=["kepler", "lorenz"])  # fmt: skip
def test_orbits_agree_with_dop853_to_the_last_digits(func: Any, y0: Any, end: float) -> None:
    integrate = pytest.importorskip("scipy.integrate")
    t = torch.linspace(0.0, end, 9, dtype=F64)
    found = taylor(func, torch.tensor(y0, dtype=F64), t, rtol=1e-14, atol=1e-14, gradient="none")
    reference = integrate.solve_ivp(
        lambda t, y: func(t, torch.from_numpy(y)).numpy(), (0.0, end), y0, "DOP853", t.numpy(),
        rtol=1e-13, atol=1e-13,
    )  # fmt: skip
    torch.testing.assert_close(found.y, torch.from_numpy(reference.y.T), rtol=3e-11, atol=3e-11)


def test_energy_is_kept_to_rounding_over_many_orbits() -> None:
    y0 = torch.tensor([0.5, 0.0, 0.0, math.sqrt(3.0)], dtype=F64)
    t = torch.linspace(0.0, 10 * 2 * math.pi, 11, dtype=F64)
    y = taylor(kepler, y0, t, rtol=1e-15, atol=1e-15, gradient="none").y
    energy = y[:, 2:].square().sum(-1) / 2 - y[:, :2].norm(dim=-1).reciprocal()
    assert float((energy + 0.5).abs().max()) < 2e-14
    assert float((y - y0).abs().max()) < 1e-10


def test_a_tighter_tolerance_raises_the_order() -> None:
    counts = []
    for tol in (1e-4, 1e-8, 1e-12):
        sol = taylor(kepler, torch.tensor([1.0, 0, 0, 1.0], dtype=F64), torch.tensor([0.0, 6.0]),
                     rtol=tol, atol=tol, gradient="none")  # fmt: skip
        order = math.ceil(1 - math.log(tol) / 2)
        assert sol.stats.nfe == sol.stats.accepted * (order + 1)
        counts.append(sol.stats.accepted)
    assert counts[2] <= counts[1] <= counts[0]  # and so steps grow no shorter


def test_single_precision_stops_at_its_own_resolution() -> None:
    sol = taylor(lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), rtol=1e-12, atol=1e-12)
    assert sol.y.dtype == torch.float32
    torch.testing.assert_close(sol.y[-1], torch.full((2,), math.exp(-1)))


# ---- steps


def test_a_step_that_the_field_contradicts_is_made_again() -> None:
    """The series at the start knows nothing of a change that comes later."""
    calls: list[str] = []

    class Bends(torch.nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return torch.where(t < 1, torch.ones_like(y), -torch.ones_like(y))

        def callback_reject_step(self, t: Tensor, y: Tensor, h: Tensor) -> None:
            calls.append("rejected")

    field, t = Bends(), torch.tensor([0.0, 2.0], dtype=F64)
    sol = taylor(field, torch.zeros(1, dtype=F64), t, rtol=1e-8, atol=1e-8)
    assert abs(float(sol.y[-1])) < 1e-6
    assert sol.stats.rejected == len(calls) > 0
    known = taylor(field, torch.zeros(1, dtype=F64), t, options={"jump_t": torch.tensor([1.0])})
    assert known.stats.rejected == 0
    assert known.stats.accepted == 2  # straight lines
    assert abs(float(known.y[-1])) < 1e-14


def test_limits_of_the_step_are_kept() -> None:
    t, y0 = torch.tensor([0.0, 1.0], dtype=F64), torch.ones(1, dtype=F64)
    lengths: list[float] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        return -y

    vars(func)["callback_accept_step"] = lambda t, y, h: lengths.append(float(h))
    taylor(func, y0, t, dt0=0.01, options={"max_step": 0.3, "step_t": torch.tensor([0.5])})
    assert lengths[0] == 0.01
    assert max(lengths) <= 0.3 * 1.002
    assert any(abs(sum(lengths[:i]) - 0.5) < 1e-12 for i in range(len(lengths)))
    assert abs(sum(lengths) - 1) < 1e-12


@both_ways
def test_dense_output_is_as_accurate_as_the_steps(reverse: bool) -> None:
    t = span(COUPLED, reverse)
    sol = taylor(COUPLED.func, COUPLED.y0(float(t[0])), t, rtol=1e-10, atol=1e-10, dense=True)
    many = span(COUPLED, reverse, 57)
    assert float((sol(many) - COUPLED.exact(many)).abs().max()) < 1e-8
    rows = taylor(COUPLED.func, COUPLED.y0(float(t[0])), many, rtol=1e-10, atol=1e-10).y
    torch.testing.assert_close(sol(many), rows, rtol=1e-11, atol=1e-12)
    whole = ctorch.odeint_dense(
        COUPLED.func, COUPLED.y0(float(t[0])), t[0], t[1], method="taylor", rtol=1e-10, atol=1e-10
    )
    torch.testing.assert_close(whole(many), rows, rtol=1e-11, atol=1e-12)


def test_dense_output_takes_numbers_in_float64() -> None:
    """0.1 in float32 is off by 1.5e-9, and so is exp there."""
    how: dict[str, Any] = {"dense": True, "rtol": 1e-14, "atol": 1e-14}
    times = torch.tensor([0.0, 1.0], dtype=F64)
    for method in ("taylor", "dopri8"):
        sol = ctorch.solve_ode(
            lambda t, y: y, torch.ones(1, dtype=F64), times, method=method, **how
        )
        for t in (0.1, [0.1, 0.3], np.float64(0.1), np.array([0.1]), torch.tensor(0.1, dtype=F64)):
            exact = torch.as_tensor(np.exp(np.asarray(t)), dtype=F64)
            torch.testing.assert_close(sol(t)[..., 0], exact, rtol=1e-12, atol=0)


def test_repeated_times_and_a_single_time_are_served() -> None:
    t = torch.tensor([0.0, 0.0, 0.5, 0.5, 1.0, 1.0], dtype=F64)
    y = taylor(lambda t, y: -y, torch.ones(1, dtype=F64), t, rtol=1e-12, atol=1e-12).y
    torch.testing.assert_close(y[:, 0], torch.exp(-t), rtol=1e-11, atol=0)
    assert taylor(lambda t, y: -y, torch.ones(1), torch.tensor([0.0])).y.shape == (1, 1)


def test_states_may_be_pytrees_or_complex() -> None:
    t = torch.linspace(0, 3, 4, dtype=F64)
    start = {"q": torch.ones(2, dtype=F64), "p": torch.zeros(2, dtype=F64)}
    sol = taylor(lambda t, y: {"q": y["p"], "p": -y["q"]}, start, t, rtol=1e-10, atol=1e-10,
                 dense=True)  # fmt: skip
    torch.testing.assert_close(sol.y["p"][:, 1], -torch.sin(t), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(
        sol(torch.tensor(1.7, dtype=F64))["q"][0].item(), math.cos(1.7), rtol=1e-8, atol=1e-8
    )
    turn = taylor(lambda t, y, w: 1j * w * y, torch.ones(2, dtype=torch.complex128), t,
                  args=(2.0,), rtol=1e-10, atol=1e-10)  # fmt: skip
    torch.testing.assert_close(turn.y[:, 0], torch.exp(2j * t), rtol=1e-8, atol=1e-8)


# ---- events


def fall(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack((y[1], torch.full_like(y[1], -9.81)))


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint", "adjoint"])
def test_an_event_ends_the_solve_and_has_its_derivative(gradient: str) -> None:
    start = torch.tensor([10.0, 0.0], dtype=F64, requires_grad=True)
    floor = Event(lambda t, y: y[0], direction=-1)
    t = torch.tensor([0.0, 1.0, 9.0], dtype=F64)
    sol = taylor(fall, start, t, events=floor, gradient=gradient)
    assert sol.status is Status.EVENT
    assert len(sol.t) == 3
    assert abs(sol.event.t.item() - math.sqrt(20 / 9.81)) < 1e-12
    (slope,) = torch.autograd.grad(sol.event.t, start)
    assert abs(float(slope[0]) - 1 / math.sqrt(20 * 9.81)) < 1e-10


def test_an_event_is_looked_for_without_an_end() -> None:
    start = torch.tensor([10.0, 0.0], dtype=F64)
    when, _ = ctorch.odeint_event(
        fall, start, torch.tensor(0.0, dtype=F64), event_fn=lambda t, y: y[0], method="taylor"
    )
    assert abs(float(when) - math.sqrt(20 / 9.81)) < 1e-12


# ---- gradients


def pendulum(w: Tensor, y0: Tensor, t: Tensor, method: str = "taylor", **how: Any) -> Any:
    def func(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1] * w[0] + torch.sin(t), -w[1] * torch.sin(y[0])])

    return solve_ode(func, y0, t, method=method, **how)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    w = torch.tensor([0.7, 1.3], dtype=F64, requires_grad=True)
    y0 = torch.tensor([1.0, 0.3], dtype=F64, requires_grad=True)
    t = torch.tensor([0.0, 0.4, 1.1, 2.0], dtype=F64, requires_grad=True)
    return w, y0, t


def loss(sol: Any) -> Tensor:
    return (sol.y * torch.arange(1, 9, dtype=F64).view(4, 2)).sin().sum()


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradients_of_first_and_second_order_are_those_of_another_method(gradient: str) -> None:
    results = []
    for method, how in (("dopri8", "backprop"), ("taylor", gradient)):
        given = inputs()
        tol = {"rtol": 1e-12, "atol": 1e-12}
        first = torch.autograd.grad(
            loss(pendulum(*given, method=method, gradient=how, **tol)), given, create_graph=True
        )
        second = torch.autograd.grad(sum(g.square().sum() for g in first), given)
        results.append([x.detach() for x in (*first, *second)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradients_are_exact_for_the_steps_as_taken(gradient: str) -> None:
    options = {"step_size": 0.25, "order": 4}  # coarse: far from the true derivative

    def run(*given: Tensor) -> Tensor:
        return pendulum(*given, gradient=gradient, options=options).y

    assert torch.autograd.gradcheck(run, inputs())
    assert torch.autograd.gradgradcheck(run, inputs())


def _noted(seen: list[int], x: Tensor) -> Tensor:
    seen.append(1)
    return x


def test_checkpointing_keeps_no_graphs_and_gives_the_same_numbers() -> None:
    kept: dict[str, int] = {}
    grads = {}
    for gradient in ("backprop", "checkpoint"):
        given, saved = inputs(), list[int]()
        hooks = torch.autograd.graph.saved_tensors_hooks(partial(_noted, saved), lambda x: x)
        with hooks:
            sol = pendulum(*given, gradient=gradient, rtol=1e-9, atol=1e-9)
        kept[gradient] = len(saved)
        grads[gradient] = torch.autograd.grad(loss(sol), given)
        assert (sol.stats.nfe_backward > 0) == (gradient == "checkpoint")
    assert kept["checkpoint"] < 0.2 * kept["backprop"]
    torch.testing.assert_close(grads["checkpoint"], grads["backprop"], rtol=1e-13, atol=1e-14)


def test_the_adjoint_equation_is_solved_by_another_method() -> None:
    results = []
    for gradient in ("backprop", "adjoint", ContinuousAdjoint(method="vern7", rtol=1e-10)):
        given = inputs()
        sol = pendulum(*given, gradient=gradient, rtol=1e-10, atol=1e-10)
        results.append(torch.autograd.grad(loss(sol), given))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-6, atol=1e-7)
    with pytest.raises(NotImplementedError, match="taylor"):
        pendulum(*inputs(), gradient=ContinuousAdjoint(method="taylor"))


def test_dense_output_is_differentiable() -> None:
    w, y0, t = inputs()
    sol = pendulum(w, y0, t, dense=True, rtol=1e-11, atol=1e-11)
    when = torch.tensor(0.83, dtype=F64, requires_grad=True)
    found = torch.autograd.grad(sol(when).sum(), (w, y0, when))
    other = pendulum(w, y0, t, "dopri8", dense=True, rtol=1e-11, atol=1e-11)
    expected = torch.autograd.grad(other(when).sum(), (w, y0, when))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)


def test_no_graph_is_kept_where_none_is_wanted() -> None:
    assert not pendulum(*inputs(), gradient="none").y.requires_grad
    with torch.no_grad():
        assert not pendulum(*inputs()).y.requires_grad


def test_transforms_work_as_for_other_methods() -> None:
    t = torch.tensor([0.0, 1.0], dtype=F64)

    def run(y: Tensor, **options: Any) -> Tensor:
        return taylor(lambda t, y: -y * y, y, t, options=options).y[-1]

    y = torch.rand(3, 2, dtype=F64) + 0.5
    mapped = torch.func.vmap(lambda y: run(y, step_size=0.1, order=10))(y)
    torch.testing.assert_close(mapped, y / (1 + y), rtol=1e-6, atol=1e-7)
    slope = torch.func.grad(lambda y: run(y).sum())(y)
    torch.testing.assert_close(slope, (1 + y) ** -2, rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="step_size"):
        torch.func.vmap(run)(y)


# ---- failures and arguments


def test_a_solution_that_blows_up_stops_the_solve_there() -> None:
    t = torch.tensor([0.0, 2.0], dtype=F64)
    with pytest.raises(SolveError) as caught:
        taylor(lambda t, y: y**2, torch.ones(1, dtype=F64), t, rtol=1e-8)
    assert caught.value.status is Status.STEP_UNDERFLOW
    assert abs(caught.value.t - 1) < 1e-6


def test_failures_are_returned_where_that_is_asked_for() -> None:
    t, y0 = torch.tensor([0.0, 1.0, 2.0], dtype=F64), torch.ones(1, dtype=F64)
    sol = taylor(lambda t, y: y * float("nan"), y0, t, throw=False)
    assert sol.status is Status.NONFINITE
    assert bool(sol.y[1:].isnan().all())
    for options in ({}, {"step_size": 0.01}):
        sol = taylor(lambda t, y: -y, y0, t, throw=False, max_steps=2, options=options)
        assert sol.status is Status.MAX_STEPS
        assert sol.stats.accepted == 2


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"batched": True, "dense": True}, NotImplementedError, "dense"),
        ({"options": {"order": 1}}, ValueError, "order"),
        ({"options": {"order": 1000}}, ValueError, "order"),
        ({"options": {"order": 2.5}}, TypeError, "order"),
        ({"options": {"safety": 0.5}}, ValueError, "safety"),
        ({"options": {"step_size": -1.0}}, ValueError, "step_size"),
    ],
)
def test_wrong_arguments_are_named(how: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        taylor(lambda t, y: -y, torch.ones(2, 1), torch.tensor([0.0, 1.0]), **how)


def test_a_field_that_returns_the_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="func"):
        taylor(lambda t, y: y[:1], torch.ones(2), torch.tensor([0.0, 1.0]))


def test_a_loop_can_be_run_twice() -> None:
    """The continuous adjoint does so where it finds tensors late."""
    assert "run" in vars(TaylorLoop)
    hidden = torch.tensor(0.5, dtype=F64, requires_grad=True)
    late: list[Tensor] = []

    def func(t: Tensor, y: Tensor) -> Tensor:
        late.append(hidden)
        return -y if len(late) < 3 else -y * late[-1]

    t = torch.tensor([0.0, 0.5, 1.0], dtype=F64)
    sol = taylor(func, torch.ones(1, dtype=F64), t, gradient="adjoint", options={"max_step": 0.1})
    assert sol.y.requires_grad


@pytest.mark.parametrize("level", [0.0, 0.2])
def test_an_event_within_one_long_step_is_found(level):
    """The series of a fall is a polynomial, and one step would cover the whole interval."""
    fall = lambda t, y: torch.stack([y[1], -9.81 + 0 * y[1]])  # noqa: E731
    y0 = torch.tensor([0.0, 3.0], dtype=torch.float64)
    span = torch.tensor([0.0, 9.0], dtype=torch.float64)
    sol = ctorch.solve_ode(fall, y0, span, method="taylor", events=lambda t, y: y[0] - level)
    first = (3 - (9 - 2 * 9.81 * level) ** 0.5) / 9.81 if level else 2 * 3 / 9.81
    torch.testing.assert_close(sol.event.t, torch.tensor(first, dtype=torch.float64))
