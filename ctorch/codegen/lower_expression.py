"""Arrays of ids that are written like arrays of numbers: the language of the lowering rules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ctorch.codegen.graph import Graph, Ids


class Expr:
    """An array of numbers in a graph; operators and methods add what they compute to the graph.

    Args:
        graph: where the numbers belong.
        ids: [*shape].
    """

    __slots__ = ("graph", "ids")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, graph: Graph, ids: Ids) -> None:
        self.graph, self.ids = graph, ids

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the array."""
        return self.ids.shape

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return self.ids.ndim

    @property
    def value(self) -> float | None:
        """The number that all elements are known to be; None where there is none."""
        first = self.ids.reshape(-1)[:1]
        if len(first) and (self.ids == first[0]).all():
            return self.graph.value_of(int(first[0]))
        return None

    def of(self, other: Any) -> Expr:
        """A number as an array of this graph."""
        if isinstance(other, Expr):
            return other
        return Expr(self.graph, np.array(self.graph.constant(float(other)), np.int64))

    def call(self, op: str, *others: Any, exponent: int = 0) -> Expr:
        """An elementwise operator of the graph on this array and others."""
        ids = (self.of(other).ids for other in others)
        return Expr(self.graph, self.graph.map(op, self.ids, *ids, exponent=exponent))

    # ---- arithmetic

    def __add__(self, other: Any) -> Expr:
        return self.call("add", other)

    def __radd__(self, other: Any) -> Expr:
        return self.of(other).call("add", self)

    def __sub__(self, other: Any) -> Expr:
        return self.call("sub", other)

    def __rsub__(self, other: Any) -> Expr:
        return self.of(other).call("sub", self)

    def __mul__(self, other: Any) -> Expr:
        return self.call("mul", other)

    def __rmul__(self, other: Any) -> Expr:
        return self.of(other).call("mul", self)

    def __truediv__(self, other: Any) -> Expr:
        return self.call("div", other)

    def __rtruediv__(self, other: Any) -> Expr:
        return self.of(other).call("div", self)

    def __neg__(self) -> Expr:
        return self.call("neg")

    def __pow__(self, other: Any) -> Expr:
        exponent = self.of(other).value
        special = {0.5: "sqrt", -0.5: "rsqrt", -1.0: "reciprocal"}
        if exponent in special:
            return self.call(special[exponent])
        if exponent == 1.0:
            return self
        if exponent is not None and exponent == round(exponent) and abs(exponent) <= 8:
            return self.call("power", exponent=int(exponent))
        return self.call("pow", other)

    # ---- comparisons

    def __lt__(self, other: Any) -> Expr:
        return self.call("lt", other)

    def __le__(self, other: Any) -> Expr:
        return self.call("le", other)

    def __gt__(self, other: Any) -> Expr:
        return self.call("gt", other)

    def __ge__(self, other: Any) -> Expr:
        return self.call("ge", other)

    def same(self, other: Any) -> Expr:
        """Elementwise equality."""
        return self.call("eq", other)

    def where(self, yes: Any, no: Any) -> Expr:
        """A choice by this condition."""
        return self.call("select", yes, no)

    # ---- reductions

    def dims(self, dim: Any) -> tuple[int, ...]:
        """Dimensions as PyTorch's argument ``dim`` names them; None and () mean all."""
        if dim is None or (isinstance(dim, (list, tuple)) and not dim):
            return tuple(range(self.ndim))
        given = (dim,) if isinstance(dim, int) else dim
        return tuple(sorted(d % max(self.ndim, 1) for d in given)) if self.ndim else ()

    def count(self, dim: Any) -> int:
        """How many elements a reduction takes together."""
        return math.prod(self.shape[d] for d in self.dims(dim))

    def reduce(self, op: str, dim: Any = None, keepdim: bool = False) -> Expr:
        """A reduction of the graph: "sum", "prod", "maximum", "minimum"."""
        dims = self.dims(dim)
        rest = [d for d in range(self.ndim) if d not in dims]
        shape = tuple(self.shape[d] for d in rest)
        terms = self.ids.transpose([*rest, *dims]).reshape(math.prod(shape), self.count(dims))
        ids = self.graph.reduce(op, terms, shape)
        if keepdim:
            ids = ids.reshape([1 if d in dims else n for d, n in enumerate(self.shape)])
        return Expr(self.graph, ids)

    def sum(self, dim: Any = None, keepdim: bool = False) -> Expr:
        """The sum."""
        return self.reduce("sum", dim, keepdim)

    def mean(self, dim: Any = None, keepdim: bool = False) -> Expr:
        """The mean."""
        return self.sum(dim, keepdim) * (1.0 / self.count(dim) if self.count(dim) else math.nan)

    def largest(self, dim: Any = None, keepdim: bool = False) -> Expr:
        """The maximum; NaN where there is one."""
        return self.reduce("maximum", dim, keepdim)

    # ---- movements

    def reshape(self, *shape: int) -> Expr:
        """As of arrays."""
        return Expr(self.graph, self.ids.reshape(shape))

    def swap(self, a: int = -1, b: int = -2) -> Expr:
        """Two dimensions exchanged."""
        return Expr(self.graph, self.ids.swapaxes(a, b))

    def unsqueeze(self, dim: int) -> Expr:
        """A dimension of size 1."""
        return Expr(self.graph, np.expand_dims(self.ids, dim))

    def expand(self, shape: Sequence[int]) -> Expr:
        """Broadcast."""
        return Expr(self.graph, np.broadcast_to(self.ids, tuple(shape)))

    def __getitem__(self, index: Any) -> Expr:
        return Expr(self.graph, self.ids[index])

    def at(self, i: int, dim: int, keepdim: bool = False) -> Expr:
        """What is at one place of a dimension."""
        return Expr(self.graph, np.asarray(self.ids.take([i] if keepdim else i, dim)))

    def matmul(self, other: Expr) -> Expr:
        """[batch, m, k] times [batch, k, n]."""
        return Expr(self.graph, self.graph.product(self.ids, other.ids))


def stacked(parts: Sequence[Expr], dim: int) -> Expr:
    """Arrays side by side in a new dimension."""
    return Expr(parts[0].graph, np.stack([part.ids for part in parts], dim))


def joined(parts: Sequence[Expr], dim: int) -> Expr:
    """Arrays side by side in a dimension that they have."""
    return Expr(parts[0].graph, np.concatenate([part.ids for part in parts], dim))
