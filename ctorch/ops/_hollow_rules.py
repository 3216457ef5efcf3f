"""Derivative and batching rules of the operators of hollow nets.

The first derivative is an operator itself, with a kernel; its derivatives, and tangents, are those
of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ctorch.ops._by_reference import Args, Function


class _Operators:
    """The operators that rules call; hollow.py fills them in once they are defined."""

    gradient: Function


ops = _Operators()


def transform_backward(args: Args, needed: Sequence[bool], g: Tensor | None) -> Args:
    """Cotangents of (x, h, theta, widths, act, param, order)."""
    if g is None:
        return (None,) * len(args)
    return (*ops.gradient(g, *args), *(None,) * 4)


def transform_vmap(call: Function, size: int, batched: Sequence[bool], args: Args) -> Any:
    """Where the nets are shared, the mapped dimension is one of rows; else, one of groups."""
    x, h, theta, *rest = args
    x, h = _expanded(x, batched[0], size), _expanded(h, batched[1], size)
    if not batched[2]:
        out = call(x.flatten(0, 1), h.flatten(0, 1), theta, *rest)
        return out.unflatten(1, x.shape[:2]), 1
    fold = _Fold(x, theta)
    return fold.undone(call(fold.rows(x), fold.rows(h), fold.nets(theta), *rest), 1)


def gradient_vmap(call: Function, size: int, batched: Sequence[bool], args: Args) -> Any:
    """The derivative in the nets is one of each mapped element: it is one of groups."""
    parts = [_expanded(x, b, size) for x, b in zip(args[:4], batched, strict=False)]
    g, x, h, theta = parts
    fold = _Fold(x, theta)
    found = call(fold.rows(g, 2), fold.rows(x), fold.rows(h), fold.nets(theta), *args[4:])
    (of_x, at), (of_h, _) = fold.undone(found[0]), fold.undone(found[1])
    return (of_x, of_h, found[2].unflatten(0, theta.shape[:2])), (at, at, 0)


class _Fold:
    """A mapped dimension S in front, as S times as many groups."""

    def __init__(self, x: Tensor, theta: Tensor) -> None:
        self.shape = x.shape[:3]  # S, N, M
        self.own = theta.shape[1] == x.shape[2]  # a net for each of M

    def rows(self, x: Tensor, at: int = 1) -> Tensor:
        """[S, N, M, ...] to [N, S M, ...] or [N M, S, ...]; ``at`` is the dim of N in x."""
        if self.own:
            return x.movedim(0, at).flatten(at, at + 1)
        return x.flatten(at, at + 1).movedim(0, at)

    def nets(self, theta: Tensor) -> Tensor:
        return theta.flatten(0, 1)

    def undone(self, y: Tensor, at: int = 0) -> tuple[Tensor, int]:
        """The inverse of ``rows`` for a result, and where the mapped dimension is in it."""
        s, n, m = self.shape
        if self.own:
            return y.unflatten(at + 1, (s, m)), at + 1
        return y.unflatten(at, (n, m)), at + 2


def _expanded(x: Tensor, batched: bool, size: int) -> Tensor:
    return x if batched else x.unsqueeze(0).expand(size, *x.shape)
