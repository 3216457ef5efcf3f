"""Rules of normalization layers: centre, mean square, ``rsqrt``, in that order, never fused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import constant, rule


def _scaled(y: Any, weight: Any, bias: Any) -> Any:
    """``y * weight + bias``, of parameters that may be missing, or carry derivatives."""
    if weight is not None:
        if bias is not None and constant(weight) and constant(bias) and not constant(y):
            return y.affine(lambda s: s * weight, bias)
        y = y * weight
    return y if bias is None else y + bias


def _normalized(x: Any, dims: Sequence[int], eps: float) -> Any:
    """Zero mean and unit variance over some dims (counted from the end)."""
    dims = tuple(dims)
    centered = x.linear(lambda s: s - s.mean(dims, keepdim=True))
    variance = centered.times(centered).linear(lambda s: s.mean(dims, keepdim=True))
    return centered.times(torch.rsqrt(variance.shift(eps)))


def _of_channel(x: Tensor | None, ndim: int) -> Any:
    """A parameter ``[C]`` against ``[N, C, ...]``."""
    return None if x is None else x.reshape(-1, *(1,) * (ndim - 2))


@rule(F.layer_norm)
def layer_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    if constant(x):
        return _scaled(F.layer_norm(x, normalized_shape, eps=eps), weight, bias)
    return _scaled(_normalized(x, range(-len(normalized_shape), 0), eps), weight, bias)


@rule("layer_norm")
def native_layer_norm(
    x: Any,
    normalized_shape: Sequence[int],
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    return layer_norm(x, normalized_shape, weight, bias, eps)


@rule("rms_norm", F.rms_norm)
def rms_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Any:
    if constant(x):
        return _scaled(F.rms_norm(x, normalized_shape, eps=eps), weight, None)
    if eps is None:
        eps = torch.finfo(x.dtype).eps
    dims = tuple(range(-len(normalized_shape), 0))
    square = x.times(x).linear(lambda s: s.mean(dims, keepdim=True))
    return _scaled(x.times(torch.rsqrt(square.shift(eps))), weight, None)


@rule(F.group_norm)
def group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Any:
    n, c = x.shape[:2]
    if c % num_groups:
        raise ValueError(f"num_groups: {num_groups} does not divide the {c} channels")
    shape = tuple(x.shape)
    if constant(x):
        y = F.group_norm(x, num_groups, eps=eps)
    else:
        y = _normalized(x.reshape(n, num_groups, -1), (-1,), eps).reshape(shape)
    return _scaled(y, _of_channel(weight, len(shape)), _of_channel(bias, len(shape)))


@rule("group_norm")
def native_group_norm(
    x: Any,
    num_groups: int,
    weight: Any = None,
    bias: Any = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Any:
    return group_norm(x, num_groups, weight, bias, eps)


@rule(F.batch_norm)
def batch_norm(
    x: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    _check_statistics("batch_norm", running_mean, running_var)
    n = x.ndim
    weight, bias = _of_channel(weight, n), _of_channel(bias, n)
    if constant(x):
        y = F.batch_norm(x, running_mean, running_var, None, None, training, momentum, eps)
        return _scaled(y, weight, bias)
    if not training:
        if running_mean is None or running_var is None:
            raise ValueError("batch_norm: running_mean and running_var are needed in eval mode")
        factor = _of_channel(torch.rsqrt(running_var + eps), n)
        return _scaled((x - _of_channel(running_mean, n)) * factor, weight, bias)
    dims = [d for d in range(-n, 0) if d != 1 - n]
    count = math.prod(x.shape[d] for d in dims)
    if count == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}"
        )
    _update(running_mean, running_var, x.value, dims, momentum)
    return _scaled(_normalized(x, dims, eps), weight, bias)


def _check_statistics(name: str, *statistics: Any) -> None:
    if not all(map(constant, statistics)):
        raise NotImplementedError(f"{name}: running statistics that carry derivatives have no rule")


def _update(
    mean: Tensor | None, var: Tensor | None, x: Tensor, dims: list[int], momentum: float
) -> None:
    """Running statistics, from the value alone."""
    with torch.no_grad():
        x = x.detach()
        if mean is not None:
            mean.lerp_(x.mean(dims).to(mean.dtype), momentum)
        if var is not None:
            var.lerp_(x.var(dims).to(var.dtype), momentum)


@rule("batch_norm")
def native_batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> Any:
    return batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)


@rule(F.instance_norm)
def instance_norm(
    x: Any,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    _check_statistics("instance_norm", running_mean, running_var)
    if not use_input_stats:
        return batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
    n = x.ndim
    dims = list(range(2 - n, 0))
    if constant(x):
        y = F.instance_norm(x, running_mean, running_var, None, None, True, momentum, eps)
        return _scaled(y, _of_channel(weight, n), _of_channel(bias, n))
    if running_mean is not None and running_var is not None:
        with torch.no_grad():  # the mean over the batch of each instance's statistics
            value = x.value.detach()
            running_mean.lerp_(value.mean(dims).mean(0).to(running_mean.dtype), momentum)
            running_var.lerp_(value.var(dims).mean(0).to(running_var.dtype), momentum)
    return _scaled(_normalized(x, dims, eps), _of_channel(weight, n), _of_channel(bias, n))


@rule(F.local_response_norm)
def local_response_norm(
    x: Any, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Any:
    """Over ``size`` neighbouring channels, ``size // 2`` of them before."""
    square = torch.square(x)
    before, after = size // 2, (size - 1) // 2
    pads = (0, 0) * (x.ndim - 2) + (before, after)
    padded = F.pad(square, pads)
    window = padded.unfold(1, size, 1).mean(-1)
    return x / (window * alpha + k) ** beta
