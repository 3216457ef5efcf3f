"""Linear algebra of Taylor series, by order, with one factorization of the first term."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._jet import Jet
from ctorch.autodiff._propagated import constant, rule
from ctorch.autodiff.rules import linalg

Series = list[Tensor]


def _sum_of_products(a: Series, b: Series, k: int, first: int = 1) -> Tensor | None:
    """``sum_j a_j b_(k-j)`` for j from ``first``, over the coefficients that there are."""
    js = [j for j in range(first, k + 1) if j < len(a) and k - j < len(b)]
    if not js:
        return None
    if len(js) == 1:
        return a[js[0]] @ b[k - js[0]]
    left = torch.cat([a[j].expand(*_batch(a, b), *a[j].shape[-2:]) for j in js], -1)
    right = torch.cat([b[k - j].expand(*_batch(a, b), *b[k - j].shape[-2:]) for j in js], -2)
    return left @ right


def _batch(a: Series, b: Series) -> torch.Size:
    return broadcast_shapes(a[0].shape[:-2], b[0].shape[:-2])


def _solve(a: Series, b: Series, order: int) -> Series:
    """``A X = B``: ``X_k = A_0^-1 (B_k - sum_(j >= 1) A_j X_(k-j))``."""
    lu, pivots = torch.linalg.lu_factor(a[0])
    x: Series = []
    for k in range(order + 1):
        known = _sum_of_products(a, x, k)
        rest = b[k] if k < len(b) else None
        if known is not None:
            rest = -known if rest is None else rest - known
        if rest is None:
            rest = torch.zeros_like(b[0])
        x.append(torch.linalg.lu_solve(lu, pivots, rest))
    return [part.expand(x[-1].shape) for part in x]


@rule(torch.linalg.solve, kind=Jet)
def solve(a: Any, b: Any, *, left: bool = True, out: None = None) -> Any:
    if constant(a) or not left or linalg._is_vector(a, b):
        return linalg.solve(a, b, left=left)
    rows = [b] if constant(b) else list(b.coefficients.unbind(0))
    return Jet(torch.stack(_solve(list(a.coefficients.unbind(0)), rows, a.order)), a.order)


@rule("inverse", torch.linalg.inv, kind=Jet)
def inv(x: Jet, *, out: None = None) -> Jet:
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(x.shape)
    return Jet(torch.stack(_solve(list(x.coefficients.unbind(0)), [eye], x.order)), x.order)


@rule(linalg.log_det_change, kind=Jet)
def log_det_change(x: Jet) -> Jet:
    """``k l_k = sum_j j tr(Y_(k-j) A_j)``, with Y the inverse."""
    a = list(x.coefficients.unbind(0))
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device).expand(x.shape)
    y = _solve(a, [eye], max(x.order - 1, 0))
    out = [a[0].new_zeros(a[0].shape[:-2])]
    for k in range(1, x.order + 1):
        terms = [j * (y[k - j] * a[j].mT).sum((-2, -1)) for j in range(1, min(k, len(a) - 1) + 1)]
        out.append(torch.stack(terms).sum(0) / k if terms else torch.zeros_like(out[0]))
    return Jet(torch.stack(out), x.order)
