"""Rules of Bessel functions, and of zeta, against their equations and a stencil."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import ctorch
from tests.autodiff.rule_checks import Case, check

S = torch.special
F64 = torch.float64
#: of which torch itself has no derivatives: the stencil judges
BARE = {
    "bessel_j0": (-3.0, 3.0),
    "bessel_j1": (-3.0, 3.0),
    "bessel_y0": (1.0, 3.0),
    "bessel_y1": (1.0, 3.0),
    "modified_bessel_i0": (-2.0, 2.0),
    "modified_bessel_i1": (-2.0, 2.0),
    "modified_bessel_k0": (1.0, 3.0),
    "modified_bessel_k1": (1.0, 3.0),
    "scaled_modified_bessel_k0": (1.0, 3.0),
    "scaled_modified_bessel_k1": (1.0, 3.0),
}
CASES = [
    Case(name, getattr(S, name), low=low, high=high, reference="none", orders=4)
    for name, (low, high) in BARE.items()
]
CASES += [Case(name, getattr(S, name), low=-2.0, high=2.0) for name in ("i0", "i1")]
CASES += [
    Case("zeta", lambda q: S.zeta(2.5, 1 + q), reference="none", orders=4),
    Case(
        "zeta of many s",
        lambda q: S.zeta(torch.tensor([1.5, 2.0, 3.0, 7.0], dtype=F64), 1 + q),
        reference="none",
        orders=4,
    ),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_coefficients(case: Case) -> None:
    check(case)


def derivatives(f: Any, x: float, order: int) -> list[float]:
    at = torch.tensor(x, dtype=F64)
    value, terms = ctorch.jet(f, (at,), ([torch.ones_like(at)] + [0 * at] * (order - 1),))
    return [value.item(), *(term.item() for term in terms)]


EQUATIONS = {  # x^2 y'' + x y' + (s x^2 - m^2) y = 0
    "bessel_j0": (0, 1),
    "bessel_j1": (1, 1),
    "bessel_y0": (0, 1),
    "bessel_y1": (1, 1),
    "i0": (0, -1),
    "i1": (1, -1),
    "modified_bessel_k0": (0, -1),
    "modified_bessel_k1": (1, -1),
}


@pytest.mark.parametrize("name", EQUATIONS)
@pytest.mark.parametrize("x", [0.1, 3.9, 4.1, 11.9, 12.1, 30.0])
def test_their_equation_differentiated(name: str, x: float) -> None:
    """As it stands, and its derivatives of order n: zero is ``x^2 y_(n+2) + (2n + 1) x y_(n+1) +
    (s x^2 + n^2 - m^2) y_n + s n (2 x y_(n-1) + (n-1) y_(n-2))``.
    """
    m, s = EQUATIONS[name]
    tolerance = 1e-8 if x == 3.9 else 1e-10  # J_0 and J_1 of torch themselves are off by 2e-9 here
    y = derivatives(getattr(S, name), x, 10)
    for n in range(9):
        terms = [
            x * x * y[n + 2],
            (2 * n + 1) * x * y[n + 1],
            (s * x * x + n * n - m * m) * y[n],
            2 * s * n * x * y[n - 1] if n else 0.0,
            s * n * (n - 1) * y[n - 2] if n > 1 else 0.0,
        ]
        assert abs(math.fsum(terms)) < tolerance * max(map(abs, terms))


def test_entire_functions_at_zero() -> None:
    assert derivatives(S.bessel_j0, 0.0, 4) == pytest.approx([1, 0, -1 / 2, 0, 3 / 8], abs=1e-14)
    assert derivatives(S.bessel_j1, 0.0, 3) == pytest.approx([0, 1 / 2, 0, -3 / 8], abs=1e-14)
    assert derivatives(S.i0, 0.0, 4) == pytest.approx([1, 0, 1 / 2, 0, 3 / 8], abs=1e-14)


def test_the_exponent_of_zeta_carries_no_derivatives() -> None:
    x = torch.tensor(2.0, dtype=F64)
    with pytest.raises(NotImplementedError, match="zeta: a first argument"):
        ctorch.derivative(lambda s: S.zeta(s, 1.0), x, x, 1)
