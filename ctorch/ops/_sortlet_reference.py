"""The sortlet operators in plain PyTorch: what the kernels must equal, on any device.

Everything between the scores and the results is float64. ``phi`` is the function of a gap: ``g``
itself, or ``tanh(g)``. What a sorted list of N scores has N - 1 of is named by ``i``: gap ``g_i``,
``log_slope`` ``w_i = phi'/phi``.
"""

from __future__ import annotations

import torch
from torch import Tensor

LINEAR, TANH = 0, 1
# A smaller gap counts as this in derivatives of the logarithm, and as a tie in those of a term: no
# power of 1 / gap overflows. Gaps of float32 scores are never so small.
SMALL = 1e-150


# ---- the logarithm -----------------------------------------------------------------------------


def sortlet(scores: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """Sign and logarithm of the product of gaps."""
    order, gaps = _sort(scores)
    tied = gaps == 0
    any_tied = tied.any(-1, keepdim=True)
    skip = tied | (any_tied & gaps.isinf())  # inf - inf would be NaN
    total = torch.where(skip, 0.0, _log(torch.where(skip, 1.0, gaps), gap)).sum(-1)
    any_tied, poison = any_tied[..., 0], _poison(scores)
    logabs = torch.where(any_tied, total - torch.inf, total) + poison
    sign = torch.where(any_tied, 0, parity(order)) + poison
    return sign.to(scores.dtype), logabs.to(scores.dtype)


def gradient(scores: Tensor, g: Tensor, gap: int) -> Tensor:
    """``g d(logabs)/d(scores)``."""
    order, gaps = _sort(scores)
    slope, _ = _log_slopes(gaps, gap)
    out = g.double().unsqueeze(-1) * _spread(slope, order)
    return (out + _poison(scores).unsqueeze(-1)).to(scores.dtype)


def hessian(scores: Tensor, g: Tensor, v: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """Derivatives of ``gradient . v`` in ``g`` and in the scores."""
    order, gaps = _sort(scores)
    slope, curve = _log_slopes(gaps, gap)
    change = _differences(v, order)
    poison = _poison(scores)
    of_g = (slope * change).sum(-1) + poison
    of_scores = g.double().unsqueeze(-1) * _spread(curve * change, order) + poison.unsqueeze(-1)
    return of_g.to(scores.dtype), of_scores.to(scores.dtype)


def laplacian(scores: Tensor, rows: Tensor, lap: Tensor, gap: int) -> tuple[Tensor, Tensor, Tensor]:
    """From rows and Laplacian of the scores: those of logabs, and the Laplacian of psi over psi."""
    order, gaps = _sort(scores)
    slope, curve = _log_slopes(gaps, gap)
    change = _differences(rows, order)
    poison = _poison(scores)
    parts = slope * change
    before = torch.cumsum(_behind(0.0, parts)[..., :-1], -1)  # sums of all before each one
    linear = (slope * _differences(lap, order)).sum(-1)
    second = (_ratio_curve(gaps, gap) * change**2).sum((0, -1))
    log_second = (curve * change**2).sum((0, -1))
    ratio = linear + second + 2 * (parts * before).sum((0, -1))
    outs = (parts.sum(-1) + poison, linear + log_second + poison, ratio + poison)
    return outs[0].to(scores.dtype), outs[1].to(scores.dtype), outs[2].to(scores.dtype)


# ---- the product, times exp(shift) -------------------------------------------------------------


def term(scores: Tensor, shift: Tensor, sign: Tensor, logabs: Tensor, gap: int) -> Tensor:
    """``exp(shift) psi``; ``sign`` and ``logabs`` hold psi's value, which a kernel starts from."""
    part = _Term(scores, shift, gap)
    return (part.scale * _scan(part.ratio)[..., -1]).to(scores.dtype)


def term_gradient(scores: Tensor, shift: Tensor, g: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """``g`` times the derivatives of a term in scores and shift."""
    part = _Term(scores, shift, gap)
    g = g.double()
    others, _ = _all_others(part.ratio, torch.zeros_like(part.ratio))
    slopes = part.slope * others[..., 1:]
    of_scores = (g * part.scale).unsqueeze(-1) * _spread(slopes, part.order)
    of_shift = g * part.scale * _scan(part.ratio)[..., -1]
    return of_scores.to(scores.dtype), of_shift.to(scores.dtype)


def term_hessian(
    scores: Tensor, shift: Tensor, g: Tensor, v: Tensor, u: Tensor, gap: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Derivatives of ``term_gradient . (v, u)`` in scores, shift and ``g``."""
    part = _Term(scores, shift, gap)
    g, u = g.double(), u.double()
    change = part.changes(v)
    ratio_t, slope_t = part.slope * change, part.curve * change
    others, others_t = _all_others(part.ratio, _behind(0.0, ratio_t))
    others, others_t = others[..., 1:], others_t[..., 1:]
    slopes = slope_t * others + part.slope * (others_t + others * u.unsqueeze(-1))
    of_scores = (g * part.scale).unsqueeze(-1) * _spread(slopes, part.order)
    value = _scan(part.ratio)[..., -1]
    of_g = part.scale * (value * u + (part.slope * others * change).sum(-1))
    dtype = scores.dtype
    return of_scores.to(dtype), (g * of_g).to(dtype), of_g.to(dtype)


def term_laplacian(
    scores: Tensor, shift: Tensor, rows: Tensor, lap: Tensor, gap: int
) -> tuple[Tensor, Tensor, Tensor]:
    """A term, its derivatives along the rows, and its Laplacian; ``shift`` is a constant."""
    part = _Term(scores, shift, gap)
    change = part.changes(rows)
    first, second = part.slope * change, part.curve * change**2
    p1, p2 = _behind(0.0, first), _behind(0.0, second)
    p = part.ratio.expand_as(p1)
    while p.shape[-1] > 1:  # products of neighbors, as series of degree 2
        if p.shape[-1] % 2:
            p, p1, p2 = _padded(p, 1.0), _padded(p1, 0.0), _padded(p2, 0.0)
        a, a1, a2 = p[..., ::2], p1[..., ::2], p2[..., ::2]
        b, b1, b2 = p[..., 1::2], p1[..., 1::2], p2[..., 1::2]
        p, p1, p2 = a * b, a1 * b + a * b1, a2 * b + 2 * a1 * b1 + a * b2
    others, _ = _all_others(part.ratio, torch.zeros_like(part.ratio))
    linear = (part.slope * others[..., 1:] * part.changes(lap)).sum(-1)
    value = part.scale * _scan(part.ratio)[..., -1]
    slopes, laps = part.scale * p1[..., 0], part.scale * (linear + p2[..., 0].sum(0))
    return value.to(scores.dtype), slopes.to(scores.dtype), laps.to(scores.dtype)


class _Term:
    """``exp(shift) psi = scale * prod(ratio)``, where a ratio is 1, or small at a tie.

    The first ratio, of no gap, is 1: there is one even of a single score.
    """

    def __init__(self, scores: Tensor, shift: Tensor, gap: int) -> None:
        self.order, gaps = _sort(scores)
        unit = torch.where(gaps < SMALL, 1.0, _phi(gaps, gap)).detach()
        size = torch.exp(shift.double() + unit.log().sum(-1))
        self.scale = parity(self.order) * size + _poison(scores)
        ratio = _phi(gaps, gap) / unit
        self.ratio = _behind(1.0, ratio)
        sech2 = 1 - torch.tanh(gaps) ** 2 if gap == TANH else torch.ones_like(gaps)
        self.slope = sech2 / unit
        self.curve = (-2 * torch.tanh(gaps) * sech2 if gap == TANH else 0 * gaps) / unit

    def changes(self, v: Tensor) -> Tensor:
        return _differences(v, self.order)


# ---- parts -------------------------------------------------------------------------------------


def _sort(scores: Tensor) -> tuple[Tensor, Tensor]:
    """The sorting permutation and the gaps; equal scores, infinite ones too, have the gap zero."""
    x = scores.double()
    order = torch.sort(x.detach(), dim=-1, stable=True).indices
    x = x.gather(-1, order)
    low, high = x[..., :-1], x[..., 1:]
    return order, torch.where((low == high) & low.isinf(), 0.0, high - low)


def _poison(scores: Tensor) -> Tensor:
    """NaN for a list that holds one, else zero."""
    return torch.where(scores.isnan().any(-1), torch.nan, 0.0).double()


def parity(order: Tensor) -> Tensor:
    """1 or -1, the sign of each permutation."""
    n = order.shape[-1]
    if n <= 64:  # inversions
        later = torch.ones(n, n, dtype=torch.bool, device=order.device).triu(1)
        odd = (order.unsqueeze(-1) > order.unsqueeze(-2)) & later
        return (1 - 2 * (odd.sum((-2, -1)) % 2)).double()
    label, at = torch.arange(n, device=order.device).expand_as(order), order
    for _ in range((n - 1).bit_length()):  # the least element of each cycle
        label = torch.minimum(label, label.gather(-1, at))
        at = at.gather(-1, at)
    cycles = (label == torch.arange(n, device=order.device)).sum(-1)
    return (1 - 2 * ((n - cycles) % 2)).double()


def _differences(v: Tensor, order: Tensor) -> Tensor:
    """Differences of ``v [*lead, ..., N]`` along the order of the scores."""
    return v.double().gather(-1, order.expand(v.shape)).diff(dim=-1)


def _behind(first: float, x: Tensor) -> Tensor:
    """``x`` behind one more element."""
    return torch.nn.functional.pad(x, (1, 0), value=first)


def _spread(slopes: Tensor, order: Tensor) -> Tensor:
    """From derivatives in the gaps to derivatives in the scores."""
    pad = torch.nn.functional.pad
    of_sorted = (pad(slopes, (1, 0)) - pad(slopes, (0, 1)))[..., : order.shape[-1]]
    return torch.zeros_like(of_sorted).scatter(-1, order, of_sorted)


def _phi(gaps: Tensor, gap: int) -> Tensor:
    return torch.tanh(gaps) if gap == TANH else gaps


def _log(gaps: Tensor, gap: int) -> Tensor:
    if gap == LINEAR:
        return gaps.log()
    return torch.log(-torch.expm1(-2 * gaps)) - torch.log1p(torch.exp(-2 * gaps))


def _log_slopes(gaps: Tensor, gap: int) -> tuple[Tensor, Tensor]:
    """First and second derivative of ``log phi``; zero at a tie."""
    tied = gaps == 0
    safe = torch.where(tied, 1.0, gaps).clamp_min(SMALL)
    if gap == LINEAR:
        slope = 1 / safe
        curve = -(slope * slope)
    else:
        t = torch.exp(-2 * safe)
        slope = -4 * t / torch.expm1(-4 * safe)
        curve = _ratio_curve(safe, gap) - slope * slope
    return torch.where(tied, 0.0, slope), torch.where(tied, 0.0, curve)


def _ratio_curve(gaps: Tensor, gap: int) -> Tensor:
    """``phi'' / phi``."""
    if gap == LINEAR:
        return torch.zeros_like(gaps)
    t = torch.exp(-2 * gaps)
    return torch.where(gaps == 0, 0.0, -8 * t / (1 + t) ** 2)


def _scan(x: Tensor) -> Tensor:
    """Products of all elements up to each one; right at zeros, at any order of derivatives."""
    step = 1
    while step < x.shape[-1]:
        x = torch.cat([x[..., :step], x[..., step:] * x[..., :-step]], -1)
        step *= 2
    return x


def _scan_dual(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """``_scan`` with a tangent."""
    step = 1
    while step < x.shape[-1]:
        tail = t[..., step:] * x[..., :-step] + x[..., step:] * t[..., :-step]
        t = torch.cat([t[..., :step], tail], -1)
        x = torch.cat([x[..., :step], x[..., step:] * x[..., :-step]], -1)
        step *= 2
    return x, t


def _all_others(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Product of all elements but each one, with its tangent."""
    a, at = _scan_dual(_behind(1.0, x[..., :-1]), _behind(0.0, t[..., :-1]))
    flipped, flipped_t = x.flip(-1)[..., :-1], t.flip(-1)[..., :-1]
    b, bt = _scan_dual(_behind(1.0, flipped), _behind(0.0, flipped_t))
    b, bt = b.flip(-1), bt.flip(-1)
    return a * b, at * b + a * bt


def _padded(x: Tensor, value: float) -> Tensor:
    return torch.nn.functional.pad(x, (0, 1), value=value)
