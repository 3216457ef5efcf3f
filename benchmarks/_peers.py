"""The same problem given to every solver: ctorch, torchdiffeq, torchode, diffrax and scipy.

A peer that is not installed is named once and left out.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _measure import Case, Report
from _problems import Problem
from torch import Tensor, nn

INSTALL = {
    "torchdiffeq": "pip install torchdiffeq",
    "torchode": "pip install torchode",
    "diffrax": "pip install diffrax",
    "scipy": "pip install scipy",
}


def present(wanted: list[str]) -> set[str]:
    """Which of the peers are installed; says how to get the others."""
    found = {name for name in wanted if importlib.util.find_spec(name) is not None}
    for name in wanted:
        if name not in found:
            print(f"{name}: absent, left out ({INSTALL[name]})")
    return found


def version(name: str) -> str:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import version as installed

    try:
        return installed(name)
    except PackageNotFoundError:
        return getattr(importlib.import_module(name), "__version__", "?")


class Counted(nn.Module):
    """Counts calls of a field."""

    def __init__(self, field: Callable[..., Any]) -> None:
        super().__init__()
        self.field = field
        self.nfe = 0

    def forward(self, t: Tensor, y: Any, *args: Any) -> Any:
        self.nfe += 1
        return self.field(t, y, *args)


class CountedSteps(Counted):
    """Counts steps too, by torchdiffeq's callbacks."""

    accepted = rejected = 0

    def callback_accept_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.accepted += 1

    def callback_reject_step(self, t: Tensor, y: Tensor, dt: Tensor) -> None:
        self.rejected += 1


def first(state: Any) -> Tensor:
    return state[0] if isinstance(state, tuple) else state


def final(states: Any) -> Any:
    return tuple(x[-1] for x in states) if isinstance(states, tuple) else states[-1]


def tolerances(problem: Problem) -> dict[str, Any]:
    return {"rtol": problem.tolerance, "atol": problem.tolerance}


def backward(problem: Problem, y0: Any, end: Any) -> tuple[Any, list[Tensor]]:
    assert problem.loss is not None
    inputs = [first(y0), *problem.parameters]
    return first(end).detach(), list(torch.autograd.grad(problem.loss(end), inputs))


def arrays(tensors: list[Tensor]) -> list[np.ndarray]:
    return [x.detach().double().numpy() for x in tensors]


# ---------------------------------------------------------------------------------------- ctorch


def ours_forward(problem: Problem, *, method: str = "dopri5", batched: bool = False) -> Case:
    import ctorch

    times = problem.times()

    def solve(field: Callable[..., Any]) -> Any:
        return ctorch.solve_ode(
            field,
            problem.y0,
            times,
            method=method,
            gradient="none",
            batched=batched,
            **tolerances(problem),
        )

    def describe(solution: Any) -> Report:
        counted = Counted(problem.field)
        stats = solve(counted).stats
        end = solution.y[:, -1] if batched else final(solution.y)
        return Report(
            y=first(end).double().numpy(),
            nfe=counted.nfe,
            accepted=most(stats.accepted),
            rejected=most(stats.rejected),
        )

    name = f"ctorch: {method}, each sample its own steps" if batched else f"ctorch: {method}"
    return Case(name, lambda: solve(problem.field), describe)


def native_forward(problem: Problem, *, batched: bool = False) -> Case:
    """The whole solve compiled, through the handle of ``ctorch.ode.compile``; under ``no_grad``."""
    import ctorch

    times = problem.times().double()
    solve = ctorch.ode.compile(problem.field, batched=batched, **tolerances(problem))

    def call() -> Any:
        return solve(problem.y0, times, *problem.args)

    def describe(solution: Any) -> Report:
        stats = solution.stats
        end = solution.y[:, -1] if batched else final(solution.y)
        return Report(
            y=first(end).double().numpy(),
            nfe=most(stats.nfe),
            accepted=most(stats.accepted),
            rejected=most(stats.rejected),
        )

    name = "ctorch: native dopri5" + ", each sample its own steps" * batched
    return Case(name, call, describe)


def ours_odeint(problem: Problem) -> Case:
    import ctorch

    return _odeint(ctorch.odeint, problem, "ctorch: odeint dopri5")


def ours_gradient(problem: Problem, gradient: str) -> Case:
    import ctorch

    times = problem.times()

    def solve(field: Callable[..., Any]) -> tuple[Any, list[Tensor], int, Any]:
        y0 = problem.fresh_y0()
        solution = ctorch.solve_ode(field, y0, times, gradient=gradient, **tolerances(problem))
        calls = getattr(field, "nfe", 0)
        return *backward(problem, y0, final(solution.y)), calls, solution.stats

    def describe(result: tuple[Any, list[Tensor], int, Any]) -> Report:
        counted = Counted(problem.field)
        y, gradients, calls, stats = solve(counted)
        return Report(
            y=y.double().numpy(),
            gradients=arrays(gradients),
            nfe=calls,
            nfe_backward=counted.nfe - calls,
            vjps=most(stats.vjps),
            accepted=most(stats.accepted),
            rejected=most(stats.rejected),
        )

    return Case(f"ctorch: dopri5, {gradient}", lambda: solve(problem.field), describe, True)


def most(count: Any) -> int:
    return int(torch.as_tensor(count).max())


# ----------------------------------------------------------------------------------- torchdiffeq


def torchdiffeq_forward(problem: Problem) -> Case:
    import torchdiffeq

    return _odeint(torchdiffeq.odeint, problem, "torchdiffeq: dopri5")


def _odeint(odeint: Any, problem: Problem, name: str) -> Case:
    times = problem.times()
    options = tolerances(problem)

    @torch.no_grad()
    def solve(field: Callable[..., Any]) -> Any:
        return odeint(field, problem.y0, times, method="dopri5", **options)

    def describe(states: Any) -> Report:
        counted = CountedSteps(problem.field)
        solve(counted)
        y = first(final(states)).double().numpy()
        return Report(y=y, nfe=counted.nfe, accepted=counted.accepted, rejected=counted.rejected)

    return Case(name, lambda: solve(problem.field), describe)


def torchdiffeq_gradient(problem: Problem, variant: str) -> Case:
    import torchdiffeq

    times = problem.times()
    options = tolerances(problem)
    odeint = torchdiffeq.odeint if variant == "backprop" else torchdiffeq.odeint_adjoint
    if variant == "seminorm":
        options["adjoint_options"] = {"norm": "seminorm"}

    def solve(field: Callable[..., Any]) -> tuple[Any, list[Tensor], int]:
        y0 = problem.fresh_y0()
        end = final(odeint(field, y0, times, method="dopri5", **options))
        calls = getattr(field, "nfe", 0)
        return *backward(problem, y0, end), calls

    def describe(result: Any) -> Report:
        counted = CountedSteps(problem.field)
        y, gradients, calls = solve(counted)
        return Report(
            y=y.double().numpy(),
            gradients=arrays(gradients),
            nfe=calls,
            nfe_backward=counted.nfe - calls,
            accepted=counted.accepted,
            rejected=counted.rejected,
        )

    return Case(f"torchdiffeq: dopri5, {variant}", lambda: solve(problem.field), describe, True)


# -------------------------------------------------------------------------------------- torchode


def _torchode_solver(problem: Problem) -> Any:
    import torchode

    term = torchode.ODETerm(problem.field)
    controller = torchode.IntegralController(
        atol=problem.tolerance, rtol=problem.tolerance, term=term
    )
    return torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)


def _torchode_problem(problem: Problem, y0: Tensor) -> Any:
    import torchode

    batch = len(y0)
    return torchode.InitialValueProblem(
        y0=y0,
        t_start=torch.zeros(batch, dtype=y0.dtype),
        t_end=torch.full((batch,), problem.end, dtype=y0.dtype),
    )


def _torchode_report(solution: Any, **more: Any) -> Report:
    stats = solution.stats
    return Report(
        y=solution.ys[:, -1].detach().double().numpy(),
        nfe=int(stats["n_f_evals"].max()),
        accepted=int(stats["n_accepted"].max()),
        rejected=int((stats["n_steps"] - stats["n_accepted"]).max()),
        **more,
    )


def torchode_forward(problem: Problem) -> Case:
    solver = _torchode_solver(problem)
    ivp = _torchode_problem(problem, first(problem.y0))

    @torch.no_grad()
    def solve() -> Any:
        return solver.solve(ivp)

    return Case("torchode: dopri5", solve, _torchode_report)


def torchode_gradient(problem: Problem) -> Case:
    solver = _torchode_solver(problem)

    def solve() -> Any:
        y0 = problem.fresh_y0()
        solution = solver.solve(_torchode_problem(problem, y0))
        return solution, backward(problem, y0, solution.ys[:, -1])[1]

    return Case(
        "torchode: dopri5, backprop",
        solve,
        lambda result: _torchode_report(result[0], gradients=arrays(result[1])),
        differentiates=True,
    )


# ----------------------------------------------------------------------------------------- scipy


def scipy_forward(problem: Problem) -> Case:
    from scipy.integrate import solve_ivp

    y0 = first(problem.y0).double().numpy()

    def solve() -> Any:
        return solve_ivp(
            lambda t, y: problem.numpy_field(t, y.reshape(y0.shape)).reshape(-1),
            (0.0, problem.end),
            y0.reshape(-1),
            method="RK45",
            rtol=problem.tolerance,
            atol=problem.tolerance,
        )

    def describe(solution: Any) -> Report:
        y = solution.y[:, -1].reshape(y0.shape)
        return Report(y=y, nfe=solution.nfev, accepted=len(solution.t) - 1)

    return Case("scipy: RK45", solve, describe)
