"""What rules have in common: dims counted from the end, leading dims, masks, broadcasting."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._propagated import constant, in_place, kind_of, value_of

Function = Callable[..., Any]


# ---- dims


def negative(dim: int, ndim: int) -> int:
    """A dim counted from the end, so that leading dims do not matter."""
    if not -max(ndim, 1) <= dim < max(ndim, 1):
        raise IndexError(f"dim: expected -{ndim} to {ndim - 1}, got {dim}")
    return dim if dim < 0 else dim - ndim


def negatives(dim: Any, ndim: int) -> list[int]:
    """The dims meant by a reduction's argument, counted from the end; None or () means all."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return list(range(-ndim, 0))
    return [negative(d, ndim) for d in ([dim] if isinstance(dim, int) else dim)]


def sizes_of(sizes: Any) -> tuple[int, ...]:
    """Sizes that were given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else tuple(sizes)


def unpacked(tensors: tuple[Any, ...]) -> tuple[Any, ...]:
    """Tensors that were given one by one or as one sequence."""
    if len(tensors) == 1 and isinstance(tensors[0], (tuple, list)):
        return tuple(tensors[0])
    return tensors


def lead_of(stack: Tensor, ndim: int) -> tuple[int, ...]:
    """The sizes of the dims ahead of the last ``ndim``."""
    return tuple(stack.shape[: stack.ndim - ndim])


def on_batch(fn: Function, event: int) -> Function:
    """``fn`` of ``[N, *event dims]`` as a function of any number of dims ahead of the event's."""

    def apply(s: Tensor) -> Tensor:
        lead = lead_of(s, event)
        if len(lead) == 1:
            return fn(s)
        y = fn(s.reshape(math.prod(lead), *s.shape[len(lead) :]))
        return y.reshape((*lead, *y.shape[1:]))

    return apply


def on_each(fn: Function, *ndims: int) -> Function:
    """``fn`` of tensors with ``ndims`` dims, for each index of their shared leading dims."""

    def apply(*tensors: Tensor) -> Tensor:
        lead = lead_of(tensors[0], ndims[0])
        count = math.prod(lead)
        flat = [
            t.reshape(count, *t.shape[t.ndim - n :]) for t, n in zip(tensors, ndims, strict=True)
        ]
        y = torch.stack([fn(*parts) for parts in zip(*flat, strict=True)])
        return y.reshape((*lead, *y.shape[1:]))

    return apply


def two(fn: Function, a: Any, b: Any) -> Any:
    """A bilinear ``fn`` that takes no leading dims, of values either of which may be constant."""
    if constant(a) and constant(b):
        return fn(a, b)
    if constant(b):
        return a.linear(on_each(lambda s: fn(s, b), a.ndim))
    if constant(a):
        return b.linear(on_each(lambda s: fn(a, s), b.ndim))
    return kind_of(a, b).bilinear(on_each(fn, a.ndim, b.ndim), a, b)


def scalars_too(function: Function) -> Function:
    """The rule of a function along dims, for values without any: to torch, vectors of one."""

    @wraps(function)
    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        if x.ndim or constant(x):
            return function(x, *args, **kwargs)
        y = function(x.reshape(1), *args, **kwargs)
        if isinstance(y, tuple):
            parts = [part.reshape(()) for part in y]
            return type(y)(parts)
        return y.reshape(())

    return apply


# ---- constants and masks


def as_tensor(x: Any, like: Any) -> Any:
    """A number as a tensor on the device, and of the dtype, of a value; others as they are."""
    if isinstance(x, Tensor) or not constant(x):
        return x
    return torch.as_tensor(x, dtype=like.dtype, device=like.device)


def masked(x: Any, mask: Tensor) -> Any:
    """``x`` where the mask holds, zero elsewhere; the mask has the shape of ``x``."""
    return x.linear(lambda s: torch.where(mask, s, torch.zeros_like(s)))


def scaled(x: Any, factor: Tensor) -> Any:
    """``x`` times a constant that does not broadcast it up."""
    return x.linear(lambda s: s * factor)


def numbers(mask: Tensor, a: float, b: float, dtype: torch.dtype) -> Tensor:
    """``a`` where the mask holds and ``b`` elsewhere; ``torch.where`` would make them float32."""
    like = torch.empty((), dtype=dtype, device=mask.device)
    return torch.where(mask, torch.full_like(like, a), torch.full_like(like, b))


def finite(x: Tensor) -> Tensor:
    """The tensor with zeros for what is infinite or NaN, as a constant."""
    x = x.detach()
    return torch.where(torch.isfinite(x), x, torch.zeros_like(x))


def without_derivatives(function: Function) -> Function:
    """The rule of a function whose derivatives are zero, or do not exist: of the values alone."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_values(a) for a in args)
        return function(*args, **{name: value_of(a) for name, a in kwargs.items()})

    apply.constant = True  # type: ignore[attr-defined]  # may be called where nothing is recorded
    return apply


def _values(x: Any) -> Any:
    return type(x)(map(value_of, x)) if type(x) in (tuple, list) else value_of(x)


# ---- elementwise functions


def compose(x: Any, coefficient: Callable[[int], Tensor]) -> Any:
    """``f(x)`` from the Taylor coefficients ``f^(n)(value) / n!`` of f: for what has no recurrence.

    The change of x is nilpotent, so that the series ends with x's order.
    """
    change = x.shift(-x.value)
    top = int(x.order)
    if top == 0:
        return change.shift(coefficient(0))
    y = scaled(change, coefficient(top))
    for n in range(top - 1, 0, -1):
        y = y.shift(coefficient(n)).times(change)
    return y.shift(coefficient(0))


def root(x: Any, p: float) -> Any:
    """``x^(1/p)``; zero with its derivatives where x is zero, as torch's subgradients of norms."""
    used = value_of(x).detach() != 0  # NaN stays NaN
    safe = torch.where(used, x, 1.0)
    root = torch.sqrt(safe) if p == 2 else safe ** (1 / p)
    return torch.where(used, root, 0.0)


def inplace_flag(function: Function) -> Function:
    """Gives the rule of an activation its argument ``inplace``, at the place torch has it."""
    own = inspect.signature(function).parameters
    names = [*own, "inplace"]
    write = in_place(function)

    @wraps(function)
    def apply(*args: Any, **kwargs: Any) -> Any:
        if len(args) == len(names):
            *args, inplace = args  # type: ignore[assignment]
        else:
            inplace = kwargs.pop("inplace", False)
        return write(*args, **kwargs) if inplace else function(*args, **kwargs)

    flag = inspect.Parameter("inplace", inspect.Parameter.KEYWORD_ONLY, default=False)
    apply.__signature__ = inspect.Signature([*own.values(), flag])  # type: ignore[attr-defined]
    return apply


def total(parts: Sequence[Any]) -> Any:
    """The sum of some values."""
    result = parts[0]
    for part in parts[1:]:
        result = result + part
    return result
