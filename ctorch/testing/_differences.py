"""Directional derivatives by central differences, with an estimate of their own error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_STEPS = (
    1e-3,
    1e-5,
)  # the second is tried where the first does not settle
_RATIO = 0.55  # of the two steps; at one half, both would round alike near zero
_ROUNDING = 64 * 2.2e-16


@dataclass
class Difference:
    """The derivative of each output along one direction, and how far it may be off."""

    value: list[Tensor]
    error: list[Tensor]
    base: list[Tensor]

    def settled(self, rtol: float, atol: float) -> bool:
        """Whether the estimates agree with each other well enough to judge anything by them."""
        for value, error in zip(self.value, self.error, strict=True):
            if not bool((error <= atol + rtol * value.abs().max()).all()):
                return False
        return True


def difference(
    f: Callable[[Sequence[Tensor]], list[Tensor]],
    base: list[Tensor],
    point: Sequence[Tensor],
    direction: Sequence[Tensor | None],
) -> Difference:
    """d/ds f(point + s direction) at s = 0.

    Two central differences are extrapolated (Richardson). Their disagreement, and second
    differences that do not shrink with the step as those of a smooth function do, bound the error:
    at a kink the bound is as large as the jump of the slope, so that a subgradient is not called
    wrong there.
    """
    size = max(
        (min(float(torch.nan_to_num(x).abs().max()), 1.0) for x, _ in _moved(point, direction)),
        default=1.0,
    )
    wide, narrow = (step * (size or 1.0) for step in _STEPS)
    first = _richardson(f, base, point, direction, wide)
    if first.settled(1e-5, 1e-9):
        return first
    return _merge(first, _richardson(f, base, point, direction, narrow))


def _merge(first: Difference, second: Difference) -> Difference:
    """The better estimate of each element, trusted no further than the two agree."""
    values, errors = [], []
    for v1, e1, v2, e2 in zip(first.value, first.error, second.value, second.error, strict=True):
        values.append(torch.where(e2 < e1, v2, v1))
        error = torch.maximum(torch.minimum(e1, e2), (v1 - v2).abs())
        # estimates that scatter this much say little about their own error either
        errors.append(torch.where(error > 1e-3 * values[-1].abs(), 10 * error, error))
    return Difference(values, errors, first.base)


def _richardson(
    f: Callable[[Sequence[Tensor]], list[Tensor]],
    base: list[Tensor],
    point: Sequence[Tensor],
    direction: Sequence[Tensor | None],
    h: float,
) -> Difference:
    def shifted(s: float) -> list[Tensor]:
        return f(
            [
                x if v is None else torch.where(v == 0, x, x + s * v)
                for x, v in zip(point, direction, strict=True)
            ]
        )

    q = _RATIO
    ends = [shifted(h), shifted(-h), shifted(q * h), shifted(-q * h)]
    values, errors = [], []
    for y, (far, back, near, near_back) in zip(base, zip(*ends, strict=True), strict=True):
        wide, narrow = (far - back) / (2 * h), (near - near_back) / (2 * q * h)
        bend_wide = (far - 2 * y + back) / h
        bend_narrow = (near - 2 * y + near_back) / (q * h)
        error = torch.maximum((wide - narrow).abs(), (bend_narrow / q - bend_wide).abs())
        values.append((narrow - q * q * wide) / (1 - q * q))
        errors.append(3 * torch.nan_to_num(error, nan=torch.inf) + _ROUNDING * y.abs() / h)
    return Difference(values, errors, base)


def _moved(
    point: Sequence[Tensor], direction: Sequence[Tensor | None]
) -> list[tuple[Tensor, Tensor]]:
    return [
        (x, v) for x, v in zip(point, direction, strict=True) if v is not None and v.abs().any()
    ]
