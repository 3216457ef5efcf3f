"""Rules of Bessel functions of orders 0 and 1.

Their derivatives are sums of those of neighboring orders: ``2 F_m' = F_(m-1) + s F_(m+1)`` with
s = 1 for I and -1 for J and Y, and minus that sum for K. Source: NIST Digital Library of
Mathematical Functions, sections 10.6 and 10.29.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._propagated import rule
from ctorch.autodiff.rules._common import compose, total

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Family:
    """Functions of one kind.

    Attributes:
        zero, one: those of orders 0 and 1, perhaps scaled by a factor that all orders share.
        sign: s above; ``F_-m`` is ``s^m F_m``.
        slope: of the derivative: -1 for K.
        entire: up to which |x| higher orders come from their power series; they are smaller there
            than those from which the recurrence in the order would take them.
        scale: the factor, if any.
    """

    zero: Function
    one: Function
    sign: int
    slope: int = 1
    entire: float = 0.0
    scale: Function | None = None

    def coefficients(self, x: Tensor, m: int) -> Callable[[int], Tensor]:
        """``n -> F_m^(n)(x) / n!``, times the factor."""
        known: dict[int, Tensor] = {}

        def coefficient(n: int) -> Tensor:
            terms = []
            for k in range(n + 1):
                order = m - n + 2 * k
                sign, order = self.sign ** (k + max(0, -order)), abs(order)
                if order not in known:
                    known[order] = self.of_order(order, x)
                terms.append(sign * math.comb(n, k) * known[order])
            return total(terms) * (self.slope**n / (2**n * math.factorial(n)))

        return coefficient

    def of_order(self, n: int, x: Tensor) -> Tensor:
        """``F_n(x)``, times the factor."""
        if n < 2:
            return self.one(x) if n else self.zero(x)
        if not self.entire:
            return self._upwards(n, x)
        near = x.detach().abs() < self.entire
        far = self._upwards(n, torch.where(near, self.entire, x))
        return torch.where(near, self._series(n, torch.where(near, x, 1.0)), far)

    def _series(self, n: int, x: Tensor) -> Tensor:
        half = x / 2
        term = half**n / math.factorial(n)
        series = term
        for k in range(1, 40):
            term = term * half * half * (self.sign / (k * (n + k)))
            series = series + term
        return series if self.scale is None else series * self.scale(x)

    def _upwards(self, n: int, x: Tensor) -> Tensor:
        """By ``F_(k+1) = F_(k-1) - (2 k / x) F_k`` for I, ``F_(k-1) + (2 k / x) F_k`` for K, and
        ``(2 k / x) F_k - F_(k-1)`` for J and Y.
        """
        below, above = self.zero(x), self.one(x)
        for k in range(1, n):
            change = above * (2 * k / x)
            if self.sign == self.slope == 1:
                below, above = above, below - change
            else:
                below, above = above, change + self.sign * below
        return above


S = torch.special
_I = _Family(S.i0, S.i1, 1, entire=12.0)
_I_SCALED = _Family(S.i0e, S.i1e, 1, entire=12.0, scale=lambda x: torch.exp(-x.abs()))
_J = _Family(S.bessel_j0, S.bessel_j1, -1, entire=4.0)
_Y = _Family(S.bessel_y0, S.bessel_y1, -1)
_K = _Family(S.modified_bessel_k0, S.modified_bessel_k1, 1, -1)
_K_SCALED = _Family(S.scaled_modified_bessel_k0, S.scaled_modified_bessel_k1, 1, -1)


def _of(family: _Family, m: int) -> Callable[..., Any]:
    def apply(x: Any, *, out: None = None) -> Any:
        return compose(x, family.coefficients(x.value, m))

    return apply


rule("i0", S.i0, S.modified_bessel_i0)(_of(_I, 0))
rule(S.i1, S.modified_bessel_i1)(_of(_I, 1))
rule(S.bessel_j0)(_of(_J, 0))
rule(S.bessel_j1)(_of(_J, 1))
rule(S.bessel_y0)(_of(_Y, 0))
rule(S.bessel_y1)(_of(_Y, 1))
rule(S.modified_bessel_k0)(_of(_K, 0))
rule(S.modified_bessel_k1)(_of(_K, 1))


@rule(S.i0e)
def i0e(x: Any) -> Any:
    return _times_decay(x, _of(_I_SCALED, 0)(x))


@rule(S.i1e)
def i1e(x: Any) -> Any:
    return _times_decay(x, _of(_I_SCALED, 1)(x))


def _times_decay(x: Any, y: Any) -> Any:
    """``exp(-|x|) I_m(x)``: coefficients times ``exp(-|value|)``, and the rest of the factor."""
    return y * torch.exp(-x.value.sign() * x.shift(-x.value))


@rule(S.scaled_modified_bessel_k0)
def scaled_k0(x: Any, *, out: None = None) -> Any:
    return _of(_K_SCALED, 0)(x) * torch.exp(x.shift(-x.value))


@rule(S.scaled_modified_bessel_k1)
def scaled_k1(x: Any, *, out: None = None) -> Any:
    return _of(_K_SCALED, 1)(x) * torch.exp(x.shift(-x.value))
