"""Functions whose Jacobian is hollow but for its diagonal, and what that makes cheap.

A hollow net is ``f_i(x, t) = tau_i(x_i, h_i; t)`` with ``h_i = c_i(x_{-i}, t)``: the conditioner c
never shows ``h_i`` its own ``x_i``, and the transformers tau are scalar functions of ``x_i``. Then
``d^k f_i / d x_i^k`` is a derivative of tau alone, at h held fixed: one Taylor pass through the
small tau gives all of them, whatever d.

Source: Chen and Duvenaud, "Neural Networks with Cheap Differential Operators" (2019).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ctorch.autodiff._arguments import points, whole
from ctorch.autodiff._jet import Jet, pad
from ctorch.autodiff._propagated import propagate
from ctorch.autodiff.jet import factorial
from ctorch.ops.hollow import Transformer, transform

Time = Any  # a number or a tensor that broadcasts against [..., 1], or None


@dataclass(frozen=True)
class Hollow:
    """The two halves of a hollow net, as its method ``__ctorch_hollow__()`` returns them.

    Args:
        conditioner: ``c(t, x)``: from ``x`` [..., d] to ``h`` [..., d, H], where ``h_i`` must not
            depend on ``x_i``; ``check_hollow`` tests that.
        transformer: the scalar networks tau as a ``ctorch.ops.hollow.Transformer``, which has a
            kernel; or any function ``tau(t, x, h) -> [..., d]`` made of torch functions, whose
            i-th value depends on ``x_i`` and ``h_i`` alone.
    """

    conditioner: Callable[[Time, Tensor], Tensor]
    transformer: Transformer | Callable[[Time, Tensor, Tensor], Tensor]

    def __call__(self, t: Time, x: Tensor) -> Tensor:
        """The net's value ``[..., d]``."""
        return self.coefficients(t, x, 0)[0]

    def coefficients(self, t: Time, x: Tensor, order: int) -> Tensor:
        """Taylor coefficients of each component in its own dimension.

        Args:
            t: time, a number or a tensor that broadcasts against ``[..., 1]``; None for a net
                without it.
            x: ``[..., d]``.
            order: the highest one.

        Returns:
            ``1/k! d^k f_i / d x_i^k`` for k = 0 to ``order``, ``[order + 1, ..., d]``.
        """
        h = self.conditioner(t, x)
        tau = self.transformer
        if isinstance(tau, Transformer):
            return transform(x, h, tau, order)
        if order == 0:
            return tau(t, x, h).unsqueeze(0)
        seed = torch.stack([x, torch.ones_like(x)])
        out = propagate(lambda moved: tau(t, moved, h), Jet(seed, order))
        return out.stack() if isinstance(out, Jet) else pad(out.unsqueeze(0), order)


def as_hollow(net: Any) -> Hollow:
    """The halves of a net that says that it is hollow.

    A net says so by a method ``__ctorch_hollow__()`` that returns a ``Hollow``, or None where it is
    not hollow in its present state. It is asked anew at every call, so that weights may be made on
    the fly from parameters.

    Args:
        net: any object.

    Returns:
        Its halves.

    Raises:
        TypeError: ``net`` is not hollow, or the method returned something else.
    """
    protocol = getattr(type(net), "__ctorch_hollow__", None)
    said = None if protocol is None else protocol(net)
    if isinstance(said, Hollow):
        return said
    name = type(net).__name__
    if said is not None:
        raise TypeError(
            f"net: {name}.__ctorch_hollow__() must return a ctorch.autodiff.hollow.Hollow or None, "
            f"got {type(said).__name__}"
        )
    why = "has no method __ctorch_hollow__()" if protocol is None else "says that it is not, now"
    raise TypeError(
        f"net: expected a hollow net, as ctorch.nn.HollowMLP; {name} {why}. For a net wrapped in "
        f"another module give the inner one; for any other function there is "
        f'ctorch.divergence(f, x, method="exact"), and the diagonal of torch.func.jacfwd(f)(x)'
    )


def dimwise_derivative(
    net: Any, x: Tensor, order: int = 1, t: Time = None
) -> tuple[Tensor, Tensor]:
    """``f(x)`` and all ``d^k f_i / d x_i^k``, k = 1 to ``order``, of a hollow net in one pass.

    The conditioner is evaluated once; a Taylor series passes through the transformers, with h held
    fixed. The whole is differentiable any number of times, in both modes, in x (through h too), t
    and parameters.

    Args:
        net: a hollow net: ``ctorch.nn.HollowMLP``, ``HollowAttention``, ``HollowSum``, or any
            object with a method ``__ctorch_hollow__``, see ``ctorch.autodiff.hollow.Hollow``.
        x: ``[..., d]``.
        order: the highest derivative, >= 0.
        t: time, as the net takes it: a number, or a tensor that broadcasts against ``[..., 1]``.

    Returns:
        ``(value, derivatives)``: ``[..., d]`` and ``[order, ..., d]``, in the dtype of the net's
        value; that is the dtype of ``x`` for the nets of ``ctorch.nn``, which take no other. Their
        sums over the last dim are divergence, Laplacian-like sums of ``d^2 f_i / d x_i^2``, and so
        on.

    Raises:
        TypeError: ``net`` is not hollow; ``x`` or ``order`` is of the wrong type.
        ValueError: shapes or ``order`` do not fit.

    Source: Chen and Duvenaud, "Neural Networks with Cheap Differential Operators" (2019), section
    3.

    Example:
        >>> import torch, ctorch
        >>> net = ctorch.nn.HollowMLP(3)
        >>> x = torch.randn(5, 3)
        >>> value, derivatives = ctorch.dimwise_derivative(net, x, order=2, t=0.5)
        >>> torch.allclose(value, net(0.5, x)), derivatives.shape
        (True, torch.Size([2, 5, 3]))
    """
    hollow = as_hollow(net)
    order = whole("order", order, 0)
    points(x)
    stack = hollow.coefficients(t, x, order)
    if not isinstance(stack, Tensor) or stack.shape[1:] != x.shape:
        got = tuple(stack.shape[1:]) if isinstance(stack, Tensor) else type(stack).__name__
        raise ValueError(f"net: expected values of the shape of x, {tuple(x.shape)}, got {got}")
    value, rest = stack[0], stack[1:]
    if order < 2:
        return value, rest
    scales = [factorial(k, stack.dtype) for k in range(1, order + 1)]
    return value, rest * rest.new_tensor(scales).reshape(-1, *(1,) * x.ndim)


# ---- whether a net is hollow


def check_hollow(net: Any, x: Tensor, t: Time = None) -> None:
    """Tests by autograd that no ``h_i`` depends on its ``x_i``: exactly, in every sample.

    Costs one evaluation and one backward pass of ``d`` times the batch (in blocks): a test for nets
    of one's own, on a few samples. Tested too are that ``net(t, x)`` is what its halves compute,
    and that a transformer given as a function takes dimensions one at a time.

    Args:
        net: what claims to be hollow.
        x: ``[..., d]``, generic points, such as ``torch.randn(4, d)``.
        t: time, as the net takes it.

    Raises:
        TypeError: ``net`` does not say that it is hollow.
        ValueError: it is not; the message names the dimension.

    Example:
        >>> import torch, ctorch
        >>> from ctorch.autodiff.hollow import check_hollow
        >>> check_hollow(ctorch.nn.HollowSum(3), torch.randn(4, 3), t=0.0)
    """
    hollow = as_hollow(net)
    points(x)
    if x.numel() == 0:
        raise ValueError(f"x: expected at least one sample to test at, got {tuple(x.shape)}")
    x = x.detach()
    with torch.enable_grad():
        for dims in torch.arange(x.shape[-1], device=x.device).split(_block(x)):
            _check_conditioner(hollow, x, t, dims)
            if not isinstance(hollow.transformer, Transformer):
                _check_transformer(hollow.transformer, hollow, x, t, dims)
    with torch.no_grad():
        value, parts = net(t, x), hollow(t, x)
    if value.shape != parts.shape or not torch.allclose(value, parts, 1e-3, 1e-4, equal_nan=True):
        raise ValueError(
            f"net: {type(net).__name__} called at x is not what the conditioner and transformer "
            f"that it names compute there"
        )


def _block(x: Tensor) -> int:
    """Dimensions that are tested at once: each takes a copy of the batch."""
    return max(1, (1 << 18) // max(1, x.numel()))


def _check_conditioner(hollow: Hollow, x: Tensor, t: Time, dims: Tensor) -> None:
    copies = x.expand(len(dims), *x.shape).clone().requires_grad_()  # one for each dimension
    h = hollow.conditioner(t, copies)
    if h.ndim != copies.ndim + 1 or h.shape[:-1] != copies.shape:
        want = f"{(*x.shape, 'H')}".replace("'", "")
        raise ValueError(f"net: the conditioner must return h {want}, got {tuple(h.shape[1:])}")
    own = h[torch.arange(len(dims)), ..., dims, :]  # h_i of the i-th copy
    if not own.requires_grad:
        return
    (grad,) = torch.autograd.grad(own, copies, torch.randn_like(own), allow_unused=True)
    if grad is None:
        return
    leak = grad[torch.arange(len(dims)), ..., dims].reshape(len(dims), -1).abs().amax(1)
    for i, size in zip(dims.tolist(), leak.tolist(), strict=True):
        if size != 0:  # NaN too
            raise ValueError(
                f"net: not hollow: h[..., {i}, :] depends on x[..., {i}] (along some direction "
                f"its derivative is {size:.3g}, expected exactly 0)"
            )


def _check_transformer(tau: Any, hollow: Hollow, x: Tensor, t: Time, dims: Tensor) -> None:
    copies = x.expand(len(dims), *x.shape).clone().requires_grad_()
    h = hollow.conditioner(t, copies).detach().requires_grad_()
    value = tau(t, copies, h)[torch.arange(len(dims)), ..., dims]
    if not value.requires_grad:
        return
    grads = torch.autograd.grad(value, (copies, h), torch.randn_like(value), allow_unused=True)
    for name, grad, foreign in zip(("x", "h"), grads, (0, 1), strict=True):
        if grad is None:
            continue
        sizes = grad.abs().flatten(1 + x.ndim).sum(-1) if foreign else grad.abs()
        sizes = sizes.reshape(len(dims), -1, x.shape[-1]).sum(1)
        sizes[torch.arange(len(dims)), dims] = 0
        if bool((sizes != 0).any()):
            k, j = torch.nonzero(sizes)[0].tolist()
            raise ValueError(
                f"net: not hollow: the transformer's value {dims[k].item()} depends on "
                f"{name}[..., {j}{', :' if foreign else ''}] of another dimension"
            )
