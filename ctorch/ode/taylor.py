"""``method="taylor"``: steps along the solution's own Taylor polynomial, of high order.

The step is as long as the last two coefficients allow (Jorba and Zou, "A software package for the
numerical integration of ODEs by means of high-order Taylor methods", Experimental Mathematics 14,
2005), so hardly a step is ever rejected; the polynomial is the dense output.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch._autocast import autocasts
from ctorch._exceptions import ArgumentError
from ctorch._numbers import as_int
from ctorch.autodiff.series import taylor_series
from ctorch.ode.continuous import ContinuousAdjoint
from ctorch.ode.field import Stage, UnexpectedGraph
from ctorch.ode.problem import Problem
from ctorch.ode.run import (
    Failure,
    Piece,
    Run,
    collect,
    late_failure,
    max_steps_failure,
    nonfinite_failure,
    underflow_failure,
)
from ctorch.ode.solution import Stats, Status
from ctorch.ode.steps import EVENT, FIXED, FREE
from ctorch.ode.transforms import follows, transforms_active, under_vmap

if TYPE_CHECKING:
    from ctorch.ode.solve import Request

LOWEST, HIGHEST = 2, 60


def solve(request: Request, problem: Problem) -> tuple[Run, Tensor, Problem]:
    """Solve by Taylor's method. Returns the run, its rows with their graph, and the problem."""
    from ctorch.ode import continuous

    plain = transforms_active()
    if not (plain or request.differentiates):
        with torch.no_grad():
            run = TaylorLoop(request, problem, "none").run()
    elif request.adjoint and not plain:
        request.gradient = _adjoint(request.gradient)
        loop = TaylorLoop(request, problem, "none")
        run, rows = continuous.solve(request, problem, lambda first: loop.run())
        return run, rows, problem
    else:
        kept = "backprop" if plain else str(request.gradient)
        run = TaylorLoop(request, problem, kept).run()
    return run, run.rows, problem


def _adjoint(given: Any) -> ContinuousAdjoint:
    """The adjoint equation's right hand side is itself a derivative: another method solves it."""
    given = given if isinstance(given, ContinuousAdjoint) else ContinuousAdjoint()
    if given.method == "taylor":
        raise NotImplementedError(
            'the adjoint equation cannot be solved by method="taylor": use gradient="checkpoint",'
            ' which is exact, or ContinuousAdjoint(method="dopri8").'
        )
    return given if given.method is not None else dataclasses.replace(given, method="dopri8")


def polynomials(order: int) -> Tensor:
    """A Taylor polynomial as an interpolant: slope i is ``c_i h^(i-1)``, its weight theta^i."""
    return torch.eye(order, dtype=torch.float64)


def choose_order(problem: Problem, option: Any, fixed: bool) -> int:
    """The order for a tolerance by Jorba and Zou's rule, ``1 - ln(eps) / 2``, or the one asked for.

    It makes a step's cost, taken to grow as the square of the order, least for the time covered.
    """
    if option is not None:
        lowest = 1 if fixed else LOWEST
        number = as_int(option)
        if number is None:
            raise TypeError(f"options['order'] must be an int, but is {type(option).__name__}.")
        if not lowest <= number <= HIGHEST:
            raise ArgumentError(
                f"options['order'] must be from {lowest} to {HIGHEST}, but is {number}."
            )
        return number
    rtol, atol = (float(x.min()) for x in (problem.tolerances.rtol, problem.tolerances.atol))
    eps = max(rtol if rtol > 0 else atol, torch.finfo(problem.layout.dtype).eps)
    return max(4, math.ceil(1 - 0.5 * math.log(min(eps, 1.0))))


def coefficients(problem: Problem, t: Tensor, y: Tensor, order: int) -> Tensor:
    """Taylor coefficients of the packed state, [p + 1, *shape]."""
    field, layout = problem.field, problem.layout
    func, args = field.func, field.args
    if args:
        func = lambda t, y: field.func(t, y, *args)  # noqa: E731
    found = taylor_series(func, t, layout.unpack(y), order)
    if layout.plain:
        return found  # type: ignore[no-any-return]
    parts = [pytree.tree_map(lambda s, k=k: s[k], found) for k in range(order + 1)]
    return torch.stack([layout.pack(part) for part in parts])


@dataclasses.dataclass(frozen=True)
class Now:
    """Where a solve stands.

    Attributes:
        tau, y: time in tau = direction * t, and packed state.
        moving: the time (float64) with its derivative, where that is followed.
        jumps: the field jumps here.
    """

    tau: float
    y: Tensor
    moving: Tensor | None
    jumps: bool = False


@dataclasses.dataclass
class Choice:
    """A step as it was decided on.

    Attributes:
        tau1, end, jumps: its end: when, on which of the user's times (or FREE, FIXED), and whether
            the field jumps there.
        found: (row, distance from the start in tau) of the outputs in it; None: the end itself.
    """

    tau1: float
    end: int
    jumps: bool = False
    found: list[tuple[int, float | None]] = dataclasses.field(default_factory=list)


#: decides on a step from its (detached) coefficients; None: there is none
Choose = Callable[[Now, Tensor], Choice | None]


class TaylorLoop:
    """One solve.

    Args:
        request, problem: what to solve.
        kept: "none", "backprop" (the graphs of all steps) or "checkpoint" (each is made again).
    """

    def __init__(self, request: Request, problem: Problem, kept: str) -> None:
        options = request.options
        self.request, self.problem, self.kept = request, problem, kept
        self.fixed = any(options.get(key) is not None for key in ("step_size", "grid_constructor"))
        self.order = choose_order(problem, options.get("order"), self.fixed)
        self.goals = [problem.direction * t for t in problem.times]
        self.endless = problem.watch is not None and problem.watch.until_event
        self.follows = False

    def run(self) -> Run:
        """Make the steps."""
        problem, graphs = self.problem, self.kept != "none"
        self.stats, self.pieces = Stats(), list[Piece]()
        self.failure: Failure | None = None
        self.fired: tuple[float, int] | None = None
        self.error = 0.0  # of the last step, for messages
        self.follows = graphs and follows(problem.t)
        y0 = problem.y0 if graphs else problem.y0.detach()
        self.rows = [y0 for goal in self.goals if goal == self.goals[0]]
        now = Now(self.goals[0], y0, problem.t[0].double().cpu() if self.follows else None)
        if self.reading:
            now = (self._given_steps if self.fixed else self._chosen_steps)(now)
            checks = self.failure is None and not transforms_active()
            if checks and not bool(torch.isfinite(now.y).all()):
                self.failure = late_failure(problem, self.rows)
        status = Status.SUCCESS if self.fired is None else Status.EVENT
        if self.failure is not None:
            status = self.failure.status
        rows = torch.stack(self.rows) if self.fired is not None else collect(problem, self.rows)
        run = Run(rows, [], now.y, self.stats, status, self.failure, self.fired, self.pieces)
        if self.pieces and graphs:
            run.attached = run.stacked()
        return run

    @property
    def reading(self) -> bool:
        """Whether there is something left to find."""
        return self.fired is None and (self.endless or len(self.rows) < len(self.goals))

    # -- the two loops

    def _chosen_steps(self, now: Now) -> Now:
        knots, longest = (
            self.problem.knots(ends=not self.endless),
            self.problem.first_step or math.inf,
        )
        while self.reading:
            while knots and knots[0][0] <= now.tau:
                knots.pop(0)
            knot = knots[0] if knots else None
            after = self._step(now, partial(self._choose, knot=knot, longest=longest))
            if after is None:
                break
            longest = 10 * (after.tau - now.tau) if self.endless else math.inf
            now = after
        return now

    def _given_steps(self, now: Now) -> Now:
        knots = self.request.knots(self.problem)
        assert knots is not None
        grid: Iterator[tuple[float, int]] = knots()
        next(grid)
        for t1, end in grid:
            if not self.reading:
                break
            step = Choice(self.problem.direction * t1, end)
            after = self._step(now, partial(self._take, step=step))
            if after is None:
                break
            now = after
        return now

    # -- one step

    def _step(self, now: Now, choose: Choose) -> Now | None:
        """Make a step and read off it what lies in it; None where it failed."""
        chosen: list[Choice | None] = []

        def make(y: Tensor, moving: Tensor | None) -> Any:
            c = self._series(now, y, moving)
            if chosen:  # made again, in the backward pass
                self.stats.nfe_backward += self.order
            else:
                self.stats.nfe += self.order
                with torch.no_grad():
                    chosen.append(choose(now, c.detach()))
            step = chosen[0]
            return None if step is None else self._ends(now, moving, step, c)

        if self.kept == "checkpoint":
            from torch.utils.checkpoint import checkpoint

            made = checkpoint(make, now.y, now.moving, use_reentrant=False)
        else:
            made = make(now.y, now.moving)
        step = chosen[0]
        if step is None:
            return None
        values, piece = made
        self.stats.accepted += 1
        self.rows += values[1:]
        if piece is not None:
            self.pieces.append(piece)
        if self.problem.progress is not None:
            self.problem.progress(self.problem.direction * step.tau1)
        moving = None if now.moving is None else now.moving + self._length(now, now.moving, step)
        return Now(step.tau1, values[0], moving, step.jumps)

    def _series(self, now: Now, y: Tensor, moving: Tensor | None) -> Tensor:
        """Taylor coefficients of the packed state, [p + 1, *shape]."""
        problem = self.problem
        value = problem.direction * now.tau
        if now.jumps:
            value = self._beside(value, problem.direction * math.inf)
        t = problem.time(value) if moving is None else problem.follow(moving, value)
        c = coefficients(problem, t, y, self.order)
        if self.kept == "none" and c.requires_grad and torch.is_grad_enabled():
            raise UnexpectedGraph(Stage(t, y, c[1]))
        return c

    def _length(self, now: Now, moving: Tensor, step: Choice) -> Tensor:
        """The signed length of a step that hangs on where it starts and ends."""
        exact = self.problem.direction * (step.tau1 - now.tau)
        if step.end == FREE:
            return torch.tensor(exact, dtype=torch.float64)
        if step.end == FIXED:
            return exact + (moving.detach() - moving)
        return self._until(step.end, moving, exact)

    def _until(self, row: int, moving: Tensor, exact: float) -> Tensor:
        """The time from ``moving`` to a user's time."""
        later = self.problem.t[row].double().cpu()
        return exact + (later - later.detach()) - (moving - moving.detach())

    def _ends(self, now: Now, moving: Tensor | None, step: Choice, c: Tensor) -> Any:
        """States at the end of a step and at the outputs in it, and the step as a piece of the
        continuous solution, where that is wanted.
        """
        direction = self.problem.direction
        inner = [(row, at) for row, at in step.found if at is not None]
        if moving is None:
            distances = [step.tau1 - now.tau, *(at for _, at in inner)]
            s = direction * torch.tensor(distances, dtype=torch.float64)
        else:
            lengths = [self._length(now, moving, step)]
            for row, at in inner:
                exact = direction * at
                fixed = exact + (moving.detach() - moving)  # an event's time is a constant here
                lengths.append(fixed if row == EVENT else self._until(row, moving, exact))
            s = torch.stack(lengths)
        values = evaluate(c, s)
        piece = None
        if self.problem.dense:
            start = now.tau if moving is None else direction * moving
            powers = s[0] ** torch.arange(self.order, dtype=torch.float64)
            scaled = _times(powers, c[1:])
            start = torch.as_tensor(start, dtype=torch.float64)
            piece = Piece(start, direction * s[0], c[0], scaled)
        end, *between = values.unbind()
        found = iter(between)
        return [end, *(end if at is None else next(found) for _, at in step.found)], piece

    # -- decisions

    def _choose(
        self, now: Now, c: Tensor, knot: tuple[float, int, bool] | None, longest: float
    ) -> Choice | None:
        """The longest step that the coefficients allow and the field at its end confirms."""
        problem, p = self.problem, self.order
        direction, t = problem.direction, problem.direction * now.tau
        if under_vmap(c):
            raise NotImplementedError(
                "a Taylor solve chooses its steps by the values of its state, which vmap hides:"
                ' give options={"step_size": ...} for steps of a fixed length.'
            )
        length = self._radius(c)
        if math.isnan(length):
            what = "the vector field func(t, y)" if bool(c[0].isfinite().all()) else "the state y"
            self.failure = nonfinite_failure(t, longest, what)
            return None
        length, error = min(length, longest, problem.max_step), self.error
        if self.endless and length == math.inf:
            length = 1e-3
        length = max(length, problem.min_step)
        while True:
            if self.stats.accepted + self.stats.rejected >= problem.max_steps:
                self.failure = max_steps_failure(problem, t, length, error)
                return None
            forced = length <= problem.min_step
            step = Choice(now.tau + length, FREE)
            if knot is not None and now.tau + 1.001 * length >= knot[0]:
                step = Choice(*knot)
            length = step.tau1 - now.tau
            if not (length > 4e-16 * abs(now.tau) and step.tau1 > now.tau and length < math.inf):
                self.failure = underflow_failure(problem, t, length, error)
                return None
            problem.call_back("callback_step", t, now.y, length)
            error = self._defect(c, t, direction * length, direction * step.tau1)
            self.error = error if math.isfinite(error) else self.error
            if error <= 1.0 or (forced and math.isfinite(error)):
                problem.call_back("callback_accept_step", t, now.y, length)
                return self._read(now, c, step)
            self.stats.rejected += 1
            problem.call_back("callback_reject_step", t, now.y, length)
            factor = 0.9 * error ** (-1.0 / (p + 1)) if math.isfinite(error) else 0.1
            length = max(length * min(max(factor, 0.1), 0.9), problem.min_step)

    def _take(self, now: Now, c: Tensor, step: Choice) -> Choice | None:
        """A step of a fixed-step solve."""
        problem, t = self.problem, self.problem.direction * now.tau
        length = step.tau1 - now.tau
        if self.stats.accepted >= problem.max_steps:
            self.failure = max_steps_failure(problem, t, length, math.nan)
            return None
        problem.call_back("callback_step", t, now.y, length)
        return self._read(now, c, step)

    def _radius(self, c: Tensor) -> float:
        """The length at which the last two terms fall to the tolerance, times Jorba and Zou's
        safety factor; NaN where a coefficient is not finite.
        """
        problem, p = self.problem, self.order
        scale = problem.error_scale(c[0], c[0])
        norms = torch.stack([problem.error_norm(c[j], scale) for j in (p - 1, p)]).tolist()
        if any(map(math.isnan, norms)) or not bool(c[1].isfinite().all()):
            return math.nan  # (coefficients that overflow leave a step of zero)
        lengths = [x ** (-1.0 / j) for x, j in zip(norms, (p - 1, p), strict=True) if x > 0 < j]
        return min(lengths, default=math.inf) * math.exp(-0.7 / max(p - 1, 1))

    def _defect(self, c: Tensor, t: float, h: float, t1: float) -> float:
        """Scaled error of a step, from how far the polynomial misses the field at its end.

        If the term behind the last one is what is missing, ``a h^(p+1)``, the slope there is off by
        ``(p+1) a h^p``.
        """
        problem, p = self.problem, self.order
        y1 = evaluate(c, torch.tensor([h], dtype=torch.float64))[0]
        powers = h ** torch.arange(p, dtype=torch.float64) * torch.arange(1, p + 1)
        terms = _times(powers, c[1:])
        self.stats.nfe += 1
        slope = problem.field(problem.time(self._beside(t1, t)), y1)
        error = (slope - terms.flip(0).sum(0)) * (h / (p + 1))
        rounding = 4 * torch.finfo(c.dtype).eps * (abs(h) * slope.abs() + y1.abs())
        return float(problem.error_norm(error, problem.error_scale(c[0], y1) + rounding).item())

    def _read(self, now: Now, c: Tensor, step: Choice) -> Choice:
        """Note the outputs that lie in a step, and look for an event in it."""
        problem, watch = self.problem, self.problem.watch
        for row in range(len(self.rows), 0 if self.endless else len(self.goals)):
            goal = self.goals[row]
            if goal > step.tau1:
                break
            exact = goal == step.tau1 and (step.end == row or not self.follows)
            step.found.append((row, None if exact else goal - now.tau))
        if watch is None:
            return step
        h = problem.direction * (step.tau1 - now.tau)

        def state(theta: float) -> Tensor:
            return evaluate(c, torch.tensor([theta * h], dtype=torch.float64))[0]

        # a step is long, and the polynomial on it may turn as often as it has coefficients
        samples = 4 * c.shape[0]
        event = watch.after_step(problem.direction * now.tau, h, state, samples)
        if event is not None:
            when = event[0] * abs(h)
            ahead = [(row, at) for row, at in step.found if (abs(h) if at is None else at) <= when]
            step.found = [*ahead, (EVENT, when)]
            self.fired = (problem.direction * now.tau + event[0] * h, event[1])
        return step

    def _beside(self, t: float, toward: float) -> float:
        """The number next to ``t``, in the precision of the state."""
        if self.problem.time_dtype is torch.float64:
            return math.nextafter(t, toward)
        return float(np.nextafter(np.float32(t), np.float32(toward)))


def evaluate(c: Tensor, s: Tensor) -> Tensor:
    """A polynomial at distances ``s`` [M] (float64) from its start: [p + 1, *shape] -> [M, *shape].

    The terms behind the first are added up by themselves, so that rounding is that of the sum.
    """
    powers = s.unsqueeze(-1) ** torch.arange(1, c.shape[0], dtype=torch.float64)
    powers = powers.to(c.device, c.dtype)
    terms = c[1:].reshape(c.shape[0] - 1, -1)
    if autocasts(c):  # which would cast the products, and those of their backward pass
        change = (powers.unsqueeze(-1) * terms).sum(1)
    else:
        change = powers @ terms
    return c[0] + change.reshape(s.shape[0], *c.shape[1:])


def _times(powers: Tensor, c: Tensor) -> Tensor:
    """Coefficients times powers of a step."""
    return c * powers.to(c.device, c.dtype).reshape(-1, *(1,) * (c.ndim - 1))
