"""Batched solves: every sample steps on its own, with its own error control, times and fate.

All samples share the evaluations of the vector field; one that is done, or whose step was rejected,
takes a step of length zero meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.ode import methods
from ctorch.ode.adaptive import PATIENCE
from ctorch.ode.arguments import check_rows
from ctorch.ode.batched_sweep import BatchedSweep, replay_batched
from ctorch.ode.capture import Captured
from ctorch.ode.coefficients import Coefficients
from ctorch.ode.control import initial_steps
from ctorch.ode.discrete import make_recorder, solve_differentiably, solve_without_gradient
from ctorch.ode.field import Keeper, Stage
from ctorch.ode.problem import Problem
from ctorch.ode.run import NO_SLOPE, UNKNOWN, Run, failure_of_sample
from ctorch.ode.solution import Stats, Status
from ctorch.ode.stepper import Recorder, bare_step
from ctorch.ode.steps import Rows, Step, forget_lost
from ctorch.ode.sweep import Cotangents
from ctorch.ode.transforms import transforms_active
from ctorch.ops import step_control as control
from ctorch.ops._direct import BatchControl, Buffer, Weights
from ctorch.ops.runge_kutta import rk_combine, rk_interpolate, rk_stage
from ctorch.ops.step_control import rk_outputs

if TYPE_CHECKING:
    from ctorch.ode.solve import Request

#: by fate: running, done, out of steps, stuck, stuck for an error that is not finite
_STATUS_OF_FATE = [
    Status.SUCCESS, Status.SUCCESS, Status.MAX_STEPS, Status.STEP_UNDERFLOW, Status.NONFINITE
]  # fmt: skip


def solve(request: Request, bar: Callable[[float], None] | None) -> tuple[Run, Tensor, Problem]:
    """Solve ``request`` with one step size for each sample. Returns the run, its rows and the
    problem.
    """
    check_built(request)
    problem = request.problem()
    problem.progress = bar
    job = BatchedJob(problem, request.coefficients())
    if not request.differentiates:
        run = solve_without_gradient(job)
        return run, run.rows, problem
    rows, run = solve_differentiably(job, graphs=request.gradient == "backprop")
    return run, rows, problem


def check_method(request: Request) -> None:
    """Refuses a method that cannot step each sample on its own, natively or not."""
    if request.method not in (*methods.ADAPTIVE, *methods.TAYLOR):
        same = request.method in (*methods.FIXED, *methods.ADAMS)
        why = "steps of the same length for all samples need no batched=True; " if same else ""
        raise NotImplementedError(
            f"batched=True with method {request.method!r} is not built yet: {why}methods that"
            " step each sample on its own are "
            + ", ".join((*methods.ADAPTIVE, *methods.TAYLOR))
            + "."
        )


def check_built(request: Request) -> None:
    """Refuses what a batched solve cannot do yet."""
    if request.adjoint:
        raise NotImplementedError(
            'batched=True with gradient="adjoint" is not built yet: use "checkpoint", which is'
            " exact."
        )
    missing = [name for name in ("step_t", "jump_t") if request.options.get(name) is not None]
    missing += ["events"] * bool(request.events) + ["dense"] * bool(request.dense)
    if missing:
        raise NotImplementedError(f"batched=True with {missing[0]} is not built yet.")
    if transforms_active():
        raise NotImplementedError(
            "batched=True under a torch.func transform or forward-mode AD is not built yet: use"
            " batched=False, or plain autograd."
        )


class BatchedJob:
    """A batched Runge-Kutta solve that can be run, swept back, and made again."""

    def __init__(self, problem: Problem, method: Coefficients) -> None:
        self.problem = problem
        self.method = method
        self.adaptive = True
        self.graphs = False
        self.keep = False
        self.time_grad = False
        self.watching = False
        self.captured = Captured(())
        shape = problem.y0.shape
        self.size = shape[0]
        check_rows(problem.t, self.size)
        t = problem.t.detach().double()
        self.times = (t if t.dim() == 2 else t.expand(self.size, -1)).contiguous()

    def spread(self, x: Tensor) -> Tensor:
        """[B] -> [B, 1, ..., 1], to broadcast against the packed state."""
        return x.view(-1, *[1] * (self.problem.y0.dim() - 1))

    def field_time(self, t: Tensor) -> Tensor:
        """[B] float64 -> as the vector field takes it: [B, 1, ..., 1] in the dtype of the user's
        state.
        """
        dims = self.problem.y0.dim() - (1 if self.problem.layout.is_complex else 0) - 1
        return t.to(self.problem.layout.dtype).view(-1, *[1] * dims)

    def initial_time(self) -> Tensor:
        """Time of the first evaluation."""
        return self.field_time(self.times[:, 0])

    def run(self, first: Stage | None, first_rng: Any) -> Run:
        """Make the steps through the kernels. Under ``no_grad``."""
        recorder = make_recorder(self)
        if first is None:
            first = recorder.evaluate(self.initial_time(), self.problem.y0.detach())
        if self.keep and not self.graphs and self.problem.random:
            raise NotImplementedError(
                'a vector field that draws random numbers needs gradient="backprop" with'
                " batched=True."
            )
        return BatchedLoop(self, recorder).run(first)

    def sweep(self, run: Run, grad_rows: Tensor, wanted: Sequence[bool]) -> Cotangents:
        """Pull cotangents of the rows back through the steps of a run."""
        return BatchedSweep(self, run).run(grad_rows, wanted)

    def replay(self, run: Run, y0: Tensor, t: Tensor) -> list[Tensor]:
        """The rows of a run as a differentiable function of y0, the times and what the field
        uses.
        """
        field = self.problem.field
        before = field.nfe
        with field.recomputing(), torch.enable_grad():
            rows = replay_batched(self, run, y0, t)
        run.stats.nfe_backward += field.nfe - before
        field.nfe = before
        return [rows]


class BatchedLoop:
    """The adaptive loop over a batch. What belongs to a sample (times in float64, counts, fate)
    lies in the matrices of ``ctorch.ops.step_control``; its time is tau = direction * t, which
    increases.
    """

    def __init__(self, job: BatchedJob, recorder: Recorder) -> None:
        self.job = job
        self.problem = problem = job.problem
        self.recorder = recorder
        self.method = method = job.method
        y0 = problem.y0
        device = y0.device
        self.k = torch.empty((method.total, *y0.shape), dtype=y0.dtype, device=device)
        self._buffer = Buffer(self.k, y0.detach())
        self._weights = method.states
        self._inner, self._last = self._weights[:-1], self._weights[-1]
        self._made = len(self._weights) - method.late
        plain = problem.layout.plain and not torch.is_inference_mode_enabled()
        self._bare = plain and not (recorder.graphs or job.watching)
        self.steps: list[Step] = []
        start, end = job.times[:, 0], job.times[:, -1]
        self.direction = torch.where(end < start, -1.0, 1.0).to(torch.float64)
        self.goals = job.times * self.direction.unsqueeze(1)
        self.samples = torch.zeros((7, job.size), dtype=torch.float64, device=device)
        self.samples[control.TAU] = self.goals[:, 0]
        self.samples[control.END] = self.goals[:, -1]
        self.samples[control.DIRECTION] = self.direction
        self.samples[control.ERROR] = math.nan
        started = self.goals <= self.goals[:, :1]
        self.counts = torch.zeros((5, job.size), dtype=torch.int64, device=device)
        self.counts[control.OUTPUT] = started.sum(1)
        self.counts[control.FATE] = torch.where(start == end, control.DONE, control.RUNNING)
        self._like = job.field_time(start)
        numbers = problem.controller.numbers(
            method.tableau.error_order, problem.min_step, problem.max_step, problem.max_steps
        )
        abscissae = torch.tensor(method.c[1:], dtype=torch.float64)
        self._turns = BatchControl(
            self.samples, self.counts, self.goals, numbers, abscissae, self._like, self._buffer
        )  # fmt: skip
        self._error_weights = None if method.e is None else Weights(method.e)
        self._plan: Tensor | None = None
        self._column = (-1, *[1] * (y0.dim() - 1))

    def run(self, first: Stage) -> Run:
        """Integrate from the first evaluation."""
        problem, job, counts = self.problem, self.job, self.counts
        before = problem.field.nfe
        y = problem.y0.detach()
        self.rows = torch.full(
            (job.size, self.goals.shape[1], *y.shape[1:]), math.nan, dtype=y.dtype, device=y.device
        )
        started = self.goals <= self.goals[:, :1]
        # (no repeat_interleave: it starts OpenMP's threads for any size, which hangs after a fork)
        self.rows[started] = y[started.nonzero()[:, 0]]
        ends = self.goals >= self.goals[:, -1:]
        # where there is nothing to read but the last states, that can wait until all are there
        self._reads = job.keep or not bool((started | ends).all())
        span = self.samples[control.END] - self.samples[control.TAU]
        keeper = self.recorder.keeper(first)
        if keeper is not None:
            first = Stage(first.t, first.y, keeper.first())
        self.samples[control.LENGTH] = self._first_steps(y, first, span)
        self._stop_short()
        y = self._integrate(y, first.k, keeper)
        if not self._reads:
            ends &= (counts[control.FATE] == control.DONE).unsqueeze(1)
            self.rows[ends] = y[ends.nonzero()[:, 0]]
        fates = torch.tensor(_STATUS_OF_FATE, device=y.device)
        status = fates[counts[control.FATE]]
        finite = torch.isfinite(y.reshape(job.size, y.shape[1:].numel())).all(1)
        status = torch.where((status == 0) & ~finite, int(Status.NONFINITE), status)
        accepted, rejected = counts[control.ACCEPTED].clone(), counts[control.REJECTED].clone()
        stats = Stats(problem.field.nfe - before + 1, accepted, rejected)
        run = Run(self.rows, self.steps, y, stats, status)
        run.failure = failure_of_sample(problem, status, self._end)
        if run.failure is not None:
            forget_lost(self.steps, status != 0, y)
        run.first_stage = first if self.recorder.graphs else None
        return run

    def _integrate(self, y: Tensor, k0: Tensor, keeper: Keeper | None) -> Tensor:
        problem, method = self.problem, self.method
        samples, counts, turns = self.samples, self.counts, self._turns
        busy = bool((counts[control.FATE] == control.RUNNING).any())
        mark, wild, turn = samples[control.TAU].clone(), torch.zeros_like(samples[0]), 0
        while busy:
            plan, lands, times = turns.plan()
            if plan is not self._plan:
                self._take(plan)
            stage_times = self._stage_times(times)
            y1, stages = self._attempt(y, k0, stage_times)
            error = self._error(y, y1, stages)
            moved, flags, passed = turns.judge(error)
            if flags & control.MOVED:
                if method.late:
                    stages.append(self.recorder.evaluate(stage_times[method.n - 2], y1))
                k1 = stages[method.n - 1].k
                if keeper is not None:
                    k1 = stages[method.n - 1].k = keeper.keep(k1)
                if self._reads and (self.job.keep or passed):
                    if self.job.keep:  # what the next plan writes over
                        plan, lands, moved = plan.clone(), lands.clone(), moved.clone()
                    t, h, t1 = plan.unbind()
                    step = Step(t, h, t1, y, end=lands, moved=moved)
                    if passed:
                        found = rk_outputs(counts, plan, self.job.times, passed)
                        inside = bool(flags & control.INSIDE)
                        self._read(step, stages, stage_times, y1, found, inside)
                    self._keep(step, stages, bool(flags & control.NOT_FINITE))
                y, k0 = turns.accept(moved, y, y1, k0, k1)
            busy, turn = bool(flags & control.BUSY), turn + 1
            if flags & control.NOT_FINITE:
                wild += ~torch.isfinite(error)
            if turn % PATIENCE == 0 and busy:
                busy = self._stop_creeping(mark, wild)
                mark, wild = samples[control.TAU].clone(), torch.zeros_like(wild)
            if problem.progress is not None:
                tau = samples[control.TAU]
                problem.progress(float((self.direction * tau)[tau.argmin()]))
        self._slopes = k0
        return y

    def _stop_short(self) -> None:
        """End samples whose first step cannot be told from none; ``rk_judge`` sees later ones."""
        samples, fates = self.samples, self.counts[control.FATE]
        length = samples[control.LENGTH].clamp(self.problem.min_step, self.problem.max_step)
        frozen = control.frozen(samples[control.TAU], length, samples[control.END])
        fates.masked_fill_(frozen & (fates == control.RUNNING), control.STUCK)

    def _stop_creeping(self, mark: Tensor, wild: Tensor) -> bool:
        """End samples that creep along the edge of the field's domain, as the loop for one solve
        does.

        Args:
            mark: where they were ``PATIENCE`` attempts ago, [B].
            wild: how many of these attempts were not finite, [B].

        Returns:
            Whether samples are left.
        """
        samples, fates = self.samples, self.counts[control.FATE]
        moved, left = samples[control.TAU] - mark, samples[control.END] - samples[control.TAU]
        creeping = (wild > PATIENCE // 5) & (moved < 1e-3 * left) & (fates == control.RUNNING)
        fates.masked_fill_(creeping, control.WILD)
        samples[control.ERROR].masked_fill_(creeping, math.nan)
        return bool((fates == control.RUNNING).any())

    # -- one step
    # ----------------------------------------------------------------------------------------------

    def _take(self, plan: Tensor) -> None:
        """Have the kernels read their steps from ``plan``."""
        problem, method = self.problem, self.method
        self._plan, self._h = plan, plan[control.SIGNED]
        self._make = self._buffer.stage(self._h)
        self._step = self._buffer.step(self._h, self._weights, self._made)
        tolerances = problem.tolerances.rtol, problem.tolerances.atol
        assert self._error_weights is not None
        self._measure = self._buffer.error(
            self._h, self._error_weights, method.n - 1, tolerances, problem.layout.segments,
            problem.max_norm, per_sample=True,
        )  # fmt: skip

    def _stage_times(self, times: Sequence[Tensor]) -> Sequence[Tensor]:
        """Times of the stages after the first, as the vector field takes them."""
        # leaves of graphs must be tensors of their own
        return [t.clone() for t in times] if self.recorder.time_grad else times

    def _attempt(
        self, y: Tensor, k0: Tensor, times: Sequence[Tensor]
    ) -> tuple[Tensor, list[Stage]]:
        first = Stage(self._like, y, k0)  # its time is not looked at again
        if self._bare:
            return bare_step(self.problem.field, self._step, y, first, times, self._made)
        evaluate, make = self.recorder.evaluate, self._make
        stages = [first]
        slope, slot = k0, 0
        for a in self._inner:
            stage = evaluate(times[slot], make(y, slope, slot, a))
            stages.append(stage)
            slope = stage.k
            slot += 1
        y1 = make(y, slope, slot, self._last)
        if not self.method.late:
            stages.append(evaluate(times[slot], y1))
        return y1, stages

    def _error(self, y: Tensor, y1: Tensor, stages: list[Stage]) -> Tensor:
        method, problem = self.method, self.problem
        slope = None if method.late else stages[-1].k
        if problem.norm is None and not problem.layout.is_complex:
            norms: Tensor = self._measure(y, y1, slope)
            return norms
        if slope is not None:
            self.k[method.n - 1].copy_(slope)
        return self._norm(rk_combine(None, self.k, method.e, self._h), problem.error_scale(y, y1))

    def _norm(self, error: Tensor, scale: Tensor) -> Tensor:
        """Scaled norm of every sample: [B] float64."""
        problem = self.problem
        ratio = problem.layout.unpack(error / scale)
        if problem.norm is not None:
            return problem.users_norms(ratio, self.job.size)
        leaves = torch.utils._pytree.tree_leaves(ratio)
        parts = []
        for leaf in leaves:
            flat = leaf.abs().reshape(self.job.size, leaf.shape[1:].numel())
            parts.append(flat.amax(1) if problem.max_norm else flat.square().mean(1).sqrt())
        return torch.stack(parts).amax(0).double()

    def _first_steps(self, y: Tensor, first: Stage, span: Tensor) -> Tensor:
        problem, job = self.problem, self.job
        if problem.first_step is not None:
            return torch.full_like(span, problem.first_step)
        scale = problem.error_scale(y, torch.zeros_like(y))
        k0 = first.k.detach()

        def slope_change(h0: Tensor) -> Tensor:
            signed = self.direction * h0
            y1 = y + job.spread(signed.to(y.dtype)) * k0
            time = job.field_time(job.times[:, 0] + signed)
            return self._norm(problem.field.value(time, y1).k - k0, scale)

        return initial_steps(
            self._norm(y, scale),
            self._norm(k0, scale),
            slope_change,
            self.method.tableau.error_order,
            span,
        )

    # -- an accepted step
    # -----------------------------------------------------------------------------------------

    def _read(
        self,
        step: Step,
        stages: list[Stage],
        times: Sequence[Tensor],
        y1: Tensor,
        found: tuple[Tensor, Tensor, Tensor, Tensor],
        inside: bool,
    ) -> None:
        """Fill the rows that lie in a step."""
        method = self.method
        sample, index, theta, exact = found
        if self.recorder.time_grad:  # only the last time moves the end of a step along with it
            exact = exact & (index == self.goals.shape[1] - 1)
            inside = not bool(exact.all())
        step.outputs = Rows(sample, index, theta, exact)
        values = y1[sample]
        if inside:
            y, slope, slot = step.y, stages[-1].k, method.n - 1
            for i in range(method.n, method.total):
                y_i = rk_stage(y, self.k, slope, slot, method.a[i], step.h)
                stages.append(self.recorder.evaluate(times[i - 1], y_i))
                slope, slot = stages[-1].k, i
            self.k[slot].copy_(slope)
            step.extended = method.total > method.n
            read = rk_interpolate(y, self.k, method.p, theta, step.h, sample)
            values = torch.where(exact.view(self._column), values, read)
        self.rows[sample, index] = values

    def _keep(self, step: Step, stages: list[Stage], wild: bool) -> None:
        if not self.job.keep:
            return
        if self.recorder.graphs:
            if self.recorder.audit is not None:
                for stage in stages[1:]:
                    self.recorder.audit(stage)
            # the graph of a step that was not finite for a rejected sample would turn its zero
            # cotangents into NaN
            if not wild:
                step.stages = stages
        self.steps.append(step)

    def _end(self, sample: int) -> tuple[float, float, float, int, int]:
        """Where a sample's solve ended, as ``failure_of_sample`` asks for it."""
        numbers, counts = self.samples[:, sample].tolist(), self.counts[:, sample].tolist()
        t = numbers[control.DIRECTION] * numbers[control.TAU]
        steps = counts[control.ACCEPTED] + counts[control.REJECTED]
        worst = UNKNOWN if bool(self._slopes[sample].isfinite().all()) else NO_SLOPE
        return t, numbers[control.LENGTH], numbers[control.ERROR], steps, worst


def stage_time(
    method: Coefficients, i: int, t: Tensor, h: Tensor, t1: Tensor, dtype: torch.dtype
) -> Tensor:
    """Times of stage i, [B] float64; at the end of a step the number just before it in
    ``dtype``.
    """
    c = method.c[i]
    if c == 1.0:
        return torch.nextafter(t1.to(dtype), t.to(dtype))
    return t if c == 0.0 else t + c * h
