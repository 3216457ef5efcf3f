"""Rules of torch's further names for a function: copies of views, native and internal forms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ctorch.autodiff._propagated import constant, rule, value_of, write
from ctorch.autodiff.rules import shapes
from ctorch.autodiff.rules._common import negatives, sizes_of
from ctorch.autodiff.rules.indexing import getitem

_VIEWS = """
detach diagonal expand narrow permute select split split_with_sizes squeeze t transpose unbind
unfold unsqueeze view view_as_complex view_as_real
"""


def _copies(name: str) -> None:
    def apply(x: Any, *args: Any, **kwargs: Any) -> Any:
        y = getattr(x, name)(*args, **kwargs)
        return tuple(map(torch.clone, y)) if isinstance(y, tuple) else torch.clone(y)

    rule(f"{name}_copy")(apply)


for _name in _VIEWS.split():
    _copies(_name)
rule("alias_copy")(shapes.clone)

rule("unsafe_chunk")(shapes.chunk)
rule("unsafe_split")(shapes.split)
rule("unsafe_split_with_sizes")(shapes.split_with_sizes)


@rule("slice_copy", torch.ops.aten.slice)
def slice_copy(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    at = (slice(None),) * (dim % max(x.ndim, 1))
    return getitem(x, (*at, slice(start, end, step)))


def _reshaping(name: str) -> None:
    """An in-place view: the variable itself gets another shape."""

    def apply(x: Any, *args: Any) -> Any:
        result = torch.clone(getattr(x, name)(*args))  # or it would be a view that is alive
        return write(x, result, f"{name}_", shape=result.shape)

    rule(f"{name}_")(apply)


for _name in ("squeeze", "unsqueeze", "transpose", "swapaxes", "swapdims", "t"):
    _reshaping(_name)


@rule("fill")
def fill(x: Any, value: Any) -> Any:
    if constant(value):
        return torch.full_like(value_of(x), value)
    return value.to(x.dtype).expand(x.shape).clone()


@rule("constant_pad_nd")
def constant_pad_nd(x: Any, pad: Sequence[int], value: float = 0) -> Any:
    return F.pad(x, pad, value=value)


@rule("sum_to_size")
def sum_to_size(x: Any, *size: Any) -> Any:
    sizes = sizes_of(size)
    extra = x.ndim - len(sizes)
    dims = [i for i, n in enumerate(x.shape) if i < extra or (sizes[i - extra] == 1 and n != 1)]
    if extra < 0 or any(
        n != sizes[i - extra] for i, n in enumerate(x.shape) if i >= extra and i not in dims
    ):
        raise RuntimeError(f"sum_to_size: {tuple(x.shape)} does not broadcast from {sizes}")
    return (x.sum(dims) if dims else torch.clone(x)).reshape(sizes)


@rule("combinations")
def combinations(x: Any, r: int = 2, with_replacement: bool = False) -> Any:
    places = torch.arange(len(x), device=x.device)
    return getitem(x, torch.combinations(places, r, with_replacement))


# ---- operators of graphs of aten


@rule("_softmax")
def native_softmax(x: Any, dim: int, half_to_float: bool) -> Any:
    return torch.softmax(x.float() if half_to_float else x, dim)


@rule("_log_softmax")
def native_log_softmax(x: Any, dim: int, half_to_float: bool) -> Any:
    return torch.log_softmax(x.float() if half_to_float else x, dim)


@rule("_safe_softmax")
def safe_softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    """Zeros where nothing is left of a row: where all of it is ``-inf``."""
    empty = (value_of(x) == -math.inf).all(dim, keepdim=True)
    return torch.where(empty, 0.0, torch.softmax(torch.where(empty, 0.0, x), dim, dtype=dtype))


def _statistics(x: Any, dims: Any, eps: float, keepdim: bool) -> tuple[Any, Any]:
    """Mean and reciprocal standard deviation over some dims."""
    dims = negatives(dims, x.ndim)
    mean = x.mean(dims, keepdim=True)
    scale = torch.rsqrt(torch.square(x - mean).mean(dims, keepdim=keepdim) + eps)
    return (mean if keepdim else mean.squeeze(tuple(dims))), scale


@rule("native_layer_norm")
def native_layer_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any, bias: Any, eps: float
) -> Any:
    y = F.layer_norm(x, normalized_shape, weight, bias, eps)
    return y, *_statistics(x, list(range(-len(normalized_shape), 0)), eps, True)


@rule("native_group_norm")
def native_group_norm(
    x: Any, weight: Any, bias: Any, N: int, C: int, HxW: int, group: int, eps: float
) -> Any:
    y = F.group_norm(x, group, weight, bias, eps)
    return y, *_statistics(x.reshape(N, group, C // group * HxW), -1, eps, False)


@rule("native_batch_norm")
def native_batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Any,
    running_var: Any,
    training: bool,
    momentum: float,
    eps: float,
) -> Any:
    y = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    if not training:
        none = value_of(x).new_empty(0)
        return y, none, none
    return y, *_statistics(x, [d for d in range(x.ndim) if d != 1], eps, False)


@rule("_native_batch_norm_legit")
def native_batch_norm_legit(x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
    statistics = rest[:2] if len(rest) == 5 else (None, None)
    return native_batch_norm(x, weight, bias, *statistics, *rest[-3:])


@rule("_native_batch_norm_legit_no_training")
def native_batch_norm_eval(
    x: Any, weight: Any, bias: Any, running_mean: Any, running_var: Any, momentum: float, eps: float
) -> Any:
    return native_batch_norm(x, weight, bias, running_mean, running_var, False, momentum, eps)
