"""Several directional derivatives carried through torch code at once: batched forward mode."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._propagated import Propagated, constant
from ctorch.ops import jet as ops

Function = Callable[..., Any]


class Tangents(Propagated):
    """A tensor and its derivatives along R directions.

    Attributes:
        rows: ``[R, *shape]``; dims of size 1 stand for all of ``shape``, so that directions which
            all samples share cost nothing until samples differ.
    """

    __slots__ = ("_value", "rows")
    order = 1

    def __init__(self, value: Tensor, rows: Tensor) -> None:
        self._value = value
        self.rows = rows

    @property
    def value(self) -> Tensor:
        return self._value

    def full(self) -> Tensor:
        """The rows, ``[R, *shape]`` with all dims."""
        return self.rows.expand(self.rows.shape[0], *self._value.shape)

    def linear(self, fn: Function) -> Tangents:
        return Tangents(fn(self._value), fn(self.full()))

    def affine(self, fn: Function, constant: Tensor) -> Tangents:
        # the maps of affine act on the last dim alone: rows that samples share stay shared
        whole_last = self.rows.shape[-1] == self._value.shape[-1]
        rows = self.rows if whole_last else self.full()
        return Tangents(fn(self._value) + constant, fn(rows))

    def shift(self, constant: Tensor | complex) -> Tangents:
        value = self._value + constant
        extra = value.ndim - self._value.ndim
        rows = self.rows
        if extra:
            rows = rows.reshape(rows.shape[0], *(1,) * extra, *rows.shape[1:])
        return Tangents(value, rows)

    @classmethod
    def join(cls, fn: Function, parts: Sequence[Any]) -> Tangents:
        like = next(part for part in parts if isinstance(part, Tangents)).rows
        rows = [
            part.full()
            if isinstance(part, Tangents)
            else like.new_zeros(()).expand(like.shape[0], *part.shape)
            for part in parts
        ]
        return Tangents(fn([p if constant(p) else p.value for p in parts]), fn(rows))

    def unary(self, name: str, param: float = 0.0) -> Tangents:
        value = self._value
        y = ops.unary(torch.stack([value, torch.ones_like(value)]), name, 1, param)
        return Tangents(y[0], y[1] * self.rows)

    def integrate(self, value: Tensor, slope: Any) -> Tangents:
        return Tangents(value, (slope if constant(slope) else slope.value) * self.rows)

    def times(self, other: Tangents) -> Tangents:
        a, b = _same_ndim(self, other)
        return Tangents(a.value * b.value, a.rows * b.value + a.value * b.rows)

    def over(self, other: Tangents) -> Tangents:
        a, b = _same_ndim(self, other)
        y = a.value / b.value
        return Tangents(y, (a.rows - y * b.rows) / b.value)

    @classmethod
    def bilinear(cls, fn: Function, a: Tangents, b: Tangents) -> Tangents:
        left, right = a.value.expand_as(a.full()), b.value.expand_as(b.full())
        return Tangents(fn(a.value, b.value), fn(a.full(), right) + fn(left, b.full()))

    def _assign(self, other: Tangents) -> None:
        self._value, self.rows = other._value, other.rows


def _same_ndim(a: Tangents, b: Tangents) -> tuple[Tangents, Tangents]:
    n = max(a.ndim, b.ndim)
    return _widen(a, n), _widen(b, n)


def _widen(x: Tangents, ndim: int) -> Tangents:
    if x.ndim == ndim:
        return x
    ones = (1,) * (ndim - x.ndim)
    return Tangents(
        x.value.reshape(*ones, *x.shape),
        x.rows.reshape(x.rows.shape[0], *ones, *x.rows.shape[1:]),
    )
