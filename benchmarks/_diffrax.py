"""The problems given to diffrax, compiled by XLA before anything is timed."""

from __future__ import annotations

from typing import Any

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from _measure import Case, Report
from _problems import Problem

jax.config.update("jax_enable_x64", True)

MAX_STEPS = 4096


def diffrax_forward(problem: Problem, max_steps: int = MAX_STEPS) -> Case:
    parameters, y0 = _parameters(problem), _state(problem)
    solve = jax.jit(lambda y, p: _solve(problem, y, p, max_steps, None))
    return Case(
        "diffrax: Dopri5",
        lambda: jax.block_until_ready(solve(y0, parameters)),
        lambda result: _report(result[0], result[1]),
    )


def diffrax_gradient(problem: Problem, variant: str = "checkpoint") -> Case:
    parameters, y0 = _parameters(problem), _state(problem)
    adjoint = {
        "checkpoint": diffrax.RecursiveCheckpointAdjoint,
        "backsolve": diffrax.BacksolveAdjoint,
    }[variant]()

    def loss(inputs: Any) -> Any:
        y, stats = _solve(problem, *inputs, MAX_STEPS, adjoint)
        return problem.loss(y), (y, stats)

    solve = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def describe(result: Any) -> Report:
        (_, (y, stats)), (y_gradient, gradients) = result
        leaf = y_gradient[0] if isinstance(y_gradient, tuple) else y_gradient
        report = _report(y, stats)
        report.gradients = [np.asarray(x, np.float64) for x in (leaf, *gradients)]
        return report

    return Case(
        f"diffrax: Dopri5, {variant}",
        lambda: jax.block_until_ready(solve((y0, parameters))),
        describe,
        differentiates=True,
    )


def _solve(problem: Problem, y0: Any, parameters: Any, max_steps: int, adjoint: Any) -> Any:
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, p: problem.jax_field(jnp, t, y, p)),
        diffrax.Dopri5(),
        0.0,
        problem.end,
        None,
        y0,
        parameters,
        stepsize_controller=diffrax.PIDController(problem.tolerance, problem.tolerance),
        max_steps=max_steps,
        **({} if adjoint is None else {"adjoint": adjoint}),
    )
    return jax.tree_util.tree_map(lambda x: x[-1], solution.ys), solution.stats


def _parameters(problem: Problem) -> Any:
    return [jnp.asarray(p.detach().numpy()) for p in problem.parameters]


def _state(problem: Problem) -> Any:
    leaves = tuple(jnp.asarray(x.numpy()) for x in problem.leaves)
    return leaves if isinstance(problem.y0, tuple) else leaves[0]


def _report(y: Any, stats: Any) -> Report:
    leaf = y[0] if isinstance(y, tuple) else y
    return Report(
        y=np.asarray(leaf, np.float64),
        nfe=6 * int(stats["num_steps"]) + 2,  # by its stages: XLA leaves no call to count
        accepted=int(stats["num_accepted_steps"]),
        rejected=int(stats["num_rejected_steps"]),
    )
