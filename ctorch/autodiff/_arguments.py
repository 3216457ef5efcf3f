"""Checks that several derivative operators share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ctorch._numbers import as_int
from ctorch.autodiff._propagated import Propagated


def whole(name: str, given: Any, least: int) -> int:
    """A whole number from ``least`` on, given as an int or as what Python takes for one.

    Raises:
        TypeError, ValueError: it is none, or too small.
    """
    number = as_int(given)
    if number is None:
        raise TypeError(f"{name}: expected an int, got {type(given).__name__}")
    if number < least:
        raise ValueError(f"{name}: expected >= {least}, got {number}")
    return number


def function(name: str, given: Any) -> None:
    """Refuses what cannot be called."""
    if not callable(given):
        raise TypeError(f"{name}: expected a function, got {type(given).__name__}")


def outermost(x: Any) -> None:
    """Refuses a value that an operator outside carries derivatives in."""
    if isinstance(x, Propagated):
        raise TypeError(
            "derivative operators do not nest: within a function that one of them differentiates, "
            "take further derivatives by torch.autograd.grad around it, or ask for a higher order"
        )


def points(x: Any) -> None:
    """Refuses what is not ``[..., d]`` in floating point."""
    outermost(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"x: expected floating point, got {x.dtype}")
    if x.ndim == 0:
        raise ValueError("x: expected [..., d], got a tensor without dims")
