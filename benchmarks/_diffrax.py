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


def diffrax_forward(
    problem: Problem, max_steps: int = MAX_STEPS, *, method: str = "Dopri5", each: bool = False
) -> Case:
    """A solve with one step for all samples or, under ``vmap``, with steps of each one's own."""
    parameters, args, y0 = _parameters(problem), _args(problem), _state(problem)
    solver = getattr(diffrax, method)()

    def forward(y: Any, args: Any, parameters: Any) -> Any:
        return _solve(problem, y, [*parameters, *args], max_steps, None, solver)

    solve = jax.jit(jax.vmap(forward, in_axes=(0, 0, None)) if each else forward)
    return Case(
        f"diffrax: {method}" + ", each sample its own steps" * each,
        lambda: jax.block_until_ready(solve(y0, args, parameters)),
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


def diffrax_training(problem: Problem, times: np.ndarray, target: np.ndarray, rate: float) -> Any:
    """A step of gradient descent on the squared distance from ``target`` [T, B, D] at ``times``."""
    ts, y0, goal = jnp.asarray(times), _state(problem), jnp.asarray(target)

    def loss(parameters: Any) -> Any:
        y, stats = _solve(problem, y0, parameters, MAX_STEPS, None, None, ts)
        return ((y - goal) ** 2).mean(), stats

    @jax.jit
    def step(parameters: Any) -> Any:
        (_, stats), gradients = jax.value_and_grad(loss, has_aux=True)(parameters)
        return [p - rate * g for p, g in zip(parameters, gradients, strict=True)], gradients, stats

    state = [_parameters(problem)]

    def run() -> Any:
        state[0], gradients, stats = jax.block_until_ready(step(state[0]))
        return gradients, stats

    def describe(result: Any) -> Report:
        gradients, stats = result
        report = _report(None, stats)
        report.gradients = [np.asarray(x, np.float64) for x in gradients]
        return report

    return Case("diffrax: Dopri5, checkpoint", run, describe, differentiates=True)


def _solve(
    problem: Problem,
    y0: Any,
    parameters: Any,
    max_steps: int,
    adjoint: Any,
    solver: Any = None,
    times: Any = None,
) -> Any:
    """The state at the end, or at all ``times``."""
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, y, p: problem.jax_field(jnp, t, y, p)),
        solver or diffrax.Dopri5(),
        0.0,
        problem.end,
        None,
        y0,
        parameters,
        stepsize_controller=diffrax.PIDController(problem.tolerance, problem.tolerance),
        max_steps=max_steps,
        saveat=diffrax.SaveAt(t1=True) if times is None else diffrax.SaveAt(ts=times),
        **({} if adjoint is None else {"adjoint": adjoint}),
    )
    if times is not None:
        return solution.ys, solution.stats
    return jax.tree_util.tree_map(lambda x: x[-1], solution.ys), solution.stats


def _parameters(problem: Problem) -> Any:
    return [jnp.asarray(p.detach().numpy()) for p in problem.parameters]


def _args(problem: Problem) -> Any:
    return [jnp.asarray(x.numpy()) for x in problem.args]


def _state(problem: Problem) -> Any:
    leaves = tuple(jnp.asarray(x.numpy()) for x in problem.leaves)
    return leaves if isinstance(problem.y0, tuple) else leaves[0]


_COUNTS = ("steps", "accepted_steps", "rejected_steps")


def _report(y: Any, stats: Any) -> Report:
    leaf = y[0] if isinstance(y, tuple) else y
    most = {name: int(np.max(stats[f"num_{name}"])) for name in _COUNTS}
    return Report(
        y=None if leaf is None else np.asarray(leaf, np.float64),
        nfe=6 * most["steps"] + 2,  # by its stages: XLA leaves no call to count
        accepted=most["accepted_steps"],
        rejected=most["rejected_steps"],
    )
