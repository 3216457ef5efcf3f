"""Rules of special functions.

Some come from their slope. The rest come from their own Taylor coefficients at the value, by the
recurrence that follows from the function's differential equation (``compose``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch.autodiff._propagated import constant, rule, value_of
from ctorch.autodiff.rules._common import (
    as_tensor,
    compose,
    finite,
    masked,
    scalars_too,
    total,
)

_ROOT_PI = math.sqrt(math.pi)
_ROOT_2 = math.sqrt(2.0)


# ---- normal distribution


@rule("erfc", torch.special.erfc)
def erfc(x: Any) -> Any:
    return x.integrate(torch.erfc(x.value), torch.exp(-(x * x)) * (-2 / _ROOT_PI))


@rule(torch.special.ndtr)
def ndtr(x: Any) -> Any:
    slope = torch.exp(x * x * -0.5) * (1 / (_ROOT_2 * _ROOT_PI))
    return x.integrate(torch.special.ndtr(x.value), slope)


@rule(torch.special.log_ndtr)
def log_ndtr(x: Any) -> Any:
    """Its slope r solves ``r' = -r (x + r)``."""
    value = x.value
    slope = [(_ROOT_2 / _ROOT_PI) / torch.special.erfcx(-value / _ROOT_2)]
    for n in range(x.order - 1):
        change = value * slope[n] + _square_at(slope, n)
        if n:
            change = change + slope[n - 1]
        slope.append(-change / (n + 1))
    return compose(x, lambda n: slope[n - 1] / n if n else torch.special.log_ndtr(value))


@rule(torch.special.erfcx)
def erfcx(x: Any) -> Any:
    """``y' = 2 x y - 2 / sqrt(pi)``."""
    value = x.value
    y = [torch.special.erfcx(value)]
    for n in range(x.order):
        change = 2 * value * y[n]
        change = change + 2 * y[n - 1] if n else change - 2 / _ROOT_PI
        y.append(change / (n + 1))
    return compose(x, lambda n: y[n])


@rule("erfinv", torch.special.erfinv)
def erfinv(x: Any) -> Any:
    return _inverse_normal(x, torch.erfinv(x.value), _ROOT_PI / 2, 1.0)


@rule(torch.special.ndtri)
def ndtri(x: Any) -> Any:
    return _inverse_normal(x, torch.special.ndtri(x.value), _ROOT_2 * _ROOT_PI, 0.5)


def _inverse_normal(x: Any, value: Tensor, scale: float, rate: float) -> Any:
    """The y with ``y' = scale * exp(rate * y^2)``: y' is a series g with ``g' = 2 rate g y y'``."""
    y = [value]
    slope = [scale * torch.exp(rate * value * value)]
    for n in range(x.order):
        y.append(slope[n] / (n + 1))
        square = [(k + 1) * _square_at(y, k + 1) for k in range(n + 1)]  # derivative of y^2
        rest = total([square[k] * slope[n - k] for k in range(n + 1)])
        slope.append(rest * (rate / (n + 1)))
    return compose(x, lambda n: y[n])


def _square_at(series: list[Tensor], n: int) -> Tensor:
    return total([series[k] * series[n - k] for k in range(n + 1)])


# ---- gamma functions


@rule("digamma", torch.special.digamma, torch.special.psi)
def digamma(x: Any) -> Any:
    return polygamma(0, x)


@rule("lgamma", torch.special.gammaln)
def lgamma(x: Any) -> Any:
    value = x.value

    def coefficient(n: int) -> Tensor:
        return _polygamma(n - 1, value) / math.factorial(n) if n else torch.lgamma(value)

    return compose(x, coefficient)


@rule(torch.polygamma, torch.special.polygamma)
def polygamma(n: int, x: Any) -> Any:
    value = x.value
    return compose(x, lambda k: _polygamma(n + k, value) / math.factorial(k))


@rule(Tensor.polygamma)
def polygamma_method(x: Any, n: int) -> Any:
    return polygamma(n, x)


def _polygamma(n: int, value: Tensor) -> Tensor:
    return torch.digamma(value) if n == 0 else torch.polygamma(n, value)


@rule("mvlgamma", torch.special.multigammaln)
def mvlgamma(x: Any, p: int) -> Any:
    parts = [torch.lgamma(x - 0.5 * j) for j in range(p)]
    return total(parts) + 0.25 * p * (p - 1) * math.log(math.pi)


@rule("igamma", torch.special.gammainc)
def igamma(a: Any, x: Any) -> Any:
    a, x = _of_gamma("igamma", a, x)
    return x.integrate(torch.igamma(a, x.value), _gamma_density(a, x))


@rule("igammac", torch.special.gammaincc)
def igammac(a: Any, x: Any) -> Any:
    a, x = _of_gamma("igammac", a, x)
    return x.integrate(torch.igammac(a, x.value), -_gamma_density(a, x))


def _of_gamma(name: str, a: Any, x: Any) -> tuple[Any, Any]:
    if not constant(a):
        raise NotImplementedError(f"{name}: a first argument that carries derivatives has no rule")
    return torch.broadcast_tensors(a, x)


def _gamma_density(a: Tensor, x: Any) -> Any:
    return torch.exp(torch.log(x) * (a - 1) - x - torch.lgamma(a))


@rule(torch.special.zeta)
def zeta(s: Any, q: Any, *, out: None = None) -> Any:
    """By Hurwitz; its slope along q is -s times that of ``s + 1``."""
    if not constant(s):
        raise NotImplementedError("zeta: a first argument that carries derivatives has no rule")
    s, q = torch.broadcast_tensors(as_tensor(s, q), q)

    def coefficient(n: int) -> Tensor:
        factor = torch.ones_like(s)
        for k in range(n):
            factor = factor * (s + k) / -(k + 1)
        return factor * torch.special.zeta(s + n, q.value)

    return compose(q, coefficient)


# ---- logarithms


@rule("logaddexp")
def logaddexp(x: Any, y: Any) -> Any:
    first, second = torch.broadcast_tensors(value_of(x).detach(), value_of(y).detach())
    more = first >= second
    above, below = torch.where(more, x, y), torch.where(more, y, x)
    same = (first == second) & first.isinf()
    gap = torch.where(same, 0.0, below - above)
    return above + torch.log1p(torch.exp(gap))


@rule("logaddexp2")
def logaddexp2(x: Any, y: Any) -> Any:
    return logaddexp(x * math.log(2), y * math.log(2)) * (1 / math.log(2))


@rule("logit", torch.special.logit)
def logit(x: Any, eps: float | None = None) -> Any:
    if eps is not None:
        x = torch.clamp(x, eps, 1 - eps)
    return x.integrate(torch.logit(x.value), torch.reciprocal(x * (1 - x)))


@rule("xlogy", torch.special.xlogy)
def xlogy(x: Any, y: Any) -> Any:
    x, y = _where_used(x, y, 0.0)
    return x * torch.log(y)


@rule(torch.special.xlog1py)
def xlog1py(x: Any, y: Any) -> Any:
    x, y = _where_used(x, y, -1.0)
    return x * torch.log1p(y)


def _where_used(x: Any, y: Any, lowest: float) -> tuple[Any, Any]:
    """Keeps the logarithm of ``y - lowest`` finite where the factor is zero."""
    like = x if constant(y) else y
    x, y = as_tensor(x, like), as_tensor(y, like)
    unused = (value_of(x) == 0) & (value_of(y) <= lowest)
    return x, torch.where(unused, lowest + 1.0, y)


@rule(torch.special.entr)
def entr(x: Any) -> Any:
    return x.integrate(torch.special.entr(x.value), -1 - torch.log(x))


# ---- angles


@rule("sinc", torch.special.sinc)
def sinc(x: Any) -> Any:
    """Near zero by its power series: the quotient would lose all digits of the derivatives."""
    z = x * math.pi
    near = z.value.detach().abs() < 2
    small = masked(z, near)
    square = small.times(small)
    series = square * (-1.0 / math.factorial(31))
    for k in range(14, 0, -1):
        series = series.shift((-1.0) ** k / math.factorial(2 * k + 1)).times(square)
    far = torch.where(near, 1.0, z)
    return torch.where(near, series.shift(1.0), torch.sin(far) / far)


@rule("deg2rad")
def deg2rad(x: Any) -> Any:
    return x * (math.pi / 180)


@rule("rad2deg")
def rad2deg(x: Any) -> Any:
    return x * (180 / math.pi)


# ---- softmax and logsumexp: the largest value is taken out, as a constant


@rule("softmax", torch.special.softmax)
@scalars_too
def softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    if dtype is not None:
        x = x.to(dtype)
    if not x.shape[dim]:
        return x
    at = dim if dim < 0 else dim - x.ndim
    powers: Any = torch.exp(x.shift(-finite(x.value.amax(at, keepdim=True))))
    return powers.times(torch.reciprocal(powers.sum(at, keepdim=True)))


@rule("log_softmax", torch.special.log_softmax)
@scalars_too
def log_softmax(x: Any, dim: int, dtype: Any = None) -> Any:
    if dtype is not None:
        x = x.to(dtype)
    if not x.shape[dim]:
        return x
    x = x.shift(-finite(x.value.amax(dim, keepdim=True)))
    return x - torch.log(torch.exp(x).sum(dim, keepdim=True))


def _default_dim(x: Any, dim: int | None) -> int:
    if dim is None:
        raise TypeError("dim: softmax without dim is deprecated in torch; give it")
    return dim


@rule(F.softmax)
def f_softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return softmax(x, _default_dim(x, dim), dtype)


@rule(F.log_softmax)
def f_log_softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return log_softmax(x, _default_dim(x, dim), dtype)


@rule(F.softmin)
def softmin(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    return softmax(-x, _default_dim(x, dim), dtype)


@rule("logsumexp", torch.special.logsumexp)
@scalars_too
def logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Any:
    top = finite(x.value.amax(dim, keepdim=True))
    y = torch.log(torch.exp(x.shift(-top)).sum(dim, keepdim=True)) + top
    if keepdim:
        return y
    return y.squeeze(dim if isinstance(dim, int) else tuple(dim))


@rule(F.gumbel_softmax)
def gumbel_softmax(
    x: Any, tau: float = 1, hard: bool = False, eps: float = 0, dim: int = -1
) -> Any:
    noise = -torch.empty_like(x.value).exponential_().log()
    soft = softmax((x + noise) / tau, dim)
    if not hard:
        return soft
    at = soft.value.argmax(dim, keepdim=True)
    return soft.shift(torch.zeros_like(soft.value).scatter_(dim, at, 1.0) - soft.value.detach())
