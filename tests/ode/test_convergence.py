"""Errors shrink with the step by a method's order, and with the tolerance in proportion."""

from __future__ import annotations

import math

import pytest
import torch

import ctorch
from ctorch.ode import TABLEAUS

from .problems import ALL, COUPLED, LOGISTIC, OSCILLATOR, Counted, Known, frozen, times

FIXED = ["euler", "midpoint", "heun2", "heun3", "rk4"]
ADAPTIVE = ["adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "vern7", "dopri8"]
#: numbers of steps on which the order shows: errors small, yet far above rounding
STEPS = {1: 128, 2: 64, 3: 32, 4: 16, 5: 12, 7: 6, 8: 5}
both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])


def error_after(problem: Known, method: str, steps: int, reverse: bool, **how: object) -> float:
    t0, t1 = (problem.t1, problem.t0) if reverse else (problem.t0, problem.t1)
    t = times(t0, t1)
    h = abs(t1 - t0) / steps
    options = frozen(h) if TABLEAUS[method].adaptive else {"step_size": h}
    sol = ctorch.solve_ode(problem.func, problem.y0(t0), t, method=method, options=options, **how)
    assert sol.stats.accepted == steps
    return float((sol.y - problem.exact(t)).abs().max())


@both_ways
@pytest.mark.parametrize("method", FIXED + ADAPTIVE)
def test_the_error_shrinks_by_the_order_of_the_method(method: str, reverse: bool) -> None:
    order = TABLEAUS[method].order
    coarse = error_after(COUPLED, method, STEPS[order], reverse)
    fine = error_after(COUPLED, method, 4 * STEPS[order], reverse)
    assert order - 0.4 < math.log2(coarse / fine) / 2 < order + 1.4, (coarse, fine)


@both_ways
@pytest.mark.parametrize("method", FIXED + ADAPTIVE)
def test_odeint_steps_with_the_same_order(method: str, reverse: bool) -> None:
    order = TABLEAUS[method].order
    t0, t1 = (COUPLED.t1, COUPLED.t0) if reverse else (COUPLED.t0, COUPLED.t1)
    errors = []
    for steps in (STEPS[order], 4 * STEPS[order]):
        t = torch.linspace(t0, t1, steps + 1, dtype=torch.float64)
        options = {"step_t": t[1:], "min_step": 1.0, "first_step": 1.0}
        y = ctorch.odeint(
            COUPLED.func,
            COUPLED.y0(t0),
            t if method in FIXED else t[[0, -1]],
            method=method,
            options=None if method in FIXED else options,
        )
        errors.append(float((y[-1] - COUPLED.exact(t[-1:])[0]).abs().max()))
    assert order - 0.4 < math.log2(errors[0] / errors[1]) / 2 < order + 1.4, errors


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("method", ADAPTIVE[2:])
def test_the_error_follows_the_tolerance(name: str, method: str) -> None:
    problem = ALL[name]
    t = torch.linspace(problem.t0, problem.t1, 7, dtype=torch.float64)
    errors = []
    levels = (1e-4, 1e-6, 1e-8) if method != "bosh3" else (1e-3, 1e-4, 1e-5)
    for tol in levels:
        sol = ctorch.solve_ode(problem.func, problem.y0(), t, method=method, rtol=tol, atol=tol)
        exact = problem.exact(t)
        errors.append(float(((sol.y - exact).abs() / (1 + exact.abs())).max()))
    for error, tol in zip(errors, levels, strict=True):
        assert error < 40 * tol, errors
    # in proportion: neither stuck, nor far below what was asked for
    assert errors[2] < errors[0] * (levels[2] / levels[0]) ** 0.7, errors
    assert errors[2] > 1e-5 * levels[2], errors


@pytest.mark.parametrize("method", FIXED + ADAPTIVE)
def test_the_continuous_solution_has_the_order_that_its_tableau_states(method: str) -> None:
    order = TABLEAUS[method].dense_order
    theta = torch.linspace(0, 1, 13, dtype=torch.float64)
    errors = []
    for h in (0.2, 0.05):
        t = times(0.4, 0.4 + h)
        options = frozen(h) if TABLEAUS[method].adaptive else {"step_size": h}
        sol = ctorch.solve_ode(
            COUPLED.func, COUPLED.y0(0.4), t, method=method, options=options, dense=True
        )
        inner = 0.4 + h * theta
        errors.append(float((sol(inner) - COUPLED.exact(inner)).abs().max()))
        torch.testing.assert_close(sol(t), sol.y, rtol=1e-12, atol=1e-12)
    measured = math.log2(errors[0] / errors[1]) / 2
    # the step's own error, one order above the method's, may be the smaller of the two
    assert min(order, TABLEAUS[method].order) + 1 - 0.4 < measured, errors


@pytest.mark.parametrize("method", ADAPTIVE)
def test_outputs_within_steps_are_the_continuous_solution(method: str) -> None:
    t = torch.linspace(COUPLED.t0, COUPLED.t1, 40, dtype=torch.float64)
    sol = ctorch.solve_ode(
        COUPLED.func, COUPLED.y0(), t, method=method, options=frozen(0.2), dense=True
    )
    assert sol.stats.accepted == 4
    torch.testing.assert_close(sol(t), sol.y, rtol=1e-12, atol=1e-12)
    assert float((sol.y - COUPLED.exact(t)).abs().max()) < 0.5


@pytest.mark.parametrize("method", ["bosh3", "dopri5", "tsit5", "vern7", "dopri8"])
def test_outputs_do_not_cost_accuracy_or_evaluations(method: str) -> None:
    """Their error is that of the steps; only extra stages are evaluated for them."""
    t0, t1 = OSCILLATOR.t0, OSCILLATOR.t1
    ends, many = times(t0, t1), torch.linspace(t0, t1, 50, dtype=torch.float64)
    tol = {"rtol": 1e-6, "atol": 1e-6}
    alone = ctorch.solve_ode(OSCILLATOR.func, OSCILLATOR.y0(), ends, method=method, **tol)
    sol = ctorch.solve_ode(OSCILLATOR.func, OSCILLATOR.y0(), many, method=method, **tol)
    assert torch.equal(alone.y[-1], sol.y[-1])
    assert sol.stats.accepted == alone.stats.accepted
    extra = len(TABLEAUS[method].extra_c) * alone.stats.accepted
    assert sol.stats.nfe <= alone.stats.nfe + extra
    assert float((sol.y - OSCILLATOR.exact(many)).abs().max()) < 1e-4


@both_ways
@pytest.mark.parametrize("method", FIXED + ADAPTIVE)
def test_no_evaluation_lies_outside_the_interval_and_the_last_step_ends_on_its_end(
    method: str, reverse: bool
) -> None:
    t = times(0.1, 0.37, 0.73)
    t = t.flip(0) if reverse else t
    ends: list[float] = []
    field = Counted(LOGISTIC.func)
    field.callback_step = lambda t, y, dt: ends.append(float(t) + (-1 if reverse else 1) * dt)  # type: ignore[attr-defined]
    options = {"step_size": 0.1} if method in FIXED else {}
    sol = ctorch.solve_ode(field, LOGISTIC.y0(), t, method=method, options=options)
    assert sol.stats.nfe == field.nfe
    assert min(field.times) >= 0.1
    assert max(field.times) <= 0.73
    assert ends[-1] == pytest.approx(float(t[-1]), abs=1e-15)
    exact = LOGISTIC.exact(t - t[0])
    assert float((sol.y - exact).abs().max()) < (0.05 if method == "euler" else 1e-3)


@pytest.mark.parametrize("span", [1e-9, 1e-6, 1e3])
def test_the_search_for_the_first_step_stays_inside(span: float) -> None:
    """A slow field proposes a first step far longer than the interval."""
    field = Counted(lambda t, y: 1e-6 * torch.cos(t) + 0 * y)
    ctorch.solve_ode(field, torch.ones(1, dtype=torch.float64), times(0.0, span))
    assert max(field.times) <= span
    assert min(field.times) >= 0


@pytest.mark.parametrize("method", FIXED + ADAPTIVE)
def test_backwards_in_time_is_forwards_through_the_mirrored_field(method: str) -> None:
    t = times(1.1, 0.8, 0.3)
    options = {"step_size": 0.05} if method in FIXED else {"first_step": 0.03}
    how = {"method": method, "options": options, "rtol": 1e-6, "atol": 1e-6}
    back = ctorch.solve_ode(COUPLED.func, COUPLED.y0(1.1), t, **how)
    mirrored = ctorch.solve_ode(lambda s, y: -COUPLED.func(-s, y), COUPLED.y0(1.1), -t, **how)
    torch.testing.assert_close(back.y, mirrored.y, rtol=1e-12, atol=1e-12)
    assert back.stats.nfe == mirrored.stats.nfe
    assert back.stats.rejected == mirrored.stats.rejected


@pytest.mark.parametrize("controller", ["i", "pi", "pid", ctorch.ode.StepController(p=0.2, i=0.5)])
def test_every_controller_keeps_the_tolerance(controller: object) -> None:
    t = torch.linspace(0.0, 3.0, 5, dtype=torch.float64)
    sol = ctorch.solve_ode(
        OSCILLATOR.func, OSCILLATOR.y0(), t, controller=controller, rtol=1e-7, atol=1e-7
    )
    assert float((sol.y - OSCILLATOR.exact(t)).abs().max()) < 3e-6
    assert sol.stats.accepted < 100


def test_float32_states_keep_float64_time() -> None:
    """In float32 time would stand still: t0 + h == t0."""
    field = Counted(lambda t, y: -y)
    t = times(1e6, 1e6 + 0.01, 1e6 + 0.5)
    sol = ctorch.solve_ode(field, torch.ones(3), t, rtol=1e-4, atol=1e-6)
    expected = torch.exp(-(t - 1e6)).float()
    assert sol.y.dtype is torch.float32
    torch.testing.assert_close(sol.y[:, 0], expected, rtol=1e-3, atol=1e-3)
