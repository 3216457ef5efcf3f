"""Implicit methods: what they refuse, and how they fail."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ctorch
from ctorch import SolveError, solve_ode
from ctorch.ode import ContinuousAdjoint, Status

from .problems import F64, leaf, times
from .test_implicit import fixed, linear


def test_a_field_without_a_known_diagonal_is_refused_with_the_remedy() -> None:
    y0, t = torch.ones(2, dtype=F64), times(0.0, 1.0)
    how: dict[str, Any] = {"method": "bdf2", "options": {"root_finder": "jacobi_newton"}}
    with pytest.raises(ValueError, match=r"hollow net.*options=.\"diagonal\".*newton"):
        solve_ode(lambda t, y: -y, y0, t, **how)
    with pytest.raises(ValueError, match="no further args"):
        solve_ode(lambda t, y, a: -a * y, y0, t, args=(2.0,), **how)
    with pytest.raises(NotImplementedError, match="one real tensor"):
        solve_ode(lambda t, y: y, (y0, y0), t, **how)


def test_a_diagonal_of_another_field_is_refused() -> None:
    y0, t = torch.ones(2, dtype=F64), times(0.0, 1.0)
    options = {"root_finder": "jacobi_newton", "diagonal": lambda t, y: (-2 * y, -2 + 0 * y)}
    with pytest.raises(ValueError, match="off what func returns by 1"):
        solve_ode(lambda t, y: -y, y0, t, method="bdf2", options=options)
    options["diagonal"] = lambda t, y: (-y, torch.tensor(-1.0))
    with pytest.raises(ValueError, match="diagonal"):
        solve_ode(lambda t, y: -y, y0, t, method="bdf2", options=options)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("bdf2", {"root_finder": "broyden"}, 'must be one of "functional", "jacobi_newton"'),
        ("bdf2", {"max_iters": 0}, "max_iters must be an int, at least 1"),
        ("bdf2", {"root_tol": 0.0}, "root_tol must lie in"),
        ("bdf2", {"batch_dims": 2}, "batch_dims must be an integer from 0 to 1"),
        ("bdf2", {"root_finder": "jacobi_newton", "diagonal": 3}, "must be callable"),
        ("bdf2", {"max_order": 2}, "Unexpected arguments"),
        ("implicit_adams", {"root_finder": "newton", "max_order": 3}, "order 1 or 2"),
    ],
)
def test_bad_options_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solve_ode(
            lambda t, y: -y, torch.ones(2), torch.tensor([0.0, 1.0]), method=method, options=options
        )


def test_a_system_too_large_for_its_jacobian_is_refused() -> None:
    y0, t = torch.ones(5000), torch.tensor([0.0, 1.0])
    with pytest.raises(ValueError, match=r"5000 x 5000.*batch_dims"):
        solve_ode(lambda t, y: -y, y0, t, method="bdf2")
    sol = solve_ode(lambda t, y: -y, y0, t, method="bdf2", options={"batch_dims": 1}, rtol=1e-3)
    assert float(sol.y[-1, 0]) == pytest.approx(math.exp(-1), abs=1e-2)


def test_an_iteration_that_fails_says_where_and_how() -> None:
    field, y0 = linear(torch.tensor(1e4, dtype=F64)), torch.tensor(5.0, dtype=F64)
    options = fixed(0.1, "functional")
    with pytest.raises(SolveError, match=r"diverged at t=0\.02.*step h=1\.000e-01, iteration") as e:
        solve_ode(field, y0, times(0.0, 1.0), method="bdf2", options=options)
    assert e.value.status is Status.NO_ROOT
    assert e.value.t == 0.0
    assert e.value.step == pytest.approx(0.1)
    sol = solve_ode(
        field, y0, times(0.0, 1.0), method="bdf2", options=options, throw=False, gradient="none"
    )
    assert sol.status is Status.NO_ROOT
    assert bool(sol.y[1].isnan())


def test_an_iteration_that_fails_shortens_an_adaptive_step() -> None:
    field, y0 = linear(torch.tensor(1e3, dtype=F64)), torch.tensor(1.0, dtype=F64)
    how: dict[str, Any] = {"method": "bdf2", "rtol": 1e-3, "atol": 1e-3, "gradient": "none"}
    sol = solve_ode(field, y0, times(0.0, 1.0), options={"root_finder": "functional"}, **how)
    newton = solve_ode(field, y0, times(0.0, 1.0), **how)
    assert float(sol.y[-1]) == pytest.approx(math.cos(1.0), abs=1e-3)
    assert sol.stats.rejected > 10 * (1 + newton.stats.rejected)


def test_what_cannot_be_solved_is_an_error_and_not_silence() -> None:
    t = times(0.0, 2.0)
    with pytest.raises(SolveError):
        solve_ode(lambda t, y: y**2, torch.ones(1, dtype=F64), t, method="bdf2", rtol=1e-2)
    with pytest.raises(SolveError):
        solve_ode(lambda t, y: y * math.nan, torch.ones(1, dtype=F64), t, method="bdf2")
    with pytest.raises(SolveError, match="max_steps"):
        solve_ode(lambda t, y: -y, torch.ones(1, dtype=F64), t, method="bdf2", max_steps=3)


def test_what_is_not_built_is_named() -> None:
    y0, t = torch.ones(2, dtype=F64), times(0.0, 1.0)
    solve = lambda y: solve_ode(lambda t, x: -x, y, t, method="bdf2").y.sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(solve)(y0)
    with pytest.raises(NotImplementedError, match="batched"):
        solve_ode(lambda t, x: -x, y0[:, None], t, method="bdf2", batched=True)
    adjoint = ContinuousAdjoint(method="bdf2")
    w = leaf(1)
    with pytest.raises(NotImplementedError, match="adjoint equation"):
        solve_ode(lambda t, x: -w * x, y0, t, method="bdf2", gradient=adjoint)
    drawn = lambda t, x: -w * x + 1e-3 * torch.randn_like(x)  # noqa: E731
    with pytest.raises(ValueError, match="random"):
        solve_ode(drawn, y0, t, method="bdf2")


@pytest.mark.parametrize("method", ["bdf2", "implicit_adams"])
@pytest.mark.parametrize("where", ["state", "field", "Jacobian"])
def test_what_is_not_finite_is_named_and_no_iteration_blamed(method: str, where: str) -> None:
    y0 = torch.tensor([1.0, math.nan if where == "state" else 1.0], dtype=torch.float64)

    def func(t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        if where == "Jacobian":  # that of the branch which is not taken
            return torch.where(y > -1, -y, torch.sqrt(0 * y))
        return torch.where(t > 1.0, math.nan, -1.0) * y if where == "field" else -y

    t, options = torch.tensor([0.0, 2.0]).double(), {"root_finder": "newton"}
    sol = ctorch.solve_ode(func, y0, t, method=method, dt0=0.25, options=options, throw=False)
    assert sol.status == ctorch.ode.Status.NONFINITE
    what = "Jacobian" if where == "Jacobian" else "state y or the vector field"
    assert f"non-finite values in the {what}" in sol.message
    assert "check y0, the parameters of func" in sol.message
    assert sol.y[-1].isnan().all()
