"""Rules of orthogonal polynomials of a given degree, by their three-term recurrences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._propagated import constant, rule, value_of

Step = Callable[[int, Any, Any, Any], Any]  # k, x, P_k, P_(k-1) -> P_(k+1)


def _polynomials(name: str, first: Callable[[Any], Any], step: Step) -> None:
    """Registers ``P_n(x)`` with ``P_0 = 1`` and ``P_1 = first(x)``."""
    function = getattr(torch.special, name)

    def apply(x: Any, n: Any) -> Any:
        degree = _degree(name, n)
        if constant(x) or degree < 1:
            return function(value_of(x), degree)
        below: Any = torch.ones_like(x.value)
        y = first(x)
        for k in range(1, degree):
            below, y = y, step(k, x, y, below)
        return y

    rule(function)(apply)


def _degree(name: str, n: Any) -> int:
    if isinstance(n, Tensor) and n.numel() == 1:
        n = n.item()
    if not isinstance(n, (int, float)) or int(n) != n:
        raise NotImplementedError(
            f"{name}: the rule is for one degree n, a whole number; got {type(n).__name__}: call "
            f"it for each degree"
        )
    return int(n)


def _chebyshev(k: int, x: Any, y: Any, below: Any) -> Any:
    return 2 * x * y - below


def _shifted(first: Callable[[Any], Any]) -> tuple[Callable[[Any], Any], Step]:
    """Chebyshev's on [0, 1]: of ``2 x - 1``."""
    return lambda x: first(2 * x - 1), lambda k, x, y, below: _chebyshev(k, 2 * x - 1, y, below)


for _kind, _first in (
    ("t", lambda x: x),
    ("u", lambda x: 2 * x),
    ("v", lambda x: 2 * x - 1),
    ("w", lambda x: 2 * x + 1),
):
    _polynomials(f"chebyshev_polynomial_{_kind}", _first, _chebyshev)
    _polynomials(f"shifted_chebyshev_polynomial_{_kind}", *_shifted(_first))

_polynomials(
    "hermite_polynomial_h", lambda x: 2 * x, lambda k, x, y, below: 2 * (x * y - k * below)
)
_polynomials("hermite_polynomial_he", lambda x: x, lambda k, x, y, below: x * y - k * below)
_polynomials(
    "laguerre_polynomial_l",
    lambda x: 1 - x,
    lambda k, x, y, below: ((2 * k + 1 - x) * y - k * below) / (k + 1),
)
_polynomials(
    "legendre_polynomial_p",
    lambda x: x,
    lambda k, x, y, below: ((2 * k + 1) * x * y - k * below) / (k + 1),
)
