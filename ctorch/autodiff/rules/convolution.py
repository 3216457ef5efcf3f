"""Rules of convolutions: the coefficients of a series go through as one larger batch."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import constant, rule
from ctorch.autodiff.rules._common import on_batch, two


def _convolution(ndim: int) -> None:
    name = f"conv{ndim}d"
    native = getattr(torch, name)

    def apply(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        def fn(s: Tensor, w: Tensor) -> Tensor:
            return native(s, w, None, stride, padding, dilation, groups)  # type: ignore[no-any-return]

        return _applied(fn, x, weight, bias, ndim)

    rule(native)(apply)


def _transposed(ndim: int) -> None:
    name = f"conv_transpose{ndim}d"
    native = getattr(torch, name)

    def apply(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        output_padding: Any = 0,
        groups: int = 1,
        dilation: Any = 1,
    ) -> Any:
        def fn(s: Tensor, w: Tensor) -> Tensor:
            args = (stride, padding, output_padding, groups, dilation)
            return native(s, w, None, *args)  # type: ignore[no-any-return]

        return _applied(fn, x, weight, bias, ndim)

    rule(native)(apply)


def _applied(fn: Any, x: Any, weight: Any, bias: Any, ndim: int) -> Any:
    """``fn(x, weight) + bias`` for ``x [N, C, ...]`` or ``[C, ...]``."""
    shift = None if bias is None else bias.reshape(-1, *(1,) * ndim)
    if constant(weight):
        linear = on_batch(lambda s: fn(s, weight), ndim + 1)
        if shift is not None and constant(shift):
            return x.affine(linear, shift)
        y = x.linear(linear) if not constant(x) else linear(x)
    else:
        y = two(fn, x, weight)
    return y if shift is None else y + shift


for _ndim in (1, 2, 3):
    _convolution(_ndim)
    _transposed(_ndim)


@rule(torch.ops.aten.convolution)
def convolution(
    x: Any,
    weight: Any,
    bias: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
) -> Any:
    def fn(s: Tensor, w: Tensor) -> Tensor:
        args = (stride, padding, dilation, transposed, output_padding, groups)
        return torch.convolution(s, w, None, *args)

    return _applied(fn, x, weight, bias, x.ndim - 2)


rule(torch.convolution)(convolution)


# ---- patches and pixels: elements moved, and added up


@rule(F.unfold)
def unfold(x: Any, kernel_size: Any, dilation: Any = 1, padding: Any = 0, stride: Any = 1) -> Any:
    return x.linear(on_batch(lambda s: F.unfold(s, kernel_size, dilation, padding, stride), 3))


@rule(F.fold)
def fold(
    x: Any,
    output_size: Any,
    kernel_size: Any,
    dilation: Any = 1,
    padding: Any = 0,
    stride: Any = 1,
) -> Any:
    args = (output_size, kernel_size, dilation, padding, stride)
    return x.linear(on_batch(lambda s: F.fold(s, *args), 2))


def _moving(function: Any, name: str) -> None:
    def apply(x: Any, *args: int, **named: int) -> Any:
        factor = args[0] if args else named[name]
        return x.linear(lambda s: function(s, factor))

    rule(function)(apply)


_moving(torch.pixel_shuffle, "upscale_factor")
_moving(torch.pixel_unshuffle, "downscale_factor")


@rule(torch.channel_shuffle, torch.native_channel_shuffle)
def channel_shuffle(x: Any, groups: int) -> Any:
    return x.linear(on_batch(lambda s: torch.channel_shuffle(s, groups), x.ndim - 1))
