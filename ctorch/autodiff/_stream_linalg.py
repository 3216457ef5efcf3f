"""Linear algebra of series computed order by order: one factorization serves all orders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._propagated import constant, rule
from ctorch.autodiff._stream import Stream
from ctorch.autodiff.rules import linalg


@rule(torch.linalg.solve, kind=Stream)
def solve(a: Any, b: Any, *, left: bool = True, out: None = None) -> Any:
    """``A X = B``: ``X_k = A_0^-1 (B_k - sum_(j >= 1) A_j X_(k-j))``."""
    if constant(a) or not left or linalg._is_vector(a, b):
        return linalg.solve(a, b, left=left)
    lu, pivots = torch.linalg.lu_factor(a.value)
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    start = b if constant(b) else b.value
    value = torch.linalg.lu_solve(lu, pivots, start.expand(*batch, *start.shape[-2:]))
    matrix, right = a.node, None if constant(b) else b.node

    def step(k: int) -> Tensor:
        last = matrix.top(k)
        known = (matrix.between(1, last) @ x.node.downward(k - 1, k - last)).sum(0)
        given = None if right is None else right.at(k)
        return torch.linalg.lu_solve(lu, pivots, -known if given is None else given - known)

    x = a.then(value, step, *(() if right is None else (right,)), degree=float("inf"))
    return x


@rule("inverse", torch.linalg.inv, kind=Stream)
def inv(x: Any, *, out: None = None) -> Any:
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return solve(x, eye.expand(x.shape))


@rule(linalg.log_det_change, kind=Stream)
def log_det_change(x: Any) -> Any:
    """``k l_k = sum_j j tr(Y_(k-j) A_j)``, with Y the inverse."""
    a, y = x.node, inv(x).node

    def step(k: int) -> Tensor:
        last = a.top(k)
        traces = (a.between(1, last) * y.downward(k - 1, k - last).mT).sum((-2, -1))
        weights = torch.arange(1, last + 1, dtype=x.dtype, device=x.device) / k
        return torch.tensordot(weights, traces, 1)

    return x.then(x.value.new_zeros(x.shape[:-2]), step, y, degree=float("inf"))
