"""The bare operators of divergences behind ctorch.ops.mlp: the Jacobian carried forward, and the
closed form of two hidden layers. See ``_mlp_kernels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch.ops import _mlp_reference as reference
from ctorch.ops._mlp_kernels import (
    NET,
    Kernel,
    Tensors,
    by_autograd,
    filled,
    interleaved,
    net_of,
    tangents_kept,
)
from ctorch.ops._op import define


def _divergence_fake(
    x: Tensor, rows: Tensor, close: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> tuple[Tensor, ...]:
    kept = tangents_kept(x, rows.shape[0] + 1, weights, rest[-1])
    return x.new_empty(x.shape[0], weights[-1].shape[0]), x.new_empty(x.shape[0]), kept


def _divergence_reference(
    x: Tensor, rows: Tensor, close: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> tuple[Tensor, ...]:
    act, p, keep = rest
    value, trace = reference.divergence(net_of(weights, biases, act, p), x, rows, close)
    return value, trace, tangents_kept(x, rows.shape[0] + 1, weights, keep)


def _divergence_backward_reference(
    g_value: Tensor, g_trace: Tensor, kept: Tensor, *args: Any
) -> list[Tensor]:
    x, rows, close, weights, biases, act, p = args

    def function(x: Tensor, rows: Tensor, close: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        return reference.divergence(net_of(flat[::2], flat[1::2], act, p), x, rows, close)

    inputs = [x, rows, close, *interleaved(weights, biases)]
    return by_autograd(function, inputs, [g_value, g_trace])


def _divergence_backward_fake(
    g_value: Tensor, g_trace: Tensor, kept: Tensor, *args: Any
) -> list[Tensor]:
    x, rows, close, weights, biases, _act, _p = args
    return [torch.empty_like(t) for t in (x, rows, close, *interleaved(weights, biases))]


mlp_divergence = define(
    f"mlp_divergence(Tensor x, Tensor rows, Tensor close, {NET}, bool keep) "
    "-> (Tensor, Tensor, Tensor)",
    _divergence_reference,
    fake=_divergence_fake,
)
mlp_divergence_backward = define(
    "mlp_divergence_backward(Tensor g_value, Tensor g_trace, Tensor kept, Tensor x, Tensor rows, "
    f"Tensor close, {NET}) -> Tensor[]",
    _divergence_backward_reference,
    fake=_divergence_backward_fake,
)


class Divergence(Kernel):
    """Value and trace of the Jacobian: tensors are x, rows, close, weights, biases."""

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        """The results, and what the backward pass needs."""
        x, rows, close = tensors[:3]
        value, trace, kept = mlp_divergence(x, rows, close, *self.net(tensors, 3), keep)
        return (value, trace), kept

    def backward(
        self, grads: Sequence[Tensor | None], kept: Tensor, tensors: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of all tensors."""
        x, rows, close = tensors[:3]
        net = self.net(tensors, 3)
        value = filled(grads[0], x, (len(x), net[0][-1].shape[0]))
        trace = filled(grads[1], x, (len(x),))
        found = mlp_divergence_backward(value, trace, kept, x, rows, close, *net)
        return self.ordered(found, 3)


# ---- divergence, two hidden layers -------------------------------------------------------------


def _closed_kept(x: Tensor, weights: Tensors, keep: bool) -> Tensor:
    one, two = weights[0].shape[0], weights[1].shape[0]
    return x.new_zeros(x.shape[0] * (one + 2 * two) + one * two if keep else 0)


def _closed_fake(
    x: Tensor, weights: Tensors, biases: Tensors, act: Sequence[int], p: Sequence[float], keep: bool
) -> tuple[Tensor, ...]:
    value, trace = x.new_empty(x.shape[0], weights[-1].shape[0]), x.new_empty(x.shape[0])
    return value, trace, _closed_kept(x, weights, keep)


def _closed_reference(
    x: Tensor, weights: Tensors, biases: Tensors, act: Sequence[int], p: Sequence[float], keep: bool
) -> tuple[Tensor, ...]:
    value, trace = reference.closed_divergence(net_of(weights, biases, act, p), x)
    return value, trace, _closed_kept(x, weights, keep)


def _closed_backward_reference(
    g_value: Tensor | None, g_trace: Tensor, kept: Tensor, x: Tensor, *args: Any
) -> list[Tensor]:
    weights, biases, act, p, of_x = args

    def function(x: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        net = net_of(flat[::2], flat[1::2], act, p)
        value, trace = reference.closed_divergence(net, x)
        return (trace,) if g_value is None else (value, trace)

    grads = [g for g in (g_value, g_trace) if g is not None]
    found = by_autograd(function, [x, *interleaved(weights, biases)], grads)
    found[0] = found[0] if of_x else x.new_empty(0, x.shape[1])
    return found


def _closed_backward_fake(
    g_value: Tensor | None, g_trace: Tensor, kept: Tensor, x: Tensor, *args: Any
) -> list[Tensor]:
    weights, biases, _act, _p, of_x = args
    of_inputs = torch.empty_like(x) if of_x else x.new_empty(0, x.shape[1])
    return [of_inputs, *(torch.empty_like(t) for t in interleaved(weights, biases))]


mlp_closed_divergence = define(
    f"mlp_closed_divergence(Tensor x, {NET}, bool keep) -> (Tensor, Tensor, Tensor)",
    _closed_reference,
    fake=_closed_fake,
)
mlp_closed_divergence_backward = define(
    "mlp_closed_divergence_backward(Tensor? g_value, Tensor g_trace, Tensor kept, Tensor x, "
    f"{NET}, bool of_x) -> Tensor[]",
    _closed_backward_reference,
    fake=_closed_backward_fake,
)


class ClosedDivergence(Kernel):
    """Value and trace of the Jacobian of a net with two hidden layers: tensors are x, net."""

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], Tensor]:
        """The results, and what the backward pass needs."""
        value, trace, kept = mlp_closed_divergence(tensors[0], *self.net(tensors, 1), keep)
        return (value, trace), kept

    def backward(
        self, grads: Sequence[Tensor | None], kept: Tensor, tensors: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of all tensors; an empty one of x where it is not needed."""
        x = tensors[0]
        value = None if grads[0] is None else grads[0].contiguous()
        trace = filled(grads[1], x, (len(x),))
        net = self.net(tensors, 1)
        found = mlp_closed_divergence_backward(value, trace, kept, x, *net, needed[0])
        return self.ordered(found, 1)
