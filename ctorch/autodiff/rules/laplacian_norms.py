"""Closed forms of the forward Laplacian: softmax, logsumexp, layer norm; no batch statistics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff import _lap_rows as forms
from ctorch.autodiff._lap import Lap
from ctorch.autodiff._propagated import RULES, constant, rule
from ctorch.autodiff.rules import normalization as normalization
from ctorch.autodiff.rules import shapes
from ctorch.autodiff.rules._common import negative, scalars_too


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
@scalars_too
def softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    """``y_r = y d_r`` with ``d_r = x_r - sum(y x_r)``; the Laplacian adds ``sum_r d_r^2``."""
    if dim is None or dtype is not None or not x.shape[dim]:
        return RULES[F.softmax](x, dim, dtype=dtype)
    at = negative(dim, x.ndim)
    x = _prepared(x, at)
    y = x.value.softmax(at)
    p, rows = y.movedim(at, -1), x.rows.movedim(at, -1)  # a negative dim counts the same with rows
    shape = p.shape
    p = p.reshape(shape[:-1].numel(), 1, shape[-1])
    rows = rows.expand(-1, *shape).movedim(0, -2).reshape(len(p), len(rows), shape[-1])
    change = rows - rows @ p.mT
    second = (change * change).sum(1, keepdim=True)
    if x.lap is not None:
        second = second + x.lap.movedim(at, -1).reshape(p.shape)
    second = p * (second - (p * second).sum(-1, keepdim=True))
    change = change * p if forms.recorded(change, p) else change.mul_(p)
    change = change.reshape(*shape[:-1], rows.shape[1], shape[-1]).movedim(-2, 0)
    return Lap(y, change.movedim(-1, at), second.reshape(shape).movedim(-1, at), x.axes)


@rule("log_softmax", F.log_softmax, torch.special.log_softmax, kind=Lap)
@scalars_too
def log_softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if dim is None or dtype is not None:
        return RULES[F.log_softmax](x, dim, dtype=dtype)
    return x - logsumexp(x, dim, True)


@rule("logsumexp", torch.special.logsumexp, kind=Lap)
@scalars_too
def logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    if not isinstance(dim, int):
        if len(dim) != 1:
            return RULES[torch.logsumexp](x, dim, keepdim)
        (dim,) = dim
    at = negative(dim, x.ndim)
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
    if constant(x) or not constant(weight) or not constant(bias):
        return RULES[F.layer_norm](x, normalized_shape, weight, bias, eps)
    shape, n = x.shape, len(normalized_shape)
    if any(axis >= -n for axis in x.axes):
        x = x.densified()
    size = shape[-n:].numel()
    lead = shape.numel() // size
    value, rows = x.value.reshape(lead, size), x.full().reshape(len(x.rows), lead, size)
    c = value - value.mean(-1, keepdim=True)
    r = torch.rsqrt((c * c).mean(-1, keepdim=True) + eps)
    z = c * r
    by_row = rows.transpose(0, 1)  # [lead, R, size], a view
    means = by_row @ torch.stack([torch.full_like(z, 1 / size), z / size], -1)  # of x_r and z x_r
    sums = means.mT @ by_row  # of mean_r x_r and t_r x_r over rows: [lead, 2, size]
    mean, t = means.movedim(0, 1).split(1, -1)  # [R, lead, 1]
    first = (mean * t).sum(0)
    spread = torch.linalg.vector_norm(rows, dim=-1).square().sum(0).unsqueeze(-1) / size
    second = spread - (mean * mean).sum(0)  # sum_r of the mean of c_r^2
    lap = -2 * r * (sums[:, 1] - first)
    if x.lap is not None:
        lap_c = x.lap.reshape(lead, size)
        lap_c = lap_c - lap_c.mean(-1, keepdim=True)
        second = second + (c * lap_c).mean(-1, keepdim=True)
        lap = lap + lap_c
    scale = r if weight is None else r * weight.reshape(-1)
    lap = scale * (lap + z * r * (3 * (t * t).sum(0) - second))
    rows = _normalized(rows, mean, t, scale, z)
    z = z if weight is None else z * weight.reshape(-1)
    if bias is not None:
        z = z + bias.reshape(-1)
    return Lap(z.reshape(shape), rows.reshape(len(rows), *shape), lap.reshape(shape), x.axes)


def _normalized(rows: Tensor, mean: Tensor, t: Tensor, scale: Tensor, z: Tensor) -> Tensor:
    """``scale (rows - mean - z t)``."""
    if forms.recorded(rows, scale):
        return scale * (rows - mean - z * t)
    out = rows * scale
    return out.addcmul_(mean, scale, value=-1).addcmul_(t, scale * z, value=-1)


def _without_batch_statistics(function: Any) -> None:
    """Refuses to mix samples; ``training`` is the sixth argument of both of torch's functions."""
    generic = RULES[function]

    @rule(function, kind=Lap)
    def batch_norm(*args: Any, **options: Any) -> Any:
        training = args[5] if len(args) > 5 else options.get("training", False)
        if training:
            raise ValueError(
                "batch_norm with batch statistics mixes samples, so that a sample's Laplacian is "
                "not defined: call .eval() on the module"
            )
        return generic(*args, **options)


_without_batch_statistics(F.batch_norm)
_without_batch_statistics(torch.batch_norm)
