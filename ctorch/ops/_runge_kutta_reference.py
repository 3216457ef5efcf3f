"""The Runge-Kutta operators in plain PyTorch: what the kernels must equal, on any device.

They allocate temporaries freely, but hold to the same rules: a stage with coefficient zero is not
looked at, half precision is accumulated in float32, norms propagate NaN.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ctorch._autocast import as_written


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values stored as ``dtype`` are added up."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def to_number(x: Tensor, like: Tensor) -> Tensor:
    """Coefficients, steps, times: to the device of ``like`` and the dtype it is accumulated in."""
    return x.to(accumulation_dtype(like.dtype)).to(like.device)


def per_sample(h: Tensor, like: Tensor, dims: int) -> Tensor:
    """The step [] or [B], in a shape that broadcasts against a state of ``dims`` dimensions."""
    h = to_number(h, like)
    return h.reshape(h.shape + (1,) * (dims - 1)) if h.dim() else h


def weighted_sum(k: Tensor, a: Tensor) -> Tensor:
    """sum_j a[j] k[j] over the nonzero a[j], in the dtype of accumulation."""
    a = to_number(a, k).reshape((-1,) + (1,) * (k.dim() - 1))
    rows = k[: a.shape[0]].to(a.dtype)
    return torch.where(a == 0, torch.zeros_like(rows), a * rows).sum(0)


def combine(y: Tensor | None, k: Tensor, a: Tensor, h: Tensor) -> Tensor:
    """State plus h sum_j a_j k_j."""
    change = per_sample(h, k, k.dim() - 1) * weighted_sum(k, a)
    return (change if y is None else y + change).to(k.dtype)


def stage(y: Tensor | None, k: Tensor, slope: Tensor, slot: int, a: Tensor, h: Tensor) -> Tensor:
    """Stores the slope, then combines."""
    k[slot].copy_(slope)
    return combine(y, k, a, h)


def error(
    y: Tensor,
    y1: Tensor,
    k: Tensor,
    slope: Tensor | None,
    slot: int,
    e: Tensor,
    h: Tensor,
    rtol: Tensor,
    atol: Tensor,
    segments: Sequence[int],
    max_norm: bool,
    by_sample: bool,
) -> Tensor:
    """Stores the slope if there is one, then takes the norm of the scaled error."""
    if slope is not None:
        k[slot].copy_(slope)
    ratio = combine(None, k, e, h) / tolerance(y, y1, rtol, atol)
    return norm(ratio, segments, max_norm, by_sample)


def step(
    y: Tensor,
    k: Tensor,
    b: Tensor,
    e: Tensor,
    h: Tensor,
    rtol: Tensor,
    atol: Tensor,
    segments: Sequence[int],
    max_norm: bool,
    by_sample: bool,
) -> tuple[Tensor, Tensor]:
    """The new state and the norm of the scaled error."""
    y1 = combine(y, k, b, h)
    ratio = combine(None, k, e, h) / tolerance(y, y1, rtol, atol)
    return y1, norm(ratio, segments, max_norm, by_sample)


def tolerance(y: Tensor, y1: Tensor, rtol: Tensor, atol: Tensor) -> Tensor:
    """What one unit of scaled error is worth: atol + rtol max(|y|, |y1|)."""
    return to_number(atol, y) + to_number(rtol, y) * torch.maximum(y.abs(), y1.abs())


def split(x: Tensor, segments: Sequence[int], by_sample: bool) -> list[Tensor]:
    """The segments of the flattened state, or of each flattened sample, in their last dimension."""
    flat = x.reshape(x.shape[0], x.shape[1:].numel()) if by_sample else x.reshape(-1)
    return list(flat.split(list(segments), -1)) if segments else [flat]


def norm(ratio: Tensor, segments: Sequence[int], max_norm: bool, by_sample: bool) -> Tensor:
    """The largest of the segments' norms: [B] by sample, else []. Nothing at all has norm zero."""
    return torch.stack(segment_norms(ratio, segments, max_norm, by_sample)).amax(0)


def segment_norms(
    ratio: Tensor, segments: Sequence[int], max_norm: bool, by_sample: bool
) -> list[Tensor]:
    """The root mean square or the maximum of each segment."""
    norms = []
    for part in split(ratio, segments, by_sample):
        if part.shape[-1] == 0:
            norms.append(part.new_zeros(part.shape[:-1]))
        elif max_norm:
            norms.append(part.abs().amax(-1))
        else:
            mean = part.square().mean(-1)
            zero = mean == 0  # the root has no derivative there: take the one that is zero
            norms.append(torch.where(zero, mean, torch.where(zero, 1, mean).sqrt()))
    return norms


def dense_weights(p: Tensor, theta: Tensor) -> Tensor:
    """b_i(theta_m) = sum_d p[i, d-1] theta_m^d, in float64 where there is such a thing: [M, S]."""
    weights = torch.zeros_like(theta).unsqueeze(-1)
    for column in p.to(theta.dtype).to(theta.device).flip(-1).unbind(-1):
        weights = (weights + column) * theta.unsqueeze(-1)
    return weights


def used_stages(p: Tensor, like: Tensor) -> Tensor:
    """Which stages take part at all, in a shape that broadcasts against ``like`` [S, ...]."""
    return (p != 0).any(-1).to(like.device).reshape((-1,) + (1,) * (like.dim() - 1))


def dense_change(weights: Tensor, p: Tensor, k: Tensor, sample: Tensor | None) -> Tensor:
    """Sum over the stages, of weights [M, S] times k: [M, *shape], or of one sample each."""
    weights = to_number(weights, k)
    rows = k[: p.shape[0]].to(weights.dtype)
    rows = torch.where(used_stages(p, k), rows, torch.zeros_like(rows))
    if sample is None:
        with as_written(rows):
            return torch.tensordot(weights, rows, 1)
    rows = rows[:, sample]
    return (weights.t().reshape(rows.shape[:2] + (1,) * (rows.dim() - 2)) * rows).sum(0)


def interpolate(
    y: Tensor, k: Tensor, p: Tensor, theta: Tensor, h: Tensor, sample: Tensor | None
) -> Tensor:
    """State plus h sum_i b_i(theta_m) k_i for every m; of sample[m] where that is given."""
    change = dense_change(dense_weights(p, theta), p, k, sample)
    h = per_sample(h, k, k.dim() - 1)
    if sample is not None:
        y = y[sample]
        h = h[sample] if h.dim() else h
    return (y + h * change).to(k.dtype)
