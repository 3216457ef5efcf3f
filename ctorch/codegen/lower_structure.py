"""Lowering rules of reductions, normalizations, products and sums into places."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ctorch.codegen.graph import ZERO
from ctorch.codegen.lower_expression import Expr, stacked

Rule = Callable[..., Any]

#: Operators that only place numbers: they are run on the ids. Padding is id 0, the number zero.
MOVEMENTS = {
    "cat", "stack", "clone", "repeat", "roll", "flip", "index", "index_select", "gather", "tril",
    "triu", "diag_embed", "constant_pad_nd", "slice_backward", "select_backward", "_unsafe_index",
    "diagonal_backward", "slice_scatter", "select_scatter", "diagonal_scatter", "take",
    "as_strided_scatter", "index_copy", "contiguous", "replication_pad1d", "reflection_pad1d",
    "replication_pad2d", "reflection_pad2d", "replication_pad3d", "reflection_pad3d",
    "_reshape_copy", "unfold_copy", "expand_copy", "view_copy", "permute_copy", "alias_copy",
}  # fmt: skip

#: Results that depend on the shape of a tensor alone.
SHAPE_ONLY = {
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full",
    "new_empty", "new_empty_strided",
}  # fmt: skip

#: Which argument names places: its values are read, and are constants.
PLACES = {
    "index": 1, "_unsafe_index": 1, "index_select": 2, "gather": 2, "take": 1, "index_copy": 2,
    "index_put": 1, "_unsafe_index_put": 1, "scatter_add": 2, "scatter": 2, "index_add": 2,
    "put": 1,
}  # fmt: skip


def _sum(x: Expr, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Expr:
    return x.sum(dim, keepdim)


def _mean(x: Expr, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Expr:
    return x.mean(dim, keepdim)


def _prod(x: Expr, dim: Any = None, keepdim: bool = False, dtype: Any = None) -> Expr:
    return x.reduce("prod", dim, keepdim)


def _amax(x: Expr, dim: Any = None, keepdim: bool = False) -> Expr:
    return x.largest(dim, keepdim)


def _amin(x: Expr, dim: Any = None, keepdim: bool = False) -> Expr:
    return x.reduce("minimum", dim, keepdim)


def _all(x: Expr, dim: Any = None, keepdim: bool = False) -> Expr:
    return _truth(x).reduce("minimum", dim, keepdim).call("ne", 0.0)


def _any(x: Expr, dim: Any = None, keepdim: bool = False) -> Expr:
    return _truth(x).reduce("maximum", dim, keepdim).call("ne", 0.0)


def _truth(x: Expr) -> Expr:
    return x.call("ne", 0.0).where(1.0, 0.0)


def _var(x: Expr, dim: Any = None, correction: float | None = 1, keepdim: bool = False) -> Expr:
    n = x.count(dim) - (1 if correction is None else correction)
    centered = x - x.mean(dim, keepdim=True)
    return (centered * centered).sum(dim, keepdim) * (1.0 / n if n > 0 else math.inf)


def _std(x: Expr, dim: Any = None, correction: float | None = 1, keepdim: bool = False) -> Expr:
    return _var(x, dim, correction, keepdim).call("sqrt")


def _var_mean(
    x: Expr, dim: Any = None, correction: float | None = 1, keepdim: bool = False
) -> tuple[Expr, Expr]:
    return _var(x, dim, correction, keepdim), x.mean(dim, keepdim)


def _norm(
    x: Expr, order: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Expr:
    order = 2 if order is None else order
    size = x.call("abs")
    if order == math.inf:
        return size.largest(dim, keepdim)
    if order == -math.inf:
        return _amin(size, dim, keepdim)
    if order == 0:
        return x.call("ne", 0.0).where(1.0, 0.0).sum(dim, keepdim)
    if order == 1:
        return size.sum(dim, keepdim)
    if order == 2:
        return (x * x).sum(dim, keepdim).call("sqrt")
    return (size**order).sum(dim, keepdim) ** (1 / order)


def _logsumexp(x: Expr, dim: Any, keepdim: bool = False) -> Expr:
    high = x.largest(dim, keepdim=True)
    high = high.call("abs").same(math.inf).where(0.0, high)
    total = (x - high).call("exp").sum(dim, keepdim).call("log")
    return total + (high if keepdim else high.reshape(*total.shape))


def _softmax(x: Expr, dim: int, half_to_float: bool = False) -> Expr:
    if not x.ndim:
        return x.of(1.0)
    powers = (x - x.largest(dim, keepdim=True)).call("exp")
    return powers * (1.0 / powers.sum(dim, keepdim=True))


def _log_softmax(x: Expr, dim: int, half_to_float: bool = False) -> Expr:
    shifted = x - x.largest(dim, keepdim=True)
    return shifted - shifted.call("exp").sum(dim, keepdim=True).call("log")


def _softmax_backward(g: Expr, y: Expr, dim: int, dtype: Any = None) -> Expr:
    weighted = g * y
    return weighted - y * weighted.sum(dim, keepdim=True)


def _log_softmax_backward(g: Expr, y: Expr, dim: int, dtype: Any = None) -> Expr:
    return g - y.call("exp") * g.sum(dim, keepdim=True)


def _layer_norm(
    x: Expr, shape: Sequence[int], weight: Expr | None, bias: Expr | None, eps: float
) -> tuple[Expr, Expr, Expr]:
    dims = tuple(range(-len(shape), 0))
    mean = x.mean(dims, keepdim=True)
    scale = (_var(x, dims, 0, keepdim=True) + eps).call("rsqrt")
    y = (x - mean) * scale
    y = y if weight is None else y * weight
    return y if bias is None else y + bias, mean, scale


def _layer_norm_backward(
    g: Expr,
    x: Expr,
    shape: Sequence[int],
    mean: Expr,
    scale: Expr,
    weight: Expr | None,
    bias: Expr | None,
    wanted: Sequence[bool],
) -> tuple[Expr | None, Expr | None, Expr | None]:
    dims = tuple(range(-len(shape), 0))
    outer = tuple(range(x.ndim - len(shape)))
    unit = (x - mean) * scale
    inner = g if weight is None else g * weight
    centered = inner - inner.mean(dims, keepdim=True)
    grad = (centered - unit * (inner * unit).mean(dims, keepdim=True)) * scale
    by_weight = (g * unit).sum(outer) if outer else g * unit
    return grad, by_weight, g.sum(outer) if outer else g


def _batch_norm(
    x: Expr,
    weight: Expr | None,
    bias: Expr | None,
    mean: Expr | None,
    variance: Expr | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Expr, Expr, Expr]:
    if training and mean is not None:
        raise NotImplementedError("running statistics that change; eval() leaves them")
    dims = (0, *range(2, x.ndim))
    if mean is None or variance is None:
        mean, variance = x.mean(dims), _var(x, dims, 0)
    scale = (variance + eps).call("rsqrt")
    y = (x - _by_channel(mean, x)) * _by_channel(scale, x)
    y = y if weight is None else y * _by_channel(weight, x)
    y = y if bias is None else y + _by_channel(bias, x)
    return (y, mean, scale) if training else (y, mean[:0], mean[:0])


def _by_channel(values: Expr, x: Expr) -> Expr:
    return values.reshape(1, -1, *[1] * (x.ndim - 2))


def _batch_norm_backward(
    g: Expr,
    x: Expr,
    weight: Expr | None,
    mean: Expr | None,
    variance: Expr | None,
    saved_mean: Expr,
    saved_scale: Expr,
    training: bool,
    eps: float,
    wanted: Sequence[bool],
) -> tuple[Expr, Expr, Expr]:
    dims = (0, *range(2, x.ndim))
    if not training and mean is not None and variance is not None:
        saved_mean, saved_scale = mean, (variance + eps).call("rsqrt")
    scale = _by_channel(saved_scale, x)
    unit = (x - _by_channel(saved_mean, x)) * scale
    inner = g if weight is None else g * _by_channel(weight, x)
    grad = inner
    if training:
        grad = (
            grad - inner.mean(dims, keepdim=True) - unit * (inner * unit).mean(dims, keepdim=True)
        )
    return grad * scale, (g * unit).sum(dims), g.sum(dims)


def _group_norm(
    x: Expr,
    weight: Expr | None,
    bias: Expr | None,
    n: int,
    channels: int,
    inner: int,
    groups: int,
    eps: float,
) -> tuple[Expr, Expr, Expr]:
    parts = x.reshape(n, groups, -1)
    mean = parts.mean(-1, keepdim=True)
    scale = (_var(parts, -1, 0, keepdim=True) + eps).call("rsqrt")
    y = ((parts - mean) * scale).reshape(n, channels, -1)
    y = y if weight is None else y * weight.reshape(1, -1, 1)
    y = y if bias is None else y + bias.reshape(1, -1, 1)
    return y.reshape(*x.shape), mean.reshape(n, groups), scale.reshape(n, groups)


def _group_norm_backward(
    g: Expr,
    x: Expr,
    mean: Expr,
    scale: Expr,
    weight: Expr | None,
    n: int,
    channels: int,
    inner: int,
    groups: int,
    wanted: Sequence[bool],
) -> tuple[Expr, Expr, Expr]:
    flat = g.reshape(n, channels, -1)
    unit = (x.reshape(n, groups, -1) - mean.unsqueeze(-1)) * scale.unsqueeze(-1)
    by_channel = unit.reshape(n, channels, -1)
    weighted = flat if weight is None else flat * weight.reshape(1, -1, 1)
    part = weighted.reshape(n, groups, -1)
    centered = part - part.mean(-1, keepdim=True)
    grad = (centered - unit * (part * unit).mean(-1, keepdim=True)) * scale.unsqueeze(-1)
    return grad.reshape(*x.shape), (flat * by_channel).sum((0, 2)), flat.sum((0, 2))


def _mm(a: Expr, b: Expr) -> Expr:
    return a.unsqueeze(0).matmul(b.unsqueeze(0))[0]


def _scaled(x: Expr, factor: float) -> Expr:
    return x if factor == 1 else x * factor


def _addmm(c: Expr, a: Expr, b: Expr, beta: float = 1, alpha: float = 1) -> Expr:
    product = _scaled(_mm(a, b), alpha)
    return product + _scaled(c, beta) if beta else product


def _addmv(c: Expr, a: Expr, b: Expr, beta: float = 1, alpha: float = 1) -> Expr:
    product = _scaled(_mv(a, b), alpha)
    return product + _scaled(c, beta) if beta else product


def _baddbmm(c: Expr, a: Expr, b: Expr, beta: float = 1, alpha: float = 1) -> Expr:
    product = _scaled(a.matmul(b), alpha)
    return product + _scaled(c, beta) if beta else product


def _mv(a: Expr, b: Expr) -> Expr:
    return _mm(a, b.unsqueeze(-1))[:, 0]


def _dot(a: Expr, b: Expr) -> Expr:
    return _mm(a.unsqueeze(0), b.unsqueeze(-1))[0, 0]


def _linear(x: Expr, weight: Expr, bias: Expr | None = None) -> Expr:
    y = _mm(x.reshape(-1, x.shape[-1]), weight.swap())
    y = y if bias is None else y + bias
    return y.reshape(*x.shape[:-1], weight.shape[0])


def _running(op: str) -> Rule:
    def rule(x: Expr, dim: int, dtype: Any = None) -> Expr:
        if not x.ndim:
            return x
        parts = [x.at(0, dim)]
        for i in range(1, x.shape[dim]):
            parts.append(parts[-1].call(op, x.at(i, dim)))
        return stacked(parts, dim)

    return rule


def _cross(a: Expr, b: Expr, dim: int = -1) -> Expr:
    ids = np.broadcast_arrays(a.ids, b.ids)
    x, y = (Expr(a.graph, np.moveaxis(part, dim, 0)) for part in ids)
    parts = [x[i] * y[j] - x[j] * y[i] for i, j in ((1, 2), (2, 0), (0, 1))]
    return stacked(parts, dim)


def sum_into(x: Expr, places: np.ndarray, source: Expr) -> Expr:
    """``x``, flat [n], plus each number of ``source`` at its place."""
    order = np.argsort(places, kind="stable")
    ranks = np.empty_like(order)
    ordered = places[order]
    starts = np.searchsorted(ordered, ordered, side="left")
    ranks[order] = np.arange(len(order)) - starts
    terms = np.full((x.shape[0], int(ranks.max(initial=-1)) + 1), ZERO)
    terms[places, ranks] = source.ids.reshape(-1)
    return x + Expr(x.graph, x.graph.reduce("sum", terms, x.shape))


def _index_put(x: Expr, index: Sequence[Any], values: Expr, accumulate: bool = False) -> Expr:
    positions = np.arange(x.ids.size).reshape(x.shape)
    chosen = positions[tuple(slice(None) if i is None else np.asarray(i) for i in index)]
    spread = values.expand(chosen.shape)
    flat = x.reshape(-1)
    if accumulate:
        return sum_into(flat, chosen.reshape(-1), spread).reshape(*x.shape)
    ids = flat.ids.copy()
    ids[chosen.reshape(-1)] = spread.ids.reshape(-1)
    return Expr(x.graph, ids).reshape(*x.shape)


def _put(x: Expr, index: Any, source: Expr, accumulate: bool = False) -> Expr:
    return _index_put(x.reshape(-1), [index], source, accumulate).reshape(*x.shape)


def _scatter_places(x: Expr, dim: int, index: np.ndarray) -> np.ndarray:
    grids = list(np.meshgrid(*(np.arange(n) for n in index.shape), indexing="ij"))
    grids[dim] = index
    return np.ravel_multi_index(tuple(grids), x.shape)


def _scatter_add(x: Expr, dim: int, index: Any, source: Expr) -> Expr:
    index = np.asarray(index)
    source = source[tuple(slice(0, n) for n in index.shape)]
    places = _scatter_places(x, dim, index).reshape(-1)
    return sum_into(x.reshape(-1), places, source).reshape(*x.shape)


def _scatter(x: Expr, dim: int, index: Any, source: Any) -> Expr:
    index = np.asarray(index)
    source = x.of(source)
    source = source[tuple(slice(0, n) for n in index.shape)] if source.ndim else source
    ids = x.ids.reshape(-1).copy()
    places = _scatter_places(x, dim, index)
    ids[places.reshape(-1)] = np.broadcast_to(source.ids, places.shape).reshape(-1)
    return Expr(x.graph, ids).reshape(*x.shape)


def _index_add(x: Expr, dim: int, index: Any, source: Expr, alpha: float = 1) -> Expr:
    positions = np.arange(x.ids.size).reshape(x.shape).take(np.asarray(index), dim)
    spread = _scaled(source, alpha).reshape(-1)
    return sum_into(x.reshape(-1), positions.reshape(-1), spread).reshape(*x.shape)


def _pad_backward(pad: Callable[..., Any]) -> Rule:
    def rule(grad: Expr, x: Expr, padding: Sequence[int]) -> Expr:
        """What was copied to several places is the sum of what comes from them."""
        places = pad(torch.arange(x.ids.size).reshape(x.shape), padding).numpy()
        nothing = Expr(x.graph, np.full(x.ids.size, ZERO))
        return sum_into(nothing, places.reshape(-1), grad).reshape(*x.shape)

    return rule


_PADS = [f"{kind}_pad{d}d" for kind in ("replication", "reflection") for d in (1, 2, 3)]


def _weight_norm_backward(grad: Expr, v: Expr, g: Expr, norms: Expr, dim: int) -> tuple[Expr, Expr]:
    """Of ``w = g v / |v|``, the norm over all dimensions but one."""
    others = [d for d in range(v.ndim) if d != dim % v.ndim]
    along = (grad * v).sum(others, keepdim=True) / norms
    return g / norms * (grad - v * (along / norms)), along


RULES: dict[str, Rule] = {
    **{f"{name}_backward": _pad_backward(getattr(torch.ops.aten, name)) for name in _PADS},
    "_weight_norm_interface_backward": _weight_norm_backward,
    "sum": _sum, "mean": _mean, "prod": _prod, "amax": _amax, "amin": _amin, "all": _all,
    "any": _any, "var": _var, "std": _std, "var_mean": _var_mean, "linalg_vector_norm": _norm,
    "norm": _norm, "logsumexp": _logsumexp, "_softmax": _softmax, "_log_softmax": _log_softmax,
    "_softmax_backward_data": _softmax_backward, "native_layer_norm": _layer_norm,
    "_log_softmax_backward_data": _log_softmax_backward, "native_group_norm": _group_norm,
    "native_layer_norm_backward": _layer_norm_backward, "cumsum": _running("add"),
    "native_batch_norm": _batch_norm, "native_batch_norm_backward": _batch_norm_backward,
    "native_group_norm_backward": _group_norm_backward, "cumprod": _running("mul"),
    "mm": _mm, "bmm": lambda a, b: a.matmul(b), "addmm": _addmm, "addmv": _addmv,
    "baddbmm": _baddbmm, "mv": _mv, "dot": _dot, "vdot": _dot, "linear": _linear,
    "linalg_cross": _cross, "index_put": _index_put, "put": _put, "_unsafe_index_put": _index_put,
    "scatter_add": _scatter_add, "scatter": _scatter, "index_add": _index_add,
    "trace": lambda x: Expr(x.graph, np.diagonal(x.ids)).sum(),
}  # fmt: skip
