"""How the results of an ensemble's chunks become one."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ctorch.ode.solution import Solution

Merge = Callable[[Any, Any], Any]


@dataclasses.dataclass
class Moments:
    """Mean and spread over the samples that succeeded, at each time.

    Attributes:
        count: of samples.
        mean: [T, ...] float64 (complex128).
        squares: [T, ...] float64, sum of the squared distances from the mean.
    """

    count: int
    mean: Tensor
    squares: Tensor

    @property
    def variance(self) -> Tensor:
        """[T, ...], without bias; NaN for fewer than two samples."""
        if self.count < 2:
            return torch.full_like(self.squares, torch.nan)
        return self.squares / (self.count - 1)

    @property
    def std(self) -> Tensor:
        """[T, ...], the root of the variance."""
        return self.variance.sqrt()

    @classmethod
    def of(cls, sol: Solution, indices: Tensor) -> Moments:
        """Of the samples of a batched solution that did not fail.

        Args:
            sol: of a chunk.
            indices: [n] of its samples; not used, but what a ``reduce`` is called with.

        Returns:
            Their moments; of none at all: a count and a mean of 0.

        Raises:
            TypeError: the state is no tensor.
        """
        if not isinstance(sol.y, Tensor):
            raise TypeError(
                'reduce="moments" is for a state of one tensor, but y0 has several: give a'
                ' function as reduce, with merge="sum".'
            )
        good = sol.y[sol.status.to(sol.y.device) == 0]
        y = good.to(torch.promote_types(good.dtype, torch.float64))
        if not len(y):
            mean = y.new_zeros(y.shape[1:])
            return cls(0, mean, mean.abs())
        variance, mean = torch.var_mean(y, 0, correction=0)  # in one pass, without copies of y
        return cls(len(y), mean, variance * len(y))

    def merged(self, other: Moments) -> Moments:
        """Of the samples of both (Chan, Golub and LeVeque, Updating formulae, 1979)."""
        count = self.count + other.count
        if not count:
            return self
        step, share = other.mean - self.mean, other.count / count
        squares = self.squares + other.squares + step.abs().square() * (self.count * share)
        return Moments(count, self.mean + step * share, squares)


pytree.register_dataclass(Moments)  # so that its tensors can be moved


def joined(parts: Sequence[Any]) -> Any:
    """Pytrees of tensors, concatenated along the samples.

    Raises:
        TypeError: a leaf has no dimension along which it could be.
    """
    first, spec = pytree.tree_flatten(parts[0])
    columns: list[list[Tensor]] = [[] for _ in first]
    for part in parts:
        leaves, other = pytree.tree_flatten(part)
        if other != spec:
            raise TypeError(f"reduce must return the same structure each time: {spec}, {other}.")
        for column, leaf in zip(columns, leaves, strict=True):
            if not isinstance(leaf, Tensor) or not leaf.dim():
                what = "a 0-dim tensor" if isinstance(leaf, Tensor) else type(leaf).__name__
                raise TypeError(
                    f"reduce returned {what}, which cannot be concatenated: return tensors"
                    ' [n, ...], or say merge="sum", or give merge a function of two results.'
                )
            column.append(leaf)
    if len(parts) == 1:
        return parts[0]
    return pytree.tree_unflatten([torch.cat(column) for column in columns], spec)


def added(a: Any, b: Any) -> Any:
    """Pytrees of tensors or numbers, added leaf by leaf."""
    return pytree.tree_map(operator.add, a, b)


class Collected:
    """The results so far: all, to be concatenated, or what they merged to.

    Args:
        merge: of two results; None: they are concatenated in the end.
    """

    def __init__(self, merge: Merge | None) -> None:
        self.merge = merge
        self.parts: list[Any] = []

    def add(self, part: Any) -> None:
        """Take the next result; None is no result."""
        if part is None:
            return
        if self.merge is not None and self.parts:
            self.parts = [self.merge(self.parts[0], part)]
        else:
            self.parts.append(part)

    def result(self) -> Any:
        """What came of all; None where there was nothing."""
        if not self.parts:
            return None
        return joined(self.parts) if self.merge is None else self.parts[0]


def whole(sol: Solution, indices: Tensor) -> Any:
    """What is kept of a chunk where ``reduce`` is not given."""
    return sol.y


def how(reduce: Any, merge: Any) -> tuple[Callable[[Solution, Tensor], Any], Merge | None]:
    """The functions meant by the arguments ``reduce`` and ``merge``.

    Raises:
        TypeError, ValueError: there is no such thing.
    """
    if reduce == "moments":
        if merge != "cat":
            raise ValueError('reduce="moments" merges in its own way: leave merge out.')
        return Moments.of, Moments.merged
    if reduce is None:
        if merge != "cat":
            raise ValueError(f"merge={merge!r} needs reduce: solutions are concatenated.")
        return whole, None
    if not callable(reduce):
        raise TypeError(
            'reduce must be a function of (solution, indices), "moments" or None, but is'
            f" {reduce!r}."
        )
    if not (merge in ("cat", "sum") or callable(merge)):
        raise ValueError(
            f'merge must be "cat", "sum" or a function of two results, but is {merge!r}.'
        )
    return reduce, {"cat": None, "sum": added}.get(merge, merge)
