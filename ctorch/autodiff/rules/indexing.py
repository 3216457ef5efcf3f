"""Rules of functions that pick elements, or put them somewhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._propagated import (
    constant,
    kind_of,
    rule,
    value_of,
    write,
)
from ctorch.autodiff.rules._common import (
    as_tensor,
    lead_of,
    masked,
    negative,
    on_each,
    scalars_too,
    two,
)
from ctorch.autodiff.rules.shapes import flatten, reshape, view

Index = tuple[Any, ...]


@rule("__getitem__")
def getitem(x: Any, index: Any) -> Any:
    if index.__class__ is int:
        at = -x.ndim
        return view(x, lambda s: s.select(at, index))
    parts = index if isinstance(index, tuple) else (index,)
    where = _trailing(parts, x.ndim)
    if _apart(parts):  # torch puts the indexed dims first of all: behind the leading ones instead
        n, m = x.ndim, _indexed_dims(parts)

        def fn(s: Tensor) -> Tensor:
            y, lead = s[where], s.ndim - n
            return y.movedim(tuple(range(m)), tuple(range(lead, lead + m))) if lead else y

        return x.linear(fn)
    return view(x, lambda s: s[where])


@rule("__setitem__")
def setitem(x: Any, index: Any, value: Any) -> None:
    write(x, _with_item(x, index, value, False), "x[...] = value")


def _with_item(x: Any, index: Any, value: Any, accumulate: bool) -> Any:
    """``x`` with some elements replaced, or added to."""
    parts = index if isinstance(index, tuple) else (index,)
    where, n = _trailing(parts, x.ndim), x.ndim
    value = as_tensor(value, x)
    value = value.to(x.dtype).expand(value_of(x)[index].shape)
    m = _indexed_dims(parts) if _apart(parts) else 0

    def fn(stacks: list[Tensor]) -> Tensor:
        s, v = stacks
        lead = s.ndim - n
        if m and lead:
            v = v.movedim(tuple(range(lead, lead + m)), tuple(range(m)))
        s = s.clone()
        if accumulate:
            s[where] = s[where] + v
        else:
            s[where] = v
        return s

    return kind_of(x, value).join(fn, [x, value])


def _trailing(parts: Index, ndim: int) -> Index:
    """The index for a tensor with further leading dims."""
    if any(p is Ellipsis for p in parts):
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        used = sum(_consumes(p) for p in parts if p is not Ellipsis)
        return (Ellipsis, *parts[:at], *(slice(None),) * (ndim - used), *parts[at + 1 :])
    used = sum(_consumes(p) for p in parts)
    return (Ellipsis, *parts, *(slice(None),) * (ndim - used))


def _consumes(part: Any) -> int:
    """How many dims one entry of an index takes."""
    if part is None or isinstance(part, bool):
        return 0
    if isinstance(part, Tensor) and part.dtype == torch.bool:
        return part.ndim
    return 1


def _is_array(part: Any) -> bool:
    return isinstance(part, (list, range)) or (
        isinstance(part, (Tensor, np.ndarray)) and part.ndim > 0
    )


def _apart(parts: Index) -> bool:
    """Whether slices lie between indexing tensors."""
    kinds = [_is_array(p) for p in parts if p is None or not isinstance(p, (int, bool))]
    if True not in kinds:
        return False
    inner = kinds[kinds.index(True) : len(kinds) - kinds[::-1].index(True)]
    return not all(inner)


def _indexed_dims(parts: Index) -> int:
    """The number of dims that indexing tensors give together."""
    shapes = []
    for part in parts:
        if _is_array(part):
            array = torch.as_tensor(part) if not isinstance(part, Tensor) else part
            shapes.append((1,) if array.dtype == torch.bool else tuple(array.shape))
    return max(len(shape) for shape in shapes)


@rule("index")
def index_aten(x: Any, indices: Any) -> Any:
    return getitem(x, tuple(slice(None) if i is None else i for i in indices))


@rule("index_put")
def index_put(x: Any, indices: Any, values: Any, accumulate: bool = False) -> Any:
    if not accumulate:
        return _with_item(_carried(x, values), tuple(indices), values, False)
    indices = [
        part for i in indices for part in (i.nonzero().unbind(1) if i.dtype == torch.bool else (i,))
    ]
    n = len(indices)
    sizes, rest = x.shape[:n], x.shape[n:]
    spread = torch.broadcast_tensors(*indices)
    flat = torch.zeros_like(spread[0])
    for i, size in zip(spread, sizes, strict=True):
        flat = flat * size + torch.where(i < 0, i + size, i)
    values = as_tensor(values, x).expand(*flat.shape, *rest).reshape(-1, *rest)
    y = torch.index_add(x.reshape(-1, *rest), 0, flat.reshape(-1), values)
    return y.reshape(x.shape)


def _carried(x: Any, *others: Any) -> Any:
    """A constant as a value that carries derivatives, namely zero, as one of the others does."""
    if not constant(x):
        return x
    like = next(v for v in others if not constant(v))
    zero = (like.sum() * 0).expand(x.shape)
    return zero.linear(lambda s: torch.zeros_like(s)).shift(x)


# ---- along one dim


@rule("index_select")
@scalars_too
def index_select(x: Any, dim: int, index: Tensor) -> Any:
    at = negative(dim, x.ndim)
    return x.linear(lambda s: s.index_select(s.ndim + at, index))


@rule("gather")
def gather(x: Any, dim: int, index: Tensor, **_: Any) -> Any:
    if x.ndim == 0:
        return gather(x.reshape(1), dim, index.reshape(-1)).reshape(index.shape)
    if index.ndim == 0:
        return gather(x, dim, index.reshape(1)).reshape(())
    at, n = negative(dim, x.ndim), x.ndim
    return x.linear(lambda s: s.gather(s.ndim + at, index.expand((*lead_of(s, n), *index.shape))))


@rule("take_along_dim")
def take_along_dim(x: Any, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None:
        return take_along_dim(flatten(x), indices.flatten(), 0)
    if x.ndim == 0:
        return x.expand(indices.shape).clone()
    at, n = negative(dim, x.ndim), x.ndim

    def fn(s: Tensor) -> Tensor:
        return s.take_along_dim(indices.expand((*lead_of(s, n), *indices.shape)), s.ndim + at)

    return x.linear(fn)


@rule("take")
def take(x: Any, index: Tensor) -> Any:
    return getitem(reshape(x, -1), index)


@rule("put")
def put(x: Any, index: Tensor, source: Any, accumulate: bool = False) -> Any:
    x = _carried(x, source)
    flat = index_put(reshape(x, -1), (index.reshape(-1),), source.reshape(-1), accumulate)
    return flat.reshape(x.shape)


@rule("masked_select")
def masked_select(x: Any, mask: Tensor) -> Any:
    x, mask = torch.broadcast_tensors(x, mask)
    return getitem(x, mask)


@rule(F.embedding)
def embedding(index: Tensor, weight: Any, *_: Any, max_norm: Any = None, **__: Any) -> Any:
    if max_norm is not None:
        raise NotImplementedError("embedding: max_norm has no rule")
    return getitem(weight, index)


@rule("embedding")
def native_embedding(weight: Any, index: Tensor, *_: Any, **__: Any) -> Any:
    return getitem(weight, index)


@rule(F.embedding_bag)
def embedding_bag(
    index: Tensor,
    weight: Any,
    offsets: Tensor | None = None,
    max_norm: Any = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Any = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Any:
    if max_norm is not None:
        raise NotImplementedError("embedding_bag: max_norm has no rule")
    options: dict[str, Any] = {
        "include_last_offset": include_last_offset,
        "padding_idx": padding_idx,
    }
    if mode != "max":

        def fn(w: Tensor, p: Tensor | None) -> Tensor:
            return F.embedding_bag(index, w, offsets, mode=mode, per_sample_weights=p, **options)

        if per_sample_weights is None:
            return weight.linear(on_each(lambda w: fn(w, None), 2))
        return two(fn, weight, per_sample_weights)
    if offsets is None:
        offsets = torch.arange(0, index.numel(), index.shape[1], device=index.device)
    value = weight.value.detach()
    flat = index.reshape(-1)
    _, _, sizes, largest = torch.embedding_bag(  # False, 2, False, None: mode="max", and no more
        value, flat, offsets, False, 2, False, None, include_last_offset, padding_idx
    )
    empty = (sizes[: len(largest)] == 0).unsqueeze(-1)
    return torch.where(empty, 0.0, weight.gather(0, torch.where(empty, 0, largest)))


def _along(name: str, result: Any) -> Any:
    """A rule for ``f(x, dim, index, source)``, linear in x and source together."""

    def apply(x: Any, dim: int, index: Any, source: Any, **options: Any) -> Any:
        if isinstance(source, (int, float)):  # scatter(x, dim, index, value)
            source = torch.full(index.shape, source, dtype=x.dtype, device=x.device)
        options = {k: v for k, v in options.items() if v is not None}
        if x.ndim == 0:
            vectors = (x.reshape(1), dim, index.reshape(-1), source.reshape(-1))
            return apply(*vectors, **options).reshape(())
        at, n = negative(dim, x.ndim), x.ndim

        def fn(stacks: list[Tensor]) -> Tensor:
            s, v = stacks
            lead = lead_of(s, n)
            where = index.expand((*lead, *index.shape)) if result.needs_lead else index
            return result(s, s.ndim + at, where, v, **options)

        return kind_of(x, source).join(fn, [x, source])

    rule(name)(apply)
    return apply


class _Method:
    """A method of tensors; whether its index must be as deep as the tensor."""

    def __init__(self, name: str, needs_lead: bool) -> None:
        self.name, self.needs_lead = name, needs_lead

    def __call__(self, s: Tensor, *args: Any, **options: Any) -> Tensor:
        return getattr(s, self.name)(*args, **options)  # type: ignore[no-any-return]


_scatter = _along("scatter", _Method("scatter", True))
_along("scatter_add", _Method("scatter_add", True))
_along("index_add", _Method("index_add", False))
_along("index_copy", _Method("index_copy", False))


@rule("scatter")
def scatter(x: Any, dim: int, index: Tensor, src: Any = None, **named: Any) -> Any:
    if named.get("reduce") is not None:
        raise NotImplementedError("scatter: reduce has no rule; use scatter_add")
    return _scatter(x, dim, index, named["value"] if src is None else src)


@rule("index_fill")
def index_fill(x: Any, dim: int, index: Tensor, value: Any) -> Any:
    if x.ndim == 0:
        return index_fill(x.reshape(1), dim, index, value).reshape(())
    at = negative(dim, x.ndim)
    where_ = (slice(None),) * (x.ndim + at) + (index,)
    return _with_item(_carried(x, value), where_, value, False)


@rule("select_scatter")
def select_scatter(x: Any, src: Any, dim: int, index: int) -> Any:
    at = (slice(None),) * (x.ndim + negative(dim, x.ndim)) + (index,)
    return _with_item(_carried(x, src), at, src, False)


@rule("slice_scatter")
def slice_scatter(
    x: Any, src: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> Any:
    at = (slice(None),) * (x.ndim + negative(dim, x.ndim)) + (slice(start, end, step),)
    return _with_item(_carried(x, src), at, src, False)


@rule("diagonal_scatter")
def diagonal_scatter(x: Any, src: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    a, b = negative(dim1, x.ndim), negative(dim2, x.ndim)
    x = _carried(x, src)
    if src.shape != x.value.diagonal(offset, a, b).shape:
        raise RuntimeError(f"diagonal_scatter: src of shape {tuple(src.shape)} is no diagonal of x")
    return kind_of(x, src).join(
        lambda stacks: stacks[0].diagonal_scatter(stacks[1], offset, a, b),
        [x, as_tensor(src, x).to(x.dtype)],
    )


@rule("scatter_reduce")
def scatter_reduce(
    x: Any, dim: int, index: Tensor, src: Any, reduce: str, *, include_self: bool = True
) -> Any:
    """Of elements that tie for the largest, each gets its part of the derivative, as in torch."""
    if reduce not in ("sum", "mean", "prod", "amax", "amin"):
        raise NotImplementedError(f"scatter_reduce: {reduce!r} has no rule")
    x, src = _carried(x, src), src[tuple(slice(n) for n in index.shape)]
    if reduce == "prod":
        return _scatter_product(x, dim, index, src, include_self)
    value, given = x.value.detach(), value_of(src).detach()
    result = value.scatter_reduce(dim, index, given, reduce, include_self=include_self)
    own, other = torch.ones_like(value), torch.ones_like(given)
    if not include_self:
        own = own.scatter(dim, index, 0.0)
    if reduce in ("amax", "amin"):
        own, other = own * (value == result), (given == result.gather(dim, index)).to(given.dtype)
    if reduce != "sum":
        count = own.scatter_add(dim, index, other)
        own, other = own / count, other / count.gather(dim, index)
    return torch.scatter_add(x * own, dim, index, src * other)


def _scatter_product(x: Any, dim: int, index: Tensor, src: Any, include_self: bool) -> Any:
    """In rounds, in each of which an element of x meets one factor at most."""
    if x.ndim == 0:
        vectors = (x.reshape(1), 0, index.reshape(-1), src.reshape(-1))
        return _scatter_product(*vectors, include_self).reshape(())
    if not index.numel():
        return x
    sorted_, order = index.sort(dim=dim, stable=True)
    place = torch.ones_like(index).cumsum(dim) - 1
    starts = torch.where(sorted_ != sorted_.roll(1, dim), place, 0).cummax(dim).values
    turn = torch.empty_like(index).scatter_(dim, order, place - starts)  # among those of one target
    ones = torch.ones_like(x.value)
    y = x if include_self else torch.where(ones.scatter(dim, index, 0.0) == 0, 1.0, x)
    for n in range(int(turn.max()) + 1):
        now = turn == n
        others = ones - torch.zeros_like(ones).scatter_add(dim, index, now.to(ones.dtype))
        y = y * torch.scatter_add(others, dim, index, masked(src, now))
    return y


# ---- choices


@rule("where")
def where(condition: Any, x: Any, y: Any) -> Any:
    condition = value_of(condition)
    like = x if not constant(x) else y
    kind = kind_of(x, y)
    a, b = (as_tensor(p, like) for p in (x, y))
    if a.dtype != b.dtype:
        dtype = torch.result_type(value_of(a), value_of(b))
        a, b = a.to(dtype), b.to(dtype)
    shape = broadcast_shapes(condition.shape, a.shape, b.shape)
    a, b = (p if p.shape == shape else p.expand(shape) for p in (a, b))
    return kind.join(lambda s: torch.where(condition, *s), [a, b])


@rule(Tensor.where)
def where_method(x: Any, condition: Any, y: Any) -> Any:
    return where(condition, x, y)


@rule("masked_fill")
def masked_fill(x: Any, mask: Tensor, value: Any) -> Any:
    return where(mask, as_tensor(value, x), x)


@rule("masked_scatter")
def masked_scatter(x: Any, mask: Tensor, source: Any) -> Any:
    x, mask = torch.broadcast_tensors(x, mask)
    picked = source.reshape(-1)[: int(mask.sum())]
    return _with_item(_carried(x, source), mask, picked, False)
