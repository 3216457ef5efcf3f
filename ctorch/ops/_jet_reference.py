"""Taylor arithmetic in plain PyTorch: what the kernels of ``ops.jet`` are tested against.

A series is a list of its normalized Taylor coefficients, ``x_k = x^(k) / k!``. It may be shorter
than the order asked for: the coefficients that are missing are zero, and cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Series = list[Tensor]

ROOT_2_OVER_PI = math.sqrt(2 / math.pi)
CUBE = 0.044715  # of the tanh approximation of gelu
MOST_PRODUCTS = 1024  # whole exponents up to here are taken by products, which serve a zero base


# ---- the operators -----------------------------------------------------------------------------


def unary(x: Tensor, op: int, order: int, param: float, level: int, last: bool) -> Tensor:
    """Coefficients 0 to order of the ``level``-th derivative of a function, at a series."""
    name = UNARY[op]
    series = coefficients(x)
    if level <= 2:
        out = FUNCTIONS[name](series, order, level, param)
    else:
        out = _composed(FUNCTIONS[name], series, order, level, param)
    if last:
        return out[order] if len(out) > order else torch.zeros_like(series[0])
    return stack(out, order)


def unary_backward(
    g: Tensor, x: Tensor, op: int, order: int, param: float, level: int, last: bool
) -> Tensor:
    """Correlation of a cotangent with the ``level``-th derivative at a series."""
    slope = unary(x, op, order, param, level, False)
    terms = x.shape[0]
    if last:  # only the coefficient of the highest order has a cotangent
        return slope.flip(0)[:terms] * g
    return correlate(slope, g, terms - 1)


def mul(a: Tensor, b: Tensor, order: int) -> Tensor:
    """Coefficients 0 to order of a product."""
    return stack(product(coefficients(a), coefficients(b), order), order)


def div(a: Tensor, b: Tensor, order: int) -> Tensor:
    """Coefficients 0 to order of a quotient."""
    return stack(quotient(coefficients(a), coefficients(b), order), order)


def correlate(g: Tensor, y: Tensor, order: int) -> Tensor:
    """``z_j = sum_{k >= j} g_{k-j} y_k`` for j = 0 to order."""
    gs, ys = coefficients(g), coefficients(y)
    out = []
    for j in range(order + 1):
        pairs = [gs[k - j] * ys[k] for k in range(j, min(len(ys), j + len(gs)))]
        out.append(_sum(pairs) if pairs else torch.zeros_like(gs[0] * ys[0]))
    return torch.stack(out)


def laplacian(
    x: Tensor, rows: Tensor, lap: Tensor | None, op: int, param: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, Jacobian rows and Laplacian through an elementwise function."""
    first, second = (unary(x[None], op, 0, param, level, True) for level in (1, 2))
    out = second * (rows * rows).sum(0)
    if lap is not None:
        out = out + first * lap
    return unary(x[None], op, 0, param, 0, True), first * rows, out


def laplacian_last(
    x: Tensor, rows: Tensor, lap: Tensor | None, op: int, param: float
) -> tuple[Tensor, Tensor]:
    """The same without the rows."""
    y, _, out = laplacian(x, rows, lap, op, param)
    return y, out


def laplacian_backward(
    x: Tensor,
    rows: Tensor,
    lap: Tensor | None,
    gy: Tensor | None,
    grows: Tensor | None,
    glap: Tensor | None,
    op: int,
    param: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of x, rows and lap; that of rows has the shape of rows."""
    first, second, third = (unary(x[None], op, 0, param, level, True) for level in (1, 2, 3))
    zero = torch.zeros_like(first)
    x_bar, rows_bar, lap_bar = zero, torch.zeros_like(rows), zero
    if gy is not None:
        x_bar = x_bar + first * gy
    if grows is not None:
        x_bar = x_bar + second * (grows * rows).sum(0)
        rows_bar = rows_bar + (first * grows).sum_to_size(rows.shape)
    if glap is not None:
        x_bar = x_bar + third * glap * (rows * rows).sum(0)
        if lap is not None:
            x_bar = x_bar + second * glap * lap
        rows_bar = rows_bar + 2 * rows * (second * glap).expand(x.shape).sum_to_size(rows.shape[1:])
        lap_bar = first * glap
    return x_bar, rows_bar, lap_bar


# ---- arithmetic of series ----------------------------------------------------------------------


def coefficients(x: Tensor) -> Series:
    """The coefficients of a stack; torch's compiled forward mode cannot take views of others."""
    return list(x.contiguous().unbind(0))


def stack(x: Series, order: int) -> Tensor:
    """The coefficients as one tensor, with zeros for those that are missing."""
    x = x[: order + 1]
    zeros = [torch.zeros_like(x[0])] * (order + 1 - len(x))
    return torch.stack([*x, *zeros])


def product(a: Series, b: Series, order: int) -> Series:
    """The truncated Cauchy product."""
    out = []
    for k in range(min(order, len(a) + len(b) - 2) + 1):
        out.append(
            _sum([a[j] * b[k - j] for j in range(max(0, k + 1 - len(b)), min(k + 1, len(a)))])
        )
    return out


def quotient(a: Series, b: Series, order: int) -> Series:
    """``b y = a``, order by order."""
    y: Series = []
    for k in range(order + 1):
        known = [b[j] * y[k - j] for j in range(1, min(k + 1, len(b)))]
        top = _sum(known) if known else None
        if k < len(a):
            top = a[k] if top is None else a[k] - top
        else:
            top = torch.zeros_like(y[0]) if top is None else -top
        y.append(top / b[0])
    return y


def integral(first: Tensor, slope: Series, x: Series, order: int) -> Series:
    """y with ``y_0 = first`` and ``y' = slope x'``; looks at the slope below the order alone."""
    y = [first]
    for k in range(1, order + 1):
        y.append(_integral_term(slope, x, k, first))
    return y


def exponential(x: Series, order: int) -> Series:
    """exp."""
    y = [torch.exp(x[0])]
    for k in range(1, order + 1):
        y.append(_integral_term(y, x, k, y[0]))
    return y


def logarithm(first: Tensor, x: Series, order: int) -> Series:
    """log, with its value given: ``x_0 k y_k = k x_k - sum_{0<j<k} j y_j x_{k-j}``."""
    y = [first]
    for k in range(1, order + 1):
        known = [(j / k) * y[j] * x[k - j] for j in range(max(1, k + 1 - len(x)), k)]
        top = x[k] if k < len(x) else torch.zeros_like(first)
        y.append((top - _sum(known) if known else top) / x[0])
    return y


def power(x: Series, exponent: float, order: int) -> Series:
    """``x ** exponent``; whole exponents that are not negative by products, so that x may be 0."""
    if exponent == int(exponent) and 0 <= exponent <= MOST_PRODUCTS:
        return _whole_power(x, int(exponent), order)
    y = [_power_value(x[0], exponent)]
    for k in range(1, order + 1):
        terms = [
            ((exponent * j - (k - j)) / k) * x[j] * y[k - j] for j in range(1, min(k + 1, len(x)))
        ]
        y.append(_sum(terms) / x[0] if terms else torch.zeros_like(y[0]))
    return y


def _power_value(x: Tensor, exponent: float) -> Tensor:
    special: dict[float, Callable[[Tensor], Tensor]] = {
        0.5: torch.sqrt,
        -0.5: torch.rsqrt,
        -1.0: torch.reciprocal,
    }
    return special[exponent](x) if exponent in special else torch.pow(x, exponent)


def _whole_power(x: Series, exponent: int, order: int) -> Series:
    y = [torch.ones_like(x[0])]
    square, bits = x, exponent
    while bits:
        if bits & 1:
            y = (
                square[: order + 1]
                if bits == exponent or len(y) == 1
                else product(y, square, order)
            )
        bits >>= 1
        if bits:
            square = product(square, square, order)
    return y


def shifted(x: Series, constant: float) -> Series:
    """x + constant."""
    return [x[0] + constant, *x[1:]]


def scaled(x: Series, factor: float) -> Series:
    """factor x."""
    return x if factor == 1 else [factor * c for c in x]


def added(a: Series, b: Series) -> Series:
    """a + b."""
    longer, shorter = (a, b) if len(a) >= len(b) else (b, a)
    return [p + q for p, q in zip(longer, shorter, strict=False)] + longer[len(shorter) :]


def _integral_term(slope: Series, x: Series, k: int, like: Tensor) -> Tensor:
    terms = [
        (j / k) * x[j] * slope[k - j] if j != k else x[j] * slope[0]
        for j in range(max(1, k + 1 - len(slope)), min(k + 1, len(x)))
    ]
    return _sum(terms) if terms else torch.zeros_like(like)


def _sum(terms: Series) -> Tensor:
    total = terms[0]
    for term in terms[1:]:
        total = total + term
    return total


def _composed(function: Function, x: Series, order: int, level: int, param: float) -> Series:
    """The level-th derivative for any level: the function's own series, put into the argument's."""
    line = [x[0], torch.ones_like(x[0])]
    own = function(line, order + level, 0, param)
    own += [torch.zeros_like(x[0])] * (order + level + 1 - len(own))
    outer = [own[n + level] * math.perm(n + level, level) for n in range(order + 1)]
    inner = [torch.zeros_like(x[0]), *x[1:]]
    y = [outer[order]]
    for c in reversed(outer[:-1]):
        y = product(y, inner, order)
        y[0] = y[0] + c
    return y


# ---- the functions: (x, order, level 0 to 2, param) -> the derivative of that level at x ---------

Function = Callable[[Series, int, int, float], Series]


def _tanh(x: Series, order: int, level: int, param: float) -> Series:
    y = [torch.tanh(x[0])]
    slope = [4 * torch.sigmoid(2 * x[0]) * torch.sigmoid(-2 * x[0])]  # 1 - y^2, without cancelling
    for k in range(1, order + 1):
        y.append(_integral_term(slope, x, k, y[0]))
        slope.append(-_sum([y[j] * y[k - j] for j in range(k + 1)]))
    return [y, slope, scaled(product(y, slope, order), -2)][level]


def _tan(x: Series, order: int, level: int, param: float) -> Series:
    y = [torch.tan(x[0])]
    slope = [1 + y[0] * y[0]]
    for k in range(1, order + 1):
        y.append(_integral_term(slope, x, k, y[0]))
        slope.append(_sum([y[j] * y[k - j] for j in range(k + 1)]))
    return [y, slope, scaled(product(y, slope, order), 2)][level]


def _logistic(x: Series, order: int) -> tuple[Series, Series]:
    """sigmoid and its derivative."""
    y = [torch.sigmoid(x[0])]
    slope = [y[0] * torch.sigmoid(-x[0])]
    for k in range(1, order + 1):
        y.append(_integral_term(slope, x, k, y[0]))
        slope.append(y[k] - _sum([y[j] * y[k - j] for j in range(k + 1)]))
    return y, slope


def _logistic_bend(y: Series, slope: Series, order: int) -> Series:
    """The second derivative of sigmoid: ``slope (1 - 2 y)``."""
    return product(slope, shifted(scaled(y, -2), 1), order)


def _sigmoid(x: Series, order: int, level: int, param: float) -> Series:
    y, slope = _logistic(x, order)
    return [y, slope][level] if level < 2 else _logistic_bend(y, slope, order)


def _softplus(x: Series, order: int, level: int, param: float) -> Series:
    y, slope = _logistic(scaled(x, param), order)
    if level == 0:
        return integral(-F.logsigmoid(-param * x[0]) / param, y, x, order)
    return y if level == 1 else scaled(slope, param)


def _logsigmoid(x: Series, order: int, level: int, param: float) -> Series:
    y, slope = _logistic(scaled(x, -1), order)
    if level == 0:
        return integral(F.logsigmoid(x[0]), y, x, order)
    return y if level == 1 else scaled(slope, -1)


def _silu(x: Series, order: int, level: int, param: float) -> Series:
    y, slope = _logistic(x, order)
    if level == 0:
        return product(x, y, order)
    if level == 1:
        return added(y, product(x, slope, order))
    return added(scaled(slope, 2), product(x, _logistic_bend(y, slope, order), order))


def _mish(x: Series, order: int, level: int, param: float) -> Series:
    y, slope = _logistic(x, order)
    soft = integral(-F.logsigmoid(-x[0]), y, x, order)
    outer = _tanh(soft, order, 0, 0.0)
    if level == 0:
        return product(x, outer, order)
    outer_slope = _tanh(soft, order, 1, 0.0)
    first = product(outer_slope, y, order)
    if level == 1:
        return added(outer, product(x, first, order))
    bend = product(_tanh(soft, order, 2, 0.0), product(y, y, order), order)
    second = added(bend, product(outer_slope, slope, order))
    return added(scaled(first, 2), product(x, second, order))


def _exp(x: Series, order: int, level: int, param: float) -> Series:
    return exponential(x, order)


def _expm1(x: Series, order: int, level: int, param: float) -> Series:
    y = exponential(x, order)
    return y if level else [torch.expm1(x[0]), *y[1:]]


def _log(x: Series, order: int, level: int, param: float) -> Series:
    if level == 0:
        return logarithm(torch.log(x[0]), x, order)
    return scaled(power(x, -level, order), [1, -1][level - 1])


def _log1p(x: Series, order: int, level: int, param: float) -> Series:
    one_more = shifted(x, 1)
    if level == 0:
        return logarithm(torch.log1p(x[0]), one_more, order)
    return _log(one_more, order, level, 0.0)


def _pair(s: Tensor, c: Tensor, sign: float, x: Series, order: int) -> tuple[Series, Series]:
    """``s' = c x'`` and ``c' = sign s x'``."""
    ss, cs = [s], [c]
    for k in range(1, order + 1):
        next_s = _integral_term(cs, x, k, s)
        cs.append(sign * _integral_term(ss, x, k, s))
        ss.append(next_s)
    return ss, cs


def _sin(x: Series, order: int, level: int, param: float) -> Series:
    s, c = _pair(torch.sin(x[0]), torch.cos(x[0]), -1, x, order)
    return [s, c, scaled(s, -1)][level]


def _cos(x: Series, order: int, level: int, param: float) -> Series:
    s, c = _pair(torch.sin(x[0]), torch.cos(x[0]), -1, x, order)
    return [c, scaled(s, -1), scaled(c, -1)][level]


def _sinh(x: Series, order: int, level: int, param: float) -> Series:
    s, c = _pair(torch.sinh(x[0]), torch.cosh(x[0]), 1, x, order)
    return c if level == 1 else s


def _cosh(x: Series, order: int, level: int, param: float) -> Series:
    s, c = _pair(torch.sinh(x[0]), torch.cosh(x[0]), 1, x, order)
    return s if level == 1 else c


def _pow(x: Series, order: int, level: int, param: float) -> Series:
    factor = math.prod(param - i for i in range(level))
    if factor == 0:
        return [torch.zeros_like(x[0])]
    return scaled(power(x, param - level, order), factor)


def _erf(x: Series, order: int, level: int, param: float) -> Series:
    slope = scaled(exponential(scaled(product(x, x, order), -1), order), 2 / math.sqrt(math.pi))
    if level == 0:
        return integral(torch.erf(x[0]), slope, x, order)
    return slope if level == 1 else scaled(product(x, slope, order), -2)


def _gelu(x: Series, order: int, level: int, param: float) -> Series:
    square = product(x, x, order)
    density = scaled(exponential(scaled(square, -0.5), order), 1 / math.sqrt(2 * math.pi))
    if level == 2:
        return product(density, shifted(scaled(square, -1), 2), order)
    below = integral(0.5 * torch.erfc(-math.sqrt(0.5) * x[0]), density, x, order)
    if level == 0:
        return product(x, below, order)
    return added(below, product(x, density, order))


def _gelu_tanh(x: Series, order: int, level: int, param: float) -> Series:
    square = product(x, x, order)
    inner = scaled(product(x, shifted(scaled(square, CUBE), 1), order), 2 * ROOT_2_OVER_PI)
    y, slope = _logistic(inner, order)  # (1 + tanh(u)) / 2 = sigmoid(2 u)
    if level == 0:
        return product(x, y, order)
    inner_slope = scaled(shifted(scaled(square, 3 * CUBE), 1), 2 * ROOT_2_OVER_PI)
    first = product(slope, inner_slope, order)
    if level == 1:
        return added(y, product(x, first, order))
    inner_bend = scaled(x, 12 * ROOT_2_OVER_PI * CUBE)
    bend = product(_logistic_bend(y, slope, order), product(inner_slope, inner_slope, order), order)
    second = added(bend, product(slope, inner_bend, order))
    return added(scaled(first, 2), product(x, second, order))


def _inverse(
    value: Callable[[Tensor], Tensor], sign: float, square: float, constant: float, exponent: float
) -> Function:
    """A function whose derivative is ``sign (constant + square x^2) ** exponent``."""

    def function(x: Series, order: int, level: int, param: float) -> Series:
        base = shifted(scaled(product(x, x, order), square), constant)
        if level == 2:
            slope = scaled(power(base, exponent - 1, order), 2 * sign * square * exponent)
            return product(x, slope, order)
        slope = scaled(power(base, exponent, order), sign)
        return slope if level else integral(value(x[0]), slope, x, order)

    return function


FUNCTIONS: dict[str, Function] = {
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "exp": _exp,
    "log": _log,
    "expm1": _expm1,
    "log1p": _log1p,
    "sin": _sin,
    "cos": _cos,
    "sqrt": lambda x, order, level, _: _pow(x, order, level, 0.5),
    "rsqrt": lambda x, order, level, _: _pow(x, order, level, -0.5),
    "reciprocal": lambda x, order, level, _: _pow(x, order, level, -1.0),
    "pow": _pow,
    "erf": _erf,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "sinh": _sinh,
    "cosh": _cosh,
    "tan": _tan,
    "atan": _inverse(torch.atan, 1, 1, 1, -1),
    "asin": _inverse(torch.asin, 1, -1, 1, -0.5),
    "acos": _inverse(torch.acos, -1, -1, 1, -0.5),
    "asinh": _inverse(torch.asinh, 1, 1, 1, -0.5),
    "acosh": _inverse(torch.acosh, 1, 1, -1, -0.5),
    "atanh": _inverse(torch.atanh, 1, -1, 1, -1),
    "logsigmoid": _logsigmoid,
    "mish": _mish,
}
UNARY = tuple(FUNCTIONS)  # their places are their numbers in the operators
