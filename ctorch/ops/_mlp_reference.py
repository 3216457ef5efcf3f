"""Derivative operators of plain MLPs in plain, differentiable PyTorch.

What the kernels are tested against, and what serves wherever there is none: on other devices and
dtypes, under transforms, when compiling, and for second derivatives. Every product with a weight is
one GEMM over all coefficients and the whole batch.

Taylor coefficients are normalized, ``x_k = x^(k) / k!``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ctorch._shapes import broadcast_shapes

if TYPE_CHECKING:
    from ctorch.ops.mlp import MLP

GELU_SCALE, GELU_CUBIC = math.sqrt(2 / math.pi), 0.044715
"""Of the tanh form of gelu: ``x/2 (1 + tanh(scale (x + cubic x^3)))``."""


# ---- Taylor coefficients of an activation, order by order --------------------------------------


def product(a: Sequence[Tensor], b: Sequence[Tensor], k: int) -> Tensor:
    """The k-th coefficient of the product of two series."""
    total = a[0] * b[k]
    for j in range(1, k + 1):
        total = total + a[j] * b[k - j]
    return total


def integral(slope: Sequence[Tensor], z: Sequence[Tensor], k: int) -> Tensor:
    """The k-th coefficient, k >= 1, of y with ``dy = slope dz``."""
    total = k * z[k] * slope[0]
    for j in range(1, k):
        total = total + j * z[j] * slope[k - j]
    return total / k


class Series:
    """Coefficients of ``f(z)``, one order at a time: ``push(z_k)`` returns ``y_k``.

    Each order needs those of ``z`` up to it, and the lower ones of ``y`` and of series beside it.
    """

    def __init__(self, name: str, param: float = 0.0) -> None:
        self.z: list[Tensor] = []
        self.y: list[Tensor] = []
        self.beside: list[list[Tensor]] = [[] for _ in range(6)]
        self._order, self._param = _ORDERS[name], param

    def push(self, z: Tensor) -> Tensor:
        """Takes the next coefficient of z and returns that of y."""
        self.z.append(z)
        y = self._order(len(self.y), self, self._param)
        self.y.append(y)
        return y


def _identity(k: int, s: Series, _: float) -> Tensor:
    return s.z[k]


def _relu(k: int, s: Series, _: float) -> Tensor:
    return torch.where(s.z[0] <= 0, 0, s.z[k])  # NaN goes through


def _exp(k: int, s: Series, _: float) -> Tensor:
    return integral(s.y, s.z, k) if k else s.z[0].exp()


def _sin(k: int, s: Series, _: float) -> Tensor:
    (cos, *_rest) = s.beside
    y = integral(cos, s.z, k) if k else s.z[0].sin()
    cos.append(-integral(s.y, s.z, k) if k else s.z[0].cos())
    return y


def _tanh(k: int, s: Series, _: float) -> Tensor:
    (slope, *_rest) = s.beside
    y = integral(slope, s.z, k) if k else s.z[0].tanh()
    square = product([*s.y, y], [*s.y, y], k)
    slope.append(-square if k else 1 - square)
    return y


def _logistic(k: int, y: Sequence[Tensor], slope: list[Tensor], z: Sequence[Tensor]) -> Tensor:
    now = integral(slope, z, k) if k else z[0].sigmoid()
    slope.append(now - product([*y, now], [*y, now], k))
    return now


def _sigmoid(k: int, s: Series, _: float) -> Tensor:
    return _logistic(k, s.y, s.beside[0], s.z)


def _softplus(k: int, s: Series, beta: float) -> Tensor:
    (gate, slope, scaled, *_rest) = s.beside
    y = integral(gate, s.z, k) if k else softplus(s.z[0], beta)
    scaled.append(beta * s.z[k])
    gate.append(_logistic(k, gate, slope, scaled))
    return y


def _silu(k: int, s: Series, _: float) -> Tensor:
    (gate, slope, *_rest) = s.beside
    gate.append(_logistic(k, gate, slope, s.z))
    return product(s.z, gate, k)


def _gelu(k: int, s: Series, _: float) -> Tensor:
    (cdf, pdf, moment, *_rest) = s.beside  # d cdf = pdf dz, d pdf = -moment dz, moment = z pdf
    z = s.z[0]
    cdf.append(integral(pdf, s.z, k) if k else normal_cdf(z))
    pdf.append(-integral(moment, s.z, k) if k else normal_pdf(z))
    moment.append(product(s.z, pdf, k))
    return product(s.z, cdf, k)


def _gelu_tanh(k: int, s: Series, _: float) -> Tensor:
    (square, inner, tanh, slope, *_rest) = s.beside
    square.append(product(s.z, s.z, k))
    inner.append(GELU_SCALE * (s.z[k] + GELU_CUBIC * product(s.z, square, k)))
    tanh.append(integral(slope, inner, k) if k else inner[0].tanh())
    slope.append((1 if k == 0 else 0) - product(tanh, tanh, k))
    return 0.5 * (s.z[k] + product(s.z, tanh, k))


_ORDERS: dict[str, Callable[[int, Series, float], Tensor]] = {
    "identity": _identity,
    "relu": _relu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "exp": _exp,
    "sin": _sin,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
}
ACTIVATIONS: tuple[str, ...] = tuple(_ORDERS)
"""In the order of their numbers in csrc/mlp/arith.h."""


# ---- value and first two slopes of an activation -----------------------------------------------


class Slopes(NamedTuple):
    """``f(z)``, ``f'(z)``, ``f''(z)``."""

    value: Tensor
    first: Tensor
    second: Tensor


def slopes(z: Tensor, name: str, param: float = 0.0) -> Slopes:
    """An activation and its first two derivatives, elementwise."""
    if name == "identity":
        return Slopes(z, torch.ones_like(z), torch.zeros_like(z))
    if name == "relu":
        on = (~(z <= 0)).to(z.dtype)  # NaN goes through
        return Slopes(torch.where(z <= 0, 0, z), on, torch.zeros_like(z))
    if name == "tanh":
        y = z.tanh()
        first = 1 - y * y
        return Slopes(y, first, -2 * y * first)
    if name == "exp":
        y = z.exp()
        return Slopes(y, y, y)
    if name == "sin":
        y = z.sin()
        return Slopes(y, z.cos(), -y)
    if name == "gelu":
        cdf, pdf = normal_cdf(z), normal_pdf(z)
        return Slopes(z * cdf, cdf + z * pdf, pdf * (2 - z * z))
    if name == "gelu_tanh":
        inner1 = GELU_SCALE * (1 + 3 * GELU_CUBIC * z * z)
        y = (GELU_SCALE * (z + GELU_CUBIC * z * z * z)).tanh()
        y1 = (1 - y * y) * inner1
        y2 = (1 - y * y) * (6 * GELU_SCALE * GELU_CUBIC * z) - 2 * y * y1 * inner1
        return Slopes(0.5 * z * (1 + y), 0.5 * (1 + y) + 0.5 * z * y1, y1 + 0.5 * z * y2)
    gate = (z * param if name == "softplus" else z).sigmoid()
    first = gate * (1 - gate)
    if name == "softplus":
        return Slopes(softplus(z, param), gate, param * first)
    second = first * (1 - 2 * gate)
    if name == "sigmoid":
        return Slopes(gate, first, second)
    return Slopes(z * gate, gate + z * first, 2 * first + z * second)  # silu


def softplus(z: Tensor, beta: float) -> Tensor:
    """``log(1 + exp(beta z)) / beta``, without torch's threshold above which it is linear."""
    scaled = beta * z
    return torch.logaddexp(scaled, torch.zeros_like(scaled)) / beta


def normal_cdf(z: Tensor) -> Tensor:
    """Distribution function of the standard normal."""
    return 0.5 * torch.erfc(z * -math.sqrt(0.5))


def normal_pdf(z: Tensor) -> Tensor:
    """Density of the standard normal."""
    return torch.exp(-0.5 * z * z) * (1 / math.sqrt(2 * math.pi))


# ---- the operators -----------------------------------------------------------------------------


def derivative(net: MLP, x: Tensor, v: Tensor, order: int) -> Tensor:
    """``d^K/ds^K f(x + s v)`` at 0; x and v [B, d], result [B, o]."""
    *hidden, (last, last_bias) = net.layers
    jets: list[Tensor] = [x, v][: order + 1]
    for (weight, bias), kind in zip(hidden, net.kinds, strict=True):
        jets = _stacked(jets, weight)
        if bias is not None:
            jets[0] = jets[0] + bias
        zero = jets[0].new_zeros(()).expand_as(jets[0])
        series = Series(*kind)
        jets = [series.push(jets[k] if k < len(jets) else zero) for k in range(order + 1)]
    if order >= len(jets):  # a lone linear layer
        return 0 * F.linear(v, last)
    y = F.linear(jets[order], last, last_bias if order == 0 else None)
    return y * (float(math.factorial(order)) if order <= 170 else math.inf)


def _stacked(jets: Sequence[Tensor], weight: Tensor) -> list[Tensor]:
    shape = broadcast_shapes(*(x.shape for x in jets))
    return list(F.linear(torch.stack([x.expand(shape) for x in jets]), weight).unbind(0))


def series(net: MLP, x: Tensor, order: int) -> Tensor:
    """Taylor coefficients of the solution of ``x' = f(x)``: [K+1, B, d]."""
    *hidden, (last, last_bias) = net.layers
    activations = [Series(*kind) for kind in net.kinds]
    coefficients = [x]
    for k in range(order):
        h = coefficients[k]
        for (weight, bias), activation in zip(hidden, activations, strict=True):
            h = activation.push(F.linear(h, weight, bias if k == 0 else None))
        slope = F.linear(h, last, last_bias if k == 0 else None)
        coefficients.append(slope / (k + 1))
    return torch.stack(coefficients)


def laplacian(net: MLP, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value [B, o], directional derivatives [B, R, o], sum of second ones [B, o].

    ``rows`` [R, h_1] are the directions behind the first layer, ``V W_1^T`` for directions V.
    """
    (first, first_bias), *others = net.layers
    z, lap = F.linear(x, first, first_bias), None
    rows = rows.unsqueeze(1)
    for (weight, bias), kind in zip(others, net.kinds, strict=True):
        y, d1, d2 = slopes(z, *kind)
        bend = d2 * (rows * rows).sum(0)
        lap = F.linear(bend if lap is None else bend + d1 * lap, weight)
        z, rows = F.linear(y, weight, bias), F.linear(d1 * rows, weight)
    if lap is None:
        lap = 0 * z
    return z, rows.expand(-1, *z.shape).transpose(0, 1), lap


def divergence(
    net: MLP, x: Tensor, rows: Tensor | None = None, close: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Value [B, d] and trace of the Jacobian [B].

    The Jacobian is taken forward from ``rows`` [R, h_1] behind the first layer, and closed to the
    trace by ``close`` [R, h_last]; by default, whichever has fewer rows: ``W_1^T`` and ``W_L``, or
    the identity and ``W_1 W_L``.
    """
    hidden, (last, last_bias) = net.layers[:-1], net.layers[-1]
    if not hidden:
        return F.linear(x, last, last_bias), last.diagonal().sum().repeat(x.shape[0])
    if rows is None or close is None:
        rows, close = trace_ends(net)
    h, moved = x, rows.unsqueeze(1)
    for number, (weight, bias) in enumerate(hidden):
        if number:
            moved = F.linear(moved, weight)
        h, d1, _ = slopes(F.linear(h, weight, bias), *net.kinds[number])
        moved = d1 * moved
    return F.linear(h, last, last_bias), (moved * close.unsqueeze(1)).sum((0, -1))


def closed_divergence(net: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same for one or two hidden layers, without a Jacobian.

    With slopes ``d_l`` of the activations, ``d_1 . diag(W_1 W_2)``, or ``d_2 . M d_1`` with the
    matrix ``M = W_2 * (W_1 W_3)^T``, elementwise [h_2, h_1].
    """
    first, *_, last = net.weights
    h, d1, _ = slopes(F.linear(x, *net.layers[0]), *net.kinds[0])
    if len(net.weights) == 2:
        return F.linear(h, *net.layers[1]), d1 @ (first * last.t()).sum(1)
    mix = net.weights[1] * (first @ last).t()
    h, d2, _ = slopes(F.linear(h, *net.layers[1]), *net.kinds[1])
    return F.linear(h, *net.layers[2]), (d2 * F.linear(d1, mix)).sum(-1)


def trace_ends(net: MLP) -> tuple[Tensor, Tensor]:
    """The rows at which the forward Jacobian of a divergence starts, and that close its trace."""
    first, last = net.weights[0], net.weights[-1]
    if first.shape[1] <= first.shape[0]:
        return first.t(), last
    return torch.eye(first.shape[0], dtype=first.dtype, device=first.device), first @ last
