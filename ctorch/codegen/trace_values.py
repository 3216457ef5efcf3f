"""Tracing functions of time and state that are no slopes: events, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.codegen.lower_source import Untraceable
from ctorch.codegen.trace import Traced, find_trace
from ctorch.codegen.trace_problem import Problem, code_of


def trace_values(
    functions: Sequence[Callable[..., Tensor]],
    y: Any,
    t: Any = None,
    args: tuple[Any, ...] = (),
    *,
    batched: bool = False,
    timed: bool = True,
) -> tuple[Traced, list[int]]:
    """Trace functions as one field, whose slope is their elements, one after the other.

    Args:
        functions: each ``function(t, y, *args)`` returns a tensor of any shape; with ``batched``
            [B, ...], of which each row hangs on its own sample alone.
        y, t, args: as for ``trace``.
        batched: the field is that of one sample, not of the whole state.
        timed: False: the functions are called without the time.

    Returns:
        The trace, and how many elements each function has (``batched``: for a sample).

    Raises:
        Untraceable: as ``trace``.
    """
    problem = _Values(functions, y, t, args, batched, timed)
    traced = find_trace(problem)
    owned = traced.field.owned
    with torch.no_grad():
        problem.call(owned, None)(problem.inputs(owned, None))
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
        batched: bool,
        timed: bool,
    ) -> None:
        super().__init__(self._all, y, t, args, batched)
        self.functions, self.timed = tuple(functions), timed
        self.root = (self.functions, self.root[1])
        self.sizes: list[int] = []

    @property
    def key(self) -> Any:
        return (*(code_of(function) for function in self.functions), self.timed, super().key)

    def _all(self, t: Tensor, y: Any, *args: Any) -> Any:
        given = (t, y, *args) if self.timed else (y, *args)
        values = [function(*given) for function in self.functions]
        for value in values:
            if not isinstance(value, Tensor) or value.dtype != self.dtype:
                what = value.dtype if isinstance(value, Tensor) else type(value).__name__
                raise Untraceable(
                    f"a function of the state returned {what} for a state of {self.dtype}: native"
                    " solves compute in the state's type."
                )
        rows = [pytree.tree_leaves(y)[0].shape[0]] if self.batched else []
        for value in values:
            if list(value.shape[: len(rows)]) != rows:
                raise ValueError(
                    f"a function of {rows[0]} samples returned shape {list(value.shape)}."
                )
        flat = [value.reshape(*rows, -1) for value in values]
        self.sizes = [value.shape[-1] for value in flat]
        return torch.cat(flat, -1)

    def _slope(self, value: Any, y: list[Tensor]) -> list[Tensor]:
        return [value]
