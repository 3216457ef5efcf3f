"""Arithmetic of our own within a user's ``torch.autocast``."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def as_written(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """A context in which products of tensors like ``x`` keep their dtype, autocast or not."""
    if autocasts(x):
        return torch.autocast(x.device.type, enabled=False)
    return contextlib.nullcontext()


def autocasts(x: Tensor) -> bool:
    """Whether ``torch.autocast`` is on where ``x`` is."""
    kind = x.device.type
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
