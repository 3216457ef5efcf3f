"""Rules of linear algebra, by iterations that are exact for truncated series.

Let ``A = A_0 + N``, where the change N is nilpotent: products of more than ``order`` of it vanish.
Then fixed-point iterations end after ``order`` steps, with any kind of propagation. Kinds may have
rules of their own: ``rules.linalg_jet`` has those of ``Jet``, order by order.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff._propagated import RULES, constant, rule, value_of
from ctorch.autodiff.rules._common import finite, total
from ctorch.ops._op import transforms_active

matmul: Any = torch.matmul  # which returns a Propagated where it gets one


def named(name: str, parts: tuple[Any, ...]) -> Any:
    """The named tuple of torch with this name."""
    return getattr(torch.return_types, name)(parts)


def change_of(x: Any) -> Any:
    """``x - x.value``: what vanishes at the point."""
    return x.shift(-x.value)


def adjoint(x: Any) -> Any:
    return torch.conj(x).mT if x.dtype.is_complex else x.mT


def _steps(x: Any) -> int:
    """Newton steps until all orders are right: their number doubles, from one."""
    return max(int(x.order), 0).bit_length()


@rule("inverse", torch.linalg.inv)
def inv(x: Any, *, out: None = None) -> Any:
    start = torch.linalg.inv(x.value)
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    y = x.linear(torch.zeros_like).shift(start)
    for _ in range(_steps(x)):
        y = y + matmul(y, eye - matmul(x, y))
    return y


@rule(torch.linalg.inv_ex)
def inv_ex(x: Any, *, check_errors: bool = False, out: None = None) -> Any:
    info = torch.linalg.inv_ex(x.value.detach(), check_errors=check_errors).info
    return torch.linalg.inv(x), info


@rule(torch.linalg.solve)
def solve(a: Any, b: Any, *, left: bool = True, out: None = None) -> Any:
    if not left:
        return solve(a.mT, b.mT).mT
    if _is_vector(a, b):
        return solve(a, b.unsqueeze(-1)).squeeze(-1)
    if constant(a):
        return (
            b.linear(lambda s: torch.linalg.solve(a, s)) if b.ndim >= a.ndim else matmul(inv(a), b)
        )
    value = a.value
    if constant(b):
        first: Any = torch.linalg.solve(value, b)
    else:
        first = b.linear(lambda s: torch.linalg.solve(value, _as_matrices(s, value)))
    change, y = change_of(a), first
    for _ in range(int(a.order)):
        y = first - matmul(change, y).linear(lambda s: torch.linalg.solve(value, s))
    return y


def _as_matrices(s: Tensor, matrix: Tensor) -> Tensor:
    """Against torch's reading of ``[B, n]`` as a batch of vectors."""
    return s.expand(*broadcast_shapes(s.shape[:-2], matrix.shape[:-2]), *s.shape[-2:])


def _is_vector(a: Any, b: Any) -> bool:
    """torch's rule: one vector, or a batch of vectors for a batch of matrices of the same shape."""
    return b.ndim == 1 or (b.ndim == a.ndim - 1 and b.shape == a.shape[:-1])


@rule(torch.linalg.solve_ex)
def solve_ex(
    a: Any, b: Any, *, left: bool = True, check_errors: bool = False, out: None = None
) -> Any:
    info = torch.linalg.inv_ex(value_of(a).detach(), check_errors=check_errors).info
    return torch.linalg.solve(a, b, left=left), info


@rule(torch.linalg.solve_triangular)
def solve_triangular(
    a: Any,
    b: Any,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
    out: None = None,
) -> Any:
    options = {"upper": upper, "left": left, "unitriangular": unitriangular}
    if constant(a):
        return b.linear(lambda s: torch.linalg.solve_triangular(a, s, **options))
    a = (
        torch.triu(a, 1 if unitriangular else 0)
        if upper
        else torch.tril(a, -1 if unitriangular else 0)
    )
    if unitriangular:
        a = a + torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    return torch.linalg.solve(a, b) if left else torch.linalg.solve(a.mT, b.mT).mT


@rule("triangular_solve")
def triangular_solve(
    b: Any, a: Any, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    if transpose:
        a, upper = a.mT, not upper
    return solve_triangular(a, b, upper=upper, unitriangular=unitriangular), a


@rule("cholesky_solve")
def cholesky_solve(b: Any, factor: Any, upper: bool = False) -> Any:
    return torch.linalg.solve(_from_factor(factor, upper), b)


@rule("cholesky_inverse")
def cholesky_inverse(factor: Any, upper: bool = False) -> Any:
    return torch.linalg.inv(_from_factor(factor, upper))


def _from_factor(factor: Any, upper: bool) -> Any:
    """``L L^H`` or ``U^H U``; the other triangle is not looked at."""
    factor = torch.triu(factor) if upper else torch.tril(factor)
    return matmul(adjoint(factor), factor) if upper else matmul(factor, adjoint(factor))


# ---- determinants: log det(I + M) = sum_n (-1)^(n + 1) tr(M^n) / n, with nilpotent M


def log_det_change(x: Any) -> Any:
    """``log det x - log det x.value``; a kind may register a rule of its own for this function."""
    return RULES.get((type(x), log_det_change), _log_det_change)(x)


def _log_det_change(x: Any) -> Any:
    value = x.value
    m = change_of(x).linear(lambda s: torch.linalg.solve(value, s))
    power, terms = m, [_trace(m)]
    for n in range(2, int(x.order) + 1):
        if n % 2 == 0:  # the trace of a product is that of its elements
            terms.append((power * m.mT).sum((-2, -1)) * (-1.0 / n))
        else:
            terms.append((power * m.mT).sum((-2, -1)) * (1.0 / n))
        if n < x.order:
            power = matmul(power, m)
    return total(terms)


def _trace(x: Any) -> Any:
    return x.linear(lambda s: s.diagonal(0, -2, -1).sum(-1))


@rule("slogdet", torch.linalg.slogdet)
def slogdet(x: Any, *, out: None = None) -> Any:
    sign, logabs = torch.linalg.slogdet(x.value)
    change = log_det_change(x)
    if x.dtype.is_complex:
        turn = change.imag
        turned = torch.complex(torch.cos(turn), torch.sin(turn))
        return sign * turned, logabs + change.real
    return named("linalg_slogdet", (sign.detach(), change.shift(logabs)))


@rule("logdet")
def logdet(x: Any) -> Any:
    return log_det_change(x).shift(torch.logdet(x.value))


@rule("det", torch.linalg.det)
def det(x: Any, *, out: None = None) -> Any:
    return torch.linalg.det(x.value) * torch.exp(log_det_change(x))


# ---- factorizations


def _lower_half(x: Any) -> Any:
    """The lower triangle with half the diagonal."""
    return x.linear(lambda s: s.tril() - 0.5 * torch.diag_embed(s.diagonal(0, -2, -1)))


@rule("cholesky", torch.linalg.cholesky)
def cholesky(x: Any, upper: bool = False, *, out: None = None) -> Any:
    """``L = L_0 (I + M)``, where ``M + M^H + M M^H`` is the change between the factors."""
    x = _from_triangle(x, upper)  # torch does not look at the other one
    factor = torch.linalg.cholesky(x.value)
    inverse = _inverse_triangle(factor)
    change = change_of(x).linear(lambda s: inverse @ s @ adjoint(inverse))
    m = _lower_half(change)
    for _ in range(1, int(x.order)):
        m = _lower_half(change - matmul(m, adjoint(m)))
    y = m.linear(lambda s: factor @ s).shift(factor)
    return adjoint(y) if upper else y


def _from_triangle(x: Any, upper: bool) -> Any:
    """The Hermitian matrix of which one triangle is given."""
    return (
        torch.triu(x) + adjoint(torch.triu(x, 1))
        if upper
        else torch.tril(x) + adjoint(torch.tril(x, -1))
    )


def _inverse_triangle(factor: Tensor, upper: bool = False) -> Tensor:
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye.expand(factor.shape), upper=upper)


@rule(torch.linalg.cholesky_ex)
def cholesky_ex(
    x: Any, *, upper: bool = False, check_errors: bool = False, out: None = None
) -> Any:
    info = torch.linalg.cholesky_ex(x.value.detach(), check_errors=check_errors).info
    return torch.linalg.cholesky(x, upper=upper), info


@rule(torch.linalg.lu)
def lu(x: Any, *, pivot: bool = True, out: None = None) -> Any:
    """Of square matrices: ``(I + M) (I + U) = I + change`` between the factors of the value."""
    if x.shape[-2] != x.shape[-1]:
        raise NotImplementedError("lu: the rule is for square matrices")
    p, lower, upper = torch.linalg.lu(x.value, pivot=pivot)
    left, right = _inverse_triangle(lower), _inverse_triangle(upper, upper=True)
    change = change_of(x).linear(lambda s: left @ (p.mT @ s) @ right)
    rest = change
    for _ in range(int(x.order)):
        rest = change - matmul(torch.tril(rest, -1), torch.triu(rest))
    y: Any = torch.tril(rest, -1)
    above: Any = torch.triu(rest)
    y = y.linear(lambda s: lower @ s).shift(lower)
    return named("linalg_lu", (p, y, above.linear(lambda s: s @ upper).shift(upper)))


@rule(torch.linalg.lu_factor)
def lu_factor(x: Any, *, pivot: bool = True, out: None = None) -> Any:
    pivots = torch.linalg.lu_factor(x.value.detach(), pivot=pivot)[1]
    _, lower, upper = lu(x, pivot=pivot)
    return named("linalg_lu_factor", (torch.tril(lower, -1) + upper, pivots))


@rule(torch.linalg.lu_solve)
def lu_solve(
    x: Any, pivots: Any, b: Any, *, left: bool = True, adjoint: bool = False, out: None = None
) -> Any:
    if not left or adjoint:
        raise NotImplementedError("lu_solve: the rule is for left=True, adjoint=False")
    p = torch.lu_unpack(value_of(x).detach(), pivots)[0]
    y = solve_triangular(x, matmul(p.mT, b), upper=False, unitriangular=True)
    return solve_triangular(x, y, upper=True)


@rule("qr", torch.linalg.qr)
def qr(x: Any, mode: Any = "reduced", *, some: bool = True, out: None = None) -> Any:
    """With ``B = x R_0^-1``, near to orthonormal: ``B^H B = L L^H``, ``Q = B L^-H``."""
    m, n = x.shape[-2:]
    if m != n and (mode is False or mode == "complete" or not some):
        raise NotImplementedError("qr: mode='complete' is not unique where m > n")
    if m < n:
        q, _ = qr(x[..., :m])
        return named("linalg_qr", (q, matmul(adjoint(q), x)))
    q, r = torch.linalg.qr(x.value)
    inverse = _inverse_triangle(r, upper=True)
    change = change_of(x).linear(lambda s: s @ inverse)
    b = change.shift(q)
    cross = change.linear(lambda s: adjoint(q) @ s)
    eye = torch.eye(n, dtype=x.dtype, device=x.device)
    gram = cross + adjoint(cross) + matmul(adjoint(change), change)
    factor = torch.linalg.cholesky(gram.shift(eye))
    upper = adjoint(factor)
    q_out = adjoint(torch.linalg.solve(factor, adjoint(b)))
    return named("linalg_qr", (q_out, upper.linear(lambda s: s @ r)))


@rule(torch.linalg.eigh)
def eigh(x: Any, UPLO: str = "L", *, out: None = None) -> Any:
    """Eigenvalues must be distinct; vectors keep the sign that torch gave them."""
    values, vectors = torch.linalg.eigh(x.value, UPLO)
    x = _from_triangle(x, UPLO.upper() == "U")
    b = change_of(x).linear(lambda s: adjoint(vectors) @ s @ vectors)
    values, p = _eigen_change(b, values)
    y = p.linear(lambda s: vectors @ s)
    size = torch.square(torch.abs(p)) if x.dtype.is_complex else torch.square(p)
    y = y * torch.rsqrt(size.sum(-2, keepdim=True))
    return named("linalg_eigh", (values, y))


def _eigen_change(b: Any, values: Tensor) -> tuple[Any, Any]:
    """Eigenvalues, and P of the eigenvectors ``V_0 P``, with ones on P's diagonal, from the change
    of the matrix as V_0 sees it, ``V_0^-1 A V_0 - diag(values)``.
    """
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)  # [..., i, j]: lambda_j - lambda_i
    eye = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    factor = torch.where(eye, 0.0, 1 / torch.where(eye, 1.0, gaps))
    one = eye.to(b.dtype).expand(b.shape)
    p = b.linear(torch.zeros_like).shift(one)
    hermitian = b.dtype.is_complex and not values.is_complex()
    real = (lambda s: s.diagonal(0, -2, -1).real) if hermitian else _diagonal
    moved = b.linear(real)
    for _ in range(int(b.order)):
        product = matmul(b, p)
        moved = product.linear(real)
        p = (product - (p - one) * moved.unsqueeze(-2)) * factor + one
    if b.order:
        moved = matmul(b, p).linear(real)
    return moved.shift(values), p


def _diagonal(s: Tensor) -> Tensor:
    return s.diagonal(0, -2, -1)


@rule(torch.linalg.eigvalsh)
def eigvalsh(x: Any, UPLO: str = "L", *, out: None = None) -> Any:
    return torch.linalg.eigh(x, UPLO)[0]


@rule(torch.linalg.eig)
def eig(x: Any, *, out: None = None) -> Any:
    """Eigenvalues must be distinct; of each vector the component that is the largest here stays
    real, as LAPACK has it, and the vector's length one.
    """
    values, vectors = torch.linalg.eig(x.value)
    inverse = torch.linalg.inv(vectors)
    b = change_of(x).linear(lambda s: inverse @ s.to(vectors.dtype) @ vectors)
    values, p = _eigen_change(b, values)
    y = p.linear(lambda s: vectors @ s)
    largest = vectors.detach().abs().argmax(-2, keepdim=True)
    lead = y.gather(-2, largest)
    turn = torch.conj(lead) * torch.sgn(lead.value.detach())
    y = y * turn * torch.rsqrt(_squares(turn) * _squares(y).sum(-2, keepdim=True))
    return named("linalg_eig", (values, y))


def _squares(x: Any) -> Any:
    """``|x|^2`` of complex x."""
    return torch.square(x.real) + torch.square(x.imag)


@rule(torch.linalg.eigvals)
def eigvals(x: Any, *, out: None = None) -> Any:
    return torch.linalg.eig(x)[0]


@rule("svd")
def svd_v(x: Any, some: bool = True, compute_uv: bool = True, *, out: None = None) -> Any:
    u, s, vh = svd(x, full_matrices=not some)
    return named("svd", (u, s, adjoint(vh)))


@rule(torch.linalg.svd)
def svd(x: Any, full_matrices: bool = True, *, driver: Any = None, out: None = None) -> Any:
    """Singular values must be distinct and positive; only ``min(m, n)`` vectors are unique."""
    m, n = x.shape[-2:]
    if full_matrices and m != n:
        raise NotImplementedError("svd: give full_matrices=False where the matrix is not square")
    u0, s0, vh0 = torch.linalg.svd(x.value, full_matrices=False)
    tall = m >= n  # then the right vectors are eigenvectors, else the left ones
    gram = matmul(adjoint(x), x) if tall else matmul(x, adjoint(x))
    start = adjoint(vh0) if tall else u0
    b = change_of(gram).linear(lambda s: adjoint(start) @ s @ start)
    squares, p = _eigen_change(b, s0 * s0)
    size = torch.square(torch.abs(p)) if x.dtype.is_complex else torch.square(p)
    vectors = p.linear(lambda s: start @ s) * torch.rsqrt(size.sum(-2, keepdim=True))
    s = torch.sqrt(squares)
    if tall:
        return named("linalg_svd", (matmul(x, vectors) / s.unsqueeze(-2), s, adjoint(vectors)))
    right = matmul(adjoint(vectors), x) / s.unsqueeze(-1)
    return named("linalg_svd", (vectors, s, right))


@rule(torch.linalg.svdvals)
def svdvals(x: Any, *, driver: Any = None, out: None = None) -> Any:
    return svd(x, False)[1]


@rule("pinverse", torch.linalg.pinv)
def pinv(
    x: Any,
    rcond: Any = None,
    hermitian: bool = False,
    *,
    atol: Any = None,
    rtol: Any = None,
    out: None = None,
) -> Any:
    """Of full rank: where the rank falls, there are no derivatives."""
    if any(bound is not None for bound in (rcond, atol, rtol)):
        raise NotImplementedError(
            "pinv: the rule is for matrices of full rank, for which rcond, atol and rtol do nothing"
        )
    if hermitian:
        x = _from_triangle(x, False)
    if x.shape[-2] < x.shape[-1]:
        return adjoint(pinv(adjoint(x)))
    if not (transforms_active() or is_compiling()):
        rank = torch.linalg.matrix_rank(x.value.detach())
        if bool((rank < x.shape[-1]).any()):
            raise NotImplementedError("pinv: the rule is for matrices of full rank")
    q, r = qr(x)
    return torch.linalg.solve(r, adjoint(q))


@rule(torch.linalg.lstsq)
def lstsq(a: Any, b: Any, rcond: Any = None, *, driver: Any = None) -> Any:
    plain = torch.linalg.lstsq(value_of(a).detach(), value_of(b).detach(), rcond, driver=driver)
    if constant(a):
        a = a + 0 * b.sum()
    solution = matmul(pinv(a), b)
    residuals: Any = plain.residuals
    if residuals.numel():
        rest = torch.abs(b - matmul(a, solution))
        residuals = torch.square(rest).sum(-2)
    singular = svdvals(a) if plain.singular_values.numel() else plain.singular_values
    return named("linalg_lstsq", (solution, residuals, plain.rank, singular))


@rule("matrix_exp", torch.linalg.matrix_exp)
def matrix_exp(x: Any) -> Any:
    """Scaling and squaring of a Taylor polynomial; norms up to 1/2 take 18 terms.

    Of coefficient k the first k terms are zero: so many more are taken.
    """
    size = float(finite(x.value.abs().sum(-1)).max()) if x.numel() else 0.0
    squarings = max(0, math.ceil(math.log2(size)) + 1) if size > 0 else 0
    x = x * 0.5**squarings
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    terms = 18 + int(x.order)
    y = x * (1 / terms) + eye
    for k in range(terms - 1, 0, -1):
        y = matmul(x, y) * (1 / k) + eye
    for _ in range(squarings):
        y = matmul(y, y)
    return y
