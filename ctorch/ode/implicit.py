"""``method="bdf2"``, and ``"implicit_adams"`` with a root finder: implicit methods for stiff
problems.

A step's equations are solved without a graph, and only their roots are kept. The gradient is that
of the roots, by the implicit function theorem, step by step from the last to the first.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch._exceptions import ArgumentError
from ctorch.ode.arguments import interpolation
from ctorch.ode.capture import Captured
from ctorch.ode.continuous import ContinuousAdjoint
from ctorch.ode.discrete import solve_differentiably, solve_without_gradient
from ctorch.ode.field import Stage
from ctorch.ode.implicit_function import attach
from ctorch.ode.implicit_loop import AdaptiveImplicitLoop, FixedImplicitLoop, Paces
from ctorch.ode.implicit_steps import FORMULAS, ImplicitStep, Made, State, between
from ctorch.ode.problem import Problem
from ctorch.ode.root_finding import make_root_finder
from ctorch.ode.run import Piece, Run
from ctorch.ode.steps import FIXED, FREE
from ctorch.ode.sweep import Cotangents, audit_again
from ctorch.ode.transforms import transforms_active

if TYPE_CHECKING:
    from ctorch.ode.solve import Request


def solve(request: Request, problem: Problem) -> tuple[Run, Tensor, Problem]:
    """Solve by an implicit method. Returns the run, its rows with their graph, and the problem."""
    from ctorch.ode import continuous

    if transforms_active():
        raise NotImplementedError(
            f"method {request.method!r} with a root finder under a torch.func transform or"
            " forward-mode AD is not built yet: use plain autograd."
        )
    job = ImplicitJob(problem, request)
    if not request.differentiates:
        run = solve_without_gradient(job)
        return run, run.rows, problem
    if request.adjoint:
        request.gradient = _adjoint(request)
        run, rows = continuous.solve(request, problem, lambda first: job.run(first, None))
        return run, rows, problem
    rows, run = solve_differentiably(job, graphs=False)
    return run, rows, problem


def _adjoint(request: Request) -> ContinuousAdjoint:
    """The adjoint equation has no Jacobian to be asked for: an explicit method solves it."""
    given = request.gradient
    given = given if isinstance(given, ContinuousAdjoint) else ContinuousAdjoint()
    if given.method is None:
        return dataclasses.replace(given, method="dopri5")
    if given.method == "bdf2" or "root_finder" in (given.options or {}):
        raise NotImplementedError(
            'the adjoint equation cannot be solved by an implicit method: use gradient="checkpoint"'
            ', which is exact, or ContinuousAdjoint(method="dopri5").'
        )
    return given


def polynomials() -> Tensor:
    """Of the dense output: the cubic through states and slopes at both ends of a step, written in
    the slope at its start, its mean slope and the slope at its end.
    """
    return torch.tensor([[1.0, -2.0, 1.0], [0.0, 3.0, -2.0], [0.0, -1.0, 1.0]], dtype=torch.float64)


class ImplicitJob:
    """An implicit solve that can be run, swept back step by step, and made again."""

    def __init__(self, problem: Problem, request: Request) -> None:
        self.problem = problem
        options = request.options
        self.knots = request.knots(problem)
        name = options.get("root_finder") or "newton"
        self.finder = make_root_finder(name, problem, options, patient=self.knots is not None)
        self.formulas = _formulas(request)
        self.linear = interpolation(options, "cubic") == "linear"
        self.time_grad = self.keep = self.graphs = self.watching = False
        self.captured = Captured(())

    # -- the interface of a job

    def initial_time(self) -> Tensor:
        """Time of the first evaluation."""
        problem = self.problem
        return problem.time(Paces(problem).inside(problem.times[0], problem.times[-1]))

    def run(self, first: Stage | None, first_rng: Any) -> Run:
        """Make the steps. Under ``no_grad``, or with nothing that requires grad."""
        problem = self.problem
        if problem.random:
            raise ArgumentError(
                "func draws random numbers: the equation of an implicit step has no root then. Use"
                " an explicit method, or draw once, before the solve."
            )
        before = problem.field.nfe
        self.finder.jacobians = 0
        loop: Any = AdaptiveImplicitLoop(self) if self.knots is None else FixedImplicitLoop(self)
        run = loop.run(first)
        run.stats.nfe = problem.field.nfe - before + (0 if first is None else 1)
        run.stats.jacobians = self.finder.jacobians
        return run

    def sweep(
        self,
        run: Run,
        grad_rows: Tensor,
        wanted: Sequence[bool],
        grad_pieces: Sequence[Tensor | None] = (),
    ) -> Cotangents:
        """Pull cotangents of the rows, and of the pieces of a continuous solution, back through the
        steps of a run.
        """
        problem, captured = self.problem, self.captured
        chosen = [i for i, want in enumerate(wanted) if want]
        sums: list[Tensor | None] = [None] * len(captured.tensors)
        bars: list[Tensor | None] = [None, None, None]  # of State
        times = problem.t.detach().to("cpu", torch.float64).requires_grad_(self.time_grad)
        t_bar = torch.zeros_like(times)
        before, run_before = problem.field.nfe, run.stats.nfe_backward
        with problem.field.recomputing():
            for n in range(len(run.steps) - 1, -1, -1):
                step: Any = run.steps[n]
                leaves = State(*(x.detach().clone().requires_grad_() for x in step.state))
                with torch.enable_grad():
                    made, rows, piece = self.again(step, leaves, times, 1, run.stats)
                outputs: list[Tensor] = [made.y, made.k, *rows]
                cotangents = [*bars[:2], *(grad_rows[row] for row, _ in step.outputs)]
                if piece is not None and grad_pieces:
                    parts = zip(_parts(piece), grad_pieces, strict=True)
                    for place, (part, grad) in enumerate(parts):
                        outputs.append(part)
                        cotangents.append(
                            None if grad is None else grad[:, n] if place == 3 else grad[n]
                        )
                inputs = [*leaves, *(captured.tensors[i] for i in chosen)]
                grads = _pull(outputs, cotangents, [*inputs, *([times] * self.time_grad)])
                y_bar, k_bar, start_bar = grads[:3]
                bars = [_add(y_bar, bars[2]), k_bar, start_bar]
                for i, grad in zip(chosen, grads[3:], strict=False):
                    sums[i] = _add(sums[i], grad)
                if self.time_grad and grads[-1] is not None:
                    t_bar += grads[-1]
        run.stats.nfe_backward = run_before + problem.field.nfe - before
        problem.field.nfe = before
        y_bar = _add(bars[0], bars[2])
        y_bar = torch.zeros_like(problem.y0) if y_bar is None else y_bar
        for row in range(self.initial_rows):
            y_bar = y_bar + grad_rows[row]
        return Cotangents(y_bar, t_bar.to(problem.t) if self.time_grad else None, sums)

    def replay(self, run: Run, y0: Tensor, t: Tensor) -> list[Tensor]:
        """The rows of a run (and its pieces, stacked) as functions of y0, the times and what the
        field uses.
        """
        problem, before = self.problem, self.problem.field.nfe
        rows = [y0] * self.initial_rows
        pieces = []
        times = t.to("cpu", torch.float64)
        with problem.field.recomputing(), torch.enable_grad():
            state = State(y0, torch.zeros_like(y0), y0)
            for step in run.steps:
                made, found, piece = self.again(step, state, times, 2, run.stats)  # type: ignore[arg-type]
                rows += found
                if piece is not None:
                    pieces.append(piece)
                state = State(made.y, made.k, state.y)
        run.stats.nfe_backward += problem.field.nfe - before
        problem.field.nfe = before
        missing = run.rows.shape[0] - len(rows)
        stacked = torch.stack([*rows, *run.rows[len(rows) :].detach()] if missing else rows)
        return [stacked, *(dataclasses.replace(run, pieces=pieces).stacked() if pieces else ())]

    @property
    def initial_rows(self) -> int:
        """How many of the first rows are y0 itself."""
        times = self.problem.times
        return sum(t == times[0] for t in times)

    # -- a step made again, with its graph

    def again(
        self, step: ImplicitStep, state: State, times: Tensor, order: int, stats: Any
    ) -> tuple[Made, list[Tensor], Piece | None]:
        """End, outputs and piece of a step as functions of its start, the times and what the field
        uses, whose derivatives are right up to ``order``.
        """
        problem = self.problem
        moving, length = _start(step, times), _length(step, times)
        h = _on(length, state.y)
        h_before = None if step.before is None else _on(_length(step.before, times), state.y)
        roots = iter(step.roots)
        known = Captured([*self.captured.tensors, times]) if order == 1 else None

        def time(c: float) -> Tensor:
            value = step.first if c == 0.0 else step.last if c == 1.0 else step.t + c * step.h
            return problem.follow(moving + c * length, value)

        def count() -> None:
            stats.vjps += 1

        def stage(c: float, constant: Tensor, scale: Any, guess: Tensor) -> Tensor:
            z, seen = attach(next(roots), constant, scale, time(c), self.finder, order, count)
            if known is not None:
                audit_again(known, problem.field, seen)
            return z

        if step.fresh:
            state = state._replace(k=problem.field(time(0.0), state.y))
        made = FORMULAS[step.formula](state, h, h_before, stage)
        rows = []
        for row, theta in step.outputs:
            if theta is None:
                rows.append(made.y)
                continue
            at_event = step.fired and (row, theta) == step.outputs[-1]
            goal = step.t + theta * step.h if at_event else times[row]
            x = _on((goal - moving) / length, state.y)
            rows.append(between(state, made, h, x, self.linear))
        piece = self.piece(state, made, h, problem.direction * moving, problem.direction * length)
        return made, rows, piece

    def piece(self, state: State, made: Made, h: Any, start: Any, length: Any) -> Piece | None:
        """A step as a piece of the continuous solution, if that is wanted."""
        if not self.problem.dense:
            return None
        start, length = (torch.as_tensor(x, dtype=torch.float64) for x in (start, length))
        slopes = torch.stack([state.k, (made.y - state.y) / h, made.k])
        return Piece(start, length, state.y, slopes)


def _formulas(request: Request) -> tuple[str, str]:
    """The formulas of a step from a state alone, and of one that knows the step before."""
    if request.method == "bdf2":
        return "start", "bdf2"
    order = int(request.options.get("max_order", 2))
    if order not in (1, 2):
        raise ArgumentError(
            f"{request.method} with a root finder other than functional iteration has order 1 or 2:"
            f" max_order is {order}. Higher orders are not stable for stiff problems."
        )
    return ("euler", "euler") if order == 1 else ("trapezoid", "trapezoid")


def _start(step: ImplicitStep, times: Tensor) -> Tensor:
    """The start of a step with the derivative of the time with which it moves."""
    if step.base == FIXED:
        return torch.tensor(step.t, dtype=torch.float64)
    base = times[step.base]
    return base + (step.t - base.detach())


def _length(step: ImplicitStep, times: Tensor) -> Tensor:
    """The signed length of a step, likewise."""
    moving = _start(step, times)
    if step.end == FREE:
        return torch.tensor(step.h, dtype=torch.float64)
    end = step.t1 if step.end == FIXED else times[step.end]
    return step.h + ((end - moving) - (end - moving).detach())


def _on(x: Tensor, y: Tensor) -> Tensor:
    return x.to(y.device, y.dtype)


def _parts(piece: Piece) -> tuple[Tensor, ...]:
    return piece.start, piece.length, piece.y, piece.k


def _add(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a + b


def _pull(
    outputs: list[Tensor], cotangents: Sequence[Tensor | None], inputs: list[Tensor]
) -> list[Tensor | None]:
    pairs = [
        (x, c)
        for x, c in zip(outputs, cotangents, strict=True)
        if c is not None and x.requires_grad
    ]
    if not pairs:
        return [None] * len(inputs)
    with torch.enable_grad():
        return list(
            torch.autograd.grad(
                [x for x, _ in pairs], inputs, [c for _, c in pairs], allow_unused=True
            )
        )
