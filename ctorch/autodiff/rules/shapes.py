"""Rules of functions that arrange elements anew: linear, and most of them views."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._propagated import (
    Propagated,
    aliased,
    constant,
    kind_of,
    rule,
    value_of,
    write,
)
from ctorch.autodiff.rules._common import (
    lead_of,
    negative,
    negatives,
    scalars_too,
    sizes_of,
    unpacked,
)


def view(x: Any, fn: Any) -> Any:
    """A linear function whose result shares memory with ``x``, in torch."""
    return aliased(x, x.linear(fn))


@rule("reshape", "view", "_unsafe_view", "_reshape_alias")
def reshape(x: Any, *shape: Any, size: Any = None, **named: Any) -> Any:
    if size is None:
        size = named.get("shape")
    if size is not None:
        shape = (size,)
    if len(shape) == 1 and isinstance(shape[0], torch.dtype):
        raise TypeError("view(dtype) of a value that carries derivatives")
    n = x.ndim
    target = _filled(sizes_of(shape), x)
    return view(x, lambda s: s.reshape((*s.shape[: s.ndim - n], *target)))


def _filled(sizes: tuple[int, ...], x: Any) -> tuple[int, ...]:
    """Sizes with the one that was left open."""
    if -1 not in sizes:
        return sizes
    known = math.prod(size for size in sizes if size != -1)
    return tuple(x.numel() // max(known, 1) if size == -1 else size for size in sizes)


@rule("reshape_as", "view_as")
def reshape_as(x: Any, other: Any) -> Any:
    return torch.reshape(x, tuple(other.shape))


@rule("ravel")
def ravel(x: Any) -> Any:
    return reshape(x, -1)


@rule("flatten")
def flatten(x: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    if x.ndim == 0:
        return reshape(x, 1)
    first, last = negative(start_dim, x.ndim), negative(end_dim, x.ndim)
    return view(x, lambda s: s.flatten(first, last))


@rule("unflatten")
def unflatten(x: Any, dim: int, sizes: Sequence[int]) -> Any:
    at = negative(dim, x.ndim)
    return view(x, lambda s: s.unflatten(at, sizes))


@rule("transpose", "swapaxes", "swapdims", torch.Tensor.transpose)
def transpose(x: Any, dim0: int, dim1: int) -> Any:
    a, b = negative(dim0, x.ndim), negative(dim1, x.ndim)
    return view(x, lambda s: s.transpose(a, b))


@rule("t")
def t(x: Any) -> Any:
    return transpose(x, 0, 1) if x.ndim == 2 else view(x, lambda s: s.view_as(s))


@rule("permute")
def permute(x: Any, *dims: Any, **named: Any) -> Any:
    dims = sizes_of((named["dims"],) if named else dims)
    order, n = [negative(d, x.ndim) for d in dims], x.ndim
    return view(x, lambda s: s.permute((*range(s.ndim - n), *(s.ndim + d for d in order))))


@rule("movedim", "moveaxis")
def movedim(x: Any, source: Any, destination: Any) -> Any:
    froms, tos = negatives(source, x.ndim), negatives(destination, x.ndim)
    return view(x, lambda s: s.movedim(froms, tos))


@rule("adjoint")
def adjoint(x: Any) -> Any:
    return torch.conj(transpose(x, -1, -2)) if x.dtype.is_complex else transpose(x, -1, -2)


def _reversed(x: Any) -> Any:
    return permute(x, *reversed(range(x.ndim))) if x.ndim != 2 else transpose(x, 0, 1)


Propagated.mT = property(lambda x: transpose(x, -1, -2))  # type: ignore[attr-defined]
Propagated.mH = property(adjoint)  # type: ignore[attr-defined]
Propagated.T = property(_reversed)  # type: ignore[attr-defined]
Propagated.H = property(adjoint)  # type: ignore[attr-defined]


@rule("unsqueeze")
def unsqueeze(x: Any, dim: int) -> Any:
    at = dim if dim < 0 else dim - x.ndim - 1
    return view(x, lambda s: s.unsqueeze(at))


@rule("squeeze")
def squeeze(x: Any, dim: Any = None) -> Any:
    drop = set(negatives(dim, x.ndim)) if x.ndim and dim != () else set()
    keep = [size for i, size in enumerate(x.shape) if i - x.ndim not in drop or size != 1]
    return reshape(x, keep)


@rule("expand", "broadcast_to")
def expand(x: Any, *sizes: Any, size: Any = None, implicit: bool = False) -> Any:
    sizes, n = sizes_of(sizes) if size is None else tuple(size), x.ndim
    extra = len(sizes) - n
    target = tuple(x.shape[i - extra] if size == -1 else size for i, size in enumerate(sizes))

    def fn(s: Tensor) -> Tensor:
        lead = lead_of(s, n)
        if extra:
            s = s.reshape((*lead, *(1,) * extra, *s.shape[len(lead) :]))
        return s.expand((*lead, *target))

    return view(x, fn)


@rule("expand_as")
def expand_as(x: Any, other: Any) -> Any:
    return torch.broadcast_to(x, tuple(other.shape))


@rule("full")
def full(size: Any, fill_value: Any, *, dtype: Any = None, **_: Any) -> Any:
    filled = fill_value.expand(tuple(size)).clone()
    return filled if dtype is None else filled.to(dtype)


@rule("full_like")
def full_like(x: Any, fill_value: Any, *, dtype: Any = None, **kwargs: Any) -> Any:
    if isinstance(fill_value, Propagated):
        return full(x.shape, fill_value, dtype=dtype or x.dtype)
    return torch.full_like(value_of(x), fill_value, dtype=dtype, **kwargs)


@rule("new_full")
def new_full(x: Any, size: Any, fill_value: Any, *, dtype: Any = None, **kwargs: Any) -> Any:
    if isinstance(fill_value, Propagated):
        return full(size, fill_value, dtype=dtype or x.dtype)
    return value_of(x).new_full(size, fill_value, dtype=dtype, **kwargs)


@rule("new_tensor")
def new_tensor(x: Any, data: Any, **kwargs: Any) -> Any:
    if isinstance(data, Propagated):
        raise TypeError("new_tensor would drop the derivatives of its data; use torch.stack")
    return value_of(x).new_tensor(data, **kwargs)


@rule("broadcast_tensors", torch.functional.broadcast_tensors)
def broadcast_tensors(*tensors: Any) -> Any:
    tensors = unpacked(tensors)
    shape = broadcast_shapes(*(x.shape for x in tensors))
    return tuple(x if x.shape == shape else x.expand(shape) for x in tensors)


def _atleast(name: str, ndim: int, places: tuple[tuple[int, ...], ...]) -> None:
    def one(x: Any) -> Any:
        for at in places[x.ndim] if x.ndim < ndim else ():
            x = x.unsqueeze(at)
        return x

    def apply(*tensors: Any) -> Any:
        tensors = unpacked(tensors)
        return one(tensors[0]) if len(tensors) == 1 else tuple(one(x) for x in tensors)

    rule(name)(apply)


_atleast("atleast_1d", 1, ((0,),))
_atleast("atleast_2d", 2, ((0, 0), (0,)))
_atleast("atleast_3d", 3, ((0, 0, 0), (0, -1), (-1,)))


@rule("repeat")
def repeat(x: Any, *sizes: Any, **named: Any) -> Any:
    times, n = sizes_of(sizes if sizes else (named["repeats"],)), x.ndim
    extra = max(0, len(times) - n)

    def fn(s: Tensor) -> Tensor:
        lead = lead_of(s, n)
        s = s.reshape((*lead, *(1,) * extra, *s.shape[len(lead) :]))
        return s.repeat((*(1,) * len(lead), *times))

    return x.linear(fn)


@rule("tile")
def tile(x: Any, *dims: Any, **named: Any) -> Any:
    times = sizes_of(dims if dims else (named["dims"],))
    return repeat(x, (1,) * (x.ndim - len(times)) + times)


@rule("repeat_interleave")
def repeat_interleave(x: Any, repeats: Any, dim: int | None = None, **_: Any) -> Any:
    if dim is None:
        return repeat_interleave(flatten(x), repeats, 0)
    index = torch.arange(x.shape[dim], device=x.device).repeat_interleave(repeats)
    return torch.index_select(x, dim, index)


@rule("chunk")
def chunk(x: Any, chunks: int, dim: int = 0) -> Any:
    return split(x, max(1, -(-x.shape[dim] // chunks)), dim)


@rule("split", torch.functional.split)
def split(x: Any, split_size_or_sections: Any, dim: int = 0) -> Any:
    given, size, at = split_size_or_sections, x.shape[dim], negative(dim, x.ndim)
    if isinstance(given, int):
        given = [min(given, size - i) for i in range(0, size, given)] or [0]
    parts, begin = [], 0
    for length in given:
        parts.append(x.linear(lambda s, b=begin, n=length: s.narrow(at, b, n)))
        begin += length
    return aliased(x, tuple(parts))


@rule("split_with_sizes")
def split_with_sizes(x: Any, split_sizes: Any, dim: int = 0) -> Any:
    return split(x, split_sizes, dim)


@rule("tensor_split")
def tensor_split(x: Any, indices_or_sections: Any = None, dim: int = 0, **named: Any) -> Any:
    given = indices_or_sections
    if given is None:
        given = named.get("indices", named.get("sections"))
    if isinstance(given, Tensor):
        given = given.tolist()
    n, at = x.shape[dim], negative(dim, x.ndim)
    if isinstance(given, int):
        small, more = divmod(n, given)
        given = [small * i + min(i, more) for i in range(1, given)]
    ends = [0, *(slice(None, i).indices(n)[1] for i in given), n]
    pairs = itertools.pairwise(ends)
    return aliased(x, tuple(x.narrow(at, a, max(b - a, 0)) for a, b in pairs))


def _split_at(name: str, dim_of: Any) -> None:
    rule(name)(lambda x, given: tensor_split(x, given, dim_of(x)))


_split_at("hsplit", lambda x: 0 if x.ndim == 1 else 1)
_split_at("vsplit", lambda x: 0)
_split_at("dsplit", lambda x: 2)


@rule("unbind")
def unbind(x: Any, dim: int = 0) -> Any:
    at = negative(dim, x.ndim)
    return aliased(x, tuple(x.linear(lambda s, i=i: s.select(at, i)) for i in range(x.shape[dim])))


@rule("select")
def select(x: Any, dim: int, index: int) -> Any:
    at = negative(dim, x.ndim)
    return view(x, lambda s: s.select(at, index))


@rule("narrow")
def narrow(x: Any, dim: int, start: Any, length: int) -> Any:
    at, start = negative(dim, x.ndim), int(start)
    return view(x, lambda s: s.narrow(at, start, length))


@rule("diagonal", torch.linalg.diagonal)
def diagonal(x: Any, offset: int = 0, dim1: int = 0, dim2: int = 1) -> Any:
    a, b = negative(dim1, x.ndim), negative(dim2, x.ndim)
    return view(x, lambda s: s.diagonal(offset, a, b))


@rule(torch.linalg.diagonal)
def linalg_diagonal(x: Any, *, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    return diagonal(x, offset, dim1, dim2)


@rule("diag_embed")
def diag_embed(x: Any, offset: int = 0, dim1: int = -2, dim2: int = -1) -> Any:
    a, b = negative(dim1, x.ndim + 1), negative(dim2, x.ndim + 1)
    return x.linear(lambda s: s.diag_embed(offset, a, b))


@rule("diag")
def diag(x: Any, diagonal_: int = 0, **named: Any) -> Any:
    offset = named.get("diagonal", diagonal_)
    return diag_embed(x, offset) if x.ndim == 1 else diagonal(x, offset)


@rule("diagflat")
def diagflat(x: Any, offset: int = 0) -> Any:
    return diag_embed(reshape(x, -1), offset)


@rule("unfold")
def unfold(x: Any, dimension: int, size: int, step: int) -> Any:
    if x.ndim == 0:
        return reshape(x, 1)
    at = negative(dimension, x.ndim)
    return view(x, lambda s: s.unfold(s.ndim + at, size, step).contiguous())


@rule("flip")
@scalars_too
def flip(x: Any, *dims: Any, **named: Any) -> Any:
    at = [negative(d, x.ndim) for d in sizes_of(dims if dims else (named["dims"],))]
    return x.linear(lambda s: s.flip(at))


@rule("fliplr")
def fliplr(x: Any) -> Any:
    return flip(x, 1)


@rule("flipud")
def flipud(x: Any) -> Any:
    return flip(x, 0)


@rule("rot90")
def rot90(x: Any, k: int = 1, dims: Sequence[int] = (0, 1)) -> Any:
    a, b = dims
    if k % 4 == 0:
        return clone(x)
    if k % 4 == 2:
        return flip(x, a, b)
    return flip(transpose(x, a, b), a if k % 4 == 1 else b)


@rule("roll")
def roll(x: Any, shifts: Any, dims: Any = None) -> Any:
    if dims is None or dims == ():
        return reshape(roll(flatten(x), shifts, 0), tuple(x.shape))
    at = negatives(dims, x.ndim)
    by = [shifts] * len(at) if isinstance(shifts, int) else list(shifts)
    return x.linear(lambda s: s.roll(by, [s.ndim + d for d in at]))


@rule("tril")
def tril(x: Any, diagonal: int = 0) -> Any:
    return x.linear(lambda s: s.tril(diagonal))


@rule("triu")
def triu(x: Any, diagonal: int = 0) -> Any:
    return x.linear(lambda s: s.triu(diagonal))


# ---- joining


@rule("cat", "concat", "concatenate")
def cat(tensors: Sequence[Any], dim: int = 0, **named: Any) -> Any:
    parts = [x for x in tensors if x.shape != (0,)]  # torch ignores such
    if all(map(constant, parts)):
        return torch.cat([value_of(x) for x in tensors], named.get("axis", dim))
    at = negative(named.get("axis", dim), parts[0].ndim)
    return kind_of(*parts).join(lambda stacks: torch.cat(stacks, at), parts)


@rule("stack")
def stack(tensors: Sequence[Any], dim: int = 0) -> Any:
    at = dim if dim < 0 else dim - tensors[0].ndim - 1
    return kind_of(*tensors).join(lambda stacks: torch.stack(stacks, at), list(tensors))


@rule("hstack")
def hstack(tensors: Sequence[Any]) -> Any:
    parts = torch.atleast_1d(tuple(tensors))
    return cat(parts, 0 if parts[0].ndim == 1 else 1)


@rule("vstack", "row_stack")
def vstack(tensors: Sequence[Any]) -> Any:
    return cat([torch.atleast_2d(x) for x in tensors], 0)


@rule("dstack")
def dstack(tensors: Sequence[Any]) -> Any:
    return cat([torch.atleast_3d(x) for x in tensors], 2)


@rule("column_stack")
def column_stack(tensors: Sequence[Any]) -> Any:
    return cat([x.reshape(x.numel(), 1) if x.ndim < 2 else x for x in tensors], 1)


# ---- copies and casts


@rule("clone")
def clone(x: Any, *_: Any, **__: Any) -> Any:
    return x.linear(lambda s: s.clone())


@rule("contiguous")
def contiguous(x: Any, **_: Any) -> Any:
    return view(x, lambda s: s.contiguous())


@rule("alias")
def alias(x: Any) -> Any:
    return view(x, lambda s: s)


@rule("to")
def to(x: Any, *args: Any, **kwargs: Any) -> Any:
    if args and not isinstance(args[0], (torch.dtype, torch.device, str, int)):
        args = (value_of(args[0]), *args[1:])  # to(other)
    return _cast("to")(x, *args, **kwargs)


def _cast(name: str) -> Any:
    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        if constant(x):
            return getattr(x, name)(*map(value_of, args), **kwargs)
        kwargs.pop("memory_format", None)  # of so many dims, which stacks have not
        args = tuple(value_of(a) for a in args)
        return view(x, lambda s: getattr(s, name)(*args, **kwargs))

    return apply


for _name in ("float", "double", "half", "bfloat16", "cfloat", "cdouble", "cpu", "cuda", "type_as"):
    rule(_name)(_cast(_name))


@rule("zero_")
def zero_(x: Any) -> Any:
    return write(x, torch.zeros_like(x.value), "zero_")


@rule("fill_")
def fill_(x: Any, value: Any) -> Any:
    return copy_(
        x, torch.full_like(value_of(x), value) if isinstance(value, (int, float)) else value
    )


@rule("copy_")
def copy_(x: Any, source: Any, non_blocking: bool = False) -> Any:
    if source.shape != x.shape:
        source = source.expand(x.shape)
    return write(x, source, "copy_")
