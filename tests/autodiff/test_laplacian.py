"""``ctorch.laplacian``: against traces of Hessians by autograd over elementary operations."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ctorch.autodiff import laplacian
from tests.autodiff.laplacian_checks import (
    COMPACT,
    D,
    Psi,
    agrees,
    electrons,
    hessians,
    mlp,
    normal,
)


@pytest.fixture
def g():
    return torch.Generator().manual_seed(0)


# ---- shapes and forms of x


@pytest.mark.parametrize("batch", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("d", [1, 4])
def test_any_batch_and_any_d(g, batch, d):
    f, x = mlp(g, d), normal(g, *batch, d)
    if 0 in batch:
        value, gradient, lap = laplacian(f, x)
        assert value.shape == lap.shape == batch
        assert gradient.shape == x.shape
    else:
        agrees(f, x)


def test_several_outputs_have_derivatives_of_their_own(g):
    f, x = mlp(g, 4), normal(g, 3, 4)
    value, gradient, lap = laplacian(lambda x: torch.stack([f(x), f(2 * x)], -1), x)
    assert (value.shape, gradient.shape, lap.shape) == ((3, 2), (3, 2, 4), (3, 2))
    one, two = laplacian(f, x), laplacian(lambda x: f(2 * x), x)
    torch.testing.assert_close(gradient, torch.stack([one.gradient, two.gradient], -2))
    torch.testing.assert_close(lap, torch.stack([one.laplacian, two.laplacian], -1))


def test_a_constant_and_a_linear_function(g):
    x, w = normal(g, 3, 4), normal(g, 4)
    value, gradient, lap = laplacian(lambda x: x.new_ones(x.shape[:-1]), x)
    assert bool((value == 1).all())
    assert not gradient.any()
    assert gradient.shape == x.shape
    value, gradient, lap = laplacian(lambda x: x @ w, x)
    torch.testing.assert_close(gradient, w.expand(3, 4))
    assert not lap.any()


@pytest.mark.parametrize(
    "f",
    [
        lambda x: (x**3).sum(-1) * x[..., 0],
        lambda x: x[..., 0] / (2 + x[..., 1] ** 2) * x[..., 2],
        lambda x: torch.exp(-x.square().sum(-1)) * torch.cos(x[..., 1]),
        lambda x: x.prod(-1),
        lambda x: torch.where(x[..., :1] > 0, x * x * x, x.sin()).sum(-1),
        lambda x: torch.cat([x[..., :2] ** 2, x[..., 2:].exp()], -1).logsumexp(-1),
        lambda x: torch.softmax(x * x, -1)[..., 0],
        lambda x: (x.unsqueeze(-1) @ x.unsqueeze(-2)).sin().sum((-1, -2)),
        lambda x: x.amax(-1) ** 2,
        lambda x: torch.einsum("...i,...j,...j->...", x, x, x),
    ],
)
def test_functions_of_shared_rows(g, f):
    agrees(f, normal(g, 3, 4).abs() + 0.1)


@pytest.fixture
def psi():
    torch.manual_seed(0)
    nets = [Psi(4, elementary=e).double() for e in (False, True)]
    with torch.no_grad():
        for p in nets[0].parameters():
            p.add_(0.1 * torch.randn_like(p))
    nets[1].load_state_dict(nets[0].state_dict())
    return nets


# ---- weights


def weighted(f, x, weight):
    return (hessians(f, x) * weight).sum((-1, -2))


def test_a_diagonal_weight_of_any_sign(g):
    f, x = mlp(g, 6), normal(g, 3, 6)
    diagonals = [
        torch.tensor(w, dtype=D)
        for w in (
            [1, 2, 3, 4, 5, 6],
            [1, 0, 3, 0, 0, 2],
            [1, -2, 3, -4, 0, 5],
            [-1, -2, -3, -1, -1, -1],
            [0] * 6,
        )
    ]
    for w in diagonals:
        out = laplacian(f, x, w)
        torch.testing.assert_close(out.laplacian, weighted(f, x, torch.diag(w)))
        torch.testing.assert_close(out.gradient, laplacian(f, x).gradient)
        torch.testing.assert_close(out.value, f(x))


def test_a_diagonal_weight_keeps_slots_apart(g):
    w, mass = normal(g, 5, 6) / 2, torch.tensor([1.0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 5, 6], dtype=D)
    for name in ("pairs to one", "mean field", "outer product"):
        f, x = (lambda x, n=name: COMPACT[n](x, w)), normal(g, 2, 12)
        torch.testing.assert_close(
            laplacian(f, x, mass).laplacian, weighted(f, x, torch.diag(mass))
        )


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("rank", [5, 2])
@pytest.mark.parametrize("definite", [True, False])
def test_a_matrix_weight(g, rank, batched, definite):
    f, x = mlp(g, 5), normal(g, 3, 5)
    s = normal(g, *((3,) if batched else ()), 5, rank)
    signs = (
        torch.ones(rank, dtype=D) if definite else torch.tensor([1.0, -1, 1, -1, 1], dtype=D)[:rank]
    )
    weight = (s * signs) @ s.mT
    out = laplacian(f, x, weight)
    torch.testing.assert_close(out.laplacian, weighted(f, x, weight), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.gradient, laplacian(f, x).gradient)


@pytest.mark.parametrize("batched", [False, True])
def test_second_directional_derivatives(g, batched):
    f, x = mlp(g, 5), normal(g, 3, 5)
    v = normal(g, 2, 3, 5) if batched else normal(g, 2, 5)
    weight = torch.einsum("r...i,r...j->...ij", v, v)
    out = laplacian(f, x, directions=v)
    torch.testing.assert_close(out.laplacian, weighted(f, x, weight))
    torch.testing.assert_close(out.gradient, laplacian(f, x).gradient)


# ---- chunks


def test_chunks_give_what_the_whole_gives(g, psi):
    x = normal(g, 7, 12)
    whole = laplacian(psi[0], x, chunk_size=None)
    for size in (1, 2, 3, 7, 100, -1):
        for a, b in zip(laplacian(psi[0], x, chunk_size=size), whole, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    weight = normal(g, 7, 12, 12)
    weight = weight @ weight.mT
    a, b = (laplacian(psi[0], x, weight, chunk_size=c).laplacian for c in (2, None))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_the_size_of_chunks_follows_the_size_of_rows(g, monkeypatch):
    import importlib

    module = importlib.import_module("ctorch.autodiff.laplacian")
    monkeypatch.setattr(module, "_CACHE", 8 * 4 * 50 * 10)  # ten samples' rows [4, 50] in float64
    sizes = []
    w = normal(g, 50, 4)

    def f(x):
        if type(x).__name__ == "Lap":
            sizes.append(len(x))
        return torch.tanh(x @ w.mT).sum(-1)

    x = normal(g, 100, 4)
    laplacian(f, x)
    sizes.clear()
    laplacian(f, x)
    assert sizes == [10] * 10


# ---- derivatives of the Laplacian


def test_gradients_in_parameters_and_x(g):
    torch.manual_seed(0)
    net = Psi(2, width=4, layers=1).double()
    names, tensors = zip(*net.named_parameters(), strict=True)

    def f(x, *parameters):
        named = dict(zip(names, parameters, strict=True))
        return laplacian(lambda z: torch.func.functional_call(net, named, (z,)), x, chunk_size=1)

    inputs = (
        normal(g, 2, 6).requires_grad_(),
        *(p.detach().clone().requires_grad_() for p in tensors),
    )
    assert torch.autograd.gradcheck(f, inputs, fast_mode=True, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["pairs to one", "mean field", "outer product", "norm over slots"])
def test_gradients_through_compact_rows(g, name):
    w = (normal(g, 5, 4) / 2).requires_grad_()
    x = normal(g, 2, 9).requires_grad_()

    def f(x, w):
        return laplacian(lambda x: COMPACT[name](x, w), x)

    assert torch.autograd.gradcheck(f, (x, w), fast_mode=True, atol=1e-5)


def test_gradients_in_weights(g):
    f, x = mlp(g, 3), normal(g, 2, 3)
    s = normal(g, 3, 3)
    matrix = (s @ s.mT + torch.eye(3, dtype=D)).requires_grad_()
    symmetric = lambda a: (a + a.mT) / 2  # noqa: E731
    assert torch.autograd.gradcheck(lambda a: laplacian(f, x, symmetric(a)).laplacian, (matrix,))
    diagonal = torch.tensor([1.0, -2.0, 0.5], dtype=D, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: laplacian(f, x, a).laplacian, (diagonal,))
    v = normal(g, 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: laplacian(f, x, directions=v).laplacian, (v,))


def test_no_graph_is_needed_and_none_is_left(g, psi):
    x = normal(g, 3, 12)
    with torch.no_grad():
        out = laplacian(psi[0], x)
    assert not any(t.requires_grad for t in out)
    for a, b in zip(out, laplacian(psi[0], x), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-10, atol=1e-10)


def test_vmap_over_samples(g):
    f, x = mlp(g, 6), normal(g, 4, 6)
    compact = lambda x: f(electrons(x).square().sum(-1).repeat(*(1,) * (x.ndim - 1), 3))  # noqa: E731
    for fn in (f, compact):
        for a, b in zip(
            torch.vmap(lambda x, fn=fn: tuple(laplacian(fn, x)))(x), laplacian(fn, x), strict=True
        ):
            torch.testing.assert_close(a, b)


# ---- single precision


def test_single_precision(psi, g):
    x = normal(g, 8, 12)
    single = Psi(4).float()
    single.load_state_dict(psi[0].state_dict())
    a, b = laplacian(single, x.float()), laplacian(psi[0], x)
    assert all(t.dtype == torch.float32 for t in a)
    error = (a.laplacian.double() - b.laplacian).abs() / (1 + b.laplacian.abs())
    assert float(error.median()) < 1e-4


# ---- plain MLPs, rules of one's own


@pytest.mark.parametrize("batch", [(), (5,), (2, 3)])
def test_a_recognised_mlp_gives_what_its_layers_give(g, batch):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 2))
    net, x = net.double(), normal(g, *batch, 4)
    s = normal(g, 4, 2)
    weights = (None, torch.tensor([1.0, 2, 3, 4], dtype=D), torch.tensor([1.0, -2, 3, 0], dtype=D))
    for weight in (*weights, s @ s.mT):
        out, expected = laplacian(net, x, weight), laplacian(lambda x: net(x), x, weight)
        for a, b in zip(out, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_rule_for_laplacians_alone(g):
    from ctorch.autodiff import Lap, register_jet_rule
    from ctorch.autodiff._propagated import RULES

    def log_gaps(x):
        if torch.overrides.has_torch_function_unary(x):
            return torch.overrides.handle_torch_function(log_gaps, (x,), x)
        return torch.log(x.sort(-1).values.diff(dim=-1)).sum(-1)

    @register_jet_rule(log_gaps, kind=Lap)
    def rule(x):
        order = x.value.argsort(-1)
        rows = x.densified().full()
        sort = lambda s: s.take_along_dim(order.expand(s.shape), -1).diff(dim=-1)  # noqa: E731
        weight = 1 / sort(x.value)
        change = weight * sort(rows)
        lap = (weight * sort(x.laplacian())).sum(-1) - (change * change).sum((0, -1))
        return Lap(-weight.log().sum(-1), change.sum(-1), lap)

    try:
        w = normal(g, 3, 5)
        x = normal(g, 4, 6)
        agrees(
            lambda x: log_gaps((electrons(x) @ w).tanh().sum(-2)),
            x,
            reference=lambda x: torch.log(
                (electrons(x) @ w).tanh().sum(-2).sort(-1).values.diff(dim=-1)
            ).sum(-1),
        )
    finally:
        del RULES[Lap, log_gaps]


# ---- what is refused


def bad(match, error=ValueError):
    return pytest.raises(error, match=match)


def test_functions_that_mix_samples_are_refused(g):
    x = normal(g, 6, 4)
    with bad("acts on each sample alone"):
        laplacian(lambda x: (x - x.mean(0)).square().sum(-1), x)
    with bad("does not begin with"):
        laplacian(lambda x: x.square().sum(), x)
    with bad("does not begin with"):
        laplacian(lambda x: x.square().sum(0), x)
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    with bad(r"eval\(\)"):
        laplacian(net, x)
    laplacian(net.eval(), x)


def test_a_random_function_is_not_taken_for_one_that_mixes_samples(g):
    laplacian(lambda x: F.dropout(x, 0.5).square().sum(-1), normal(g, 6, 4))


def test_along_directions_is_one_compiled_graph(g):
    f, x = mlp(g, 4), normal(g, 3, 4)
    weight = torch.diag(torch.tensor([2.0, 0.5, 1.0, 3.0], dtype=D)) + 0.2
    rows = torch.linalg.cholesky(weight).mT

    def of_rows(x):
        return laplacian(f, x, directions=rows).laplacian

    compiled = torch.compile(of_rows, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), laplacian(f, x, weight).laplacian)


def test_arguments_that_do_not_fit(g):
    f, x = mlp(g, 4), normal(g, 3, 4)
    with bad("f: expected a function", TypeError):
        laplacian(3, x)
    with bad("x: expected a tensor", TypeError):
        laplacian(f, [1.0])
    with bad("x: expected a real floating point", TypeError):
        laplacian(f, torch.ones(3, 4, dtype=torch.int64))
    with bad(r"x: expected shape \[..., d\]"):
        laplacian(f, torch.ones((), dtype=D))
    with bad("f: expected to return one tensor", TypeError):
        laplacian(lambda x: (f(x), f(x)), x)
    with bad(r"weight: expected one of \[4\], \[4, 4\], \[3, 4, 4\], got \[3\]"):
        laplacian(f, x, torch.ones(3, dtype=D))
    with bad("symmetric"):
        laplacian(f, x, torch.arange(16, dtype=D).reshape(4, 4))
    with bad("weight: expected torch.float64"):
        laplacian(f, x, torch.eye(4))
    with bad("weight: expected a tensor", TypeError):
        laplacian(f, x, 2.0)
    with bad("weight, directions"):
        laplacian(f, x, torch.eye(4, dtype=D), directions=torch.eye(4, dtype=D))
    with bad(r"directions: expected \[R, 4\]"):
        laplacian(f, x, directions=torch.ones(4, dtype=D))
    with bad("not positive definite"):
        laplacian(f, x, torch.diag(torch.tensor([1.0, -1, 1, 1], dtype=D)).requires_grad_())
    with bad("chunk_size: expected >= 1"):
        laplacian(f, x, chunk_size=0)
    with bad("chunk_size: expected an int", TypeError):
        laplacian(f, x, chunk_size=1.5)
