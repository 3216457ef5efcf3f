"""Rules of products of matrices and of linear algebra."""

from __future__ import annotations

import pytest
import torch

from tests.autodiff.rule_checks import Case, check

L = torch.linalg


def c(name, f, *shapes, **options):
    return Case(name, f, shapes or ((2, 3, 3),), **options)


TURN = torch.tensor([[0.0, -1, 0], [1, 0, 0], [0, 0, 2]], dtype=torch.float64)
A, B, V = (2, 3, 4), (2, 4, 3), (4,)
C = torch.rand(2, 4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
PRODUCTS = [
    c("matmul", torch.matmul, A, B),
    c("matmul batch of one", torch.matmul, (3, 4), B),
    c("matmul vector", torch.matmul, A, V),
    c("vector matmul", torch.matmul, V, B),
    c("dot", torch.dot, V, V),
    c("vector @ vector", torch.matmul, V, V),
    c("x @ constant", lambda x: x.sin() @ C, A),
    c("constant @ x", lambda x: C @ x.sin(), A),
    c("constant vector @ x", lambda x: C[0, :, 0] @ x.sin(), B),
    c("x @ constant vector", lambda x: x.sin() @ C[0, :, 0], A),
    c("vector @ constant", lambda x: x.sin() @ C, V),
    c("mm", torch.mm, (2, 3), (3, 2)),
    c("bmm", torch.bmm, A, B),
    c("mv", torch.mv, (3, 4), V),
    c("addmm", lambda a, x, y: torch.addmm(a, x, y, beta=0.5, alpha=2), (3,), (3, 4), (4, 3)),
    c("addmv", torch.addmv, (3,), (3, 4), V),
    c("addr", torch.addr, (3, 4), (3,), V),
    c("baddbmm", torch.baddbmm, (2, 3, 3), A, B),
    c("addbmm", torch.addbmm, (3, 3), A, B),
    c("outer", torch.outer, (3,), V),
    c("inner", torch.inner, A, (3, 4)),
    c("kron", torch.kron, (2, 3), (3, 2)),
    c("cross", lambda x, y: torch.cross(x, y, dim=-1), (2, 3), (2, 3)),
    c("linalg.cross", L.cross, (2, 3), (1, 3)),
    c("cross constant", lambda x: L.cross(x.sin(), C[0, :1]), (2, 3)),
    c("vecdot", L.vecdot, A, V),
    c("tensordot", lambda x, y: torch.tensordot(x, y, dims=([0, 2], [0, 1])), A, B),
    c("tensordot 1", lambda x, y: torch.tensordot(x, y, 1), A, (4, 2)),
    c("tensordot constant", lambda x: torch.tensordot(x.sin(), C, ([0, 2], [0, 1])), A),
    c("chain_matmul", torch.chain_matmul, (2, 3), (3, 4), (4, 2)),
    c("multi_dot", lambda *x: L.multi_dot(x), (2, 3), (3, 4), (4, 2)),
    c("matrix_power", lambda x: L.matrix_power(x, 3)),
    c("matrix_power negative", lambda x: L.matrix_power(x + 2 * torch.eye(3), -2)),
    c("vander", lambda x: L.vander(x), V),
    c(
        "torch.vander",
        lambda x: torch.vander(x, 3),
        V,
        reference=lambda x: torch.stack([x**2, x, x**0], -1),
    ),
    c("trace", torch.trace, (3, 3)),
    c("linear", torch.nn.functional.linear, A, (2, 4), (2,)),
    c("bilinear", torch.nn.functional.bilinear, (2, 3), (2, 4), (2, 3, 4), (2,)),
]
EINSUM = [
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("ij,jk", (2, 3), (3, 4)),
    ("bij,bjk->bik", A, B),
    ("...ij,...jk->...ik", A, (4, 2)),
    ("...i,...i", A, V),
    ("ii->i", (3, 3)),
    ("ii", (3, 3)),
    ("bii->b", (2, 3, 3)),
    ("ij,jj->i", (2, 3), (3, 3)),
    ("ij,kj,kl->il", (2, 3), (4, 3), (4, 2)),
    ("a,b,c,d->abcd", (2,), (3,), (2,), (2,)),
    ("i,ij,j->", (3,), (3, 4), V),
    ("ij->ji", (2, 3)),
    ("i,i,i->i", V, V, V),
]
LINALG = [
    c("inv", lambda x: L.inv(x + 2 * torch.eye(3))),
    c("inverse", lambda x: torch.inverse(x[0] + 2 * torch.eye(3))),
    c("solve", lambda x, y: L.solve(x + 2 * torch.eye(3), y), (2, 3, 3), (2, 3, 2)),
    c("solve vector", lambda x, y: L.solve(x + 2 * torch.eye(3), y), (3, 3), (3,)),
    c("solve batch of vectors", lambda x, y: L.solve(x + 2 * torch.eye(3), y), (2, 3, 3), (2, 3)),
    c("solve one matrix", lambda x, y: L.solve(x + 2 * torch.eye(3), y), (3, 3), (2, 3, 2)),
    c("solve right", lambda x, y: L.solve(x + 2 * torch.eye(3), y, left=False), (3, 3), (2, 3)),
    c("solve constant matrix", lambda y: L.solve(C[:, :3] + 2 * torch.eye(3), y.sin()), (2, 3, 2)),
    c("solve constant side", lambda x: L.solve(x + 2 * torch.eye(3), C[:, :3]), (2, 3, 3)),
    c(
        "solve_triangular",
        lambda x, y: L.solve_triangular(x + torch.eye(3), y, upper=True),
        (3, 3),
        (3, 2),
        reference=lambda x, y: L.inv((x + torch.eye(3)).triu()) @ y,
    ),
    c("cholesky_solve", lambda y, x: torch.cholesky_solve(y, x), (3, 2), (3, 3), reference="none"),
    c("det", lambda x: L.det(x + torch.eye(3)), reference=lambda x: _det3(x + torch.eye(3))),
    c("torch.det", lambda x: torch.det(x[0]), reference=lambda x: _det3(x[0])),
    c(
        "slogdet",
        lambda x: L.slogdet(x - torch.eye(3)).logabsdet,
        reference=lambda x: _det3(x - torch.eye(3)).abs().log(),
    ),
    c(
        "logdet",
        lambda x: torch.logdet(x @ x.mT + torch.eye(3)),
        reference=lambda x: _det3(x @ x.mT + torch.eye(3)).log(),
    ),
    c(
        "cholesky",
        lambda x: L.cholesky(x @ x.mT + torch.eye(3)),
        reference=lambda x: _cholesky(x @ x.mT + torch.eye(3)),
    ),
    c(
        "cholesky upper",
        lambda x: L.cholesky(x @ x.mT + torch.eye(3), upper=True),
        reference=lambda x: _cholesky(x @ x.mT + torch.eye(3)).mT,
    ),
    c("eigvalsh", lambda x: L.eigvalsh(x + x.mT + torch.diag(torch.arange(0.0, 9, 3)))),
    c("eigvals", lambda x: L.eigvals(x + torch.diag(torch.arange(0.0, 9, 3)))),
    c("eigvals, turning", lambda x: L.eigvals(x + 3 * TURN)),
    c(
        "eig vectors",
        lambda x: L.eig(x + torch.diag(torch.arange(0.0, 9, 3))),
        reference="none",
        orders=4,
    ),
    c("eig vectors, turning", lambda x: L.eig(x + 3 * TURN), reference="none", orders=4),
    c(
        "eig of complex",
        lambda x: L.eig(torch.complex(x, x.mT * 0.5) + torch.diag(torch.arange(0.0, 9, 3))),
        reference="none",
        orders=4,
    ),
    c(
        "eig restores the matrix",
        lambda x: _restored(L.eig(x + 3 * TURN)),
        reference=lambda x: torch.complex(x + 3 * TURN, 0 * x),
    ),
    c(
        "eigh projector",
        lambda x: _projector(L.eigh(x + x.mT + torch.diag(torch.arange(0.0, 9, 3)))),
        orders=4,
    ),
    c(
        "eigh vectors",
        lambda x: L.eigh(x + x.mT + torch.diag(torch.arange(0.0, 9, 3)))[1],
        reference="none",
    ),
    c("svdvals", lambda x: L.svdvals(x + torch.diag(torch.arange(1.0, 9, 3))), reference="none"),
    c(
        "svd",
        lambda x: _product(L.svd(x + torch.eye(4, 3) * torch.tensor([1.0, 4, 7]), False)),
        (4, 3),
        reference="none",
    ),
    c(
        "svd wide",
        lambda x: L.svd(x.mT + torch.eye(3, 4) * torch.tensor([[1.0], [4], [7]]), False),
        (4, 3),
        reference="none",
    ),
    c("qr", lambda x: tuple(L.qr(x + torch.eye(4, 3))), (2, 4, 3), reference="none"),
    c("qr wide", lambda x: tuple(L.qr(x + torch.eye(3, 4))), (3, 4), reference="none"),
    c(
        "pinv",
        lambda x: L.pinv(x + torch.eye(4, 3)),
        (4, 3),
        reference=lambda x: _pinv(x + torch.eye(4, 3)),
    ),
    c("pinv wide", lambda x: L.pinv(x + torch.eye(3, 4)), (3, 4), reference="none"),
    c(
        "lstsq",
        lambda x, y: L.lstsq(x + torch.eye(4, 3), y).solution,
        (4, 3),
        (4, 2),
        reference=lambda x, y: _pinv(x + torch.eye(4, 3)) @ y,
    ),
    c("matrix_exp", lambda x: torch.matrix_exp(x), reference=lambda x: _exp(x)),
    c("matrix_norm", lambda x: L.matrix_norm(x)),
    c(
        "nuclear norm",
        lambda x: L.matrix_norm(x + torch.diag(torch.arange(1.0, 9, 3)), "nuc"),
        reference="none",
    ),
    c("matrix norm 1", lambda x: L.norm(x + torch.arange(3.0) * 3, 1, dim=(-2, -1))),
]


def _det3(a):
    return (a[..., 0, :] * L.cross(a[..., 1, :], a[..., 2, :])).sum(-1)


def _cholesky(a):
    n = a.shape[-1]
    rows = [[torch.zeros_like(a[..., 0, 0]) for _ in range(n)] for _ in range(n)]
    for j in range(n):
        rows[j][j] = (a[..., j, j] - sum(rows[j][k] ** 2 for k in range(j))).sqrt()
        for i in range(j + 1, n):
            rest = sum(rows[i][k] * rows[j][k] for k in range(j))
            rows[i][j] = (a[..., i, j] - rest) / rows[j][j]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _restored(eig):
    return eig[1] @ torch.diag_embed(eig[0]) @ L.inv(eig[1])


def _projector(eig):
    v = eig[1][..., :1]
    return v @ v.mT


def _product(usv):
    return usv[0] @ usv[2], usv[1]


def _pinv(x):
    return L.inv(x.mT @ x) @ x.mT


def _exp(x):
    y = torch.eye(3, dtype=x.dtype)
    for k in range(40, 0, -1):
        y = x @ y / k + torch.eye(3, dtype=x.dtype)
    return y


@pytest.mark.parametrize("case", PRODUCTS + LINALG, ids=str)
def test_series_of_linear_algebra(case):
    check(case)


@pytest.mark.parametrize("equation", EINSUM, ids=lambda e: e[0])
def test_series_of_einsum(equation):
    text, *shapes = equation
    check(Case(text, lambda *x: torch.einsum(text, *x), shapes))
    if len(shapes) > 1:  # and with the last operand a constant
        last = torch.rand(shapes[-1], dtype=torch.float64)
        check(Case(text, lambda *x: torch.einsum(text, *x, last), shapes[:-1]))


def test_einsum_of_numbered_dims():
    f = lambda x, y: torch.einsum(x, [0, 1], y, [1, 2], [2, 0])  # noqa: E731
    check(Case("lists", f, ((2, 3), (3, 2))))


@pytest.mark.parametrize("twice", [False, True], ids=["gradcheck", "gradgradcheck"])
@pytest.mark.parametrize(
    "f",
    [
        lambda x, y: L.solve(x + 2 * torch.eye(3), y),
        lambda x, y: L.inv(x + 2 * torch.eye(3)) * y,
        lambda x, y: L.slogdet(x + 2 * torch.eye(3))[1] * y,
        lambda x, y: L.cholesky(x @ x.mT + torch.eye(3)) * y,
        lambda x, y: L.eigvalsh(x + x.mT + torch.diag(torch.arange(0.0, 9, 3))) * y,
    ],
    ids=["solve", "inv", "slogdet", "cholesky", "eigvalsh"],
)
def test_coefficients_are_differentiable(f, twice):
    from ctorch.autodiff import jet

    g = torch.Generator().manual_seed(0)
    x, v, y = (
        torch.rand(3, 3, dtype=torch.float64, generator=g, requires_grad=True) for _ in range(3)
    )

    def coefficients(x, v, y):
        value, series = jet(lambda x: f(x, y), (x,), ([v, v * v],))
        return (value, *series)

    check_gradient = torch.autograd.gradgradcheck if twice else torch.autograd.gradcheck
    assert check_gradient(coefficients, (x, v, y), fast_mode=True)


def test_one_matrix_serves_all_kinds_of_rules():
    """The rules for any kind agree with those of Jet, order by order."""
    from ctorch.autodiff._jet import Jet
    from ctorch.autodiff.rules import linalg

    g = torch.Generator().manual_seed(0)
    x = Jet(torch.rand(4, 2, 3, 3, dtype=torch.float64, generator=g), 5) + 2 * torch.eye(3)
    y = Jet(torch.rand(6, 2, 3, 2, dtype=torch.float64, generator=g), 5)
    pairs = [
        (linalg.inv(x), L.inv(x)),
        (linalg.solve(x, y), L.solve(x, y)),
        (linalg._log_det_change(x), linalg.log_det_change(x)),
    ]
    for generic, own in pairs:
        torch.testing.assert_close(generic.stack(), own.stack(), rtol=1e-10, atol=1e-11)
