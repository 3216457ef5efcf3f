"""Rules of elementwise functions: those with kernels, powers, logarithms, steps."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._propagated import constant, rule, value_of
from ctorch.autodiff.rules._common import as_tensor, compose, finite, masked
from ctorch.ops.jet import UNARY

_OWN_RULES = ("pow", "gelu", "gelu_tanh", "silu", "softplus", "mish", "logsigmoid")


def kernel(name: str) -> Any:
    """The rule of a function that has a kernel of its own."""

    def apply(x: Any) -> Any:
        return x.unary(name)

    return apply


for _name in UNARY:  # those that torch knows by the same name and one argument
    if _name not in _OWN_RULES and hasattr(torch, _name):
        rule(_name)(kernel(_name))

for _alias, _name in (
    (F.tanh, "tanh"),
    (F.sigmoid, "sigmoid"),
    (torch.special.expit, "sigmoid"),
    (torch.special.erf, "erf"),
    (torch.special.expm1, "expm1"),
    (torch.special.log1p, "log1p"),
):
    rule(_alias)(kernel(_name))


@rule("square")
def square(x: Any) -> Any:
    return x.times(x)


for _name in ("sin", "cos", "tan", "sinh", "cosh", "tanh"):
    rule(f"arc{_name}")(kernel(f"a{_name}"))


@rule("log2")
def log2(x: Any) -> Any:
    return torch.log(x) * (1 / math.log(2))


@rule("log10")
def log10(x: Any) -> Any:
    return torch.log(x) * (1 / math.log(10))


@rule("exp2", torch.special.exp2)
def exp2(x: Any) -> Any:
    return _exponential(x, torch.exp2(x.value), math.log(2))


def _exponential(x: Any, value: Tensor, rate: Any) -> Any:
    """``b^x`` with its value given and ``rate = log b``: rounding errors do not grow with x."""
    return value * torch.exp(x.shift(-finite(x.value)) * rate)


@rule("atan2", "arctan2")
def atan2(y: Any, x: Any) -> Any:
    """By turning the point to the positive axis, where atan has no branches."""
    like = x if constant(y) else y
    y, x = as_tensor(y, like), as_tensor(x, like)
    angle = torch.atan2(value_of(y), value_of(x))
    far = torch.isinf(value_of(y)) | torch.isinf(value_of(x))  # where changes turn nothing
    y, x, turn = torch.where(far, 0.0, y), torch.where(far, 1.0, x), torch.where(far, 0.0, angle)
    c, s = torch.cos(turn), torch.sin(turn)
    return angle + torch.atan((y * c - x * s) / (x * c + y * s))


@rule("hypot")
def hypot(x: Any, y: Any) -> Any:
    """In units of the larger one, so that squares neither overflow nor vanish."""
    size = torch.maximum(*torch.broadcast_tensors(value_of(x).abs(), value_of(y).abs())).detach()
    unit = torch.where(torch.isfinite(size) & (size != 0), size, 1.0)
    return torch.sqrt(torch.square(x / unit) + torch.square(y / unit)) * unit


# ---- powers


@rule("pow", "__pow__", torch.float_power, Tensor.float_power)
def power(x: Any, exponent: Any) -> Any:
    if isinstance(exponent, Tensor) and exponent.ndim == 0 and not exponent.requires_grad:
        exponent = exponent.item()
    if isinstance(exponent, (int, float)):
        return _number_power(x, exponent)
    if isinstance(x, (int, float)):
        x = as_tensor(x, exponent)
    if isinstance(x, Tensor):  # constant ** carried
        zero = x == 0
        rate = torch.where(zero, torch.zeros_like(x), torch.log(torch.where(zero, 1, x)))
        return _exponential(exponent, torch.pow(x, exponent.value), rate)
    if isinstance(exponent, Tensor):
        return _tensor_power(x, exponent)
    value = torch.pow(x.value, exponent if constant(exponent) else exponent.value)
    z = exponent * torch.log(x)
    return value * torch.exp(z.shift(-z.value))


def _tensor_power(x: Any, p: Tensor) -> Any:
    """``x^p`` by its binomial series: right below zero and at it, where p is a whole number."""
    x = x if p.shape == x.shape else x.expand(broadcast_shapes(p.shape, x.shape))
    dtype = torch.result_type(x.value, p)
    value = x.value.to(dtype)
    x, p = x.to(dtype), p.to(dtype)

    def coefficient(n: int) -> Tensor:
        choose = torch.ones_like(p)
        for k in range(n):
            choose = choose * (p - k) / (k + 1)
        used = choose != 0
        return choose * torch.where(used, value, 1.0) ** torch.where(used, p - n, 0.0)

    return compose(x, coefficient)


def _number_power(x: Any, p: float) -> Any:
    if p == 1:
        return x.linear(lambda s: s.clone())
    if p == 2:
        return x.times(x)
    if p == 3:
        return x.times(x.times(x))
    if p == 0:
        return torch.ones_like(x.value)
    if p == 0.5:
        return torch.sqrt(x)
    if p == -1:
        return torch.reciprocal(x)
    if float(p).is_integer() and -64 <= p <= 64:  # by squaring: exact through zero
        if p < 0:
            return torch.reciprocal(_number_power(x, -p))
        half = _number_power(x, int(p) // 2)
        return half.times(half).times(x) if int(p) % 2 else half.times(half)
    if p < 1 or p <= x.order:
        return x.unary("pow", float(p))
    used = x.value.detach() != 0  # at zero the recurrence divides by zero
    safe: Any = torch.where(used, x, 1.0)
    y = masked(safe.unary("pow", float(p)), used)
    at: Any = torch.where(used, 1.0, x)  # elsewhere a number that is harmless
    choose = [1.0]
    for n in range(int(x.order)):
        choose.append(choose[n] * (p - n) / (n + 1))
    series = compose(at, lambda n: choose[n] * at.value ** (p - n))
    return y + masked(series, ~used)


@rule("__rpow__")
def rpow(x: Any, base: Any) -> Any:
    return power(base, x)


@rule("ldexp")
def ldexp(x: Any, exponent: Any) -> Any:
    return x * torch.exp2(exponent)
