"""Rules of reductions and scans."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._propagated import constant, rule, value_of
from ctorch.autodiff.rules._common import negative, negatives, root, scalars_too


def _linear_reduction(name: str) -> None:
    def apply(
        x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, axis: Any = None
    ) -> Any:
        dims = negatives(dim if axis is None else axis, x.ndim)
        if not dims:
            return x.linear(lambda s: s.clone())
        return x.linear(lambda s: getattr(s, name)(dims, keepdim=keepdim, dtype=dtype))

    rule(name)(scalars_too(apply))


_linear_reduction("sum")
_linear_reduction("mean")


def _over_numbers(name: str) -> None:
    """nansum and nanmean: over what is not NaN."""

    def apply(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        good = ~x.value.detach().isnan()
        total = torch.where(good, x, 0.0).sum(dim, keepdim, dtype=dtype)
        if name == "nansum":
            return total
        dims = negatives(dim, x.ndim)
        return total / good.sum(dims, keepdim=keepdim)

    rule(name)(scalars_too(apply))


_over_numbers("nansum")
_over_numbers("nanmean")


def _scan(name: str) -> None:
    def apply(x: Any, dim: int, *, dtype: Any = None) -> Any:
        at = negative(dim, x.ndim)
        return x.linear(lambda s: getattr(s, name)(s.ndim + at, dtype=dtype))

    rule(name)(scalars_too(apply))


_scan("cumsum")


@rule("diff")
def diff(x: Any, n: int = 1, dim: int = -1, prepend: Any = None, append: Any = None) -> Any:
    if n == 0:  # torch does not look at the ends then
        return torch.clone(x)
    ends = [part for part in (prepend, x, append) if part is not None]
    if len(ends) > 1:
        x = torch.cat(ends, dim)
    at = negative(dim, x.ndim)
    return x.linear(lambda s: s.diff(n, s.ndim + at))


@rule("gradient")
def gradient(x: Any, *, spacing: Any = None, dim: Any = None, edge_order: int = 1) -> Any:
    dims = negatives(dim, x.ndim)
    if spacing is None or isinstance(spacing, (int, float)):
        spacing = (1 if spacing is None else spacing,) * len(dims)
    if constant(x) or not all(map(constant, spacing)):
        raise NotImplementedError("gradient: a spacing that carries derivatives has no rule")

    def along(at: int, step: Any) -> Any:
        step = (step,) if isinstance(step, Tensor) else step
        return x.linear(
            lambda s: torch.gradient(s, spacing=step, dim=s.ndim + at, edge_order=edge_order)[0]
        )

    return tuple(along(at, step) for at, step in zip(dims, spacing, strict=True))


@rule("trapezoid", "trapz")
def trapezoid(y: Any, x: Any = None, *, dx: Any = 1, dim: int = -1) -> Any:
    return (_panels(y, x, dx, dim)).sum(dim)


@rule("cumulative_trapezoid")
def cumulative_trapezoid(y: Any, x: Any = None, *, dx: Any = 1, dim: int = -1) -> Any:
    return (_panels(y, x, dx, dim)).cumsum(dim)


def _panels(y: Any, x: Any, dx: Any, dim: int) -> Any:
    n = y.shape[dim]
    means = (y.narrow(dim, 0, n - 1) + y.narrow(dim, 1, n - 1)) / 2
    if x is None:
        return means * dx
    if x.ndim == 1 and y.ndim > 1:
        at = negative(dim, y.ndim)
        x = x.reshape(-1, *(1,) * (-1 - at))
        return means * torch.diff(x, 1, at)
    return means * torch.diff(x, 1, dim)


# ---- products, pairwise: right where a factor is zero, too


@rule("prod")
@scalars_too
def prod(x: Any, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if dtype is not None:
        x = x.to(dtype)
    if dim is None:
        return prod(x.reshape(-1), 0)
    n, at = x.shape[dim], negative(dim, x.ndim)
    if n == 0:
        return torch.prod(x.value, dim, keepdim)
    while n > 1:
        half = n // 2
        y = x.narrow(at, 0, half) * x.narrow(at, half, half)
        x = torch.cat([y, x.narrow(at, 2 * half, 1)], at) if n % 2 else y
        n = n - half
    return x if keepdim else x.squeeze(at)


def _doubling_scan(x: Any, dim: int, combine: Any) -> Any:
    """Prefix results of an associative function, in log2(n) steps."""
    n, step, at = x.shape[dim], 1, negative(dim, x.ndim)
    while step < n:
        head = x.narrow(at, 0, step)
        rest = combine(x.narrow(at, 0, n - step), x.narrow(at, step, n - step))
        x = torch.cat([head, rest], at)
        step *= 2
    return x


@rule("cumprod")
def cumprod(x: Any, dim: int, *, dtype: Any = None) -> Any:
    if dtype is not None:
        x = x.to(dtype)
    return _doubling_scan(x, dim, torch.mul) if x.ndim else x


@rule("logcumsumexp")
def logcumsumexp(x: Any, dim: int) -> Any:
    return _doubling_scan(x, dim, torch.logaddexp) if x.ndim else x


# ---- moments


def _spread(x: Any, dim: Any, keepdim: bool, unbiased: bool, correction: Any) -> tuple[Any, Any]:
    if correction is None:
        correction = 1 if unbiased else 0
    dims = negatives(dim, x.ndim)
    count = math.prod(x.shape[d] for d in dims)
    mean = x.mean(dims, keepdim=True)
    square = torch.square(x - mean).sum(dims, keepdim=keepdim)
    mean = mean if keepdim else mean.squeeze(tuple(dims))
    return square / max(count - correction, 0), mean


def _moment(name: str, of: Any) -> None:
    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args and isinstance(args[0], bool):  # var(x, unbiased)
            args = (None, args[0], *args[1:])
        elif len(args) > 1:  # var(x, dim, unbiased, keepdim)
            args = args[:3]
        given = dict(zip(("dim", "unbiased", "keepdim"), args, strict=False)) | kwargs
        dim = given.get("dim", given.get("axis"))
        keepdim = bool(given.get("keepdim", False))
        return of(*_spread(x, dim, keepdim, given.get("unbiased", True), given.get("correction")))

    rule(name)(scalars_too(apply))


_moment("var", lambda square, mean: square)
_moment("std", lambda square, mean: root(square, 2))
_moment("var_mean", lambda square, mean: (square, mean))
_moment("std_mean", lambda square, mean: (root(square, 2), mean))


# ---- order statistics: the place is that of the value


def pick(x: Any, dim: int, keepdim: bool, index: Tensor) -> Any:
    """The element at an index (of the reduced shape) along a dim."""
    if x.ndim == 0:
        return torch.clone(x)
    at = negative(dim, x.ndim)
    picked = x.take_along_dim(index if keepdim else index.unsqueeze(at), at)
    return picked if keepdim else picked.squeeze(at)


def _extreme(name: str, of_two: Any) -> None:
    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, Tensor) or not constant(other):
            return of_two(x, other)
        if not args and "dim" not in kwargs:
            flat = x.reshape(-1)
            return pick(flat, 0, False, getattr(flat.value, f"arg{name}")(0))
        return _indexed(name)(x, *args, **kwargs)

    rule(name)(apply)


def _indexed(name: str) -> Any:
    """A function that returns elements and their places along ``dim``."""
    kind = getattr(torch.return_types, name)

    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        function = getattr(torch, name)
        _, index = function(value_of(x).detach(), *args, **kwargs)
        dim = kwargs.get("dim", args[-1] if args and name in _DIM_LAST else None)
        if dim is None:
            dim = args[_DIM_AT[name]] if len(args) > _DIM_AT[name] else -1
        same_ndim = index.ndim == x.ndim
        return kind((pick(x, dim, same_ndim, index), index))

    return apply


_DIM_LAST: tuple[str, ...] = ()
_DIM_AT = {
    **dict.fromkeys(("max", "min", "median", "nanmedian", "mode", "cummax", "cummin", "sort"), 0),
    **dict.fromkeys(("kthvalue", "topk"), 1),
}
_extreme("max", torch.maximum)
_extreme("min", torch.minimum)
for _name in ("mode", "cummax", "cummin", "kthvalue", "topk"):
    rule(_name)(_indexed(_name))


def _median(name: str) -> None:
    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return _indexed(name)(x, *args, **kwargs)
        return _indexed(name)(x.reshape(-1), 0)[0]

    rule(name)(apply)


_median("median")
_median("nanmedian")


@rule("sort")
def sort(x: Any, dim: int = -1, descending: bool = False, *, stable: bool = False) -> Any:
    _, index = torch.sort(x.value.detach(), dim=dim, descending=descending, stable=stable)
    return torch.return_types.sort((pick(x, dim, True, index), index))


@rule("msort")
def msort(x: Any) -> Any:
    return sort(x, 0)[0]


def _unique(name: str) -> None:
    """Elements without repetition: those that come first."""
    function = getattr(torch.functional, name)
    names = ("sorted", "return_inverse", "return_counts", "dim")[name != "unique" :]

    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        asked = [given.pop(key, False) for key in ("return_inverse", "return_counts")]
        value, dim = x.value.detach(), given.get("dim")
        _, inverse, counts = function(value, return_inverse=True, return_counts=True, **given)
        places = inverse.reshape(-1)
        first = torch.full(counts.shape, len(places), device=places.device)
        first = first.scatter_reduce(
            0, places, torch.arange(len(places), device=places.device), "amin"
        )
        y = x.reshape(-1)[first] if dim is None else torch.index_select(x, dim, first)
        more = [part for part, wanted in zip((inverse, counts), asked, strict=True) if wanted]
        return (y, *more) if more else y

    rule(function, getattr(Tensor, name))(apply)


_unique("unique")
_unique("unique_consecutive")


def _extreme_over_dims(name: str, arg: str) -> None:
    def apply(x: Any, dim: Any = (), keepdim: bool = False) -> Any:
        dims = negatives(dim, x.ndim)
        if not dims:
            return x
        kept = [d for d in range(-x.ndim, 0) if d not in dims]
        sizes = [x.shape[d] for d in kept]
        flat = x.permute(*kept, *dims).reshape([*sizes, math.prod(x.shape[d] for d in dims)])
        y = pick(flat, -1, False, getattr(flat.value, arg)(-1))
        if keepdim:
            y = y.reshape([1 if d in dims else x.shape[d] for d in range(-x.ndim, 0)])
        return y

    rule(name)(scalars_too(apply))


_extreme_over_dims("amax", "argmax")
_extreme_over_dims("amin", "argmin")


@rule("aminmax")
def aminmax(x: Any, *, dim: Any = None, keepdim: bool = False) -> Any:
    dims = () if dim is None else (dim,)
    low, high = torch.amin(x, dims, keepdim), torch.amax(x, dims, keepdim)
    return torch.return_types.aminmax((low, high))


def _check_q(name: str, q: Any) -> None:
    if not constant(q):
        raise NotImplementedError(f"{name}: a q that carries derivatives has no rule")


@rule("quantile")
def quantile(
    x: Any, q: Any, dim: Any = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    _check_q("quantile", q)
    missing = x.value.detach().isnan()
    if bool(missing.any()):  # NaN where there is one, as torch
        every = dim is None or x.ndim == 0
        x = torch.where(missing.any() if every else missing.any(dim, True), math.nan, x)
    return _quantile(x, q, dim, keepdim, interpolation)


@rule("nanquantile")
def nanquantile(
    x: Any, q: Any, dim: Any = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    _check_q("nanquantile", q)
    return _quantile(x, q, dim, keepdim, interpolation)


def _quantile(x: Any, q: Any, dim: Any, keepdim: bool, interpolation: str) -> Any:
    """Over what is not NaN, which sort puts first."""
    every, ndim = dim is None or x.ndim == 0, x.ndim
    x = x.reshape(-1) if every else x
    at = -1 if every else negative(dim, x.ndim)
    ordered = sort(x, at)[0].movedim(at, -1)  # [*kept, N]
    count = (~x.value.detach().isnan()).sum(at).clamp_min(1).unsqueeze(-1)
    q = torch.as_tensor(q, dtype=x.dtype, device=x.device)
    place = q.reshape(-1) * (count - 1)  # [*kept, Q]
    low, high = place.floor().long(), place.ceil().long()
    weight = {
        "linear": place - low,
        "lower": torch.zeros_like(place),
        "higher": torch.ones_like(place),
        "midpoint": (place - low).sign() * 0.5,
        "nearest": place.round() - low,
    }[interpolation]
    below, above = (torch.gather(ordered, -1, i) for i in (low, high))
    y = torch.lerp(below, above, weight).movedim(-1, 0)  # [Q, *kept]
    if keepdim:
        y = y.reshape(-1, *(1,) * ndim) if every else y.unsqueeze(at)
    return y if q.ndim else y.squeeze(0)
