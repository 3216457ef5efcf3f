"""Products of two that carry derivatives, and attention, under the forward Laplacian.

In the first attention over electrons, queries, keys and values depend on one electron each. The
scores then depend on pairs, the weights' rows are a rank-one change of the weights, and the
output's dense rows are written down without a product over pairs for each row (``PairWeights``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ctorch._shapes import broadcast_shapes
from ctorch.autodiff import _lap_rows as forms
from ctorch.autodiff._lap import Lap
from ctorch.autodiff._propagated import RULES, constant, rule
from ctorch.autodiff.rules import attention as _  # noqa: F401  its rule comes first
from ctorch.autodiff.rules import laplacian_norms, products, shapes
from ctorch.autodiff.rules._common import scalars_too


@rule("matmul", "__matmul__", "bmm", "mm", torch.linalg.matmul, kind=Lap)
def matmul(a: Any, b: Any) -> Any:
    if not constant(a) and constant(b) and a.ndim > 1 and 1 <= b.ndim <= 2:
        matrix = b if b.ndim == 2 else b.unsqueeze(-1)
        y = a.trailing(
            lambda s: s @ matrix
        )  # which mixes the last dim alone, and keeps their number
        return y if b.ndim == 2 else shapes.squeeze(y, -1)
    if constant(a) or constant(b) or a.ndim < 2 or b.ndim < 2:
        return products.matmul(a, b)
    if isinstance(a.special, PairWeights) and b.axes == (-2,):
        return a.special.times(b)
    slots = a.axes == (-2,) and b.axes == (-1,) and a.shape[-2] == b.shape[-1]
    if slots and len(a.rows) == len(b.rows):
        return pair_products(a, b)
    return dense_product(a.densified(), b.densified())


def dense_product(a: Lap, b: Lap) -> Lap:
    """The product of matrices with dense rows, in GEMMs as large as they can be.

    Rows of the result lie in memory as ``[*batch, M, R, N]``: then each of its two terms is one
    GEMM for a matrix of the batch, and both add up in place.
    """
    batch = broadcast_shapes(a.shape[:-2], b.shape[:-2])
    x, y = (p.value.expand(*batch, *p.shape[-2:]) for p in (a, b))
    ra, rb = (_rows(p, batch) for p in (a, b))
    count = len(ra)
    left = ra.movedim(0, -2)  # [*batch, M, R, K]
    right = rb.movedim(0, -2).flatten(-2)  # [*batch, K, R * N]
    rows = _plus_product(
        (left.flatten(-3, -2) @ y).unflatten(-2, (-1, count)).flatten(-2), x, right
    )
    lap = 2 * (left.flatten(-2) @ rb.movedim(0, -3).flatten(-3, -2))
    if a.lap is not None:
        lap = lap + a.lap @ y
    if b.lap is not None:
        lap = lap + x @ b.lap
    return Lap(x @ y, rows.unflatten(-1, (count, -1)).movedim(-2, 0), lap)


def _rows(x: Lap, batch: torch.Size) -> Tensor:
    """Rows ``[R, *batch, M, N]``."""
    return forms.widened(x.rows, len(batch) + 2).expand(-1, *batch, *x.shape[-2:])


def _plus_product(sum: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``sum + a @ b``, in the memory of ``sum`` where no graph sees it."""
    if forms.recorded(sum, a, b) or sum.ndim != 3:
        return sum + a @ b
    return sum.baddbmm_(a, b)


def rows_times(rows: Tensor, y: Tensor) -> Tensor:
    """``[*b, R, M, K], [*b, K, N] -> [*b, R, M, N]`` in one GEMM for each of the batch."""
    return (rows.flatten(-3, -2) @ y).unflatten(-2, rows.shape[-3:-1])


def times_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``[*b, M, K], [*b, R, K, N] -> [*b, R, M, N]``."""
    wide = x @ rows.transpose(-3, -2).flatten(-2)  # [*b, M, R * N]
    return wide.unflatten(-1, (rows.shape[-3], rows.shape[-1])).transpose(-3, -2)


def cross(a: Tensor, b: Tensor) -> Tensor:
    """``sum_r a_r b_r``: ``[*b, R, M, K], [*b, R, K, N] -> [*b, M, N]``, a contraction of R * K."""
    return a.transpose(-3, -2).flatten(-2) @ b.flatten(-3, -2)


def pair_products(a: Lap, b: Lap) -> Lap:
    """``[.., N, K], [.., K, N] -> [.., N, N]`` of single slots: rows of pairs of slots."""
    x, y = a.value, b.value
    ra, rb = (forms.widened(p.rows, max(a.ndim, b.ndim)) for p in (a, b))
    ra = ra.expand(*ra.shape[:-1], x.shape[-1])
    rb = rb.expand(*rb.shape[:-2], y.shape[-2], rb.shape[-1])
    value = x @ y
    first, second = (part.expand(-1, *value.shape) for part in (ra @ y, x @ rb))
    same = 2 * (ra * rb.mT).sum((0, -1))  # [.., N]: the electrons' own
    lap = torch.diag_embed(same.expand(*value.shape[:-1])).expand(value.shape)
    if a.lap is not None:
        lap = lap + a.lap @ y
    if b.lap is not None:
        lap = lap + x @ b.lap
    axes = (-2, -1)
    return Lap(value, forms.halves(first, second, axes, value.shape), lap, axes)


class PairWeights:
    """Rows of a softmax, over the second of two slots, of scores that depend on both.

    The dense row of seed ``(n, c)``, at slots ``i, j``, is
    ``moved[c, i, n] (delta_jn - weights[i, j]) + delta_in local[c, i, j]``.

    Attributes:
        weights: ``[.., N, N]``. local, moved: ``[C, .., N, N]``. lap: ``[.., N, N]``.
    """

    def __init__(self, scores: Lap) -> None:
        own, other = scores.full().chunk(2)
        p = self.weights = scores.value.softmax(-1)
        change = own - (p * own).sum(-1, keepdim=True)
        self.local, self.moved = p * change, p * other
        squares = forms.squared(change, p.shape) + forms.squared(other, p.shape) * (1 - 2 * p)
        squares = squares + (self.moved * self.moved).sum((0, -1)).unsqueeze(-1)
        if scores.lap is not None:
            squares = squares + scores.lap
        self.lap = p * (squares - (p * squares).sum(-1, keepdim=True))

    def dense(self) -> Tensor:
        """``[N * C, .., N, N]``."""
        ahead = self.moved.movedim(-1, 0).unsqueeze(-1)  # [n, C, .., i, 1]
        rows = torch.diag_embed(self.moved, 0, 0, -1) - ahead * self.weights
        rows = rows + torch.diag_embed(self.local.transpose(-1, -2), 0, 0, -2)
        return rows.flatten(0, 1)

    def times(self, v: Lap) -> Lap:
        """The product with values of single slots, ``[.., N, D]``: its rows are dense."""
        p, x = self.weights, v.value
        rv = v.rows
        sizes = [*rv.shape[:-2], *x.shape[-2:]]
        rv = rv.expand(sizes)
        out = p @ x
        ahead = self.moved.movedim(-1, 0).unsqueeze(-1)  # [n, C, .., i, 1]
        source = x.movedim(-2, 0).unsqueeze(1).unsqueeze(-2)  # [n, 1, .., 1, D]
        share = p.movedim(-1, 0).unsqueeze(1).unsqueeze(-1)  # [n, 1, .., i, 1]
        given = rv.movedim(-2, 0).unsqueeze(-2)  # [n, C, .., 1, D]
        own_rows = (self.local @ x).transpose(-1, -2)  # [C, .., D, i], of the seeds of slot i
        rows = ahead * (source - out)
        if forms.recorded(rows, given, own_rows):
            rows = rows + share * given + torch.diag_embed(own_rows, 0, 0, -2)
        else:
            rows.addcmul_(share, given).diagonal(0, 0, -2).add_(own_rows)
        own = torch.diag_embed(self.local.diagonal(0, -2, -1))
        lap = 2 * ((self.moved * (1 - p) + own) @ rv).sum(0) + self.lap @ x
        if v.lap is not None:
            lap = lap + p @ v.lap
        return Lap(out, rows.flatten(0, 1), lap)


@rule("softmax", F.softmax, torch.special.softmax, kind=Lap)
@scalars_too
def softmax(x: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if x.axes == (-2, -1) and dtype is None and dim in (-1, x.ndim - 1):
        weights = PairWeights(x)
        return Lap(weights.weights, weights, weights.lap)
    return laplacian_norms.softmax(x, dim, dtype=dtype)


@rule(F.scaled_dot_product_attention, kind=Lap)
def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    parts = (query, key, value)
    generic = dropout_p > 0 or enable_gqa or not all(isinstance(x, Lap) for x in parts)
    mask = None if generic else _mask(query, key, attn_mask, is_causal)
    generic = generic or mask is False or all(x.axes == (-2,) for x in parts)
    if generic or not query.shape[:-2] == key.shape[:-2] == value.shape[:-2]:
        rule = RULES[F.scaled_dot_product_attention]
        return rule(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    q, k, v = (x.densified() for x in parts)
    return dense_attention(q, k, v, factor, mask)


def _mask(query: Lap, key: Lap, mask: Any, causal: bool) -> Any:
    """What is added to scores, None, or False if that is no constant or masks all keys."""
    if mask is None and not causal:
        return None
    if not constant(mask) or (causal and mask is not None):
        return False
    if mask is None:
        sizes = (query.shape[-2], key.shape[-2])
        mask = torch.ones(sizes, dtype=torch.bool, device=query.device).tril()
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    return mask if bool((mask > -math.inf).any(-1).all()) else False


# ---- attention with dense rows


def dense_attention(q: Lap, k: Lap, v: Lap, scale: float, mask: Tensor | None) -> Lap:
    """Attention in blocks of heads, so that rows of the scores stay in cache."""
    batch, n, m, count = q.shape[:-2], q.shape[-2], k.shape[-2], len(q.rows)
    heads = batch.numel()
    inputs = [_Heads(x, batch) for x in (q, k, v)]
    if mask is not None:
        mask = mask.expand(*batch, n, m).reshape(heads, n, m)
    block = heads
    if not forms.recorded(*(x.rows for x in (q, k, v))):
        size = count * n * m * q.value.element_size()
        block = max(1, min(heads, (1 << 19) // max(1, size)))
    parts = []
    for i in range(0, heads, block):
        q_, k_, v_ = (x.some(i, i + block) for x in inputs)
        parts.append(_attention(q_, k_, v_, scale, None if mask is None else mask[i : i + block]))
    value, rows, lap = (
        parts[0] if len(parts) == 1 else (torch.cat(p) for p in zip(*parts, strict=True))
    )
    shape = (*batch, n, v.shape[-1])
    return Lap(
        value.reshape(shape), rows.reshape(*batch, n, count, -1).movedim(-2, 0), lap.reshape(shape)
    )


class _Heads:
    """Queries, keys or values with the batch and heads in one dim ``G``.

    Attributes:
        value, lap: ``[G, N, D]``. slots: rows ``[G, N, R * D]``. rows: rows ``[G, R * N, D]``.
    """

    def __init__(self, x: Lap, batch: torch.Size) -> None:
        n, d = x.shape[-2:]
        g, full = batch.numel(), x.full()
        self.value = x.value.reshape(g, n, d)
        self.lap = x.laplacian().reshape(g, n, d)
        self.slots = full.movedim(0, -2).reshape(g, n, -1)
        self.rows = full.movedim(0, -3).reshape(g, -1, d)

    def some(self, begin: int, end: int) -> _Heads:
        """A block of ``G``."""
        part = object.__new__(_Heads)
        for name, x in vars(self).items():
            setattr(part, name, x[begin:end])
        return part


def _attention(
    q: _Heads, k: _Heads, v: _Heads, scale: float, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Value ``[G, N, D]``, rows ``[G, N, R * D]`` and Laplacian ``[G, N, D]`` of attention."""
    g, n, d = q.value.shape
    m, count = k.value.shape[1], k.rows.shape[1] // k.value.shape[1]
    x, y = q.value * scale, k.value.mT * scale
    scores = q.value @ y
    p = (scores if mask is None else scores + mask).softmax(-1)
    rows = (q.slots.reshape(g, n * count, d) @ y).reshape(g, n, count * m)
    rows = _plus_product(rows, x, k.rows.mT).reshape(g * n, count, m)
    lap = torch.baddbmm(q.lap @ y + x @ k.lap.mT, q.slots, k.slots.mT, alpha=2 * scale)
    flat = p.reshape(g * n, 1, m)
    rows, second = centered(rows, flat)
    lap = lap + second.reshape(g, n, m)
    lap = p * (lap - (p * lap).sum(-1, keepdim=True))
    rows = times(rows, flat)
    out = (rows.reshape(g, n * count, m) @ v.value).reshape(g, n, -1)
    lap = torch.baddbmm(lap @ v.value + p @ v.lap, rows.reshape(g, n, count * m), v.rows, alpha=2)
    return p @ v.value, _plus_product(out, p, v.slots), lap


def centered(rows: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """``d_r = s_r - sum(p s_r)``, ``sum_r d_r^2``; ``rows: [G, R, M]``, ``p: [G, 1, M]``."""
    average = rows @ p.mT
    rows = rows - average if forms.recorded(rows, p) else rows.sub_(average)
    return rows, (rows * rows).sum(1)


def times(rows: Tensor, factor: Tensor) -> Tensor:
    """The product, in the memory of ``rows`` where no graph sees it."""
    return rows * factor if forms.recorded(rows, factor) else rows.mul_(factor)
