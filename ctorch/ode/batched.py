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
from ctorch.ode.batched_sweep import BatchedSweep, replay_batched
from ctorch.ode.capture import Captured
from ctorch.ode.coefficients import Coefficients
from ctorch.ode.control import NEUTRAL, initial_steps
from ctorch.ode.discrete import solve_differentiably, solve_without_gradient
from ctorch.ode.field import Stage
from ctorch.ode.problem import Problem
from ctorch.ode.run import Failure, Run
from ctorch.ode.solution import Stats, Status
from ctorch.ode.stepper import Recorder
from ctorch.ode.steps import Rows, Step
from ctorch.ode.sweep import Cotangents
from ctorch.ops.runge_kutta import rk_combine, rk_error, rk_interpolate, rk_stage

if TYPE_CHECKING:
    from ctorch.ode.solve import Request


def solve(request: Request, bar: Callable[[float], None] | None) -> tuple[Run, Tensor, Problem]:
    """Solve ``request`` with one step size for each sample. Returns the run, its rows and the
    problem.
    """
    _check_built(request)
    problem = request.problem()
    problem.progress = bar
    job = BatchedJob(problem, request.coefficients())
    if not request.differentiates:
        run = solve_without_gradient(job)
        return run, run.rows, problem
    rows, run = solve_differentiably(job, graphs=request.gradient == "backprop")
    return run, rows, problem


def _check_built(request: Request) -> None:
    if request.method not in methods.ADAPTIVE:
        raise NotImplementedError(
            f"batched=True with method {request.method!r} is not built yet: steps of the same"
            " length for all samples"
            " need no batched=True; adaptive methods are " + ", ".join(methods.ADAPTIVE) + "."
        )
    if request.adjoint:
        raise NotImplementedError(
            'batched=True with gradient="adjoint" is not built yet: use "checkpoint",'
            " which is exact."
        )
    missing = [name for name in ("step_t", "jump_t") if request.options.get(name) is not None]
    missing += ["events"] * bool(request.events) + ["dense"] * bool(request.dense)
    if missing:
        raise NotImplementedError(f"batched=True with {missing[0]} is not built yet.")
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            "batched=True under a torch.func transform is not built yet: use batched=False, or"
            " plain autograd."
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
        self.captured = Captured(())
        shape = problem.y0.shape
        self.size = shape[0]
        t = problem.t.detach().double()
        self.times = (t if t.dim() == 2 else t.expand(self.size, -1)).contiguous()
        if self.times.shape[0] != self.size:
            raise ValueError(
                f"t has {self.times.shape[0]} rows for a batch of {self.size}: give [T] or [B, T]"
                " with the B of y0."
            )

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
        audit = self.captured.audit if self.graphs else None
        recorder = Recorder(self.problem, self.graphs, self.time_grad, audit)
        if first is None:
            first = recorder.evaluate(self.initial_time(), self.problem.y0.detach())
        if self.keep and not self.graphs and self.problem.random:
            raise NotImplementedError(
                'a vector field that draws random numbers needs gradient="backprop" with'
                " batched=True."
            )
        self.loop = BatchedLoop(self, recorder)
        return self.loop.run(first)

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
    """The adaptive loop over a batch. All of time is [B] float64, in tau = direction * t, which
    increases.
    """

    def __init__(self, job: BatchedJob, recorder: Recorder) -> None:
        self.job = job
        self.problem = problem = job.problem
        self.recorder = recorder
        self.method = method = job.method
        y0 = problem.y0
        device = y0.device
        span = job.times[:, -1] - job.times[:, 0]
        self.direction = torch.where(span < 0, -1.0, 1.0).to(torch.float64)
        self.goals = job.times * self.direction.unsqueeze(1)
        self.k = torch.empty((method.total, *y0.shape), dtype=y0.dtype, device=device)
        inner = method.n - 1
        self._inner, self._last = method.a[1:inner], method.a[inner]
        self.accepted = torch.zeros(job.size, dtype=torch.int64, device=device)
        self.rejected = torch.zeros_like(self.accepted)
        self.status = torch.zeros_like(self.accepted)
        self.where: dict[str, Tensor] = {}
        self.steps: list[Step] = []

    def run(self, first: Stage) -> Run:
        """Integrate from the first evaluation."""
        problem, job = self.problem, self.job
        before = problem.field.nfe
        count = self.goals.shape[1]
        y = problem.y0.detach()
        self.rows = torch.full(
            (job.size, count, *y.shape[1:]), math.nan, dtype=y.dtype, device=y.device
        )
        started = self.goals <= self.goals[:, :1]
        self.rows[started] = y.repeat_interleave(started.sum(1), 0)
        y = self._integrate(y, first, started.sum(1))
        finite = torch.isfinite(y.reshape(job.size, -1)).all(1)
        self.status = torch.where((self.status == 0) & ~finite, int(Status.NONFINITE), self.status)
        stats = Stats(problem.field.nfe - before + 1, self.accepted, self.rejected)
        run = Run(self.rows, self.steps, y, stats, self.status)
        run.failure = self._failure()
        run.first_stage = first if self.recorder.graphs else None
        return run

    def _integrate(self, y: Tensor, first: Stage, row: Tensor) -> Tensor:
        problem, job, method = self.problem, self.job, self.method
        goals, direction = self.goals, self.direction
        order = method.tableau.error_order
        tau, end = goals[:, 0].contiguous(), goals[:, -1].contiguous()
        active = tau < end
        h = self._first_steps(y, first, end - tau)
        ones = torch.full_like(tau, NEUTRAL)
        history = (ones, ones)
        error = torch.full_like(tau, math.nan)
        k0 = first.k
        busy = bool(active.any())
        while busy:
            length = h.clamp(problem.min_step, problem.max_step)
            lands = tau + 1.001 * length >= end
            length = torch.where(lands, end - tau, length) * active
            tau1 = torch.where(lands, end, tau + length)
            tau1 = torch.where(active, tau1, tau)
            t, t1, signed = direction * tau, direction * tau1, direction * length
            y1, stages = self._attempt(y, k0, t, signed, t1)
            error = self._error(y, y1, stages, signed)
            passed = (error <= 1.0) | ((length <= problem.min_step) & torch.isfinite(error))
            moved = active & passed
            factor = problem.controller.factors(error, order, history)
            row1 = torch.searchsorted(goals, tau1.unsqueeze(1), right=True).squeeze(1)
            row1 = torch.where(moved, row1, row)
            self.accepted += moved
            self.rejected += active & ~passed
            grown = torch.where(lands, torch.maximum(length * factor, h), length * factor)
            h = torch.where(moved, grown, length * factor.clamp_max(1.0))
            stuck = active & ~moved & ~(tau + h.clamp(min=problem.min_step) > tau)
            spent = active & (self.accepted + self.rejected >= problem.max_steps)
            done = moved & lands
            # the one place where the host waits
            any_moved, any_rows, any_stuck, any_wild = torch.stack(
                [
                    moved.any(),
                    (row1 > row).any(),
                    (stuck | (spent & ~done)).any(),
                    (active & ~moved & ~torch.isfinite(error)).any(),
                ]
            ).tolist()
            if any_moved:
                if method.late:
                    stages.append(
                        self.recorder.evaluate(self._stage_time(method.n - 1, t, signed, t1), y1)
                    )
                step = Step(
                    t, signed * moved, torch.where(moved, t1, t), y.detach(), end=lands, moved=moved
                )
                if any_rows:
                    self._read(step, stages, tau, tau1, row, row1, y1)
                self._keep(step, stages, any_wild)
                mask = job.spread(moved)
                k_last = stages[method.n - 1].k
                y = torch.where(mask, y1, y)
                k0 = torch.where(mask, k_last, k0)
                tau = torch.where(moved, tau1, tau)
                row = row1
                past = torch.where(moved, error.clamp_min(1e-10), history[0])
                history = (past, torch.where(moved, history[0], history[1]))
                active = active & ~done
            if any_stuck:
                active = self._stop(active, stuck, spent & ~done, direction * tau, h, error)
            busy = bool(active.any())
            if problem.progress is not None:
                problem.progress(float((direction * tau)[tau.argmin()]))
        return y

    # -- one step
    # ----------------------------------------------------------------------------------------------

    def _stage_time(self, i: int, t: Tensor, h: Tensor, t1: Tensor) -> Tensor:
        return self.job.field_time(stage_time(self.method, i, t, h, t1, self.problem.layout.dtype))

    def _attempt(
        self, y: Tensor, k0: Tensor, t: Tensor, h: Tensor, t1: Tensor
    ) -> tuple[Tensor, list[Stage]]:
        k, evaluate = self.k, self.recorder.evaluate
        stages = [Stage(t, y, k0)]
        slope, slot = k0, 0
        for a in self._inner:
            y_i = rk_stage(y, k, slope, slot, a, h)
            slot += 1
            stages.append(evaluate(self._stage_time(slot, t, h, t1), y_i))
            slope = stages[-1].k
        y1 = rk_stage(y, k, slope, slot, self._last, h)
        if not self.method.late:
            stages.append(evaluate(self._stage_time(slot + 1, t, h, t1), y1))
        return y1, stages

    def _error(self, y: Tensor, y1: Tensor, stages: list[Stage], h: Tensor) -> Tensor:
        method, problem = self.method, self.problem
        slope = None if method.late else stages[-1].k
        if problem.norm is None and not problem.layout.is_complex:
            tol = problem.tolerances
            return rk_error(
                y, y1, self.k, slope, method.n - 1, method.e, h, tol.rtol, tol.atol,
                problem.layout.segments, problem.max_norm, True,
            ).double()  # fmt: skip
        if slope is not None:
            self.k[method.n - 1].copy_(slope)
        return self._norm(rk_combine(None, self.k, method.e, h), problem.error_scale(y, y1))

    def _norm(self, error: Tensor, scale: Tensor) -> Tensor:
        """Scaled norm of every sample: [B] float64."""
        problem = self.problem
        ratio = problem.layout.unpack(error / scale)
        if problem.norm is not None:
            norms = torch.as_tensor(problem.norm(ratio))
            if norms.shape != (self.job.size,):
                raise ValueError(
                    "with batched=True options['norm'] must return one norm for each sample, "
                    f"[{self.job.size}], but returned shape {list(norms.shape)}."
                )
            return norms.abs().double()
        leaves = torch.utils._pytree.tree_leaves(ratio)
        parts = []
        for leaf in leaves:
            flat = leaf.abs().reshape(self.job.size, -1)
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
        tau: Tensor,
        tau1: Tensor,
        row: Tensor,
        row1: Tensor,
        y1: Tensor,
    ) -> None:
        method = self.method
        places = torch.arange(self.goals.shape[1], device=row.device)
        inside = (places >= row.unsqueeze(1)) & (places < row1.unsqueeze(1))
        sample, index = inside.nonzero(as_tuple=True)
        goal = self.goals[sample, index]
        theta = ((goal - tau[sample]) / (tau1 - tau)[sample]).clamp_max(1.0)
        last = index == self.goals.shape[1] - 1
        at_end = goal == tau1[sample]
        exact = at_end & (last | (not self.recorder.time_grad))
        step.outputs = Rows(sample, index, theta, exact)
        signed, t, t1 = step.h, step.t, step.t1
        slope, slot = stages[-1].k, method.n - 1
        y = step.y
        if not bool(exact.all()):
            for i in range(method.n, method.total):
                y_i = rk_stage(y, self.k, slope, slot, method.a[i], signed)
                stages.append(self.recorder.evaluate(self._stage_time(i, t, signed, t1), y_i))
                slope, slot = stages[-1].k, i
            self.k[slot].copy_(slope)
            step.extended = method.total > method.n
            values = rk_interpolate(y, self.k, method.p, theta, signed, sample)
            values = torch.where(exact.view(-1, *[1] * (y.dim() - 1)), y1[sample], values)
        else:
            values = y1[sample]
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

    def _stop(
        self, active: Tensor, stuck: Tensor, spent: Tensor, t: Tensor, h: Tensor, error: Tensor
    ) -> Tensor:
        """Take failed samples out."""
        cause = torch.where(
            torch.isfinite(error), int(Status.STEP_UNDERFLOW), int(Status.NONFINITE)
        )
        self.status = torch.where(stuck, cause, self.status)
        self.status = torch.where(spent & ~stuck, int(Status.MAX_STEPS), self.status)
        self.where = {"t": t, "h": h, "error": error}
        return active & ~stuck & ~spent

    def _failure(self) -> Failure | None:
        failed = (self.status != 0).nonzero().reshape(-1).tolist()
        if not failed:
            return None
        sample = failed[0]
        status = Status(int(self.status[sample]))
        t, h, error = (
            (float(self.where[name][sample]) for name in ("t", "h", "error"))
            if self.where
            else (math.nan, math.nan, math.nan)
        )
        causes = {
            Status.MAX_STEPS: "max_steps was reached: loosen the tolerances or raise max_steps",
            Status.STEP_UNDERFLOW: "underflow in dt: the error test asks for a step below the"
            " resolution of time (a jump of the field, too tight tolerances for the dtype, a"
            " blow-up, or a stiff problem)",
            Status.NONFINITE: "the vector field or the state is not finite (underflow in dt):"
            " evaluate func there",
        }
        others = f" {len(failed)} of {self.job.size} samples failed." if len(failed) > 1 else ""
        return Failure(
            status,
            f"sample {sample}: {causes[status]}; t={t:.9g}, step h={h:.3e}, error norm"
            f" {error:.3g}.{others} With"
            " throw=False the other samples' solutions are returned, with a status for each.",
            t,
            h,
            error,
        )


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
