"""Small nets, and their derivatives by nested autograd over elementary operations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ctorch.ops.mlp import MLP

F64 = torch.float64

ELEMENTARY: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": lambda z: torch.where(z > 0, z, 0),
    "tanh": torch.tanh,
    "sigmoid": lambda z: 1 / (1 + torch.exp(-z)),
    "softplus": lambda z: torch.log(1 + torch.exp(1.5 * z)) / 1.5,
    "exp": torch.exp,
    "sin": torch.sin,
    "silu": lambda z: z / (1 + torch.exp(-z)),
    "gelu": lambda z: 0.5 * z * (1 + torch.erf(z / math.sqrt(2))),
    "gelu_tanh": lambda z: (
        0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z)))
    ),
}
"""Softplus with beta = 1.5."""


def rand(shape: Sequence[int], seed: int = 0, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=F64).to(device)


def net_tensors(sizes: Sequence[int], seed: int = 1, device: str = "cpu") -> list[Tensor]:
    """Weights, then biases, of a net with those sizes."""
    pairs = list(zip(sizes[1:], sizes[:-1], strict=True))
    weights = [
        rand(pair, seed + i, device) / math.sqrt(max(1, pair[1])) for i, pair in enumerate(pairs)
    ]
    return weights + [0.5 * rand(pair[:1], seed + 50 + i, device) for i, pair in enumerate(pairs)]


def net_of(
    tensors: Sequence[Tensor], activation: str | tuple[str, ...] = "tanh", bias: bool = True
) -> MLP:
    """The net with these weights and, unless there are none, biases."""
    layers = len(tensors) // 2 if bias else len(tensors)
    biases = tuple(tensors[layers:]) if bias else (None,) * layers
    return MLP(tuple(tensors[:layers]), biases, activation, 1.5)


def elementary(net: MLP) -> Callable[[Tensor], Tensor]:
    """The same net in elementary operations alone."""

    def f(x: Tensor) -> Tensor:
        for number, (weight, bias) in enumerate(net.layers):
            if number:
                x = ELEMENTARY[net.kinds[number - 1][0]](x)
            x = F.linear(x, weight, bias)
        return x

    return f


def nested_derivative(net: MLP, x: Tensor, v: Tensor, order: int) -> Tensor:
    """By ``order`` nested reverse sweeps, for each output."""
    f, columns = elementary(net), []
    for output in range(net.weights[-1].shape[0]):
        s = torch.zeros(x.shape[0], 1, dtype=x.dtype, requires_grad=True)
        value = f(x + s * v)[:, output]
        for _ in range(order):
            if not value.requires_grad:
                value = torch.zeros_like(value)
                break
            (slope,) = torch.autograd.grad(
                value.sum(), s, create_graph=True, allow_unused=True, materialize_grads=True
            )
            value = slope[:, 0]
        columns.append(value)
    return torch.stack(columns, -1).detach()


def nested_series(net: MLP, x: Tensor, order: int) -> Tensor:
    """By nested forward mode: ``x^(k+1) = (d x^(k) / dx) f``."""
    f = elementary(net)
    coefficients, derivative = [x], f

    def total(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda y: torch.func.jvp(g, (y,), (f(y),))[1]

    for k in range(1, order + 1):
        coefficients.append(derivative(x) / math.factorial(k))
        derivative = total(derivative)
    return torch.stack(coefficients).detach()


def nested_laplacian(net: MLP, x: Tensor, directions: Tensor | None = None) -> tuple[Any, ...]:
    """Value, gradient and Laplacian from the whole Hessian of each sample."""
    f = elementary(net)
    v = torch.eye(x.shape[-1], dtype=x.dtype) if directions is None else directions
    hessian = torch.func.vmap(torch.func.hessian(f))(x)
    jacobian = torch.func.vmap(torch.func.jacrev(f))(x)
    return f(x), jacobian @ v.t(), torch.einsum("boij,ri,rj->bo", hessian, v, v)


def nested_divergence(net: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and trace of the whole Jacobian of each sample."""
    f = elementary(net)
    jacobian = torch.func.vmap(torch.func.jacrev(f))(x)
    return f(x), jacobian.diagonal(dim1=-2, dim2=-1).sum(-1)
