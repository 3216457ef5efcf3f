"""The fixed-step loop: one step from each knot of a given grid to the next."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from ctorch.ode.field import Stage
from ctorch.ode.loop import Loop
from ctorch.ode.run import max_steps_failure
from ctorch.ode.steps import FREE, Step

#: (time, anchor): a knot of the grid and the user's time that it is, or FREE
Knot = tuple[float, int]


class FixedLoop(Loop):
    """One solve with given steps.

    Attributes:
        knots: the grid, from the first time to the last; endless where an event ends the solve.
    """

    knots: Iterator[Knot]

    def integrate(self, y: Tensor, first: Stage, first_rng: Any) -> Tensor:
        problem, stepper, stats = self.problem, self.stepper, self.stats
        t, start = next(self.knots)
        for t1, end in self.knots:
            if not self.reading:
                break
            if stats.accepted >= problem.max_steps:
                self.failure = max_steps_failure(problem, t, t1 - t, math.nan)
                break
            h = t1 - t
            problem.call_back("callback_step", t, y, abs(h))
            self.rng = None if not problem.random else [first_rng] if stats.accepted == 0 else []
            if stats.accepted:
                first_time = stepper.first_time(stepper.time_value(0, t, h, t1), start)
                first = self.evaluate(first_time, self.recorder.leaf(y))
            y1, stages = stepper.attempt(y, first, t, h, t1, self.evaluate, start, end)
            stepper.finish(y1, stages, self.evaluate)
            stats.accepted += 1
            record = Step(t, h, t1, y, start, end, fresh=True)
            self.read(record, stages, y1)
            self.store(record, stages, stages)
            t, start, y = t1, end, y1
            if problem.progress is not None:
                problem.progress(t1)
        return y


def grid_knots(times: list[float], step: float | None, every: bool) -> Iterator[Knot]:
    """Knots of a fixed-step solve.

    Args:
        times: the user's times.
        step: length of a step (positive), or None for steps between the times.
        every: with ``step`` only: end a step on every time, not on the last alone.
    """
    if step is None:
        yield from ((t, i) for i, t in enumerate(times))
        return
    direction = 1.0 if times[-1] >= times[0] else -1.0
    yield times[0], 0
    goals = list(range(1, len(times))) if every else [len(times) - 1]
    for low, goal in itertools.pairwise([0, *goals]):
        span = abs(times[goal] - times[low])
        count = max(1, math.ceil(span / step * (1 - 1e-12)))
        for i in range(1, count):
            yield times[low] + direction * i * step, FREE
        yield times[goal], goal


def endless_knots(start: float, step: float, direction: int) -> Iterator[Knot]:
    """Knots from ``start`` on, without end."""
    yield start, 0
    i = 0
    while True:
        i += 1
        yield start + direction * i * step, FREE
