"""Errors and warnings of ctorch that carry more than a message."""

from __future__ import annotations

from typing import Any


class SolveError(RuntimeError, AssertionError):
    """A solve could not go on.

    It is an ``AssertionError`` as well, since that is what torchdiffeq raises for the same failures
    and what code written for it catches.

    Attributes:
        status: the ``ctorch.ode.Status`` that a solve with ``throw=False`` would have returned.
        t: time at which the solve stopped (float).
        step: the step size in use there (float).
        error_norm: the scaled error norm of the last attempt (float, may be NaN).
        solution: the part of the solution that was computed, where there is one.
    """

    def __init__(
        self,
        message: str,
        *,
        status: Any = None,
        t: float = float("nan"),
        step: float = float("nan"),
        error_norm: float = float("nan"),
        solution: Any = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.t = t
        self.step = step
        self.error_norm = error_norm
        self.solution = solution


class GradientError(RuntimeError):
    """A gradient that was asked for cannot be given exactly; the message says why and what to
    do.
    """


class ArgumentError(ValueError, AssertionError):
    """A bad value of an argument. An ``AssertionError`` too, which is what torchdiffeq raises for
    many of them.
    """


class ArgumentTypeError(TypeError, AssertionError):
    """An argument of the wrong type. An ``AssertionError`` too, as in torchdiffeq."""
