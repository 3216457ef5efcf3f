"""Derivative and batching rules of the sortlet operators.

First and second derivatives are operators themselves, each with a kernel; derivatives of the second
ones are those of the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch.ops._by_reference import Args, Function, filled


class _Operators:
    """The operators that rules call; sortlet.py fills them in once they are defined."""

    gradient: Function
    hessian: Function
    term_gradient: Function
    term_hessian: Function


ops = _Operators()


# ---- the logarithm


def sortlet_backward(
    args: Args, needed: Sequence[bool], _sign: Tensor | None, g: Tensor | None
) -> Args:
    """Cotangents of (scores, gap)."""
    scores, gap = args
    return (None if g is None else ops.gradient(scores, g, gap)), None


def sortlet_jvp(args: Args, tangents: Args) -> tuple[Tensor, Tensor]:
    """Tangents of sign and logabs."""
    scores, gap = args
    one = torch.ones_like(scores.detach().sum(-1))
    slope, _ = ops.hessian(scores, one, tangents[0], gap)
    return torch.zeros_like(slope), slope


def gradient_backward(args: Args, needed: Sequence[bool], v: Tensor | None) -> Args:
    """Cotangents of (scores, g, gap)."""
    scores, g, gap = args
    if v is None:
        return None, None, None
    of_g, of_scores = ops.hessian(scores, g, v, gap)
    return of_scores, of_g, None


def gradient_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of the gradient, which is symmetric in the scores."""
    scores, g, gap = args
    t, tg, _ = tangents
    parts = []
    if t is not None:
        parts.append(ops.hessian(scores, g, t, gap)[1])
    if tg is not None:
        parts.append(ops.gradient(scores, tg, gap))
    return _sum(parts)


# ---- the term


def term_backward(args: Args, needed: Sequence[bool], g: Tensor | None) -> Args:
    """Cotangents of (scores, shift, sign, logabs, gap)."""
    scores, shift, _, _, gap = args
    if g is None:
        return (None,) * 5
    of_scores, of_shift = ops.term_gradient(scores, shift, g, gap)
    return of_scores, of_shift, None, None, None


def term_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of a term."""
    scores, shift, _, _, gap = args
    t, ts = filled(tangents[:2], (scores, shift))
    slope: Tensor = ops.term_hessian(scores, shift, torch.ones_like(shift.detach()), t, ts, gap)[2]
    return slope


def term_gradient_backward(
    args: Args, needed: Sequence[bool], v: Tensor | None, u: Tensor | None
) -> Args:
    """Cotangents of (scores, shift, g, gap)."""
    scores, shift, g, gap = args
    v, u = filled((v, u), (scores, shift))
    return (*ops.term_hessian(scores, shift, g, v, u, gap), None)


def term_gradient_jvp(args: Args, tangents: Args) -> Args:
    """Tangents of both derivatives, which are symmetric in scores and shift."""
    scores, shift, g, gap = args
    t, ts, tg, _ = tangents
    parts = []
    if t is not None or ts is not None:
        v, u = filled((t, ts), (scores, shift))
        parts.append(ops.term_hessian(scores, shift, g, v, u, gap)[:2])
    if tg is not None:
        parts.append(ops.term_gradient(scores, shift, tg, gap))
    return tuple(_sum(list(each)) for each in zip(*parts, strict=True))


# ---- batching


def mapped(leads: Sequence[int], out_leads: Sequence[int]) -> Function:
    """The batching rule of an operator whose tensors share all dims but the first or the last.

    Args:
        leads: for each tensor, at which dim the shared ones begin: 1 where there are rows.
        out_leads: the same for each result.
    """

    def vmap(call: Function, size: int, batched: Sequence[bool], args: Args) -> Any:
        moved = list(args)
        for at, lead in enumerate(leads):
            x = args[at] if batched[at] else args[at].unsqueeze(0).expand(size, *args[at].shape)
            moved[at] = x.movedim(0, lead)
        return call(*moved), (tuple(out_leads) if len(out_leads) > 1 else out_leads[0])

    return vmap


def _sum(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]
