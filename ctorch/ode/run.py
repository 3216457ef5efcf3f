"""The outcome of integrating a problem, and the errors that explain a failed one."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctorch._exceptions import SolveError
from ctorch.ode.dense import DenseOutput, Start
from ctorch.ode.field import Stage
from ctorch.ode.problem import Problem
from ctorch.ode.solution import Stats, Status
from ctorch.ode.steps import Step

#: in place of the number with the largest error: as in csrc/native/task.h
UNKNOWN, NO_SLOPE = -1, -2


@dataclasses.dataclass
class Piece:
    """One step of a continuous solution: start and length in tau (float64), state and slopes."""

    start: Tensor
    length: Tensor
    y: Tensor
    k: Tensor


class Pieces(NamedTuple):
    """All steps of a continuous solution: starts [P], lengths [P], states [P, *shape], slopes
    [stages, P, *shape].
    """

    starts: Tensor
    lengths: Tensor
    y: Tensor
    k: Tensor


@dataclasses.dataclass
class Failure:
    """Why a solve stopped."""

    status: Status
    message: str
    t: float = math.nan
    step: float = math.nan
    error_norm: float = math.nan

    def raise_(self, solution: Any = None) -> None:
        """Raise it as a ``SolveError``."""
        raise SolveError(
            self.message,
            status=self.status,
            t=self.t,
            step=self.step,
            error_norm=self.error_norm,
            solution=solution,
        )


@dataclasses.dataclass
class Run:
    """What an integrator returns.

    Attributes:
        rows: the packed state at the user's times, [T, *shape] (batched [B, T, *shape]); rows not
            reached are NaN.
        steps: accepted steps, where they are kept.
        final: packed state at the end of the last step.
        status: Status; batched [B] int64.
        fired: (time, index of event) where an event ended the solve.
        pieces: the continuous solution, where it was asked for; ``attached``: the same with its
            graph.
        event_tensor: the event's time with its graph, where it has one.
        release: a sweep may let go of the graphs of stages as soon as it has used them.
        first_stage: the first evaluation with its graph, where a batched solve keeps it.
    """

    rows: Tensor
    steps: list[Step]
    final: Tensor
    stats: Stats
    status: Any = Status.SUCCESS
    failure: Failure | None = None
    fired: tuple[float, int] | None = None
    pieces: list[Piece] = dataclasses.field(default_factory=list)
    event_tensor: Tensor | None = None
    attached: Pieces | None = None
    release: bool = False
    first_stage: Stage | None = None

    def stacked(self) -> Pieces:
        """The pieces as one set of tensors."""
        pieces = self.pieces
        return Pieces(
            torch.stack([piece.start for piece in pieces]),
            torch.stack([piece.length for piece in pieces]),
            torch.stack([piece.y for piece in pieces]),
            torch.stack([piece.k for piece in pieces], dim=1),
        )

    def dense_output(
        self, problem: Problem, polynomials: Callable[[Run], Tensor]
    ) -> DenseOutput | Start:
        """The continuous solution; ``polynomials`` are those of the method's interpolant."""
        made = len(self.pieces) if self.attached is None else len(self.attached.starts)
        if not made:  # there was nothing to solve, or the first step failed
            return Start(problem.times[0], problem.y0, problem.layout)
        pieces = self.attached if self.attached is not None else self.stacked()
        return DenseOutput(pieces, polynomials(self), problem.direction, problem.layout)

    def event_time(self, t: Tensor) -> Tensor:
        """The event's time in the dtype of ``t``."""
        assert self.fired is not None
        if self.event_tensor is not None:
            return self.event_tensor.to(t)
        return torch.tensor(self.fired[0], dtype=t.dtype, device=t.device)


def collect(problem: Problem, rows: list[Tensor]) -> Tensor:
    """Stack the rows computed so far; the missing ones are NaN."""
    missing = len(problem.times) - len(rows)
    if missing > 0:
        nothing = torch.full_like(problem.y0, math.nan)
        rows = [*rows, *[nothing] * missing]
    return torch.stack(rows)


def max_steps_failure(
    problem: Problem, t: float, h: float, error: float, end: float | None = None
) -> Failure:
    """The solve needs more steps than allowed; ``end``: as for ``failure_of``."""
    if end is None and problem.watch is None:
        end = problem.times[-1]
    goal = "the event" if end is None else f"t={end:.6g}"
    return Failure(
        Status.MAX_STEPS,
        f"max_steps: {problem.max_steps} steps were not enough to reach {goal}: the solve is at"
        f" t={t:.9g} with step"
        f" h={h:.3e}, error norm {error:.3g}. Loosen rtol and atol, raise max_steps (max_num_steps"
        " in the options of"
        " odeint), or, if the problem is stiff, use an implicit method (bdf2).",
        t,
        h,
        error,
    )


def endless_failure(t: float, h: float, error: float) -> Failure:
    """Steps grow without bound on the way to an event."""
    message = f"the event did not fire before t={t:.3e}, where the step has no bound."
    return Failure(Status.MAX_STEPS, message, t, h, error)


def failure_of(
    problem: Problem,
    y0: Tensor,
    status: Status,
    t: float,
    h: float,
    error: float,
    steps: int,
    worst: int = UNKNOWN,
    end: float | None = None,
) -> Failure:
    """Why a solve stopped, from what was noted of it.

    Args:
        problem: that was to be solved.
        y0: where it began.
        status: how it ended.
        t, h, error: where it was, its next step (limits apart), and the last error norm; NaN where
            there is none.
        steps: how many were tried.
        worst: the number of the packed state with the largest error; UNKNOWN, or NO_SLOPE: the
            slope where it stopped was not finite.
        end: the last time; None: the problem's.
    """
    if math.isfinite(error) or math.isfinite(h):
        h = min(max(h, problem.min_step), problem.max_step)
    if status is Status.MAX_STEPS:
        return max_steps_failure(problem, t, h, error, end)
    if status is Status.STEP_UNDERFLOW and not steps:
        return short_failure(t, h)
    if math.isnan(h) or not bool(y0.isfinite().all()):
        return nonfinite_failure(t, 0.0 if math.isnan(h) else h, "the state y")
    if worst == NO_SLOPE or (not math.isfinite(error) and not steps):
        return nonfinite_failure(t, h, "the vector field func(t, y) (underflow in dt)")
    if status is Status.STEP_UNDERFLOW or not math.isfinite(error):
        return underflow_failure(problem, t, h, error, worst)
    return nonfinite_failure(t, h, "the state y")


def failure_of_sample(
    problem: Problem,
    status: Tensor,
    ends: Callable[[int], tuple[float, float, float, int, int]],
) -> Failure | None:
    """Why the first of the samples that failed did; None: none has.

    Args:
        problem: of a batch.
        status: [B].
        ends: of a sample: t, h, error, steps and worst, as ``failure_of`` takes them.
    """
    failed = status.nonzero().reshape(-1)
    if not len(failed):
        return None
    sample = int(failed[0])
    cause, times = Status(int(status[sample])), problem.t.detach()
    end = float((times if times.dim() == 1 else times[sample])[-1])
    t, h, error, steps, worst = ends(sample)
    failure = failure_of(problem, problem.y0[sample], cause, t, h, error, steps, worst, end)
    others = f" {len(failed)} of {len(status)} samples failed." if len(failed) > 1 else ""
    message = (
        f"sample {sample}: {failure.message}{others} With throw=False the other samples' solutions"
        " are returned, with a status for each."
    )
    return dataclasses.replace(failure, message=message)


def largest(errors: Tensor) -> int:
    """The number with the largest error, of which none is larger than one that is not finite."""
    flat = errors.abs().reshape(-1)
    return int(torch.where(torch.isfinite(flat), flat, math.inf).argmax())


def underflow_failure(
    problem: Problem, t: float, h: float, error: float, worst: int = UNKNOWN
) -> Failure:
    """Steps became shorter than the resolution of time; ``worst``: as for ``failure_of``."""
    where = ""
    if worst >= 0:
        element = worst // 2 if problem.layout.is_complex else worst
        where = f"; the largest error is in element {element} of the flattened state"
    if not math.isfinite(error):
        return Failure(
            Status.NONFINITE,
            "underflow in dt: the vector field (or the state) is not finite for any step from"
            f" t={t:.9g}"
            f" (h={h:.3e}, error norm {error}{where}). The solution may blow up there, or func"
            " returns NaN or"
            " infinity: evaluate func(t, y) at this point.",
            t,
            h,
            error,
        )
    return Failure(
        Status.STEP_UNDERFLOW,
        f"underflow in dt: at t={t:.9g} the error test asks for a step below the resolution of"
        f" time (h={h:.3e},"
        f" error norm {error:.3g}{where}). Likely the field jumps there (give the time in"
        " options['jump_t']), the"
        " tolerances are below what the dtype resolves (use float64 or a larger rtol), the"
        " solution blows up, or the"
        " problem is stiff.",
        t,
        h,
        error,
    )


def short_failure(t: float, h: float) -> Failure:
    """The first step cannot be told from none."""
    return Failure(
        Status.STEP_UNDERFLOW,
        f"underflow in dt: at t={t:.9g} a first step of h={h:.3e} is below the resolution of time:"
        " count time from a nearer origin, or give a longer first step (dt0).",
        t,
        h,
    )


def late_failure(problem: Problem, rows: Iterable[Tensor]) -> Failure:
    """A NaN or infinity found at the end of steps that are not looked at one by one; the states at
    the output times tell when it came.
    """
    times = problem.times
    bad = (i for i, row in enumerate(rows) if not bool(torch.isfinite(row.detach()).all()))
    first = next(bad, len(times))
    if first == 0:
        return nonfinite_failure(times[0], 0.0, "the state y")
    t = times[first - 1]
    where = (
        f"between t={t:.9g} and t={times[first]:.9g}" if first < len(times) else f"after t={t:.9g}"
    )
    return Failure(
        Status.NONFINITE,
        f"non-finite values in the state y, which came {where}: func returned them, or the solution"
        " grew beyond all numbers, as it does where steps are too long for a stiff problem. Ask for"
        " more output times to see when, use shorter steps or an adaptive method.",
        t,
    )


def nonfinite_failure(t: float, h: float, what: str) -> Failure:
    """A NaN or infinity that no shorter step can avoid."""
    return Failure(
        Status.NONFINITE,
        f"non-finite values in {what} at t={t:.9g} (step h={h:.3e}): check y0, the parameters of"
        " func and its domain.",
        t,
        h,
        math.nan,
    )
