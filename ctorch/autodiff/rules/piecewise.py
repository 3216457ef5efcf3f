"""Rules of functions that are linear by pieces, and of those that have no derivatives.

The piece is that of the value; at a kink the derivative is the one that torch gives.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._propagated import constant, rule, value_of
from ctorch.autodiff.rules._common import as_tensor, masked, scaled, without_derivatives


@rule("abs", "absolute", "__abs__")
def absolute(x: Any) -> Any:
    if x.dtype.is_complex:
        return torch.hypot(x.real, x.imag)
    return scaled(x, x.value.sign())


@rule("copysign")
def copysign(x: Any, sign: Any) -> Any:
    x = as_tensor(x, sign)
    value = value_of(x)
    return x * (torch.copysign(torch.ones_like(value), value_of(sign)) * value.sign())


@rule("nan_to_num")
def nan_to_num(x: Any, nan: Any = 0.0, posinf: Any = None, neginf: Any = None) -> Any:
    value = x.value.detach()
    good = torch.isfinite(value)
    rest = torch.nan_to_num(value, nan, posinf, neginf)
    return masked(x, good).shift(torch.where(good, torch.zeros_like(value), rest))


@rule("frac")
def frac(x: Any) -> Any:
    return x.shift(-x.value.detach().trunc())


@rule("remainder", "__mod__")
def remainder(x: Any, y: Any) -> Any:
    return _rest(x, y, torch.remainder)


@rule("__rmod__")
def rmod(x: Any, y: Any) -> Any:
    return remainder(y, x)


@rule("fmod")
def fmod(x: Any, y: Any) -> Any:
    return _rest(x, y, torch.fmod)


def _rest(x: Any, y: Any, function: Any) -> Any:
    """What a division with a whole quotient leaves: the value is torch's, which rounds nothing."""
    value = function(value_of(x), value_of(y))
    change = 0 if constant(x) else x.shift(-x.value)
    if not constant(y):
        turns = torch.round((value_of(x) - value) / y.value).detach()
        change = change - turns * y.shift(-y.value)
    return value + change


# ---- bounds


@rule("clamp", "clip")
def clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    if min is None and max is None:
        raise TypeError("clamp: at least one of min and max must be given")
    if not (constant(x) or _bounds_up(x, min, max)):
        value = x.value
        inside = torch.ones_like(value, dtype=torch.bool)
        if min is not None:
            inside = inside & ~(value < min)
        if max is not None:
            inside = inside & ~(value > max)
        bound = torch.clamp(value, min, max)
        return masked(x, inside).shift(torch.where(inside, torch.zeros_like(value), bound))
    like = next(v for v in (x, min, max) if not constant(v))
    if min is not None:
        x = torch.maximum(x, as_tensor(min, like))
    return x if max is None else torch.minimum(x, as_tensor(max, like))


def _bounds_up(x: Any, *bounds: Any) -> bool:
    """Whether a bound carries derivatives, or has a shape that broadcasts ``x`` up."""
    for bound in bounds:
        if isinstance(bound, Tensor):
            if broadcast_shapes(bound.shape, x.shape) != x.shape:
                return True
        elif bound is not None and not constant(bound):
            return True
    return False


@rule("clamp_min")
def clamp_min(x: Any, min: Any) -> Any:
    return clamp(x, min)


@rule("clamp_max")
def clamp_max(x: Any, max: Any) -> Any:
    return clamp(x, None, max)


def _choice(name: str, first: Any) -> Any:
    def apply(x: Any, y: Any) -> Any:
        return torch.where(first(value_of(x), value_of(y)), x, y)

    rule(name)(apply)
    return apply


_choice("maximum", lambda a, b: (a >= b) | a.isnan())
_choice("minimum", lambda a, b: (a <= b) | a.isnan())
_choice("fmax", lambda a, b: (a >= b) | b.isnan())
_choice("fmin", lambda a, b: (a <= b) | b.isnan())


@rule("sgn")
def sgn(x: Any) -> Any:
    if not x.dtype.is_complex:
        return torch.sign(x.value.detach())
    size: Any = torch.abs(x)
    used = size.value != 0
    return torch.where(used, x / torch.where(used, size, 1.0), 0.0)


# ---- no derivatives


_CONSTANT = """
sign floor ceil round trunc fix heaviside eq ne lt le gt ge not_equal less less_equal
greater greater_equal __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isnan isinf isfinite isposinf
isneginf isreal signbit logical_and logical_or logical_not logical_xor argmax argmin argsort
nonzero argwhere count_nonzero all any allclose isclose equal zeros_like ones_like empty_like
rand_like randn_like randint_like new_zeros new_ones new_empty
bucketize searchsorted detach floor_divide __floordiv__ __rfloordiv__ is_floating_point
is_complex is_nonzero numel is_same_size result_type long int short bool bernoulli multinomial
histc can_cast promote_types is_tensor is_signed stride isin
"""
for _name in _CONSTANT.split():
    for _place in (torch, torch.special, Tensor):
        if hasattr(_place, _name):
            _function = getattr(_place, _name)
            rule(_function)(without_derivatives(_function))
    if hasattr(Tensor, _name):
        rule(_name)(without_derivatives(getattr(Tensor, _name)))
rule(F.one_hot)(without_derivatives(F.one_hot))
