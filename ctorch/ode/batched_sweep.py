"""The exact discrete adjoint of a batched solve, and its steps made again differentiably."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch._autocast import as_written
from ctorch.ode.field import Stage
from ctorch.ode.run import Run
from ctorch.ode.steps import Rows, Step
from ctorch.ode.sweep import Cotangents, Pullback, audit_again
from ctorch.ops._direct import Buffer, Weights
from ctorch.ops.runge_kutta import rk_combine, rk_stage

if TYPE_CHECKING:
    from ctorch.ode.batched import BatchedJob


class BatchedSweep:
    """``sweep.Sweep`` for samples that step on their own: times, lengths and their cotangents are
    [B].

    A sample that did not move in a step has length 0 there; the slope that it brought along goes on
    to the step before. Recomputed steps begin with an evaluation of their own.
    """

    def __init__(self, job: BatchedJob, run: Run) -> None:
        self.job, self.recorded = job, run
        self.problem, self.method = job.problem, job.method
        self.time_grad = job.time_grad

    def run(self, grad_rows: Tensor, wanted: Sequence[bool]) -> Cotangents:
        """Pull the cotangents of the rows [B, T, *shape] back. To be called under ``no_grad``."""
        job, problem = self.job, self.problem
        self.pullback = Pullback(problem.field, job.captured, wanted, self.time_grad)
        self.grad_rows = grad_rows
        y0 = problem.y0
        self.t_bar = torch.zeros_like(job.times)
        self.tau = torch.zeros_like(job.times[:, 0])
        self.kap: Tensor | None = None
        total = self.method.total
        self.v = torch.zeros((total + 1, *y0.shape), dtype=y0.dtype, device=y0.device)
        self._buffer, method = Buffer(self.v, y0.detach()), self.method
        self._back = {
            extended: [Weights(row) for row in rows]
            for extended, rows in ((False, method.back), (True, method.back_extended))
        }
        self.k = torch.empty((total, *y0.shape), dtype=y0.dtype, device=y0.device)
        self.ones = torch.ones(total + 1, dtype=torch.float64)
        self.one = torch.ones((), dtype=torch.float64)
        yb, steps = torch.zeros_like(y0), self.recorded.steps
        with problem.field.recomputing():
            for step, first_time in zip(
                reversed(steps), reversed(first_times(job, steps)), strict=True
            ):
                yb = self._step(step, yb, first_time)
            first = self.recorded.first_stage
            if self.kap is not None and first is not None:
                u, ct = self.pullback(first, self.kap)
                yb = yb if u is None else yb + u
                if ct is not None:
                    self.tau = self.tau + ct.reshape(job.size).double()
        started = ((job.times - job.times[:, :1]).abs() == 0).to(grad_rows.dtype)
        started = started.view(*started.shape, *[1] * (grad_rows.dim() - 2))
        yb = yb + (grad_rows * started).nan_to_num(0.0).sum(1) if bool(started.any()) else yb
        self.recorded.stats.vjps += self.pullback.count
        t_bar = None
        if self.time_grad:
            self.t_bar[:, 0] += self.tau
            t_bar = (self.t_bar if problem.t.dim() == 2 else self.t_bar.sum(0)).to(problem.t.dtype)
        return Cotangents(yb, t_bar, self.pullback.results())

    def _step(self, step: Step, yb: Tensor, first_time: Tensor) -> Tensor:
        method, job, time_grad = self.method, self.job, self.time_grad
        total = method.total if step.extended else method.n
        back = self._back[step.extended]
        fresh = step.stages is None
        stages = step.stages if step.stages is not None else self._recompute(step, first_time)
        moved = step.moved
        assert moved is not None
        hb = tb = torch.zeros_like(self.tau)
        base = direct = None
        if isinstance(step.outputs, Rows):
            yb, base, direct, hb, tb = self._pull_outputs(step, yb, stages, total)
        mask = job.spread(moved)
        kap, self.kap = self.kap, None
        v, h, new, slot = self.v, step.h, yb, 0
        make = self._buffer.stage(h)
        safe = torch.where(h == 0, 1.0, h)
        for j in range(total - 1, -1, -1):
            if base is None:
                kb = make(None, new, slot, back[j])
            else:
                kb = rk_stage(base[j], v, new, slot, back[j].tensor, h)
            if time_grad:
                hb = hb + torch.where(h == 0, 0.0, _dots(kb, stages[j].k) / safe)
            if j == method.n - 1:
                if kap is not None:
                    kb = kb + kap * mask
                elif base is None:
                    new, slot = torch.zeros_like(yb), total - j
                    continue
            if j == 0 and not fresh:
                self.kap = kb
                break
            u, ct = self.pullback(stages[j], kb)
            if ct is not None:
                ct = ct.reshape(job.size).double()
                tb = tb + ct
                hb = hb + method.c[j] * ct
            new, slot = torch.zeros_like(yb) if u is None else u, total - j
        if kap is not None:
            passed_on = kap * ~mask
            self.kap = passed_on if self.kap is None else self.kap + passed_on
        if fresh:
            yb = rk_stage(direct, v, new, slot, self.ones[: total + 1], self.one)
        else:
            yb = rk_combine(direct, v, self.ones[:total], self.one)
        if time_grad:
            # where the step ends on the last time, its length hangs on that time and on its own
            # start
            anchored = moved & step.end
            self.t_bar[:, -1] += torch.where(anchored, self.tau + hb, 0.0)
            self.tau = tb + torch.where(anchored, -hb, self.tau)
        return yb

    def _pull_outputs(
        self, step: Step, yb: Tensor, stages: list[Stage], total: int
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor, Tensor]:
        method, rows = self.method, step.outputs
        hb, tb = torch.zeros_like(self.tau), torch.zeros_like(self.tau)
        g = self.grad_rows[rows.sample, rows.index]
        shape = (-1, *[1] * (g.dim() - 1))
        ends = rows.exact.view(shape)
        yb = yb.index_add(0, rows.sample, torch.where(ends, g, 0.0))
        if bool(rows.exact.all()):
            return yb, None, None, hb, tb
        g = torch.where(ends, torch.zeros_like(g), g)
        weights = (method.weights(rows.theta) * step.h[rows.sample].unsqueeze(1)).to(g.dtype)
        terms = (
            weights.T.reshape(weights.shape[1], *[-1 if i == 0 else 1 for i in range(g.dim())]) * g
        )
        base = g.new_zeros((weights.shape[1], *yb.shape)).index_add_(1, rows.sample, terms)
        direct = torch.zeros_like(yb).index_add_(0, rows.sample, g)
        if self.time_grad:
            slopes = method.slope_weights(rows.theta).to(g.dtype)
            k = torch.stack([stage.k.detach() for stage in stages[:total]])[:, rows.sample]
            flat = k.reshape(*k.shape[:2], -1)
            with as_written(flat):
                moved = torch.einsum("ms,smd,md->m", slopes, flat, g.reshape(len(g), -1)).double()
            self.t_bar.index_put_((rows.sample, rows.index), moved, accumulate=True)
            tb = tb.index_add(0, rows.sample, -moved)
            hb = hb.index_add(0, rows.sample, -rows.theta * moved)
        return yb, base, direct, hb, tb

    def _recompute(self, step: Step, first_time: Tensor) -> list[Stage]:
        from ctorch.ode.batched import stage_time

        method, job, k, h, y = self.method, self.job, self.k, step.h, step.y
        dtype = self.problem.layout.dtype
        stages = [self._evaluate(job.field_time(first_time), y.detach())]
        inner = method.n - 1
        count = method.total if step.extended else method.n
        for i in range(1, count):
            y_i = rk_stage(y, k, stages[-1].k, i - 1, method.a[i], h)
            if i == inner and self.kap is None and not isinstance(step.outputs, Rows):
                stages.append(Stage(stages[0].t, y_i, torch.zeros_like(y_i)))
                continue
            time = stage_time(method, i, step.t, h, step.t1, dtype)
            stages.append(self._evaluate(job.field_time(time), y_i))
        return stages

    def _evaluate(self, t: Tensor, y: Tensor) -> Stage:
        field = self.problem.field
        t = t.clone()
        stage = field.record_with_time(t, y) if self.time_grad else field.record(t, y)
        field.nfe -= 1
        self.recorded.stats.nfe_backward += 1
        audit_again(self.job.captured, field, stage)
        return stage


def first_times(job: BatchedJob, steps: Sequence[Step]) -> list[Tensor]:
    """Times, [B] each, at which the first slopes of steps were evaluated.

    Behind a sample's first step these are its last evaluations of the step before: just before the
    start, which matters where the field jumps there.
    """
    from ctorch.ode.batched import stage_time

    method, dtype = job.method, job.problem.layout.dtype
    last, times = job.times[:, 0], []
    for step in steps:
        assert step.moved is not None
        times.append(last)
        end = stage_time(method, method.n - 1, step.t, step.h, step.t1, dtype)
        last = torch.where(step.moved, end.double(), last)
    return times


def replay_batched(job: BatchedJob, run: Run, y0: Tensor, t: Tensor) -> Tensor:
    """Make recorded steps again in differentiable operations: rows [B, T, *shape]."""
    from ctorch.ode.batched import stage_time

    method, field = job.method, job.problem.field
    layout = job.problem.layout
    times = t.double() if t.dim() == 2 else t.double().expand(job.size, -1)
    rows = run.rows.detach().clone()
    started = job.times == job.times[:, :1]
    y, start = y0, times[:, 0]
    placed: list[tuple[Tensor, Tensor, Tensor]] = []
    a = [row.tolist() for row in method.a]
    for step, first_time in zip(run.steps, first_times(job, run.steps), strict=True):
        assert step.moved is not None
        anchored = step.moved & step.end
        h = torch.where(anchored, times[:, -1] - start, step.h)
        h = torch.where(step.moved, h, 0.0)
        h_y = job.spread(h.to(y.dtype))
        total = method.total if step.extended else method.n
        slopes: list[Tensor] = []
        for i in range(total):
            y_i = y if i == 0 else y + h_y * _weighted(slopes, a[i])
            exact = first_time
            if i:
                exact = stage_time(method, i, step.t, step.h, step.t1, layout.dtype)
            moving = start + method.c[i] * h
            slopes.append(field(job.field_time(moving + (exact - moving).detach()), y_i))
        y1 = y + h_y * _weighted(slopes, method.b.tolist())
        if isinstance(step.outputs, Rows):
            placed.append(_rows(job, step, y, y1, slopes, start, h, times))
        y, start = torch.where(job.spread(step.moved), y1, y), start + h
    mask = started.view(*started.shape, *[1] * (rows.dim() - 2))
    rows = torch.where(mask, y0.unsqueeze(1), rows)
    for sample, index, values in placed:
        rows = rows.index_put((sample, index), values)
    return rows


def _rows(
    job: BatchedJob,
    step: Step,
    y: Tensor,
    y1: Tensor,
    slopes: list[Tensor],
    start: Tensor,
    h: Tensor,
    times: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, method = step.outputs, job.method
    shape = (-1, *[1] * (y.dim() - 1))
    ends = y1[rows.sample]
    if bool(rows.exact.all()):
        return rows.sample, rows.index, ends
    theta = (times[rows.sample, rows.index] - start[rows.sample]) / h[rows.sample]
    weights = method.weights(theta).to(y.dtype)
    values = y[rows.sample]
    for i, k in enumerate(slopes):
        values = values + (weights[:, i] * h[rows.sample].to(y.dtype)).view(shape) * k[rows.sample]
    return rows.sample, rows.index, torch.where(rows.exact.view(shape), ends, values)


def _weighted(slopes: list[Tensor], weights: Sequence[float]) -> Any:
    total: Any = 0.0
    for k, weight in zip(slopes, weights, strict=False):
        if weight:
            total = total + weight * k
    return total


def _dots(x: Tensor, y: Tensor) -> Tensor:
    return (x * y.detach()).reshape(x.shape[0], -1).sum(1).double()
