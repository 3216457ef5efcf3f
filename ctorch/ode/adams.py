"""Adams methods with fixed steps: explicit (Adams-Bashforth) and implicit
(Adams-Bashforth-Moulton).

Orders grow to ``max_order`` as slopes become known; the first steps, and every step whose length
differs from the one before (for which the coefficients do not hold), are made by the 3/8 rule.
Hairer, Nørsett, Wanner, "Solving ODEs I", III.1.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.ode.adams_coefficients import adams_bashforth, adams_moulton
from ctorch.ode.arguments import interpolation, whole
from ctorch.ode.capture import Captured
from ctorch.ode.discrete import solve_differentiably, solve_without_gradient
from ctorch.ode.field import Stage, UnexpectedGraph
from ctorch.ode.problem import Problem
from ctorch.ode.run import Run, collect, late_failure, max_steps_failure
from ctorch.ode.solution import Stats, Status
from ctorch.ode.steps import FIXED, FREE, random_state, set_random_state
from ctorch.ode.sweep import Cotangents, audit_again
from ctorch.ode.tableaus import TABLEAUS
from ctorch.ode.transforms import follows, transforms_active, under_vmap

if TYPE_CHECKING:
    from ctorch.ode.solve import Request

LOWEST, HIGHEST = 4, 12


def solve(request: Request, problem: Problem) -> tuple[Run, Tensor, Problem]:
    """Solve by an Adams method. Returns the run, its rows with their graph, and the problem."""
    from ctorch.ode import continuous

    if problem.dense:
        raise NotImplementedError(f"dense output of {request.method!r} is not built yet.")
    job = AdamsJob(problem, request)
    if transforms_active() or (request.gradient == "backprop" and request.differentiates):
        run = job.make(job.knots(), problem.y0, _times(problem.t))
        run.stats.nfe = problem.field.nfe
        return run, run.rows, problem
    if not request.differentiates:
        run = solve_without_gradient(job)
        return run, run.rows, problem
    if request.adjoint:
        run, rows = continuous.solve(request, problem, lambda first: job.run(first, None))
        return run, rows, problem
    rows, run = solve_differentiably(job, graphs=False)
    return run, rows, problem


@dataclasses.dataclass(slots=True)
class AdamsStep:
    """One step: its times, the state at its start and the places of the slopes that it read.

    ``fired``: the last output is an event's, whose time is a constant to the solve.
    """

    t: float
    h: float
    t1: float
    start: int
    end: int
    y: Tensor
    history: list[int]
    outputs: list[tuple[int, float | None]]
    converged: bool = True
    base: int = 0  # the user's time with which a free start moves, or FIXED
    rng: Any = None
    fired: bool = False
    stages: None = None


class AdamsJob:
    """An Adams solve that can be run, swept back step by step, and made again."""

    def __init__(self, problem: Problem, request: Request) -> None:
        self.problem = problem
        options = request.options
        self.implicit = request.method != "explicit_adams"
        self.max_order = whole(options, "max_order", HIGHEST, 1, HIGHEST)
        self.max_iters = whole(options, "max_iters", 4, 1, sys.maxsize)
        if self.max_order < LOWEST:
            warnings.warn(
                f"max_order is below {LOWEST}, so the solver reduces to `rk4`.", stacklevel=6
            )
        default = "linear" if request.torchdiffeq else "cubic"
        self.cubic = interpolation(options, default) == "cubic"
        knots = request.knots(problem)
        assert knots is not None
        self.knots = knots
        self.time_grad = self.keep = self.graphs = self.watching = False
        self.captured = Captured(())
        self.slopes: list[Tensor] = []
        self._first: Stage | None = None
        self.vigilant = False

    # -- the interface of a job
    # -----------------------------------------------------------------------------------

    def initial_time(self) -> Tensor:
        """Time of the first evaluation."""
        times, perturb = self.problem.times, self.problem.perturb
        if perturb and len(times) > 1:
            return self.problem.time(self._beside(times[0], times[-1]))
        return self.problem.time(times[0])

    def run(self, first: Stage | None, first_rng: Any) -> Run:
        """Make the steps. Under ``no_grad``."""
        before = self.problem.field.nfe
        if first_rng is not None and self.problem.random:
            # the first evaluation is made again, from the same random state, with the step's others
            first = None
            set_random_state(self.problem.layout.device, first_rng)
        self._first = first
        self.vigilant = torch.is_grad_enabled()  # then nothing is known to require grad
        run = self.make(self.knots(), self.problem.y0.detach(), None)
        run.stats.nfe = self.problem.field.nfe - before + (0 if first is None else 1)
        return run

    def sweep(self, run: Run, grad_rows: Tensor, wanted: Sequence[bool]) -> Cotangents:
        """Pull cotangents of the rows back, one step at a time."""
        problem, captured = self.problem, self.captured
        y0 = problem.y0
        yb = torch.zeros_like(y0)
        slope_bars: dict[int, Tensor] = {}
        t_bar = torch.zeros(len(problem.t), dtype=torch.float64)
        sums: list[Tensor | None] = [None] * len(captured.tensors)
        chosen = [i for i, want in enumerate(wanted) if want]
        device = problem.layout.device
        state = random_state(device) if problem.random else None
        with problem.field.recomputing():
            for n in range(len(run.steps) - 1, -1, -1):
                step: Any = run.steps[n]
                if step.rng is not None:
                    set_random_state(device, step.rng)
                y = step.y.detach().requires_grad_()
                history = [self.slopes[i].detach().requires_grad_() for i in step.history]
                times = problem.t.detach().to("cpu", torch.float64)
                if self.time_grad:
                    times.requires_grad_()
                with torch.enable_grad():
                    made = self._again(step, y, history, times if self.time_grad else None)
                outputs, cotangents = [made.y1, made.slope], [yb, slope_bars.pop(n, None)]
                for (row, _), value in zip(step.outputs, made.rows, strict=True):
                    outputs.append(value)
                    cotangents.append(grad_rows[row])
                pairs = [
                    (x, c)
                    for x, c in zip(outputs, cotangents, strict=True)
                    if c is not None and x.requires_grad
                ]
                inputs = [y, *history, *[captured.tensors[i] for i in chosen]]
                if self.time_grad:
                    inputs.append(times)
                self._audit(made.slope, y, history, times, step.t)
                grads: list[Any] = [None] * len(inputs)
                if pairs:
                    with torch.enable_grad():
                        grads = list(
                            torch.autograd.grad(
                                [x for x, _ in pairs],
                                inputs,
                                [c for _, c in pairs],
                                allow_unused=True,
                            )
                        )
                    run.stats.vjps += 1
                yb = torch.zeros_like(y0) if grads[0] is None else grads[0]
                for i, grad in zip(step.history, grads[1 : 1 + len(history)], strict=True):
                    if grad is not None:
                        slope_bars[i] = grad if i not in slope_bars else slope_bars[i] + grad
                rest = grads[1 + len(history) :]
                for i, grad in zip(chosen, rest, strict=False):
                    if grad is not None:
                        sums[i] = grad if sums[i] is None else sums[i] + grad
                if self.time_grad and grads[-1] is not None:
                    t_bar += grads[-1]
        if state is not None:
            set_random_state(device, state)
        for row in range(self.initial_rows):
            yb = yb + grad_rows[row]
        return Cotangents(yb, t_bar.to(problem.t) if self.time_grad else None, sums)

    def _audit(
        self, slope: Tensor, y: Tensor, history: list[Tensor], times: Tensor, t: float
    ) -> None:
        known = Captured([*self.captured.tensors, *history, *([times] if self.time_grad else [])])
        audit_again(known, self.problem.field, Stage(self.problem.time(t), y, slope))

    def replay(self, run: Run, y0: Tensor, t: Tensor) -> list[Tensor]:
        """The rows as a differentiable function of y0, the times and what the field uses."""
        problem = self.problem
        device, before = problem.layout.device, problem.field.nfe
        state = random_state(device) if problem.random else None
        if state is not None and run.steps:
            set_random_state(device, run.steps[0].rng)
        keep, self.keep = self.keep, False
        with problem.field.recomputing(), torch.enable_grad():
            rows = self.make(self.knots(), y0, _times(t)).rows
        self.keep = keep
        if state is not None:
            set_random_state(device, state)
        run.stats.nfe_backward += problem.field.nfe - before
        problem.field.nfe = before
        return [rows]

    @property
    def initial_rows(self) -> int:
        """How many of the first rows are y0 itself."""
        times = self.problem.times
        return sum(t == times[0] for t in times)

    # -- making the steps
    # -----------------------------------------------------------------------------------------

    def make(self, knots: Any, y: Tensor, times: Tensor | None) -> Run:
        """Make all steps in ordinary operations; with ``times`` their derivatives are followed."""
        problem = self.problem
        goals = [problem.direction * t for t in problem.times]
        rows = [y for goal in goals if goal == goals[0]]
        steps: list[Any] = []
        slopes: list[Tensor] = []
        history: list[int] = []
        failure, fired, last_h, warned = None, None, 0.0, False
        watch = problem.watch
        resolution = 4 * torch.finfo(problem.t.dtype).eps
        t, start = next(knots)
        base = start
        moving = None if times is None else times[max(start, 0)]
        until = watch is not None and watch.until_event
        for t1, end in knots:
            if fired is not None or (len(rows) == len(goals) and not until):
                break
            if len(steps) >= problem.max_steps:
                failure = max_steps_failure(problem, t, t1 - t, math.nan)
                break
            h = t1 - t
            # times of a uniform grid are rounded, in float32 by more than steps are in float64
            if abs(h - last_h) > 1e-9 * abs(h) + resolution * max(abs(t), abs(t1)):
                history = []
            problem.call_back("callback_step", t, y, abs(h))
            step = AdamsStep(t, h, t1, start, end, y, history[: max(self.max_order - 2, 0)], [])
            base = step.base = start if start != FREE else base
            if problem.random:
                step.rng = random_state(problem.layout.device)
            made = _Making(self, step, y, [slopes[i] for i in step.history], times, moving)
            step.outputs = self._outputs(
                goals, len(rows), problem.direction * t, problem.direction * t1, end, until
            )
            if watch is not None:
                found = watch.after_step(t, h, made.state)
                if found is not None:
                    step.outputs = [(r, th) for r, th in step.outputs if (th or 1.0) <= found[0]]
                    step.outputs.append((len(rows) + len(step.outputs), found[0]))
                    fired = (t + found[0] * h, found[1])
                    step.fired = True
            rows += made.outputs()
            if not made.converged and not warned:
                warned = True
                warnings.warn(
                    f"Functional iteration did not converge at t={t1:.6g} (step h={h:.3e})."
                    " Solution may be incorrect:"
                    " use shorter steps or raise max_iters.",
                    stacklevel=8,
                )
            slopes.append(made.slope)
            history = [len(slopes) - 1, *step.history]
            if not made.converged:
                history = history[:-1]
            step.converged = made.converged
            steps.append(step)
            t, start, y, last_h = t1, end, made.y1, h
            if moving is not None:
                moving = made.end
            if problem.progress is not None:
                problem.progress(t1)
        if failure is None and not under_vmap(y) and not bool(torch.isfinite(y.detach()).all()):
            failure = late_failure(problem, rows)
        if self.keep:
            self.slopes = [k.detach() for k in slopes]
            for step in steps:
                step.y = step.y.detach()
        stats = Stats(accepted=len(steps))
        status = Status.EVENT if fired is not None else Status.SUCCESS
        if failure is not None:
            status = failure.status
        stacked = torch.stack(rows) if fired is not None else collect(problem, rows)
        return Run(stacked, steps if self.keep else [], y, stats, status, failure, fired)

    def _outputs(
        self, goals: list[float], row: int, tau: float, tau1: float, end: int, until: bool
    ) -> list[tuple[int, float | None]]:
        found: list[tuple[int, float | None]] = []
        while row < len(goals) and goals[row] <= tau1 and not until:
            exact = goals[row] == tau1 and (end == row or not self.problem.t.requires_grad)
            theta = 1.0 if goals[row] == tau1 else (goals[row] - tau) / (tau1 - tau)
            found.append((row, None if exact else theta))
            row += 1
        return found

    def _again(
        self, step: AdamsStep, y: Tensor, history: list[Tensor], times: Tensor | None
    ) -> _Making:
        moving = None
        if times is not None:
            moving = self._start(step, times)
        before = self.problem.field.nfe
        made = _Making(self, step, y, history, times, moving)
        made.rows = made.outputs()
        self.problem.field.nfe = before
        return made

    def _start(self, step: AdamsStep, times: Tensor) -> Tensor:
        """The start of a step with the derivative of the time with which it moves."""
        if step.base == FIXED:
            return torch.tensor(step.t, dtype=torch.float64)
        base = times[step.base]
        return base + (step.t - base.detach())

    def _beside(self, t: float, toward: float) -> float:
        far = math.inf if toward > t else -math.inf
        dtype = self.problem.layout.dtype
        value = torch.nextafter(torch.tensor(t, dtype=dtype), torch.tensor(far, dtype=dtype))
        return float(value)


class _Making:
    """The arithmetic of one step."""

    def __init__(
        self,
        job: AdamsJob,
        step: AdamsStep,
        y: Tensor,
        history: list[Tensor],
        times: Tensor | None,
        moving: Tensor | None,
    ) -> None:
        self.job, self.step, self.y = job, step, y
        self.problem = job.problem
        self.times, self.moving = times, moving
        self.rows: list[Tensor] = []
        self.length: Any = step.h
        self.end: Any = None
        if moving is not None:
            if step.end >= 0 and times is not None:
                self.length = times[step.end] - moving
            elif step.end != FREE:
                self.length = step.t1 - moving
            self.end = moving + self.length
        self.converged = True
        perturb = self.problem.perturb
        first = job._beside(step.t, step.t1) if perturb else step.t
        self._last = job._beside(step.t1, step.t) if perturb else step.t1
        known, job._first = job._first, None
        self.slope = self._field(first, 0.0, y) if known is None else known.k.clone()
        slopes = [self.slope, *history]
        order = min(len(slopes), job.max_order - 1)
        if order < LOWEST - 1:
            self.y1 = self._three_eighths()
        else:
            self.y1 = self._adams(slopes[:order], order)
        self._slope1: Tensor | None = None

    def _field(self, value: float, c: float, y: Tensor) -> Tensor:
        if self.moving is None:
            return self._evaluate(self.problem.time(value), y)
        return self._evaluate(self.problem.follow(self.moving + c * self.length, value), y)

    def _evaluate(self, t: Tensor, y: Tensor) -> Tensor:
        k = self.problem.field(t, y)
        if self.job.vigilant and k.requires_grad:
            raise UnexpectedGraph(Stage(t, y, k))
        return k.clone()  # kept over steps, in which a field may write over what it returned

    def _h(self) -> Any:
        return (
            self.length.to(self.y.device, self.y.dtype)
            if isinstance(self.length, Tensor)
            else self.length
        )

    def _three_eighths(self) -> Tensor:
        tableau, step, h = TABLEAUS["rk4"], self.step, self._h()
        slopes = [self.slope]
        for c, row in zip(tableau.c[1:], tableau.a[1:], strict=True):
            value = self._last if c == 1.0 else step.t + c * step.h
            slopes.append(self._field(value, c, self.y + h * _sum(slopes, row)))
        return self.y + h * _sum(slopes, tableau.b)

    def _adams(self, slopes: list[Tensor], order: int) -> Tensor:
        job, h = self.job, self._h()
        change = h * _sum(slopes, adams_bashforth(order))
        if not job.implicit:
            return self.y + change
        newest, *older = adams_moulton(order + 1)
        known = h * _sum(slopes, older)
        for _ in range(job.max_iters):
            before = change
            slope = self._field(self._last, 1.0, self.y + change)
            change = h * newest * slope + known
            if self._settled(before, change):
                return self.y + change
        self.converged = under_vmap(change)  # where nothing is known, nothing is doubted
        return self.y + change

    def _settled(self, before: Tensor, after: Tensor) -> bool:
        if under_vmap(after):  # samples cannot be told apart: all iterations are made
            return False
        with torch.no_grad():
            before, after = before.detach(), after.detach()
            ratio = (before - after) / self.problem.error_scale(before, after)
            if self.problem.layout.is_complex:
                ratio = torch.view_as_complex(ratio)
            return ratio.numel() == 0 or bool((ratio.abs() < 1).all())

    def state(self, theta: float) -> Tensor:
        """The state within the step."""
        return self.y1 if theta == 1.0 else self._between(theta)

    def outputs(self) -> list[Tensor]:
        """The rows that lie in the step."""
        step = self.step
        last = len(step.outputs) - 1
        return [
            self._row(row, theta, step.fired and i == last)
            for i, (row, theta) in enumerate(step.outputs)
        ]

    def _row(self, row: int, theta: float | None, at_event: bool) -> Tensor:
        """An output; ``theta`` None: the end of the step."""
        if theta is None:
            return self.y1
        position: Any = theta
        if self.moving is not None and self.times is not None:
            goal = self.step.t + theta * self.step.h if at_event else self.times[row]
            position = (goal - self.moving) / self.length
            position = position.to(self.y.device, self.y.dtype)
        return self._between(position)

    def _between(self, x: Any) -> Tensor:
        y, y1 = self.y, self.y1
        if not self.job.cubic:
            return y + x * (y1 - y)
        if self._slope1 is None:
            self._slope1 = self._field(self._last, 1.0, y1)
        h, rest = self._h(), 1 - x
        ends = (1 + 2 * x) * rest * rest * y + x * x * (3 - 2 * x) * y1
        return ends + h * (x * rest * rest * self.slope - x * x * rest * self._slope1)


def _sum(slopes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    total = None
    for k, weight in zip(slopes, weights, strict=False):
        if weight:
            total = weight * k if total is None else torch.add(total, k, alpha=weight)
    assert total is not None
    return total


def _times(t: Tensor) -> Tensor | None:
    return t.to("cpu", torch.float64) if follows(t) else None
