"""Closed forms of the forward Laplacian: determinants, inverse, solve."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._lap import Lap
from ctorch.autodiff._propagated import constant, rule
from ctorch.autodiff.rules.laplacian_attention import cross, rows_times, times_rows

_RESULT: Any = torch.return_types.linalg_slogdet  # type: ignore[attr-defined]


def _rows_of(x: Lap) -> Tensor:
    """Dense rows ``[.., R, N, N]``."""
    return x.densified().full().movedim(0, -3)


def _log_determinant(x: Lap, inverse: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``tr(A^-1 A_r)`` and Laplacian ``tr(A^-1 L_A) - sum_r tr((A^-1 A_r)^2)``."""
    rows = rows_times(_rows_of(x), inverse)  # A_r A^-1, which has the same traces
    first = rows.diagonal(0, -2, -1).sum(-1)  # [.., R]
    lap = -(rows * rows.mT).sum((-3, -2, -1))
    if x.lap is not None:
        lap = lap + (inverse.mT * x.lap).sum((-2, -1))
    return first.movedim(-1, 0), lap


@rule("slogdet", torch.linalg.slogdet, kind=Lap)
def slogdet(x: Any) -> Any:
    sign, value = torch.linalg.slogdet(x.value)
    rows, lap = _log_determinant(x, torch.linalg.inv(x.value))
    return _RESULT((sign.detach(), Lap(value, rows, lap)))


@rule("logdet", kind=Lap)
def logdet(x: Any) -> Any:
    rows, lap = _log_determinant(x, torch.linalg.inv(x.value))
    return Lap(torch.logdet(x.value), rows, lap)


@rule("det", torch.linalg.det, kind=Lap)
def det(x: Any) -> Any:
    value = torch.linalg.det(x.value)
    rows, lap = _log_determinant(x, torch.linalg.inv(x.value))
    return Lap(value, value * rows, value * (lap + (rows * rows).sum(0)))


@rule("inverse", torch.linalg.inv, kind=Lap)
def inverse(x: Any) -> Any:
    y = torch.linalg.inv(x.value)
    half = rows_times(_rows_of(x), y)  # A_r Y
    rows = -times_rows(y, half)  # Y_r = -Y A_r Y
    lap = -2 * cross(rows, half)
    if x.lap is not None:
        lap = lap - y @ x.lap @ y
    return Lap(y, rows.movedim(-3, 0), lap)


@rule(torch.linalg.solve, kind=Lap)
def solve(a: Any, b: Any, *, left: bool = True) -> Any:
    """``A X = B``: ``X_r = A^-1 (B_r - A_r X)``, ``L_X = A^-1 (L_B - L_A X - 2 sum_r A_r X_r)``."""
    if not left:
        return solve(a.mT, b.mT).mT
    if b.ndim == a.ndim - 1 and b.shape == a.shape[:-1]:  # torch's own test of a vector
        return solve(a, b.unsqueeze(-1)).squeeze(-1)
    if constant(a):
        return (
            torch.linalg.inv(a) @ b
            if a.ndim > b.ndim
            else b.linear(lambda s: torch.linalg.solve(a, s))
        )
    y = torch.linalg.inv(a.value)
    value = torch.linalg.solve(a.value, b if constant(b) else b.value)
    ra = _rows_of(a)
    rows = -rows_times(ra, value)
    lap = None
    if not constant(b):
        rows = rows + _rows_of(b)
    rows = times_rows(y, rows)
    lap = -2 * cross(ra, rows)
    if a.lap is not None:
        lap = lap - a.lap @ value
    if not constant(b) and b.lap is not None:
        lap = lap + b.lap
    return Lap(value, rows.movedim(-3, 0), y @ lap)
