"""Stochastic derivative estimators: unbiased, and as uncertain as they say."""

import pytest
import torch
from torch.testing import assert_close

from ctorch.autodiff.stochastic import (
    stochastic_bilaplacian,
    stochastic_laplacian,
    stochastic_operator,
)


def f(x):
    return torch.sin(x[..., 0] * x[..., 1]) + torch.exp(x[..., 2]) * x[..., 3] ** 2 + (x**3).sum(-1)


X = torch.tensor([0.3, -0.7, 0.2, 1.1], dtype=torch.float64)
N = 4000  # independent repetitions, as a batch


def hessian(x):
    return torch.func.hessian(f)(x)


def unbiased(estimate, exact):
    """Two-sided at 5 standard errors: a right estimator fails with probability 6e-7."""
    return (estimate.mean() - exact).abs() < 5 * estimate.std() / len(estimate) ** 0.5


@pytest.mark.parametrize(("method", "samples"), [("sparse", 2), ("rademacher", 3), ("gaussian", 3)])
def test_laplacian(method, samples):
    h = hessian(X)
    generator = torch.Generator().manual_seed(5)
    value, estimate, error = stochastic_laplacian(
        f, X.expand(N, 4), samples, method=method, generator=generator
    )
    assert_close(value, f(X).expand(N))
    assert unbiased(estimate, h.trace())
    d, diagonal = 4, h.diagonal()
    stated = {
        "sparse": d**2 * (1 - samples / d) * diagonal.var() / samples,
        "rademacher": 2 * (h - torch.diag(diagonal)).square().sum() / samples,
        "gaussian": 2 * h.square().sum() / samples,
    }[method]
    assert_close(estimate.var(), stated, rtol=0.1, atol=0)
    assert_close(error.square().mean(), stated, rtol=0.1, atol=0)


@pytest.mark.parametrize("samples", [4, 5, 16])
def test_sparse_laplacian_of_all_coordinates_is_exact(samples):
    _, estimate, error = stochastic_laplacian(f, X.expand(3, 4), samples)
    assert_close(estimate, hessian(X).trace().expand(3))
    assert_close(error, torch.zeros(3, dtype=torch.float64))


def test_bilaplacian():
    g = lambda x: (x[..., 0] * x[..., 1]) ** 2 + x[..., 2] ** 4  # noqa: E731  bilaplacian 8 + 24
    _, estimate, error = stochastic_bilaplacian(
        g, X.expand(N, 4), 8, generator=torch.Generator().manual_seed(5)
    )
    assert unbiased(estimate, 32.0)
    assert_close(error.square().mean(), estimate.var(), rtol=0.15, atol=0)


def test_operator_of_mixed_terms():
    terms = {(0, 0): 1.0, (0, 1): -3.0, (3, 3, 2): 0.5, (1,): 2.0, (2, 2): 0.0}
    h = hessian(X)
    third = 2 * torch.exp(X[2])
    gradient = torch.func.grad(f)(X)
    parts = torch.stack([h[0, 0], h[0, 1], third, gradient[1]])
    c = torch.tensor([1.0, -3.0, 0.5, 2.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(2)
    draws = [stochastic_operator(f, X, terms, 4, generator=generator) for _ in range(400)]
    estimate = torch.stack([draw.estimate for draw in draws])
    assert unbiased(estimate, (c * parts).sum())
    stated = (c.abs().sum() * (c.abs() * parts**2).sum() - (c * parts).sum() ** 2) / 4
    assert_close(estimate.var(), stated, rtol=0.25, atol=0)
    error = torch.stack([draw.std_error for draw in draws])
    assert_close(error.square().mean(), stated, rtol=0.25, atol=0)


def test_estimates_train():
    weight = torch.randn(4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 4, dtype=torch.float64)

    def g(weight):
        h = lambda x: torch.tanh((x * weight).sum(-1)) * x[..., 0]  # noqa: E731
        return stochastic_laplacian(h, x, 3, generator=torch.Generator().manual_seed(1)).estimate

    assert torch.autograd.gradcheck(g, (weight,))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: stochastic_laplacian(f, X[:0], 2), ValueError, "d >= 1"),
        (lambda: stochastic_laplacian(f, X, 0), ValueError, "samples"),
        (lambda: stochastic_laplacian(f, X, 2, method="dense"), ValueError, "method"),
        (lambda: stochastic_laplacian(lambda x: x, X, 2), ValueError, "f: expected"),
        (lambda: stochastic_operator(f, X, {(4,): 1.0}, 2), ValueError, "terms"),
        (lambda: stochastic_operator(f, X, {}, 2), ValueError, "terms"),
        (lambda: stochastic_bilaplacian(f, [1.0], 2), TypeError, "x: expected"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_one_draw_leaves_the_error_open():
    assert stochastic_laplacian(f, X, 1).std_error.isnan().all()
