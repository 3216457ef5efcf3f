"""Making the steps of an implicit method: of given lengths, or of lengths chosen by the error."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ctorch.ode.control import NEUTRAL, initial_step
from ctorch.ode.field import Stage
from ctorch.ode.implicit_steps import FORMULAS, MAX_RATIO, ImplicitStep, Made, State, between
from ctorch.ode.problem import Problem
from ctorch.ode.root_finding import NoRoot
from ctorch.ode.run import (
    Failure,
    Run,
    collect,
    late_failure,
    max_steps_failure,
    nonfinite_failure,
    underflow_failure,
)
from ctorch.ode.solution import Stats, Status
from ctorch.ode.steps import FREE

if TYPE_CHECKING:
    from ctorch.ode.implicit import ImplicitJob

#: order of the error estimate, by which steps are controlled
ORDER = 3
#: how much a step of a multistep formula may grow at once
GROWTH = 2.0


class Paces:
    """Times beside the ends of steps, where the field is to be looked at."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem

    def inside(self, t: float, toward: float) -> float:
        """The end ``t`` of a step, or with the option "perturb" the number next to it inside."""
        return self.beside(t, toward) if self._problem.perturb else t

    def beside(self, t: float, toward: float) -> float:
        """The number next to ``t`` in the precision of the field's times."""
        if t == toward:
            return t
        if self._problem.time_dtype is torch.float64:
            return math.nextafter(t, toward)
        return float(np.nextafter(np.float32(t), np.float32(toward)))


class ImplicitLoop:
    """What both loops share: attempting a step, keeping it, and reading outputs off it."""

    def __init__(self, job: ImplicitJob) -> None:
        self.job, self.problem, self.finder = job, job.problem, job.finder
        self.paces = Paces(job.problem)
        self.goals = [self.problem.direction * t for t in self.problem.times]
        self.stats = Stats()
        self.steps: list[Any] = []
        self.pieces: list[Any] = []
        self.failure: Failure | None = None
        self.fired: tuple[float, int] | None = None
        self.before: ImplicitStep | None = None
        watch = self.problem.watch
        self.endless = watch is not None and watch.until_event

    def run(self, first: Stage | None) -> Run:
        """Make the steps; ``first``: the evaluation at the first time, if there is one."""
        problem = self.problem
        y0 = problem.y0.detach()
        self.rows = [y0 for goal in self.goals if goal == self.goals[0]]
        y = y0
        if self.reading:
            k = self.slope(self.job.initial_time(), y0) if first is None else first.k.detach()
            self.finder.check(self.job.initial_time(), y0, k)
            y = self.integrate(State(y0, k, y0)).y
            if self.failure is None and not bool(torch.isfinite(y).all()):
                self.failure = late_failure(problem, self.rows)
        status = Status.SUCCESS if self.fired is None else Status.EVENT
        if self.failure is not None:
            status = self.failure.status
        rows = torch.stack(self.rows) if self.fired is not None else collect(problem, self.rows)
        return Run(
            rows, self.steps, y, self.stats, status, self.failure, self.fired, self.pieces
        )  # fmt: skip

    def integrate(self, state: State) -> State:
        """Make the steps; returns the state at the end of the last."""
        raise NotImplementedError

    @property
    def reading(self) -> bool:
        """Whether there is something left to find."""
        return self.fired is None and (self.endless or len(self.rows) < len(self.goals))

    def slope(self, t: Tensor, y: Tensor) -> Tensor:
        """An evaluation outside the iterations."""
        return self.problem.field.value(t, y).k.detach()

    # -- one step

    def step(
        self, t: float, h: float, t1: float, state: State, start: int, end: int, fresh: bool
    ) -> ImplicitStep:
        """A step, to be attempted."""
        anew, following = self.job.formulas
        before = self.before if not fresh else None
        known = before is not None and h / before.h < MAX_RATIO
        base = start
        if start == FREE:
            assert self.before is not None
            base = self.before.base if self.before.end == FREE else self.before.end
        first, last = self.paces.inside(t, t1), self.paces.inside(t1, t)
        formula = following if known else anew
        return ImplicitStep(
            t, h, t1, first, last, base, end, formula, before if known else None, state, fresh
        )

    def attempt(self, step: ImplicitStep) -> Made:
        """Solve the equations of a step.

        Raises:
            NoRoot: one was not solved.
        """
        problem = self.problem
        weight = problem.error_scale(step.state.y, step.state.y)

        def stage(c: float, constant: Tensor, scale: Any, guess: Tensor) -> Tensor:
            t = problem.time(step.last if c == 1.0 else step.t + c * step.h)
            root = self.finder.find(t, constant, scale, guess, weight)
            step.roots.append(root)
            return root

        h_before = None if step.before is None else step.before.h
        return FORMULAS[step.formula](step.state, step.h, h_before, stage)

    def accept(self, step: ImplicitStep, made: Made) -> State:
        """Keep a step and read off it what lies in it; returns the next one's start."""
        problem, direction, state = self.problem, self.problem.direction, step.state
        self.stats.accepted += 1
        piece = self.job.piece(state, made, step.h, direction * step.t, direction * step.h)
        if piece is not None:
            self.pieces.append(piece)
        self._read(step, made)
        if not self.job.keep:
            step.roots, step.state = [], State(*[state.y.new_empty(0)] * 3)
        else:
            self.steps.append(step)
        if step.before is not None:
            step.before.before = None if not self.job.keep else step.before.before
        self.before = step
        if problem.progress is not None:
            problem.progress(step.t1)
        return State(made.y, made.k, state.y)

    def _read(self, step: ImplicitStep, made: Made) -> None:
        problem, watch, state = self.problem, self.problem.watch, step.state
        tau, tau1 = problem.direction * step.t, problem.direction * step.t1
        for row in range(len(self.rows), 0 if self.endless else len(self.goals)):
            goal = self.goals[row]
            if goal > tau1:
                break
            exact = goal == tau1 and (step.end == row or not self.job.time_grad)
            theta = 1.0 if goal == tau1 else (goal - tau) / (tau1 - tau)
            step.outputs.append((row, None if exact else theta))

        def inside(theta: float | None) -> Tensor:
            if theta is None or theta == 1.0:
                return made.y
            return between(state, made, step.h, theta, self.job.linear)

        if watch is not None:
            event = watch.after_step(step.t, step.h, inside)
            if event is not None:
                ahead = [(row, th) for row, th in step.outputs if (th or 1.0) <= event[0]]
                step.outputs = [*ahead, (len(self.rows) + len(ahead), event[0])]
                step.fired = True
                self.fired = (step.t + event[0] * step.h, event[1])
        self.rows += [inside(theta) for _, theta in step.outputs]

    def unsolved(self, step: ImplicitStep, why: NoRoot) -> Failure:
        """The failure of a step whose equation was not solved and that cannot be shortened."""
        if why.iterations <= 1 and not math.isfinite(why.rate):  # the first correction
            what = "the state y or the vector field func(t, y)"
            if math.isfinite(why.residual):
                what = "the Jacobian of func(t, y) in y (or it is singular)"
            return nonfinite_failure(why.t, step.h, what)
        message = why.describe(self.finder.name, step.h) + "."
        message += " Use shorter steps, raise max_iters"
        if self.finder.name != "newton":
            message += ', or use options={"root_finder": "newton"}'
        return Failure(Status.NO_ROOT, message + ".", step.t, step.h, why.residual)


class FixedImplicitLoop(ImplicitLoop):
    """Steps from each knot of a given grid to the next."""

    def integrate(self, state: State) -> State:
        """Make the steps."""
        problem, stats = self.problem, self.stats
        assert self.job.knots is not None
        knots = self.job.knots()
        t, start = next(knots)
        for t1, end in knots:
            if not self.reading:
                break
            h = t1 - t
            if h == 0.0:
                continue
            if stats.accepted >= problem.max_steps:
                self.failure = max_steps_failure(problem, t, h, math.nan)
                break
            problem.call_back("callback_step", t, state.y, abs(h))
            step = self.step(t, h, t1, state, start, end, fresh=stats.accepted == 0)
            try:
                made = self.attempt(step)
            except NoRoot as why:
                self.failure = self.unsolved(step, why)
                break
            state = self.accept(step, made)
            t, start = t1, end
        return state


class AdaptiveImplicitLoop(ImplicitLoop):
    """Steps whose estimated error stays within the tolerances."""

    def integrate(self, state: State) -> State:
        """Make the steps."""
        problem, stats, direction = self.problem, self.stats, self.problem.direction
        knots = problem.knots(ends=not self.endless)
        tau, fresh, error = self.goals[0], True, math.nan
        h, history = self._first_step(state), (NEUTRAL, NEUTRAL)
        while self.reading:
            length = min(max(h, problem.min_step), problem.max_step)
            if stats.accepted + stats.rejected >= problem.max_steps:
                self.failure = max_steps_failure(problem, direction * tau, length, error)
                break
            forced = length <= problem.min_step
            tau1, end, jumps = tau + length, FREE, False
            while knots and knots[0][0] <= tau:
                knots.pop(0)
            # a knot that lies just beyond the step is taken along: no sliver of a step remains
            if knots and tau + 1.001 * length >= knots[0][0]:
                tau1, end, jumps = knots[0]
                length = tau1 - tau
            if not (tau1 > tau and length < math.inf):
                self.failure = underflow_failure(problem, direction * tau, length, error)
                break
            t, t1 = direction * tau, direction * tau1
            problem.call_back("callback_step", t, state.y, length)
            start = 0 if stats.accepted == 0 else FREE
            step = self.step(t, direction * length, t1, state, start, end, fresh)
            if fresh and stats.accepted:  # behind a jump
                step.first = self.paces.beside(t, t1)
            if jumps:
                step.last = self.paces.beside(t1, t)
            try:
                made = self.attempt(step)
            except NoRoot as why:
                stats.rejected += 1
                problem.call_back("callback_reject_step", t, state.y, length)
                if forced or tau + 0.5 * length <= tau:
                    self.failure = self.unsolved(step, why)
                    break
                h = 0.5 * length
                continue
            error = self._error(step, made)
            factor = problem.controller.factor(error, ORDER, history)
            if not math.isfinite(error) or (error > 1.0 and not forced):
                stats.rejected += 1
                problem.call_back("callback_reject_step", t, state.y, length)
                h = length * min(factor, 1.0)
                continue
            problem.call_back("callback_accept_step", t, state.y, length)
            state = self.accept(step, made)
            history = (max(error, 1e-10), history[0])
            if step.formula == "bdf2":
                factor = min(factor, GROWTH)
            h = length * factor if end == FREE else max(length * factor, h)
            tau, fresh = tau1, jumps
            if jumps and self.reading:
                after = problem.time(self.paces.beside(t1, direction * math.inf))
                state = state._replace(k=self.slope(after, state.y))
        return state

    def _error(self, step: ImplicitStep, made: Made) -> float:
        estimate = made.error
        assert estimate is not None
        scale = self.problem.error_scale(step.state.y, made.y)
        return float(self.problem.error_norm(estimate, scale).item())

    def _first_step(self, state: State) -> float:
        problem = self.problem
        if problem.first_step is not None:
            return problem.first_step
        t0, direction = problem.times[0], problem.direction
        scale = problem.error_scale(state.y, state.y)
        return initial_step(
            lambda h, y: self.slope(problem.time(t0 + direction * h), y),
            lambda x: float(problem.error_norm(x, scale).item()),
            state.y, state.k, ORDER, direction,
            math.inf if self.endless else self.goals[-1] - self.goals[0],
        )  # fmt: skip
