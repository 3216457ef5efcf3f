"""Lowering rules of searches, and of indexing by places that are known only as the solve runs.

A place is compared with all that it may be, so that lanes need no branches: looking up a number
among n costs n comparisons. Where PyTorch raises for a place that is not there, the result is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ctorch.codegen.graph import Graph, Ids
from ctorch.codegen.lower_expression import Expr
from ctorch.codegen.lower_structure import sum_into

Rule = Callable[..., Any]


def _counted(x: Expr, n: int) -> Expr:
    """0 .. n - 1."""
    return Expr(x.graph, x.graph.constant_array(torch.arange(n)))


def _wrapped(index: Expr, n: int) -> tuple[Expr, Expr]:
    """A place among ``n``, counted from the end where it is negative; and whether it is there."""
    there = (index >= -n).call("and", index < n)
    return (index < 0).where(index + n, index), there


def _gather_by_value(x: Expr, dim: int, index: Expr, sparse_grad: bool = False) -> Expr:
    there = (index >= 0).call("and", index < x.shape[dim])
    lines = np.moveaxis(x.ids, dim, -1)
    for d in range(x.ndim):
        if d != dim % x.ndim:
            lines = lines.take(range(index.shape[d]), d - (d > dim % x.ndim))
    chosen = index.unsqueeze(-1).same(_counted(x, x.shape[dim]))
    terms = chosen.where(Expr(x.graph, np.expand_dims(lines, dim)), 0.0)
    return there.where(terms.sum(-1), math.nan)


@dataclass
class _Indexed:
    """An array whose indexed dimensions are one: [*others, n].

    Attributes:
        lines: ids, [*others, n].
        place, there: [*index], which of the n, and whether there is such a place.
        candidates: [*index, m], which of the n it may be: those that the constants among the
            indices leave.
        front: how many of the others stand before the index in what ``x[index]`` is.
        back: the order of dimensions that restores the array from [*others, *indexed].
    """

    lines: Ids
    place: Expr
    there: Expr
    candidates: Ids
    front: int
    back: Ids

    @classmethod
    def of(cls, x: Expr, index: Sequence[Expr | None]) -> _Indexed:
        """As PyTorch understands a list of indices, None for whole dimensions."""
        given = {d: i for d, i in enumerate(index) if i is not None}
        dims, others = list(given), [d for d in range(x.ndim) if d not in given]
        lines = x.ids.transpose([*others, *dims]).reshape([*(x.shape[d] for d in others), -1])
        spread = np.broadcast_arrays(*(i.ids for i in given.values()))
        place, there = x.of(0.0), x.of(1.0)
        fits = np.ones((*spread[0].shape, lines.shape[-1]), bool)
        coordinates = np.unravel_index(np.arange(lines.shape[-1]), [x.shape[d] for d in dims])
        for d, ids, coordinate in zip(dims, spread, coordinates, strict=True):
            here, is_there = _wrapped(Expr(x.graph, ids), x.shape[d])
            place = place * x.shape[d] + here
            there = is_there if there.value == 1.0 else there.call("and", is_there)
            known = _known(x.graph, ids)
            if known is not None:
                fits &= (known % x.shape[d])[..., None] == coordinate
        candidates = np.nonzero(fits)[-1].reshape(*spread[0].shape, -1)
        adjacent = dims == list(range(dims[0], dims[0] + len(dims)))
        front = dims[0] if adjacent else 0
        return cls(lines, place, there, candidates, front, np.argsort([*others, *dims]))

    def moved(self, ids: Ids, back: bool = False) -> Ids:
        """[*front, *index, *rest] to [*others, *index]; or back."""
        n = self.place.ndim
        ends, inside = range(ids.ndim - n, ids.ndim), range(self.front, self.front + n)
        source, target = (ends, inside) if back else (inside, ends)
        return np.moveaxis(ids, list(source), list(target))

    def hits(self) -> Expr:
        """[*index, m], whether the place is this candidate."""
        counted = _counted(self.place, self.lines.shape[-1])
        return self.place.unsqueeze(-1).same(counted[self.candidates])


def _known(graph: Graph, ids: Ids) -> Ids | None:
    """The values of an index of constants."""
    values = [graph.value_of(int(i)) for i in ids.reshape(-1)]
    if any(value is None for value in values):
        return None
    return np.array(values, dtype=np.int64).reshape(ids.shape)


def _index_by_value(x: Expr, index: Sequence[Expr | None]) -> Expr:
    at = _Indexed.of(x, index)
    terms = at.hits().where(Expr(x.graph, at.lines[..., at.candidates]), 0.0)
    found = at.there.where(terms.sum(-1), math.nan)
    return Expr(x.graph, at.moved(found.ids, back=True))


def _index_put_by_value(
    x: Expr, index: Sequence[Expr | None], values: Expr, accumulate: bool = False
) -> Expr:
    at = _Indexed.of(x, index)
    others = at.lines.shape[:-1]
    whole = (*others[: at.front], *at.place.shape, *others[at.front :])
    spread = Expr(x.graph, at.moved(values.expand(whole).ids).reshape(*others, -1, 1))
    candidates = at.candidates.reshape(spread.shape[-2], -1)
    hits = at.hits().call("and", at.there.unsqueeze(-1)).reshape(*candidates.shape)
    if accumulate:
        lines = np.arange(at.lines.size).reshape(at.lines.shape)[..., candidates]
        flat = Expr(x.graph, at.lines.reshape(-1))
        ids = sum_into(flat, lines.reshape(-1), hits.where(spread, 0.0)).ids
    else:
        ids = at.lines.copy()
        for i, line in enumerate(candidates):
            old = Expr(x.graph, ids[..., line])
            ids[..., line] = hits[i].where(spread[..., i, :], old).ids
    sizes = [x.shape[d] for d in np.argsort(at.back)]
    return Expr(x.graph, ids.reshape(sizes).transpose(at.back))


def index_put_by_mask(
    x: Expr, index: Sequence[Expr | None], values: Expr, accumulate: bool = False
) -> Expr:
    """``x[mask] = value``, the only write by a mask whose shape does not depend on values."""
    if len(index) != 1 or values.ids.size != 1:
        raise NotImplementedError("other values than one for all places")
    mask, value = index[0], values.reshape()
    assert mask is not None
    mask = mask.reshape(*mask.shape, *[1] * (x.ndim - mask.ndim))
    return mask.where(x + value if accumulate else value, x)


def _index_select_by_value(x: Expr, dim: int, index: Expr) -> Expr:
    if not x.ndim:
        return _index_select_by_value(x.reshape(1), 0, index).reshape()
    return _index_by_value(x, [index if d == dim % x.ndim else None for d in range(x.ndim)])


def _index_add_by_value(x: Expr, dim: int, index: Expr, source: Expr, alpha: float = 1) -> Expr:
    dims = [index if d == dim % x.ndim else None for d in range(x.ndim)]
    return _index_put_by_value(x, dims, source if alpha == 1 else source * alpha, accumulate=True)


def _take_by_value(x: Expr, index: Expr) -> Expr:
    return _index_by_value(x.reshape(-1), [index])


def _put_by_value(x: Expr, index: Expr, source: Expr, accumulate: bool = False) -> Expr:
    return _index_put_by_value(x.reshape(-1), [index], source, accumulate).reshape(*x.shape)


def _scatter_by_value(x: Expr, dim: int, index: Expr, source: Any) -> Expr:
    for hit, value in _hits(x, dim, index, source):
        x = hit.where(value, x)
    return x


def _scatter_add_by_value(x: Expr, dim: int, index: Expr, source: Expr) -> Expr:
    for hit, value in _hits(x, dim, index, source):
        x = x + hit.where(value, 0.0)
    return x


def _hits(x: Expr, dim: int, index: Expr, source: Any) -> Iterator[tuple[Expr, Expr]]:
    """For every place that is named: where it is, and what goes there."""
    dim = dim % x.ndim
    for d in range(x.ndim):
        if d != dim and index.shape[d] != x.shape[d]:
            raise NotImplementedError("places for a part of the lines")
    places = _counted(x, x.shape[dim]).reshape(*[-1 if d == dim else 1 for d in range(x.ndim)])
    for i in range(index.shape[dim]):
        value = x.of(source)
        value = value.at(i, dim, keepdim=True) if value.ndim else value
        yield index.at(i, dim, keepdim=True).same(places), value


def _where_largest(op: str) -> Rule:
    """The first place of the largest or smallest number along a dimension."""

    def rule(x: Expr, dim: int | None = None, keepdim: bool = False) -> Expr:
        if dim is None:
            return rule(x.reshape(-1), 0, False)
        best = x.reduce(op, dim, keepdim=True)
        hits = x.same(best).call("or", x.call("isnan"))
        place = x.of(0.0).expand(best.shape)
        for i in reversed(range(x.shape[dim])):
            place = hits.at(i, dim, keepdim=True).where(float(i), place)
        return place if keepdim else Expr(x.graph, place.ids.squeeze(dim))

    return rule


def _with_place(op: str) -> Rule:
    def rule(x: Expr, dim: int | None = None, keepdim: bool = False) -> Any:
        if dim is None:
            return x.reduce(op)
        if isinstance(dim, Expr):
            return x.call(op, dim)
        return x.reduce(op, dim, keepdim), _where_largest(op)(x, dim, keepdim)

    return rule


# ---- searches


def _searchsorted(
    table: Expr, x: Any, *, out_int32: bool = False, right: bool = False, side: str | None = None,
    sorter: Any = None,
) -> Expr:  # fmt: skip
    if sorter is not None:
        raise NotImplementedError("a sorter")
    x = table.of(x)
    op = "gt" if right or side == "right" else "ge"
    table = table.unsqueeze(-2) if table.ndim > 1 else table
    before = table.call(op, x.unsqueeze(-1)).call("not")  # NaN comes last, as in PyTorch
    return before.where(1.0, 0.0).sum(-1)


def _bucketize(x: Any, table: Expr, *, out_int32: bool = False, right: bool = False) -> Expr:
    return _searchsorted(table, x, right=right)


#: numbers up to which each is compared with each
_MANY = 64


def _sort(
    x: Expr, dim: int = -1, descending: bool = False, stable: bool | None = None
) -> tuple[Expr, Expr]:
    """By rank: how many numbers come before; equal ones in their order, NaN as the largest."""
    if not x.ndim:
        return x, x.of(0.0)
    lines = Expr(x.graph, np.moveaxis(x.ids, dim, -1))
    n = lines.shape[-1]
    if n > _MANY:
        raise NotImplementedError(f"{n} numbers, of at most {_MANY}")
    nan = lines.call("isnan")
    a, b = lines.unsqueeze(-2), lines.unsqueeze(-1)  # a[j] before b[i]?
    less = (a < b).call("or", nan.unsqueeze(-1).call("and", nan.unsqueeze(-2).call("not")))
    more = less.swap()
    before = more if descending else less
    tied = less.call("or", more).call("not")
    places = _counted(x, n)
    earlier = places.unsqueeze(-2) < places.unsqueeze(-1)
    rank = before.call("or", tied.call("and", earlier)).where(1.0, 0.0).sum(-1)
    chosen = rank.unsqueeze(-2).same(places.unsqueeze(-1))  # [r, i]
    values = chosen.where(lines.unsqueeze(-2), 0.0).sum(-1)
    found = chosen.where(places, 0.0).sum(-1)
    return tuple(Expr(x.graph, np.moveaxis(y.ids, -1, dim)) for y in (values, found))  # type: ignore[return-value]


def _topk(
    x: Expr, k: int, dim: int = -1, largest: bool = True, sorted: bool = True
) -> tuple[Expr, Expr]:
    values, places = _sort(x, dim, largest)
    if not x.ndim:
        return values, places
    first = tuple(slice(k) if d == dim % x.ndim else slice(None) for d in range(x.ndim))
    return values[first], places[first]


RULES: dict[str, Rule] = {
    "argmax": _where_largest("maximum"), "argmin": _where_largest("minimum"),
    "max": _with_place("maximum"), "min": _with_place("minimum"), "searchsorted": _searchsorted,
    "bucketize": _bucketize, "sort": _sort, "topk": _topk,
}  # fmt: skip

#: Rules of operators whose places depend on values.
BY_VALUE: dict[str, Rule] = {
    "gather": _gather_by_value, "scatter": _scatter_by_value, "scatter_add": _scatter_add_by_value,
    "index": _index_by_value, "_unsafe_index": _index_by_value, "index_put": _index_put_by_value,
    "_unsafe_index_put": _index_put_by_value, "index_select": _index_select_by_value,
    "take": _take_by_value, "put": _put_by_value, "index_add": _index_add_by_value,
}  # fmt: skip
