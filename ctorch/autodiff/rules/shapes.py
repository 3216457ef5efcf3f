"""Rules of functions that move elements: linear, and most of them views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._propagated import RULES, Propagated, aliased, constant, kind_of, rule, write


def _negative(dim: int, ndim: int) -> int:
    """A dim counted from the end, so that leading dims do not matter."""
    if not -max(ndim, 1) <= dim < max(ndim, 1):
        raise IndexError(f"dim: expected -{ndim} to {ndim - 1}, got {dim}")
    return dim if dim < 0 else dim - ndim


def _view(x: Any, fn: Any) -> Any:
    return aliased(x, x.linear(fn))


def _lead(stack: Tensor, ndim: int) -> tuple[int, ...]:
    return tuple(stack.shape[: stack.ndim - ndim])


def _sizes(sizes: Any) -> tuple[int, ...]:
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else tuple(sizes)


@rule("reshape", "view")
def reshape(x: Any, *shape: Any, size: Any = None) -> Any:
    if size is not None:
        shape = (size,)
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        raise TypeError("view(dtype) of a value that carries derivatives")
    target, n = torch.empty(x.shape, device="meta").reshape(_sizes(shape)).shape, x.ndim
    return _view(x, lambda s: s.reshape(*_lead(s, n), *target))


@rule("reshape_as", "view_as")
def reshape_as(x: Any, other: Any) -> Any:
    return reshape(x, *other.shape)


@rule("flatten")
def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if x.ndim == 0:
        return reshape(x, 1)
    first, last = _negative(start_dim, x.ndim), _negative(end_dim, x.ndim)
    return _view(x, lambda s: s.flatten(first, last))


@rule("unflatten")
def unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    at = _negative(dim, x.ndim)
    return _view(x, lambda s: s.unflatten(at, sizes))


@rule("transpose", "swapaxes", "swapdims")
def transpose(x: Any, dim0: int, dim1: int) -> Any:
    a, b = _negative(dim0, x.ndim), _negative(dim1, x.ndim)
    return _view(x, lambda s: s.transpose(a, b))


@rule("t")
def t(x: Any) -> Any:
    return transpose(x, 0, 1) if x.ndim == 2 else _view(x, lambda s: s.view_as(s))


@rule("permute")
def permute(x: Any, *dims: Any) -> Any:
    order, n = [_negative(d, x.ndim) for d in _sizes(dims)], x.ndim
    return _view(x, lambda s: s.permute(*range(s.ndim - n), *(s.ndim + d for d in order)))


@rule("movedim", "moveaxis")
def movedim(x: Any, source: Any, destination: Any) -> Any:
    n = x.ndim
    froms = [source] if isinstance(source, int) else list(source)
    tos = [destination] if isinstance(destination, int) else list(destination)
    froms, tos = [_negative(d, n) for d in froms], [_negative(d, n) for d in tos]
    return _view(x, lambda s: s.movedim(froms, tos))


def _transposed(x: Any) -> Any:
    return transpose(x, -1, -2)


Propagated.mT = property(_transposed)  # type: ignore[attr-defined]
Propagated.T = property(lambda x: t(x))  # type: ignore[attr-defined]


@rule("unsqueeze")
def unsqueeze(x: Any, dim: int) -> Any:
    at = dim if dim < 0 else dim - x.ndim - 1
    return _view(x, lambda s: s.unsqueeze(at))


@rule("squeeze")
def squeeze(x: Any, dim: Any = None) -> Any:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    drop = {_negative(d, x.ndim) for d in dims} if x.ndim else set()
    keep = [size for i, size in enumerate(x.shape) if i - x.ndim not in drop or size != 1]
    return reshape(x, keep)


@rule("expand", "broadcast_to")
def expand(x: Any, *sizes: Any, size: Any = None) -> Any:
    sizes, n = _sizes(sizes) if size is None else tuple(size), x.ndim
    extra = len(sizes) - n
    target = tuple(x.shape[i - extra] if size == -1 else size for i, size in enumerate(sizes))

    def fn(s: Tensor) -> Tensor:
        lead = _lead(s, n)
        return s.reshape(*lead, *(1,) * extra, *s.shape[len(lead) :]).expand(*lead, *target)

    return _view(x, fn)


@rule("expand_as")
def expand_as(x: Any, other: Any) -> Any:
    return expand(x, *other.shape)


@rule("broadcast_tensors")
def broadcast_tensors(*tensors: Any) -> Any:
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        tensors = tuple(tensors[0])
    shape = torch.broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x.expand(shape) for x in tensors)


@rule("repeat", "tile")
def repeat(x: Any, *sizes: Any) -> Any:
    times, n = _sizes(sizes), x.ndim
    extra = max(0, len(times) - n)
    times = (1,) * max(0, n - len(times)) + times

    def fn(s: Tensor) -> Tensor:
        lead = _lead(s, n)
        s = s.reshape(*lead, *(1,) * extra, *s.shape[len(lead) :])
        return s.repeat(*(1,) * len(lead), *times)

    return x.linear(fn)


@rule("chunk")
def chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    size = x.shape[dim]
    return split(x, max(1, -(-size // chunks)), dim)


@rule("split", torch.functional.split)
def split(x: Any, split_size: Any, dim: int = 0) -> Any:
    size, at = x.shape[dim], _negative(dim, x.ndim)
    if isinstance(split_size, int):
        sizes = [min(split_size, size - i) for i in range(0, size, split_size)] or [0]
    else:
        sizes = list(split_size)
    parts, begin = [], 0
    for length in sizes:
        parts.append(x.linear(lambda s, b=begin, n=length: s.narrow(at, b, n)))
        begin += length
    return aliased(x, tuple(parts))


rule("split_with_sizes")(split)


@rule("unbind")
def unbind(x: Any, dim: int = 0) -> Any:
    at = _negative(dim, x.ndim)
    return aliased(x, tuple(x.linear(lambda s, i=i: s.select(at, i)) for i in range(x.shape[dim])))


@rule("select")
def select(x: Any, dim: int, index: int) -> Any:
    at = _negative(dim, x.ndim)
    return _view(x, lambda s: s.select(at, index))


@rule("narrow")
def narrow(x: Any, dim: int, start: int, length: int) -> Any:
    at = _negative(dim, x.ndim)
    return _view(x, lambda s: s.narrow(at, start, length))


@rule("diagonal", "linalg_diagonal", torch.linalg.diagonal)
def diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    a, b = _negative(dim1, x.ndim), _negative(dim2, x.ndim)
    return _view(x, lambda s: s.diagonal(offset, a, b))


# ---- indexing


@rule("__getitem__")
def getitem(x: Any, index: Any) -> Any:
    where = _trailing(index, x.ndim)
    return _view(x, lambda s: s[where])


@rule("__setitem__")
def setitem(x: Any, index: Any, value: Any) -> None:
    if constant(x):
        write(x, value, "x[...] = value")
    where = _trailing(index, x.ndim)
    target = x[index].shape if False else torch.empty(x.shape, device="meta")[_meta(index)].shape
    value = value if not constant(value) else torch.as_tensor(value, dtype=x.dtype, device=x.device)
    value = value.expand(target)

    def fn(parts: list[Tensor]) -> Tensor:
        out = parts[0].clone()
        out[where] = parts[1]
        return out

    write(x, kind_of(x, value).join(fn, [x, value]), "x[...] = value")


def _meta(index: Any) -> Any:
    """The index, fit for a tensor that has a shape alone."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(isinstance(p, Tensor) and p.dtype == torch.bool for p in parts):
        raise TypeError("x[mask] = value: use torch.where(mask, value, x)")
    return tuple(p.to("meta") if isinstance(p, Tensor) else p for p in parts)


def _trailing(index: Any, ndim: int) -> tuple[Any, ...]:
    """The index for a tensor with further leading dims."""
    parts = index if isinstance(index, tuple) else (index,)
    if any(p is Ellipsis for p in parts):
        at = next(i for i, p in enumerate(parts) if p is Ellipsis)
        used = sum(_consumes(p) for p in parts if p is not Ellipsis)
        fill = (slice(None),) * (ndim - used)
        return (Ellipsis, *parts[:at], *fill, *parts[at + 1 :])
    used = sum(_consumes(p) for p in parts)
    return (Ellipsis, *parts, *(slice(None),) * (ndim - used))


def _consumes(part: Any) -> int:
    """How many dims one entry of an index takes."""
    if part is None or isinstance(part, bool):
        return 0
    if isinstance(part, Tensor) and part.dtype == torch.bool:
        return part.ndim
    return 1


@rule("index_select")
def index_select(x: Any, dim: int, index: Tensor) -> Any:
    at = _negative(dim, x.ndim)
    return x.linear(lambda s: s.index_select(s.ndim + at, index))


@rule("gather")
def gather(x: Any, dim: int, index: Tensor, **_: Any) -> Any:
    at, n = _negative(dim, x.ndim), x.ndim
    return x.linear(lambda s: s.gather(s.ndim + at, index.expand(*_lead(s, n), *index.shape)))


@rule("take_along_dim")
def take_along_dim(x: Any, indices: Tensor, dim: int | None = None) -> Any:
    if dim is None:
        return take_along_dim(flatten(x), indices.flatten(), 0)
    at, n = _negative(dim, x.ndim), x.ndim
    return x.linear(lambda s: s.take_along_dim(indices.expand(*_lead(s, n), *indices.shape), s.ndim + at))


@rule("flip")
def flip(x: Any, *dims: Any) -> Any:
    at = [_negative(d, x.ndim) for d in _sizes(dims)]
    return x.linear(lambda s: s.flip(at))


@rule("roll")
def roll(x: Any, shifts: Any, dims: Any = None) -> Any:
    if dims is None or dims == ():
        return reshape(roll(flatten(x), shifts, 0), *x.shape)
    at = [_negative(d, x.ndim) for d in ([dims] if isinstance(dims, int) else dims)]
    by = [shifts] if isinstance(shifts, int) else list(shifts)
    return x.linear(lambda s: s.roll(by, [s.ndim + d for d in at]))


@rule("tril")
def tril(x: Any, diagonal: int = 0) -> Any:
    return x.linear(lambda s: s.tril(diagonal))


@rule("triu")
def triu(x: Any, diagonal: int = 0) -> Any:
    return x.linear(lambda s: s.triu(diagonal))


@rule("diag_embed")
def diag_embed(x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    a, b = _negative(dim1, x.ndim + 1), _negative(dim2, x.ndim + 1)
    return x.linear(lambda s: s.diag_embed(offset, a, b))


# ---- joining


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Any], dim: int = 0) -> Any:
    parts = [x for x in tensors if x.shape != (0,)]  # torch ignores such
    at = _negative(dim, parts[0].ndim)
    return kind_of(*parts).join(lambda stacks: torch.cat(stacks, at), parts)


@rule("stack")
def stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    at = dim if dim < 0 else dim - tensors[0].ndim - 1
    return kind_of(*tensors).join(lambda stacks: torch.stack(stacks, at), list(tensors))


@rule("hstack")
def hstack(tensors: Sequence[Any]) -> Any:
    return cat(tensors, 0 if tensors[0].ndim == 1 else 1)


@rule("where")
def where(condition: Any, x: Any, y: Any) -> Any:
    if not constant(condition):
        condition = condition.value
    like = x if not constant(x) else y
    kind = kind_of(x, y)
    a, b = (p if not constant(p) else torch.as_tensor(p, device=like.device) for p in (x, y))
    a, b = (p.to(like.dtype) if constant(p) else p for p in (a, b))
    shape = torch.broadcast_shapes(condition.shape, a.shape, b.shape)
    return kind.join(lambda s: torch.where(condition, *s), [a.expand(shape), b.expand(shape)])


@rule("masked_fill")
def masked_fill(x: Any, mask: Tensor, value: Any) -> Any:
    return where(mask, torch.as_tensor(value, dtype=x.dtype, device=x.device), x)


# ---- copies and casts


@rule("clone", "contiguous")
def clone(x: Any, *_: Any, **__: Any) -> Any:
    return x.linear(lambda s: s.clone())


@rule("to")
def to(x: Any, *args: Any, **kwargs: Any) -> Any:
    return x.linear(lambda s: s.to(*args, **kwargs))


def _cast(name: str) -> Any:
    return lambda x, *args, **kwargs: x.linear(lambda s: getattr(s, name)(*args, **kwargs))


for _name in ("float", "double", "half", "bfloat16", "cpu", "cuda", "type_as"):
    rule(_name)(_cast(_name))

RULES[Tensor.view_as] = RULES[Tensor.reshape_as]
