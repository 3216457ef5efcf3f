"""What the adaptive and the fixed-step loop share: reading outputs and events off a step, and
keeping it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ctorch.ode.field import Stage
from ctorch.ode.problem import Problem
from ctorch.ode.run import Failure, Run, collect, late_failure
from ctorch.ode.solution import Stats, Status
from ctorch.ode.stepper import Recorder, Stepper
from ctorch.ode.steps import EVENT, Step, random_state


class Loop:
    """One solve with one step size for the whole state.

    Args:
        problem: what to solve.
        stepper: the method.
        recorder: how stages are evaluated.
        keep: keep the accepted steps, for the reverse sweep.
    """

    def __init__(
        self, problem: Problem, stepper: Stepper, recorder: Recorder, keep: bool = False
    ) -> None:
        self.problem = problem
        self.stepper = stepper
        self.recorder = recorder
        self.keep = keep
        self.stats = Stats()
        self.rows: list[Tensor] = []
        self.steps: list[Step] = []
        self.pieces: list[Any] = []
        self.goals = [problem.direction * t for t in problem.times]
        self.failure: Failure | None = None
        self.fired: tuple[float, int] | None = None
        self.rng: list[Any] | None = None
        self.checks = True  # look at the values of the final state
        self._every_step = keep or problem.dense or problem.watch is not None
        self.evaluate = self._evaluate_random if problem.random else recorder.evaluate

    def run(self, first: Stage, first_rng: Any = None) -> Run:
        """Integrate; ``first`` is the evaluation at the first time, ``first_rng`` the random state
        before it.
        """
        problem = self.problem
        before = problem.field.nfe
        y0 = self.recorder.leaf(problem.y0)
        self.rows = [y0 for goal in self.goals if goal == self.goals[0]]
        y = y0
        if len(self.rows) < len(self.goals) or problem.watch is not None:
            y = self.integrate(y0, first, first_rng)
            if self.failure is None and self.checks and not _finite(y):
                self.failure = late_failure(problem, self.rows)
        self.stats.nfe = problem.field.nfe - before + 1
        status = Status.SUCCESS if self.fired is None else Status.EVENT
        if self.failure is not None:
            status = self.failure.status
        rows = torch.stack(self.rows) if self.fired is not None else collect(problem, self.rows)
        return Run(
            rows, self.steps, y, self.stats, status, self.failure, self.fired, self.pieces
        )  # fmt: skip

    def integrate(self, y: Tensor, first: Stage, first_rng: Any) -> Tensor:
        """Make the steps; returns the state at the end of the last."""
        raise NotImplementedError

    @property
    def reading(self) -> bool:
        """Whether there is something left to find: an output or an event."""
        if self.fired is not None:
            return False
        watch = self.problem.watch
        return len(self.rows) < len(self.goals) or (watch is not None and watch.until_event)

    @property
    def next_goal(self) -> float:
        """Steps that end before it leave nothing to read or to keep."""
        if self._every_step:
            return -math.inf
        return self.goals[len(self.rows)] if len(self.rows) < len(self.goals) else math.inf

    def _evaluate_random(self, t: Tensor, y: Tensor) -> Stage:
        """Evaluate a stage of a field that draws random numbers, noting the generators' state
        before it.
        """
        if self.rng is not None:
            self.rng.append(random_state(self.problem.layout.device))
        return self.recorder.evaluate(t, y)

    # -- an accepted step
    # -----------------------------------------------------------------------------------------

    def read(self, record: Step, stages: list[Stage], y1: Tensor) -> None:
        """Read the outputs that lie in the step, and look for an event in it."""
        problem, stepper = self.problem, self.stepper
        tau, tau1 = problem.direction * record.t, problem.direction * record.t1
        found = self._outputs_within(record, tau, tau1)
        watch = problem.watch
        if problem.dense or watch is not None or any(theta is not None for _, theta in found):
            record.extended = stepper.extend(
                record.y, stages, record.t, record.h, record.t1, self.evaluate
            )
        if problem.dense:
            self.pieces.append(stepper.piece(tau, tau1 - tau, record.y))
        event = None
        if watch is not None:

            def state(theta: float) -> Tensor:
                return y1 if theta == 1.0 else stepper.interpolate(record.y, [(EVENT, theta)])[0]

            event = watch.after_step(record.t, record.h, state)
            if event is not None:
                found = [(row, theta) for row, theta in found if (theta or 1.0) <= event[0]]
                found.append((len(self.rows) + len(found), event[0]))
                self.fired = (record.t + event[0] * record.h, event[1])
        record.outputs = found
        inner = [(row, theta) for row, theta in found if theta is not None]
        if event is not None:
            inner[-1] = (EVENT, event[0])
        between = iter(stepper.interpolate(record.y, inner).unbind() if inner else ())
        self.rows.extend(y1 if theta is None else next(between) for _, theta in found)

    def _outputs_within(
        self, record: Step, tau: float, tau1: float
    ) -> list[tuple[int, float | None]]:
        """(row, theta) of the user's times in (tau, tau1]; theta None: the state at the end of the
        step itself.
        """
        watch = self.problem.watch
        found: list[tuple[int, float | None]] = []
        if watch is not None and watch.until_event:
            return found
        for row in range(len(self.rows), len(self.goals)):
            goal = self.goals[row]
            if goal > tau1:
                break
            # the end's own derivative in its time is the interpolant's, unless the step hangs on
            # that very time
            exact = goal == tau1 and (record.end == row or not self.recorder.time_grad)
            theta = 1.0 if goal == tau1 else min(1.0, (goal - tau) / (tau1 - tau))
            found.append((row, None if exact else theta))
        return found

    def store(self, record: Step, stages: list[Stage], new: list[Stage]) -> None:
        """Keep the step for the reverse sweep; ``new`` are the stages whose graphs have not been
        audited.
        """
        if not self.keep:
            return
        if self.recorder.graphs:
            record.stages = stages
            if self.recorder.audit is not None:
                for stage in new:
                    self.recorder.audit(stage)
        record.rng = self.rng
        record.y = self.recorder.leaf(record.y)
        self.steps.append(record)


def _finite(y: Tensor) -> bool:
    """Whether all elements are finite; where their sum is, so are they."""
    return math.isfinite(y.sum().item()) or bool(torch.isfinite(y).all())
