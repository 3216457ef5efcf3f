"""Closed forms of the forward Laplacian: softmax, log-softmax, logsumexp, layer norm, batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ctorch.autodiff import _lap_rows as forms
from ctorch.autodiff._lap import Lap
from ctorch.autodiff._propagated import RULES, constant, rule
from ctorch.autodiff.rules import shapes


def _prepared(x: Lap, dim: int) -> Lap:
    """Rows of full size along ``dim``, dense if slots are along it."""
    if dim in x.axes:
        x = x.densified()
    if x.rows.shape[dim] != x.shape[dim]:
        sizes = list(x.rows.shape)
        sizes[dim] = x.shape[dim]
        x = Lap(x.value, x.rows.expand(sizes), x.lap, x.axes)
    return x


@rule("softmax", F.softmax, torch.special.softmax, kind=Lap)
def softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """``y_r = y d_r`` with ``d_r = x_r - sum(y x_r)``; the Laplacian adds ``sum_r d_r^2``."""
    if dim is None or dtype is not None:
        return RULES[F.softmax](x, dim, dtype=dtype)
    at = shapes._negative(dim, x.ndim)
    x = _prepared(x, at)
    y = x.value.softmax(at)
    change = x.rows - (y * x.rows).sum(at, keepdim=True)
    second = forms.squared(change, x.shape)
    if x.lap is not None:
        second = second + x.lap
    second = second - (y * second).sum(at, keepdim=True)
    return Lap(y, y * change, y * second, x.axes)


@rule("log_softmax", F.log_softmax, torch.special.log_softmax, kind=Lap)
def log_softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if dim is None or dtype is not None:
        return RULES[F.log_softmax](x, dim, dtype=dtype)
    return x - logsumexp(x, dim, True)


@rule("logsumexp", torch.special.logsumexp, kind=Lap)
def logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    if not isinstance(dim, int):
        if len(dim) != 1:
            return RULES[torch.logsumexp](x, dim, keepdim)
        (dim,) = dim
    at = shapes._negative(dim, x.ndim)
    x = _prepared(x, at)
    y = x.value.softmax(at)
    rows = (y * x.rows).sum(at, keepdim=True)
    second = y * forms.squared(x.rows - rows, x.shape)
    if x.lap is not None:
        second = second + y * x.lap
    out = Lap(x.value.logsumexp(at, keepdim=True), rows, second.sum(at, keepdim=True), x.axes)
    return out if keepdim else shapes.squeeze(out, at)


@rule("layer_norm", F.layer_norm, kind=Lap)
def layer_norm(
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Any:
    """With ``z = (x - mean) r``: ``z_r = r (c_r - z t_r)``, ``t_r = mean(z c_r)``."""
    if constant(x):
        return RULES[F.layer_norm](x, normalized_shape, weight, bias, eps)
    dims = list(range(-len(normalized_shape), 0))
    if any(axis in dims for axis in x.axes):
        x = x.densified()
    rows = x.rows
    if rows.shape[dims[0] :] != x.shape[dims[0] :]:
        rows = rows.expand(*rows.shape[: dims[0]], *x.shape[dims[0] :])
    average = lambda s: s.mean(dims, keepdim=True)  # noqa: E731
    c = x.value - average(x.value)
    r = torch.rsqrt(average(c * c) + eps)
    z = c * r
    change = rows - average(rows)
    t = average(z * change)
    second = average(forms.squared(change, x.shape))
    lap = -2 * r * forms.contracted(t, change, x.shape)
    if x.lap is not None:
        lap_c = x.lap - average(x.lap)
        second = second + average(c * lap_c)
        lap = lap + lap_c
    lap = r * (lap + z * r * (3 * forms.squared(t, t.shape[1:]) - second))
    y = Lap(z, r * (change - z * t), lap, x.axes)
    if weight is not None:
        y = y * weight
    return y if bias is None else y + bias


@rule(F.batch_norm, "batch_norm", kind=Lap)
def batch_norm(
    x: Any,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *rest: Any,
    **options: Any,
) -> Any:
    if training or running_mean is None:
        raise ValueError(
            "batch_norm with batch statistics mixes samples, so that a sample's Laplacian is not "
            "defined: call .eval() on the module"
        )
    return RULES[F.batch_norm](x, running_mean, running_var, weight, bias, training, *rest, **options)
