"""Runge-Kutta steps in plain differentiable operations.

Slower than the kernels with their own discrete adjoint, and differentiable in every way that
    PyTorch knows: the path
of ``torch.func`` transforms and of forward-mode AD, and of second derivatives, where recorded steps
are made again.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ctorch.ode.coefficients import Coefficients
from ctorch.ode.field import Stage
from ctorch.ode.problem import Problem
from ctorch.ode.run import Piece
from ctorch.ode.stepper import Evaluate, Recorder, Stepper
from ctorch.ode.steps import EVENT, FIXED, FREE, Step
from ctorch.ode.transforms import follows


class PlainStepper(Stepper):
    """``Stepper`` with a graph: same steps, same times, ordinary tensor operations.

    Args:
        times: the user's times, whose derivatives are followed to the steps that hang on them.
    """

    def __init__(
        self, problem: Problem, coefficients: Coefficients, adaptive: bool, times: Tensor
    ) -> None:
        self.problem = problem
        self.method = coefficients
        self.before_end = adaptive or problem.perturb
        self._float32 = problem.time_dtype is not torch.float64
        self._plain_norm = False
        self._times = times.to("cpu", torch.float64) if follows(times) else None
        self._start: Any = None  # the start of the step, its length, and the start of the next one
        self._length: Any = None
        self._next: Any = None
        self._slopes: list[Tensor] = []
        self._rows = [[float(x) for x in row] for row in coefficients.a]
        self._b = [float(x) for x in coefficients.b]

    def attempt(
        self, y: Tensor, first: Stage, t: float, h: float, t1: float, evaluate: Evaluate,
        start: int = FREE, end: int = FREE,
    ) -> tuple[Tensor, list[Stage]]:  # fmt: skip
        self._hang(t, h, t1, start, end)
        method = self.method
        stages = [first]
        self._slopes = [first.k]
        last = method.n - 1 if method.fsal else method.n
        for i in range(1, last):
            stages.append(self._stage(i, y, t, h, t1, evaluate))
        y1 = self._combine(y, self._rows[last] if method.fsal else self._b)
        if method.fsal and not method.late:
            stages.append(evaluate(self.time(last, t, h, t1), y1))
            self._slopes.append(stages[-1].k)
        self._end_time = self.time(method.n - 1, t, h, t1)
        return y1, stages

    def error(self, y: Tensor, y1: Tensor, stages: list[Stage]) -> float:
        assert self.method.e is not None
        weights = [float(x) for x in self.method.e]
        with torch.no_grad():
            slopes = [k.detach() for k in self._slopes]
            estimate = _sum(slopes, weights)
            h = self._length.detach() if isinstance(self._length, Tensor) else self._length
            scale = self.problem.error_scale(y.detach(), y1.detach())
            if estimate is None:
                return 0.0
            return float(self.problem.error_norm(h * estimate, scale).item())

    def finish(self, y1: Tensor, stages: list[Stage], evaluate: Evaluate) -> None:
        if self.method.late:
            stages.append(evaluate(self._end_time, y1))
            self._slopes.append(stages[-1].k)
        self._start_next()

    def extend(
        self, y: Tensor, stages: list[Stage], t: float, h: float, t1: float, evaluate: Evaluate
    ) -> bool:
        for i in range(self.method.n, self.method.total):
            stages.append(self._stage(i, y, t, h, t1, evaluate))
        return self.method.total > self.method.n

    def interpolate(self, y: Tensor, found: list[tuple[int, float]]) -> Tensor:
        assert self.method.p is not None
        return torch.stack([self._interpolated(y, row, theta) for row, theta in found])

    def piece(self, tau: float, length: float, y: Tensor) -> Piece:
        start, span = (torch.tensor(x, dtype=torch.float64) for x in (tau, length))
        if isinstance(self._start, Tensor):
            start = self.problem.direction * self._start
        if isinstance(self._length, Tensor):
            span = self.problem.direction * self._length
        return Piece(start, span, y, torch.stack(self._slopes))

    def time(self, i: int, t: float, h: float, t1: float) -> Tensor:
        value = self.time_value(i, t, h, t1)
        if not isinstance(self._start, Tensor):
            return self.problem.time(value)
        moving = self._start + self.method.c[i] * self._length
        return self.problem.follow(moving, value)

    def first_time(self, value: float, start: int) -> Tensor:
        """Time of a first stage that is evaluated anew."""
        if self._times is None:
            return self.problem.time(value)
        moving = self._times[start] if start >= 0 else self._next
        return (
            self.problem.follow(moving, value)
            if isinstance(moving, Tensor)
            else self.problem.time(value)
        )

    # ----------------------------------------------------------------------------------------------

    def _hang(self, t: float, h: float, t1: float, start: int, end: int) -> None:
        """The step's start and length as functions of the user's times."""
        self._start, self._length = t, h
        if self._times is None:
            return
        self._start = self._times[start] if start >= 0 else self._next
        if self._start is None:
            self._start = t
        if end >= 0:
            self._length = self._times[end] - self._start
        elif end == FIXED:
            self._length = t1 - self._start

    def _start_next(self) -> None:
        if self._times is not None:
            self._next = self._start + self._length

    def _stage(self, i: int, y: Tensor, t: float, h: float, t1: float, evaluate: Evaluate) -> Stage:
        y_i = self._combine(y, self._rows[i])
        stage = evaluate(self.time(i, t, h, t1), y_i)
        self._slopes.append(stage.k)
        return stage

    def _combine(self, y: Tensor, weights: list[float]) -> Tensor:
        total = _sum(self._slopes, weights)
        return y.clone() if total is None else y + _as_like(self._length, y) * total

    def _interpolated(self, y: Tensor, row: int, theta: float) -> Tensor:
        position: Any = theta
        if self._times is not None and isinstance(self._start, Tensor):
            goal = self._times[row] if row != EVENT else None
            if goal is None:
                goal = self._start.detach() + theta * _value(self._length)
            position = (goal - self._start) / self._length
        assert self.method.p is not None
        total = None
        for k, powers in zip(self._slopes, self.method.p.tolist(), strict=False):
            weight = position * _horner(powers, position)
            if isinstance(weight, Tensor) or weight:
                term = _as_like(weight, y) * k
                total = term if total is None else total + term
        return y if total is None else y + _as_like(self._length, y) * total


class PlainRecorder(Recorder):
    """Evaluates with ordinary graphs."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem, graphs=False, time_grad=True)
        field = problem.field
        self.evaluate = lambda t, y: Stage(t, y, field(t, y))

    def leaf(self, y: Tensor) -> Tensor:
        return y

    def keeper(self, first: Stage) -> None:
        return None


def replay(
    problem: Problem,
    stepper: PlainStepper,
    steps: list[Step],
    y0: Tensor,
    initial_rows: int,
    event_row: int,
    random_states: Any = None,
) -> tuple[Tensor, list[Piece]]:
    """Make recorded steps again, differentiably: rows [T, *shape] (and the pieces of a continuous
    solution) as functions of y0, the times and what func holds.

    Rows that no step returned are NaN.
    """
    recorder = PlainRecorder(problem)
    pieces: list[Piece] = []
    rows: dict[int, Tensor] = dict.fromkeys(range(initial_rows), y0)
    y, first = y0, None
    method = stepper.method
    for index, step in enumerate(steps):
        place = iter(step.rng[1:] if step.rng is not None else ())

        def evaluate(t: Tensor, y: Tensor, place: Any = place) -> Stage:
            state = next(place, None)
            if state is not None:
                random_states(state)
            return recorder.evaluate(t, y)

        if step.fresh or first is None:
            value = stepper.time_value(0, step.t, step.h, step.t1)
            if index and method.fsal:
                value = stepper.beside(step.t, problem.direction * math.inf)
            if step.rng is not None:
                random_states(step.rng[0])
            first = recorder.evaluate(stepper.first_time(value, step.start), y)
        y1, stages = stepper.attempt(
            y, first, step.t, step.h, step.t1, evaluate, step.start, step.end
        )
        stepper.finish(y1, stages, evaluate)
        if step.extended:
            stepper.extend(y, stages, step.t, step.h, step.t1, evaluate)
        if problem.dense:
            tau, tau1 = problem.direction * step.t, problem.direction * step.t1
            pieces.append(stepper.piece(tau, tau1 - tau, y))
        for row, theta in step.outputs:
            rows[row] = (
                y1
                if theta is None
                else stepper.interpolate(y, [(EVENT if row == event_row else row, theta)])[0]
            )
        y, first = y1, stages[method.n - 1]
    count = max(rows) + 1 if event_row >= 0 else len(problem.times)
    nothing = torch.full_like(y0, math.nan)
    return torch.stack([rows.get(row, nothing) for row in range(count)]), pieces


def _sum(slopes: list[Tensor], weights: list[float]) -> Tensor | None:
    total = None
    for k, weight in zip(slopes, weights, strict=False):
        if weight:
            total = weight * k if total is None else torch.add(total, k, alpha=weight)
    return total


def _as_like(x: Any, y: Tensor) -> Any:
    return x.to(y.device, y.dtype) if isinstance(x, Tensor) else x


def _value(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _horner(powers: list[float], x: Any) -> Any:
    total: Any = 0.0
    for power in reversed(powers):
        total = total * x + power
    return total
