"""Taylor coefficients of the solution of an ODE."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ctorch.autodiff._arguments import function, whole
from ctorch.autodiff._propagated import Propagated
from ctorch.autodiff._stream import Stream, Tape
from ctorch.autodiff.mlp import as_mlp
from ctorch.ops import mlp

Function = Callable[..., Any]


def taylor_series(func: Function, t: float | Tensor, y: Any, order: int) -> Any:
    """Normalized Taylor coefficients of the solution of ``y' = func(t, y)`` through ``(t, y)``.

    The k-th is ``1/k! d^k y/dt^k``. ``func`` runs once; then each order costs what one evaluation
    of ``func`` costs, so all of them ``order`` evaluations. Differentiable any number of times, and
    usable under ``torch.func`` transforms.

    Args:
        func: ``func(t, y)`` returns dy/dt, made of torch functions; modules and Python control
            flow, which looks at values alone, included. A field wrapped in
            ``ctorch.autodiff.Autonomous`` may be computed by a kernel of its own.
        t: the time: a number or a tensor that broadcasts against y, as ``[B, 1]`` for samples at
            times of their own. A field that depends on it has its series in t accounted for.
        y: the state ``[*shape]``, floating point, or a pytree (tuple, list, dict) of such tensors.
        order: K >= 0, the highest coefficient.

    Returns:
        ``[K+1, *shape]``, or a pytree of these: the state itself, its slope, and so on.

    Raises:
        TypeError, ValueError: arguments, or what ``func`` returned, do not fit.
        MissingRuleError: ``func`` calls a torch function without a rule; the message names it.

    Source: Griewank and Walther, "Evaluating Derivatives", 2nd ed., section 13.4; Jorba and Zou,
        "A software package for the numerical integration of ODEs by means of high-order Taylor
        methods", Experimental Mathematics 14 (2005).

    Example:
        >>> import torch, ctorch
        >>> ctorch.taylor_series(lambda t, y: y, 0.0, torch.ones(()), 4)  # exp(t) = sum t^k / k!
        tensor([1.0000, 1.0000, 0.5000, 0.1667, 0.0417])
    """
    function("func", func)
    order = whole("order", order, 0)
    fused = _fused(func, y, order)
    if fused is not None:
        return fused
    leaves, tree = pytree.tree_flatten(y)
    for leaf in leaves:
        _check_state(leaf)
    if not leaves:
        raise ValueError("y: expected a tensor or a pytree of tensors, got one without any")
    if order == 0:
        return tree.unflatten([leaf.unsqueeze(0) for leaf in leaves])
    columns = _recursion(func, t, leaves, tree, order)
    return tree.unflatten([torch.stack(column) for column in columns])


class Autonomous(nn.Module):
    """A vector field that does not depend on time: ``forward(t, y)`` is ``net(y)``.

    It says so to ``taylor_series``, which then has a kernel of its own for a plain MLP
    (``nn.Sequential`` of linear layers and smooth activations), with an adjoint to
    match. Parameters are those of ``net``, under ``net.``.

    Args:
        net: a module or function of the state ``[..., d]``.

    Example:
        >>> import torch, ctorch
        >>> field = ctorch.autodiff.Autonomous(torch.nn.Linear(2, 2))
        >>> ctorch.taylor_series(field, 0.0, torch.zeros(5, 2), 3).shape
        torch.Size([4, 5, 2])
    """

    def __init__(self, net: Function) -> None:
        super().__init__()
        self.net = net

    def forward(self, t: Any, y: Tensor) -> Tensor:
        """``net(y)`` [..., d], whatever the time."""
        return cast(Tensor, self.net(y))


def _fused(func: Function, y: Any, order: int) -> Tensor | None:
    """The series of a plain MLP by its own kernel, or None where it is not known to be one."""
    if type(func) is not Autonomous or not isinstance(y, Tensor) or y.ndim < 1 or order == 0:
        return None
    if torch.is_autocast_enabled("cpu" if y.is_cpu else y.device.type):
        return None
    net = as_mlp(func.net)
    if net is None or y.dtype != net.weights[0].dtype:
        return None
    if not net.weights[0].shape[1] == net.weights[-1].shape[0] == y.shape[-1]:
        return None
    return mlp.series(net, y, order)


def _recursion(
    func: Function, t: float | Tensor, leaves: list[Tensor], tree: Any, order: int
) -> list[list[Tensor]]:
    """The coefficients of every leaf, one order after the other."""
    tape = Tape(order - 1)
    inputs = [tape.input(leaf) for leaf in leaves]
    roots = [x.node for x in inputs]  # func may write into its argument
    slopes = _slopes(func(_time(t, leaves[0], tape), tree.unflatten(inputs)), leaves, tree)
    needed = tape.needed([slope.node for slope in slopes if isinstance(slope, Stream)])
    columns = [[leaf] for leaf in leaves]
    for k in range(order):
        if k:
            for node in needed:
                node.advance(k)
        for column, slope, root in zip(columns, slopes, roots, strict=True):
            known = slope.node.at(k) if isinstance(slope, Stream) else slope if k == 0 else None
            term = torch.zeros_like(column[0]) if known is None else known.to(column[0].dtype)
            column.append(term / (k + 1) if k else term)
            root.append(column[-1])
    return columns


def _time(t: float | Tensor, y: Tensor, tape: Tape) -> Stream:
    """Time as a series: ``t + s``."""
    if isinstance(t, Propagated):
        raise TypeError("t: values of two derivative operators meet: do not nest them")
    real = y.real.dtype if y.is_complex() else y.dtype  # Dynamo knows no dtype.to_real
    if isinstance(t, Tensor):
        if not (t.is_floating_point() or t.ndim == 0) or t.dtype == torch.bool or t.is_complex():
            raise TypeError(f"t: expected a number or a floating point tensor, got {t.dtype}")
        start = t.to(y.device, real)
    else:
        if isinstance(t, (bool, str)) or not hasattr(t, "__float__"):
            raise TypeError(f"t: expected a number or a tensor, got {type(t).__name__}")
        start = torch.full((), float(t), dtype=real, device=y.device)
    time = tape.input(start, degree=1)
    time.node.append(torch.ones_like(start))
    return time


def _slopes(result: Any, leaves: list[Tensor], tree: Any) -> list[Any]:
    """What ``func`` returned, checked against the state."""
    slopes, given = pytree.tree_flatten(result, is_leaf=lambda x: isinstance(x, Propagated))
    if given != tree and given.num_leaves == tree.num_leaves:
        try:  # the same keys in another order
            slopes = tree.flatten_up_to(result)
        except ValueError:
            raise ValueError(f"func: expected the structure of y, {tree}, got {given}") from None
    if len(slopes) != len(leaves):
        raise ValueError(
            f"func: expected {len(leaves)} tensors, as y holds, but it returned {len(slopes)}"
        )
    for slope, leaf in zip(slopes, leaves, strict=True):
        if not isinstance(slope, (Stream, Tensor)):
            raise TypeError(f"func: expected a tensor, but it returned {type(slope).__name__}")
        if slope.shape != leaf.shape:
            raise ValueError(
                f"func: expected shape {tuple(leaf.shape)} as of y, but it returned "
                f"{tuple(slope.shape)}"
            )
        if torch.promote_types(slope.dtype, leaf.dtype) != leaf.dtype:
            raise TypeError(
                f"func: returned {slope.dtype} for a state of {leaf.dtype}: give y as {slope.dtype}"
                f", or convert the result"
            )
    return slopes


def _check_state(y: Any) -> None:
    if isinstance(y, Propagated):
        raise TypeError(
            f"y: got a {type(y).__name__}, a value of another derivative operator: do not nest them"
        )
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected tensors, got {type(y).__name__}")
    if not (y.is_floating_point() or y.is_complex()):
        raise TypeError(f"y: expected floating point, got {y.dtype}: use y.double()")
