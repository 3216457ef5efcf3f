"""Transformers of hollow nets: a small net for each dimension, with its derivatives in it.

A hollow net is ``f_i(x) = tau_i(x_i, h_i)``, where ``h_i`` depends on all coordinates but ``x_i``.
So what tau does to ``x_i`` at fixed ``h_i`` is the diagonal of the Jacobian of f, and of every
higher derivative in one coordinate; this module computes it for all rows and orders at once.

Source: Chen and Duvenaud, "Neural Networks with Cheap Differential Operators" (2019).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from ctorch.ops import _hollow_reference as reference
from ctorch.ops import _hollow_rules as rules
from ctorch.ops._by_reference import of_reference
from ctorch.ops._op import define

ACTIVATIONS = reference.ACTIVATIONS
"""Names of activations, as in ``ctorch.ops.mlp``."""

MAX_HIDDEN, MAX_ORDER = 16, 24
"""What kernels take: kMaxHidden of csrc/hollow/task.h, kMaxOrder of csrc/mlp/tasks.h."""


class Transformer(NamedTuple):
    """The nets ``tau_i``: ``layer, activation, layer, ..., layer``, from (x_i, h_i) to a number.

    Attributes:
        weights: of each layer [G, out, in]; G = 1 (one net shared by all dimensions) or d (a net
            for each). The first layer has ``in = 1 + H``: column 0 is x_i's, the others are h_i's.
            The last has ``out = 1``.
        biases: of each layer [G, out].
        activation: between all layers; one of ``ACTIVATIONS``.
        param: beta of softplus; not used otherwise.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: str
    param: float = 0.0


def transform(x: Tensor, h: Tensor, transformer: Transformer, order: int = 0) -> Tensor:
    """``tau_i(x_i, h_i)`` and its derivatives in ``x_i``, in one pass.

    Differentiable any number of times, in both modes, under vmap and ``torch.compile``, and by
    ``ctorch.jet`` and ``ctorch.laplacian``. The first derivative is a kernel; further ones and
    tangents are plain PyTorch.

    Args:
        x: ``[..., d]``, float32 or float64.
        h: ``[..., d, H]``, its leading dims those of x.
        transformer: the nets, in the dtype of x.
        order: K, the highest derivative wanted, >= 0.

    Returns:
        Taylor coefficients ``[K+1, ..., d]``: the k-th is ``d^k tau_i / d x_i^k / k!``.

    Raises:
        TypeError: a dtype is not float32 or float64, or they differ.
        ValueError: shapes do not fit, an unknown activation, or a negative order.

    Source: Chen and Duvenaud, "Neural Networks with Cheap Differential Operators" (2019), sec. 2.

    Example:
        >>> import torch
        >>> from ctorch.ops.hollow import Transformer, transform
        >>> weights = (torch.tensor([[[1.0, 1.0]]]), torch.tensor([[[2.0]]]))  # 2 exp(x + h)
        >>> tau = Transformer(weights, (torch.zeros(1, 1), torch.zeros(1, 1)), "exp")
        >>> transform(torch.zeros(3), torch.zeros(3, 1), tau, order=2)
        tensor([[2., 2., 2.],
                [2., 2., 2.],
                [1., 1., 1.]])
    """
    weights, biases, activation, param = transformer
    tensors = (x, h, *weights, *biases)
    if has_torch_function(tensors):
        return handle_torch_function(transform, tensors, x, h, transformer, order)
    widths = check(x, h, transformer, order)
    flat, context = x, h
    if x.dim() != 2:
        rows = _count(x.shape[:-1])
        flat, context = x.reshape(rows, x.shape[-1]), h.reshape(rows, *h.shape[-2:])
    theta = packed(transformer)
    # a net of one layer is linear: there is nothing to be fused
    fused = 0 < len(widths) <= MAX_HIDDEN and order <= MAX_ORDER
    call = hollow_transform if fused else reference.transform
    number = reference.ACTIVATIONS.index(activation)
    out: Tensor = call(flat, context, theta, widths, number, float(param), order)
    return out if x.dim() == 2 else out.reshape(order + 1, *x.shape)


def packed(transformer: Transformer) -> Tensor:
    """Weight and bias of each layer in turn, as one tensor ``[G, P]``."""
    pairs = zip(transformer.weights, transformer.biases, strict=True)
    return torch.cat([part for weight, bias in pairs for part in (weight.flatten(1), bias)], 1)


# ---- checks ------------------------------------------------------------------------------------


def check(x: Any, h: Any, transformer: Transformer, order: Any) -> list[int]:
    """How many units each hidden layer has; raises where something does not fit."""
    weights, biases, activation, param = transformer
    for name, tensor in (("x", x), ("h", h)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if x.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"x must be float32 or float64, got {x.dtype}; convert it")
    if x.dim() == 0:
        raise ValueError("x must be [..., d], got a 0-dim tensor")
    if h.dim() != x.dim() + 1 or h.shape[:-1] != x.shape:
        want = ", ".join(map(str, (*x.shape, "H")))
        raise ValueError(f"h must be [{want}], by the shape of x; got {tuple(h.shape)}")
    if not isinstance(order, int) or isinstance(order, bool) or order < 0:
        raise ValueError(f"order must be an integer >= 0, got {order!r}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {ACTIVATIONS}, got {activation!r}")
    if activation == "softplus" and not param > 0:
        raise ValueError(f"param, the beta of softplus, must be positive, got {param}")
    if not weights or len(weights) != len(biases):
        got = f"{len(weights)} and {len(biases)}"
        raise ValueError(f"weights and biases must be one each a layer, got {got}")
    _check_layers(x, h, weights, biases)
    return [weight.shape[1] for weight in weights[:-1]]


def _check_layers(
    x: Tensor, h: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> None:
    if h.dtype != x.dtype:
        raise TypeError(f"h must have the dtype of x, {x.dtype}; got {h.dtype}")
    groups, inputs, last = weights[0].shape[0], 1 + h.shape[-1], len(weights) - 1
    if groups not in (1, x.shape[-1]):
        raise ValueError(
            f"weights[0] must have a first dim of 1 (a net for all dimensions of x) or "
            f"{x.shape[-1]} (one for each), got shape {tuple(weights[0].shape)}"
        )
    for at, (weight, bias) in enumerate(zip(weights, biases, strict=True)):
        outputs = 1 if at == last else weight.shape[1] if weight.dim() == 3 else "out"
        if tuple(weight.shape) != (groups, outputs, inputs):
            want = f"[{groups}, {outputs}, {inputs}]"
            raise ValueError(f"weights[{at}] must be {want}, got {tuple(weight.shape)}")
        if tuple(bias.shape) != (groups, outputs):
            want = f"[{groups}, {outputs}]"
            raise ValueError(f"biases[{at}] must be {want}, got {tuple(bias.shape)}")
        for name, tensor in (("weights", weight), ("biases", bias)):
            if tensor.dtype != x.dtype:
                raise TypeError(
                    f"{name}[{at}] must have the dtype of x, {x.dtype}; got {tensor.dtype}"
                )
        inputs = weight.shape[1]


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


# ---- the bare operators ------------------------------------------------------------------------
# x [N, M], h [N, M, H], theta [G, P] with G = 1 or M, g and the result of the first [order+1, N, M]

NET = "Tensor x, Tensor h, Tensor theta, int[] widths, int act, float param, int order"


def _stack(x: Tensor, h: Tensor, theta: Tensor, widths: Any, act: int, p: float, k: Any) -> Tensor:
    return x.new_empty(k + 1, *x.shape)


def _alike(g: Tensor, x: Tensor, h: Tensor, theta: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return x.new_empty(x.shape), h.new_empty(h.shape), theta.new_empty(theta.shape)


hollow_transform = define(
    f"hollow_transform({NET}) -> Tensor",
    reference.transform,
    fake=_stack,
    backward=rules.transform_backward,
    jvp=of_reference(reference.transform, 3)["jvp"],
    vmap=rules.transform_vmap,
)
hollow_gradient = define(
    f"hollow_gradient(Tensor g, {NET}) -> (Tensor, Tensor, Tensor)",
    reference.gradient,
    fake=_alike,
    vmap=rules.gradient_vmap,
    **of_reference(reference.gradient, 4),
)
rules.ops.gradient = hollow_gradient
