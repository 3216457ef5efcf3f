"""Solves that cannot go on end with an error that explains, or with a status."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import ctorch
from ctorch.ode import Status

from .problems import F64, Counted, Net, leaf, times

ADAPTIVE = ["adaptive_heun", "fehlberg2", "bosh3", "dopri5", "tsit5", "vern7", "dopri8"]
ONE = torch.ones(1, dtype=F64)


def blows_up(t: Tensor, y: Tensor) -> Tensor:
    return y * y  # 1 / (1 - t)


def jumps(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t < 0.5, 1e9, -1e9) * torch.sign(torch.sin(1e7 * t)) + 0 * y


def nan_always(t: Tensor, y: Tensor) -> Tensor:
    return y * math.nan


def nan_later(t: Tensor, y: Tensor) -> Tensor:
    return torch.where(t > 0.3, math.nan, 1.0) * y


def nan_beyond_one(t: Tensor, y: Tensor) -> Tensor:
    return torch.sqrt(1.5 - y) + 1


FAILING: dict[str, tuple[Callable[..., Tensor], set[Status]]] = {
    "blow-up": (blows_up, {Status.STEP_UNDERFLOW, Status.NONFINITE}),
    "NaN at the start": (nan_always, {Status.NONFINITE}),
    "NaN later": (nan_later, {Status.NONFINITE}),
    "outside the domain": (nan_beyond_one, {Status.NONFINITE}),
}
every_failure = pytest.mark.parametrize(("field", "statuses"), FAILING.values(), ids=list(FAILING))


@every_failure
@pytest.mark.parametrize("method", ADAPTIVE)
def test_a_failed_adaptive_solve_says_where_and_why(
    field: Callable[..., Tensor], statuses: set[Status], method: str
) -> None:
    tol = 1e-3 if method in ("adaptive_heun", "fehlberg2") else 1e-6
    how: dict[str, Any] = {"method": method, "rtol": tol, "atol": tol}
    with pytest.raises(ctorch.SolveError, match="underflow in dt") as caught:
        ctorch.solve_ode(field, ONE, times(0.0, 0.1, 2.0), **how)
    error = caught.value
    assert isinstance(error, RuntimeError)
    assert isinstance(error, AssertionError)
    assert error.status in statuses
    where = {blows_up: 1.0, nan_always: 0.0, nan_later: 0.3}.get(field)
    if where is not None:
        assert error.t == pytest.approx(where, abs=0.01 if tol < 1e-3 else 0.15)
    for said in (f"t={error.t:.9g}", "h=", "error norm" if error.step else "func"):
        assert said in str(error)
    assert error.solution is not None
    reached = int(torch.isfinite(error.solution.y).all(1).sum())
    assert reached == (1 if field is nan_always else 2)
    with pytest.raises(AssertionError, match="underflow in dt"):
        ctorch.odeint(field, ONE, times(0.0, 2.0), **how)


@every_failure
@pytest.mark.parametrize("gradient", ["none", "checkpoint", "backprop", "adjoint"])
def test_without_throw_a_status_and_the_rows_reached_are_returned(
    field: Callable[..., Tensor], statuses: set[Status], gradient: str
) -> None:
    y0 = ONE.clone().requires_grad_()
    sol = ctorch.solve_ode(field, y0, times(0.0, 0.1, 2.0), gradient=gradient, throw=False)
    assert sol.status in statuses
    assert sol.message
    assert torch.equal(sol.y[0], y0)
    assert sol.y.isnan().all(1)[-1]
    if field is not nan_always:
        assert torch.isfinite(sol.y[1]).all()
        if gradient != "none":  # the rows that were reached are differentiable
            (g,) = torch.autograd.grad(sol.y[1].sum(), y0)
            assert torch.isfinite(g).all()


@pytest.mark.parametrize("gradient", ["none", "backprop"])
@pytest.mark.parametrize(
    "how",
    [{"method": "rk4"}, {"method": "rk4", "dt0": 0.1}, {"method": "explicit_adams", "dt0": 0.1}]
    + [{"method": "taylor", "options": {"step_size": 0.1}}],
)
def test_a_fixed_step_solve_that_ends_in_nan_fails(how: dict[str, Any], gradient: str) -> None:
    """It says between which output times the state was lost."""
    how = {**how, "gradient": gradient}
    t = times(0.0, 0.2, 0.8, 1.0)
    with pytest.raises(ctorch.SolveError, match=r"non-finite.* between t=0.2 and t=0.8") as caught:
        ctorch.solve_ode(nan_later, ONE, t, **how)
    assert caught.value.status is Status.NONFINITE
    assert caught.value.t == 0.2
    sol = ctorch.solve_ode(nan_later, ONE, t, throw=False, **how)
    assert sol.status is Status.NONFINITE
    assert torch.isfinite(sol.y[1]).all()
    assert sol.y[3].isnan().all()


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("method", ["dopri5", "rk4"])
def test_a_bad_initial_state_is_named(value: float, method: str) -> None:
    with pytest.raises(ctorch.SolveError, match="state y"):
        ctorch.solve_ode(lambda t, y: -y, ONE * value, times(0.0, 1.0), method=method)


@pytest.mark.parametrize("method", ["dopri5", "bosh3", "rk4"])
def test_max_steps(method: str) -> None:
    how: dict[str, Any] = {"method": method, "dt0": 1e-3}
    if method != "rk4":
        how["options"] = {"max_step": 1e-3}
    t = times(0.0, 0.0035, 1.0)
    with pytest.raises(ctorch.SolveError, match=r"10 steps.*t=0.0.*h=1.000e-03.*error norm") as e:
        ctorch.solve_ode(lambda t, y: -y, ONE, t, max_steps=10, **how)
    assert e.value.status is Status.MAX_STEPS
    assert "max_steps" in str(e.value)
    sol = ctorch.solve_ode(lambda t, y: -y, ONE, t, max_steps=10, throw=False, **how)
    assert sol.status is Status.MAX_STEPS
    assert sol.stats.accepted == 10
    assert torch.isfinite(sol.y[1]).all()
    assert sol.y[2].isnan().all()
    ctorch.solve_ode(lambda t, y: -y, ONE, times(0.0, 0.01), max_steps=10, **how)


def test_max_num_steps_counts_the_whole_solve() -> None:
    """Not each output interval: many outputs do not allow many more steps."""
    t = torch.linspace(0, 1, 50, dtype=F64)
    with pytest.raises(AssertionError, match="max_num_steps"):
        ctorch.odeint(lambda t, y: -y, ONE, t, options={"max_num_steps": 10, "max_step": 0.02})


@pytest.mark.parametrize("native", [False, True])
def test_a_start_too_late_for_its_first_step_is_no_fault_of_the_field(native: bool) -> None:
    with pytest.raises(ctorch.SolveError, match=r"first step.*resolution of time") as caught:
        ctorch.solve_ode(lambda t, y: -y, ONE, times(1e16, 1e16 + 4), native=native)
    assert caught.value.status is Status.STEP_UNDERFLOW


def test_an_error_that_no_step_is_short_enough_for_ends_the_solve() -> None:
    """At t=0 the shortest of numbers still moves time."""
    calls = Counted(lambda t, y: -y)
    with pytest.raises(ctorch.SolveError, match="underflow in dt"):
        ctorch.solve_ode(calls, ONE, times(0.0, 1.0), options={"norm": lambda y: 3.0})
    assert calls.nfe < 30_000


def test_step_underflow_names_the_worst_element_and_remedies() -> None:
    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([-y[0], y[1] ** 2, -y[2]])

    y0 = torch.ones(3, dtype=F64)
    with pytest.raises(ctorch.SolveError) as caught:
        ctorch.solve_ode(field, y0, times(0.0, 2.0))
    message = str(caught.value)
    if caught.value.status is Status.STEP_UNDERFLOW:
        assert "element 1" in message
        for remedy in ("jump_t", "rtol", "blows up", "stiff"):
            assert remedy in message
    assert math.isfinite(caught.value.step)


def test_tolerances_below_the_dtype_fail_quickly_or_solve() -> None:
    field = Counted(lambda t, y: torch.sin(y) + torch.cos(3 * t))
    try:
        ctorch.solve_ode(
            field, torch.ones(3), times(0.0, 1.0), rtol=1e-12, atol=0.0, max_steps=3000
        )
    except ctorch.SolveError as error:
        assert error.status in (Status.STEP_UNDERFLOW, Status.MAX_STEPS)  # noqa: PT017
    assert field.nfe < 30_000


def test_a_failed_backward_solve_of_the_adjoint_is_an_error_that_says_so() -> None:
    y0 = ONE.clone().requires_grad_()
    calls = Counted(lambda t, y: -y if len(calls.times) < limit else y * math.nan)
    limit = 10**9
    y = ctorch.solve_ode(calls, y0, times(0.0, 1.0), gradient="adjoint").y
    limit = 0
    with pytest.raises(ctorch.SolveError, match="backward pass"):
        y.sum().backward()


def test_errors_in_the_field_come_through_unchanged() -> None:
    class OwnError(Exception):
        pass

    def field(t: Tensor, y: Tensor) -> Tensor:
        if float(t) > 0.2:
            raise OwnError("mine")
        return -y

    for gradient in ("none", "checkpoint", "backprop", "adjoint"):
        with pytest.raises(OwnError, match="mine"):
            ctorch.solve_ode(field, leaf(2), times(0.0, 1.0), gradient=gradient)


@pytest.mark.parametrize(
    ("returned", "kind", "match"),
    [
        (lambda y: y[:1], ValueError, r"\[1\].*\[2\]"),
        (lambda y: y.reshape(2, 1), ValueError, "reshape"),
        (lambda y: y.sum(), ValueError, r"\[\].*\[2\]"),
        (lambda y: (y,), TypeError, "tensor"),
        (lambda y: None, TypeError, "NoneType"),
        (lambda y: 1.0, TypeError, "float"),
        (lambda y: y.to(torch.complex128), TypeError, "complex"),
        (lambda y: y.to(torch.int64), TypeError, "int64"),
    ],
)
@pytest.mark.parametrize("gradient", ["none", "checkpoint"])
def test_what_a_field_may_return(
    returned: Callable[[Tensor], Any], kind: type[Exception], match: str, gradient: str
) -> None:
    with pytest.raises(kind, match=match):
        ctorch.solve_ode(
            lambda t, y: returned(y), torch.ones(2, dtype=F64), times(0.0, 1.0), gradient=gradient
        )


def test_a_wider_dtype_is_refused_and_a_narrower_one_taken() -> None:
    with pytest.raises(TypeError, match="float64"):
        ctorch.solve_ode(lambda t, y: y.double(), torch.ones(2), times(0.0, 1.0))
    y = ctorch.solve_ode(lambda t, y: y.float(), torch.ones(2, dtype=F64), times(0.0, 1.0)).y
    assert y.dtype is F64


@pytest.mark.parametrize(
    ("state", "returned"),
    [
        ((ONE, ONE), lambda y: y[0]),
        ((ONE, ONE), lambda y: (y[0],)),
        ((ONE, torch.ones(2, dtype=F64)), lambda y: (y[1], y[0])),
    ],
)
def test_a_field_of_a_tuple_must_return_its_parts(state: Any, returned: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="func"):
        ctorch.solve_ode(lambda t, y: returned(y), state, times(0.0, 1.0))


def test_a_net_without_gradients_still_fails_with_its_parameters_intact() -> None:
    net = Net()
    before = net.inner.weight.detach().clone()
    with pytest.raises(ctorch.SolveError):
        ctorch.solve_ode(lambda t, y: net(t, y) / 0.0, leaf(2), times(0.0, 1.0))
    assert torch.equal(before, net.inner.weight)
    assert net.inner.weight.grad is None


def test_a_solve_that_creeps_at_the_edge_of_the_domain_ends() -> None:
    """In float32 tiny steps do not move the state, have no error, and grow until they leave it."""

    def field(t: Tensor, y: Tensor) -> Tensor:
        return torch.sqrt(y - 0.5) * 0 - 1

    with pytest.raises(ctorch.SolveError, match="underflow in dt") as failure:
        ctorch.solve_ode(field, torch.ones(1), torch.tensor([0.0, 2.0]))
    assert abs(failure.value.t - 0.5) < 1e-2


def test_a_finite_state_whose_sum_is_not_is_no_failure() -> None:
    y0 = torch.full((2,), 3e38)
    sol = ctorch.solve_ode(lambda t, y: 0 * y, y0, torch.tensor([0.0, 1.0]), method="euler")
    assert torch.equal(sol.y[-1], y0)
