"""Derivative and batching rules of the Taylor operators.

They are written in the operators themselves, which are closed under differentiation: the backward
of a function at a series is the correlation with its derivative at that series, that of a product
is a correlation, and that of a correlation is a product and a correlation. So every derivative of
every order runs on the same kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ctorch.ops import _jet_reference as reference
from ctorch.ops import _op

Args = tuple[Any, ...]
Call = Callable[..., Any]

OPERATORS: dict[str, Call] = {}
"""The operators by name, without the prefix; ``ops.jet`` puts them here as it defines them."""


def use(name: str, *args: Any) -> Any:
    """Calls an operator."""
    return OPERATORS[name](*args)


def _primals(args: Args) -> Args:
    """The arguments of a tangent rule without their own tangents, which operators would follow."""
    return tuple(forward_ad.unpack_dual(x).primal if isinstance(x, Tensor) else x for x in args)


# ---- unary -------------------------------------------------------------------------------------


def unary_backward(args: Args, needed: Sequence[bool], g: Tensor | None) -> Args:
    """Cotangents of (x, op, order, param, level, last)."""
    x, op, order, param, level, last = args
    if g is None:
        return (None,) * 6
    return use("unary_backward", g, x, op, order, param, level + 1, last), *(None,) * 5


def unary_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of a function at a series."""
    x, op, order, param, level, last = _primals(args)
    slope = use("unary", x, op, order, param, level + 1, False)
    return _last_of_product(tangents[0], slope) if last else use("mul", slope, tangents[0], order)


def unary_vmap(call: Call, size: int, batched: Sequence[bool], args: Args) -> Any:
    """The mapped dimension is one of the elements'."""
    x, *rest = args
    return call(x.movedim(0, 1), *rest), 0 if rest[-1] else 1


def unary_backward_backward(args: Args, needed: Sequence[bool], w: Tensor | None) -> Args:
    """Cotangents of (g, x, op, order, param, level, last)."""
    g, x, op, order, param, level, last = args
    g_bar = x_bar = None
    if w is not None and needed[0]:
        slope = use("unary", x, op, order, param, level, False)
        g_bar = _last_of_product(w, slope) if last else use("mul", w, slope, order)
    if w is not None and needed[1]:
        slope_bar = _reversed(w, order) * g if last else use("correlate", w, g, order)
        x_bar = use("unary_backward", slope_bar, x, op, order, param, level + 1, False)
    return g_bar, x_bar, *(None,) * 5


def unary_backward_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of the correlation with a function's derivative."""
    g, x, op, order, param, level, last = _primals(args)
    tg, tx = tangents[:2]
    out = None if tg is None else use("unary_backward", tg, x, op, order, param, level, last)
    if tx is None:
        return torch.zeros_like(x) if out is None else out
    bend = use("unary", x, op, order, param, level + 1, False)
    slope_t = use("mul", bend, tx, order)
    terms = x.shape[0]
    more = slope_t.flip(0)[:terms] * g if last else use("correlate", slope_t, g, terms - 1)
    return more if out is None else out + more


def unary_backward_vmap(call: Call, size: int, batched: Sequence[bool], args: Args) -> Any:
    """The mapped dimension is one of the elements'."""
    g, x, *rest = args
    at = 0 if rest[-1] else 1
    g = g.movedim(0, at) if batched[0] else _expanded(g, at, size)
    x = x.movedim(0, 1) if batched[1] else _expanded(x, 1, size)
    return call(g, x, *rest), 1


def _last_of_product(a: Tensor, b: Tensor) -> Tensor:
    """The coefficient of the order of b in the product of a and b."""
    return (a * b.flip(0)[: a.shape[0]]).sum(0)


def _reversed(w: Tensor, order: int) -> Tensor:
    """w_{order-k} for k = 0 to order, with zeros where w ends."""
    missing = order + 1 - w.shape[0]
    w = w.flip(0)
    return torch.cat([w.new_zeros((missing, *w.shape[1:])), w]) if missing else w


def _expanded(x: Tensor, at: int, size: int) -> Tensor:
    x = x.unsqueeze(at)
    return x.expand(*x.shape[:at], size, *x.shape[at + 1 :])


# ---- product, quotient, correlation ------------------------------------------------------------


def mul_backward(args: Args, needed: Sequence[bool], g: Tensor | None) -> Args:
    """Cotangents of (a, b, order)."""
    a, b, _ = args
    if g is None:
        return None, None, None
    return (
        _summed(use("correlate", b, g, a.shape[0] - 1), a) if needed[0] else None,
        _summed(use("correlate", a, g, b.shape[0] - 1), b) if needed[1] else None,
        None,
    )


def mul_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of a product."""
    a, b, order = _primals(args)
    parts = [use("mul", ta, b, order) for ta in tangents[:1] if ta is not None]
    parts += [use("mul", a, tb, order) for tb in tangents[1:2] if tb is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def div_backward(args: Args, needed: Sequence[bool], g: Tensor | None) -> Args:
    """Cotangents of (a, b, order)."""
    a, b, order = args
    if g is None:
        return None, None, None
    inverse = use("div", torch.ones_like(b[:1]), b, order)
    top = use("correlate", inverse, g, max(order, a.shape[0] - 1))
    a_bar = _summed(top[: a.shape[0]], a) if needed[0] else None
    b_bar = None
    if needed[1]:
        quotient = use("mul", a, inverse, order)
        b_bar = _summed(-use("correlate", quotient, top, b.shape[0] - 1), b)
    return a_bar, b_bar, None


def div_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of a quotient."""
    a, b, order = _primals(args)
    parts = [use("div", ta, b, order) for ta in tangents[:1] if ta is not None]
    if tangents[1] is not None:
        change = use("mul", use("div", a, b, order), tangents[1], order)
        parts.append(-use("div", change, b, order))
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def correlate_backward(args: Args, needed: Sequence[bool], w: Tensor | None) -> Args:
    """Cotangents of (g, y, order)."""
    g, y, _ = args
    if w is None:
        return None, None, None
    return (
        _summed(use("correlate", w, y, g.shape[0] - 1), g) if needed[0] else None,
        _summed(use("mul", w, g, y.shape[0] - 1), y) if needed[1] else None,
        None,
    )


def correlate_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of a correlation."""
    g, y, order = _primals(args)
    parts = [use("correlate", tg, y, order) for tg in tangents[:1] if tg is not None]
    parts += [use("correlate", g, ty, order) for ty in tangents[1:2] if ty is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]


def pair_vmap(call: Call, size: int, batched: Sequence[bool], args: Args) -> Any:
    """The mapped dimension is the first of the elements'; shapes still broadcast behind it."""
    a, b, order = args
    dims = max(x.dim() - one for x, one in zip((a, b), batched, strict=False)) - 1
    a, b = (_aligned(x, dims) if one else x for x, one in zip((a, b), batched, strict=False))
    return call(a, b, order), 1


def _aligned(x: Tensor, dims: int) -> Tensor:
    """[B, terms, *shape] as [terms, B, *ones, *shape] with so many dimensions behind B."""
    shape = x.shape[2:]
    return x.movedim(0, 1).reshape(x.shape[1], x.shape[0], *[1] * (dims - len(shape)), *shape)


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """A cotangent [terms, *broadcast], summed to the shape of what was broadcast."""
    return x if x.shape == like.shape else _sum_to(x, like.shape)


def _sum_to(x: Tensor, shape: torch.Size) -> Tensor:
    extra = x.dim() - len(shape)
    if extra:
        x = x.sum(tuple(range(1, 1 + extra)))
    over = tuple(d for d in range(1, x.dim()) if shape[d] == 1 and x.shape[d] != 1)
    return x.sum(over, keepdim=True) if over else x


# ---- Laplacian ---------------------------------------------------------------------------------


def laplacian_backward(args: Args, needed: Sequence[bool], *grads: Tensor | None) -> Args:
    """Cotangents of (x, rows, lap, op, param), for the operators with and without rows."""
    x, rows, lap, op, param = args
    gy, grows, glap = grads if len(grads) == 3 else (grads[0], None, grads[1])
    inputs = (x, rows, lap, gy, grows, glap, op, param)
    # The fused kernel has no derivative of its own: where one may be asked for, plain PyTorch.
    plain = torch.is_grad_enabled() or _op.transforms_active()
    x_bar, rows_bar, lap_bar = (
        reference.laplacian_backward(*inputs) if plain else use("laplacian_backward", *inputs)
    )
    return x_bar, rows_bar, (None if lap is None else lap_bar), None, None


def laplacian_jvp(args: Args, tangents: Args) -> tuple[Tensor, ...]:
    """Tangents of value, rows and Laplacian."""
    x, rows, lap, op, param = _primals(args)
    tx, trows, tlap = tangents[:3]
    first, second, third = (use("unary", x[None], op, 0, param, m, True) for m in (1, 2, 3))
    ty, trows_out, tlap_out = (
        torch.zeros_like(x),
        torch.zeros_like(first * rows),
        torch.zeros_like(x),
    )
    if tx is not None:
        ty, trows_out = first * tx, second * tx * rows
        bend = third * (rows * rows).sum(0)
        tlap_out = tx * (bend if lap is None else bend + second * lap)
    if trows is not None:
        trows_out = trows_out + first * trows
        tlap_out = tlap_out + 2 * second * (rows * trows).sum(0)
    if tlap is not None:
        tlap_out = tlap_out + first * tlap
    return ty, trows_out, tlap_out


def laplacian_last_jvp(args: Args, tangents: Args) -> tuple[Tensor, ...]:
    """Tangents of value and Laplacian."""
    ty, _, tlap = laplacian_jvp(args, tangents)
    return ty, tlap


def laplacian_vmap(call: Call, size: int, batched: Sequence[bool], args: Args) -> Any:
    """The mapped dimension is one of the elements'; rows that have none are shared over it."""
    x, rows, lap, *rest = args
    x = x if batched[0] else _expanded(x, 0, size)
    rows = rows.movedim(0, 1) if batched[1] else rows.unsqueeze(1)
    rows = shared_over_leading(rows, x.shape)
    if lap is not None and not batched[2]:
        lap = _expanded(lap, 0, size)
    out = call(x, rows, lap, *rest)
    return out, (0, 1, 0) if len(out) == 3 else (0, 0)


def shared_over_leading(rows: Tensor, shape: torch.Size) -> Tensor:
    """Rows as the kernels take them: ones in leading dimensions alone, or none."""
    full = True
    for have, want in zip(reversed(rows.shape[1:]), reversed(shape), strict=True):
        full = full and have == want
        if not full and have != 1:
            return rows.expand(rows.shape[0], *shape)
    return rows
