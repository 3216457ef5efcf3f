"""Which way a derivative operator of an MLP goes: kernels in one autograd node, or the reference.

A kernel takes all layers at once and knows its own derivative, so each operator is one node of
PyTorch's graph. Under a transform, in forward mode and when compiling, no node stands in the way:
the reference is plain PyTorch. That also gives the second derivatives: the node's backward,
differentiated, is that of the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ctorch.ops import _mlp_divergences as divergences
from ctorch.ops import _mlp_kernels as kernels
from ctorch.ops import _mlp_reference as reference
from ctorch.ops import _op

if TYPE_CHECKING:
    from ctorch.ops.mlp import MLP


def derivative(net: MLP, x: Tensor, v: Tensor, order: int) -> Tensor:
    """``d^K/ds^K f(x + s v)`` at 0; x and v [B, d], result [B, o]."""
    tensors = _for_kernel("mlp_derivative", net, x, v)
    if tensors is None or order > kernels.MAX_ORDER:
        return reference.derivative(net, x, v, order)
    rule = Rule(
        net, kernels.Derivative(net, order), lambda n, x, v: reference.derivative(n, x, v, order)
    )
    return cast(Tensor, rule(tensors, 2))


def series(net: MLP, x: Tensor, order: int) -> Tensor:
    """Taylor coefficients of the solution of ``x' = f(x)``: [K+1, B, d]."""
    tensors = _for_kernel("mlp_series", net, x)
    if tensors is None or not 0 < order <= kernels.MAX_ORDER:
        return reference.series(net, x, order)
    rule = Rule(net, kernels.Series(net, order), lambda n, x: reference.series(n, x, order))
    return cast(Tensor, rule(tensors, 1))


def laplacian(
    net: MLP, x: Tensor, rows: Tensor, gradient: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Value [B, o], derivatives along the rows [B, R, o], sum of second ones [B, o]."""

    def again(net: MLP, x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        value, moved, lap = reference.laplacian(net, x, rows)
        return (value, moved, lap) if gradient else (value, lap)

    tensors = _for_kernel("mlp_laplacian", net, x, rows)
    if tensors is None:
        outputs = again(net, x, rows)
    else:
        outputs = Rule(net, kernels.Laplacian(net, gradient), again)(tensors, 2)
    return outputs[0], outputs[1] if gradient else None, outputs[-1]


def divergence(net: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    """Value [B, d] and trace of the Jacobian [B]."""
    if len(net.weights) < 2:
        return reference.divergence(net, x)
    if len(net.weights) <= 3:
        return _closed_divergence(net, x)
    rows, close = reference.trace_ends(net)
    tensors = _for_kernel("mlp_divergence", net, x, rows, close)
    if tensors is None:
        return reference.divergence(net, x, rows, close)
    return cast(
        tuple[Tensor, Tensor],
        Rule(net, divergences.Divergence(net), reference.divergence)(tensors, 3),
    )


def _closed_divergence(net: MLP, x: Tensor) -> tuple[Tensor, Tensor]:
    if len(net.weights) == 2 or x.numel() == 0:
        return reference.closed_divergence(net, x)
    tensors = _for_kernel("mlp_closed_divergence", net, x)
    if tensors is None:
        return reference.closed_divergence(net, x)
    rule = Rule(net, divergences.ClosedDivergence(net), reference.closed_divergence)
    return cast(tuple[Tensor, Tensor], rule(tensors, 1))


# ---- the choice --------------------------------------------------------------------------------


def _for_kernel(operator: str, net: MLP, *tensors: Tensor) -> list[Tensor] | None:
    """All differentiable arguments, if a kernel may take them: tensors, weights, biases."""
    if torch.compiler.is_compiling() or not _op.KNOWN_TORCH or len(net.weights) < 2:
        return None
    if _op.transforms_active() or forward_ad._current_level >= 0:
        return None
    dtype, strided = tensors[0].dtype, torch.strided
    if (
        dtype not in kernels.DTYPES
        or not kernels.available(operator)
        or torch.is_autocast_enabled("cpu")
    ):
        return None
    every = [*tensors, *net.weights]
    for x in every:
        if x.numel() == 0:
            return None
    for bias in net.biases:
        every.append(tensors[0].new_empty(0) if bias is None else bias)
    for x in every:
        kind = type(x)
        if kind is not Tensor and kind is not torch.nn.Parameter:
            return None
        if x.dtype != dtype or x.layout != strided or not x.is_cpu:
            return None
    return every


class Rule:
    """An operator of an MLP as one autograd node.

    Args:
        net: the MLP.
        kernel: ``forward(tensors, keep) -> (outputs, kept)`` and
            ``backward(grads, kept, tensors, needed) -> grads of tensors``.
        again: the reference, ``(net, *tensors before weights) -> outputs``, for further
            derivatives.
    """

    def __init__(self, net: MLP, kernel: Any, again: Callable[..., Any]) -> None:
        self.net, self.kernel, self.again = net, kernel, again

    def __call__(self, tensors: Sequence[Tensor], before: int) -> Any:
        self.before = before
        if torch.is_grad_enabled() and _op._any_requires_grad(tensors):
            return _Node.apply(self, *tensors)
        outputs, _ = self.kernel.forward([x.contiguous() for x in tensors], False)
        return outputs

    def differentiate(
        self, tensors: Sequence[Tensor], needed: Sequence[bool], grads: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The derivative of the reference, with a graph of its own."""
        with torch.enable_grad():
            # a tensor given twice has a gradient in each place
            copies = [
                x.view_as(x) if n else x.detach() for x, n in zip(tensors, needed, strict=True)
            ]
            outputs = self.again(self._net_of(copies), *copies[: self.before])
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [
                (y, g)
                for y, g in zip(outputs, grads, strict=True)
                if g is not None and y.requires_grad
            ]
            wanted = [x for x, n in zip(copies, needed, strict=True) if n]
            found = iter(
                torch.autograd.grad(
                    [y for y, _ in pairs],
                    wanted,
                    [g for _, g in pairs],
                    create_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                if pairs
                else [torch.zeros_like(x) for x in wanted]
            )
        return [next(found) if n else None for n in needed]

    def _net_of(self, tensors: Sequence[Tensor]) -> MLP:
        layers = len(self.net.weights)
        weights = tensors[self.before : self.before + layers]
        biases = tensors[self.before + layers :]
        given = [None if b is None else x for b, x in zip(self.net.biases, biases, strict=True)]
        return type(self.net)(tuple(weights), tuple(given), self.net.activation, self.net.param)


class _Node(torch.autograd.Function):
    """The one node of all operators here; it is never met by a transform."""

    @staticmethod
    def forward(ctx: Any, rule: Rule, *tensors: Tensor) -> Any:
        contiguous = [x.contiguous() for x in tensors]
        outputs, kept = rule.kernel.forward(contiguous, True)
        ctx.rule, ctx.kept = rule, kept
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Any:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[1:]
        if all(g is None for g in grads):
            return (None,) * (1 + len(tensors))
        if torch.is_grad_enabled():
            return None, *ctx.rule.differentiate(tensors, needed, grads)
        contiguous = [x.contiguous() for x in tensors]
        found = ctx.rule.kernel.backward(grads, ctx.kept, contiguous, needed)
        return None, *(g if n else None for g, n in zip(found, needed, strict=True))

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Without a transform, torch's own binds the signature of forward to no purpose."""
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]
