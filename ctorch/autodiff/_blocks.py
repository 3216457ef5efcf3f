"""Batches worked through in blocks that fit the cache, for operators that carry many rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ctorch.ops._op import transforms_active

ELEMENTS = 1 << 17  # of one layer's rows in a block: half a megabyte in float32
WIDTH = 256  # of a layer, where nothing tells


def alone(f: Callable[[Tensor], Tensor], x: Tensor, y: Tensor) -> bool:
    """Whether ``f`` takes single samples of ``x``, so that blocks of a batch may be run.

    Args:
        f: the user's function.
        x: ``[..., d]``, the batch.
        y: ``f(x)``.

    Raises:
        ValueError: the value of a sample depends on the other samples.
    """
    if x.ndim < 2 or x.shape[:-1].numel() < 2 or transforms_active() or is_compiling():
        return False
    with torch.no_grad():
        # the last: a function that takes the first n of its own data has the right ones for x[:1]
        at = (slice(-1, None),) * (x.ndim - 1)
        last, inside = x.detach()[at], y.detach()[at]
        finite = y.detach().masked_fill(~y.isfinite(), 0.0)
        scale = torch.maximum(finite[at].abs().amax(), finite.abs().mean()) if y.numel() else 0.0

        def near(value: Any) -> bool:
            if not isinstance(value, Tensor) or value.shape != inside.shape:
                return False
            fits = (value - inside).abs() <= rounding(x.dtype) * scale
            return bool((fits | (value == inside) | (value.isnan() & inside.isnan())).all())

        try:
            if near(f(last.clone())):  # a copy: f may write into it
                return True
        except Exception:  # it holds something of the batch's size, or mixes samples
            pass
        if not near(f(last.expand_as(x).clone())[at]):
            raise ValueError(
                "f: a sample has another value among others than within the batch: f mixes samples "
                "(as batch statistics do), or it is random. This operator acts on each sample "
                "alone; for a module, eval() may be what is missing"
            )
    return False


def rounding(dtype: torch.dtype) -> float:
    """By how much values of a sample alone, and among others, may differ: sums of other orders."""
    return max(1e-2, 32 * torch.finfo(dtype).eps)


def block_size(f: Any, rows: int) -> int:
    """Samples in a block such that the rows of a layer stay in the cache."""
    width = WIDTH
    if isinstance(f, torch.nn.Module):
        width = max([max(p.shape, default=1) for p in f.parameters()], default=WIDTH)
    return max(1, ELEMENTS // (width * rows))
