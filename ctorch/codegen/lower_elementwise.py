"""Lowering rules of elementwise operators and of their derivatives.

A rule has the operator's arguments, tensors as ``Expr``; what it returns is broadcast to the
operator's result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from ctorch.codegen.lower_expression import Expr

Rule = Callable[..., Any]

_DENSITY = 1 / math.sqrt(2 * math.pi)
_GELU_SLOPE, _GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715


def _unary(op: str) -> Rule:
    return lambda x: x.call(op)


def _binary(op: str) -> Rule:
    def rule(a: Any, b: Any) -> Expr:
        return a.call(op, b) if isinstance(a, Expr) else b.of(a).call(op, b)

    return rule


def _add(a: Expr, b: Any, alpha: float = 1) -> Expr:
    return a + b * alpha


def _sub(a: Expr, b: Any, alpha: float = 1) -> Expr:
    return a - b * alpha


def _div(a: Expr, b: Any, rounding_mode: str | None = None) -> Expr:
    ratio = a / b
    if rounding_mode is None:
        return ratio
    if rounding_mode == "trunc":
        return ratio.call("trunc")
    return _floor_divide(a, b)


def _floor_divide(a: Expr, b: Any) -> Expr:
    """As PyTorch: the quotient that belongs to the remainder, free of the division's rounding."""
    a, b = (a, a.of(b)) if isinstance(a, Expr) else (b.of(a), b)
    left = a.call("fmod", b)
    quotient = (a - left) / b
    quotient = (
        _not(left.same(0.0)).call("and", (left < 0).call("ne", b < 0)).where(quotient - 1, quotient)
    )
    whole = quotient.call("floor")
    whole = (quotient - whole > 0.5).where(whole + 1, whole)
    return b.same(0.0).where(a / b, whole)


def _remainder(a: Any, b: Any) -> Expr:
    a, b = (a, a.of(b)) if isinstance(a, Expr) else (b.of(a), b)
    left = a.call("fmod", b)
    return _not(left.same(0.0)).call("and", (left < 0).call("ne", b < 0)).where(left + b, left)


def _pow(a: Any, b: Any) -> Expr:
    if isinstance(a, Expr):
        return a**b
    return b.call("exp2") if a == 2 else b.of(a).call("pow", b)


def _not(x: Expr) -> Expr:
    return x.call("not")


def _clamp(x: Expr, min: Any = None, max: Any = None) -> Expr:
    if min is not None:
        x = x.call("maximum", min)
    return x if max is None else x.call("minimum", max)


def _where(condition: Expr, yes: Any, no: Any) -> Expr:
    return condition.where(yes, no)


def _masked_fill(x: Expr, mask: Expr, value: Any) -> Expr:
    return mask.where(value, x)


def _softplus(x: Expr, beta: float = 1, threshold: float = 20) -> Expr:
    scaled = x * beta
    return (scaled > threshold).where(x, scaled.call("softplus") / beta)


def _softplus_backward(g: Expr, x: Expr, beta: float, threshold: float) -> Expr:
    scaled = x * beta
    return (scaled > threshold).where(g, g * scaled.call("sigmoid"))


def _elu(x: Expr, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Expr:
    return (x > 0).where(x * scale, (x * input_scale).call("expm1") * (alpha * scale))


def _elu_backward(
    g: Expr, alpha: float, scale: float, input_scale: float, is_result: bool, x: Expr
) -> Expr:
    if is_result:
        negative = g * input_scale * (x + alpha * scale)
    else:
        negative = g * (input_scale * alpha * scale) * (x * input_scale).call("exp")
    return (x <= 0).where(negative, g * scale)


def _gelu(x: Expr, approximate: str = "none") -> Expr:
    if approximate == "none":
        return x * x.call("normal_cdf")
    inner = (x + x * x * x * _GELU_CUBIC) * _GELU_SLOPE
    return x * 0.5 * (inner.call("tanh") + 1)


def _gelu_backward(g: Expr, x: Expr, approximate: str = "none") -> Expr:
    if approximate == "none":
        return g * (x.call("normal_cdf") + x * ((x * x * -0.5).call("exp") * _DENSITY))
    square = x * x
    tanh = ((x + x * square * _GELU_CUBIC) * _GELU_SLOPE).call("tanh")
    inner = (square * (3 * _GELU_CUBIC) + 1) * _GELU_SLOPE
    return g * ((tanh + 1) * 0.5 + x * 0.5 * (1 - tanh * tanh) * inner)


def _silu(x: Expr) -> Expr:
    return x * x.call("sigmoid")


def _silu_backward(g: Expr, x: Expr) -> Expr:
    s = x.call("sigmoid")
    return g * (s * (x * (1 - s) + 1))


def _mish(x: Expr) -> Expr:
    return x * x.call("softplus").call("tanh")


def _mish_backward(g: Expr, x: Expr) -> Expr:
    tanh, s = x.call("softplus").call("tanh"), x.call("sigmoid")
    return g * (tanh + x * s * (1 - tanh * tanh))


def _hardtanh_backward(g: Expr, x: Expr, low: float, high: float) -> Expr:
    return (x <= low).call("or", x >= high).where(0.0, g)


def _hardswish(x: Expr) -> Expr:
    return x * _clamp(x + 3, 0, 6) / 6


def _hardswish_backward(g: Expr, x: Expr) -> Expr:
    inner = (x < 3).where(g * (x / 3 + 0.5), g)
    return (x < -3).where(0.0, inner)


def _hardsigmoid_backward(g: Expr, x: Expr) -> Expr:
    return (x > -3).call("and", x < 3).where(g / 6, 0.0)


def _threshold(x: Expr, threshold: float, value: float) -> Expr:
    return (x <= threshold).where(value, x)


def _threshold_backward(g: Expr, x: Expr, threshold: float) -> Expr:
    return (x <= threshold).where(0.0, g)


def _leaky_relu(x: Expr, slope: float = 0.01) -> Expr:
    return (x > 0).where(x, x * slope)


def _leaky_relu_backward(g: Expr, x: Expr, slope: float, is_result: bool) -> Expr:
    return (x > 0).where(g, g * slope)


def _log_sigmoid(x: Expr) -> tuple[Expr, None]:
    return -(-x).call("softplus"), None


def _log_sigmoid_backward(g: Expr, x: Expr, buffer: Any) -> Expr:
    return g * (-x).call("sigmoid")


def _logit(x: Expr, eps: float | None = None) -> Expr:
    x = x if eps is None else _clamp(x, eps, 1 - eps)
    return (x / (1 - x)).call("log")


def _logaddexp(a: Expr, b: Expr) -> Expr:
    high, gap = a.call("maximum", b), (a - b).call("abs")
    return a.same(b).where(a + math.log(2), high + (-gap).call("exp").call("log1p"))


def _sinc(x: Expr) -> Expr:
    angle = x * math.pi
    return x.same(0.0).where(1.0, angle.call("sin") / angle)


def _xlogy(a: Any, b: Any) -> Expr:
    a, b = (a, a.of(b)) if isinstance(a, Expr) else (b.of(a), b)
    return b.call("isnan").where(b, a.same(0.0).where(0.0, a * b.call("log")))


def _addcmul(x: Expr, a: Expr, b: Expr, value: float = 1) -> Expr:
    return x + a * b * value


def _addcdiv(x: Expr, a: Expr, b: Expr, value: float = 1) -> Expr:
    return x + a / b * value


def _lerp(a: Expr, b: Expr, weight: Any) -> Expr:
    return a + (b - a) * weight


def _frac(x: Expr) -> Expr:
    return x - x.call("trunc")


def _nan_to_num(
    x: Expr, nan: float | None = None, posinf: float | None = None, neginf: float | None = None
) -> Expr:
    x = x.call("isnan").where(0.0 if nan is None else nan, x)
    posinf = x.graph.largest if posinf is None else posinf
    neginf = -x.graph.largest if neginf is None else neginf
    return x.same(math.inf).where(posinf, x.same(-math.inf).where(neginf, x))


def _heaviside(x: Expr, at_zero: Expr) -> Expr:
    return x.same(0.0).where(at_zero, (x > 0).where(1.0, 0.0))


def _hypot(a: Expr, b: Expr) -> Expr:
    return a.call("hypot", b)


def _isfinite(x: Expr) -> Expr:
    return x.call("abs") < math.inf


def _isinf(x: Expr) -> Expr:
    return x.call("abs").same(math.inf)


_UNARY = {
    "abs": "abs", "neg": "neg", "exp": "exp", "exp2": "exp2", "expm1": "expm1", "log": "log",
    "log2": "log2", "log10": "log10", "log1p": "log1p", "sqrt": "sqrt", "rsqrt": "rsqrt",
    "reciprocal": "reciprocal", "sin": "sin", "cos": "cos", "tan": "tan", "asin": "asin",
    "acos": "acos", "atan": "atan", "sinh": "sinh", "cosh": "cosh", "tanh": "tanh",
    "asinh": "asinh", "acosh": "acosh", "atanh": "atanh", "sigmoid": "sigmoid", "erf": "erf",
    "erfc": "erfc", "floor": "floor", "ceil": "ceil", "trunc": "trunc", "sign": "sign",
    "sgn": "sign", "relu": "relu", "logical_not": "not", "bitwise_not": "not", "isnan": "isnan",
    "special_ndtr": "normal_cdf", "lgamma": "lgamma",
}  # fmt: skip

_BINARY = {
    "mul": "mul", "maximum": "maximum", "minimum": "minimum", "lt": "lt", "le": "le", "gt": "gt",
    "ge": "ge", "eq": "eq", "ne": "ne", "atan2": "atan2", "fmod": "fmod", "logical_and": "and",
    "logical_or": "or", "bitwise_and": "and", "bitwise_or": "or", "logical_xor": "ne",
    "bitwise_xor": "ne", "copysign": "copysign",
}  # fmt: skip

_FORMULAS: dict[str, Rule] = {
    "add": _add, "sub": _sub, "rsub": lambda a, b, alpha=1: a.of(b) - a * alpha, "div": _div,
    "floor_divide": _floor_divide, "remainder": _remainder, "pow": _pow,
    "square": lambda x: x * x, "clamp": _clamp, "clip": _clamp,
    "hardtanh": lambda x, low=-1.0, high=1.0: _clamp(x, low, high),
    "clamp_min": lambda x, low: _clamp(x, low), "clamp_max": lambda x, high: _clamp(x, None, high),
    "where": _where, "masked_fill": _masked_fill, "softplus": _softplus, "elu": _elu,
    "gelu": _gelu, "silu": _silu, "mish": _mish, "hardswish": _hardswish,
    "hardsigmoid": lambda x: _clamp(x + 3, 0, 6) / 6, "threshold": _threshold,
    "leaky_relu": _leaky_relu, "log_sigmoid_forward": _log_sigmoid, "logit": _logit,
    "logaddexp": _logaddexp, "sinc": _sinc, "xlogy": _xlogy, "addcmul": _addcmul,
    "addcdiv": _addcdiv, "lerp": _lerp, "frac": _frac, "nan_to_num": _nan_to_num,
    "heaviside": _heaviside, "hypot": _hypot, "isfinite": _isfinite, "isinf": _isinf,
    "round": lambda x: x.call("nearbyint"), "deg2rad": lambda x: x * (math.pi / 180),
    "rad2deg": lambda x: x * (180 / math.pi), "fill": lambda x, value: x.of(value),
    "signbit": lambda x: x < 0,
    # derivatives
    "tanh_backward": lambda g, y: g * (1 - y * y),
    "sigmoid_backward": lambda g, y: g * ((1 - y) * y),
    "threshold_backward": _threshold_backward, "softplus_backward": _softplus_backward,
    "elu_backward": _elu_backward, "gelu_backward": _gelu_backward,
    "silu_backward": _silu_backward, "mish_backward": _mish_backward,
    "hardtanh_backward": _hardtanh_backward, "hardswish_backward": _hardswish_backward,
    "hardsigmoid_backward": _hardsigmoid_backward, "leaky_relu_backward": _leaky_relu_backward,
    "log_sigmoid_backward": _log_sigmoid_backward,
    "logit_backward": lambda g, x, eps=None: g / (x * (1 - x)),
}  # fmt: skip

RULES: dict[str, Rule] = {
    **{name: _unary(op) for name, op in _UNARY.items()},
    **{name: _binary(op) for name, op in _BINARY.items()},
    **_FORMULAS,
}
