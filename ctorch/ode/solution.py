"""What a solve returns."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable
from typing import Any

from torch import Tensor

from ctorch.ode.dense import as_time


class Status(enum.IntEnum):
    """How a solve ended."""

    SUCCESS = 0  #: t[-1] was reached
    EVENT = 1  #: a terminal event ended it
    MAX_STEPS = 2  #: as many attempts as were allowed were not enough
    STEP_UNDERFLOW = 3  #: the error test wants steps below the resolution of time
    NONFINITE = 4  #: NaN or infinity in the state or the vector field
    NO_ROOT = 5  #: the iteration for an implicit step did not converge


@dataclasses.dataclass
class Stats:
    """Work done by a solve.

    Attributes:
        nfe: evaluations of the vector field. A batched solve evaluates the whole batch at once, and
            counts that as one; a native one evaluates samples by themselves: [B] int64.
        accepted, rejected: steps; int, or [B] int64 in a batched solve.
        vjps: vector-Jacobian products of the vector field in the backward pass (0 until it has
            run).
        nfe_backward: evaluations of the vector field in the backward pass.
        jacobians: Jacobian matrices formed by an implicit method.
    """

    nfe: Any = 0
    accepted: Any = 0
    rejected: Any = 0
    vjps: int = 0
    nfe_backward: int = 0
    jacobians: int = 0

    @property
    def steps(self) -> Any:
        """Attempted steps."""
        return self.accepted + self.rejected


@dataclasses.dataclass
class EventRecord:
    """The terminal event of a solve.

    Attributes:
        t: 0-dim tensor, time of the event; differentiable.
        y: the state there; differentiable.
        index: which of the events fired.
    """

    t: Tensor
    y: Any
    index: int


@dataclasses.dataclass
class Solution:
    """Solution of an initial value problem.

    Attributes:
        t: output times, [T] (or [B, T]).
        y: states there: [T, *shape] (batched: [B, T, *shape]), or a pytree of such tensors. Rows
            that a failed solve (``throw=False``) did not reach are NaN.
        stats: work done.
        status: a ``Status``; [B] int64 tensor of its values in a batched solve.
        event: the event that ended the solve, if one did.
        dense: the continuous solution, if it was asked for; ``sol(t)`` calls it.
        message: what went wrong, if something did.
    """

    t: Tensor
    y: Any
    stats: Stats
    status: Any = Status.SUCCESS
    event: EventRecord | None = None
    dense: Callable[[Tensor], Any] | None = None
    message: str = ""

    def __call__(self, t: float | Tensor) -> Any:
        """The state at any time of the solved interval. ``t``: number or tensor of any shape [*S]
        -> [*S, *shape]. Numbers are taken in float64.

        Raises:
            ValueError: the solve had not ``dense=True``, or ``t`` lies outside the interval.
        """
        if self.dense is None:
            raise ValueError("this solution has no continuous form: solve with dense=True.")
        return self.dense(as_time(t))
