"""Attempting one explicit Runge-Kutta step through the fused kernels, without a graph of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctorch.ode.coefficients import Coefficients
from ctorch.ode.field import Keeper, Stage, VectorField
from ctorch.ode.problem import Problem
from ctorch.ode.run import Piece
from ctorch.ode.steps import FREE
from ctorch.ops._direct import Buffer, StepFunction, Weights, stage_times
from ctorch.ops.runge_kutta import rk_combine, rk_error, rk_interpolate

#: evaluates a stage at (t, y), with its graph where that is kept
Evaluate = Callable[[Tensor, Tensor], Stage]


class Stepper:
    """One method on one problem. Holds the buffer of slopes; to be used under ``no_grad``.

    Args:
        problem: the problem.
        coefficients: the method.
        adaptive: stages at the end of a step see the time just before it, in case the field jumps
            there (torchdiffeq does the same); a fixed-step solve does so only with the option
            ``perturb``.
        time_leaves: stage times become leaves of graphs, so that each is a tensor of its own.
        values_only: no stage needs its graph.
    """

    def __init__(
        self,
        problem: Problem,
        coefficients: Coefficients,
        adaptive: bool,
        time_leaves: bool = False,
        values_only: bool = False,
    ) -> None:
        self.problem = problem
        self.method = coefficients
        #: of the slopes: at the stages after the first, and of the new state
        self.weights = weights = coefficients.states
        self._inner, self._last = weights[:-1], weights[-1]
        self._abscissae = coefficients.c[1 : coefficients.n]
        self._time_type = np.float64 if problem.layout.dtype is torch.float64 else np.float32
        plain = problem.layout.plain and not problem.random
        # (inference tensors have no version by which a change in place could be noticed)
        self._values_only = values_only and plain and not torch.is_inference_mode_enabled()
        self.times: Sequence[Tensor] = ()
        self.before_end = adaptive or problem.perturb
        dtype = problem.layout.dtype
        self._times_apart = time_leaves or problem.layout.device.type != "cpu"
        self._times_by_address = None
        if not self._times_apart:
            self._times_by_address = stage_times(coefficients.later, dtype, self.before_end)
        shape = problem.y0.shape
        self.k = torch.empty(
            (coefficients.total, *shape), dtype=dtype, device=problem.layout.device
        )
        #: the step as the kernels take it, which read it when they are called
        self._h = np.zeros(())
        self.h = torch.from_numpy(self._h)
        self._buffer = buffer = Buffer(self.k, problem.y0.detach())
        self._make = buffer.stage(self.h)
        ends_with_slope = coefficients.fsal and not coefficients.late
        self._made = len(weights) if ends_with_slope else len(weights) - 1
        self._step = buffer.step(self.h, weights, self._made)
        self._plain_norm = problem.norm is None and not problem.layout.is_complex
        self._float32 = problem.time_dtype is not torch.float64
        if coefficients.e is not None:
            tolerances = problem.tolerances.rtol, problem.tolerances.atol
            segments, max_norm = problem.layout.segments, problem.max_norm
            error, slot = Weights(coefficients.e), coefficients.n - 1
            self._error = buffer.error(self.h, error, slot, tolerances, segments, max_norm)

    # -- times
    # ----------------------------------------------------------------------------------------------

    def time(self, i: int, t: float, h: float, t1: float) -> Tensor:
        """Time of stage i, as the vector field takes it."""
        return self.problem.time(self.time_value(i, t, h, t1))

    def first_time(self, value: float, start: int) -> Tensor:
        """Time of a first stage that is evaluated anew, at the user's time ``start`` or where the
        last step ended.
        """
        return self.problem.time(value)

    def time_value(self, i: int, t: float, h: float, t1: float) -> float:
        """Time of stage i as a number, inside the step."""
        c = self.method.c[i]
        if c == 1.0:
            return self.beside(t1, t) if self.before_end else t1
        if c == 0.0:
            return self.beside(t, t1) if self.problem.perturb else t
        return t + c * h

    def stage_times(self, t: float, h: float, t1: float) -> Sequence[Tensor]:
        """Times of the stages after the first, as the vector field takes them."""
        if self._times_by_address is not None:
            return self._times_by_address(t, h, t1)
        if self._times_apart:
            return [self.time(i, t, h, t1) for i in range(1, self.method.n)]
        end = self.beside(t1, t) if self.before_end else t1
        values = [end if c == 1.0 else t + c * h for c in self._abscissae]
        return torch.from_numpy(np.array(values, dtype=self._time_type)).unbind()

    def beside(self, t: float, toward: float) -> float:
        """The number next to ``t``, in the precision of the state."""
        far = math.inf if toward > t else -math.inf
        if self._float32:
            dtype = np.float32
            return float(np.nextafter(dtype(t), dtype(far)))
        return math.nextafter(t, far)

    # -- one step
    # ----------------------------------------------------------------------------------------------

    def attempt(
        self,
        y: Tensor,
        first: Stage,
        t: float,
        h: float,
        t1: float,
        evaluate: Evaluate,
        start: int = FREE,
        end: int = FREE,
    ) -> tuple[Tensor, list[Stage]]:
        """All stages of a step from y. Returns the new state and the stages (without a late last
        one).

        ``start`` and ``end`` say on which of the user's times the step hangs, for steppers that
        follow derivatives.
        """
        self._h.fill(h)
        self.times = times = self.stage_times(t, h, t1)
        if self._values_only:
            return bare_step(self.problem.field, self._step, y, first, times, self._made)
        method, make = self.method, self._make
        stages, slope, slot = [first], first.k, 0
        for a, time in zip(self._inner, times, strict=False):
            stage = evaluate(time, make(y, slope, slot, a))
            slope = stage.k
            slot += 1
            stages.append(stage)
        y1 = make(y, slope, slot, self._last)
        if method.fsal and not method.late:
            stages.append(evaluate(times[-1], y1))
        return y1, stages

    def error(self, y: Tensor, y1: Tensor, stages: list[Stage]) -> float:
        """Scaled norm of the error estimate of the attempted step: the one number that the host
        waits for.
        """
        method, problem = self.method, self.problem
        slope = None if method.late else stages[-1].k
        if self._plain_norm:
            return float(self._error(y, y1, slope))
        if slope is not None:
            self.k[method.n - 1].copy_(slope)
        estimate = rk_combine(None, self.k, method.e, self.h)
        return float(problem.error_norm(estimate, problem.error_scale(y, y1)).item())

    def state_norm(self, y: Tensor) -> Callable[[Tensor], float]:
        """Scaled norm of a state-shaped tensor, with the scale of the state ``y``; for use before
        the first step.
        """
        problem = self.problem
        if not self._plain_norm:
            scale = problem.error_scale(y, torch.zeros_like(y))
            return lambda x: float(problem.error_norm(x, scale).item())
        tol, one = problem.tolerances, torch.ones(1, dtype=torch.float64)
        segments, max_norm = problem.layout.segments, problem.max_norm
        if self._buffer.by_address:
            tolerances = tol.rtol, tol.atol
            error = self._buffer.error(one[0], Weights(one), 0, tolerances, segments, max_norm)
            return lambda x: error(y, y, x.detach())

        def norm(x: Tensor) -> float:
            k = x.detach().unsqueeze(0).contiguous()
            args = (y, y, k, None, 0, one, one[0], tol.rtol, tol.atol, segments, max_norm, False)
            return float(rk_error(*args).item())

        return norm

    def error_vector(self, y: Tensor, y1: Tensor) -> Tensor:
        """The scaled error of every element of the last attempt, for messages."""
        assert self.method.e is not None
        estimate = rk_combine(None, self.k, self.method.e, self.h)
        return estimate / self.problem.error_scale(y, y1)

    def finish(self, y1: Tensor, stages: list[Stage], evaluate: Evaluate) -> None:
        """Evaluate the slope at the end of an accepted step, where that was put off."""
        if self.method.late:
            stages.append(evaluate(self.times[-1], y1))

    # -- the interpolant
    # ------------------------------------------------------------------------------------------

    def extend(
        self, y: Tensor, stages: list[Stage], t: float, h: float, t1: float, evaluate: Evaluate
    ) -> bool:
        """Evaluate the interpolant's further stages, if it has any; says whether it did.

        The slopes of the step itself must be in the buffer, but for the last.
        """
        method, k = self.method, self.k
        slope, slot = stages[-1].k, method.n - 1
        if method.n == method.total:
            k[slot].copy_(slope)
            return False
        for i in range(method.n, method.total):
            y_i = self._make(y, slope, slot, Weights(method.a[i]))
            stage = evaluate(self.time(i, t, h, t1), y_i)
            slope, slot = stage.k, i
            stages.append(stage)
        k[slot].copy_(slope)
        return True

    def interpolate(self, y: Tensor, found: list[tuple[int, float]]) -> Tensor:
        """The interpolant of the step just made, at (row, theta): [M, *shape]."""
        theta = torch.tensor([theta for _, theta in found], dtype=torch.float64)
        return rk_interpolate(y, self.k, self.method.p, theta, self.h, None)

    def piece(self, tau: float, length: float, y: Tensor) -> Piece:
        """The step just made, as a piece of the continuous solution; ``extend`` must have been
        called.
        """
        start, span = (torch.tensor(x, dtype=torch.float64) for x in (tau, length))
        return Piece(start, span, y.detach(), self.k.clone())


def bare_step(
    field: VectorField,
    step: StepFunction,
    y: Tensor,
    first: Stage,
    times: Sequence[Tensor],
    evaluations: int,
) -> tuple[Tensor, list[Stage]]:
    """The new state and the stages of a step on a plain state without graphs, of whose stages none
    but the first and the last is of use.
    """
    y1, last, slope = step(field.call, field.amended, y, first.k, times)
    field.nfe += evaluations
    stages = [first] * evaluations
    stages.append(Stage(times[evaluations - 1], last, slope) if evaluations else first)
    return y1, stages


class Recorder:
    """How stages are evaluated: without a graph, or each with a graph of its own.

    Attributes:
        evaluate: evaluates the field at (t, y).
        graphs: the graphs of the stages are kept.
        time_grad: stage times are leaves of these graphs.
        audit: looks at every accepted stage's graph.
        watch: wraps ``evaluate``, to look at every tensor that it uses.
    """

    evaluate: Evaluate

    def __init__(
        self,
        problem: Problem,
        graphs: bool,
        time_grad: bool,
        audit: Any = None,
        watch: Callable[[Evaluate], Evaluate] | None = None,
    ) -> None:
        self.graphs = graphs
        self.time_grad = time_grad
        self.audit = audit
        field = problem.field
        if not graphs:
            self.evaluate = field.value
        else:
            self.evaluate = field.record_with_time if time_grad else field.record
        if watch is not None:
            self.evaluate = watch(self.evaluate)

    def leaf(self, y: Tensor) -> Tensor:
        """The same state as another tensor, which may be the leaf of another graph."""
        return y.detach()

    def keeper(self, first: Stage) -> Keeper | None:
        """What keeps slopes from a field that may write over them: none, where autograd does."""
        return None if self.graphs else Keeper(first.k)
