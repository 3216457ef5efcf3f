"""``ctorch.laplacian`` of functions of electrons: compact rows, attention, determinants."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ctorch.autodiff import laplacian
from tests.autodiff.laplacian_checks import COMPACT, D, Psi, agrees, electrons, normal


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("name", COMPACT)
def test_compact_rows_give_what_dense_rows_give(g, name):
    w, x = normal(g, 5, 6) / 2, normal(g, 2, 12)
    agrees(lambda x: COMPACT[name](x, w), x)
    dense = laplacian(lambda x: COMPACT[name](x, w), x, directions=torch.eye(12, dtype=D))
    compact = laplacian(lambda x: COMPACT[name](x, w), x)
    torch.testing.assert_close(compact.laplacian, dense.laplacian, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(compact.gradient, dense.gradient, rtol=1e-11, atol=1e-11)


def test_features_of_one_and_of_two_electrons_are_held_compact(g):
    held = {}

    def f(x):
        r = electrons(x)
        held["r"] = r.rows.shape
        h = torch.tanh(r @ torch.ones(3, 8, dtype=D))
        held["h"] = h.rows.shape
        pairs = (r.unsqueeze(-2) - r.unsqueeze(-3)).square().sum(-1)
        held["pairs"] = pairs.rows.shape
        return h.sum((-1, -2)) + pairs.sum((-1, -2))

    laplacian(f, normal(g, 1, 15))
    assert held == {"r": (3, 1, 1, 3), "h": (3, 1, 5, 8), "pairs": (6, 1, 5, 5)}


# ---- attention, norms, determinants


@pytest.fixture
def psi():
    torch.manual_seed(0)
    nets = [Psi(4, elementary=e).double() for e in (False, True)]
    with torch.no_grad():
        for p in nets[0].parameters():
            p.add_(0.1 * torch.randn_like(p))
    nets[1].load_state_dict(nets[0].state_dict())
    return nets


def test_a_wavefunction_with_attention_layer_norm_and_slogdet(g, psi):
    fused, elementary = psi
    x = normal(g, 3, 12)
    agrees(fused, x, reference=elementary, tolerance=1e-9)
    agrees(elementary, x, tolerance=1e-9)


def test_first_attention_has_no_row_of_scores_for_each_coordinate(g, psi):
    seen = []

    def f(x):
        h = psi[1].first(torch.cat([electrons(x), electrons(x)[..., :2]], -1))
        s = h @ h.mT
        seen.append((s.axes, len(s.rows)))
        p = torch.softmax(s, -1)
        seen.append(p.special is not None)
        return (p @ h).sum((-1, -2))

    laplacian(f, normal(g, 1, 12))
    assert seen[0] == ((-2, -1), 6)
    assert seen[1]


@pytest.mark.parametrize("masked", ["bool", "float", "causal", "all of a row"])
def test_attention_masks(g, masked):
    w = normal(g, 3, 3, 4) / 2
    allowed = torch.ones(4, 4, dtype=torch.bool).tril()
    options = {
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": normal(g, 4, 4)},
        "causal": {"is_causal": True},
        "all of a row": {"attn_mask": allowed.tril(-1)},
    }[masked]

    def f(x, mix):
        h = electrons(x).tanh()
        h = h if mix is None else mix @ h
        return (F.scaled_dot_product_attention(h @ w[0], h @ w[1], h @ w[2], **options) ** 2).sum(
            (-1, -2)
        )

    def reference(x, mix):
        h = electrons(x).tanh()
        h = h if mix is None else mix @ h
        s = (h @ w[0]) @ (h @ w[1]).mT / 2
        mask = options.get("attn_mask", allowed)
        s = s + mask if mask.dtype == D else s.masked_fill(~mask, -1e4)
        p = torch.softmax(s, -1)
        if masked == "all of a row":
            p = torch.cat([0 * p[..., :1, :], p[..., 1:, :]], -2)
        return ((p @ (h @ w[2])) ** 2).sum((-1, -2))

    mix = normal(g, 4, 4)
    for m in (None, mix):
        agrees(lambda x, m=m: f(x, m), normal(g, 2, 12), reference=lambda x, m=m: reference(x, m))


def determinant(a):
    n = a.shape[-1]
    if n == 1:
        return a[..., 0, 0]
    rest = list(range(n))
    return sum(
        (-1) ** j * a[..., 0, j] * determinant(a[..., 1:, :][..., [i for i in rest if i != j]])
        for j in range(n)
    )


@pytest.mark.parametrize("batch", [(), (2,), (2, 3)])
def test_determinants_inverse_and_solve(g, batch):
    w, b = normal(g, 4, 9), normal(g, 3, 2)
    matrix = lambda x: ((x**2) @ w).unflatten(-1, (3, 3)).sin() + 2 * torch.eye(3, dtype=D)  # noqa: E731
    x = normal(g, *batch, 4)
    adjugate = lambda a: torch.stack(  # noqa: E731
        [
            torch.linalg.cross(a[..., 1, :], a[..., 2, :]),
            torch.linalg.cross(a[..., 2, :], a[..., 0, :]),
            torch.linalg.cross(a[..., 0, :], a[..., 1, :]),
        ],
        -1,
    )
    inverse = lambda a: adjugate(a) / determinant(a)[..., None, None]  # noqa: E731
    for f, reference in (
        (lambda a: torch.linalg.slogdet(a)[1], lambda a: determinant(a).abs().log()),
        (torch.linalg.det, determinant),
        (
            lambda a: torch.linalg.inv(a).sin().sum((-1, -2)),
            lambda a: inverse(a).sin().sum((-1, -2)),
        ),
        (
            lambda a: torch.linalg.solve(a, b).sin().sum((-1, -2)),
            lambda a: (inverse(a) @ b).sin().sum((-1, -2)),
        ),
        (
            lambda a: torch.linalg.solve(a, a.mT * a).sum((-1, -2)),
            lambda a: (inverse(a) @ (a.mT * a)).sum((-1, -2)),
        ),
        (
            lambda a: torch.linalg.solve(a, a[..., 0]).sin().sum(-1),
            lambda a: (inverse(a) @ a[..., :1]).sin().sum((-1, -2)),
        ),
    ):
        agrees(
            lambda x, f=f: f(matrix(x)),
            x,
            reference=lambda x, r=reference: r(matrix(x)),
            tolerance=1e-8,
        )
