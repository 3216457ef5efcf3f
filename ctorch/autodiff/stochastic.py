"""Differential operators of many dimensions by random sparse or dense jets (STDE).

Source: Shi, Hu, Lin and Kawaguchi, "Stochastic Taylor derivative estimator" (2024): a sum of very
many partial derivatives is estimated from a few, each by one Taylor pass, so that neither dimension
nor order makes it expensive. Every estimate comes with its standard error.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ctorch._numbers import as_int
from ctorch.autodiff._arguments import function, outermost, whole
from ctorch.autodiff._jet import Jet
from ctorch.autodiff._propagated import propagate
from ctorch.autodiff.jet import derivative

Scalar = Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """An estimate of a differential operator.

    Attributes:
        value: ``f(x)``, ``[...]``.
        estimate: of the operator applied to ``f``, unbiased, ``[...]``.
        std_error: the standard error of each estimate, itself estimated from the draws, ``[...]``;
            NaN where a single draw says nothing about it.
    """

    value: Tensor
    estimate: Tensor
    std_error: Tensor


def stochastic_laplacian(
    f: Scalar,
    x: Tensor,
    samples: int = 16,
    *,
    method: str = "sparse",
    generator: torch.Generator | None = None,
) -> Estimate:
    """The Laplacian from second derivatives along a few random directions.

    Args:
        f: ``[..., d] -> [...]``, with any leading dims, acting on each sample alone.
        x: ``[..., d]``.
        samples: directions n for each sample of ``x``.
        method: with Hessian H,
            ``"sparse"``: n coordinates without replacement. Variance ``d^2 (1 - n/d) S^2 / n`` with
            ``S^2`` the variance of the diagonal of H: best where the diagonal is even. From
            ``n = d`` on exact, by each coordinate once.
            ``"rademacher"``: random signs; variance ``2 sum_{i != j} H_ij^2 / n``, exact where H is
            diagonal.
            ``"gaussian"``: variance ``2 |H|_F^2 / n``.
        generator: source of the draws.

    Returns:
        ``Estimate(value, estimate, std_error)``; differentiable any number of times.

    Raises:
        TypeError, ValueError: arguments do not fit.
        MissingRuleError: see ``ctorch.jet``.
    """
    if method not in ("sparse", "rademacher", "gaussian"):
        raise ValueError(f"method: expected sparse, rademacher or gaussian, got {method!r}")
    d, samples = _check(f, x), whole("samples", samples, 1)
    if method == "sparse":
        samples = min(samples, d)
    shape, share = (samples, *x.shape), 1.0
    if method == "sparse":
        v = _coordinates(x, samples, generator)
        share = d / samples
    elif method == "rademacher":
        signs = torch.randint(0, 2, shape, generator=generator, device=x.device)
        v = (2 * signs - 1).to(x.dtype)
    else:
        v = torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
    value, second = _directional(f, x, v, 2)
    if method == "sparse":  # a sum over a finite population
        spread = d * math.sqrt(max(0.0, 1 - samples / d) / samples)
        return Estimate(value, share * second.sum(0), spread * _deviation(second, samples == d))
    return Estimate(value, second.mean(0), _deviation(second) / math.sqrt(samples))


def stochastic_bilaplacian(
    f: Scalar, x: Tensor, samples: int = 16, *, generator: torch.Generator | None = None
) -> Estimate:
    """``(sum_i d_i^2)^2 f`` from fourth derivatives along Gaussian directions.

    ``E[D^4 f(v, v, v, v)] = 3 Laplacian^2 f`` for ``v ~ N(0, I)`` (Isserlis). The variance is that
    of ``D^4 f(v, v, v, v) / 3`` over ``samples``.

    Args:
        f: ``[..., d] -> [...]``, with any leading dims, acting on each sample alone.
        x: ``[..., d]``, floating point.
        samples: number of directions drawn.
        generator: source of the draws.

    Returns:
        ``Estimate(value, estimate, std_error)``, each ``[...]`` in the dtype of ``x``.

    Raises:
        TypeError, ValueError: arguments do not fit.
        MissingRuleError: see ``ctorch.jet``.

    Source: Shi, Hu, Lin and Kawaguchi, "Stochastic Taylor Derivative Estimator" (2024).
    """
    _check(f, x)
    samples = whole("samples", samples, 1)
    shape = (samples, *x.shape)
    v = torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator)
    value, fourth = _directional(f, x, v, 4)
    return Estimate(value, fourth.mean(0) / 3, _deviation(fourth) / (3 * math.sqrt(samples)))


def stochastic_operator(
    f: Scalar,
    x: Tensor,
    terms: Mapping[tuple[int, ...], float],
    samples: int,
    *,
    generator: torch.Generator | None = None,
) -> Estimate:
    """``sum_alpha c_alpha D^alpha f``, any mixed derivatives, from terms drawn by weight.

    Term alpha is drawn with probability ``p = |c_alpha| / sum |c|``, with replacement, the same for
    all samples of ``x``. The estimate is the mean of ``c_alpha D^alpha f / p``; its variance is
    ``((sum |c|) (sum |c| (D^alpha f)^2) - (sum c D^alpha f)^2) / samples``.

    Args:
        f: ``[..., d] -> [...]``, with any leading dims, acting on each sample alone.
        x: ``[..., d]``.
        terms: from the coordinates that a term differentiates by, as ``(0, 0, 1)`` for
            ``d^3 / dx_0^2 dx_1``, to its coefficient.
        samples: number of terms drawn.
        generator: source of the draws.

    Returns:
        ``Estimate(value, estimate, std_error)``.

    Raises:
        TypeError, ValueError: arguments do not fit.
        MissingRuleError: see ``ctorch.jet``.
    """
    d, samples = _check(f, x), whole("samples", samples, 1)
    if not isinstance(terms, Mapping):
        raise TypeError(f"terms: expected a dict, got {type(terms).__name__}")
    kept = [(_coordinates_of(alpha, d), float(c)) for alpha, c in terms.items() if c != 0]
    if not kept:
        raise ValueError("terms: expected at least one with a coefficient other than 0")
    for alpha, c in kept:
        if not math.isfinite(c):
            raise ValueError(f"terms: expected finite coefficients, got {c} for {alpha}")
    value = f(x.clone())  # which f may write into
    _check_result(value, x)
    weights = torch.tensor([abs(c) for _, c in kept], dtype=torch.float64)
    total = float(weights.sum())
    drawn = torch.multinomial(weights, samples, replacement=True, generator=generator)
    groups = defaultdict(list)  # terms of one pattern of orders are one batch
    for i, count in zip(*torch.unique(drawn, return_counts=True), strict=True):
        alpha, c = kept[int(i)]
        axes = sorted(set(alpha))
        orders = tuple(alpha.count(a) for a in axes)
        groups[orders].append((axes, math.copysign(total, c), int(count)))
    first = second = torch.zeros((), dtype=x.dtype, device=x.device)
    for orders, members in groups.items():
        n = len(members)
        eye = torch.eye(d, dtype=x.dtype, device=x.device)
        directions = [
            eye[[axes[i] for axes, _, _ in members]]
            .reshape(n, *(1,) * (x.ndim - 1), d)
            .expand(n, *x.shape)
            for i in range(len(orders))
        ]
        found = derivative(f, x.expand(n, *x.shape), tuple(directions), orders)
        scale = x.new_tensor([s for _, s, _ in members]).reshape(n, *(1,) * (found.ndim - 1))
        often = x.new_tensor([float(m) for _, _, m in members]).reshape(scale.shape)
        first = first + (often * scale * found).sum(0)
        second = second + (often * (scale * found) ** 2).sum(0)
    mean = first / samples
    if samples == 1:
        return Estimate(value, mean, torch.full_like(mean, math.nan))
    variance = (second / samples - mean**2).clamp_min(0) / (samples - 1)
    return Estimate(value, mean, variance.sqrt())


def _directional(f: Scalar, x: Tensor, v: Tensor, order: int) -> tuple[Tensor, Tensor]:
    """``f(x)`` and derivatives of one order along each of the directions ``[n, *x.shape]``."""
    out = propagate(f, Jet(torch.stack([x.expand(v.shape), v]), order))
    _check_result(out, v)
    if not isinstance(out, Jet):
        return out[0], torch.zeros_like(out)
    return out.value[0], out.stack()[order] * math.factorial(order)


def _check_result(out: Any, x: Tensor) -> None:
    if not isinstance(out, (Jet, Tensor)):
        raise TypeError(f"f: expected to return a tensor, got {type(out).__name__}")
    if out.shape != x.shape[:-1]:
        raise ValueError(f"f: expected to return {tuple(x.shape[:-1])}, got {tuple(out.shape)}")


def _coordinates(x: Tensor, samples: int, generator: torch.Generator | None) -> Tensor:
    """Unit vectors of distinct coordinates ``[samples, *x.shape]``, drawn for each sample of x."""
    d = x.shape[-1]
    keys = torch.rand(x.shape, device=x.device, generator=generator)
    index = keys.topk(samples, dim=-1).indices.movedim(-1, 0)
    return torch.zeros(samples, *x.shape[:-1], d, dtype=x.dtype, device=x.device).scatter_(
        -1, index.unsqueeze(-1), 1.0
    )


def _coordinates_of(alpha: Any, d: int) -> tuple[int, ...]:
    """The coordinates by which a term differentiates, in order."""
    numbers = [as_int(i) for i in alpha] if isinstance(alpha, tuple) else []
    found = sorted(i for i in numbers if i is not None and 0 <= i < d)
    if not found or len(found) != len(numbers):
        raise ValueError(f"terms: expected tuples of coordinates 0 to {d - 1}, got {alpha!r}")
    return tuple(found)


def _deviation(draws: Tensor, known: bool = False) -> Tensor:
    """Standard deviation over the draws; a single one leaves it open."""
    if known:
        return torch.zeros_like(draws[0])
    if draws.shape[0] == 1:
        return torch.full_like(draws[0], math.nan)
    return draws.std(0)


def _check(f: Any, x: Tensor) -> int:
    function("f", f)
    outermost(x)
    if not isinstance(x, Tensor):
        raise TypeError(f"x: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point() or x.ndim == 0:
        raise ValueError(f"x: expected floating point [..., d], got {x.dtype}, {tuple(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"x: expected [..., d] with d >= 1, got {tuple(x.shape)}")
    return x.shape[-1]
