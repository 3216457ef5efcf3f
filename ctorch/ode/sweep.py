"""The exact discrete adjoint: the derivative of the accepted steps as they were made, from the last
to the first.

One stage at a time its vector-Jacobian product is taken in the stage's own small graph; what lies
between stages is linear in their slopes and is done by the step kernels, with the tableau read
backwards. With cotangents yb of the new state and kb_i of the slopes, u_i = (df/dy)^T kb_i and G
the cotangents of interpolated outputs,

    kb_j = h (b_j yb + sum_(i>j) a_ij u_i + sum_m b_j(theta_m) G_m),    yb <- yb + sum_i u_i + sum_m
    G_m.

The step sequence is frozen; a step's length has a cotangent only where its end hangs on a time of
the user's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Variable

from ctorch._autocast import as_written
from ctorch._exceptions import GradientError
from ctorch.ode.capture import Captured, UnknownTensor, discover
from ctorch.ode.field import Stage, VectorField
from ctorch.ode.linear_layers import Gathered, hooks_so_far
from ctorch.ode.problem import Problem
from ctorch.ode.run import Run
from ctorch.ode.stepper import Stepper
from ctorch.ode.steps import FIXED, FREE, Step, random_state, set_random_state
from ctorch.ops._direct import Buffer, Weights
from ctorch.ops._op import transforms_active
from ctorch.ops.runge_kutta import rk_stage

_run_backward = Variable._execution_engine.run_backward


@dataclasses.dataclass
class Cotangents:
    """Gradients that a sweep returns: of y0, of the user's times (or None) and of the captured
    tensors.
    """

    y0: Tensor
    t: Tensor | None
    captured: list[Tensor | None]


class Pullback:
    """Vector-Jacobian products of single evaluations, gathering the captured tensors' share.

    Args:
        field: what was evaluated.
        captured: the tensors in which to differentiate; only those that ``wanted`` marks.
        time_grad: also return the cotangent of t.
    """

    def __init__(
        self, field: VectorField, captured: Captured, wanted: Sequence[bool], time_grad: bool
    ) -> None:
        self._tensors = captured.tensors
        self._places = tuple(i for i, want in enumerate(wanted) if want)
        self._inputs = tuple(self._tensors[i] for i in self._places)
        self._sums: list[Tensor | None] = [None] * len(self._tensors)
        self._gathered = Gathered(self._sums)
        self._gathers = all(wanted) and not transforms_active()
        self._hooks = field.hooks
        self._time_grad = time_grad
        self.count = 0

    def __call__(self, stage: Stage, cotangent: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """(cotangent of y, cotangent of t) of one evaluation."""
        k, reached = stage.k, stage.reached
        if not k.requires_grad:
            return None, None
        self.count += 1
        if reached is None or not self._gathers or hooks_so_far() != self._hooks:
            edges: tuple[Any, ...] = ()
            places, inputs = self._places, self._inputs
        else:
            edges, places = reached.edges, reached.rest
            inputs = tuple([self._tensors[i] for i in places]) if places else ()
        time_grad = self._time_grad
        own = (stage.y, stage.t) if time_grad else (stage.y,)
        grads = _run_backward(
            (k,),
            (cotangent,),
            True,
            False,
            (*own, *edges, *inputs),
            allow_unreachable=True,
            accumulate_grad=False,
        )
        first = 2 if time_grad else 1
        rest = first + len(edges)
        if edges:
            assert reached is not None
            self._gathered.add(reached, grads[first:rest])
        if places:
            self._add(places, grads[rest:])
        return grads[0], grads[1] if time_grad else None

    def _add(self, places: Sequence[int], grads: Sequence[Tensor | None]) -> None:
        sums, before, more = self._sums, [], []
        for place, grad in zip(places, grads, strict=True):
            if grad is None:
                continue
            total = sums[place]
            if total is None:
                sums[place] = grad.clone()
            else:
                before.append(total)
                more.append(grad)
        if before:
            torch._foreach_add_(before, more)

    def results(self) -> list[Tensor | None]:
        """The sums, at the places of the captured tensors; None where nothing was used or
        wanted.
        """
        self._gathered.finish()
        return self._sums


class Sweep:
    """The reverse sweep over a run of one step size for the whole state.

    Args:
        problem, stepper: what made the run.
        captured: tensors that the field uses.
        run: the run, with its steps.
        time_grad: the user's times require grad.
        initial_rows: how many of the first rows are y0 itself.
    """

    def __init__(
        self,
        problem: Problem,
        stepper: Stepper,
        captured: Captured,
        run: Run,
        time_grad: bool,
        initial_rows: int,
    ) -> None:
        self.problem = problem
        self.stepper = stepper
        self.method = stepper.method
        self.captured = captured
        self.recorded = run
        self.time_grad = time_grad
        self.initial_rows = initial_rows
        self.release = run.release
        self.event_row = run.rows.shape[0] - 1 if run.fired is not None else -1

    def run(
        self,
        grad_rows: Tensor,
        wanted: Sequence[bool],
        grad_pieces: Sequence[Tensor | None] = (),
    ) -> Cotangents:
        """Pull cotangents of the rows [T, *shape], and of the pieces of a continuous solution,
        back.

        To be called under ``no_grad``.
        """
        self._grad_pieces = grad_pieces or (None, None, None, None)
        self.pullback = Pullback(self.problem.field, self.captured, wanted, self.time_grad)
        problem = self.problem
        self.tb = [0.0] * problem.t.numel()
        grad_rows = grad_rows.contiguous()
        steps = list(self.recorded.steps)
        if all(piece is None for piece in grad_pieces):
            while steps and not steps[-1].outputs:  # after a failure: steps that led to no output
                steps.pop()
        yb = torch.zeros_like(problem.y0)
        self.kap: Tensor | None = None  # cotangent of the slope that the next step takes over
        self.tau = 0.0  # cotangent of the end of the step
        self.ones = torch.ones(self.method.total + 1, dtype=torch.float64)
        self.one = torch.ones((), dtype=torch.float64)
        self.v = torch.zeros((self.method.total + 1, *yb.shape), dtype=yb.dtype, device=yb.device)
        #: the step as the kernels take it, which read it when they are called
        self._h = np.zeros(())
        self.h = torch.from_numpy(self._h)
        buffer, method = Buffer(self.v, yb), self.method
        self._make, self._add_up = buffer.stage(self.h), buffer.stage(self.one)
        self._make_again = Buffer(self.stepper.k, yb).stage(self.h)
        self._back = {
            extended: [Weights(row) for row in rows]
            for extended, rows in ((False, method.back), (True, method.back_extended))
        }
        self._each = [Weights(self.ones[: i + 1]) for i in range(method.total + 1)]
        graphs = bool(steps) and steps[0].stages is not None
        random = problem.random and not graphs
        state = random_state(problem.layout.device) if random else None
        self._next_first: Stage | None = None
        with problem.field.recomputing() if not graphs else torch.no_grad():
            for index in range(len(steps) - 1, -1, -1):
                yb = self._step(index, steps[index], yb, grad_rows)
        if state is not None:
            set_random_state(problem.layout.device, state)
        for row in range(self.initial_rows):
            yb = yb + grad_rows[row]
        self.recorded.stats.vjps += self.pullback.count
        t = None
        if self.time_grad:
            t = torch.tensor(self.tb, dtype=problem.t.dtype, device=problem.t.device)
        return Cotangents(yb, t, self.pullback.results())

    # -- one step
    # ----------------------------------------------------------------------------------------------

    def _step(self, index: int, step: Step, yb: Tensor, grad_rows: Tensor) -> Tensor:
        method, time_grad = self.method, self.time_grad
        total = method.total if step.extended else method.n
        back = self._back[step.extended]
        self._h.fill(step.h)
        stages = step.stages if step.stages is not None else self._recompute(index, step)
        if self.release:
            step.stages = None
        for row, theta in step.outputs:
            if theta is None:
                yb = yb + grad_rows[row]
        inner = [(row, theta) for row, theta in step.outputs if theta is not None]
        base = direct = None
        hb = tb = 0.0
        if inner:
            base, direct, hb, tb = self._pull_outputs(step, inner, grad_rows, stages, total)
        extra, direct, hb, tb = self._pull_piece(index, direct, hb, tb)
        v = self.v
        last, kap, self.kap = method.n - 1, self.kap, None
        new, slot = yb, 0
        for j in range(total - 1, -1, -1):
            if base is None:
                kb = self._make(None, new, slot, back[j])
            else:
                kb = rk_stage(base[j], v, new, slot, back[j].tensor, self.h)
            if time_grad and step.h:
                # kb is all that depends on this slope times h, so kb / h is what depends on h
                # through it
                hb += _dot(kb, stages[j].k) / step.h
            if extra is not None:
                kb = kb + extra[j]
            if j == last and method.fsal:
                if kap is not None:
                    kb = kb + kap
                elif base is None and extra is None:  # the slope at the end was used by nothing
                    new, slot = torch.zeros_like(yb), total - j
                    continue
            if j == 0 and not step.fresh:
                self.kap = kb
                break
            u, ct = self.pullback(stages[j], kb)
            if self.release:
                del stages[j + 1 :]  # the memory of their graphs is still in the cache
            if ct is not None:
                value = float(ct)
                tb += value
                hb += method.c[j] * value
            new, slot = torch.zeros_like(yb) if u is None else u, total - j
        # (the last cotangent of a step that is not fresh lies in its slot already)
        each = self._each[total if step.fresh else total - 1]
        if direct is None:
            yb = self._add_up(None, new, slot, each)
        else:
            yb = rk_stage(direct, v, new, slot, each.tensor, self.one)
        if time_grad:
            self._pull_times(step, tb, hb)
        recomputed = step.stages is None and not step.fresh
        self._next_first = stages[0] if recomputed else None
        return yb

    def _pull_outputs(
        self,
        step: Step,
        inner: list[tuple[int, float]],
        grad_rows: Tensor,
        stages: list[Stage],
        total: int,
    ) -> tuple[Tensor, Tensor, float, float]:
        """Cotangents of the slopes and of the state at the start from interpolated rows; and of h
        and t.
        """
        method = self.method
        rows = [row for row, _ in inner]
        thetas = torch.tensor([theta for _, theta in inner], dtype=torch.float64)
        g = (
            grad_rows[rows[0] : rows[-1] + 1]
            if rows[-1] - rows[0] + 1 == len(rows)
            else grad_rows[rows]
        )
        flat = g.reshape(len(rows), -1)
        weights = (method.weights(thetas) * step.h).to(flat)
        with as_written(flat):
            base = (weights.T @ flat).reshape(-1, *g.shape[1:])
        direct = g.sum(0)
        hb = tb = 0.0
        if self.time_grad:
            k = torch.stack([stage.k.detach().reshape(-1) for stage in stages[:total]])
            slopes = method.slope_weights(thetas).to(flat)
            with as_written(k):
                moved = ((slopes @ k) * flat).sum(1).double().tolist()
            for (row, theta), s in zip(inner, moved, strict=True):
                if row != self.event_row and row < len(self.tb):
                    self.tb[row] += s
                tb -= s
                hb -= theta * s
        return base, direct, hb, tb

    def _pull_piece(
        self, index: int, direct: Tensor | None, hb: float, tb: float
    ) -> tuple[Tensor | None, Tensor | None, float, float]:
        """Cotangents that a piece of the continuous solution hands to its step: (of the slopes, of
        y, of h and t).
        """
        starts, lengths, y, k = self._grad_pieces
        if y is not None:
            direct = y[index] if direct is None else direct + y[index]
        if self.time_grad and starts is not None and lengths is not None:
            tb += self.problem.direction * float(starts[index])
            hb += self.problem.direction * float(lengths[index])
        return None if k is None else k[:, index].contiguous(), direct, hb, tb

    def _pull_times(self, step: Step, tb: float, hb: float) -> None:
        """Hand the cotangents of a step's start and length to the times on which they hang."""
        hb += self.tau
        if step.end == FREE:
            tb += self.tau
        elif step.end == FIXED:
            tb -= hb - self.tau
        else:
            self.tb[step.end] += hb
            tb += self.tau - hb
        if step.start >= 0:
            self.tb[step.start] += tb
            self.tau = 0.0
        else:
            self.tau = tb

    # -- recomputing
    # ----------------------------------------------------------------------------------------------

    def _recompute(self, index: int, step: Step) -> list[Stage]:
        """The stages of a step with their graphs, as the forward pass evaluated them."""
        stepper, method, make, y = self.stepper, self.method, self._make_again, step.y
        times = stepper.stage_times(step.t, step.h, step.t1)
        first_time = self.problem.time(self._first_time(index, step))
        stage = self._evaluate(step, 0, first_time, y.detach())
        stages = [stage]
        last = method.n - 1 if method.fsal else method.n
        for i in range(1, last):
            y_i = make(y, stage.k, i - 1, stepper.weights[i - 1])
            stage = self._evaluate(step, i, times[i - 1], y_i)
            stages.append(stage)
        if method.fsal:
            y1 = make(y, stage.k, last - 1, stepper.weights[-1])
            if self._next_first is not None:  # the next step began with this very slope
                stages.append(self._next_first)
            elif self.kap is not None or step.extended or step.outputs or self.problem.dense:
                stages.append(self._evaluate(step, last, times[last - 1], y1))
            else:
                stages.append(Stage(first_time, y1, torch.zeros_like(y1)))
        if step.extended:
            for i in range(method.n, method.total):
                y_i = make(y, stages[-1].k, i - 1, Weights(method.a[i]))
                time = stepper.time(i, step.t, step.h, step.t1)
                stages.append(self._evaluate(step, i, time, y_i))
        return stages

    def _evaluate(self, step: Step, i: int, t: Tensor, y: Tensor) -> Stage:
        field = self.problem.field
        if step.rng is not None:
            set_random_state(self.problem.layout.device, step.rng[i])
        stage = field.record_with_time(t, y) if self.time_grad else field.record(t, y)
        field.nfe -= 1
        self.recorded.stats.nfe_backward += 1
        audit_again(self.captured, field, stage)
        return stage

    def _first_time(self, index: int, step: Step) -> float:
        stepper = self.stepper
        if step.fresh:
            if index and self.method.fsal:
                return stepper.beside(step.t, self.problem.direction * float("inf"))
            return stepper.time_value(0, step.t, step.h, step.t1)
        before = self.recorded.steps[index - 1]
        return stepper.time_value(self.method.n - 1, before.t, before.h, before.t1)


def _dot(x: Tensor, y: Tensor) -> float:
    return float(torch.dot(x.reshape(-1), y.detach().reshape(-1)))


def audit_again(captured: Captured, field: VectorField, stage: Stage) -> None:
    """Look for tensors that a recomputed evaluation uses and the solve does not know.

    Raises:
        GradientError: there are some. Leaves that the field makes for itself are none.
    """
    try:
        captured.audit(stage)
    except UnknownTensor:
        t, y = stage.t.detach().clone(), stage.y.detach().clone()
        _, found = discover(lambda: field.record(t, y), [t, y], ())
        field.nfe -= 1
        known = {id(x) for x in captured.tensors}
        unknown = [x for x in found if id(x) not in known]
        if unknown:
            raise unknown_tensors(unknown, float(t.reshape(-1)[0])) from None


def unknown_tensors(unknown: list[Tensor], t: float) -> GradientError:
    """The error for tensors that are used, but were not seen in the first evaluation."""
    shapes = ", ".join(str(list(x.shape)) for x in unknown)
    return GradientError(
        f"func used tensors that require grad (shapes {shapes}) at t={t:.6g}, which were not seen"
        " in its first evaluation: pass them in args, hold them in a module, or use"
        ' gradient="backprop".'
    )
