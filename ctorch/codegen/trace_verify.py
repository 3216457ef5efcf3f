"""Comparing compiled code with the function that it was made from, at random points.

A gradient is compared with that of ``torch.autograd``. Where the two differ by more than rounding
usually does, it is asked how far autograd's own moves with the last bits of the point: as far as
that, and much further at a kink, both may be right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.codegen.graph import as_reals
from ctorch.codegen.guards import Guards
from ctorch.codegen.lower_source import Untraceable
from ctorch.codegen.trace_leaves import Leaves
from ctorch.codegen.trace_problem import near
from ctorch.codegen.trace_record import Call, Inputs, count_of, pulled_back, shape_of

if TYPE_CHECKING:
    from ctorch.codegen.trace import Traced

#: evaluate(t [B], y [B, dim], own [B, own], shared) -> [B, dim]
Evaluate = Callable[[Tensor, Tensor, Tensor, "list[Tensor]"], Tensor]
#: pull_back(t, y, own, shared, cotangents [B, dim]) -> those of t [B], y, own and every
#: shared array, None of one without
PullBack = Callable[[Tensor, Tensor, Tensor, "list[Tensor]", Tensor], "list[Any]"]

# By how many units of rounding (in tenths), and how often, a point is moved to see how far func, or
# autograd's gradient, moves with it (a kink is missed if all go to one side); by how many times
# what it moves in all the compiled one may differ.
_LAST_BITS, _CHANGES, _TIMES = 300.0, 8, 3.0


def verify(
    traced: Traced, evaluate: Evaluate, pull_back: PullBack | None = None, points: int = 3
) -> None:
    """Compare compiled code with func at random points near the example.

    Args:
        traced: the trace that it was made of.
        evaluate: the compiled ``Field::eval``.
        pull_back: the compiled derivative, where there is one.
        points: how many batches.

    Raises:
        Untraceable: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    problem, owned = traced.problem, traced.field.owned
    rows = min(problem.batch, 64) if traced.field.split else None
    call = problem.call(owned, rows)
    for _ in range(points):
        inputs = problem.inputs(owned, rows, generator)
        held = traced.shared[len(inputs.shared) :]
        point = _Point(inputs, held, 1 if rows is None else rows)
        with torch.no_grad():
            want = point.samples(call(inputs))
        got = evaluate(*point.arrays())
        if not close(got, want) and not _as_unsure(got, want, point, call, generator):
            raise Untraceable(
                "the compiled vector field differs from func at a random point (by up to "
                f"{float((got - want).abs().max()):.3g}): please report this; solve without "
                "native."
            )
        if pull_back is not None:
            _Gradient(traced, call, generator).verify(point, evaluate, pull_back)


def close(a: Tensor, b: Tensor) -> bool:
    """Whether numbers are the same but for rounding."""
    eps = torch.finfo(a.dtype).eps
    scale = b[b.isfinite()].abs().max() if bool(b.isfinite().any()) else torch.ones(())
    return torch.allclose(a, b, rtol=2000 * eps, atol=float(500 * eps * scale), equal_nan=True)


def _as_unsure(
    got: Tensor, want: Tensor, point: _Point, call: Call, generator: torch.Generator
) -> bool:
    """Whether compiled slopes differ no more than func's own move with the last bits of a point."""
    allowed = torch.zeros_like(want)
    for _ in range(_CHANGES):
        with torch.no_grad():
            _loosen(allowed, point.samples(call(point.moved(generator).inputs)), want)
    alike = (got == want) | (got.isnan() & want.isnan())
    return bool((alike | ((got - want).abs() <= allowed)).all())


def _loosen(allowed: Tensor, now: Tensor, before: Tensor) -> None:
    """Allow for a number that moves with the last bits of a point."""
    apart = (now - before).abs()[before.isfinite()].nan_to_num(torch.inf)
    if apart.numel():
        allowed += _TIMES * apart.max()


@dataclass
class _Point:
    """Where compiled code and func are compared.

    Attributes:
        inputs: of func.
        held: the shared arrays that func holds.
        count: of the samples.
    """

    inputs: Inputs
    held: list[Tensor]
    count: int

    def samples(self, leaves: Sequence[Tensor]) -> Tensor:
        """Leaves with a row, or rows, for each sample as one [count, n]."""
        flat = [as_reals(x.detach()).reshape(self.count, -1) for x in leaves]
        return torch.cat(flat, 1) if flat else as_reals(self.inputs.y[0]).new_zeros(self.count, 0)

    def arrays(self) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        """As compiled code takes them."""
        inputs = self.inputs
        shared = [as_reals(x.detach()) for x in (*inputs.shared, *self.held)]
        t = inputs.t.reshape(-1).expand(self.count)
        return t, self.samples(inputs.y), self.samples(inputs.own), shared

    def where(self, chosen: Tensor) -> _Point:
        """Of some samples."""
        if bool(chosen.all()):
            return self
        t, y, own = self.inputs.t, self.inputs.y, self.inputs.own
        some = Inputs(
            t[chosen] if t.dim() else t, [x[chosen] for x in y], [x[chosen] for x in own],
            self.inputs.shared,
        )  # fmt: skip
        return _Point(some, self.held, int(chosen.sum()))

    def moved(self, generator: torch.Generator) -> _Point:
        """In the last bits of the inputs."""
        by = _LAST_BITS * torch.finfo(self.inputs.y[0].dtype).eps
        t, *rest = (
            [near(x, generator, by) for x in part]
            for part in ([self.inputs.t], self.inputs.y, self.inputs.own, self.inputs.shared)
        )
        return _Point(Inputs(t[0], *rest), self.held, self.count)


class _Gradient:
    """The comparison of a compiled gradient with autograd's.

    Args:
        traced: of the function.
        call: the function.
        generator: of random points.
    """

    def __init__(self, traced: Traced, call: Call, generator: torch.Generator) -> None:
        self.traced, self.call, self.generator = traced, call, generator
        given = sum(not own for own in traced.field.owned)
        self.held = traced.shared[given:]

    def verify(self, point: _Point, evaluate: Evaluate, pull_back: PullBack) -> None:
        """Compare at a point, as far as func is finite there.

        Raises:
            Untraceable: they differ.
        """
        place, slopes = self._place(point, evaluate)
        there = slopes.isfinite().all(1)
        if not bool(there.any()):
            return
        place, slopes = place.where(there), slopes[there]
        ct = torch.randn(slopes.shape, generator=self.generator, dtype=torch.float64).to(slopes)
        t_grad, *got = pull_back(*place.arrays(), ct)
        got = [t_grad if place.inputs.t.dim() else t_grad.sum(), *got]
        want = self._autograd(place, ct)
        t, y, own, shared = place.arrays()
        total = float((ct * slopes).abs().sum())
        allowed = [_rounding(g, x, total) for g, x in zip(want, (t, y, own, *shared), strict=True)]
        if any(map(_wrong, got, want, allowed)):
            for _ in range(_CHANGES):
                moved = place.moved(self.generator)
                moved.held = self._moved(place.held, _LAST_BITS * torch.finfo(ct.dtype).eps)
                for parts in zip(allowed, self._autograd(moved, ct), want, strict=True):
                    _loosen(*parts)
        for number, parts in enumerate(zip(got, want, allowed, strict=True)):
            if _wrong(*parts):
                by = float((parts[0] - parts[1]).abs().nan_to_num(torch.inf, torch.inf).max())
                raise Untraceable(
                    f"the compiled gradient with respect to {self._name(number)} differs from"
                    f" autograd's at a random point (by up to {by:.3g}, where the largest is"
                    f" {float(parts[1].abs().max()):.3g}): please report this; solve without"
                    " native."
                )

    def _place(self, point: _Point, evaluate: Evaluate) -> tuple[_Point, Tensor]:
        """The point with other values of what func holds, if func takes them from there: a matrix
        of zeros would hide errors of all that it is multiplied by. And the slopes there.
        """
        place = _Point(point.inputs, self._moved(self.held, 1.0), point.count)
        _, leaves, values = self._run(place)
        slopes = point.samples(values)
        there = bool(slopes.isfinite().any()) and close(evaluate(*place.arrays()), slopes)
        if there and not any(x.requires_grad and leaves.passed_by(x) for x in values):
            return place, slopes
        return point, point.samples(self._run(point)[2])

    def _run(self, place: _Point) -> tuple[Inputs, Leaves, list[Tensor]]:
        """Inputs and leaves of what func returns, and that."""
        inputs, leaves = place.inputs.differentiable(), Leaves(self.held, place.held)
        with torch.enable_grad(), leaves:
            return inputs, leaves, self.call(inputs)

    def _autograd(self, place: _Point, ct: Tensor) -> list[Tensor]:
        """Cotangents of t, y, own and the shared arrays, as compiled code has them."""
        inputs, leaves, values = self._run(place)
        parts = ct.split([count_of([x]) // place.count for x in values], 1)
        seeds = [
            torch.view_as_complex(part.reshape(shape_of(x))) if x.is_complex() else part.view_as(x)
            for part, x in zip(parts, values, strict=True)
        ]
        wanted = [*inputs.leaves(), *map(leaves.of, self.held)]
        first = len(wanted) - len(self.held)
        with torch.enable_grad():
            found = pulled_back(values, seeds, wanted, leaves, lambda x: first + self._number(x))
        grads = [
            torch.zeros_like(x) if g is None else g for x, g in zip(wanted, found, strict=True)
        ]
        ends = [1, 1 + len(inputs.y), 1 + len(inputs.y) + len(inputs.own)]
        t = grads[0].reshape(-1) if inputs.t.dim() else grads[0]
        return [
            t, place.samples(grads[1 : ends[1]]), place.samples(grads[ends[1] : ends[2]]),
            *map(as_reals, grads[ends[2] :]),
        ]  # fmt: skip

    def _number(self, x: Tensor) -> int:
        return next(i for i, held in enumerate(self.held) if held is x)

    def _moved(self, held: Sequence[Tensor], by: float) -> list[Tensor]:
        return [
            near(x, self.generator, by) if mine.requires_grad else x
            for x, mine in zip(held, self.held, strict=True)
        ]

    def _name(self, number: int) -> str:
        given = 3 + sum(not own for own in self.traced.field.owned)
        if number < given:
            return ("t", "y", *["args"] * (given - 2))[number]
        found = Guards(self.traced.problem.root).tensors
        return next(x.path for x in found if x.tensor is self.held[number - given])


def _rounding(grad: Tensor, x: Tensor, total: float) -> Tensor:
    """How much rounding may change a gradient of a sum whose terms have this total."""
    eps = torch.finfo(grad.dtype).eps
    size = grad[grad.isfinite()].abs()
    scale = float(size.max()) if size.numel() else 0.0
    scale += total / float(x.abs().mean()) if x.numel() and bool(x.any()) else 0.0
    return 2000 * eps * grad.abs() + 50 * eps * scale


def _wrong(got: Any, want: Tensor, allowed: Tensor) -> bool:
    """Whether two gradients differ, where the second is a number."""
    if got is None:
        return False
    return not bool(((got - want).abs() <= allowed)[want.isfinite()].all())
