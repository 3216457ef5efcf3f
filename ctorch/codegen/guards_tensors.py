"""Tensors that a function holds: whether they have the form, or the content, that they had."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def same_form(tensors: Sequence[Tensor]) -> Callable[..., bool] | None:
    """The test of PyTorch's own compiler, where it is at hand: one call for all tensors.

    It holds for tensors of the same class, shapes, strides, types, devices and demands of
    gradients; of those for which it does not hold, some are as good.
    """
    kind = getattr(
        getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None
    )
    if kind is None or not tensors:
        return None
    try:
        check: Callable[..., bool] = kind(
            *tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None
        ).check
        return check if check(*tensors) is True else None
    except Exception:  # it belongs to PyTorch, and may change
        return None


class Held:
    """The content of a tensor that is part of the traced code: an index or a mask."""

    def __init__(self, tensor: Tensor) -> None:
        self._copy = tensor.detach().clone()

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor has that content."""
        return tensor.shape == self._copy.shape and bool((tensor == self._copy).all())


def is_number(tensor: Tensor) -> bool:
    """Whether compiled code reads it: an index or a mask becomes part of the code."""
    return tensor.is_floating_point() or tensor.is_complex()
