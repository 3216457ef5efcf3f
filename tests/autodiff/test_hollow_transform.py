"""Derivative operators through the transformers of hollow nets, against autograd in float64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import ctorch
from ctorch.ops.hollow import ACTIVATIONS, Transformer, transform

F64 = torch.float64


def rand(*shape: int, seed: int) -> Tensor:
    return 0.5 * torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def net(activation: str, groups: int, depth: int, order: int) -> Callable[[Tensor], Tensor]:
    """A function of x [..., 3] that uses all coefficients, with contexts that depend on x."""
    sizes = [3, *[4] * depth, 1]
    pairs = list(enumerate(pairwise(sizes)))
    weights = tuple(rand(groups, b, a, seed=at) for at, (a, b) in pairs)
    biases = tuple(rand(groups, b, seed=10 + at) for at, (_, b) in pairs)
    tau, mix = Transformer(weights, biases, activation, 1.3), rand(3, 6, seed=20)

    def f(x: Tensor) -> Tensor:
        h = (x @ mix).sin().unflatten(-1, (3, 2))
        return transform(x, h, tau, order).cos().sum((0, -1))

    return f


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "relu"])
@pytest.mark.parametrize(("groups", "depth", "order"), [(1, 1, 1), (3, 2, 2), (3, 0, 3), (1, 2, 0)])
def test_laplacians_and_jets_are_those_of_autograd(activation, groups, depth, order):
    f, x, v = net(activation, groups, depth, order), rand(5, 3, seed=1), rand(5, 3, seed=2)
    value, gradient, lap = ctorch.laplacian(f, x)
    hessians = torch.stack([torch.autograd.functional.hessian(f, row) for row in x])
    assert_close(value, f(x), rtol=1e-12, atol=1e-12)
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(leaf).sum(), leaf)
    assert_close(gradient, slope, rtol=1e-10, atol=1e-10)
    assert_close(lap, hessians.diagonal(0, -2, -1).sum(-1), rtol=1e-10, atol=1e-10)
    along = torch.einsum("bi,bij,bj->b", v, hessians, v)
    assert_close(ctorch.derivative(f, x, v, 2), along, rtol=1e-10, atol=1e-10)


def test_divergences_of_hollow_fields_are_their_first_coefficients():
    weights = rand(3, 5, 3, seed=1), rand(3, 1, 5, seed=2)
    tau = Transformer(weights, (rand(3, 5, seed=3), rand(3, 1, seed=4)), "tanh")
    x = rand(4, 3, seed=5)

    def f(x: Tensor) -> Tensor:
        others = torch.stack([x.roll(1, -1), x.roll(-1, -1)], -1)  # of three, the two others
        return transform(x, others, tau)[0]

    value, divergence = ctorch.divergence(f, x)
    both = transform(x, torch.stack([x.roll(1, -1), x.roll(-1, -1)], -1), tau, 1)
    assert_close(value, both[0], rtol=1e-12, atol=1e-12)
    assert_close(divergence, both[1].sum(-1), rtol=1e-12, atol=1e-12)
