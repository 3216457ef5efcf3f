"""Derivative operators of plain multilayer perceptrons: high directional derivatives, Taylor
series of ODE solutions, Laplacian, divergence.

A general derivative operator meets one layer after the other, each time with the whole batch. Where
the net is known to be ``layer, activation, layer, ... , layer``, the kernels take a few samples
through all of its layers at once, with all their coefficients or tangents, which stay in the cache
between a product and the activation that follows; and they leave out the products that an MLP does
not need: the first layer sees two coefficients or shared tangents, the last only what is asked for.

Functions take an ``MLP`` (``ctorch.autodiff.mlp.as_mlp`` recognises modules that are one) and a
batch ``x`` [..., d]. They are differentiable in ``x`` and in weights and biases: by hand-written
kernels once, and in plain PyTorch any further time and in forward mode. Under transforms
(``torch.func``), in ``torch.compile``, under autocast, on other devices than the CPU, for other
dtypes than float32 and float64, and where the library has no kernels or torch no BLAS that they
can call, the whole is plain PyTorch: a product over the whole batch for each layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ctorch.ops import _mlp_nodes as nodes
from ctorch.ops import _mlp_reference as reference

ACTIVATIONS = reference.ACTIVATIONS
"""Names of activations: as in ``torch.nn.functional``; ``gelu_tanh`` is gelu's tanh form."""


@dataclass(frozen=True)
class MLP:
    """The net ``x -> W_L f_(L-1)(... f_1(W_1 x + b_1) ...) + b_L``.

    Args:
        weights: ``W_l`` [h_l, h_(l-1)], from the first layer to the last; one layer is a net too.
        biases: ``b_l`` [h_l], or None.
        activation: one of ``ACTIVATIONS`` behind all hidden layers, or a tuple of one for each.
        param: beta of softplus, or a tuple of one for each hidden layer; not used otherwise.

    Raises:
        ValueError: sizes do not follow on each other, or an activation is not known.
        TypeError: the tensors are not of one real floating dtype.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...]
    activation: str | tuple[str, ...]
    param: float | tuple[float, ...] = 0.0

    def __post_init__(self) -> None:
        # nets are made at each call: what mostly is there is asked for first, in few words
        if type(self.weights) is not tuple or type(self.biases) is not tuple:
            object.__setattr__(self, "weights", tuple(self.weights))
            object.__setattr__(self, "biases", tuple(self.biases))
        if isinstance(self.activation, list) or isinstance(self.param, list):
            raise TypeError("activation and param must be one for all hidden layers, or a tuple")
        if not self.weights or len(self.biases) != len(self.weights):
            got = f"{len(self.weights)} and {len(self.biases)}"
            raise ValueError(f"weights and biases must be one each a layer, got {got}")
        _kinds(self.activation, self.param, len(self.weights) - 1)
        if not _fitting(self.weights, self.biases):
            for number, (weight, bias) in enumerate(self.layers, 1):
                _check_layer(number, weight, bias, self.weights[0], self.weights[number - 2])

    @property
    def layers(self) -> tuple[tuple[Tensor, Tensor | None], ...]:
        """Weight and bias of each layer."""
        return tuple(zip(self.weights, self.biases, strict=True))

    @property
    def kinds(self) -> tuple[tuple[str, float], ...]:
        """Activation and parameter of each hidden layer."""
        return _kinds(self.activation, self.param, len(self.weights) - 1)

    def __call__(self, x: Tensor) -> Tensor:
        """The net's value at x [..., d]."""
        for number, (weight, bias) in enumerate(self.layers):
            if number:
                x = reference.slopes(x, *self.kinds[number - 1]).value
            x = torch.nn.functional.linear(x, weight, bias)
        return x


def derivative(net: MLP, x: Tensor, v: Tensor, order: int) -> Tensor:
    """``d^K/ds^K f(x + s v)`` at ``s = 0``.

    Args:
        net: the function f, from d to o numbers.
        x: points [..., d].
        v: directions [..., d], broadcast against x.
        order: K >= 0.

    Returns:
        [..., o].

    Raises:
        ValueError: shapes or ``order`` do not fit.
        TypeError: dtypes differ.
    """
    _check_order(order)
    x = _checked(net, "x", x)
    v = v if v is x else _checked(net, "v", v)
    if x.shape != v.shape:
        x, v = torch.broadcast_tensors(x, v)
    out = nodes.derivative(net, _flat(x), _flat(v), order)
    if x.dim() == 2:
        return out
    return out.reshape(*x.shape[:-1], -1) if x.numel() else _empty(out, *x.shape[:-1])


def series(net: MLP, x: Tensor, order: int) -> Tensor:
    """Normalized Taylor coefficients of the solution of ``x' = f(x)`` that starts at ``x``.

    One sweep through the net for each order; its derivative likewise.

    Args:
        net: the vector field f, from d to d numbers.
        x: initial values [..., d].
        order: K >= 0.

    Returns:
        [K+1, ..., d]: the k-th is ``x^(k) / k!``.

    Raises:
        ValueError: shapes or ``order`` do not fit.
        TypeError: dtypes differ.
    """
    _check_order(order)
    _check_square(net)
    x = _checked(net, "x", x)
    out = nodes.series(net, _flat(x), order)
    return out if x.dim() == 2 else out.reshape(order + 1, *x.shape)


def laplacian(
    net: MLP, x: Tensor, *, gradient: bool = True, directions: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Value, gradient and Laplacian in one forward pass.

    Args:
        net: the function f, from d to o numbers.
        x: points [..., d].
        gradient: whether the gradient is wanted; without it, nothing is spent on it.
        directions: V [R, d]: then not the Laplacian but ``sum_r d^2/ds^2 f(x + s V_r)``, that is
            ``sum_ij A_ij d_i d_j f`` for ``A = V^T V``, and the derivatives along V in place of
            the gradient.

    Returns:
        Value [..., o]; gradient [..., o, d] ([..., o, R] along directions), or None; Laplacian
        [..., o].

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes differ.
    """
    x = _checked(net, "x", x)
    rows = net.weights[0].t()
    if directions is not None:
        if directions.dim() != 2:
            raise ValueError(f"directions must be [R, d], got {tuple(directions.shape)}")
        rows = _checked(net, "directions", directions) @ rows
    value, moved, lap = nodes.laplacian(net, _flat(x), rows, gradient)
    shape = x.shape[:-1]
    outputs = net.weights[-1].shape[0]
    if moved is not None:
        moved = moved.transpose(1, 2).reshape(*shape, outputs, rows.shape[0])
    return value.reshape(*shape, outputs), moved, lap.reshape(*shape, outputs)


def divergence(net: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value and exact divergence, the trace of the Jacobian.

    Up to two hidden layers by a closed form, which costs no more than the value again: with the
    activations' slopes ``d_l``, ``d_1 . diag(W_1 W_2)`` and ``d_2 . (W_2 * (W_1 W_3)^T) d_1``.
    Otherwise the Jacobian is carried forward.

    Args:
        net: the vector field f, from d to d numbers.
        x: points [..., d].

    Returns:
        Value [..., d], divergence [...].

    Raises:
        ValueError: shapes do not fit.
        TypeError: dtypes differ.
    """
    _check_square(net)
    x = _checked(net, "x", x)
    value, trace = nodes.divergence(net, _flat(x))
    return (value, trace) if x.dim() == 2 else (value.reshape(x.shape), trace.reshape(x.shape[:-1]))


# ---- checks ------------------------------------------------------------------------------------


@lru_cache(maxsize=256)
def _kinds(
    activation: str | tuple[str, ...], param: float | tuple[float, ...], hidden: int
) -> tuple[tuple[str, float], ...]:
    """Activation and parameter of each hidden layer, checked."""
    each: list[Any] = []
    for name, given in (("activation", activation), ("param", param)):
        if isinstance(given, tuple) and len(given) != hidden:
            raise ValueError(
                f"{name} must be one for all {hidden} hidden layers or a tuple of as many, "
                f"got {given!r}"
            )
        each.append(given if isinstance(given, tuple) else (given,) * max(1, hidden))
    for kind, beta in zip(*each, strict=False):
        if kind not in ACTIVATIONS:
            allowed = ", ".join(ACTIVATIONS)
            raise ValueError(f"activation must be one of {allowed}; got {kind!r}")
        if kind == "softplus" and not beta > 0:
            raise ValueError(f"param, the beta of softplus, must be positive, got {beta}")
    return tuple(zip(*each, strict=False))[:hidden]


def _fitting(weights: Sequence[Tensor], biases: Sequence[Tensor | None]) -> bool:
    """Whether nothing is wrong, found out at less cost than what is: nets are made at each call."""
    dtype, before = weights[0].dtype, -1
    for weight, bias in zip(weights, biases, strict=True):
        shape = weight.shape
        if len(shape) != 2 or weight.dtype != dtype or before not in (-1, shape[1]):
            return False
        before = shape[0]
        if bias is not None and (bias.dtype != dtype or bias.shape != (before,)):
            return False
    return dtype.is_floating_point


def _check_layer(
    number: int, weight: Tensor, bias: Tensor | None, first: Tensor, before: Tensor
) -> None:
    if weight.dim() != 2:
        raise ValueError(f"weights[{number - 1}] must be [out, in], got {tuple(weight.shape)}")
    if number > 1 and weight.shape[1] != before.shape[0]:
        raise ValueError(
            f"weights[{number - 1}] must be [out, {before.shape[0]}], since the layer before has "
            f"as many outputs; got {tuple(weight.shape)}"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"biases[{number - 1}] must be [{weight.shape[0]}] or None, got {tuple(bias.shape)}"
        )
    for x in (weight, bias):
        if x is not None and not (x.dtype == first.dtype and x.dtype.is_floating_point):
            raise TypeError(
                f"weights and biases must have one real floating dtype, got {first.dtype} and "
                f"{x.dtype}"
            )


def _checked(net: MLP, name: str, x: Tensor) -> Tensor:
    inputs, dtype = net.weights[0].shape[1], net.weights[0].dtype
    if x.dim() < 1 or x.shape[-1] != inputs:
        raise ValueError(f"{name} must be [..., {inputs}] for this net, got {tuple(x.shape)}")
    if x.dtype != dtype:
        raise TypeError(f"{name} must have the dtype of the net, {dtype}; got {x.dtype}")
    return x


def _check_square(net: MLP) -> None:
    inputs, outputs = net.weights[0].shape[1], net.weights[-1].shape[0]
    if inputs != outputs:
        raise ValueError(f"net must map d numbers to d numbers, but maps {inputs} to {outputs}")


def _check_order(order: Any) -> None:
    if not isinstance(order, int) or isinstance(order, bool) or order < 0:
        raise ValueError(f"order must be an integer >= 0, got {order!r}")


def _flat(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(_count(x.shape[:-1]), x.shape[-1])


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def _empty(like: Tensor, *shape: int) -> Tensor:
    return like.reshape(*shape, like.shape[-1])
