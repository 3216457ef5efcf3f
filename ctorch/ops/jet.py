"""Taylor arithmetic: elementwise functions, products and Laplacians of truncated Taylor series.

A series is a stack ``[K+1, *shape]`` of **normalized** coefficients, ``x_k = x^(k) / k!``, the
value first. Where a stack is shorter than the order asked for, the coefficients that are missing
are zero; nothing is computed for them.

All functions are differentiable, in both modes and under ``vmap``; all but the Laplacians on
kernels at every order of differentiation. Dtypes: float32 and float64.

Source: Griewank and Walther, Evaluating Derivatives, ch. 13 (recurrences); Li et al. 2023, "Forward
Laplacian".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ctorch.ops import _jet_reference as reference
from ctorch.ops import _jet_rules as rules
from ctorch.ops import _op
from ctorch.ops._jet_reference import UNARY as UNARY
from ctorch.ops._op import define

NUMBER = {name: number for number, name in enumerate(UNARY)}


def unary(x: Tensor, name: str, order: int | None = None, param: float = 0.0) -> Tensor:
    """Taylor coefficients of an elementwise function of a series.

    Args:
        x: coefficients of the argument ``[D+1, *shape]``, with ``D <= order``.
        name: the function, one of ``UNARY``.
        order: K, the highest coefficient wanted; None: D.
        param: the exponent of ``pow``, the ``beta`` of ``softplus``; others have none.

    Returns:
        ``[K+1, *shape]``, contiguous, in the dtype of ``x``.

    Raises:
        ValueError: an unknown name, or an order below that of ``x``.
        TypeError: ``x`` is not float32 or float64.
    """
    number = _check_unary(x, name)
    terms = x.shape[0]
    if order is None:
        order = terms - 1
    elif order < terms - 1:
        raise ValueError(f"order must be at least {terms - 1}, the order of x; got {order}")
    return cast(Tensor, jet_unary(x, number, order, param, 0, False))


def unary_last(x: Tensor, name: str, param: float = 0.0) -> Tensor:
    """The highest Taylor coefficient alone of an elementwise function of a series.

    Args:
        x: coefficients of the argument ``[K+1, *shape]``.
        name: the function, one of ``UNARY``.
        param: as for ``unary``.

    Returns:
        ``[*shape]``, the coefficient of order K.

    Raises:
        ValueError: an unknown name.
        TypeError: ``x`` is not float32 or float64.
    """
    return cast(Tensor, jet_unary(x, _check_unary(x, name), x.shape[0] - 1, param, 0, True))


def mul(a: Tensor, b: Tensor, order: int | None = None) -> Tensor:
    """Taylor coefficients of a product.

    Args:
        a: ``[Da+1, *shape_a]``.
        b: ``[Db+1, *shape_b]``; the shapes broadcast.
        order: K, the highest coefficient wanted; None: the larger of Da and Db.

    Returns:
        ``[K+1, *broadcast]``, contiguous.

    Raises:
        ValueError: shapes do not broadcast, or a negative order.
        TypeError: a dtype is not float32 or float64, or they differ.
    """
    order = _check_pair("a", a, "b", b, order)
    return cast(Tensor, jet_mul(a, b, order))


def div(a: Tensor, b: Tensor, order: int | None = None) -> Tensor:
    """Taylor coefficients of a quotient; arguments and errors as for ``mul``.

    Returns:
        ``[K+1, *broadcast]``, contiguous.
    """
    order = _check_pair("a", a, "b", b, order)
    return cast(Tensor, jet_div(a, b, order))


def correlate(g: Tensor, y: Tensor, order: int | None = None) -> Tensor:
    """``z_j = sum_{k >= j} g_{k-j} y_k``: the transpose of a product, every operation's backward.

    Args:
        g: ``[Dg+1, *shape_g]``.
        y: ``[Dy+1, *shape_y]``; the shapes broadcast.
        order: the highest j wanted; None: Dy.

    Returns:
        ``[order+1, *broadcast]``, contiguous.

    Raises:
        ValueError: shapes do not broadcast, or a negative order.
        TypeError: a dtype is not float32 or float64, or they differ.
    """
    highest = _check_pair("g", g, "y", y, order)
    return cast(Tensor, jet_correlate(g, y, y.shape[0] - 1 if order is None else highest))


def laplacian_unary(
    x: Tensor, rows: Tensor, lap: Tensor | None, name: str, param: float = 0.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, Jacobian rows and Laplacian of an elementwise function.

    Args:
        x: value of the argument ``[*shape]``.
        rows: its derivatives ``[R, *shape]``, with size 1 in dimensions that share them; leading
            ones are never expanded.
        lap: its Laplacian ``[*shape]``; None stands for zeros.
        name: the function f, one of ``UNARY``.
        param: as for ``unary``.

    Returns:
        ``f(x)``, ``f'(x) rows`` ``[R, *shape]`` and ``f'(x) lap + f''(x) sum_r rows_r^2``.

    Raises:
        ValueError: an unknown name, or shapes that do not fit.
        TypeError: a dtype is not float32 or float64, or they differ.
    """
    number, rows = _check_laplacian(x, rows, lap, name)
    return cast(tuple[Tensor, Tensor, Tensor], jet_laplacian(x, rows, lap, number, param))


def laplacian_unary_last(
    x: Tensor, rows: Tensor, lap: Tensor | None, name: str, param: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Value and Laplacian of an elementwise function: ``laplacian_unary`` without its rows."""
    number, rows = _check_laplacian(x, rows, lap, name)
    return cast(tuple[Tensor, Tensor], jet_laplacian_last(x, rows, lap, number, param))


# ---- the bare operators ------------------------------------------------------------------------


def _fake_unary(x: Tensor, op: int, order: int, param: float, level: int, last: bool) -> Tensor:
    return x.new_empty(x.shape[1:] if last else (order + 1, *x.shape[1:]))


def _fake_unary_backward(g: Tensor, x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _fake_pair(a: Tensor, b: Tensor, order: int) -> Tensor:
    return a.new_empty((order + 1, *torch.broadcast_shapes(a.shape[1:], b.shape[1:])))


def _fake_laplacian(
    x: Tensor, rows: Tensor, lap: Tensor | None, op: int, param: float
) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty((rows.shape[0], *x.shape)), x.new_empty(x.shape)


def _fake_laplacian_last(x: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_laplacian_backward(x: Tensor, rows: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), rows.new_empty(rows.shape), x.new_empty(x.shape)


def _define(schema: str, function: Callable[..., Any], **parts: Any) -> Callable[..., Any]:
    name = schema.partition("(")[0]
    operator = define(schema, function, **parts)
    tensors = schema.partition(") ->")[0].count("Tensor")
    overload = getattr(torch.ops.ctorch, name).default
    quick = _without_graph(operator, getattr(overload, "_op", overload), tensors)
    rules.OPERATORS[name.removeprefix("jet_")] = quick
    return quick


def _without_graph(
    operator: Callable[..., Any], bare: Callable[..., Any], tensors: int
) -> Callable[..., Any]:
    """The operator, by a shorter way where it records nothing: torch's autograd costs 6 us."""
    below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", None)
    if below_autograd is None or not _op.KNOWN_TORCH:
        return operator
    active, level = _op.transforms_active, forward_ad

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or active() or level._current_level >= 0:
            return operator(*args)
        if torch.is_grad_enabled():
            for x in args[:tensors]:
                if x is not None and x.requires_grad:
                    return operator(*args)
        with below_autograd():
            return bare(*args)

    return call


jet_unary = _define(
    "jet_unary(Tensor x, int op, int order, float param, int level, bool last) -> Tensor",
    reference.unary,
    fake=_fake_unary,
    backward=rules.unary_backward,
    jvp=rules.unary_jvp,
    vmap=rules.unary_vmap,
)
jet_unary_backward = _define(
    "jet_unary_backward(Tensor g, Tensor x, int op, int order, float param, int level, bool last) "
    "-> Tensor",
    reference.unary_backward,
    fake=_fake_unary_backward,
    backward=rules.unary_backward_backward,
    jvp=rules.unary_backward_jvp,
    vmap=rules.unary_backward_vmap,
)
jet_mul = _define(
    "jet_mul(Tensor a, Tensor b, int order) -> Tensor",
    reference.mul,
    fake=_fake_pair,
    backward=rules.mul_backward,
    jvp=rules.mul_jvp,
    vmap=rules.pair_vmap,
)
jet_div = _define(
    "jet_div(Tensor a, Tensor b, int order) -> Tensor",
    reference.div,
    fake=_fake_pair,
    backward=rules.div_backward,
    jvp=rules.div_jvp,
    vmap=rules.pair_vmap,
)
jet_correlate = _define(
    "jet_correlate(Tensor g, Tensor y, int order) -> Tensor",
    reference.correlate,
    fake=_fake_pair,
    backward=rules.correlate_backward,
    jvp=rules.correlate_jvp,
    vmap=rules.pair_vmap,
)
jet_laplacian = _define(
    "jet_laplacian(Tensor x, Tensor rows, Tensor? lap, int op, float param) "
    "-> (Tensor, Tensor, Tensor)",
    reference.laplacian,
    fake=_fake_laplacian,
    backward=rules.laplacian_backward,
    jvp=rules.laplacian_jvp,
    vmap=rules.laplacian_vmap,
)
jet_laplacian_last = _define(
    "jet_laplacian_last(Tensor x, Tensor rows, Tensor? lap, int op, float param) "
    "-> (Tensor, Tensor)",
    reference.laplacian_last,
    fake=_fake_laplacian_last,
    backward=rules.laplacian_backward,
    jvp=rules.laplacian_last_jvp,
    vmap=rules.laplacian_vmap,
)
jet_laplacian_backward = _define(
    "jet_laplacian_backward(Tensor x, Tensor rows, Tensor? lap, Tensor? gy, Tensor? grows, "
    "Tensor? glap, int op, float param) -> (Tensor, Tensor, Tensor)",
    reference.laplacian_backward,
    fake=_fake_laplacian_backward,
)


# ---- checks ------------------------------------------------------------------------------------


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype is not torch.float32 and x.dtype is not torch.float64:
        raise TypeError(
            f"{name} must have dtype float32 or float64, got {x.dtype}; convert it first"
        )


def _check_unary(x: Tensor, name: str) -> int:
    _check_dtype("x", x)
    if x.dim() < 1 or x.shape[0] < 1:
        raise ValueError(f"x must be a stack [D+1, *shape], got shape {tuple(x.shape)}")
    return _number(name)


def _number(name: str) -> int:
    number = NUMBER.get(name)
    if number is None:
        raise ValueError(f"name must be one of {', '.join(UNARY)}; got {name!r}")
    return number


def _check_pair(name: str, x: Tensor, other: str, y: Tensor, order: int | None) -> int:
    _check_dtype(name, x)
    if y.dtype is not x.dtype:
        raise TypeError(f"{other} must have the dtype of {name}, {x.dtype}; got {y.dtype}")
    for label, z in ((name, x), (other, y)):
        if z.dim() < 1 or z.shape[0] < 1:
            raise ValueError(f"{label} must be a stack [D+1, *shape], got shape {tuple(z.shape)}")
    if x.shape[1:] != y.shape[1:]:
        try:
            torch.broadcast_shapes(x.shape[1:], y.shape[1:])
        except RuntimeError:
            shapes = f"{tuple(x.shape)} and {tuple(y.shape)}"
            raise ValueError(
                f"{name} and {other} must be stacks whose shapes broadcast behind the first "
                f"dimension, got {shapes}"
            ) from None
    if order is None:
        return max(x.shape[0], y.shape[0]) - 1
    if order < 0:
        raise ValueError(f"order must not be negative, got {order}")
    return order


def _check_laplacian(x: Tensor, rows: Tensor, lap: Tensor | None, name: str) -> tuple[int, Tensor]:
    _check_dtype("x", x)
    shape = x.shape
    fits = rows.dim() == x.dim() + 1 and all(
        r in (1, s) for r, s in zip(rows.shape[1:], shape, strict=True)
    )
    if not fits:
        want = f"[R, *{tuple(shape)}], with size 1 in what is shared"
        raise ValueError(f"rows must be {want}; got shape {tuple(rows.shape)}")
    if lap is not None and lap.shape != shape:
        raise ValueError(f"lap must have the shape of x, {tuple(shape)}; got {tuple(lap.shape)}")
    for label, z in (("rows", rows), ("lap", lap)):
        if z is not None and z.dtype is not x.dtype:
            raise TypeError(f"{label} must have the dtype of x, {x.dtype}; got {z.dtype}")
    return _number(name), rules.shared_over_leading(rows, shape)
