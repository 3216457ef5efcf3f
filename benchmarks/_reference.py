"""Tight solutions and gradients to measure errors against, in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from _problems import Problem


def reference_solution(problem: Problem, every: int = 1) -> np.ndarray | None:
    """Final state of every ``every``-th sample by scipy, or None without it.

    Fields that are stiff in some samples are solved sample by sample with LSODA, others at once
    by DOP853.
    """
    try:
        from scipy.integrate import solve_ivp
    except ImportError:
        return None
    field = problem.numpy_field
    assert field is not None
    y0 = problem.leaves[0].double().numpy()
    options = {"rtol": 1e-11, "atol": 1e-12}
    if every == 1:
        solution = solve_ivp(
            lambda t, y: field(t, y.reshape(y0.shape)).reshape(-1),
            (0.0, problem.end),
            y0.reshape(-1),
            method="DOP853",
            **options,
        )
        return solution.y[:, -1].reshape(y0.shape)
    ends = []
    for i in range(0, len(y0), every):

        def one(t: float, y: np.ndarray, i: int = i) -> np.ndarray:
            if problem.alike:
                return field(t, y[None])[0]
            state = y0.copy()
            state[i] = y
            return field(t, state)[i]

        solution = solve_ivp(one, (0.0, problem.end), y0[i], method="LSODA", **options)
        ends.append(solution.y[:, -1])
    return np.stack(ends)


def reference_gradients(
    problem: Problem,
) -> tuple[np.ndarray, list[np.ndarray]] | tuple[None, None]:
    """Final state and gradients by torchdiffeq's dopri8 at 1e-10, or None without it."""
    try:
        import torchdiffeq
    except ImportError:
        return None, None
    from _peers import arrays, backward, final

    tight = problem.in_double()
    y0: Any = tight.fresh_y0()
    times = torch.tensor([0.0, tight.end], dtype=torch.float64)
    states = torchdiffeq.odeint(tight.field, y0, times, rtol=1e-10, atol=1e-10, method="dopri8")
    y, gradients = backward(tight, y0, final(states))
    return y.numpy(), arrays(gradients)
