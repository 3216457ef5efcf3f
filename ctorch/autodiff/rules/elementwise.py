"""Rules of elementwise functions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import RULES, in_place, rule, value_of
from ctorch.ops.jet import UNARY


def _kernel(name: str) -> Any:
    def apply(x: Any) -> Any:
        return x.unary(name)

    return apply


for _name in UNARY:  # those that torch knows by the same name and one argument
    if _name not in ("pow", "gelu", "gelu_tanh", "silu", "softplus") and hasattr(torch, _name):
        rule(_name)(_kernel(_name))
        rule(f"{_name}_")(in_place(_kernel(_name)))

RULES[F.tanh] = RULES[torch.tanh]
RULES[F.sigmoid] = RULES[torch.sigmoid]
rule(torch.special.expit)(_kernel("sigmoid"))


@rule(F.silu)
def silu(x: Any, inplace: bool = False) -> Any:
    return (in_place(_kernel("silu")) if inplace else _kernel("silu"))(x)


@rule(F.gelu)
def gelu(x: Any, approximate: str = "none") -> Any:
    return x.unary("gelu_tanh" if approximate == "tanh" else "gelu")


@rule(F.softplus)
def softplus(x: Any, beta: float = 1.0, threshold: float = 20.0) -> Any:
    y = x.unary("softplus", float(beta))
    if bool((value_of(x) * beta > threshold).any()):  # torch's own branch: linear above
        return torch.where(value_of(x) * beta > threshold, x, y)
    return y


# ---- piecewise linear: the branch is that of the value


@rule("relu", F.relu)
def relu(x: Any, inplace: bool = False) -> Any:
    y = _masked(x, x.value > 0)
    return in_place(lambda x: y)(x) if inplace else y


rule("relu_", F.relu_)(in_place(relu))


@rule("abs", "absolute", "__abs__")
def absolute(x: Any) -> Any:
    sign = x.value.sign()
    return x.linear(lambda s: s * sign)


def _masked(x: Any, mask: Tensor) -> Any:
    return x.linear(lambda s: torch.where(mask, s, torch.zeros_like(s)))


def _constant(function: Any) -> Any:
    """The value alone: its derivatives are zero (or there are none)."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        args = tuple(value_of(a) for a in args)
        return function(*args, **{name: value_of(a) for name, a in kwargs.items()})

    return apply


_CONSTANT = (
    "sign sgn floor ceil round trunc heaviside eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ "
    "__ge__ isnan isinf isfinite isposinf isneginf signbit logical_and logical_or logical_not "
    "logical_xor argmax argmin argsort nonzero count_nonzero all any allclose isclose equal "
    "zeros_like ones_like empty_like full_like rand_like randn_like randint_like new_zeros new_ones "
    "new_empty new_full new_tensor bucketize searchsorted detach is_floating_point is_complex "
    "is_nonzero numel is_same_size result_type"
).split()
for _name in _CONSTANT:
    for _place in (torch, torch.special, Tensor):
        if hasattr(_place, _name):
            _function = getattr(_place, _name)
            rule(_function)(_constant(_function))
    if hasattr(Tensor, _name):
        rule(_name)(_constant(getattr(Tensor, _name)))


# ---- powers


@rule("pow", "__pow__", torch.float_power, Tensor.float_power)
def power(x: Any, exponent: Any) -> Any:
    if isinstance(x, (int, float)) or isinstance(x, Tensor):  # constant ** carried
        base = x if isinstance(x, Tensor) else math.log(x)
        return torch.exp(exponent * (torch.log(base) if isinstance(base, Tensor) else base))
    if isinstance(exponent, Tensor) and exponent.ndim == 0 and not exponent.requires_grad:
        exponent = exponent.item()
    if isinstance(exponent, (int, float)):
        return _number_power(x, exponent)
    return torch.exp(exponent * torch.log(x))


def _number_power(x: Any, p: float) -> Any:
    if p == 1:
        return x.linear(lambda s: s.clone())
    if p == 2:
        return x.times(x)
    if p == 3:
        return x.times(x.times(x))
    if p == 0:
        return torch.ones_like(x.value)
    if float(p).is_integer() and 0 < p <= 64:  # by squaring: exact through zero
        half = _number_power(x, int(p) // 2)
        return half.times(half).times(x) if int(p) % 2 else half.times(half)
    return x.unary("pow", float(p))


@rule("__rpow__")
def rpow(x: Any, base: Any) -> Any:
    return power(base, x)


@rule("square")
def square(x: Any) -> Any:
    return x.times(x)
