"""Arithmetic of shapes."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def broadcast_shapes(*shapes: Sequence[int]) -> torch.Size:
    """As ``torch.broadcast_shapes``, whose first call imports for half a second.

    Raises:
        RuntimeError: the shapes do not broadcast.
    """
    ndim = max(map(len, shapes))
    out = [1] * ndim
    for shape in shapes:
        for i, size in enumerate(shape, ndim - len(shape)):
            if size != 1 and out[i] != size:
                if out[i] != 1:
                    raise RuntimeError(f"shapes do not broadcast: {[tuple(s) for s in shapes]}")
                out[i] = size
    return torch.Size(out)
