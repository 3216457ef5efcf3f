"""Tracing functions of time and state that are no slopes: events, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch.codegen.lower_source import Untraceable
from ctorch.codegen.trace import Traced, find_trace
from ctorch.codegen.trace_problem import Problem, code_of


def trace_values(
    functions: Sequence[Callable[..., Tensor]], y: Any, t: Any = None, args: tuple[Any, ...] = ()
) -> tuple[Traced, list[int]]:
    """Trace functions of the whole state as one field, whose slope is their elements, one after
    the other.

    Args:
        functions: each ``function(t, y, *args)`` returns a tensor of any shape.
        y, t, args: as for ``trace``.

    Returns:
        The trace, and how many elements each function has.

    Raises:
        Untraceable: as ``trace``.
    """
    problem = _Values(functions, y, t, args)
    traced = find_trace(problem)
    inputs = problem.inputs([False] * len(problem.tensors), None)
    with torch.no_grad():
        problem.call([False] * len(problem.tensors), None)(inputs)
    return traced, problem.sizes


class _Values(Problem):
    """Functions in the place of a vector field."""

    may_split = False

    def __init__(
        self,
        functions: Sequence[Callable[..., Tensor]],
        y: Any,
        t: Any,
        args: tuple[Any, ...],
    ) -> None:
        super().__init__(self._all, y, t, args, batched=False)
        self.functions = tuple(functions)
        self.root = (self.functions, self.root[1])
        self.sizes: list[int] = []

    @property
    def key(self) -> Any:
        return (*(code_of(function) for function in self.functions), super().key)

    def _all(self, t: Tensor, y: Any, *args: Any) -> Any:
        values = [function(t, y, *args) for function in self.functions]
        for value in values:
            if not isinstance(value, Tensor) or value.dtype != self.dtype:
                what = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise Untraceable(
                    f"a function of the state returned {what} for a state of {self.dtype}: native"
                    " solves compute in the state's type."
                )
        self.sizes = [value.numel() for value in values]
        return torch.cat([value.reshape(-1) for value in values])

    def _slope(self, value: Any, y: list[Tensor]) -> list[Tensor]:
        return [value]
