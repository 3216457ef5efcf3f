"""A solve as one node of the autograd graph, with its exact discrete adjoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch._exceptions import GradientError
from ctorch.ode.adaptive import AdaptiveLoop
from ctorch.ode.capture import Captured, UnknownTensor, discover, hooks_waiting, watched
from ctorch.ode.coefficients import Coefficients
from ctorch.ode.field import Stage, UnexpectedGraph
from ctorch.ode.fixed import FixedLoop
from ctorch.ode.loop import Loop
from ctorch.ode.plain import PlainRecorder, PlainStepper, replay
from ctorch.ode.problem import Problem
from ctorch.ode.run import Pieces, Run
from ctorch.ode.stepper import Recorder, Stepper
from ctorch.ode.steps import random_state, set_random_state
from ctorch.ode.sweep import Cotangents, Sweep

#: how often a solve begins again because func used tensors that had not been seen
RESTARTS = 20


class Job:
    """A Runge-Kutta solve that can be run, swept back, and made again.

    Args:
        problem: what to solve.
        method: how; adaptive where it has an error estimate and no knots are given.
        knots: makes the grid of a fixed-step solve.
    """

    def __init__(
        self,
        problem: Problem,
        method: Coefficients,
        knots: Callable[[], Iterator[tuple[float, int]]] | None = None,
    ) -> None:
        self.problem = problem
        self.method = method
        self.knots = knots
        self.adaptive = knots is None
        self.graphs = False
        self.keep = False
        self.time_grad = False
        self.captured = Captured(())
        self.watching = False
        self.stepper: Stepper | None = None

    def initial_time(self, stepper: Stepper | None = None) -> Tensor:
        """Time of the first evaluation, through ``stepper`` with its derivative."""
        problem = self.problem
        value = problem.times[0]
        if problem.perturb and not self.adaptive and len(problem.times) > 1:
            stepper = stepper or Stepper(problem, self.method, self.adaptive)
            value = stepper.beside(value, problem.times[-1])
        return problem.time(value) if stepper is None else stepper.first_time(value, 0)

    def loop(self, stepper: Stepper, recorder: Recorder) -> Loop:
        """The loop that makes the steps."""
        if self.adaptive:
            return AdaptiveLoop(self.problem, stepper, recorder, self.keep)
        loop = FixedLoop(self.problem, stepper, recorder, self.keep)
        assert self.knots is not None
        loop.knots = self.knots()
        return loop

    def run(self, first: Stage | None, first_rng: Any) -> Run:
        """Make the steps through the kernels. Under ``no_grad``."""
        self.stepper = Stepper(
            self.problem,
            self.method,
            self.adaptive,
            time_leaves=self.time_grad and self.keep,
            values_only=not (self.graphs or self.watching),
        )
        recorder = make_recorder(self)
        if first is None:
            first = recorder.evaluate(self.initial_time(self.stepper), self.problem.y0.detach())
        return self.loop(self.stepper, recorder).run(first, first_rng)

    def run_plain(self) -> Run:
        """Make the steps in differentiable operations: for transforms."""
        stepper = PlainStepper(self.problem, self.method, self.adaptive, self.problem.t)
        recorder = PlainRecorder(self.problem)
        loop = self.loop(stepper, recorder)
        loop.checks = self.adaptive
        return loop.run(recorder.evaluate(self.initial_time(stepper), self.problem.y0))

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
        assert self.stepper is not None
        sweep = Sweep(
            self.problem, self.stepper, self.captured, run, self.time_grad, self.initial_rows
        )
        return sweep.run(grad_rows, wanted, grad_pieces)

    def replay(self, run: Run, y0: Tensor, t: Tensor) -> list[Tensor]:
        """The rows of a run (and its pieces, stacked) as functions of y0, the times and what the
        field uses.
        """
        device = self.problem.layout.device
        stepper = PlainStepper(self.problem, self.method, self.adaptive, t)
        state = random_state(device) if self.problem.random else None
        before = self.problem.field.nfe
        with self.problem.field.recomputing(), torch.enable_grad():
            rows, pieces = replay(
                self.problem,
                stepper,
                run.steps,
                y0,
                self.initial_rows,
                run.rows.shape[0] - 1 if run.fired is not None else -1,
                lambda states: set_random_state(device, states),
            )
        run.stats.nfe_backward += self.problem.field.nfe - before
        self.problem.field.nfe = before
        if state is not None:
            set_random_state(device, state)
        return [rows, *(dataclasses.replace(run, pieces=pieces).stacked() if pieces else ())]

    @property
    def initial_rows(self) -> int:
        """How many of the first rows are y0 itself."""
        times = self.problem.times
        return sum(t == times[0] for t in times)


def solve_without_gradient(job: Any) -> Run:
    """Solve; the result has no graph."""
    with torch.no_grad():
        return job.run(None, None)


def solve_differentiably(job: Any, graphs: bool) -> tuple[Tensor, Run]:
    """Solve with an exact gradient.

    Args:
        job: the solve.
        graphs: keep the graphs of the accepted stages (``gradient="backprop"``); else recompute
            them step by step.

    Returns:
        The rows, with their graph, and the run.
    """
    problem = job.problem
    device = problem.layout.device
    job.time_grad = problem.t.requires_grad
    start = random_state(device)
    extra: list[Tensor] = []
    for _ in range(RESTARTS):
        first, found = _first_evaluation(job)
        problem.random = problem.random or not _same(start, random_state(device))
        job.captured = Captured([*found, *extra])
        before = random_state(device)
        try:
            rows, run = _run(job, graphs, first, start)
        except (UnknownTensor, UnexpectedGraph) as surprise:
            # what this evaluation uses was not seen in the first one: begin again, knowing it
            new = _new_tensors(job, surprise)
            job.watching = job.watching or not new
            extra += new
            set_random_state(device, start)
            continue
        if not problem.random and not _same(before, random_state(device)):
            problem.random = True  # it draws, though not at first: note the states this time
            set_random_state(device, start)
            continue
        return rows, run
    raise GradientError(
        "func uses other tensors that require grad each time it is evaluated: pass them in args, or"
        ' solve with gradient="none".'
    )


def _run(job: Any, graphs: bool, first: Stage, first_rng: Any) -> tuple[Tensor, Run]:
    inputs = (job.problem.y0, job.problem.t, *job.captured.tensors)
    job.keep = any(x.requires_grad for x in inputs)
    job.graphs = graphs and job.keep
    if not job.graphs:
        first = Stage(first.t.detach(), first.y.detach(), first.k.detach())
    if not job.keep:
        # grad mode stays on, so that a slope which has a graph after all is noticed
        run = job.run(first, first_rng)
        return run.rows, run
    holder: list[Run] = []
    outputs = _Solve.apply(job, holder, first, first_rng, *inputs)
    run = holder[0]
    if isinstance(outputs, tuple):
        run.attached = Pieces(*outputs[1:])
        return outputs[0], run
    return outputs, run


def _new_tensors(job: Any, surprise: Any) -> list[Tensor]:
    """The tensors from outside that an evaluation uses and that are not captured yet."""
    known = {id(x) for x in job.captured.tensors}
    if job.watching:
        return [x for x in surprise.tensors if id(x) not in known]
    t, y = surprise.stage.t.detach().clone(), surprise.stage.y.detach().clone()
    field = job.problem.field
    _, found = discover(lambda: field.record(t, y), [t, y], (field.func, field.args))
    return [x for x in found if id(x) not in known]


def make_recorder(job: Any) -> Recorder:
    """How a job evaluates its stages."""
    audit = job.captured.audit if job.graphs and not job.watching else None
    watch = (lambda evaluate: watched(evaluate, job.captured)) if job.watching else None
    return Recorder(job.problem, job.graphs, job.time_grad, audit, watch)


def _first_evaluation(job: Any) -> tuple[Stage, list[Tensor]]:
    field = job.problem.field
    t, y = job.initial_time(), job.problem.y0.detach()
    record = field.record_with_time if job.time_grad else field.record
    return discover(lambda: record(t, y), [t, y], (field.func, field.args))


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


class _Solve(torch.autograd.Function):
    """Rows of a solve as a function of y0, the user's times and the captured tensors."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, job: Any, holder: list[Run], first: Stage, first_rng: Any, *inputs: Tensor
    ) -> Any:
        run = job.run(first, first_rng)
        holder.append(run)
        # the rows get this node as their grad_fn: it must not hold them, for only the garbage
        # collector would free such a cycle, and the graphs of all stages with it
        ctx.job, ctx.run = job, dataclasses.replace(run, rows=run.rows.detach())
        ctx.save_for_backward(*inputs)
        ctx.set_materialize_grads(False)
        return (run.rows, *run.stacked()) if run.pieces else run.rows

    @staticmethod
    def backward(  # type: ignore[override]
        ctx: Any, grad_rows: Tensor | None, *grad_pieces: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        y0, t, *captured = ctx.saved_tensors
        job, run = ctx.job, ctx.run
        needed = ctx.needs_input_grad[4:]
        if torch.is_grad_enabled():
            with hooks_waiting(job.captured.tensors):
                grads = _replayed(job, run, y0, t, captured, [grad_rows, *grad_pieces], needed)
        else:
            if grad_rows is None:
                grad_rows = torch.zeros_like(run.rows)
            pieces = (grad_pieces,) if grad_pieces else ()
            run.release = not _keeps_graph()
            with hooks_waiting(job.captured.tensors):
                cotangents = job.sweep(run, grad_rows, needed[2:], *pieces)
            grads = [cotangents.y0, cotangents.t, *cotangents.captured]
            if run.release:
                for step in run.steps:
                    step.stages = None
        return (None, None, None, None, *grads)


def _replayed(
    job: Any,
    run: Run,
    y0: Tensor,
    t: Tensor,
    captured: list[Tensor],
    grads: list[Tensor | None],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradient as a differentiable function of everything, by making the steps again from y0, t
    and tensors.
    """
    start = y0.clone()  # so that other paths from y0 into what func holds are not counted here
    times = t.clone()
    outputs = job.replay(run, start, times)
    pairs = [
        (x, g) for x, g in zip(outputs, grads, strict=True) if g is not None and x.requires_grad
    ]
    inputs = [start, times, *captured]
    chosen = [i for i, need in enumerate(needed) if need and inputs[i].requires_grad]
    results: list[Tensor | None] = [None] * len(inputs)
    if not pairs:
        return results
    found = torch.autograd.grad(
        [x for x, _ in pairs],
        [inputs[i] for i in chosen],
        [g for _, g in pairs],
        create_graph=True,
        allow_unused=True,
    )
    for i, grad in zip(chosen, found, strict=True):
        results[i] = grad
    return results


def _keeps_graph() -> bool:
    keeps = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return True if keeps is None else bool(keeps())
