"""The adaptive loop: attempt, judge, accept or shorten."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from ctorch.ode.control import NEUTRAL, initial_step
from ctorch.ode.field import Stage
from ctorch.ode.loop import Loop
from ctorch.ode.run import (
    UNKNOWN,
    Failure,
    endless_failure,
    largest,
    max_steps_failure,
    nonfinite_failure,
    short_failure,
    underflow_failure,
)
from ctorch.ode.steps import FREE, Step

#: after so many attempts it is asked whether the solve creeps along the edge of the field's domain:
#: tiny steps that do not move the state have no error, grow, leave the domain, and are cut again
PATIENCE = 2000
#: a shorter step is none; at t=0 it would still move time, and hardly shrink any more
TINY = sys.float_info.min


class AdaptiveLoop(Loop):
    """One solve with error control."""

    def integrate(self, y: Tensor, first: Stage, first_rng: Any) -> Tensor:
        problem, stepper, stats = self.problem, self.stepper, self.stats
        direction, controller, last = problem.direction, problem.controller, stepper.method.n - 1
        order = stepper.method.tableau.error_order
        evaluate = self.evaluate
        keeper = self.recorder.keeper(first)
        if keeper is not None:
            first = Stage(first.t, first.y, keeper.first())
        calling = bool(problem.callbacks)
        knots, knot = problem.knots(ends=not problem.overshoot), 0
        tau, fresh, error = self.goals[0], True, math.nan
        history = (NEUTRAL, NEUTRAL)
        h = self._first_step(y, first)
        mark, wild, attempts = tau, 0, 0
        min_step, max_step, max_steps = problem.min_step, problem.max_step, problem.max_steps
        reading, goal = self.reading, self.next_goal
        while reading:
            length = min(max(h, min_step), max_step)
            if attempts >= max_steps:
                self.failure = max_steps_failure(problem, direction * tau, length, error)
                break
            if attempts and attempts % PATIENCE == 0:
                if wild > PATIENCE // 5 and tau - mark < 1e-3 * (self.goals[-1] - tau):
                    self.failure = self._underflow(y, first, tau, length, math.nan)
                    break
                mark, wild = tau, 0
            attempts += 1
            forced = length <= min_step
            tau1, end, jumps = tau + length, FREE, False
            while knot < len(knots) and knots[knot][0] <= tau:
                knot += 1
            # a knot that lies just beyond the step is taken along: no sliver of a step remains
            if knot < len(knots) and tau + 1.001 * length >= knots[knot][0]:
                tau1, end, jumps = knots[knot]
                length = tau1 - tau
            if not (tau1 > tau and length < math.inf):
                self.failure = self._underflow(y, first, tau, length, error)
                break
            t, signed, t1 = direction * tau, direction * length, direction * tau1
            if calling:
                problem.call_back("callback_step", t, y, length)
            self.rng = [first_rng] if problem.random else None
            start = 0 if stats.accepted == 0 else FREE
            y1, stages = stepper.attempt(y, first, t, signed, t1, evaluate, start, end)
            error = stepper.error(y, y1, stages)
            factor = controller.factor(error, order, history)
            # by what was asked for: ending on a knot may lengthen min_step by a rounding error
            forced = forced or length <= min_step
            if (error > 1.0 and not forced) or not math.isfinite(error):
                stats.rejected += 1
                wild += not math.isfinite(error)
                if calling:
                    problem.call_back("callback_reject_step", t, y, length)
                h = length * min(factor, 1.0)
                h = 0.0 if h < TINY else h
                continue
            stats.accepted += 1
            if calling:
                problem.call_back("callback_accept_step", t, y, length)
            stepper.finish(y1, stages, evaluate)
            if keeper is not None:
                stages[last].k = keeper.keep(stages[last].k)
            if tau1 >= goal:
                record = Step(t, signed, t1, y, start, end, fresh)
                self.read(record, stages, y1)
                self.store(record, stages, stages[0 if fresh else 1 :])
                reading, goal = self.reading, self.next_goal
            history = (max(error, 1e-10), history[0])
            # a step cut short to end on a given time says little against the length tried before
            h = length * factor if end == FREE else max(length * factor, h)
            tau, y, first, fresh = tau1, y1, stages[last], False
            first_rng = None if self.rng is None else self.rng[last]
            if jumps and reading:
                after = stepper.beside(t1, direction * math.inf)
                after_t = stepper.first_time(after, FREE)
                first, fresh = evaluate(after_t, self.recorder.leaf(y)), True
                if keeper is not None:
                    first.k = keeper.keep(first.k)
                first_rng = None if self.rng is None else self.rng[-1]
            if problem.progress is not None:
                problem.progress(t1)
        return y

    def _first_step(self, y: Tensor, first: Stage) -> float:
        problem = self.problem
        if problem.first_step is not None:
            return problem.first_step
        endless = problem.watch is not None and problem.watch.until_event
        span = math.inf if endless else self.goals[-1] - self.goals[0]
        t0, direction = problem.times[0], problem.direction

        def slope(h: float, y1: Tensor) -> Tensor:
            return problem.field(problem.time(t0 + direction * h), y1).detach()

        norm = self.stepper.state_norm(y)
        order = self.stepper.method.tableau.error_order
        return initial_step(slope, norm, y, first.k.detach(), order, direction, span)

    def _underflow(
        self, y: Tensor, first: Stage, tau: float, length: float, error: float
    ) -> Failure:
        problem = self.problem
        t = problem.direction * tau
        if not bool(torch.isfinite(y).all()):
            return nonfinite_failure(t, length, "the state y")
        if not bool(torch.isfinite(first.k).all()):
            return nonfinite_failure(t, length, "the vector field func(t, y) (underflow in dt)")
        if not length < math.inf or not math.isfinite(tau):
            return endless_failure(t, length, error)
        if not self.stats.steps:  # there was no error yet
            return short_failure(t, length)
        worst = largest(self.stepper.error_vector(y, y)) if self.stats.rejected else UNKNOWN
        return underflow_failure(problem, t, length, error, worst)
