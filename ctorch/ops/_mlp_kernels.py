"""The bare operators behind ctorch.ops.mlp: schemas, references, and how a node calls them.

They take contiguous tensors, and biases of length zero where there are none. What a forward pass
keeps for its backward pass is laid out as the kernel likes; a reference keeps nothing, and computes
the derivative from the inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
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

DTYPES = {torch.float32, torch.float64}

NUMBERS = {name: number for number, name in enumerate(reference.ACTIVATIONS)}

Tensors = Sequence[Tensor]
NET = "Tensor[] weights, Tensor[] biases, int[] activations, float[] params"


@cache
def _registered(operator: str) -> bool:
    return _kernels.implementation(operator, "cpu") == "native"


def available(operator: str) -> bool:
    """Whether the operator has a kernel on the CPU."""
    return _kernels.HAS_KERNELS and _registered(operator)


class _Net:
    """A net of the bare operators' arguments, for their references."""

    def __init__(
        self, weights: Tensors, biases: Tensors, activations: Sequence[int], params: Sequence[float]
    ) -> None:
        self.weights = weights
        biased = [b if b.numel() else None for b in biases]
        self.layers = list(zip(weights, biased, strict=True))
        names = (reference.ACTIVATIONS[number] for number in activations)
        self.kinds = tuple(zip(names, params, strict=True))


def net_of(weights: Tensors, biases: Tensors, acts: Sequence[int], params: Sequence[float]) -> Any:
    return _Net(weights, biases, acts, params)


def by_autograd(function: Any, inputs: Tensors, grads: Tensors) -> list[Tensor]:
    """Gradients of all inputs, zero where there is none."""
    with torch.enable_grad():
        leaves = [x.detach().requires_grad_() for x in inputs]
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        found = torch.autograd.grad(
            outputs, leaves, list(grads), allow_unused=True, materialize_grads=True
        )
    return list(found)


def interleaved(weights: Tensors, biases: Tensors) -> list[Tensor]:
    return [x for pair in zip(weights, biases, strict=True) for x in pair]


class Kernel:
    """What the operators of one net share."""

    def __init__(self, net: MLP) -> None:
        self.layers = len(net.weights)
        self.numbers = [NUMBERS[name] for name, _ in net.kinds]
        self.params = [param for _, param in net.kinds]

    def net(self, tensors: Tensors, before: int) -> tuple[Any, ...]:
        """The net's arguments of an operator."""
        weights = list(tensors[before : before + self.layers])
        return weights, list(tensors[before + self.layers :]), self.numbers, self.params

    def ordered(self, found: Tensors, before: int) -> list[Tensor]:
        """From weight, bias, weight, bias, ... to weights, then biases."""
        parameters = found[before:]
        return [*found[:before], *parameters[::2], *parameters[1::2]]


# ---- derivative --------------------------------------------------------------------------------


def _derivative_kept(x: Tensor, weights: Tensors, order: int) -> int:
    widths = [w.shape[0] for w in weights[:-1]]
    return x.shape[0] * ((min(order, 1) + 1) * widths[0] + (order + 1) * sum(widths[1:]))


def _derivative_fake(
    x: Tensor,
    v: Tensor,
    weights: Tensors,
    biases: Tensors,
    act: Sequence[int],
    p: Sequence[float],
    order: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    kept = _derivative_kept(x, weights, order) if keep else 0
    return x.new_empty(x.shape[0], weights[-1].shape[0]), x.new_empty(kept)


def _derivative_reference(
    x: Tensor,
    v: Tensor,
    weights: Tensors,
    biases: Tensors,
    act: Sequence[int],
    p: Sequence[float],
    order: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    out = reference.derivative(net_of(weights, biases, act, p), x, v, order)
    return out, x.new_zeros(_derivative_kept(x, weights, order) if keep else 0)


def _derivative_backward_reference(
    g: Tensor, kept: Tensor, x: Tensor, v: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> list[Tensor]:
    act, p, order = rest

    def function(x: Tensor, v: Tensor, *flat: Tensor) -> Tensor:
        return reference.derivative(net_of(flat[::2], flat[1::2], act, p), x, v, order)

    return by_autograd(function, [x, v, *interleaved(weights, biases)], [g])


def _derivative_backward_fake(
    g: Tensor, kept: Tensor, x: Tensor, v: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, v, *interleaved(weights, biases))]


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


class Derivative(Kernel):
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


# ---- laplacian ---------------------------------------------------------------------------------


def tangents_kept(x: Tensor, planes: int, weights: Tensors, keep: bool) -> Tensor:
    widths = [w.shape[0] for w in weights[:-1]]
    return x.new_zeros(x.shape[0] * (widths[0] + planes * sum(widths[1:])) if keep else 0)


def _laplacian_fake(
    x: Tensor, rows: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> tuple[Tensor, ...]:
    _act, _p, gradient, keep = rest
    count, outputs = rows.shape[0], weights[-1].shape[0]
    value = x.new_empty(x.shape[0], outputs)
    moved = x.new_empty(x.shape[0] if gradient else 0, count, outputs)
    return value, moved, torch.empty_like(value), tangents_kept(x, count + 2, weights, keep)


def _laplacian_reference(
    x: Tensor, rows: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> tuple[Tensor, ...]:
    act, p, gradient, keep = rest
    value, moved, lap = reference.laplacian(net_of(weights, biases, act, p), x, rows)
    moved = moved.contiguous() if gradient else moved.new_empty(0, *moved.shape[1:])
    return value, moved, lap, tangents_kept(x, rows.shape[0] + 2, weights, keep)


def _laplacian_backward_reference(
    g_value: Tensor, g_moved: Tensor | None, g_lap: Tensor, kept: Tensor, *args: Any
) -> list[Tensor]:
    x, rows, weights, biases, act, p = args

    def function(x: Tensor, rows: Tensor, *flat: Tensor) -> tuple[Tensor, ...]:
        value, moved, lap = reference.laplacian(net_of(flat[::2], flat[1::2], act, p), x, rows)
        return (value, lap) if g_moved is None else (value, moved, lap)

    grads = [g for g in (g_value, g_moved, g_lap) if g is not None]
    return by_autograd(function, [x, rows, *interleaved(weights, biases)], grads)


def _laplacian_backward_fake(
    g_value: Tensor, g_moved: Tensor | None, g_lap: Tensor, kept: Tensor, *args: Any
) -> list[Tensor]:
    x, rows, weights, biases, _act, _p = args
    return [torch.empty_like(t) for t in (x, rows, *interleaved(weights, biases))]


mlp_laplacian = define(
    f"mlp_laplacian(Tensor x, Tensor rows, {NET}, bool gradient, bool keep) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _laplacian_reference,
    fake=_laplacian_fake,
)
mlp_laplacian_backward = define(
    "mlp_laplacian_backward(Tensor g_value, Tensor? g_moved, Tensor g_lap, Tensor kept, Tensor x, "
    f"Tensor rows, {NET}) -> Tensor[]",
    _laplacian_backward_reference,
    fake=_laplacian_backward_fake,
)


class Laplacian(Kernel):
    """Value, tangents (where the gradient is wanted), Laplacian: tensors are x, rows, net."""

    def __init__(self, net: MLP, gradient: bool) -> None:
        super().__init__(net)
        self.gradient = gradient

    def forward(self, tensors: Tensors, keep: bool) -> tuple[tuple[Tensor, ...], Any]:
        """The results, and what the backward pass needs."""
        x, rows = tensors[:2]
        back, rows = self._fewer(rows)
        net = self.net(tensors, 2)
        value, moved, lap, kept = mlp_laplacian(x, rows, *net, self.gradient, keep)
        outputs = (value, moved, lap) if self.gradient else (value, lap)
        return outputs, (back, rows, kept) if keep else None

    def backward(
        self, grads: Sequence[Tensor | None], kept: Any, tensors: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of all tensors."""
        back, rows, kept = kept
        x, net = tensors[0], self.net(tensors, 2)
        outputs = net[0][-1].shape[0]
        shapes = [(len(x), outputs), (len(x), rows.shape[0], outputs), (len(x), outputs)]
        shapes = shapes if self.gradient else shapes[::2]
        whole = [filled(g, x, shape) for g, shape in zip(grads, shapes, strict=True)]
        moved = whole[1] if self.gradient else None
        found = mlp_laplacian_backward(whole[0], moved, whole[-1], kept, x, rows, *net)
        if back is not None:
            found[1] = back @ found[1]
        return self.ordered(found, 2)

    def _fewer(self, rows: Tensor) -> tuple[Tensor | None, Tensor]:
        """As many rows as units: the Laplacian sees their products with each other alone.

        That is ``rows = Q R``, and R in their place. To first order it does not matter that Q
        depends on the rows too: a turn of R changes nothing.
        """
        if self.gradient or rows.shape[0] <= rows.shape[1]:
            return None, rows
        q, r = torch.linalg.qr(rows)
        return q, r.contiguous()


def filled(g: Tensor | None, like: Tensor, shape: tuple[int, ...]) -> Tensor:
    return like.new_zeros(shape) if g is None else g.contiguous()


# ---- series ------------------------------------------------------------------------------------


def _series_kept(x: Tensor, weights: Tensors, order: int, keep: bool) -> Tensor:
    widths = [w.shape[0] for w in weights[:-1]]
    return x.new_zeros(x.shape[0] * 2 * order * sum(widths) if keep else 0)


def _series_fake(
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    act: Sequence[int],
    p: Sequence[float],
    order: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(order + 1, *x.shape), _series_kept(x, weights, order, keep)


def _series_reference(
    x: Tensor,
    weights: Tensors,
    biases: Tensors,
    act: Sequence[int],
    p: Sequence[float],
    order: int,
    keep: bool,
) -> tuple[Tensor, Tensor]:
    out = reference.series(net_of(weights, biases, act, p), x, order)
    return out, _series_kept(x, weights, order, keep)


def _series_backward_reference(
    g: Tensor, kept: Tensor, x: Tensor, out: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> list[Tensor]:
    act, p, order = rest

    def function(x: Tensor, *flat: Tensor) -> Tensor:
        return reference.series(net_of(flat[::2], flat[1::2], act, p), x, order)

    return by_autograd(function, [x, *interleaved(weights, biases)], [g])


def _series_backward_fake(
    g: Tensor, kept: Tensor, x: Tensor, out: Tensor, weights: Tensors, biases: Tensors, *rest: Any
) -> list[Tensor]:
    return [torch.empty_like(t) for t in (x, *interleaved(weights, biases))]


mlp_series = define(
    f"mlp_series(Tensor x, {NET}, int order, bool keep) -> (Tensor, Tensor)",
    _series_reference,
    fake=_series_fake,
)
mlp_series_backward = define(
    f"mlp_series_backward(Tensor g, Tensor kept, Tensor x, Tensor out, {NET}, int order) "
    "-> Tensor[]",
    _series_backward_reference,
    fake=_series_backward_fake,
)


class Series(Kernel):
    """Taylor coefficients of an ODE's solution: tensors are x, weights, biases."""

    def __init__(self, net: MLP, order: int) -> None:
        super().__init__(net)
        self.order = order

    def forward(self, tensors: Tensors, keep: bool) -> tuple[Tensor, Any]:
        """The result, and what the backward pass needs."""
        out, kept = mlp_series(tensors[0], *self.net(tensors, 1), self.order, keep)
        return out, (out.clone(), kept) if keep else None  # the caller may change it in place

    def backward(
        self, grads: Tensors, kept: Any, tensors: Tensors, needed: Sequence[bool]
    ) -> list[Tensor]:
        """Gradients of all tensors."""
        out, kept = kept
        net = self.net(tensors, 1)
        found = mlp_series_backward(grads[0].contiguous(), kept, tensors[0], out, *net, self.order)
        return self.ordered(found, 1)
