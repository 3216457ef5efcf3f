"""``method="scipy_solver"``: scipy's integrators behind the same interface (its stiff ones among
them).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctorch.ode.capture import held_tensors
from ctorch.ode.problem import Problem
from ctorch.ode.run import Failure, Run, collect
from ctorch.ode.solution import Stats, Status

SOLVERS = ("RK45", "RK23", "DOP853", "Radau", "BDF", "LSODA")


def solve(problem: Problem, options: dict[str, Any]) -> Run:
    """Solve by ``scipy.integrate.solve_ivp``, on the CPU and without a graph.

    Args:
        problem: what to solve; events and callbacks are not supported.
        options: "solver" (default "LSODA"), "min_step" (LSODA only), "max_step".

    Raises:
        ImportError: scipy is missing.
        ValueError: unknown solver, complex state, or an event.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError as error:
        raise ImportError('method="scipy_solver" needs scipy: pip install scipy.') from error
    solver = options.get("solver", "LSODA")
    if solver not in SOLVERS:
        raise ValueError(f'options["solver"] must be one of {SOLVERS}, but is {solver!r}.')
    if problem.watch is not None or problem.dense:
        raise ValueError(
            "scipy_solver supports neither events nor dense output: use another method."
        )
    y0 = problem.y0.detach()
    if len(problem.times) == 1 or problem.times[0] == problem.times[-1]:
        return Run(collect(problem, [y0] * len(problem.times)), [], y0, Stats())

    def slope(t: float, y: np.ndarray) -> np.ndarray:
        state = torch.as_tensor(y).to(y0).reshape(y0.shape)
        with torch.no_grad():
            k = problem.field(problem.time(t), state)
        return k.detach().cpu().double().numpy().reshape(-1)

    limits: dict[str, float] = {}
    if "max_step" in options:
        limits["max_step"] = problem.max_step
    if "min_step" in options and solver == "LSODA":
        limits["min_step"] = problem.min_step
    unique = sorted(set(problem.times), reverse=problem.direction < 0)
    result = solve_ivp(
        slope,
        (problem.times[0], problem.times[-1]),
        y0.cpu().double().numpy().reshape(-1),
        method=solver,
        t_eval=unique,
        rtol=_number(problem.tolerances.rtol),
        atol=_number(problem.tolerances.atol),
        **limits,
    )
    found = dict(zip(result.t.tolist(), result.y.T, strict=True))
    found[problem.times[0]] = y0.cpu().double().numpy().reshape(-1)  # some interpolate it
    rows = [torch.as_tensor(found[t]).to(y0).reshape(y0.shape) for t in problem.times if t in found]
    stats = Stats(nfe=problem.field.nfe)
    if result.success and len(rows) == len(problem.times):
        return Run(torch.stack(rows), [], rows[-1], stats)
    reached = float(result.t[-1]) if len(result.t) else problem.times[0]
    message = f"scipy's {solver} failed at t={reached:.9g}: {result.message}"
    failure = Failure(Status.STEP_UNDERFLOW, message, reached, math.nan, math.nan)
    return Run(collect(problem, rows), [], y0, stats, failure.status, failure)


def without_gradient(problem: Problem, run: Run) -> Tensor:
    """The rows, tied to what they depend on, so that asking for their gradient is an error and not
    silence.
    """
    held = held_tensors((problem.field.func, problem.field.args))
    return _NoGradient.apply(run.rows, problem.y0, problem.t, *held)


class _NoGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, *inputs: Tensor) -> Tensor:  # type: ignore[override]
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor) -> Any:  # type: ignore[override]
        raise NotImplementedError(
            'method="scipy_solver" has no exact gradient: use gradient="adjoint" (odeint_adjoint),'
            " or another method."
        )


def _number(tolerance: torch.Tensor) -> Any:
    if tolerance.dim() == 0:
        return float(tolerance)
    return tolerance.detach().cpu().double().numpy().reshape(-1)
