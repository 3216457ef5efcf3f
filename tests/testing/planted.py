"""Functions with one planted error each, for the tests that prove that the check finds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Cube(torch.autograd.Function):
    """x**3 with formulas that a subclass spoils; right as it stands, in every mode."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * g

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * v


class _Sign(_Cube):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return -_Cube.backward(ctx, g)

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return -_Cube.jvp(ctx, v)


class _Factor(_Cube):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return 1.001 * _Cube.backward(ctx, g)

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return 1.001 * _Cube.jvp(ctx, v)


class _Zero(_Cube):
    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return torch.zeros_like(g)

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return torch.zeros_like(v)


class _OneElement(_Cube):
    """Wrong in the last element only."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return _last_doubled(_Cube.backward(ctx, g))

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return _last_doubled(_Cube.jvp(ctx, v))


class _SecondDerivative(_Cube):
    """A right gradient whose own graph is wrong: one of its factors is detached."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x * x.detach() * g


class _StridedCotangent(_Cube):
    """Reads the memory of the incoming gradient as if it were contiguous."""

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * _ignoring_strides(g)


def cube(x: Tensor) -> Tensor:
    return _Cube.apply(x)


def sign(x: Tensor) -> Tensor:
    return _Sign.apply(x)


def factor(x: Tensor) -> Tensor:
    return _Factor.apply(x)


def zero(x: Tensor) -> Tensor:
    return _Zero.apply(x)


def detached_term(x: Tensor) -> Tensor:
    return x**2 * x.detach()


def one_element(x: Tensor) -> Tensor:
    return _OneElement.apply(x)


def second_derivative(x: Tensor) -> Tensor:
    return _SecondDerivative.apply(x)


def strided_input(x: Tensor) -> Tensor:
    return _ignoring_strides(x) ** 3


def strided_cotangent(x: Tensor) -> Tensor:
    return _StridedCotangent.apply(x)


def _ignoring_strides(x: Tensor) -> Tensor:
    flat = torch.as_strided(x, (x.untyped_storage().nbytes() // x.element_size(),), (1,), 0)
    if flat.numel() < x.numel():  # an expanded tensor: such code reads beyond the end
        return torch.zeros_like(x) + flat[0] * 7
    return flat[: x.numel()].reshape(x.shape)


def _last_doubled(x: Tensor) -> Tensor:
    weight = torch.ones(x.numel(), dtype=x.dtype)
    weight[-1] = 2
    return x * weight.reshape(x.shape)
