"""Weights of the Adams methods, computed exactly instead of listed."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cache

__all__ = ["MAX_ADAMS_ORDER", "adams_bashforth", "adams_moulton"]

MAX_ADAMS_ORDER = 12


@cache
def adams_bashforth(order: int) -> tuple[float, ...]:
    """Weights of the explicit methods.

    One step is ``y1 = y + h sum_j w_j f(t - j h)`` with j = 0, ..., order - 1.

    Args:
        order: order of the method, and number of slopes it uses: 1 to 12.

    Returns:
        The weights [order], newest slope first.

    Raises:
        ValueError: ``order`` is out of range.
    """
    _check(order, "adams_bashforth")
    return _weights(range(0, -order, -1))


@cache
def adams_moulton(order: int) -> tuple[float, ...]:
    """Weights of the implicit methods.

    One step is ``y1 = y + h sum_j w_j f(t + h - j h)`` with j = 0, ..., order - 1.

    Args:
        order: order of the method, and number of slopes it uses: 1 to 12. The first slope is the
            unknown one at the end of the step; order 1 is the implicit Euler method.

    Returns:
        The weights [order], newest slope first.

    Raises:
        ValueError: ``order`` is out of range.
    """
    _check(order, "adams_moulton")
    return _weights(range(1, 1 - order, -1))


def _check(order: int, name: str) -> None:
    if not 1 <= order <= MAX_ADAMS_ORDER:
        raise ValueError(f"{name}: order must be from 1 to {MAX_ADAMS_ORDER}, got {order}.")


def _weights(nodes: Sequence[int]) -> tuple[float, ...]:
    """Integrals over [0, 1] of the Lagrange polynomials of ``nodes``."""
    return tuple(float(_integral(_lagrange(node, nodes))) for node in nodes)


def _lagrange(node: int, nodes: Sequence[int]) -> list[Fraction]:
    """Coefficients, lowest first, of the polynomial that is 1 at ``node``, 0 at the other nodes."""
    coefficients = [Fraction(1)]
    for other in nodes:
        if other != node:
            times_x = [Fraction(0), *coefficients]
            times_other = [other * x for x in coefficients] + [Fraction(0)]
            pairs = zip(times_x, times_other, strict=True)
            coefficients = [(x - y) / (node - other) for x, y in pairs]
    return coefficients


def _integral(coefficients: Sequence[Fraction]) -> Fraction:
    terms = (x / power for power, x in enumerate(coefficients, start=1))
    return sum(terms, start=Fraction(0))
