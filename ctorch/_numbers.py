"""Whole numbers as arguments."""

from __future__ import annotations

import operator
from typing import Any

import torch


def as_int(x: Any) -> int | None:
    """An int, or what Python takes for one (numpy's integers, say), as an int; None for others.

    Booleans are others: ``order=True`` is a slip.
    """
    if isinstance(x, int):
        return None if isinstance(x, bool) else x
    if getattr(x, "dtype", None) is torch.bool:  # which has an index
        return None
    try:
        return operator.index(x)
    except (TypeError, RuntimeError):  # the latter for tensors within a transform
        return None
