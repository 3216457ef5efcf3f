"""The formulas of implicit linear multistep methods of order 2 and below.

Every stage is an equation z = constant + scale * f(t, z), solved by a function ``stage``; what else
there is are linear combinations. A step starts from the state y, the slope k there as the formulas
imply it, and, for BDF2, the state at the start of the step before.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

#: solves a stage: (abscissa, constant, scale, first guess) -> z
Stage = Callable[[float, Tensor, Any, Tensor], Tensor]

#: BDF2 is stable for steps that grow by less than this (Hairer, Nørsett, Wanner I, III.5); a longer
#: step starts anew
MAX_RATIO = 1 + math.sqrt(2)
GAMMA = 1 - math.sqrt(0.5)


@dataclasses.dataclass(slots=True, eq=False)
class ImplicitStep:
    """One step, as it is made and made again.

    Attributes:
        t, h, t1: start, signed length, end.
        first, last: the times at which the field is evaluated for them.
        base: index of the user's time with which the start moves, or FIXED.
        end: index of the user's time on which the step ends, FREE or FIXED.
        formula: key of ``FORMULAS``.
        before: the step before, whose start the formula reads.
        state: y, k and y before, without graph.
        fresh: k is evaluated by this step, at ``first``.
        roots: of the stages.
        outputs: (row, theta); theta None is the end.
        fired: the last output is an event's, whose time is a constant to the solve.
    """

    t: float
    h: float
    t1: float
    first: float
    last: float
    base: int
    end: int
    formula: str
    before: ImplicitStep | None
    state: State
    fresh: bool
    roots: list[Tensor] = dataclasses.field(default_factory=list)
    outputs: list[tuple[int, float | None]] = dataclasses.field(default_factory=list)
    fired: bool = False
    stages: None = None


class State(NamedTuple):
    """State and slope at the start of a step, and the state where the step before began."""

    y: Tensor
    k: Tensor
    before: Tensor


class Made(NamedTuple):
    """End of a step: state, slope, and the estimate of the step's error, or None."""

    y: Tensor
    k: Tensor
    error: Tensor | None


def start(state: State, h: Any, h_before: Any, stage: Stage) -> Made:
    """A step from a state alone, by the L-stable SDIRK method of order 2 (Alexander, "Diagonally
    implicit Runge-Kutta methods for stiff ODEs", 1977).

    The error is estimated from the second difference of the three slopes, rightly for linear
    fields; it is overestimated where the slope hangs on time alone.
    """
    y, c = state.y, GAMMA
    scale = c * h
    z = stage(c, y, scale, y)
    k = (z - y) / scale
    constant = y + (1 - c) * h * k
    y1 = stage(1.0, constant, scale, constant)
    k1 = (y1 - constant) / scale
    bend = (k1 - k) / (1 - c) - (k - state.k) / c
    return Made(y1, k1, h * (c * (3 - 2 * c) - 1 / (6 * c)) * bend)


def bdf2(state: State, h: Any, h_before: Any, stage: Stage) -> Made:
    """The backward differentiation formula of order 2 with steps of any ratio (Hairer, Nørsett,
    Wanner I, III.5).

    The first guess extrapolates state, slope and earlier state by a parabola; its distance from the
    result is a multiple of the error.
    """
    y, k, before = state
    w = h / h_before
    guess = y + (1 + w) * h * k - w * w * (y - before)
    constant = y + (w * w / (1 + 2 * w)) * (y - before)
    scale = h * ((1 + w) / (1 + 2 * w))
    y1 = stage(1.0, constant, scale, guess)
    return Made(y1, (y1 - constant) / scale, (y1 - guess) * ((1 + w) / (2 + 3 * w)))


def trapezoid(state: State, h: Any, h_before: Any, stage: Stage) -> Made:
    """The Adams-Moulton method of order 2."""
    y, k, _ = state
    constant = y + 0.5 * h * k
    y1 = stage(1.0, constant, 0.5 * h, y + h * k)
    return Made(y1, (y1 - constant) / (0.5 * h), None)


def euler(state: State, h: Any, h_before: Any, stage: Stage) -> Made:
    """The implicit Euler method, of order 1."""
    y1 = stage(1.0, state.y, h, state.y + h * state.k)
    return Made(y1, (y1 - state.y) / h, None)


FORMULAS = {"start": start, "bdf2": bdf2, "trapezoid": trapezoid, "euler": euler}


def between(state: State, made: Made, h: Any, x: Any, linear: bool) -> Tensor:
    """The state at a fraction x of a step: by the cubic through states and slopes, or a line."""
    move = made.y - state.y
    if linear:
        return state.y + x * move
    rest = 1 - x
    slopes = h * (x * rest * rest * state.k - x * x * rest * made.k)
    return state.y + x * x * (3 - 2 * x) * move + slopes
