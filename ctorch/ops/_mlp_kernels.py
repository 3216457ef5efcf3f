"""The bare operators behind ctorch.ops.mlp: schemas, references, and how a node calls them.

They take contiguous tensors, and biases of length zero where there are none. What a forward pass
keeps for its backward pass is laid out as the kernel likes; a reference keeps nothing, and computes
the derivative from the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ctorch.ops import _kernels
from ctorch.ops import _mlp_reference as reference
from ctorch.ops._op import define

if TYPE_CHECKING:
    from ctorch.ops.mlp import MLP

MAX_ORDER = 24
"""kMaxOrder of csrc/mlp/tasks.h."""

Tensors = Sequence[Tensor]
NET = "Tensor[] weights, Tensor[] biases, int activation, float param"


@lru_cache(maxsize=None)
def _registered(operator: str) -> bool:
    return _kernels.implementation(operator, "cpu") == "native"


def available(operator: str) -> bool:
    """Whether the operator has a kernel on the CPU."""
    return _kernels.HAS_KERNELS and _registered(operator)


class _Net:
    """A net of the bare operators' arguments, for their references."""

    def __init__(self, weights: Tensors, biases: Tensors, activation: int, param: float) -> None:
        self.weights = weights
        biased = [b if b.numel() else None for b in biases]
        self.layers = list(zip(weights, biased, strict=True))
        self.activation, self.param = reference.ACTIVATIONS[activation], param


def _net(weights: Tensors, biases: Tensors, activation: int, param: float) -> Any:
    return _Net(weights, biases, activation, param)


def _by_autograd(function: Any, inputs: Tensors, grads: Tensors) -> list[Tensor]:
    """Gradients of all inputs, zero where there is none."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = torch.autograd.grad(
            outputs, leaves, list(grads), allow_unused=True, materialize_grads=True
        )
    return list(found)


def _interleaved(weights: Tensors, biases: Tensors) -> list[Tensor]:
    return [x for pair in zip(weights, biases, strict=True) for x in pair]


class _Kernel:
    """What the operators of one net share."""

    def __init__(self, net: MLP) -> None:
        self.layers = len(net.weights)
        self.number, self.param = reference.ACTIVATIONS.index(net.activation), float(net.param)

    def net(self, tensors: Tensors, before: int) -> tuple[Any, ...]:
        """The net's arguments of an operator."""
        weights = list(tensors[before : before + self.layers])
        return weights, list(tensors[before + self.layers :]), self.number, self.param

    def ordered(self, found: Tensors, before: int) -> list[Tensor]:
        """From weight, bias, weight, bias, ... to weights, then biases."""
        return [*found[:before], *found[before::2], *found[before + 1 :: 2]]


# ---- derivative --------------------------------------------------------------------------------


def _derivative_kept(x: Tensor, weights: Tensors, order: int) -> int:
    widths = [w.shape[0] for w in weights[:-1]]
    return x.shape[0] * ((min(order, 1) + 1) * widths[0] + (order + 1) * sum(widths[1:]))


def _derivative_fake(
    x: Tensor, v: Tensor, weights: Tensors, biases: Tensors, act: int, p: float, order: int, keep: bool
) -> tuple[Tensor, Tensor]:
    kept = _derivative_kept(x, weights, order) if keep else 0
    return x.new_empty(x.shape[0], weights[-1].shape[0]), x.new_empty(kept)


def _derivative_reference(
    x: Tensor, v: Tensor, weights: Tensors, biases: Tensors, act: int, p: float, order: int, keep: bool
) -> tuple[Tensor, Tensor]:
    out = reference.derivative(_net(weights, biases, act, p), x, v, order)
    return out, x.new_zeros(_derivative_kept(x, weights, order) if keep else 0)


def _derivative_backward_reference(
    g: Tensor, kept: Tensor, x: Tensor, v: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> list[Tensor]:
    act, p, order = rest

    def function(x: Tensor, v: Tensor, *flat: Tensor) -> Tensor:
        return reference.derivative(_net(flat[::2], flat[1::2], act, p), x, v, order)

    return _by_autograd(function, [x, v, *_interleaved(weights, biases)], [g])


def _derivative_backward_fake(
    g: Tensor, kept: Tensor, x: Tensor, v: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, v, *_interleaved(weights, biases))]


mlp_derivative = define(
    f"mlp_derivative(Tensor x, Tensor v, {NET}, int order, bool keep) -> (Tensor, Tensor)",
    _derivative_reference,
    fake=_derivative_fake,
)
mlp_derivative_backward = define(
    f"mlp_derivative_backward(Tensor g, Tensor kept, Tensor x, Tensor v, {NET}, int order) "
    "-> Tensor[]",
    _derivative_backward_reference,
    fake=_derivative_backward_fake,
)


class Derivative(_Kernel):
    """``d^K/ds^K f(x + s v)``: tensors are x, v, weights, biases."""

    def __init__(self, net: MLP, order: int) -> None:
        super().__init__(net)
        self.order = order

    def forward(self, tensors: Tensors, keep: bool) -> tuple[Tensor, Tensor]:
        """The result, and what the backward pass needs."""
        x, v = tensors[:2]
        out, kept = mlp_derivative(x, v, *self.net(tensors, 2), self.order, keep)
        return out, kept

    def backward(
        self, grads: Tensors, kept: Tensor, tensors: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of all tensors."""
        (g,), (x, v) = grads, tensors[:2]
        net = self.net(tensors, 2)
        found = mlp_derivative_backward(g.contiguous(), kept, x, v, *net, self.order)
        return self.ordered(found, 2)
