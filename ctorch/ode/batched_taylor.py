"""``method="taylor", batched=True``: every sample takes the steps of its own Taylor polynomial.

All samples share the sweeps that give the coefficients; the length of a step, its test and its end
are each sample's own. One that is done takes steps of length zero meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.ode.batched import check_built
from ctorch.ode.problem import Problem
from ctorch.ode.run import UNKNOWN, Run, failure_of_sample
from ctorch.ode.solution import Stats, Status
from ctorch.ode.taylor import choose_order, coefficients
from ctorch.ode.transforms import follows

if TYPE_CHECKING:
    from ctorch.ode.solve import Request


def solve(request: Request, bar: Callable[[float], None] | None) -> tuple[Run, Tensor, Problem]:
    """Solve by Taylor's method. Returns the run, its rows with their graph, and the problem."""
    check_built(request)
    for name in ("step_size", "grid_constructor"):
        if request.options.get(name) is not None:
            raise NotImplementedError(
                f"batched=True with options[{name!r}] is not built: steps of the same length for"
                " all samples need no batched=True."
            )
    problem = request.problem()
    problem.progress = bar
    kept = str(request.gradient) if request.differentiates else "none"
    with torch.set_grad_enabled(kept != "none"):
        run = BatchedTaylorLoop(problem, request.options.get("order"), kept).run()
    return run, run.rows, problem


class Choice(NamedTuple):
    """A step as it was decided on.

    Attributes:
        length: [B] float64, in tau; 0 where a sample does not move.
        lands: [B], ends on the last time.
        sample, row: [M], outputs that lie in the step.
    """

    length: Tensor
    lands: Tensor
    sample: Tensor
    row: Tensor


class BatchedTaylorLoop:
    """One solve. Times of samples are tau = direction * t, float64, and increase.

    Args:
        problem: what to solve.
        order: as the user gave it, or None.
        kept: "none", "backprop" (the graphs of all steps) or "checkpoint" (each is made again).
    """

    def __init__(self, problem: Problem, order: Any, kept: str) -> None:
        self.problem, self.kept = problem, kept
        self.order = choose_order(problem, order, False)
        self.size = size = problem.y0.shape[0]
        t = problem.t.double()
        self.t = t if t.dim() == 2 else t.expand(size, -1)
        if self.t.shape[0] != size:
            raise ValueError(
                f"t has {self.t.shape[0]} rows for a batch of {size}: give [T] or [B, T] with the B"
                " of y0."
            )
        times = self.t.detach()
        self.direction = torch.where(times[:, -1] < times[:, 0], -1.0, 1.0).to(times)
        self.goals = times * self.direction.unsqueeze(1)
        self.end = self.goals[:, -1]
        self.follows = kept != "none" and follows(problem.t)

    def run(self) -> Run:
        """Make the steps."""
        problem, device = self.problem, self.problem.y0.device
        y = problem.y0 if self.kept != "none" else problem.y0.detach()
        self.tau = self.goals[:, 0].clone()
        self.moving = self.t[:, 0] if self.follows else self.t[:, 0].detach()
        self.longest = problem.first_step or math.inf
        self.status = torch.zeros(self.size, dtype=torch.int64, device=device)
        self.accepted, self.rejected = torch.zeros_like(self.status), torch.zeros_like(self.status)
        self.error, self.length = torch.zeros_like(self.tau), torch.zeros_like(self.tau)
        self.stats = Stats()
        started = self.goals <= self.goals[:, :1]
        sample, row = started.nonzero().unbind(1)
        self.found = [(sample, row, y[sample])]
        self.running = (self.tau < self.end) & (self.status == 0)
        while bool(self.running.any()):
            y = self._step(y)
            self.longest = math.inf
            self.running = (self.tau < self.end) & (self.status == 0)
            if problem.progress is not None:
                problem.progress(float((self.direction * self.tau)[self.tau.argmin()]))
        finite = torch.isfinite(y.detach().reshape(self.size, y.shape[1:].numel())).all(1)
        self.status[(self.status == 0) & ~finite] = int(Status.NONFINITE)
        samples, rows, values = (torch.cat(part) for part in zip(*self.found, strict=True))
        empty = torch.full(
            (self.size, self.goals.shape[1], *y.shape[1:]), math.nan, dtype=y.dtype, device=device
        )
        self.stats.accepted, self.stats.rejected = self.accepted, self.rejected
        out = empty.index_put((samples, rows), values)
        failure = failure_of_sample(self.problem, self.status, self._end)
        return Run(out, [], y, self.stats, self.status, failure)

    def _step(self, y: Tensor) -> Tensor:
        """Make a step of every sample and read off it what lies in it; the states at its end."""
        chosen: list[Choice] = []

        def make(y: Tensor, moving: Tensor) -> tuple[Tensor, Tensor]:
            c = coefficients(self.problem, self._field_time(start + _change(moving)), y, self.order)
            if chosen:  # made again, in the backward pass
                self.stats.nfe_backward += self.order
            else:
                self.stats.nfe += self.order
                with torch.no_grad():
                    chosen.append(self._choose(c.detach()))
            step = chosen[0]
            moved = step.length > 0
            # (what is not finite stays behind: zero cotangents would turn into NaN)
            ahead = evaluate(c[:, moved], self._length(moving, step)[moved])
            y1 = y.index_put((moved.nonzero().squeeze(1),), ahead)
            later = self.t[step.sample, step.row]
            s = later.detach() - start[step.sample]
            s = s + _change(later) - _change(moving[step.sample])
            return y1, evaluate(c[:, step.sample], s)

        start = self.direction * self.tau
        if self.kept == "checkpoint":
            from torch.utils.checkpoint import checkpoint

            y1, values = checkpoint(make, y, self.moving, use_reentrant=False)
        else:
            y1, values = make(y, self.moving)
        step = chosen[0]
        self.found.append((step.sample, step.row, values))
        self.moving = self.moving + self._length(self.moving, step)
        self.tau = torch.where(step.lands, self.end, self.tau + step.length)
        return y1

    def _field_time(self, t: Tensor) -> Tensor:
        """[B] float64 -> as the vector field takes it: [B, 1, ..., 1] in the dtype of the state."""
        dims = self.problem.y0.dim() - self.problem.layout.is_complex - 1
        return t.to(self.problem.layout.dtype).view(-1, *[1] * dims)

    def _length(self, moving: Tensor, step: Choice) -> Tensor:
        """Signed lengths [B] of a step; one that lands hangs on where it starts and ends."""
        change = _change(self.t[:, -1]) - _change(moving)
        return self.direction * step.length + torch.where(step.lands, change, 0.0)

    # -- decisions

    def _choose(self, c: Tensor) -> Choice:
        """The longest steps that the coefficients allow and the field at their ends confirms."""
        problem, tau = self.problem, self.tau
        length = self._radius(c)
        self._fail(self.running & length.isnan(), Status.NONFINITE)
        length = length.clamp(max=min(self.longest, problem.max_step)).clamp(min=problem.min_step)
        open_ = self.running.clone()
        taken, lands = torch.zeros_like(length), torch.zeros_like(self.running)
        while True:
            open_ &= self.status == 0
            self.length = torch.where(open_, length, self.length)
            self._fail(
                open_ & (self.accepted + self.rejected >= problem.max_steps), Status.MAX_STEPS
            )
            forced = length <= problem.min_step
            landing = tau + 1.001 * length >= self.end
            tau1 = torch.where(landing, self.end, tau + length)
            length = tau1 - tau
            stuck = ~((length > 4e-16 * tau.abs()) & (tau1 > tau) & length.isfinite())
            self._fail(open_ & stuck & ~self.error.isfinite(), Status.NONFINITE)
            self._fail(open_ & stuck, Status.STEP_UNDERFLOW)
            open_ &= self.status == 0
            if not bool(open_.any()):
                break
            error = self._defect(c, torch.where(open_, length, taken))
            self.error = torch.where(open_, error, self.error)
            passes = open_ & ((error <= 1.0) | (forced & error.isfinite()))
            taken, lands = torch.where(passes, length, taken), torch.where(passes, landing, lands)
            open_ &= ~passes
            self.accepted += passes
            self.rejected += open_
            factor = 0.9 * error ** (-1.0 / (self.order + 1))
            factor = torch.where(error.isfinite(), factor, 0.1).clamp(0.1, 0.9)
            length = torch.where(open_, (length * factor).clamp(min=problem.min_step), length)
        tau1 = torch.where(lands, self.end, tau + taken)
        inside = (self.goals > tau[:, None]) & (self.goals <= tau1[:, None])
        return Choice(taken, lands, *inside.nonzero().unbind(1))

    def _radius(self, c: Tensor) -> Tensor:
        """As ``TaylorLoop._radius``, for each sample: [B] float64."""
        p = self.order
        scale = self.problem.error_scale(c[0], c[0])
        lengths = [self._norm(c[j], scale) ** (-1.0 / j) for j in (p - 1, p)]
        finite = c[1].isfinite().reshape(self.size, c[1, 0].numel()).all(1)
        least = torch.minimum(*lengths) * math.exp(-0.7 / max(p - 1, 1))  # NaN if either is
        return torch.where(finite, least, math.nan)

    def _defect(self, c: Tensor, length: Tensor) -> Tensor:
        """As ``TaylorLoop._defect``, for each sample: [B] float64."""
        problem, p = self.problem, self.order
        h = self.direction * length
        y1 = torch.where(_column(length > 0, c[0]), evaluate(c, h), c[0])
        j = torch.arange(p, dtype=torch.float64, device=h.device).unsqueeze(1)
        terms = c[1:] * _column(h**j * (j + 1), c[0])
        self.stats.nfe += 1
        start, t1 = (self._field_time(self.direction * x) for x in (self.tau, self.tau + length))
        slope = problem.field(torch.nextafter(t1, start), y1)
        h = _column(h, c[0])
        error = (slope - terms.flip(0).sum(0)) * (h / (p + 1))
        rounding = 4 * torch.finfo(c.dtype).eps * (h.abs() * slope.abs() + y1.abs())
        return self._norm(error, problem.error_scale(c[0], y1) + rounding)

    def _norm(self, error: Tensor, scale: Tensor) -> Tensor:
        """Scaled norm of every sample: [B] float64."""
        problem = self.problem
        ratio = problem.layout.unpack(error / scale)
        if problem.norm is not None:
            return problem.users_norms(ratio, self.size)
        parts = [torch.zeros_like(self.tau)]
        for leaf in pytree.tree_leaves(ratio):
            if leaf.numel():
                flat = leaf.abs().reshape(self.size, leaf.shape[1:].numel())
                norm = flat.amax(1) if problem.max_norm else flat.square().mean(1).sqrt()
                parts.append(norm.double())
        return torch.stack(parts).amax(0)

    def _fail(self, which: Tensor, status: Status) -> None:
        self.status[which & (self.status == 0)] = int(status)

    def _end(self, sample: int) -> tuple[float, float, float, int, int]:
        """Where a sample's solve ended, as ``failure_of_sample`` asks for it."""
        t, h = float((self.direction * self.tau)[sample]), float(self.length[sample])
        steps, error = int(self.accepted[sample] + self.rejected[sample]), float(self.error[sample])
        if int(self.status[sample]) == Status.NONFINITE or not steps:
            error = math.nan
        return t, 0.0 if math.isnan(h) else h, error, steps, UNKNOWN


def evaluate(c: Tensor, s: Tensor) -> Tensor:
    """Polynomials at one distance each: [p + 1, N, *shape], [N] (float64) -> [N, *shape].

    The terms behind the first are added up by themselves, so that rounding is that of the sum.
    """
    j = torch.arange(1, c.shape[0], dtype=torch.float64, device=s.device).unsqueeze(1)
    return c[0] + (c[1:] * _column(s**j, c[0])).sum(0)


def _column(x: Tensor, like: Tensor) -> Tensor:
    """[.., N] -> [.., N, 1, ..., 1], to broadcast against [N, *shape]."""
    x = x if x.dtype is torch.bool else x.to(like.dtype)
    return x.reshape(*x.shape, *[1] * (like.dim() - 1))


def _change(t: Tensor) -> Tensor:
    """Zero, with the derivative of ``t``."""
    return t - t.detach()
