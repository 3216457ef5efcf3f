"""Rules of padding, pooling and interpolation."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import constant, rule, value_of
from ctorch.autodiff.rules._common import lead_of, on_batch


@rule(F.pad)
def pad(x: Any, pad: Any, mode: str = "constant", value: float | None = None) -> Any:
    pads = list(pad)
    if mode == "constant":
        y = x.linear(lambda s: F.pad(s, pads))
        if not value:
            return y
        inside = torch.ones_like(x.value, dtype=torch.bool)
        around = F.pad(inside.to(x.dtype), pads) == 0
        return y.shift(around.to(x.dtype) * value)
    dims = len(pads) // 2
    n = x.ndim

    def fn(s: Tensor) -> Tensor:  # torch pads 1 to 3 dims of [N, C, ...]
        lead = lead_of(s, dims)
        y = F.pad(s.reshape(1, math.prod(lead), *s.shape[len(lead) :]), pads, mode=mode)
        return y.reshape((*lead, *y.shape[2:]))

    if dims > n:
        raise ValueError(f"pad: {len(pads)} numbers for a value of {n} dims")
    return x.linear(fn)


# ---- averages


def _average(function: Any, ndim: int) -> None:
    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        return x.linear(on_batch(lambda s: function(s, *args, **kwargs), ndim + 1))

    rule(function)(apply)


for _ndim in (1, 2, 3):
    _average(getattr(F, f"avg_pool{_ndim}d"), _ndim)
    _average(getattr(F, f"adaptive_avg_pool{_ndim}d"), _ndim)


def _power_average(function: Any, average: Any, ndim: int) -> None:
    def apply(
        x: Any, norm_type: float, kernel_size: Any, stride: Any = None, ceil_mode: bool = False
    ) -> Any:
        """As torch: p-th root of a window's sum of p-th powers, without absolute values."""
        sizes = [kernel_size] * ndim if isinstance(kernel_size, int) else kernel_size
        count = 1
        for size in sizes:
            count *= size
        mean = average(x ** float(norm_type), kernel_size, stride, 0, ceil_mode)
        return (torch.sign(mean) * torch.relu(torch.abs(mean)) * count) ** (1.0 / norm_type)

    rule(function)(apply)


for _ndim in (1, 2, 3):
    _power_average(getattr(F, f"lp_pool{_ndim}d"), getattr(F, f"avg_pool{_ndim}d"), _ndim)


# ---- maxima: the places are those of the value


def _picked(x: Any, index: Tensor, ndim: int) -> Any:
    """The elements at places in the flattened last ``ndim`` dims."""
    flat = x.flatten(-ndim) if ndim > 1 else x
    shape = index.shape
    return torch.gather(flat, -1, index.flatten(-ndim)).reshape(shape)


def _maximum(name: str, ndim: int) -> None:
    with_indices = getattr(F, f"{name}_with_indices")
    public = getattr(F, name)

    def places(x: Any, args: Any, kwargs: Any) -> Tensor:
        kwargs = {k: v for k, v in kwargs.items() if k != "return_indices"}
        index: Tensor = with_indices(value_of(x).detach(), *args, **kwargs)[1]
        return index

    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        return _picked(x, places(x, args, kwargs), ndim)

    def apply_with_indices(x: Any, *args: Any, **kwargs: Any) -> Any:
        index = places(x, args, kwargs)
        return _picked(x, index, ndim), index

    def either(x: Any, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        return (apply_with_indices if return_indices else apply)(x, *args, **kwargs)

    rule(public)(either)
    rule(with_indices)(apply_with_indices)
    for place in (torch, F):  # the functions behind the public one, with and without indices
        for key, function in ((name, apply), (f"_{name}", apply)):
            if hasattr(place, key) and getattr(place, key) is not public:
                rule(getattr(place, key))(function)


for _ndim in (1, 2, 3):
    _maximum(f"max_pool{_ndim}d", _ndim)
    _maximum(f"adaptive_max_pool{_ndim}d", _ndim)


def _unpool(function: Any, ndim: int) -> None:
    def apply(
        x: Any,
        indices: Tensor,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        output_size: Any = None,
    ) -> Any:
        def fn(s: Tensor) -> Tensor:
            where = indices.expand(s.shape)
            lead = lead_of(s, ndim + 1)
            flat = [t.reshape(-1, *t.shape[len(lead) :]) for t in (s, where)]
            y = function(*flat, kernel_size, stride, padding, output_size)
            return y.reshape((*lead, *y.shape[1:]))

        size = output_size if output_size is None else list(output_size)
        output_size = size if size is None else size[-ndim:]
        return x.linear(fn)

    rule(function)(apply)


for _ndim in (1, 2, 3):
    _unpool(getattr(F, f"max_unpool{_ndim}d"), _ndim)


# ---- interpolation: linear in the values


@rule(F.interpolate)
def interpolate(
    x: Any,
    size: Any = None,
    scale_factor: Any = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Any:
    args = (size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    return x.linear(on_batch(lambda s: F.interpolate(s, *args), x.ndim - 1))


@rule(F.grid_sample)
def grid_sample(
    x: Any,
    grid: Any,
    mode: str = "bilinear",
    padding_mode: str = "zeros",
    align_corners: bool | None = None,
) -> Any:
    if not constant(grid):
        raise NotImplementedError(
            "grid_sample has a rule for the input alone; where the grid carries derivatives, "
            "interpolate with torch functions"
        )
    n = x.ndim

    def fn(s: Tensor) -> Tensor:  # the leading dims become channels
        lead = lead_of(s, n)
        if not lead:
            return F.grid_sample(s, grid, mode, padding_mode, align_corners)
        flat = s.reshape(-1, *s.shape[len(lead) :]).transpose(0, 1)  # [N, lead, C, ...]
        y = F.grid_sample(flat.flatten(1, 2), grid, mode, padding_mode, align_corners)
        y = y.unflatten(1, (flat.shape[1], flat.shape[2])).transpose(0, 1)
        return y.reshape((*lead, *y.shape[1:]))

    return x.linear(fn)


@rule(F.affine_grid)
def affine_grid(theta: Any, size: Any, align_corners: bool | None = None) -> Any:
    def fn(s: Tensor) -> Tensor:
        return F.affine_grid(s, [s.shape[0], *size[1:]], align_corners)

    return theta.linear(on_batch(fn, 2))
