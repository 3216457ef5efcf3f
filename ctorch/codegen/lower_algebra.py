"""Lowering rules of linear algebra on small matrices, by elimination written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ctorch.codegen.graph import ONE, ZERO
from ctorch.codegen.lower_expression import Expr, joined, stacked

Rule = Callable[..., Any]

#: rows up to which it is reasonable to write elimination out
LARGEST = 32


def _eliminated(a: Expr, b: Expr | None) -> tuple[Expr, Expr | None, Expr]:
    """Gaussian elimination with row pivoting, as LAPACK chooses rows.

    Returns:
        The upper triangle's rows as [..., n, n], the right sides that belong to them, and the sign
        of the permutation [...].
    """
    n = a.shape[-1]
    if a.shape[-2] != n:  # as torch says, too: a few of the rows of a system are no samples
        raise ValueError(f"a matrix must be square, but is {a.shape[-2]} x {n}")
    if n > LARGEST:
        raise NotImplementedError(f"a matrix of {n} x {n}, of at most {LARGEST} rows")
    rows = a if b is None else joined([a, b.expand((*a.shape[:-1], b.shape[-1]))], -1)
    left, done = rows, []
    sign = Expr(a.graph, np.full(a.shape[:-2], ONE))
    for k in range(n):
        size = left[..., :, k].call("abs")
        chosen = _first(size.same(size.largest(-1, keepdim=True)))[..., None]
        pivot = chosen.where(left, 0.0).sum(-2) if n - k > 1 else left[..., 0, :]
        done.append(pivot)
        if n - k == 1:
            break
        sign = chosen[..., 0, 0].where(sign, -sign)
        # the first row takes the place of the chosen one
        rest = chosen[..., 1:, :].where(left[..., :1, :], left[..., 1:, :])
        factor = rest[..., :, k] / pivot[..., k].unsqueeze(-1)
        left = rest - factor.unsqueeze(-1) * pivot.unsqueeze(-2)
    whole = stacked(done, -2)
    return whole[..., :n], None if b is None else whole[..., n:], sign


def _first(hits: Expr) -> Expr:
    """The first true one along the last dimension."""
    parts, before = [], None
    for i in range(hits.shape[-1]):
        hit = hits[..., i]
        parts.append(hit if before is None else hit.call("and", before.call("not")))
        before = hit if before is None else before.call("or", hit)
    return stacked(parts, -1)


def _substituted(a: Expr, b: Expr, upper: bool, unit: bool = False) -> Expr:
    """The solution of a triangular system [..., n, n], [..., n, m]."""
    n = a.shape[-1]
    if n > LARGEST:
        raise NotImplementedError(f"a matrix of {n} rows, of at most {LARGEST}")
    found: list[Expr | None] = [None] * n
    for i in reversed(range(n)) if upper else range(n):
        right = b[..., i, :]
        for j in range(i + 1, n) if upper else range(i):
            right = right - a[..., i, j].unsqueeze(-1) * found[j]
        found[i] = right if unit else right / a[..., i, i].unsqueeze(-1)
    return stacked([x for x in found if x is not None], -2)


def _solved(a: Expr, b: Expr) -> Expr:
    upper, right, _ = _eliminated(a, b)
    assert right is not None
    return _substituted(upper, right, upper=True)


def _either_side(solve: Callable[[Expr, Expr], Expr], a: Expr, b: Expr, left: bool) -> Expr:
    return solve(a, b) if left else solve(a.swap(), b.swap()).swap()


# Where PyTorch returns factors for its derivatives, the matrix itself stands in their place:
# nothing but ``linalg_lu_solve`` reads them, and it eliminates again.

#: Operators that return factors, and the number of these among the results.
FACTORED = {"_linalg_solve_ex": 1, "_linalg_det": 1, "_linalg_slogdet": 2}


def factors_transpose(func: Any, place: int, a: Tensor, *rest: Any, **kwargs: Any) -> bool:
    """Whether the factors that an operator returns are those of the transposed matrix.

    It is PyTorch's choice, by strides; another matrix of the same strides shows it.
    """
    probe = torch.empty_strided(a.shape, a.stride(), dtype=a.dtype, device=a.device)
    n = a.shape[-1]
    probe.copy_(torch.arange(n * n).reshape(n, n) + 3 * n * torch.eye(n))
    results = func(probe, *rest, **kwargs)
    p, lower, upper = torch.lu_unpack(results[place], results[place + 1])
    whole = p @ lower @ upper
    return bool((whole - probe).abs().amax() > (whole - probe.mT).abs().amax())


def _solve_ex(a: Expr, b: Expr, left: bool = True, check_errors: bool = False) -> tuple[Any, ...]:
    vector = b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])
    x = _either_side(_solved, a, b.unsqueeze(-1) if vector else b, left or vector)
    return x[..., 0] if vector else x, a, _no_pivots(a), _no_error(a)


def _lu_solve(a: Expr, pivots: Expr, b: Expr, left: bool = True, adjoint: bool = False) -> Expr:
    return _either_side(_solved, a.swap() if adjoint else a, b, left)


def _inv_ex(a: Expr, check_errors: bool = False) -> tuple[Any, ...]:
    one = Expr(a.graph, np.where(np.eye(a.shape[-1], dtype=bool), ONE, ZERO))
    return _solved(a, one), _no_error(a)


def _det(a: Expr) -> tuple[Any, ...]:
    upper, _, sign = _eliminated(a, None)
    return sign * _diagonal(upper).reduce("prod", -1), a, _no_pivots(a)


def _slogdet(a: Expr) -> tuple[Any, ...]:
    upper, _, sign = _eliminated(a, None)
    diagonal = _diagonal(upper)
    sign = sign * diagonal.call("sign").reduce("prod", -1)
    return sign, diagonal.call("abs").call("log").sum(-1), a, _no_pivots(a)


def _cholesky_ex(a: Expr, upper: bool = False, check_errors: bool = False) -> tuple[Any, ...]:
    n = a.shape[-1]
    if n > LARGEST:
        raise NotImplementedError(f"a matrix of {n} rows, of at most {LARGEST}")
    zero = Expr(a.graph, np.full(a.shape[:-2], ZERO))
    columns: list[Expr] = []
    rest = a
    for k in range(n):
        root = rest[..., k, k].call("sqrt")
        below = rest[..., k + 1 :, k] / root.unsqueeze(-1)
        parts = [zero] * k + [root] + [below[..., i] for i in range(n - k - 1)]
        columns.append(stacked(parts, -1))
        rest = rest - columns[-1].unsqueeze(-1) * columns[-1].unsqueeze(-2)
    found = stacked(columns, -2 if upper else -1)
    return found, _no_error(a)


def _solve_triangular(
    a: Expr, b: Expr, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Expr:
    if left:
        return _substituted(a, b, upper, unitriangular)
    return _substituted(a.swap(), b.swap(), not upper, unitriangular).swap()


def _diagonal(a: Expr) -> Expr:
    return Expr(a.graph, np.diagonal(a.ids, axis1=-2, axis2=-1))


def _no_pivots(a: Expr) -> Expr:
    return Expr(a.graph, np.full(a.shape[:-1], ZERO))


def _no_error(a: Expr) -> Expr:
    return Expr(a.graph, np.full(a.shape[:-2], ZERO))


# ---- distances and forms


def _cdist(a: Expr, b: Expr, p: float = 2, mode: int | None = None) -> Expr:
    apart = (a.unsqueeze(-2) - b.unsqueeze(-3)).call("abs")
    if p == 0:
        return apart.call("ne", 0.0).where(1.0, 0.0).sum(-1)
    if p == 1:
        return apart.sum(-1)
    if p == float("inf"):
        return apart.largest(-1)
    if p == 2:
        return (apart * apart).sum(-1).call("sqrt")
    return (apart**p).sum(-1) ** (1 / p)


def _cdist_backward(g: Expr, a: Expr, b: Expr, p: float, distance: Expr) -> Expr:
    apart = a.unsqueeze(-2) - b.unsqueeze(-3)
    size, length = apart.call("abs"), distance.unsqueeze(-1)
    if p == 0:
        return a * 0.0
    if p == 1:
        slope = apart.call("sign")
    elif p == float("inf"):
        slope = size.same(length).where(apart.call("sign"), 0.0)
    else:
        slope = apart / length if p == 2 else apart.call("sign") * (size / length) ** (p - 1)
        slope = length.same(0.0).where(0.0, slope)
    return (g.unsqueeze(-1) * slope).sum(-2)


def _trilinear(
    a: Expr, b: Expr, c: Expr, expand_a: Any, expand_b: Any, expand_c: Any, dims: Any,
    unroll: int = 1,
) -> Expr:  # fmt: skip
    parts = []
    for x, expanded in ((a, expand_a), (b, expand_b), (c, expand_c)):
        for dim in sorted(expanded):
            x = x.unsqueeze(dim)
        parts.append(x)
    return (parts[0] * parts[1] * parts[2]).sum(tuple(dims))


RULES: dict[str, Rule] = {
    "_linalg_solve_ex": _solve_ex, "linalg_lu_solve": _lu_solve, "linalg_inv_ex": _inv_ex,
    "_linalg_det": _det, "_linalg_slogdet": _slogdet, "linalg_cholesky_ex": _cholesky_ex,
    "linalg_solve_triangular": _solve_triangular, "_cdist_forward": _cdist,
    "_cdist_backward": _cdist_backward, "_euclidean_dist": _cdist, "_trilinear": _trilinear,
}  # fmt: skip
