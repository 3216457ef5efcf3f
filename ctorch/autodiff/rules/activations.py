"""Rules of activation functions.

Where a function has an exponential piece, its argument is replaced by zero on the other piece, so
that nothing overflows there: an infinity that ``where`` discards would still be NaN backwards.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ctorch.autodiff._propagated import constant, rule, value_of
from ctorch.autodiff.rules._common import inplace_flag, masked, negative, numbers, scaled

_C = torch._C._nn


def _activation(*functions: Any) -> Any:
    """Registers a rule, with the argument ``inplace`` that activations have."""

    def register(function: Any) -> Any:
        rule(*functions)(inplace_flag(function))
        return function

    return register


@_activation("relu", F.relu)
def relu(x: Any) -> Any:
    return masked(x, ~(x.value <= 0))  # NaN stays NaN, here and below


@_activation(F.silu, _C.silu)
def silu(x: Any) -> Any:
    return x.unary("silu")


@rule(F.gelu)
def gelu(x: Any, approximate: str = "none") -> Any:
    if approximate not in ("none", "tanh"):
        raise ValueError(f"approximate: expected 'none' or 'tanh', got {approximate!r}")
    return x.unary("gelu_tanh" if approximate == "tanh" else "gelu")


@rule(F.softplus)
def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    y = x.unary("softplus", float(beta))
    if threshold >= 20:  # torch goes over to x there, to save an exponential: off by 2e-9 / beta
        return y
    return torch.where(value_of(x) * beta > threshold, x, y)


@rule(F.logsigmoid, _C.log_sigmoid)
def logsigmoid(x: Any) -> Any:
    return x.unary("logsigmoid")


@_activation(F.mish, _C.mish)
def mish(x: Any) -> Any:
    return x.unary("mish")


# ---- exponential by pieces


def _exponential_below(x: Any, alpha: Any, scale: Any, rate: Any) -> Any:
    """``scale * (x where positive, alpha * expm1(rate * x) elsewhere)``."""
    positive = x.value > 0
    rest = masked(x, ~positive)
    if rate != 1:
        rest = rest * rate
    return masked(x, positive) * scale + torch.expm1(rest) * (alpha * scale)


@_activation(F.elu, _C.elu)
def elu(x: Any, alpha: float = 1.0) -> Any:
    return _exponential_below(x, alpha, 1.0, 1.0)


@_activation("selu", F.selu)
def selu(x: Any) -> Any:
    return _exponential_below(x, 1.6732632423543772, 1.0507009873554805, 1.0)


@_activation("celu", F.celu)
def celu(x: Any, alpha: float = 1.0) -> Any:
    return _exponential_below(x, alpha, 1.0, 1.0 / alpha)


# ---- linear by pieces


@_activation(F.leaky_relu, _C.leaky_relu)
def leaky_relu(x: Any, negative_slope: float = 0.01) -> Any:
    return scaled(x, numbers(x.value > 0, 1.0, negative_slope, x.dtype))


@_activation(F.rrelu, torch.rrelu)
def rrelu(x: Any, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False) -> Any:
    if not training:
        return leaky_relu(x, (lower + upper) / 2)
    slope = torch.empty_like(x.value).uniform_(lower, upper)
    return scaled(x, torch.where(x.value > 0, torch.ones_like(slope), slope))


@rule("prelu")
def prelu(x: Any, weight: Any) -> Any:
    if weight.ndim == 1 and x.ndim > 1 and weight.shape[0] != 1:
        weight = weight.reshape(-1, *(1,) * (x.ndim - 2))
    positive = value_of(x) > 0
    if constant(x):
        return torch.where(positive, x, weight * x)
    return masked(x, positive) + weight * masked(x, ~positive)


@_activation(F.hardtanh, _C.hardtanh)
def hardtanh(x: Any, min_val: float = -1.0, max_val: float = 1.0) -> Any:
    value = x.value
    inside = (value > min_val) & (value < max_val)
    bound = torch.clamp(value, min_val, max_val)
    return masked(x, inside).shift(torch.where(inside, torch.zeros_like(value), bound))


@_activation(F.relu6, _C.relu6)
def relu6(x: Any) -> Any:
    return hardtanh(x, 0.0, 6.0)


@_activation(F.hardsigmoid, _C.hardsigmoid)
def hardsigmoid(x: Any) -> Any:
    return relu6(x + 3) / 6


@_activation(F.hardswish, _C.hardswish)
def hardswish(x: Any) -> Any:
    return x * hardsigmoid(x)


@rule(F.hardshrink, torch.Tensor.hardshrink)
def hardshrink(x: Any, lambd: float = 0.5) -> Any:
    return masked(x, ~(x.value.abs() <= lambd))


@rule(F.softshrink, _C.softshrink)
def softshrink(x: Any, lambd: float = 0.5) -> Any:
    value = x.value.detach()
    outside = ~(value.abs() <= lambd)
    return masked(x, outside).shift(torch.where(outside, -lambd * value.sign(), 0.0))


@_activation(F.threshold, torch.threshold)
def threshold(x: Any, threshold: float, value: float) -> Any:
    above = ~(x.value <= threshold)
    return masked(x, above).shift(numbers(above, 0.0, value, x.dtype))


# ---- made of others


@rule(F.softsign)
def softsign(x: Any) -> Any:
    return x / (torch.abs(x) + 1)


@rule(F.tanhshrink)
def tanhshrink(x: Any) -> Any:
    return x - torch.tanh(x)


@rule(F.glu, _C.glu)
def glu(x: Any, dim: int = -1) -> Any:
    at = negative(dim, x.ndim)
    if x.shape[at] % 2:
        raise ValueError(f"glu: expected an even size in dim {dim}, got {x.shape[at]}")
    a, b = x.chunk(2, at)
    return a * b.unary("sigmoid")


# ---- dropout: the mask is drawn once, for the value


@_activation(F.dropout)
def dropout(x: Any, p: float = 0.5, training: bool = True) -> Any:
    return scaled(x, F.dropout(torch.ones_like(x.value), p)) if training and p > 0 else x


@rule("dropout")
def native_dropout(x: Any, p: float, train: bool) -> Any:
    return dropout(x, p, train)


def _channel_dropout(function: Any) -> Any:
    def apply(x: Any, p: float = 0.5, training: bool = True) -> Any:
        return scaled(x, function(torch.ones_like(x.value), p)) if training and p > 0 else x

    return apply


for _function in (F.dropout1d, F.dropout2d, F.dropout3d):
    _activation(_function)(_channel_dropout(_function))


def _alpha_dropout(function: Any) -> Any:
    """What is dropped takes a fixed value; the whole is then scaled to keep mean and variance."""

    def apply(x: Any, p: float = 0.5, training: bool = False) -> Any:
        if not training or p == 0:
            return x
        state = torch.random.fork_rng(devices=[] if not x.is_cuda else [x.device])
        with state:
            shift = function(torch.zeros_like(x.value), p, True)
        factor = function(torch.ones_like(x.value), p, True) - shift
        return scaled(x, factor).shift(shift)

    return apply


for _function in (F.alpha_dropout, F.feature_alpha_dropout):
    _activation(_function)(_alpha_dropout(_function))
