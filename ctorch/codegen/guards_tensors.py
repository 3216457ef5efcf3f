"""Tensors that a function holds: whether they have the content that they had."""

from __future__ import annotations

from torch import Tensor


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
