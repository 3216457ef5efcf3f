"""Implicit methods: order, stiffness, root finders, output and gradients."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import ctorch
from ctorch import GradientError, SolveError, solve_ode
from ctorch.autodiff.hollow import Hollow, as_hollow
from ctorch.ode import Event, Status
from ctorch.ode.implicit_steps import FORMULAS, GAMMA, State
from ctorch.ops.hollow import transform

from .problems import COUPLED, F64, OSCILLATOR, Counted, Known, leaf, times

both_ways = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reversed"])
FINDERS = ["functional", "jacobi_newton", "newton"]
SINGLE = ["bdf2", "implicit_adams"]


class Relaxation(nn.Module):
    """x' = -rates (x - net(x)): stiff where the rates are spread, and hollow as the net is."""

    def __init__(self, net: nn.Module, rates: Tensor) -> None:
        super().__init__()
        self.net = net
        self.rates = nn.Parameter(rates)

    def forward(self, t: Any, x: Tensor) -> Tensor:
        return -self.rates * (x - self.net(t, x))

    def __ctorch_hollow__(self) -> Hollow:
        inner = as_hollow(self.net)

        def tau(t: Any, x: Tensor, h: Tensor) -> Tensor:
            return -self.rates * (x - transform(x, h, inner.transformer)[0])  # type: ignore[arg-type]

        return Hollow(inner.conditioner, tau)


def relaxation(
    d: int, stiffness: float, dtype: torch.dtype = F64, time: bool = False
) -> Relaxation:
    torch.manual_seed(0)
    net = ctorch.nn.HollowMLP(d, width=64, context=8, hidden=(16,), time=time, dtype=dtype)
    return Relaxation(net, torch.logspace(0, math.log10(stiffness), d, dtype=dtype))


def linear(rates: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The solution cos(t) attracts all others, at the given rates."""
    return lambda t, y: -rates * (y - torch.cos(t)) - torch.sin(t)


def van_der_pol(t: Tensor, y: Tensor) -> Tensor:
    return torch.stack([y[1], 1000 * (1 - y[0] ** 2) * y[1] - y[0]])


def fixed(step: float, finder: str = "newton", **more: Any) -> dict[str, Any]:
    return {"step_size": step, "root_finder": finder, **more}


def error_of(problem: Known, t: Tensor, **how: Any) -> tuple[float, Any]:
    sol = solve_ode(problem.func, problem.y0(float(t[0])), t, gradient="none", **how)
    return float((sol.y - problem.exact(t)).abs().max()), sol.stats


# ---- accuracy


@both_ways
@pytest.mark.parametrize("problem", [COUPLED, OSCILLATOR], ids=["coupled", "oscillator"])
@pytest.mark.parametrize(
    ("method", "order", "more"),
    [("bdf2", 2, {}), ("implicit_adams", 2, {}), ("implicit_adams", 1, {"max_order": 1})],
    ids=["bdf2", "trapezoid", "euler"],
)
def test_the_error_of_fixed_steps_shrinks_by_the_order(
    method: str, order: int, more: dict[str, Any], problem: Known, reverse: bool
) -> None:
    ends = (problem.t1, problem.t0) if reverse else (problem.t0, problem.t1)
    t, errors = torch.tensor(ends, dtype=F64), []
    for count in (80, 160):
        options = fixed((problem.t1 - problem.t0) / count, **more)
        error, stats = error_of(problem, t, method=method, options=options, rtol=1e-9, atol=1e-9)
        assert stats.accepted == count
        errors.append(error)
    assert order - 0.25 < math.log2(errors[0] / errors[1]) < order + 0.4, errors


@pytest.mark.parametrize("ratio", [0.4, 1.0, 2.2, 5.0])
def test_steps_of_any_ratio_keep_order_two(ratio: float) -> None:
    """Short and long steps in turn; a ratio beyond the stable one starts anew."""

    def grid(count: int) -> Callable[..., Tensor]:
        steps = torch.tensor([1.0, ratio] * count, dtype=F64)
        knots = torch.cat([torch.zeros(1, dtype=F64), steps.cumsum(0)]) / steps.sum() * 3.0
        knots[-1] = 3.0
        return lambda *_: knots

    t, errors = times(0.0, 3.0), []
    for count in (60, 120):
        options = {"grid_constructor": grid(count)}
        errors.append(error_of(OSCILLATOR, t, method="bdf2", options=options, rtol=1e-9)[0])
    assert 1.75 < math.log2(errors[0] / errors[1]) < 2.4, errors


@pytest.mark.parametrize("ratio", [2.2, 2.6])
def test_a_step_too_long_behind_the_one_before_starts_anew(ratio: float) -> None:
    """Where BDF2 would not be stable there is a Runge-Kutta step, with a stage inside."""
    knots = torch.tensor([0.0, 1.0, 1.0 + ratio], dtype=F64)
    field, options = Counted(lambda t, y: -y), {"grid_constructor": lambda *_: knots}
    solve_ode(field, torch.ones((), dtype=F64), knots[[0, -1]], method="bdf2", options=options)
    stages = {round(t, 6) for t in field.times if 1.0 < t < 1.0 + ratio}
    assert stages == ({round(1.0 + GAMMA * ratio, 6)} if ratio > 2.5 else set())


@pytest.mark.parametrize("formula", ["start", "bdf2"])
def test_a_formula_knows_its_error(formula: str) -> None:
    """y' = -y^2: the estimate is of order 3, and that of BDF2 is the error itself."""

    def exact(t: float) -> Tensor:
        return torch.tensor(1 / (1 + t), dtype=F64)

    def stage(c: float, constant: Tensor, scale: Any, guess: Tensor) -> Tensor:
        return ((1 + 4 * scale * constant).sqrt() - 1) / (2 * scale)

    found = []
    for h in (0.04, 0.02):
        state = State(exact(0.0), torch.tensor(-1.0, dtype=F64), exact(-h / 1.5))
        made = FORMULAS[formula](state, h, h / 1.5, stage)
        assert made.error is not None
        found.append((float(made.error), float(made.y - exact(h))))
    (first, error), (second, smaller) = found
    assert 7.0 < first / second < 9.0
    assert 7.0 < error / smaller < 9.0
    if formula == "bdf2":
        assert second == pytest.approx(smaller, rel=0.1)
    else:
        assert 0.5 < second / smaller < 3.0


@both_ways
def test_the_error_of_adaptive_steps_follows_the_tolerance(reverse: bool) -> None:
    t = torch.linspace(0.0, 3.0, 7, dtype=F64)
    t = t.flip(0) if reverse else t
    errors, counts = [], []
    for tol in (1e-3, 1e-4, 1e-5, 1e-6):
        error, stats = error_of(OSCILLATOR, t, method="bdf2", rtol=tol, atol=tol)
        errors.append(error)
        counts.append(stats.accepted)
        assert error < 10 * tol ** (2 / 3)
        assert stats.rejected < 0.2 * stats.accepted + 3
    for loose, tight in itertools.pairwise(errors):
        assert 2.5 < loose / tight < 9.0  # a local error of order 3: tol^(2/3) in the whole
    for few, many in itertools.pairwise(counts):
        assert 1.6 < many / few < 2.9  # tol^(-1/3)


# ---- stiffness


def test_stiff_components_do_not_shorten_the_steps() -> None:
    rates = torch.tensor([1.0, 1e2, 1e4, 1e8], dtype=F64)
    y0, t = torch.ones(4, dtype=F64), times(0.0, 5.0)
    sol = solve_ode(linear(rates), y0, t, method="bdf2", rtol=1e-4, atol=1e-4, gradient="none")
    mild = solve_ode(linear(rates[:1]), y0[:1], t, method="bdf2", rtol=1e-4, atol=1e-4)
    assert float((sol.y[-1] - torch.cos(t[-1])).abs().max()) < 1e-3
    assert sol.stats.accepted < 2 * mild.stats.accepted
    explicit = solve_ode(linear(rates[:3]), y0[:3], t, rtol=1e-4, atol=1e-4, gradient="none")
    assert explicit.stats.nfe > 100 * sol.stats.nfe


@pytest.mark.parametrize("rate", [1e2, 1e5, 1e9])
def test_a_transient_that_no_step_resolves_is_damped(rate: float) -> None:
    """L-stability: of an initial offset nothing is left after a few of the longest steps."""
    field, t = linear(torch.tensor(rate, dtype=F64)), times(0.0, 2.0)
    sol = solve_ode(field, torch.tensor(5.0, dtype=F64), t, method="bdf2", options=fixed(0.1))
    assert abs(float(sol.y[-1]) - math.cos(2.0)) < 2e-2 / rate


def test_van_der_pol_against_the_known_solution() -> None:
    t, y0 = times(0.0, 2000.0), torch.tensor([2.0, 0.0], dtype=F64)
    sol = solve_ode(van_der_pol, y0, t, method="bdf2", rtol=1e-4, atol=1e-6, gradient="none")
    assert sol.stats.nfe < 2000
    assert float(sol.y[-1, 0]) == pytest.approx(1.706167732, abs=5e-3)
    assert float(sol.y[-1, 1]) == pytest.approx(-0.892809701e-3, abs=5e-6)


def test_few_evaluations_reach_the_error_of_an_explicit_solve_of_a_stiff_hollow_field() -> None:
    """The stiff problem of Chen and Duvenaud's section 4, with rates between 1 and 100."""
    field = relaxation(32, 100.0)
    torch.manual_seed(1)
    x0, t = torch.randn(4, 32, dtype=F64), times(0.0, 2.0)
    how: dict[str, Any] = {"gradient": "none", "rtol": 1e-3, "atol": 1e-4}
    exact = solve_ode(field, x0, t, rtol=1e-10, atol=1e-10, gradient="none").y[-1]

    def error(sol: Any) -> float:
        return float((sol.y[-1] - exact).abs().max())

    explicit = solve_ode(field, x0, t, **how)
    jacobi = {"root_finder": "jacobi_newton"}
    implicit = solve_ode(field, x0, t, method="bdf2", options=jacobi, **how)
    assert implicit.stats.nfe <= 220
    assert explicit.stats.nfe >= 2 * implicit.stats.nfe
    assert error(implicit) < max(2e-3, error(explicit))
    steps = solve_ode(field, x0, t, method="bdf2", options=fixed(0.05, "jacobi_newton"), **how)
    assert steps.stats.nfe <= 220
    assert error(steps) < 5e-3
    with pytest.raises(SolveError, match="functional iteration diverged"):
        solve_ode(field, x0, t, method="bdf2", options=fixed(0.05, "functional"), **how)


@pytest.mark.parametrize("method", SINGLE)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_root_finders_agree(method: str, dtype: torch.dtype) -> None:
    field = relaxation(6, 20.0, dtype, time=True)
    torch.manual_seed(2)
    x0 = torch.randn(3, 6, dtype=dtype)
    t = torch.linspace(0.0, 1.0, 3, dtype=dtype)
    tight = 1e-5 if dtype is torch.float32 else 1e-10
    results, work = [], []
    for finder in FINDERS:
        more = {"batch_dims": 1} if finder == "newton" else {}
        options = fixed(0.04, finder, max_iters=200, **more)
        if method == "implicit_adams" and finder == "functional":
            continue  # that is torchdiffeq's method, of high order
        sol = solve_ode(field, x0, t, method=method, options=options, rtol=tight, atol=tight)
        assert sol.y.dtype is dtype
        results.append(sol.y.detach())
        work.append(sol.stats.nfe)
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=10 * tight, atol=10 * tight)
    assert sorted(work, reverse=True) == work


def test_blocks_of_samples_give_what_the_whole_jacobian_gives() -> None:
    field = relaxation(5, 50.0)
    x0, t = torch.randn(4, 5, dtype=F64), times(0.0, 0.3)
    both = []
    for lead in (0, 1):
        options = {"root_finder": "newton", "batch_dims": lead}
        how: dict[str, Any] = {"gradient": "none", "rtol": 1e-4, "atol": 1e-4}
        sol = solve_ode(field, x0, t, method="bdf2", options=options, **how)
        assert 0 < sol.stats.jacobians <= sol.stats.nfe
        both.append(sol)
    torch.testing.assert_close(both[1].y, both[0].y, rtol=1e-4, atol=1e-4)
    assert abs(both[0].stats.nfe - both[1].stats.nfe) <= 0.1 * both[0].stats.nfe


def test_every_evaluation_is_counted() -> None:
    calls = {"func": 0, "diagonal": 0}
    rates = torch.tensor([1.0, 50.0], dtype=F64)

    def field(t: Tensor, y: Tensor) -> Tensor:
        calls["func"] += 1
        return -rates * y + torch.sin(y.flip(0))

    def diagonal(t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        calls["diagonal"] += 1
        return -rates * y + torch.sin(y.flip(0)), -rates

    y0, t = torch.ones(2, dtype=F64), times(0.0, 1.0)
    for options in (
        {"root_finder": "jacobi_newton", "diagonal": diagonal},
        {"root_finder": "newton"},
        {"root_finder": "functional"},
    ):
        before = sum(calls.values())
        sol = solve_ode(field, y0, t, method="bdf2", options=options, gradient="none")
        assert sol.stats.nfe == sum(calls.values()) - before
    assert calls["diagonal"] > calls["func"] / 10


# ---- output


@pytest.mark.parametrize("method", SINGLE)
def test_dense_output_is_as_good_as_the_steps(method: str) -> None:
    t = times(0.0, 1.5, 3.0)
    y0 = OSCILLATOR.y0()
    sol = solve_ode(OSCILLATOR.func, y0, t, method=method, options=fixed(0.01), dense=True)
    between = torch.linspace(0.0, 3.0, 77, dtype=F64)
    at_ends = float((sol.y - OSCILLATOR.exact(t)).abs().max())
    assert float((sol(between) - OSCILLATOR.exact(between)).abs().max()) < 2 * at_ends
    torch.testing.assert_close(sol(t), sol.y)


def test_an_output_inside_a_step_is_that_of_the_dense_solution() -> None:
    t = torch.linspace(0.0, 3.0, 23, dtype=F64)
    sol = solve_ode(OSCILLATOR.func, OSCILLATOR.y0(), t, method="bdf2", rtol=1e-3, dense=True)
    assert sol.stats.accepted > 5
    torch.testing.assert_close(sol(t), sol.y)
    alone = solve_ode(OSCILLATOR.func, OSCILLATOR.y0(), t[[0, -1]], method="bdf2", rtol=1e-3)
    assert torch.equal(alone.y[-1], sol.y[-1])


def test_an_event_ends_the_solve() -> None:
    half = Event(lambda t, y: y - 0.5)
    rate = leaf(1)
    for options in ({}, fixed(0.01)):
        sol = solve_ode(
            lambda t, y: -rate.exp() * y, torch.ones(1, dtype=F64), times(0.0, 9.0),
            method="bdf2", events=half, rtol=1e-8, atol=1e-8, options=options,
        )  # fmt: skip
        assert sol.status is Status.EVENT
        assert sol.event is not None
        exact = math.log(2) / float(rate.detach().exp())
        assert float(sol.event.t.detach()) == pytest.approx(exact, abs=3e-4)
        (slope,) = torch.autograd.grad(sol.event.t, rate)
        assert float(slope) == pytest.approx(-exact, rel=5e-3)


def test_a_jump_of_the_field_is_met_by_a_start_anew() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return -y if t < 0.7 else 50 * (2.0 - y)

    y0, t = torch.ones(1, dtype=F64), times(0.0, 1.0)
    options = {"jump_t": torch.tensor([0.7])}
    sol = solve_ode(field, y0, t, method="bdf2", rtol=1e-6, atol=1e-6, options=options)
    plain = solve_ode(field, y0, t, method="bdf2", rtol=1e-6, atol=1e-6)
    exact = 2 + (math.exp(-0.7) - 2) * math.exp(-50 * 0.3)
    assert float(sol.y[-1]) == pytest.approx(exact, abs=1e-4)
    assert sol.stats.rejected < plain.stats.rejected


def test_states_of_any_kind_are_solved() -> None:
    t = times(0.0, 1.0)
    y0 = {"a": torch.ones(2, dtype=F64), "b": torch.ones((), dtype=F64)}
    sol = solve_ode(lambda t, y: {"a": -y["a"], "b": -y["b"]}, y0, t, method="bdf2", rtol=1e-6)
    assert float(sol.y["b"][-1]) == pytest.approx(math.exp(-1), abs=1e-4)
    z = torch.ones(1, dtype=torch.complex128)
    turned = solve_ode(lambda t, y: 1j * y, z, t, method="bdf2", rtol=1e-6)
    assert abs(complex(turned.y[-1]) - complex(math.cos(1), math.sin(1))) < 1e-4
    for odd in (torch.ones((), dtype=F64), torch.ones(0, 3, dtype=F64)):
        assert solve_ode(lambda t, y: -y, odd, t, method="bdf2").y.shape == (2, *odd.shape)


def test_torchdiffeqs_interface_and_the_module_take_the_method() -> None:
    field = relaxation(3, 10.0)
    x0, t = torch.randn(2, 3, dtype=F64), times(0.0, 0.5, 1.0)
    options = {"root_finder": "jacobi_newton"}
    how: dict[str, Any] = {"method": "bdf2", "options": options, "rtol": 1e-6, "atol": 1e-6}
    y = ctorch.odeint(field, x0, t, **how)
    module = ctorch.nn.NeuralODE(field, t, **how)
    exact = solve_ode(field, x0, t, rtol=1e-9, atol=1e-9).y
    torch.testing.assert_close(y, exact, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(module(x0), exact, rtol=1e-3, atol=1e-3)
    with torch.inference_mode():
        assert torch.equal(ctorch.odeint(field, x0, t, **how), y)
        newton = ctorch.odeint(field, x0, t, **{**how, "options": {}})
    torch.testing.assert_close(newton, exact, rtol=1e-3, atol=1e-3)


# ---- gradients

RATES = torch.tensor([1.0, 5.0, 12.0], dtype=F64)
#: so tight that a difference quotient sees the derivative and not where iterations ended
TIGHT: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-11}


def net_solve(method: str, finder: str, step: float, **how: Any) -> Callable[..., Tensor]:
    """A solve as a function of state, weights and times."""

    def solve(y0: Tensor, w: Tensor, t: Tensor) -> Tensor:
        def field(s: Tensor, y: Tensor) -> Tensor:
            return -RATES * y + torch.tanh(y @ w + s)

        def diagonal(s: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            a = torch.tanh(y @ w + s)
            return -RATES * y + a, -RATES + (1 - a * a) * w.diagonal()

        more = {"diagonal": diagonal} if finder == "jacobi_newton" else {}
        options = fixed(step, finder, root_tol=0.01, max_iters=100, **more)
        return solve_ode(field, y0, t, method=method, options=options, **TIGHT, **how).y

    return solve


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(3)
    t = times(0.0, 0.32, 0.75).requires_grad_()
    return leaf(3), (0.5 * torch.randn(3, 3, dtype=F64)).requires_grad_(), t


CASES = [("bdf2", finder) for finder in FINDERS] + [("implicit_adams", "jacobi_newton")]


@pytest.mark.parametrize(("method", "finder"), CASES)
@pytest.mark.parametrize("gradient", ["backprop", "checkpoint"])
def test_gradients_are_those_of_the_returned_values(
    method: str, finder: str, gradient: str
) -> None:
    step = 0.037 if finder == "functional" else 0.06
    solve = net_solve(method, finder, step, gradient=gradient)
    assert torch.autograd.gradcheck(solve, inputs(), atol=3e-6, rtol=1e-4)


@pytest.mark.parametrize(("method", "finder"), CASES[1:])
def test_second_derivatives_are_those_of_the_first(method: str, finder: str) -> None:
    solve, (y0, w, t) = net_solve(method, finder, 0.26), inputs()
    assert torch.autograd.gradgradcheck(solve, (y0, w, t), atol=1e-5, rtol=1e-4)


def test_third_derivatives_are_refused() -> None:
    y0, w, t = inputs()
    y = net_solve("bdf2", "newton", 0.2)(y0, w, t)[-1].square().sum()
    (first,) = torch.autograd.grad(y, w, create_graph=True)
    with pytest.raises(GradientError, match="differentiated twice only"):
        torch.autograd.grad(first.square().sum(), w, create_graph=True)


def test_gradients_of_adaptive_solves_agree_with_each_other_and_the_exact_ones() -> None:
    field = relaxation(4, 5.0, time=True)
    x0, t = leaf(2, 4), times(0.0, 0.3, 0.7)
    found: dict[str, list[Tensor]] = {}
    jacobi = {"root_finder": "jacobi_newton"}
    ways: dict[str, dict[str, Any]] = {
        "backprop": {"method": "bdf2", "options": jacobi, "gradient": "backprop"},
        "checkpoint": {"method": "bdf2", "options": jacobi},
        "newton": {"method": "bdf2"},
        "adjoint": {"method": "bdf2", "options": jacobi, "gradient": "adjoint"},
        "exact": {"method": "dopri8"},
    }
    for name, how in ways.items():
        sol = solve_ode(field, x0, t, rtol=1e-6, atol=1e-6, **how)
        loss = sol.y[1:].sin().sum()
        found[name] = list(torch.autograd.grad(loss, [x0, *field.parameters()]))
        assert sol.stats.vjps > 0
    for a, b, exact in zip(found["backprop"], found["checkpoint"], found["exact"], strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, exact, rtol=1e-3, atol=1e-4)
    for name in ("newton", "adjoint"):
        for a, exact in zip(found[name], found["exact"], strict=True):
            torch.testing.assert_close(a, exact, rtol=1e-3, atol=1e-4)


def test_dense_output_is_differentiable() -> None:
    def at(y0: Tensor, w: Tensor) -> Tensor:
        def field(s: Tensor, y: Tensor) -> Tensor:
            return -RATES * y + torch.tanh(y @ w + s)

        sol = solve_ode(
            field, y0, times(0.0, 0.7), method="bdf2", options=fixed(0.11, root_tol=0.01),
            dense=True, **TIGHT,
        )  # fmt: skip
        return sol(times(0.03, 0.2, 0.69))

    y0, w, _ = inputs()
    assert torch.autograd.gradcheck(at, (y0, w), atol=3e-6, rtol=1e-4)
    assert torch.autograd.gradgradcheck(at, (y0, w), atol=1e-5, rtol=1e-4)


def test_a_tensor_that_shows_up_later_gets_its_gradient() -> None:
    early, late = leaf(1), leaf(1)
    field = lambda t, y: -y * (early if t < 0.5 else late).exp()  # noqa: E731
    sol = solve_ode(field, torch.ones(1, dtype=F64), times(0.0, 1.0), method="bdf2", rtol=1e-6)
    grads = torch.autograd.grad(sol.y[-1].sum(), [early, late])
    rates = [float(x.detach().exp()) for x in (early, late)]
    for grad, rate in zip(grads, rates, strict=True):
        assert float(grad) == pytest.approx(-0.5 * rate * math.exp(-0.5 * sum(rates)), abs=2e-3)
