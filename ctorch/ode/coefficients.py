"""A tableau in the form in which the step kernels and the reverse sweep read it: small float64
tensors on the CPU.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ctorch.ode.tableaus import TABLEAUS, Tableau, quartic_from_mid
from ctorch.ops._direct import Weights


@dataclasses.dataclass(frozen=True, eq=False)
class Coefficients:
    """Stage weights of a Runge-Kutta method and of its interpolant.

    Stages 0..n-1 make the step; stages n.. are further ones that only the interpolant reads.

    Attributes:
        n: stages of the step.
        fsal: the last stage is the slope at the end of the step (every adaptive tableau is written
            so).
        late: that last slope takes no part in the error, so it is evaluated once the step is
            accepted.
        c: abscissae of all stages.
        a: a[i] are the weights [i] of stage i.
        b: weights [n] of the new state.
        e: weights of the error estimate, or None.
        p: [stages, D]; b_i(theta) = sum_m p[i, m] theta^(m+1).
        slope_p: the same for d b_i / d theta, in powers theta^m.
        states: weights of the states that a step makes: at its stages after the first, and (unless
            the last of those is it) at its end.
        later: abscissae of the stages after the first, but for further ones.
        back: back[j] are the weights of stage j in the reverse sweep over (cotangent of the new
            state, u_(N-1), ..., u_(j+1)), where u_i is the pullback of stage i; for a step without
            and with the further stages.
    """

    tableau: Tableau
    n: int
    fsal: bool
    late: bool
    c: tuple[float, ...]
    a: tuple[Tensor, ...]
    b: Tensor
    e: Tensor | None
    p: Tensor | None
    slope_p: Tensor | None
    states: tuple[Weights, ...]
    later: Weights
    back: tuple[Tensor, ...]
    back_extended: tuple[Tensor, ...]

    @property
    def total(self) -> int:
        """Stages of a step whose interpolant is read."""
        return len(self.c)

    def weights(self, theta: Tensor) -> Tensor:
        """b_i(theta): [M] -> [M, stages]."""
        assert self.p is not None
        powers = theta.unsqueeze(-1) ** torch.arange(1, self.p.shape[1] + 1, device=theta.device)
        return powers.to(torch.float64) @ self.p.T.to(theta.device)

    def slope_weights(self, theta: Tensor) -> Tensor:
        """d b_i / d theta: [M] -> [M, stages]."""
        assert self.slope_p is not None
        powers = theta.unsqueeze(-1) ** torch.arange(self.slope_p.shape[1], device=theta.device)
        return powers.to(torch.float64) @ self.slope_p.T.to(theta.device)


def coefficients(name: str, interpolant: str) -> Coefficients:
    """Coefficients of a method.

    Args:
        name: key of ``TABLEAUS``.
        interpolant: "best"; "torchdiffeq" (its quartic through a midpoint value); "linear"; or
            "none".
    """
    return _COEFFICIENTS[name, interpolant]


def _build(name: str, interpolant: str) -> Coefficients:
    tableau = TABLEAUS[name]
    n = len(tableau.b)
    c, a = list(tableau.c), [list(row) for row in tableau.a]
    p: list[list[float]] | None = None
    if interpolant == "torchdiffeq" and tableau.mid is not None:
        p = [list(row) for row in quartic_from_mid(tableau)]
    elif interpolant == "linear":
        p = [[weight] for weight in tableau.b]
    elif interpolant != "none" and tableau.dense is not None:
        p = [list(row) for row in tableau.dense]
        if len(p) > n:
            c += list(tableau.extra_c)
            a += [list(row) for row in tableau.extra_a]
    fsal = tableau.e is not None
    late = fsal and tableau.e is not None and tableau.e[-1] == 0.0
    error = None
    if tableau.e is not None:
        error = _vector(tableau.e[:-1] if late else tableau.e)
    b = [*tableau.b, *[0.0] * (len(c) - n)]
    states = a[1:n] if fsal else [*a[1:n], list(tableau.b)]
    return Coefficients(
        tableau=tableau,
        n=n,
        fsal=fsal,
        late=late,
        c=tuple(c),
        a=tuple(_vector(row) for row in a),
        b=_vector(tableau.b),
        e=error,
        p=None if p is None else torch.tensor(p, dtype=torch.float64),
        slope_p=None if p is None else _derivative(p),
        states=tuple(Weights(_vector(row)) for row in states),
        later=Weights(_vector(c[1:n])),
        back=_reverse(a[:n], b[:n]),
        back_extended=_reverse(a, b),
    )


def _vector(row: list[float] | tuple[float, ...]) -> Tensor:
    return torch.tensor(list(row), dtype=torch.float64)


def _derivative(p: list[list[float]]) -> Tensor:
    return torch.tensor(
        [[(m + 1) * value for m, value in enumerate(row)] for row in p], dtype=torch.float64
    )


def _reverse(a: list[list[float]], b: list[float]) -> tuple[Tensor, ...]:
    total = len(b)
    return tuple(_vector([b[j], *[a[i][j] for i in range(total - 1, j, -1)]]) for j in range(total))


# Made once and here: tensors made while a transform is at work belong to it and must not outlive it
_COEFFICIENTS = {
    (name, interpolant): _build(name, interpolant)
    for name in TABLEAUS
    for interpolant in ("best", "torchdiffeq", "linear", "none")
}
