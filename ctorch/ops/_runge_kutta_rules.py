"""Derivative and batching rules of the Runge-Kutta operators.

The derivatives are written in plain PyTorch, so that they can be differentiated again. The numbers
of a tableau, ``a``, ``b``, ``e`` and ``p``, are constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ctorch.ops import _runge_kutta_reference as reference
from ctorch.ops._runge_kutta_reference import per_sample, to_number, weighted_sum

Args = tuple[Any, ...]


# ---- combine -----------------------------------------------------------------------------------


def combine_backward(args: Args, needed: Sequence[bool], g: Tensor | None) -> Args:
    """Cotangents of (y, k, a, h)."""
    _y, k, a, h = args
    if g is None:
        return None, None, None, None
    gk = _spread(a, per_sample(h, k, k.dim() - 1) * g, k) if needed[1] else None
    gh = _step_cotangent(g * weighted_sum(k, a), h) if needed[3] else None
    return (g if needed[0] else None), gk, None, gh


def combine_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of the combination."""
    _, k, a, h = args
    ty, tk, _, th = tangents
    return _add(ty, _change_tangent(k, a, h, tk, th)).to(k.dtype)


def combine_vmap(call: Callable[..., Any], size: int, batched: Sequence[bool], args: Args) -> Any:
    """Mapped states become samples of one larger state."""
    y, k, a, h = args
    if batched[2] or (h.dim() - batched[3] and k.dim() - batched[1] < 2):
        return fallback(reference.combine, batched, args), 0
    y, k, h, unmerge = _merge(size, batched[0], y, batched[1], k, batched[3], h)
    return unmerge(call(y, k, a, h)), 0


# ---- step --------------------------------------------------------------------------------------


def step_backward(args: Args, needed: Sequence[bool], g1: Tensor | None, gn: Tensor | None) -> Args:
    """Cotangents of (y, k, b, e, h, rtol, atol, ...)."""
    y, k, b, e, h, rtol, atol, segments, max_norm, by_sample = args
    error_g = y_g = rtol_g = atol_g = None
    if gn is not None:
        part = _Scaled(y, k, b, e, h, rtol, atol)
        slope = norm_slope(part.ratio, segments, max_norm, by_sample)
        ratio_g = _spread_norm(gn, part.ratio, by_sample) * slope
        error_g = ratio_g / part.tolerance
        tolerance_g = -error_g * part.ratio
        atol_g = _tolerance_cotangent(tolerance_g, atol) if needed[6] else None
        rtol_g = _tolerance_cotangent(tolerance_g * part.largest, rtol) if needed[5] else None
        largest_g = to_number(rtol, y) * tolerance_g
        y_g = largest_g * part.y_slope
        g1 = _add(g1, largest_g * part.y1_slope)
    y_g = _add(g1, y_g) if needed[0] else None
    gk = gh = None
    if needed[1]:
        step = per_sample(h, k, y.dim())
        parts = [_spread(c, step * g, k) for c, g in ((b, g1), (e, error_g)) if g is not None]
        gk = _add(*parts) if len(parts) == 2 else parts[0] if parts else None
    if needed[4]:
        parts = [g * weighted_sum(k, c) for c, g in ((b, g1), (e, error_g)) if g is not None]
        gh = _step_cotangent(_add(*parts) if len(parts) == 2 else parts[0], h) if parts else None
    return y_g, gk, None, None, gh, rtol_g, atol_g, None, None, None


def step_jvp(args: Args, tangents: Args) -> tuple[Tensor, Tensor]:
    """Tangents of the new state and of the norm."""
    y, k, b, e, h, rtol, atol, segments, max_norm, by_sample = args
    ty, tk, _, _, th, trtol, tatol = tangents[:7]
    part = _Scaled(y, k, b, e, h, rtol, atol)
    t1 = _add(ty, _change_tangent(k, b, h, tk, th))
    tolerance_t = to_number(rtol, y) * _add(
        None if ty is None else part.y_slope * ty, part.y1_slope * t1
    )
    if trtol is not None:
        tolerance_t = tolerance_t + to_number(trtol, y) * part.largest
    if tatol is not None:
        tolerance_t = tolerance_t + to_number(tatol, y)
    error_t = _change_tangent(k, e, h, tk, th)
    ratio_t = (error_t - part.ratio * tolerance_t) / part.tolerance
    weighted = norm_slope(part.ratio, segments, max_norm, by_sample) * ratio_t
    return t1, (_sum_rest(weighted) if by_sample else weighted.sum())


def step_vmap(call: Callable[..., Any], size: int, batched: Sequence[bool], args: Args) -> Any:
    """Mapped states become samples of one larger state, with a norm each."""
    y, k, b, e, h, rtol, atol, segments, max_norm, by_sample = args
    steps = h.dim() - batched[4]
    if batched[2] or batched[3] or (steps and not by_sample):
        return fallback(reference.step, batched, args), (0, 0)
    if by_sample and not steps:
        samples = k.shape[2 if batched[1] else 1]
        h = h.unsqueeze(-1).expand(*h.shape, samples)
    y, k, h, unmerge = _merge(size, batched[0], y, batched[1], k, batched[4], h)
    rtol = _merge_tolerance(rtol, batched[5], size, y)
    atol = _merge_tolerance(atol, batched[6], size, y)
    y1, norm = call(y, k, b, e, h, rtol, atol, segments, max_norm, True)
    return (unmerge(y1), unmerge(norm)), (0, 0)


class _Scaled:
    """The parts of the scaled error that its derivatives are made of."""

    def __init__(
        self, y: Tensor, k: Tensor, b: Tensor, e: Tensor, h: Tensor, rtol: Tensor, atol: Tensor
    ) -> None:
        y1 = reference.combine(y, k, b, h)
        self.tolerance = reference.tolerance(y, y1, rtol, atol)
        self.ratio = reference.combine(None, k, e, h) / self.tolerance
        self.largest = torch.maximum(y.abs(), y1.abs())
        share = 0.5 * ((y.abs() > y1.abs()).to(y.dtype) + (y.abs() >= y1.abs()).to(y.dtype))
        self.y_slope = share * y.sign()
        self.y1_slope = (1 - share) * y1.sign()


def norm_slope(ratio: Tensor, segments: Sequence[int], max_norm: bool, by_sample: bool) -> Tensor:
    """Derivative of the norm with respect to each element; zero where the norm is zero."""
    norms = torch.stack(reference.segment_norms(ratio, segments, max_norm, by_sample))
    chosen = (norms == norms.amax(0)).to(norms.dtype)
    chosen = chosen / chosen.sum(0)
    slopes = []
    parts = reference.split(ratio, segments, by_sample)
    for part, norm, share in zip(parts, norms.unsqueeze(-1), chosen.unsqueeze(-1), strict=True):
        if max_norm:
            at = (part.abs() == norm).to(part.dtype)
            slope = at * part.sign() / at.sum(-1, keepdim=True)
        else:
            zero = norm == 0
            slope = torch.where(zero, 0, part / torch.where(zero, 1, norm)) / max(part.shape[-1], 1)
        slopes.append(share * slope)
    return torch.cat(slopes, -1).reshape(ratio.shape)


# ---- interpolate -------------------------------------------------------------------------------


def interpolate_backward(args: Args, needed: Sequence[bool], g: Tensor | None) -> Args:
    """Cotangents of (y, k, p, theta, h, sample)."""
    y, k, p, theta, h, sample = args
    if g is None:
        return (None,) * 6
    step = _query_step(h, k, sample)
    gy = gk = gtheta = gh = None
    if needed[0]:
        gy = g.sum(0) if sample is None else torch.zeros_like(y).index_add(0, sample, g)
    if needed[1]:
        gk = _dense_cotangent(reference.dense_weights(p, theta), p, step * g, k, sample)
    if needed[3]:
        slope = step * reference.dense_change(_dense_slopes(p, theta), p, k, sample)
        gtheta = _sum_rest(g * slope).to(theta.dtype).to(theta.device)
    if needed[4]:
        each = g * reference.dense_change(reference.dense_weights(p, theta), p, k, sample)
        if h.dim() and sample is None:
            each = each.sum(0)
        elif h.dim():
            each = each.new_zeros((k.shape[1], *each.shape[1:])).index_add(0, sample, each)
        gh = _step_cotangent(each, h)
    return gy, gk, None, gtheta, gh, None


def interpolate_jvp(args: Args, tangents: Args) -> Tensor:
    """Tangent of the dense output."""
    y, k, p, theta, h, sample = args
    ty, tk, _, ttheta, th = tangents[:5]
    weights, step = reference.dense_weights(p, theta), _query_step(h, k, sample)
    out = y.new_zeros(()) if ty is None else ty if sample is None else ty[sample]
    if tk is not None:
        out = out + step * reference.dense_change(weights, p, tk, sample)
    if ttheta is not None:
        slope = step * reference.dense_change(_dense_slopes(p, theta), p, k, sample)
        out = out + slope * to_number(ttheta, k).reshape((-1,) + (1,) * (slope.dim() - 1))
    if th is not None:
        out = out + _query_step(th, k, sample) * reference.dense_change(weights, p, k, sample)
    shape = y.shape if sample is None else y.shape[1:]
    return out.expand(theta.shape[0], *shape).to(k.dtype)


def interpolate_vmap(
    call: Callable[..., Any], size: int, batched: Sequence[bool], args: Args
) -> Any:
    """Mapped states become samples of one larger state; mapped times, queries of their samples."""
    y, k, p, theta, h, sample = args
    steps = h.dim() - batched[4]
    if batched[2] or (steps and sample is None and batched[3]):
        return fallback(reference.interpolate, batched, args), 0
    samples = k.shape[2 if batched[1] else 1] if sample is not None else 1
    if sample is not None and not steps:
        h = h.unsqueeze(-1).expand(*h.shape, samples)
    y, k, h, unmerge = _merge(size, batched[0], y, batched[1], k, batched[4], h)
    if sample is None and not batched[3]:
        out = call(y, k, p, theta, h, None)
        return (out.unflatten(1, (size, -1)) if unmerge.folds else out), 1
    theta = (theta if batched[3] else theta.expand(size, -1)).to(k.device)
    first = torch.arange(size, device=k.device).unsqueeze(-1) * samples
    index = first.expand(theta.shape) if sample is None else first + sample
    out = call(y, k, p, theta.reshape(-1), h, index.reshape(-1))
    return out.reshape(*theta.shape, *out.shape[1:]), 0


def _query_step(h: Tensor, k: Tensor, sample: Tensor | None) -> Tensor:
    h = per_sample(h, k, k.dim() - 1)
    return h[sample] if sample is not None and h.dim() else h


def _dense_slopes(p: Tensor, theta: Tensor) -> Tensor:
    """Derivatives of the weights by theta: [M, S]."""
    powers = torch.arange(1, p.shape[1] + 1, dtype=p.dtype, device=p.device)
    slopes = torch.zeros_like(theta).unsqueeze(-1)
    for column in (p * powers).to(theta.dtype).to(theta.device).flip(-1).unbind(-1):
        slopes = slopes * theta.unsqueeze(-1) + column
    return slopes


def _dense_cotangent(
    weights: Tensor, p: Tensor, g: Tensor, k: Tensor, sample: Tensor | None
) -> Tensor:
    weights = to_number(weights, k)
    if sample is None:
        gk = torch.tensordot(weights.t(), g.to(weights.dtype), 1)
    else:
        each = weights.t().reshape(weights.shape[::-1] + (1,) * (g.dim() - 1)) * g
        gk = each.new_zeros((each.shape[0], *k.shape[1:])).index_add(1, sample, each)
    used = reference.used_stages(p, gk)
    return _pad_stages(torch.where(used, gk, torch.zeros_like(gk)), k)


# ---- shared ------------------------------------------------------------------------------------


def fallback(function: Callable[..., Any], batched: Sequence[bool], args: Args) -> Any:
    """The reference under vmap, for the rare batchings that no kernel serves."""
    return torch.vmap(function, tuple(0 if b else None for b in batched))(*args)


class _Unmerge:
    """Undoes ``_merge`` on a result: splits the samples that two dimensions were folded into."""

    def __init__(self, size: int, folds: bool) -> None:
        self.size, self.folds = size, folds

    def __call__(self, x: Tensor) -> Tensor:
        return x.reshape(self.size, x.shape[0] // self.size, *x.shape[1:]) if self.folds else x


def _merge(
    size: int,
    y_mapped: bool,
    y: Tensor | None,
    k_mapped: bool,
    k: Tensor,
    h_mapped: bool,
    h: Tensor,
) -> tuple[Any, Tensor, Tensor, _Unmerge]:
    """Makes the mapped dimension that of the samples, or a part of it if there are samples."""
    k = k.movedim(0, 1) if k_mapped else k.unsqueeze(1).expand(-1, size, *k.shape[1:])
    if y is not None:
        y = y if y_mapped else y.expand(size, *y.shape)
    folds = h.dim() - h_mapped == 1
    if folds:
        h = (h if h_mapped else h.expand(size, -1)).reshape(-1)
        k = k.reshape(k.shape[0], size * k.shape[2], *k.shape[3:])
        y = None if y is None else y.reshape(size * y.shape[1], *y.shape[2:])
    return y, k, h, _Unmerge(size, folds)


def _merge_tolerance(x: Tensor, mapped: bool, size: int, y: Tensor) -> Tensor:
    if not mapped and x.dim() == 0:
        return x
    if not mapped:
        x = x.expand(size, *x.shape)
    elif x.dim() == 1:
        x = x.reshape((size,) + (1,) * (y.dim() - 1))
        x = x if x.shape[0] == y.shape[0] else x.repeat_interleave(y.shape[0] // size, 0)
        return to_number(x, y).expand(y.shape).contiguous()
    return x.reshape(y.shape).contiguous()


def _add(x: Tensor | None, y: Tensor | None) -> Any:
    return y if x is None else x if y is None else x + y


def _sum_rest(x: Tensor) -> Tensor:
    """Sum over all but the first dimension."""
    return x.sum(tuple(range(1, x.dim()))) if x.dim() > 1 else x


def _spread(a: Tensor, g: Tensor, k: Tensor) -> Tensor:
    """The cotangent of k in sum_j a_j k_j: a_j g, and nothing for a stage not looked at."""
    a = to_number(a, k).reshape((-1,) + (1,) * g.dim())
    return _pad_stages(torch.where(a == 0, 0, a * g), k).to(k.dtype)


def _pad_stages(gk: Tensor, k: Tensor) -> Tensor:
    missing = k.shape[0] - gk.shape[0]
    return torch.cat([gk, gk.new_zeros((missing, *gk.shape[1:]))]) if missing else gk


def _step_cotangent(each: Tensor, h: Tensor) -> Tensor:
    return (_sum_rest(each) if h.dim() else each.sum()).to(h.dtype).to(h.device)


def _change_tangent(
    k: Tensor, a: Tensor, h: Tensor, tk: Tensor | None, th: Tensor | None
) -> Tensor:
    """Tangent of h sum_j a_j k_j."""
    dims = k.dim() - 1
    tangent = None if tk is None else per_sample(h, k, dims) * weighted_sum(tk, a)
    if th is not None:
        tangent = _add(tangent, per_sample(th, k, dims) * weighted_sum(k, a))
    return k.new_zeros(k.shape[1:]) if tangent is None else tangent


def _spread_norm(g: Tensor, ratio: Tensor, by_sample: bool) -> Tensor:
    return g.reshape(g.shape + (1,) * (ratio.dim() - 1)) if by_sample else g


def _tolerance_cotangent(g: Tensor, x: Tensor) -> Tensor:
    return g.sum_to_size(x.shape).to(x.dtype).to(x.device)
