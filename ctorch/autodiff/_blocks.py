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
        ValueError: it does, and gives them another value than within the batch.
    """
    if x.ndim < 2 or x.shape[:-1].numel() < 2 or transforms_active() or is_compiling():
        return False
    with torch.no_grad():
        first = x.detach()[(slice(0, 1),) * (x.ndim - 1)]
        try:
            single = f(first)
        except Exception:  # f holds something of the batch's size: then it is run on the batch
            return False
        inside = y.detach()[(slice(0, 1),) * (x.ndim - 1)]
        if not isinstance(single, Tensor) or single.shape != inside.shape:
            return False
        scale = torch.maximum(inside.abs().amax(), y.detach().abs().mean()) if y.numel() else 0.0
        if bool(((single - inside).abs() > 1e-2 * scale).any()):
            raise ValueError(
                "f: a sample has another value alone than within the batch: f mixes samples (as "
                "batch statistics do), or it is random. This operator acts on each sample alone; "
                "for a module, eval() may be what is missing"
            )
    return True


def block_size(f: Any, rows: int) -> int:
    """Samples in a block such that the rows of a layer stay in the cache."""
    width = WIDTH
    if isinstance(f, torch.nn.Module):
        width = max([max(p.shape, default=1) for p in f.parameters()], default=WIDTH)
    return max(1, ELEMENTS // (width * rows))
