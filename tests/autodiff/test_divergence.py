"""Divergence: equal to the Jacobian's trace; estimators unbiased, with the variance they state."""

import itertools

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from ctorch.autodiff._propagated import RULES
from ctorch.autodiff.divergence import divergence

ESTIMATORS = [("hutchinson", 4), ("hutch++", 6), ("xtrace", 6)]


def network(d, hidden=16, layers=3, seed=0):
    torch.manual_seed(seed)
    sizes = [d, *[hidden] * layers, d]
    parts = []
    for a, b in itertools.pairwise(sizes):
        parts += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*parts[:-1]).double()


def trace(f, x):
    jacobian = torch.vmap(torch.func.jacrev(f))(x.reshape(-1, x.shape[-1]))
    return jacobian.diagonal(dim1=-2, dim2=-1).sum(-1).reshape(x.shape[:-1])


@pytest.mark.parametrize("layers", [0, 1, 2, 3])
@pytest.mark.parametrize("shape", [(5,), (1, 5), (7, 5), (2, 3, 5), (0, 5)])
def test_exact_is_the_trace_of_the_jacobian(layers, shape):
    net, x = network(5, layers=layers), torch.randn(shape, dtype=torch.float64)
    value, div = divergence(net, x)
    assert_close(value, net(x), rtol=1e-12, atol=1e-12)
    assert_close(div, trace(net, x), rtol=1e-12, atol=1e-12)


def test_exact_takes_any_module():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.inner = nn.LayerNorm(6), network(6)

        def forward(self, x):
            a = torch.softmax(x.unsqueeze(-1) * x.unsqueeze(-2), -1)
            return (a @ self.inner(x).unsqueeze(-1)).squeeze(-1) / (1 + x**2) + x.flip(-1)

    f, x = Mixing().double(), torch.randn(9, 6, dtype=torch.float64)
    assert_close(divergence(f, x)[1], trace(f, x), rtol=1e-11, atol=1e-11)


def test_blocks_of_a_large_batch_change_nothing():
    net = nn.Sequential(network(32, hidden=512, layers=1), nn.Tanh(), nn.Linear(32, 32).double())
    f = lambda x: net(x) * x  # noqa: E731  not a module that is recognized
    x = torch.randn(70, 32, dtype=torch.float64)
    value, div = divergence(f, x)
    assert_close(div, trace(f, x), rtol=1e-11, atol=1e-11)
    assert_close(value, f(x), rtol=1e-12, atol=1e-12)


def test_a_field_that_holds_something_of_the_batch_is_run_whole():
    context = torch.randn(200, 1, dtype=torch.float64)
    net, x = network(16, hidden=128), torch.randn(200, 16, dtype=torch.float64)
    _, div = divergence(lambda x: net(x) * context, x)
    assert_close(div, trace(net, x) * context[:, 0], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("n", [6, 400])
def test_a_field_that_mixes_samples_is_refused(n):
    x = torch.randn(n, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="mixes samples"):
        divergence(lambda x: torch.tanh(x - x.mean(0)) * x, x)


@pytest.mark.parametrize("method", ["exact", "hutchinson", "hutch++", "xtrace"])
def test_gradients(method):
    net, x = network(8, hidden=5), torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    probes = None if method in ("exact", "hutchinson") else 6
    weights = [p for p in net.parameters() if p.ndim == 2]

    def f(x, *weights):
        names = [n for n, p in net.named_parameters() if p.ndim == 2]
        call = lambda y: torch.func.functional_call(net, dict(zip(names, weights)), (y,))  # noqa: E731, B905
        generator = torch.Generator().manual_seed(3)
        kwargs = {} if method == "exact" else {"generator": generator, "probes": probes}
        return divergence(call, x, method, **kwargs)

    if method in ("exact", "hutchinson"):
        assert torch.autograd.gradcheck(f, (x, *weights), fast_mode=True)
        assert torch.autograd.gradgradcheck(f, (x, *weights), fast_mode=True)
    else:  # the subspace is held fixed: the gradient is unbiased, not that of each draw
        n = 3000
        wide = x.detach()[:1].expand(n, 8)
        per_draw = []
        _, div = divergence(net, wide, method, probes=probes)
        for draw in div.reshape(30, -1).mean(1):
            (g,) = torch.autograd.grad(draw, weights[0], retain_graph=True)
            per_draw.append(g)
        draws = torch.stack(per_draw)
        (exact,) = torch.autograd.grad(divergence(net, x.detach()[:1])[1].sum(), weights[0])
        z = (draws.mean(0) - exact) / (draws.std(0) / 30**0.5 + 1e-12)
        assert z.abs().max() < 6


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize(("method", "probes"), ESTIMATORS)
def test_estimators_are_unbiased(method, probes, distribution):
    """Two-sided at 5 standard errors: a right estimator fails with probability 6e-7."""
    net, n = network(8), 20000
    x = torch.randn(1, 8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        value, div = divergence(
            net,
            x.expand(n, 8),
            method,
            probes=probes,
            distribution=distribution,
            generator=generator,
        )
        z = (div.mean() - trace(net, x)[0]) / (div.std() / n**0.5)
    assert_close(value[:1], net(x), rtol=1e-12, atol=1e-12)
    assert z.abs() < 5


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian", "sphere"])
@pytest.mark.parametrize("rank", [1, None])
@pytest.mark.parametrize(
    ("method", "probes", "d"),
    [
        ("hutchinson", 1, 1),
        ("hutchinson", 5, 2),
        ("hutch++", 3, 4),
        ("hutch++", 6, 7),
        ("xtrace", 2, 3),
        ("xtrace", 4, 5),
        ("xtrace", 6, 7),
    ],
)
def test_estimators_are_unbiased_in_few_dimensions(method, probes, d, rank, distribution):
    """Two-sided at 5 standard errors (or within rounding, where the draws agree): each of the cases
    of a right estimator fails with probability 6e-7.
    """
    generator = torch.Generator().manual_seed(d)
    a = torch.randn(d, d, dtype=torch.float64, generator=generator)
    if rank is not None:
        a = a[:, :rank] @ a[:rank]
    n = 20000
    x = torch.zeros(n, d, dtype=torch.float64)
    options = {"probes": probes, "distribution": distribution, "generator": generator}
    _, div = divergence(lambda x: x @ a.T, x, method, **options)
    assert (div.mean() - a.trace()).abs() < 5 * div.std() / n**0.5 + 1e-7 * a.abs().sum()


@pytest.mark.parametrize("d", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_as_many_probes_as_dimensions_are_exact(method, d):
    """With the default of six, too."""
    net, x = network(max(d, 1)), torch.randn(5, d, dtype=torch.float64)
    f = lambda x: torch.sin(net(x)) * x if d else x  # noqa: E731
    value, div = divergence(f, x, method)
    assert_close(value, f(x))
    assert_close(div, trace(f, x) if d else torch.zeros(5, dtype=torch.float64))
    noise = torch.randn(4 if method == "hutch++" else 3, *x.shape, dtype=torch.float64)
    assert_close(divergence(f, x, method, noise=noise)[1], div)
    with pytest.raises(ValueError, match="noise"):
        divergence(f, x, method, noise=noise[..., None])


def test_hutchinson_has_the_variance_of_its_theory():
    a = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, n = torch.zeros(40000, 6, dtype=torch.float64), 2
    s = (a + a.T) / 2
    off = s - torch.diag(s.diagonal())
    for distribution, expected in (("rademacher", 2 * off.square()), ("gaussian", 2 * s.square())):
        _, div = divergence(lambda x: x @ a.T, x, "hutchinson", probes=n, distribution=distribution)
        assert_close(div.var(), expected.sum() / n, rtol=0.05, atol=0)


@pytest.mark.parametrize("method", ["hutch++", "xtrace"])
def test_subspace_methods_are_exact_on_low_rank(method):
    u = torch.randn(10, 2, dtype=torch.float64)
    a = u @ torch.randn(2, 10, dtype=torch.float64)
    x = torch.randn(4, 10, dtype=torch.float64)
    _, div = divergence(lambda x: x @ a.T, x, method, probes=12, distribution="gaussian")
    assert_close(div, a.trace().expand(4), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++", "xtrace"])
def test_constant_fields_have_no_divergence(method):
    _, div = divergence(lambda x: torch.ones_like(x), torch.randn(4, 6), method)
    assert_close(div, torch.zeros(4))


def test_the_callers_noise_is_used():
    net, x = network(4), torch.randn(3, 4, dtype=torch.float64)
    v = torch.randn(2, 3, 4, dtype=torch.float64)
    _, a = divergence(net, x, "hutchinson", noise=v)
    jacobian = torch.vmap(torch.func.jacrev(net))(x)
    assert_close(a, torch.einsum("rbi,bij,rbj->b", v, jacobian, v) / 2, rtol=1e-11, atol=1e-11)
    first = divergence(net, x, "hutchinson", generator=torch.Generator().manual_seed(1))[1]
    again = divergence(net, x, "hutchinson", generator=torch.Generator().manual_seed(1))[1]
    assert torch.equal(first, again)


def test_a_function_without_a_rule_is_done_in_reverse_mode(monkeypatch):
    monkeypatch.delitem(RULES, torch.erf)
    f = lambda x: torch.erf(x) * x  # noqa: E731
    x = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    with pytest.warns(UserWarning, match=r"reverse mode: torch\.erf"):
        _, div = divergence(f, x)
    assert_close(div, trace(f, x.detach()), rtol=1e-12, atol=1e-12)
    torch.autograd.grad(div.sum(), x)


def test_transforms():
    net, x = network(4), torch.randn(6, 4, dtype=torch.float64)
    f = lambda x: net(x) * x  # noqa: E731
    assert_close(torch.vmap(lambda x: divergence(f, x)[1])(x), trace(f, x))
    g = torch.func.grad(lambda x: divergence(f, x)[1].sum())(x)
    xr = x.clone().requires_grad_()
    assert_close(g, torch.autograd.grad(trace(f, xr).sum(), xr)[0])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"method": "exct"}, ValueError, "method"),
        ({"method": "hollow"}, TypeError, "expected a hollow net"),
        ({"t": 0.0}, ValueError, "lambda x: f\\(t, x\\)"),
        ({"probes": 3}, ValueError, "probes"),
        ({"method": "hutchinson", "probes": 0}, ValueError, "probes"),
        ({"method": "hutchinson", "probes": 1.5}, TypeError, "probes"),
        ({"method": "hutch++", "probes": 4}, ValueError, "multiple of 3"),
        ({"method": "xtrace", "probes": 5}, ValueError, "even|multiple of 2"),
        ({"method": "hutchinson", "distribution": "cauchy"}, ValueError, "distribution"),
        ({"method": "hutchinson", "noise": torch.ones(4)}, ValueError, "noise"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        divergence(torch.sin, torch.randn(3, 4), **arguments)


def test_bad_fields():
    with pytest.raises(ValueError, match="shape of x"):
        divergence(lambda x: x.sum(-1), torch.randn(3, 4))
    with pytest.raises(TypeError, match="floating point"):
        divergence(torch.sin, torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="without dims"):
        divergence(torch.sin, torch.tensor(1.0))
